"""What Trainer does without asking callbacks: making a model, and loading weights of another state size into it."""

from pathlib import Path

from transformers import Trainer

from ..architectures.family import state_sizes
from ..engines import check_engine, from_first_process, process_index, raise_in_all_processes, unwrap
from ..private_api import check_private_names
from ..sharing.model_card import CardDetails
from ..storage.checkpoint import check_complete, history_of_checkpoint, last_complete_checkpoint, recorded_history
from ..storage.history import History
from ..surgery.adopt_sizes import adopt_checkpoint_sizes
from ..surgery.shrink_and_grow import set_state_sizes
from .publishing import Publisher


def attach(trainer: Trainer, callback, card: CardDetails | None = None) -> None:
    """Let Trainer and callback know each other; to be called once, before training.

    The callback is added, unless the trainer has it. The trainer becomes one of a class derived from its own.

    Args:
        card: what the model's card is to say, where the trainer pushes to the Hub.

    Raises:
        ValueError: an engine, a model or a Transformers that is not served, or a trainer with another callback of this
            kind.
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
        adopt_checkpoint_sizes(trainer.model)
        own_class = type(trainer)
        trainer.__class__ = type(own_class.__name__, (_StateSizeFollower, Publisher, own_class), {})


class _StateSizeFollower:
    """Comes before the class of a trainer: its model takes the state size of whatever is loaded into it."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As Trainer's, but never from a checkpoint that was not written to its end."""
        with raise_in_all_processes():
            checkpoint = resume_from_checkpoint or None
            if checkpoint is True:
                checkpoint = last_complete_checkpoint(self.args.output_dir)
                if checkpoint is None:
                    raise ValueError(f"no whole checkpoint to resume from in {self.args.output_dir}.")
            elif checkpoint:
                check_complete(checkpoint)
        self.check_may_push()
        handler = self.callback_handler
        handler.callbacks = list(dict.fromkeys(handler.callbacks))  # the callback may have been added once more
        try:
            return super().train(resume_from_checkpoint=from_first_process(checkpoint), **kwargs)
        finally:
            self.state_size_callback.stop_watching()  # evaluations after an interruption undo nothing

    def call_model_init(self, trial=None):
        """As Trainer's; weights of any state size can be loaded into the new model."""
        model = super().call_model_init(trial)
        adopt_checkpoint_sizes(model)
        return model

    def create_optimizer(self, *args, **kwargs):
        """As Trainer's; before, since FSDP loads a checkpoint after it has sharded the model, take its state size."""
        for callback in self.callback_handler.callbacks:  # Trainer may have made a new one from its saved state
            if type(callback) is type(self.state_size_callback):
                callback.trainer, self.state_size_callback = self, callback
        if self.is_fsdp_enabled and self.state.global_step > 0:
            self._take_sizes_of(recorded_history(vars(self.state)), is_prepared=False)
        return super().create_optimizer(*args, **kwargs)

    def _load_best_model(self):
        best, history = Path(self.state.best_model_checkpoint), None
        with raise_in_all_processes():
            if process_index() == 0 and best.is_dir():  # where it is gone, Trainer says so
                history = history_of_checkpoint(best)
        history = from_first_process(history)
        if history is not None:
            self._take_sizes_of(history, is_prepared=True)
            self.state_size_callback.history = history
        super()._load_best_model()

    def _take_sizes_of(self, history: History | None, is_prepared: bool) -> None:
        """Resize to where the history ends; to the size before the first cut of the run, where it has none."""
        sizes = history.state_sizes if history is not None else None
        if sizes is None and self.state_size_callback.history.events:
            sizes = self.state_size_callback.history.events[0].state_sizes_before
        if sizes is not None:
            layers = state_sizes(unwrap(self.model))
            sizes = dict(zip(layers, sizes, strict=True))
            set_state_sizes(self.model_wrapped, sizes, self.optimizer, is_prepared=is_prepared)
