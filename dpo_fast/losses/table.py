"""The table of losses: what each computes, which options and columns it uses, where it is from.

The configuration, the modules, the tests and docs/LOSSES.md read it. Each import adds its losses, in the
order of docs/LOSSES.md.
"""

from dpo_fast.losses import pairwise, reference_free, unpaired, groups  # noqa: F401, I001
from dpo_fast.losses.spec import LOSSES, LossSpec

__all__ = ["LOSSES", "LossSpec"]
