"""Preference optimisation whose language-model head never materialises logits.

    from dpo_fast import FusedLinearPreferenceLoss, linear_logp

The trainer needs the extra `train` (pip install "dpo_fast[train]"); this import does not. Names are
imported when they are first used, so that the command line tells a mistake before PyTorch is there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dpo_fast.version import __version__

if TYPE_CHECKING:
    from dpo_fast.api import PreferenceRun, Result
    from dpo_fast.errors import UnavailableError, UserError
    from dpo_fast.losses import register_loss
    from dpo_fast.modules import (
        FusedHead,
        FusedLinearPreferenceLoss,
        PreferenceLoss,
        UnpairedPreferenceLoss,
    )
    from dpo_fast.ops import LinearLogp, VocabShard, linear_logp, logits_logp
    from dpo_fast.training.callbacks import Callback, Control, RunState
    from dpo_fast.training.config import RunConfig

_HOMES = {
    "Callback": "training.callbacks",
    "Control": "training.callbacks",
    "FusedHead": "modules",
    "FusedLinearPreferenceLoss": "modules",
    "LinearLogp": "ops",
    "PreferenceLoss": "modules",
    "PreferenceRun": "api",
    "Result": "api",
    "RunConfig": "training.config",
    "RunState": "training.callbacks",
    "UnavailableError": "errors",
    "UnpairedPreferenceLoss": "modules",
    "UserError": "errors",
    "VocabShard": "ops",
    "linear_logp": "ops",
    "logits_logp": "ops",
    "register_loss": "losses",
}
__all__ = [
    "Callback",
    "Control",
    "FusedHead",
    "FusedLinearPreferenceLoss",
    "LinearLogp",
    "PreferenceLoss",
    "PreferenceRun",
    "Result",
    "RunConfig",
    "RunState",
    "UnavailableError",
    "UnpairedPreferenceLoss",
    "UserError",
    "VocabShard",
    "__version__",
    "linear_logp",
    "logits_logp",
    "register_loss",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
