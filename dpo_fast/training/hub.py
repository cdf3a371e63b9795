"""A model's folder on the Hugging Face hub. A push that fails loses nothing: the folder is as it was.

The token is that of the environment (HF_TOKEN) or of `hf auth login`. No option holds one.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.models.hub import REVISED
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.model_card import metadata

T = TypeVar("T")

# What a run needs and a model does not; and what is half written.
HALF = (".*", "*.partial")
LEFT = (
    *("engine/*", "rank-*.pt", "zero_to_*.py", "state.json", "manifest.json", "dpo_fast.yaml"),
    *HALF,
)
OPTIONS = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy")
MODEL_FILES = ("config.json", "adapter_config.json")
SILENCE = 100.0  # seconds without a word from the hub that end a request
PAUSES = (2.0, 15.0)  # seconds before what failed for a moment is tried again
REMEDIES = {
    401: "the token is not accepted, it may have expired: `hf auth login`, or another HF_TOKEN",
    403: "the token may not write there: one that may, or a repository of yours",
}
_CHANGING = threading.Lock()  # the client's settings, for `limited_silence`
# How sessions were made and their time-out, once for each that is inside.
_BEFORE: list[tuple[Callable[[], Any], Any]] = []
FOR_A_MOMENT = (408, 429, 500, 502, 503, 504)  # statuses


def again(
    folder: Path, repo: str | None, private: bool | None = None, revision: str | None = None
) -> str:
    """The command that pushes a folder."""
    words = ["dpo-fast", "push", str(folder), *([repo] if repo else [])]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision else []
    return shlex.join(words)


def again_inside(
    folder: Path, inside: str, repo: str, private: bool | None = None, revision: str | None = None
) -> str:
    """The hub's own command that pushes a checkpoint into a folder of a repository."""
    words = ["hf", "upload", repo, str(folder), inside]
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


def open_repo(config: RunConfig, resumed: bool) -> None:
    """Make the repository that a run pushes to, and ask whether it takes the model's card. Rank 0 calls.

    Raises:
        UserError: it may not, or the hub does not answer. A resumed run is told, and goes on.
    """
    train = config.train
    if not train.push_to_hub:
        return
    repo = repo_of(config)
    try:
        with limited_silence():
            api, found = _repository(repo, train.hub_private_repo, train.hub_revision)
            _check_writable(api, found.repo_id)
            _check_card(config)
    except Exception as error:  # of the network, the hub or its client
        problem = f"train.push_to_hub=true, but nothing can be pushed to {repo}: {reason(error)}"
        if not resumed:
            raise UserError(
                f"{problem}. Mend that, or leave the option out and push later with `dpo-fast push`"
            ) from error
        say(f"{problem}. The run goes on, and tries it with its model", matters=True)


def repo_of(config: RunConfig) -> str:
    """The repository of a run's model."""
    return config.train.hub_model_id or Path(config.train.output_dir).resolve().name


def push_run(config: RunConfig, model: Path) -> str:
    """Push the trained model of a run, as `push` does. Raises UserError."""
    train = config.train
    return push(model, repo_of(config), train.hub_private_repo, train.hub_revision)


def push_run_again(config: RunConfig, model: Path) -> str:
    """The command that does what `push_run` does."""
    train = config.train
    return again(model, repo_of(config), train.hub_private_repo, train.hub_revision)


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
        command = again_inside(folder, inside, repo, private, revision)
        raise _not_pushed(folder, repo, error, command) from error


def _upload(
    folder: Path, repo: str, private: bool | None, revision: str | None, message: str, **what: Any
) -> str:
    def once() -> str:
        api, made = _repository(repo, private, revision)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            **what,
        )
        return str(made) + (f"/tree/{revision}" if revision else "")

    with limited_silence():
        return _tried(once)


def _repository(repo: str, private: bool | None, revision: str | None) -> tuple[Any, Any]:
    """The client and the repository, made if there is none, with its branch.

    Raises:
        UserError: it is to be private, and is there for all to see.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="dpo_fast")
    made = api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.model_info(made.repo_id).private:
        raise UserError(
            "it is to be private, but it is there already and public; name another, or make it private"
        )
    if revision is not None:
        api.create_branch(made.repo_id, branch=revision, exist_ok=True)
    return api, made


def _check_writable(api: Any, repo: str) -> None:
    """Raises the client's error if the token may not write. A hub that cannot tell is not asked twice."""
    try:
        api.auth_check(repo, write=True)
    except TypeError:  # an older client asks for no more than reading
        return
    except Exception as error:
        if _status(error) in (401, 403):
            raise


def _check_card(config: RunConfig) -> None:
    """Raises UserError if the hub refuses what the card begins with: it would refuse the model with it.

    License and language are those of the base model's card. A hub that cannot tell is not asked twice.
    """
    from huggingface_hub import ModelCard

    front = yaml.safe_dump(metadata(config, config.model.has_adapters), allow_unicode=True)
    try:
        ModelCard(f"---\n{front}---\n").validate(repo_type="model")
    except ValueError as error:
        told = str(error)
        with contextlib.suppress(ValueError, LookupError, TypeError):
            told = "; ".join(each["message"] for each in json.loads(told)["errors"])
        raise UserError(
            f"the hub refuses the card's front matter: {told}. License and language come from README.md "
            "of the base model"
        ) from error
    except OSError:  # the client's class for every other answer
        pass


def _tried(work: Callable[[], T]) -> T:
    """Do the work, and again what fails for a moment. Silence is waited for once: it was long."""
    for pause in PAUSES:
        try:
            return work()
        except Exception as error:
            dropped = re.search(
                "Connect|Network|Protocol|ReadError|WriteError", type(error).__name__
            )
            if _status(error) not in FOR_A_MOMENT and not dropped:
                raise
            time.sleep(pause)
    return work()


@contextlib.contextmanager
def limited_silence() -> Iterator[None]:
    """Inside, a request to which the hub says nothing for SILENCE seconds is an error.

    The hub's client waits for ever. Its session is shared by all that the process does with the hub, so it
    stays open, where the client's own way to replace it would close it. Threads may be inside together.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import _http

    with _CHANGING:
        if not _BEFORE:
            make = _http._GLOBAL_CLIENT_FACTORY

            def limited() -> Any:  # after a lost connection the client makes another session
                made = make()
                made.timeout = SILENCE
                return made

            _BEFORE.append((make, get_session().timeout))
            _http._GLOBAL_CLIENT_FACTORY, get_session().timeout = limited, SILENCE
        else:
            _BEFORE.append(_BEFORE[0])
    try:
        yield
    finally:
        with _CHANGING:
            make, timeout = _BEFORE.pop()
            if not _BEFORE:
                _http._GLOBAL_CLIENT_FACTORY, get_session().timeout = make, timeout


def _status(error: Exception) -> int | None:
    """The status that the hub has answered with."""
    return getattr(getattr(error, "response", None), "status_code", None)


def reason(error: Exception) -> str:
    """Why something failed, in the hub's own words where it has said something, and what to do."""
    status, said = _status(error), getattr(error, "server_message", None)
    if "Timeout" in type(error).__name__:
        said = f"the hub has not answered for {SILENCE:g} seconds"
    elif said:
        said = f"{status}: {said}"
    else:  # the client's words; of a card that is refused the next lines say why
        lines = [line for line in str(error).splitlines() if "more information" not in line]
        said = "\n".join(lines[:5]).strip() or type(error).__name__
    told = " ".join(said.split()).rstrip(".:")
    return f"{told} ({REMEDIES[status]})" if status in REMEDIES else told


def _not_pushed(folder: Path, repo: str, error: Exception, command: str) -> UserError:
    return UserError(
        f"{folder} was not pushed to {repo}: {reason(error)}. It is as it was; try again with `{command}`"
    )


def default_name(folder: Path) -> str:
    """The name of a repository for a folder."""
    folder = folder.resolve()
    return folder.parent.name if folder.name in ("final", "merged") else folder.name
