"""Reference log-probabilities: one interface, four providers.

A reference is called with a `ScoredBatch` and gives its sequences' log-probabilities, fp32 [S] on the
batch's device, or None (`none`: nothing is compared with).
"""

from dpo_fast.references.cached import CachedReference, compute_table
from dpo_fast.references.config import ReferenceSection
from dpo_fast.references.live import AdapterOffReference, FrozenReference, NoReference

__all__ = [
    "AdapterOffReference",
    "CachedReference",
    "FrozenReference",
    "NoReference",
    "ReferenceSection",
    "compute_table",
]
