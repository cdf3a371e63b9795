"""Preference optimisation whose language-model head never materialises logits.

    from dpo_fast import linear_logp

The trainer needs the extra `train` (pip install "dpo_fast[train]"); this import does not.
"""

from dpo_fast.errors import UnavailableError, UserError
from dpo_fast.ops import LinearLogp, VocabShard, linear_logp, logits_logp

__version__ = "0.1.0"
__all__ = [
    "LinearLogp",
    "UnavailableError",
    "UserError",
    "VocabShard",
    "linear_logp",
    "logits_logp",
]
