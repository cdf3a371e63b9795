"""The table of losses: what each computes, which options and columns it uses, where it is from.

The configuration, the modules, the tests and docs/LOSSES.md read it.
"""

from dpo_fast.losses import pairwise, reference_free, unpaired  # noqa: F401 each adds its own
from dpo_fast.losses.spec import LOSSES, LossSpec

__all__ = ["LOSSES", "LossSpec"]
