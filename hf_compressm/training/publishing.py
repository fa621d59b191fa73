"""What Trainer saves and pushes carries the history, the pictures and the card of the reduction."""

import shutil
from dataclasses import replace
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import CONFIG_NAME, logging

from ..architectures import family_of
from ..architectures.per_layer import modeling_compressm_mamba
from ..engines import raise_in_all_processes, unwrap
from ..sharing.hub import as_push_error, check_may_push
from ..sharing.model_card import CARD, CardDetails, check_details, may_be_written, write_model_card
from ..sharing.pictures import PICTURES, write_pictures
from ..storage.history import HISTORY_FILE, SPECTRA_FILE, save_history

logger = logging.get_logger(__name__)

CODE_FILE = f"{modeling_compressm_mamba.MODULE}.py"


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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        """Save the history beside the weights, and pictures beside all but the checkpoints of a run that goes on."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder, history = Path(output_dir or self.args.output_dir), self.state_size_callback.history
            save_history(history, folder)
            if folder != Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}":
                write_pictures(folder, history, self.state.log_history)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ):
        """Write the card of the reduction in place of Trainer's; one that somebody wrote by hand stays.

        Its arguments are Trainer's, and are said in the card's metadata: `finetuned_from` as the base model,
        `dataset_tags` as the data sets, `tasks` among the tags. Trainer shows `dataset` and `dataset_args` beside a
        metric only; what was measured on which data is said here by `CardDetails.eval_results`.
        """
        folder = Path(self.args.output_dir)
        if not self.is_world_process_zero() or not may_be_written(folder / CARD):
            return None
        if not self._is_language_model:
            names = (language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args)
            return super().create_model_card(*names)
        if dataset or dataset_args:
            logger.warning(
                f"The card does not name dataset = {dataset!r}, dataset_args = {dataset_args!r}: give the data set's "
                "name on the Hub as dataset_tags, and results as CardDetails(eval_results=…) to attach."
            )
        card = self.card_details
        given = {"license": license, "language": language, "base_model": finetuned_from, "datasets": dataset_tags}
        given |= {"tags": [*card.tags, *_as_list(tags), *_as_list(tasks)], "name": card.name or model_name}
        return self._write_card(folder, replace(card, **{name: value for name, value in given.items() if value}))

    def _push_from_checkpoint(self, checkpoint_folder: str):
        """Push as Trainer does, with what goes with the weights put beside them in the output folder."""
        self._tell_failed_pushes()
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if self.args.hub_strategy == HubStrategy.END or (busy and not self.args.hub_always_push):
            return  # Trainer would return, too; nothing may change in the folder that is being pushed
        folder, checkpoint = Path(self.args.output_dir), Path(checkpoint_folder)
        if self.is_world_process_zero() and (checkpoint / CONFIG_NAME).exists() and self._is_language_model:
            write_pictures(checkpoint, self.state_size_callback.history, self.state.log_history)
            self._write_card(checkpoint, self.card_details)
            keep_card = not may_be_written(folder / CARD)
            for name in (CODE_FILE, HISTORY_FILE, SPECTRA_FILE, *PICTURES, *([] if keep_card else [CARD])):
                if (checkpoint / name).exists():
                    shutil.copy(checkpoint / name, folder)
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self):
        """Finish as Trainer does, and tell which pushes in the background failed, as Trainer does not."""
        super()._finish_current_push()
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

    def _write_card(self, folder: Path, details: CardDetails) -> None:
        details = replace(details, log_history=self.state.log_history)
        write_model_card(folder, self.hub_model_id or folder.name, details)


def _as_list(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())
