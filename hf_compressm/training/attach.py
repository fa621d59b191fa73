"""Trainer makes models, and loads weights of another state size, without asking callbacks; `attach` makes it ask."""

import inspect
from pathlib import Path

from transformers import Trainer

from ..architectures import state_sizes
from ..engines import check_engine, from_first_process, process_index, raise_in_all_processes, unused_frozen, unwrap
from ..private_api import check_private_names
from ..sharing.model_card import CardDetails
from ..storage.checkpoint import (
    check_complete,
    check_is_of,
    history_of_checkpoint,
    last_complete_checkpoint,
    recorded_history,
)
from ..storage.history import History
from ..surgery.adopt_sizes import load_renamed_weights
from ..surgery.shrink_and_grow import set_state_sizes
from .publishing import Publisher

RESUME = "resume_from_checkpoint"  # the argument of `train`


def attach(trainer: Trainer, callback, card: CardDetails | None = None) -> None:
    """Let Trainer and callback know each other; call it once, before training.

    The callback is added, unless the trainer has it. The trainer's class becomes one derived from its own.

    Args:
        trainer: the Trainer that will train.
        callback: the callback that will cut.
        card: what the model's card is to say, where the trainer pushes to the Hub.

    Raises:
        ValueError: the engine or the model is not served, or the trainer has another callback of this kind.
    """
    check_private_names("transformers.Trainer")
    own = type(callback)
    if any(isinstance(c, own) and c is not callback for c in trainer.callback_handler.callbacks):
        raise ValueError(f"the trainer has another {own.__name__}, which would cut the same model: give one.")
    check_engine(trainer.args, attached=True)
    if not any(c is callback for c in trainer.callback_handler.callbacks):
        trainer.add_callback(callback)
    callback.trainer, trainer.state_size_callback = trainer, callback
    trainer.card_details = card or CardDetails()
    if not isinstance(trainer, _StateSizeFollower):
        callback.make_ready(trainer.model, trainer.optimizer)
        own_class = type(trainer)
        trainer.__class__ = type(own_class.__name__, (_StateSizeFollower, Publisher, own_class), {})


class _StateSizeFollower:
    """This class comes before that of a trainer and gives its model the state size of whatever is loaded into it.

    Its methods hand on all that they are given: what a trainer's own class takes, in more or fewer arguments than
    Trainer's, it takes here as well.
    """

    def train(self, *args, **kwargs):
        """Train as Trainer does, but never from a checkpoint that was not written to its end."""
        call = inspect.signature(super().train).bind(*args, **kwargs)
        given = call.arguments if RESUME in call.arguments else call.arguments.get("kwargs", {})
        if given.get(RESUME):
            given[RESUME] = self._whole_checkpoint(given[RESUME])
        self.check_may_push()
        handler = self.callback_handler
        handler.callbacks = list(dict.fromkeys(handler.callbacks))  # the callback may have been added once more
        try:
            return super().train(*call.args, **call.kwargs)
        finally:
            self.state_size_callback.stop_watching()  # evaluations after an interruption undo nothing

    def _whole_checkpoint(self, given: str | bool) -> str:
        """Return the checkpoint to resume from; True stands for the newest whole one in the output folder.

        Raises:
            FileNotFoundError, ValueError: the checkpoint was not written to its end or is damaged, or there is none.
        """
        checkpoint = given
        with raise_in_all_processes():
            if given is True:
                checkpoint = last_complete_checkpoint(self.args.output_dir)
                if checkpoint is None:
                    raise ValueError(
                        f"there is no whole checkpoint to resume from in {self.args.output_dir}: leave "
                        f"{RESUME} out to start anew, or give the folder of one."
                    )
            else:
                check_complete(given)
            check_is_of(checkpoint, unwrap(self.model))
        return from_first_process(checkpoint)

    def call_model_init(self, *args, **kwargs):
        """Build a model as Trainer does, into which weights of any state size can be loaded."""
        model = super().call_model_init(*args, **kwargs)
        self.state_size_callback.make_ready(model)
        return model

    def create_optimizer(self, *args, **kwargs):
        """Create the optimizer as Trainer does, of a model that was resized before FSDP loads a checkpoint into it."""
        for callback in self.callback_handler.callbacks:  # Trainer may have made a new one from its saved state
            if type(callback) is type(self.state_size_callback):
                callback.trainer, self.state_size_callback = self, callback
        if self.is_fsdp_enabled and self.state.global_step > 0:
            self._take_sizes_of(recorded_history(vars(self.state)), is_prepared=False)
        return super().create_optimizer(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None, **kwargs):
        target = self.model if model is None else model
        if self.is_fsdp_enabled or not load_renamed_weights(target, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model=model, **kwargs)

    def _load_optimizer_and_scheduler(self, *args, **kwargs):
        with unused_frozen(self.model):
            return super()._load_optimizer_and_scheduler(*args, **kwargs)

    def _load_best_model(self, *args, **kwargs):
        best, history = Path(self.state.best_model_checkpoint), None
        with raise_in_all_processes():
            if process_index() == 0 and best.is_dir():  # where it is gone, Trainer says so
                history = history_of_checkpoint(best)
        history = from_first_process(history)
        if history is not None:
            self._take_sizes_of(history, is_prepared=True)
            self.state_size_callback.history = history
        if self.is_fsdp_enabled or not load_renamed_weights(self.model, best):
            super()._load_best_model(*args, **kwargs)

    def _take_sizes_of(self, history: History | None, is_prepared: bool) -> None:
        """Resize the model to where the history ends; without one, to its size before the first cut of the run.

        Raises:
            ValueError: the history speaks of other layers than those of the model that have a state.
        """
        sizes = history.state_sizes if history is not None else None
        if sizes is None and self.state_size_callback.history.events:
            sizes = self.state_size_callback.history.events[0].by_layer("state_sizes_before")
        if sizes is not None:
            layers = list(state_sizes(unwrap(self.model)))
            if list(sizes) != layers:
                raise ValueError(
                    f"the checkpoint's history speaks of the layers {list(sizes)}, and the layers {layers} of the "
                    "model have a state: they do not belong together. Give a checkpoint of this model."
                )
            set_state_sizes(self.model_wrapped, sizes, self.optimizer, is_prepared=is_prepared)
