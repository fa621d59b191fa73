"""What Trainer saves and pushes carries the history, the pictures and the card of the reduction."""

import inspect
import shutil
from dataclasses import replace
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import CONFIG_NAME, logging

from ..architectures import family_of
from ..architectures.remote_code import CODE_FILES
from ..engines import raise_in_all_processes, unwrap
from ..sharing.hub import as_push_error, check_may_push
from ..sharing.model_card import CARD, CardDetails, ReducedModel, check_details, may_be_written, write_model_card
from ..sharing.pictures import PICTURES, write_pictures
from ..storage.history import HISTORY_FILE, SPECTRA_FILE, save_history

logger = logging.get_logger(__name__)

# A detail of the card → the argument of Trainer's `create_model_card` that says it.
DETAILS = {"license": "license", "language": "language", "base_model": "finetuned_from", "datasets": "dataset_tags"}


class Publisher:
    """This class comes before that of a trainer, whose checkpoints and pushes then say how the model was reduced.

    Trainer pushes and rotates checkpoints before it tells its callbacks of them, so this cannot be left to a callback.

    Attributes:
        state_size_callback: the callback whose history is published.
        card_details: what the card says beside the history.
    """

    def check_may_push(self) -> None:
        """Refuse at the start what could not be pushed at the end: the token, or what the card would say.

        Raises:
            PushError: the token may not push, or the Hub would refuse the card; it is raised in every process.
        """
        with raise_in_all_processes():
            if self.args.push_to_hub and self.is_world_process_zero():
                args = self.args
                check_may_push(self.hub_model_id, args.hub_token, args.hub_private_repo, revision=args.hub_revision)
                try:
                    check_details(self.card_details)
                except Exception as error:
                    raise as_push_error(error, self.hub_model_id) from error

    def save_model(self, *args, **kwargs):
        """Save the history beside the weights, and pictures beside all but the checkpoints of a run that goes on."""
        super().save_model(*args, **kwargs)
        folder = Path((args[0] if args else kwargs.get("output_dir")) or self.args.output_dir)
        if self.args.should_save and folder.is_dir():
            save_history(self.state_size_callback.history, folder)
            if folder != Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}":
                self._write_pictures(folder)

    def create_model_card(self, *args, **kwargs):
        """Write the card of the reduction, of the model in memory; one that somebody wrote by hand stays.

        It takes the place of Trainer's own. A trainer that writes one of its own, as TRL's do, gets ours below it. The
        arguments are those of that trainer. Of Trainer's, `finetuned_from` is said in the card's metadata as the base
        model, `dataset_tags` as the data sets, `tasks` among the tags; `dataset` and `dataset_args` Trainer shows
        beside a metric only: what was measured on which data is said here by `CardDetails.eval_results`.
        """
        folder = Path(self.args.output_dir)
        if not self.is_world_process_zero() or not may_be_written(folder / CARD):
            return None
        if not self._is_language_model:
            return super().create_model_card(*args, **kwargs)
        folder.mkdir(parents=True, exist_ok=True)
        if getattr(super().create_model_card, "__func__", None) is Trainer.create_model_card:
            return self._write_card(folder, self._details(*args, **kwargs))
        written = super().create_model_card(*args, **kwargs)
        self._write_card(folder, self.card_details, below=(folder / CARD).exists())
        return written

    def _push_from_checkpoint(self, checkpoint_folder: str, *args, **kwargs):
        """Push as Trainer does, with what goes with the weights put beside them in the output folder."""
        self._tell_failed_pushes()
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if self.args.hub_strategy == HubStrategy.END or (busy and not self.args.hub_always_push):
            return  # Trainer would return, too; nothing may change in the folder that is being pushed
        folder, checkpoint = Path(self.args.output_dir), Path(checkpoint_folder)
        if self.is_world_process_zero() and (checkpoint / CONFIG_NAME).exists() and self._is_language_model:
            self._write_pictures(checkpoint)
            for name in (*CODE_FILES, HISTORY_FILE, SPECTRA_FILE, *PICTURES):
                if (checkpoint / name).exists():
                    shutil.copy(checkpoint / name, folder)
            if may_be_written(folder / CARD):
                self._write_card(folder, self.card_details)
            shutil.copy(folder / CARD, checkpoint)
        super()._push_from_checkpoint(checkpoint_folder, *args, **kwargs)

    def _finish_current_push(self, *args, **kwargs):
        """Finish as Trainer does, and tell which pushes in the background failed, as Trainer does not."""
        super()._finish_current_push(*args, **kwargs)
        self._tell_failed_pushes()

    def _tell_failed_pushes(self) -> None:
        """Warn of each push in the background that failed, once."""
        push = getattr(self, "push_in_progress", None)
        for job in list(push.jobs if push is not None else ()):
            if job.done() and job.exception() is not None:
                push.jobs.remove(job)
                logger.warning(
                    f"A checkpoint was not pushed: {as_push_error(job.exception(), self.hub_model_id)} It lies in "
                    f"{self.args.output_dir}."
                )

    @property
    def _is_language_model(self) -> bool:
        return family_of(unwrap(self.model)).is_language_model

    def _details(self, *args, **kwargs) -> CardDetails:
        """Return the details given to `attach`, with those that Trainer's `create_model_card` is called with."""
        given = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
        unsaid = [f"{name} = {given[name]!r}" for name in ("dataset", "dataset_args") if given.get(name)]
        if unsaid:
            logger.warning(
                f"The card does not name {', '.join(unsaid)}: give the data set's name on the Hub as dataset_tags, "
                "and results as CardDetails(eval_results=…) to attach."
            )
        card = self.card_details
        said = {name: given.get(argument) for name, argument in DETAILS.items()}
        said["tags"] = [*card.tags, *_as_list(given.get("tags")), *_as_list(given.get("tasks"))]
        said["name"] = card.name or given.get("model_name")
        return replace(card, **{name: value for name, value in said.items() if value})

    def _write_card(self, folder: Path, details: CardDetails, below: bool = False) -> None:
        details = replace(details, log_history=self.state.log_history)
        model = ReducedModel.in_memory(self.model, self.state_size_callback.history)
        write_model_card(folder, self.hub_model_id or folder.name, details, model, below)

    def _write_pictures(self, folder: Path) -> None:
        write_pictures(folder, self.state_size_callback.history, self.state.log_history)


def _as_list(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())
