"""This module pushes reduced models to the Hub, with their card, their pictures and the record of their cuts."""

import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..engines import unwrap
from ..storage.checkpoint import check_checkpoint
from ..storage.history import History, load_history, save_history
from .model_card import CARD, CardDetails, check_language_model, may_be_written, write_model_card
from .pictures import write_pictures

COMMIT_MESSAGE = "Upload a Mamba reduced by hf_compressm"
# These files are not a model's, but its training's.
NOT_PUSHED = ["_*", "checkpoint-*", "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin", ".*"]
ADVICE = {
    401: "The token is missing or not valid: log in (hf auth login) or set HF_TOKEN.",
    403: "The token may not write there: use one with write access to that namespace.",
    404: "There is no such repository or revision, or the token may not see it.",
    409: "The repository changed at the same time: try again.",
    412: "The repository changed at the same time: try again.",
    429: "The Hub asks to wait: try again later.",
}


class PushError(RuntimeError):
    """The Hub did not take a push, or a token may not push; nothing was lost on this side."""


def check_may_push(
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> str:
    """Make sure, before work is done, that the repository may be written; a missing one is made.

    Args:
        repo_id: "name" or "namespace/name".
        token: the token to push with, by default the one that is logged in.
        private: whether a repository that is made is private.
        create_pr: whether only a pull request will be opened, which everybody may who sees the repository and has a
            token that is not only for reading.
        revision: the branch that will be pushed to, which is made where it is missing.

    Returns:
        "namespace/name".

    Raises:
        PushError: there is no token, or it is not valid, or it may not write there.
    """
    api = HfApi(token=token)
    try:
        if create_pr:
            return _check_may_propose(api, repo_id)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
        if revision is not None and not revision.startswith("refs/"):  # that of a pull request is there already
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return repo_id
    except PushError:
        raise
    except Exception as error:
        raise as_push_error(error, repo_id) from error


def _check_may_propose(api: HfApi, repo_id: str) -> str:
    account = api.whoami()
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushError(f"could not push to {repo_id}: this token is only for reading. {ADVICE[403]}")
    return api.model_info(repo_id if "/" in repo_id else f"{account['name']}/{repo_id}").id


def push_compressed(
    model: PreTrainedModel,
    repo_id: str,
    history: History,
    tokenizer: PreTrainedTokenizerBase | None = None,
    details: CardDetails | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str = COMMIT_MESSAGE,
) -> CommitInfo:
    """Push a reduced language model in one commit: weights, tokenizer, history, pictures and card.

    Args:
        model: the model as it is in memory, of one process or gathered.
        repo_id: "name" or "namespace/name".
        history: the history of its reduction: the callback's, or `History(config, events=[compress(…)])`.
        tokenizer: the tokenizer that goes with it.
        details: what the card says beside it.
        private: whether a repository that is made is private.
        revision: the branch to push to, which is made where it is missing.
        create_pr: whether to open a pull request with the changes.
        token: the token to push with, by default the one that is logged in.
        commit_message: the title of the commit.

    Raises:
        PushError: the Hub refused, as in `push_folder`. The rights are checked before anything is written.
    """
    repo_id = check_may_push(repo_id, token, private, create_pr, revision)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unwrap(model).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        save_history(history, folder)
        write_pictures(folder, history, details.log_history if details else ())
        return push_folder(folder, repo_id, details, private, revision, create_pr, token, commit_message)


def push_folder(
    folder: str | Path,
    repo_id: str,
    details: CardDetails | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str = COMMIT_MESSAGE,
) -> CommitInfo:
    """Push a folder with a reduced model and its history in one commit.

    The card is written before, unless you wrote one by hand.

    Args:
        folder: the folder.
        repo_id: "name" or "namespace/name".
        details: what the card says beside the history.
        private: whether a repository that is made is private.
        revision: the branch to push to, which is made where it is missing.
        create_pr: whether to open a pull request with the changes.
        token: the token to push with, by default the one that is logged in.
        commit_message: the title of the commit.

    Raises:
        FileNotFoundError, ValueError: the folder holds no such model, or one that is damaged. Nothing was sent.
        PushError: the Hub refused, or could not be reached. The folder is as it was, but for its card; pushing again
            goes on where this ended: files that arrived are not sent twice.
    """
    folder = Path(folder)
    check_checkpoint(folder)
    load_history(folder)
    writes_card = may_be_written(folder / CARD)
    if writes_card:
        check_language_model(folder)
    repo_id = check_may_push(repo_id, token, private, create_pr, revision)
    if writes_card:
        write_model_card(folder, repo_id, details)
    try:
        return HfApi(token=token).upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            ignore_patterns=NOT_PUSHED,
        )
    except Exception as error:
        raise as_push_error(error, repo_id) from error


def as_push_error(error: BaseException, repo_id: str) -> PushError:
    """Return an error that says what went wrong, and what to do about it."""
    status, cause = None, error
    while cause is not None and status is None:  # the client wraps errors of large files
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
        elif isinstance(cause, LocalTokenNotFoundError):
            status = 401
        cause = cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, ValueError) and status in (None, 400):  # a card or a name is not valid: every line helps
        reason, advice = " ".join(lines), "Correct it and push again; nothing was lost here."
    else:
        reason, advice = lines[0], ADVICE.get(status, "Try again; nothing was lost here.")
    return PushError(f"could not push to {repo_id}: {reason.rstrip('.')}. {advice}")
