"""Preference optimisation whose language-model head never materialises logits.

    from dpo_fast import FusedLinearPreferenceLoss, linear_logp

The trainer needs the extra `train` (pip install "dpo_fast[train]"); this import does not.
"""

from dpo_fast.errors import UnavailableError, UserError
from dpo_fast.modules import (
    FusedHead,
    FusedLinearPreferenceLoss,
    PreferenceLoss,
    UnpairedPreferenceLoss,
)
from dpo_fast.ops import LinearLogp, VocabShard, linear_logp, logits_logp

__version__ = "0.1.0"
__all__ = [
    "FusedHead",
    "FusedLinearPreferenceLoss",
    "LinearLogp",
    "PreferenceLoss",
    "UnavailableError",
    "UnpairedPreferenceLoss",
    "UserError",
    "VocabShard",
    "linear_logp",
    "logits_logp",
]
