"""`CompreSSMCallback` calls `analyze` and `compress` inside Trainer, on a schedule; it holds no mathematics."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..analysis.checks import check_config
from ..analysis.collate import Batch
from ..analysis.objective import Loss
from ..analysis.trial import try_analysis
from ..architectures import StateLayers, family_of, state_layers
from ..config import CompreSSMConfig
from ..engines import Engine, raise_in_all_processes, unwrap, unwrap_optimizer
from ..reduction import analyze, compress
from ..report import StateReport
from ..sharing.model_card import CardDetails
from ..storage.history import History, save_history
from ..surgery.adopt_sizes import adopt_checkpoint_sizes
from ..surgery.basis import prepare
from ..surgery.checks import check_state_tensors
from .attach import attach
from .calibration_data import CalibrationData, check_loader
from .messages import cut_text, event_numbers, observed_numbers, observed_text, undone_numbers, undone_text
from .monitor import StateMonitor
from .rollback import Rollback, build_rollback
from .schedule import CompreSSMSchedule
from .start_checks import (
    check_companions,
    check_loss_options,
    check_not_rebuilt,
    check_other_callbacks,
    check_prepared,
    check_trainer,
    warn_of_a_slow_scan,
    warn_of_an_early_budget,
    warn_of_another_schedule,
    warn_of_many_observations,
    warn_of_missed_cuts,
)
from .trainer_loss import another_loss, loss_of_trainer
from .trigger import DueEvent, Trigger, check_trigger

logger = logging.get_logger(__name__)


class CompreSSMCallback(TrainerCallback, ExportableState):
    """The callback shrinks the state of the model that Trainer trains.

    At each step of the schedule it analyses the model on calibration batches, prints the plan and carries it out, with
    the optimizer. It refuses at the start of training whatever it could not do when a cut is due. Every checkpoint
    gets `compressm.json` and `hsv.safetensors`; a run resumes exactly from any of them, in a script that builds the
    model at its original size.

    Call `attach(trainer)` after building the Trainer. Given to Trainer's constructor and not attached, the callback
    serves one process and DistributedDataParallel, but neither FSDP2 nor `load_best_model_at_end`.

    Args:
        config: what to keep.
        schedule: when to cut; the paper's four events in the first tenth of the run by default, or each layer when its
            ranking of states has settled.
        calibration_loader: an iterable of calibration batches to use at every event. By default batches are drawn from
            Trainer's training data, by a generator of their own.
        companions: models that follow every cut, such as a `torch.optim.swa_utils.AveragedModel` of the model.
        needs: names of the arguments above that were given: Trainer rebuilds the callback from `state()` without them.

    Attributes:
        history: what was measured and cut in this run; a second `train()` that does not resume starts a new one.
        trainer: the Trainer that the callback is attached to, or None.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=dataset)
        >>> callback = CompreSSMCallback(CompreSSMConfig(tolerance=0.01), CompreSSMSchedule(end=0.1, events=4))
        >>> callback.attach(trainer)
        >>> trainer.train()
    """

    def __init__(
        self,
        config: CompreSSMConfig | dict,
        schedule: CompreSSMSchedule | dict | None = None,
        calibration_loader=None,
        companions: Sequence[nn.Module] = (),
        needs: Sequence[str] = (),
    ):
        # Dicts are how Trainer rebuilds the callback from `state()`.
        self.config = CompreSSMConfig.from_dict(config) if isinstance(config, dict) else config
        self.schedule = (
            CompreSSMSchedule(**(schedule or {})) if not isinstance(schedule, CompreSSMSchedule) else schedule
        )
        self.calibration_loader = calibration_loader
        self.companions = tuple(companions)
        self.needs = list(needs) + ["calibration_loader"] * (calibration_loader is not None)
        self.needs += ["companions"] * bool(self.companions)
        self.trainer: Trainer | None = None
        check_trigger(self.schedule, self.config)
        check_loader(calibration_loader)
        self.history = self._new_history()
        self.exported_history: dict | None = None  # Trainer puts the history here; its state is read instead
        self._trigger: Trigger | None = None  # set from the start of training on
        self._calibration: CalibrationData | None = None  # as well
        self._layers: StateLayers | None = None  # as well
        self._monitor = StateMonitor()
        self._rollback: Rollback | None = None  # during training

    def attach(self, trainer: Trainer, card: CardDetails | None = None) -> None:
        """Let the trainer and this callback know each other; the callback is added, unless the trainer has it.

        What Trainer loads by itself can then be of any state size: a checkpoint under FSDP2, the best model at the
        end, weights for a model made by `model_init`. No checkpoint that was not written to its end is resumed. The
        trainer's log gets what every event measured; its pushes to the Hub carry the history, pictures and a card.

        Args:
            card: what that card is to say of license, data and the like.

        Raises:
            ValueError: the engine or the model is not served, or the trainer has another callback of this kind.
        """
        attach(trainer, self, card)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control, model=None, optimizer=None, **kwargs):
        """Make the model ready before Trainer wraps it, and makes an optimizer for it unless it was given one."""
        self.make_ready(model, optimizer)

    def make_ready(self, model: nn.Module, optimizer=None) -> None:
        """Prepare a model for the basis, and let it take the size of a checkpoint, before one can be loaded."""
        if self.config.basis == "balanced" and "balanced" in family_of(unwrap(model)).bases:
            prepare(model, optimizer)
            for companion in self.companions:
                prepare(companion)
        adopt_checkpoint_sizes(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control,
        model=None,
        optimizer=None,
        train_dataloader=None,
        **kwargs,
    ):
        """Refuse a run that could not end well, and take up the history of one that is resumed."""
        with raise_in_all_processes():
            self._check_run(args, state, model, optimizer, train_dataloader)
            self._restore_history(state, self._layers.sizes)
            events = self.history, self._trigger.steps_left(self._layers, self.history)
            self._rollback = build_rollback(self.schedule, args, state, *events, train_dataloader, self.companions)
        if self._rollback is not None:
            self._rollback.find_snapshots(self.history, state.log_history)
        self._try_analysis(args)
        self._monitor = StateMonitor(self.history.observations[-1] if self.history.observations else None)
        self._warn(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control, model=None, optimizer=None, **kwargs):
        """Observe singular values and cut states where it is due; a step in between costs nothing."""
        step = state.global_step
        if self.schedule.monitor_steps and step % self.schedule.monitor_steps == 0:
            self._observe(state)
        if self._trigger.may_cut_after(step) and not self._is_stopped:
            due = self._trigger.due(self._layers, self.history, step)
            if due is not None:
                self._cut(state, model, optimizer, due)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control, model=None, optimizer=None, metrics=None, **kwargs
    ):
        """Undo a cut after which the metric is too bad."""
        metric = self._rollback.rule.metric if self._rollback is not None else None
        if metric in (metrics or {}):
            value = metrics[metric]
            undone = self._rollback.undo_harmful_cut(value, self.history, state, self._as_wrapped(model), optimizer)
            if undone is not None:
                self._announce(undone_text(undone, metric, value, state), undone_numbers(undone), state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control, **kwargs):
        """Free the snapshots, so that later evaluations undo nothing."""
        if self._rollback is not None:
            self._rollback.discard_all()
        self.stop_watching()

    def stop_watching(self) -> None:
        """Stop watching evaluations; snapshots on disk stay for a run that is resumed."""
        self._rollback = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control, **kwargs):
        """Write the history beside the weights."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_history(self.history, folder)
        if self._rollback is not None:
            self._rollback.discard_unwatched(self.history, state.log_history)

    def state(self) -> dict:
        """Return what Trainer writes into `trainer_state.json`: enough to rebuild the callback, and the history."""
        return {
            "args": {
                "config": self.config.to_dict(),
                "schedule": asdict(self.schedule),
                "needs": self.needs,
            },
            "attributes": {"exported_history": self.history.to_dict()},
        }

    def _check_run(self, args: TrainingArguments, state: TrainerState, model, optimizer, train_dataloader) -> None:
        """Refuse what could not be done when a cut is due."""
        check_trainer(args, state, model, self.trainer)
        self._layers = state_layers(Engine(self._as_wrapped(model)).model)
        check_other_callbacks(self.trainer, self._layers)
        check_state_tensors(self._layers, unwrap_optimizer(optimizer))
        check_companions(self.companions, args, self._layers)
        check_not_rebuilt({name: getattr(self, name) for name in self.needs})
        self._trigger = Trigger(self.schedule, self.config, state.max_steps)
        self._calibration = CalibrationData(self.config, args, train_dataloader, self.calibration_loader)
        check_config(self.config, self._layers)
        check_prepared(self.config, self._layers)
        check_trigger(self.schedule, self.config, self._layers)

    def _warn(self, state: TrainerState) -> None:
        """Warn of what works, but hardly as it is meant."""
        warn_of_an_early_budget(self.config, self.history, self._trigger.steps[0], state.max_steps)
        warn_of_many_observations(self.schedule, state.max_steps)
        warn_of_a_slow_scan(self._layers)

    def _new_history(self) -> History:
        return History(config=self.config.to_dict(), schedule=asdict(self.schedule))

    def _restore_history(self, state: TrainerState, sizes: dict[int, int]) -> None:
        """Take the history from a resumed `trainer_state.json`; any other run starts a new one.

        Raises:
            ValueError: the history says other sizes than the weights have, or there are two callbacks of this class.
        """
        name = type(self).__name__
        exported = state.stateful_callbacks.get(name)
        if isinstance(exported, list):
            raise ValueError(f"{len(exported)} {name}s would each cut the same model: give Trainer one.")
        self.history = self._new_history()
        if state.global_step > 0 and exported:
            recorded = History.from_dict(exported["attributes"]["exported_history"])
            warn_of_another_schedule(recorded, self.history)
            self.history.events, self.history.observations = recorded.events, recorded.observations
        if self.history.state_sizes not in (None, sizes):
            raise ValueError(
                f"the checkpoint's history ends with state sizes {self.history.state_sizes}, its weights have "
                f"{sizes}: trainer_state.json and the weights do not belong together. Resume from another one."
            )
        if not self._is_stopped:
            due = self._trigger.steps_due(self._layers, self.history, state.global_step)
            warn_of_missed_cuts(state.global_step, due, self.history.steps)
        state.stateful_callbacks[name] = self.state()

    def _observe(self, state: TrainerState) -> None:
        # The batches are always the same, so that what moves is the model and not the draw.
        with raise_in_all_processes():
            batches = self._calibration.draw(step=0) if self._layers.family.needs_data else None
        draws = 0 if self._is_stopped else self._trigger.draws(self._layers, self.history, state.global_step)
        loss = self._loss(batches) if batches else None
        observation = self._monitor.observe(self._layers, batches, self.config, state.global_step, draws, loss)
        self._trigger.compare(observation, self.history)
        self.history.observations.append(observation)
        self._announce(observed_text(observation, state), observed_numbers(observation), state)

    def _cut(self, state: TrainerState, model, optimizer, due: DueEvent) -> None:
        started = time.perf_counter()
        with raise_in_all_processes():
            check_other_callbacks(self.trainer, self._layers)
            batches = self._calibration.draw(state.global_step)
        model = self._as_wrapped(model)
        loss = self._loss(batches)
        report = analyze(model, batches, due.config, loss)
        if loss is None and self.calibration_loader is None:
            report = self._without_another_loss(report, state)
        if self._rollback is not None and report.is_cut:
            self._rollback.take_snapshot(state, self.history, model, optimizer, report)
        event = compress(model, report, optimizer, step=state.global_step, companions=self.companions)
        event.reasons = due.reasons_of(event.layers)
        event.seconds = time.perf_counter() - started
        self.history.events.append(event)
        self._announce(cut_text(report, state, due.reasons), event_numbers(event), state)

    def _try_analysis(self, args: TrainingArguments) -> None:
        """Refuse, before training, what an analysis could not do, or could not know without asking Trainer."""
        with raise_in_all_processes():
            check_loss_options(self.config, args, self.trainer)
        batches = self._calibration.first_batches
        try_analysis(self._layers, batches, self.config, self._loss(batches))

    def _loss(self, batches: list[Batch]) -> Loss | None:
        """Return the loss that is trained, if it is not the model's own loss of batches with labels."""
        return loss_of_trainer(self.trainer, batches[0], is_training_data=self.calibration_loader is None)

    def _without_another_loss(self, report: StateReport, state: TrainerState) -> StateReport:
        """Refuse a plan that was made by a loss that is not trained, and strike out losses that are only shown.

        Raises:
            ValueError: such a loss decided.
        """
        reason = another_loss(report.loss_before, state)
        if reason is None:
            return report
        if self.config.decided_by_loss:
            raise ValueError(
                f"{' and '.join(self.config.decided_by_loss)} needs the loss that the model is trained for, but "
                f"{reason}. Nothing was changed: call callback.attach(trainer), with a Trainer whose compute_loss "
                "returns the loss that it trains by."
            )
        logger.warning_once(f"No loss is shown, since {reason}.")
        return replace(report, loss_before=None, loss_after=None, single_layer_loss_change={})

    def _announce(self, text: str, numbers: dict[str, float], state: TrainerState) -> None:
        """Print what happened, and let the trainer log it."""
        if state.is_world_process_zero:
            tqdm.write(text)
        if self.trainer is not None:
            is_log_due = self.trainer.control.should_log
            self.trainer.log({f"compressm/{name}": number for name, number in numbers.items()})
            self.trainer.control.should_log = is_log_due  # this was not the log that is due

    @property
    def _is_stopped(self) -> bool:
        return self.schedule.on_rollback == "stop" and self.history.rollbacks > 0

    def _as_wrapped(self, model: nn.Module) -> nn.Module:
        """Return the model as its engine has it; Trainer shows callbacks the bare one."""
        return model if self.trainer is None else self.trainer.model_wrapped
