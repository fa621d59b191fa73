"""`CompreSSMCallback`: analyze and compress, scheduled inside Trainer. No mathematics."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..analysis.calibration import draw_batches, is_stream, take_batches
from ..analysis.checks import check_config
from ..architectures import StateLayers, family_of, state_layers, state_sizes
from ..architectures.mamba_scan import reference_loop_would_run
from ..config import CompreSSMConfig
from ..engines import Engine, check_training_arguments, raise_in_all_processes, unwrap, unwrap_optimizer
from ..reduction import analyze, compress
from ..sharing.model_card import CardDetails
from ..storage.history import History, save_history
from ..surgery.adopt_sizes import adopt_checkpoint_sizes
from ..surgery.transaction import check_state_tensors
from .attach import attach
from .messages import cut_text, event_numbers, observed_numbers, observed_text, undone_numbers, undone_text
from .monitor import StateMonitor
from .rollback import Rollback, build_rollback
from .schedule import CompreSSMSchedule
from .trigger import DueEvent, Trigger, check_trigger

logger = logging.get_logger(__name__)

MANY_OBSERVATIONS = 500  # their spectra make a trainer_state.json of tens of megabytes
EARLY = 0.25  # of a run; in model_cards/recall a budget spent at 0.1 left 1 of 64 states, at 0.5 about 21


class CompreSSMCallback(TrainerCallback, ExportableState):
    """Shrinks the state of the model that Trainer trains.

    At each step of the schedule it analyses the model on calibration batches, prints the plan and carries it out, with
    the optimizer. It refuses at the start of training whatever it could not do when a cut is due. Every checkpoint
    gets `compressm.json` and `hsv.safetensors`; a run resumes exactly from any of them, in a script that builds the
    model at its original size.

    `attach(trainer)` after building the Trainer is the full way in. Given to Trainer's constructor and not attached,
    the callback serves one process and DistributedDataParallel, but neither FSDP2 nor `load_best_model_at_end`.

    Args:
        config: what to keep.
        schedule: when to cut; the paper's four events in the first tenth of the run by default, or each layer when its
            ranking of states has settled.
        calibration_loader: an iterable of calibration batches to use at every event. By default batches are drawn from
            Trainer's training data, by a generator of their own.
        companions: models that follow every cut, such as a `torch.optim.swa_utils.AveragedModel` of the model.
        needs: for Trainer, which rebuilds the callback from `state()` without these arguments.

    Attributes:
        history: what was measured and cut in this run; a second `train()` that does not resume starts a new one.
        trainer: the Trainer it is attached to, or None.

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
        if isinstance(calibration_loader, Iterator):
            raise ValueError(
                "calibration_loader can be read only once, and every cut reads it: give a list or a DataLoader."
            )
        self.history = self._new_history()
        self.exported_history: dict | None = None  # where Trainer puts the saved history; read from its state instead
        self._trigger: Trigger | None = None  # from the start of training on, as the layers are
        self._layers: StateLayers | None = None
        self._stream_batches: list | None = None
        self._monitor = StateMonitor()
        self._rollback: Rollback | None = None  # during training

    def attach(self, trainer: Trainer, card: CardDetails | None = None) -> None:
        """Let the trainer and this callback know each other; the callback is added, unless the trainer has it.

        What Trainer loads by itself can then be of any state size: a checkpoint under FSDP2, the best model at the
        end, weights for a model made by `model_init`. No checkpoint that was not written to its end is resumed. The
        trainer's log gets what every event measured, and what it pushes to the Hub the history, pictures and a card.

        Args:
            card: what that card is to say of license, data and the like.

        Raises:
            ValueError: an engine or model that is not served, or a trainer with another callback of this kind.
        """
        attach(trainer, self, card)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs):
        """The only moment before a checkpoint is loaded: make the model take the checkpoint's size."""
        family_of(unwrap(model))
        adopt_checkpoint_sizes(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        train_dataloader=None,
        **kwargs,
    ):
        """Refuse now what could not be done later, and take up the history of a resumed run."""
        with raise_in_all_processes():
            check_training_arguments(args, model, attached=self.trainer is not None)
            if state.is_hyper_param_search:
                raise ValueError(
                    "a hyper-parameter search starts every trial from the same model: search without this callback."
                )
            if args.push_to_hub and self.trainer is None:
                raise ValueError("push_to_hub=True: call callback.attach(trainer), so that pushes carry the history.")
            if self.trainer is not None and unwrap(self.trainer.model_wrapped) is not unwrap(model):
                raise ValueError("the callback is attached to another trainer: make one for each.")
            self._layers = layers = state_layers(Engine(self._as_wrapped(model)).model)
            check_state_tensors(layers, unwrap_optimizer(optimizer))
            self._check_companions(args, layers)
            self._trigger = Trigger(self.schedule, self.config, state.max_steps)
            self._restore_history(state, layers.sizes)
            self._check_calibration(args, train_dataloader)
            check_config(self.config, layers)
            check_trigger(self.schedule, self.config, layers)
            steps = self._trigger.steps, _steps_per_epoch(args, state, train_dataloader)
            self._rollback = build_rollback(self.schedule, args, state, self.history, *steps, self.companions)
        if self._rollback is not None:
            self._rollback.find_snapshots(self.history, state.log_history)
        first = self._trigger.steps[0]
        if self.config.loss_budget is not None and first < EARLY * state.max_steps and not self.history.events:
            logger.warning(
                f"A loss budget may be spent from step {first} of {state.max_steps} on: a model that has not learned "
                "to use its states loses nothing by losing them, and cannot learn later what they were for. "
                "Cut later, for example with CompreSSMSchedule(start=0.5, end=0.75), or give a target_state_size."
            )
        if self.schedule.monitor_steps and state.max_steps > MANY_OBSERVATIONS * self.schedule.monitor_steps:
            logger.warning(
                f"monitor_steps={self.schedule.monitor_steps} makes {state.max_steps // self.schedule.monitor_steps} "
                "observations, and every checkpoint holds all of them: a larger number of steps keeps it small."
            )
        self._monitor = StateMonitor(self.history.observations[-1] if self.history.observations else None)
        device = next(layers.model.parameters()).device
        if layers.family.needs_data and reference_loop_would_run(device.type):
            logger.warning(
                "Transformers' own Mamba loop is about to run: its training step is quadratic in the sequence length. "
                "Call hf_compressm.install_scan() before training, or install mamba-ssm on a GPU."
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        train_dataloader=None,
        **kwargs,
    ):
        """Observe and cut, whatever is due."""
        if self.schedule.monitor_steps and state.global_step % self.schedule.monitor_steps == 0:
            self._observe(args, state, model, train_dataloader)
        due = None if self._is_stopped else self._trigger.due(self._layers, self.history, state.global_step)
        if due is not None:
            self._cut(args, state, model, optimizer, train_dataloader, due)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        metrics=None,
        **kwargs,
    ):
        """Undo a cut that hurt."""
        metric = self._rollback.rule.metric if self._rollback is not None else None
        if metric in (metrics or {}):
            value = metrics[metric]
            undone = self._rollback.undo_harmful_cut(value, self.history, state, self._as_wrapped(model), optimizer)
            if undone is not None:
                self._announce(undone_text(undone, metric, value, state), undone_numbers(undone), state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """What is evaluated from now on undoes nothing."""
        if self._rollback is not None:
            self._rollback.discard_all()
        self.stop_watching()

    def stop_watching(self) -> None:
        """Stop watching evaluations; snapshots on disk stay for a run that is resumed."""
        self._rollback = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Put the history beside the weights."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_history(self.history, folder)
        if self._rollback is not None:
            self._rollback.discard_unwatched(self.history, state.log_history)

    def state(self) -> dict:
        """What Trainer writes into `trainer_state.json`: enough to rebuild the callback, and the history."""
        return {
            "args": {
                "config": self.config.to_dict(),
                "schedule": asdict(self.schedule),
                "needs": self.needs,
            },
            "attributes": {"exported_history": self.history.to_dict()},
        }

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
            if (recorded.config, recorded.schedule) != (self.history.config, self.history.schedule):
                logger.warning("The run is resumed with another configuration or schedule than its checkpoint has.")
            self.history.events, self.history.observations = recorded.events, recorded.observations
        if self.history.state_sizes not in (None, sizes):
            raise ValueError(
                f"the checkpoint's history ends with state sizes {self.history.state_sizes}, its weights have "
                f"{sizes}: trainer_state.json and the weights do not belong together. Resume from another one."
            )
        due, done = self._trigger.steps_due(state.global_step, self.history), self.history.steps
        if due != done and not self._is_stopped:
            logger.warning(
                f"By step {state.global_step} cuts were due after steps {due}; the history has them at {done}."
            )
        state.stateful_callbacks[name] = self.state()

    def _observe(self, args: TrainingArguments, state: TrainerState, model, train_dataloader) -> None:
        # Always the same batches: what moves is then the model, not the draw.
        with raise_in_all_processes():
            batches = self._calibration_batches(args, 0, train_dataloader) if self._layers.family.needs_data else None
        draws = 0 if self._is_stopped else self._trigger.draws(self._layers, self.history, state.global_step)
        observation = self._monitor.observe(self._layers, batches, self.config, state.global_step, draws)
        self._trigger.compare(observation, self.history)
        self.history.observations.append(observation)
        self._announce(observed_text(observation, state), observed_numbers(observation), state)

    def _cut(
        self, args: TrainingArguments, state: TrainerState, model, optimizer, train_dataloader, due: DueEvent
    ) -> None:
        started = time.perf_counter()
        with raise_in_all_processes():
            batches = self._calibration_batches(args, state.global_step, train_dataloader)
        model = self._as_wrapped(model)
        report = analyze(model, batches, due.config)
        if self._rollback is not None and report.is_cut:
            self._rollback.take_snapshot(state, self.history, model, optimizer, report)
        event = compress(model, report, optimizer, step=state.global_step, companions=self.companions)
        event.reasons = due.reasons_of(event.layers)
        event.seconds = time.perf_counter() - started
        self.history.events.append(event)
        self._announce(cut_text(report, state, due.reasons), event_numbers(event), state)

    def _announce(self, text: str, numbers: dict[str, float], state: TrainerState) -> None:
        """Print what happened, and let the trainer report it."""
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
        """The model as its engine has it; Trainer shows callbacks the bare one."""
        return model if self.trainer is None else self.trainer.model_wrapped

    def _check_companions(self, args: TrainingArguments, layers: StateLayers) -> None:
        if self.companions and args.load_best_model_at_end:
            raise ValueError(
                "companions cannot follow the model to another checkpoint: set load_best_model_at_end=False."
            )
        for companion in self.companions:
            if state_sizes(unwrap(companion)) != layers.sizes:
                raise ValueError(
                    f"a companion has state sizes {state_sizes(unwrap(companion))}, the model has "
                    f"{layers.sizes}. After a resume load the companion's own weights first; "
                    "hf_compressm.adoption.adopt_checkpoint_sizes(companion) lets it take their size."
                )

    def _check_calibration(self, args: TrainingArguments, train_dataloader) -> None:
        """Draw once in advance: missing data is noticed now, and a stream is read before training reads it."""
        lacking = [name for name in self.needs if getattr(self, name) in (None, ())]
        if lacking:
            raise ValueError(
                f"restore_callback_states_from_checkpoint=True rebuilds the callback without its {lacking[0]}. "
                "Leave it at False: the callback takes up its history by itself."
            )
        self._stream_batches = None
        batches = self._calibration_batches(args, 0, train_dataloader)
        if self.calibration_loader is None and is_stream(train_dataloader.dataset):
            self._stream_batches = batches

    def _calibration_batches(self, args: TrainingArguments, step: int, train_dataloader) -> list[dict]:
        count = self.config.calibration_batches
        if self.calibration_loader is not None:
            return take_batches(self.calibration_loader, count)
        if self._stream_batches is not None:
            return self._stream_batches
        return draw_batches(
            train_dataloader.dataset,
            train_dataloader.collate_fn,
            args.per_device_train_batch_size,
            count,
            self.config.calibration_seed,
            step,
            args.process_index,
            args.world_size,
        )


def _steps_per_epoch(args: TrainingArguments, state: TrainerState, train_dataloader) -> int:
    """Optimizer steps; those of the whole run for a stream, whose end is not known."""
    try:
        return max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
    except TypeError:
        return state.max_steps
