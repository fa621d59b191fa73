"""At its start a run is refused, or warned of, for what would otherwise come to light in the middle of training."""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.utils import logging

from ..architectures import StateLayers, state_sizes
from ..config import CompreSSMConfig
from ..engines import check_training_arguments, unwrap
from ..storage.history import History
from ..surgery.basis import needs_preparation
from .schedule import CompreSSMSchedule

logger = logging.get_logger(__name__)

MANY_OBSERVATIONS = 500  # their spectra make a trainer_state.json of tens of megabytes
EARLY = 0.25  # as a share of a run; in model_cards/recall a budget at 0.1 left 1 of 64 states, at 0.5 about 21


def check_trainer(args: TrainingArguments, state: TrainerState, model: nn.Module, trainer: Trainer | None) -> None:
    """Refuse a Trainer that the callback could not follow.

    Args:
        trainer: the Trainer that the callback is attached to, if any.

    Raises:
        ValueError: an option of the Trainer does not go together with cuts, or another Trainer is running.
    """
    check_training_arguments(args, model, attached=trainer is not None)
    if state.is_hyper_param_search:
        raise ValueError(
            "a hyper-parameter search starts every run from the same model: search without this callback."
        )
    if args.push_to_hub and trainer is None:
        raise ValueError("push_to_hub=True: call callback.attach(trainer), so that pushes carry the history.")
    if trainer is not None and unwrap(trainer.model_wrapped) is not unwrap(model):
        raise ValueError("the callback is attached to another trainer: make one for each.")


def check_other_callbacks(trainer: Trainer | None, layers: StateLayers) -> None:
    """Refuse callbacks that hold copies of the weights, or the parameters themselves, which would keep their size.

    What a callback makes in `on_train_begin`, after that of ours, can be seen from the first step on only.

    Raises:
        ValueError: a callback holds a model, or tensors in a list or dict, with shapes like those of the layers.
    """
    if trainer is None:
        return
    shapes = {parameter.shape for index in layers for parameter in layers.parameters(index).values()}
    models = [layers.model, *trainer.state_size_callback.companions]
    following = {parameter for model in models for parameter in model.parameters()}
    for callback in trainer.callback_handler.callbacks:
        for name, held in vars(callback).items():
            if shapes <= {tensor.shape for tensor in _tensors_left_behind(held, following)}:
                raise ValueError(
                    f"{type(callback).__name__}.{name} holds a copy of the weights, or the parameters themselves, "
                    "which a cut would leave at their size. Give a model that it holds to CompreSSMCallback as one of "
                    "its companions, or train without that callback."
                )


def _tensors_left_behind(held: object, following: set[nn.Parameter]) -> list[Tensor]:
    """Return the tensors of a list, tuple or dict, or those parameters of a module that no cut replaces."""
    if isinstance(held, nn.Module):
        return [parameter for parameter in held.parameters() if parameter not in following]
    values = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
    return [value for value in values if isinstance(value, Tensor)]


def check_loss_options(config: CompreSSMConfig, args: TrainingArguments, trainer: Trainer | None) -> None:
    """Refuse to decide by a loss that only the Trainer knows, where the callback does not know the Trainer.

    Raises:
        ValueError: labels are smoothed, a loss has to decide, and the callback is not attached.
    """
    if trainer is None and args.label_smoothing_factor and config.decided_by_loss:
        raise ValueError(
            f"{' and '.join(config.decided_by_loss)} with label_smoothing_factor = {args.label_smoothing_factor}, "
            "which Trainer puts into its loss: call callback.attach(trainer), so that Trainer is asked for it."
        )


def check_companions(companions: Sequence[nn.Module], args: TrainingArguments, layers: StateLayers) -> None:
    """Refuse companions that could not follow the model.

    Raises:
        ValueError: the model will be exchanged at the end, or a companion has other state sizes.
    """
    if companions and args.load_best_model_at_end:
        raise ValueError("companions cannot follow the model to another checkpoint: set load_best_model_at_end=False.")
    for companion in companions:
        if state_sizes(unwrap(companion)) != layers.sizes:
            raise ValueError(
                f"a companion has state sizes {state_sizes(unwrap(companion))}, the model has {layers.sizes}. "
                "After a resume load the companion's own weights first; "
                "hf_compressm.surgery.adopt_sizes.adopt_checkpoint_sizes(companion) lets it take their size."
            )


def check_prepared(config: CompreSSMConfig, layers: StateLayers) -> None:
    """Refuse a model that would change its class in the middle of a run, which could not be resumed then.

    Raises:
        ValueError: the model was not prepared for the basis before it got its optimizer.
    """
    if needs_preparation(layers, config.basis):
        raise ValueError(
            f"the {type(layers.model).__name__} was not prepared for basis = '{config.basis}' before its optimizer "
            "was made. Call callback.attach(trainer) after building the Trainer, or hf_compressm.prepare(model) "
            "before."
        )


def check_not_rebuilt(needs: dict[str, object]) -> None:
    """Refuse a callback that Trainer rebuilt, since it lacks what could not be written to a file.

    Args:
        needs: name → what the callback was given under this name when it was first built.

    Raises:
        ValueError: something is lacking.
    """
    lacking = [name for name, given in needs.items() if given in (None, ())]
    if lacking:
        raise ValueError(
            f"restore_callback_states_from_checkpoint=True rebuilds the callback without its {lacking[0]}. "
            "Leave it at False: the callback takes up its history by itself."
        )


def warn_of_an_early_budget(config: CompreSSMConfig, history: History, first_step: int, max_steps: int) -> None:
    """Warn where a loss budget may be spent before the model has learned to use its states."""
    if config.loss_budget is not None and first_step < EARLY * max_steps and not history.events:
        logger.warning(
            f"A loss budget may be spent from step {first_step} of {max_steps} on: a model that has not learned "
            "to use its states loses nothing by losing them, and cannot learn later what they were for. "
            "Cut later, for example with CompreSSMSchedule(start=0.5, end=0.75), or give a target_state_size."
        )


def warn_of_many_observations(schedule: CompreSSMSchedule, max_steps: int) -> None:
    """Warn where every checkpoint would grow by hundreds of observations."""
    if schedule.monitor_steps and max_steps > MANY_OBSERVATIONS * schedule.monitor_steps:
        logger.warning(
            f"monitor_steps={schedule.monitor_steps} makes {max_steps // schedule.monitor_steps} "
            "observations, and every checkpoint holds all of them: a larger number of steps keeps it small."
        )


def warn_of_a_slow_scan(layers: StateLayers) -> None:
    """Warn where the scan that the model would train with is slower than need be."""
    slow = layers.family.slow_scan(next(layers.model.parameters()).device.type)
    if slow is not None:
        logger.warning(slow)


def warn_of_another_schedule(recorded: History, history: History) -> None:
    """Warn where a run goes on by other rules than the checkpoint that it resumes from."""
    if (recorded.config, recorded.schedule) != (history.config, history.schedule):
        logger.warning(
            "The run is resumed with another configuration or schedule than its checkpoint has. The cuts so far, "
            f"{len(recorded.events)}, count among those of the schedule."
        )


def warn_of_missed_cuts(step: int, due: list[int], done: list[int]) -> None:
    """Warn where a resumed run was cut after other steps than its schedule says."""
    if due != done:
        logger.warning(f"By step {step} cuts were due after steps {due}; the history has them at {done}.")
