"""Which code of a user's own a run is of: noted in checkpoints, and told where it has changed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_fast.losses import LOSSES
from dpo_fast.training.callbacks import Callback
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.own_sampler import open_sampler
from dpo_fast.training.trainer_callback import OfTransformers

STATE = "code"  # in state.json


def sources_of(config: RunConfig) -> dict[str, dict[str, str]]:
    """Module, file and hash of the losses and the sampler that are not ours, by option and name."""
    found = {
        f"loss.type={spec.name}": source(spec.function)
        for spec in config.loss.objective.specs
        if spec.name not in LOSSES
    }
    if config.train.sampler is not None:
        found[f"train.sampler={config.train.sampler}"] = source(open_sampler(config))
    return found


def sources_of_callbacks(callbacks: Mapping[str, Callback]) -> dict[str, dict[str, str]]:
    """As `sources_of`, of the callbacks that a run has opened. What does not train opens none."""
    return {
        f"train.callbacks={name}": source(each.theirs if isinstance(each, OfTransformers) else each)
        for name, each in callbacks.items()
    }


def source(code: Any) -> dict[str, str]:
    """Where code is from: its module, its file, and a hash.

    The hash is of the whole file, as a function may call others of it. Code without a file is hashed
    itself.
    """
    code = inspect.unwrap(code) if callable(code) else code
    named = code if hasattr(code, "__qualname__") else type(code)
    found = {"module": getattr(named, "__module__", None) or ""}
    try:
        file = Path(inspect.getsourcefile(named) or "")
        content = file.read_bytes()
    except (TypeError, OSError):
        return found | {"sha256": hashlib.sha256(_text(named)).hexdigest()}
    return found | {"file": str(file), "sha256": hashlib.sha256(content).hexdigest()}


def _text(code: Any) -> bytes:
    try:
        return inspect.getsource(code).encode()
    except (TypeError, OSError):
        compiled = getattr(code, "__code__", None)
        return b"" if compiled is None else compiled.co_code + repr(compiled.co_consts).encode()


def tell_changed(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> None:
    """A line for code that is not what a checkpoint was written with. As `sources_of` gives them."""
    for name, found in now.items():
        if before.get(name, found)["sha256"] != found["sha256"]:
            say(
                f"{name}: {found.get('file', 'the code')} has changed since the checkpoint was written: "
                "from here on the run is of the new code",
                matters=True,
            )
