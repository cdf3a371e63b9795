"""The table of losses: what each computes, which options and columns it uses, where it is from.

The configuration, the modules, the tests and docs/LOSSES.md read it. Each import adds its own losses, in
the order in which people read them.
"""

from dpo_fast.losses import pairwise, reference_free, unpaired  # noqa: F401, I001
from dpo_fast.losses import groups  # noqa: F401
from dpo_fast.losses.spec import LOSSES, LossSpec

__all__ = ["LOSSES", "LossSpec"]
