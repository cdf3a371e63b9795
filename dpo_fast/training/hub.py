"""A model's folder on the Hugging Face hub. A push that fails loses nothing: the folder is as it was.

The token is that of the environment (HF_TOKEN) or of `hf auth login`. No option holds one.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.models.hub import REVISED
from dpo_fast.training.config import RunConfig

# What a run needs and a model does not; and what is half written.
HALF = (".*", "*.partial")
LEFT = (
    *("engine/*", "rank-*.pt", "zero_to_*.py", "state.json", "manifest.json", "dpo_fast.yaml"),
    *HALF,
)
OPTIONS = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy")
MODEL_FILES = ("config.json", "adapter_config.json")


def again(
    folder: Path, repo: str | None, private: bool | None = None, revision: str | None = None
) -> str:
    """The command that pushes a folder."""
    words = ["dpo-fast", "push", str(folder), *([repo] if repo else [])]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision else []
    return shlex.join(words)


def check_repo(repo: str, option: str) -> None:
    """Raises UserError for a name that no repository of the hub can have."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{option}={repo}: {durable.first_line(error)}") from None
    if REVISED.fullmatch(repo):
        raise UserError(f"{option}={repo}: name the revision by itself")


def check_hub(config: RunConfig) -> None:
    """Raises UserError if the end of a run could not push its model: it is told before the first step."""
    train = config.train
    if not train.push_to_hub:
        return
    from huggingface_hub import constants, get_token

    check_repo(repo_of(config), "train.hub_model_id")
    if constants.is_offline_mode():
        raise UserError(
            "train.push_to_hub=true, but HF_HUB_OFFLINE=1 keeps the hub's client from the network: unset "
            "it, or leave the option out and push later with `dpo-fast push`"
        )
    if get_token() is None:
        raise UserError(
            "train.push_to_hub=true needs a token that may write: set HF_TOKEN, or log in with `hf auth "
            "login`; or leave it out and push later with `dpo-fast push`"
        )


def repo_of(config: RunConfig) -> str:
    """The repository of a run's model."""
    return config.train.hub_model_id or Path(config.train.output_dir).resolve().name


def push_run(config: RunConfig, model: Path) -> str:
    """Push the trained model of a run, as `push` does. Raises UserError."""
    train = config.train
    return push(model, repo_of(config), train.hub_private_repo, train.hub_revision)


def check_pushable(folder: Path) -> None:
    """Raises UserError unless a folder holds a model or an adapter."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a model's, such as final/ of a run")
    if not any((folder / name).is_file() for name in MODEL_FILES):
        inner = folder / "final"
        hint = f": name {inner}" if inner.is_dir() else ""
        raise UserError(f"{folder} holds no model ({' or '.join(MODEL_FILES)}){hint}")


def push(
    folder: Path,
    repo: str | None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Model and card by dpo_fast",
) -> str:
    """Upload a folder in one commit, and make the repository if there is none; returns its address.

    repo: `name` or `owner/name`; None: the name of the folder, of a run's `final` that of the run.
    private: of a new repository; None: as the owner's settings say.
    revision: a branch, which is made if there is none; None: the main one.

    Raises:
        UserError: it was not pushed. The message has the command that tries again.
    """
    check_pushable(folder)
    repo = repo or default_name(folder)
    check_repo(repo, "repository")
    try:
        return _upload(folder, repo, private, revision, message, ignore_patterns=list(LEFT))
    except Exception as error:  # of the network, the hub or its client
        raise _not_pushed(folder, repo, error, again(folder, repo, private, revision)) from error


def push_checkpoint(
    folder: Path,
    inside: str,
    repo: str,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "A checkpoint by dpo_fast",
) -> str:
    """Upload a whole checkpoint to a folder of a repository, in place of what is there; as `push`.

    inside: the folder's name in the repository.
    """
    told = {"ignore_patterns": list(HALF), "path_in_repo": inside, "delete_patterns": "*"}
    try:
        return _upload(folder, repo, private, revision, message, **told)
    except Exception as error:
        words = ["hf", "upload", repo, str(folder), inside]
        words += ["--revision", revision] if revision else []
        raise _not_pushed(folder, repo, error, shlex.join(words)) from error


def _upload(
    folder: Path, repo: str, private: bool | None, revision: str | None, message: str, **what: Any
) -> str:
    from huggingface_hub import HfApi

    api = HfApi(library_name="dpo_fast")
    made = api.create_repo(repo, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(made.repo_id, branch=revision, exist_ok=True)
    api.upload_folder(
        repo_id=made.repo_id, folder_path=folder, revision=revision, commit_message=message, **what
    )
    return str(made) + (f"/tree/{revision}" if revision else "")


def _not_pushed(folder: Path, repo: str, error: Exception, command: str) -> UserError:
    told = durable.first_line(error) or type(error).__name__
    return UserError(
        f"{folder} was not pushed to {repo}: {told.rstrip('.')}. It is as it was; log in with `hf auth "
        f"login` or set HF_TOKEN if that is missing, and try again with `{command}`"
    )


def default_name(folder: Path) -> str:
    """The name of a repository for a folder."""
    folder = folder.resolve()
    return folder.parent.name if folder.name in ("final", "merged") else folder.name
