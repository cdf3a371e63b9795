"""Which weights a run is of: the identity of each of its models, told where it takes long."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import cache_root
from dpo_fast.errors import UserError
from dpo_fast.models.hub import commit_of, split_revision
from dpo_fast.models.identity import Advance, Watch, model_identity
from dpo_fast.models.quantization import quantised_identity
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import progress_bar, say

PATIENCE = 2.0  # seconds after which hashing is told
UNIT = 1 << 24  # bytes of a step of the bar


def identity_of(config: RunConfig, path: str) -> str:
    """The identity of a model of the run (`models/identity.py`). Collective: rank 0 reads."""
    return distributed.from_main(partial(identity_on_this_rank, config, path))


def identities(config: RunConfig) -> dict[str, str]:
    """The identity of every model whose weights a run's results depend on, by the option's name.

    Collective. A model that an option does not name is the policy as it starts.
    """
    models = {"model.path": config.model.path}
    if config.reference_spec.scores:
        models["reference.path"] = config.reference.path or config.model.path
    if config.old_model is not None:
        models["reference.old_path"] = config.old_model.path or config.model.path
    known = {path: identity_of(config, path) for path in dict.fromkeys(models.values())}
    return {option: known[path] for option, path in models.items()}


def path_as_it_began(config: RunConfig, known: str) -> str:
    """model.path; of a hub id that has moved on since the start, with the commit of then.

    known: the identity that it had. A folder's weights have to be those still. On one rank.

    Raises:
        UserError: it is gone, or holds others.
    """
    path = config.model.path
    if not os.path.isdir(os.path.expanduser(path)):
        name, commit = split_revision(known)
        if commit is not None and split_revision(path)[0] == name:
            return path if commit_of(path) == commit else known
        if config.model.quantization is None:  # else the identity does not tell a hub id
            raise UserError(f"model.path={path} is no folder any more")
    elif identity_on_this_rank(config, path) != known:
        raise UserError(f"model.path={path} holds other weights than those that the run began with")
    return path


def identity_on_this_rank(config: RunConfig, path: str) -> str:
    """As `identity_of`, for work that one rank does."""
    return quantised_identity(identity_of_weights(config.data, path), config.model.quantization)


def identity_of_weights(data: DataConfig, path: str) -> str:
    """The identity of a model that is loaded as its files have it. data: says where hashes are kept."""
    with _told(path) as watch:
        return model_identity(path, cache_root(data) / "weights", watch)


@contextmanager
def _told(path: str) -> Iterator[Watch]:
    """Yields what shows a progress bar, and says a line where reading takes long."""
    with ExitStack() as until_done:

        def watch(size: int) -> Advance:
            if not size:
                return lambda count: None
            line = f"hashing {size / 1e9:.1f} GB of weights in {path}; it is done once"
            timer = threading.Timer(PATIENCE, say, [line])
            timer.daemon = True
            timer.start()
            until_done.callback(timer.cancel)
            bar = until_done.enter_context(progress_bar(f"hashing {path}", size // UNIT))
            lock, done = threading.Lock(), [0]

            def advance(count: int) -> None:
                with lock:
                    units = (done[0] % UNIT + count) // UNIT
                    done[0] += count
                for _ in range(units):
                    bar()

            return advance

        yield watch
