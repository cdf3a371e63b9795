"""Reference log-probabilities: one interface, six providers.

A reference is called with a `ScoredBatch` and gives its sequences' log-probabilities, fp32 [S] on the
batch's device, or None (`none`: nothing is compared with). A cached one is an artefact on disk: its
format is in `artefact.py`, which folder serves a run in `store.py`, how it comes about in `compute.py`
(values) and `writing.py` (files), and how it is read in `cached.py`.
"""

from dpo_fast.references.cached import CachedReference
from dpo_fast.references.config import ReferenceSection
from dpo_fast.references.providers import (
    AdapterOffReference,
    ColumnReference,
    EmaReference,
    FrozenReference,
    NoReference,
)

__all__ = [
    "AdapterOffReference",
    "CachedReference",
    "ColumnReference",
    "EmaReference",
    "FrozenReference",
    "NoReference",
    "ReferenceSection",
]
