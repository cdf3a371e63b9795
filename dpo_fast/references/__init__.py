"""Reference log-probabilities: one interface, and a table of the providers that have it.

A provider is called with a `ScoredBatch`. It gives the summed log-probs of the sequences, fp32 [S] on the
batch's device, or None where there is no reference.

table.py       the providers: what each stores, needs and can score
providers.py   those that are computed with every batch, or come with the data
cached.py      the one that is read from disk
store.py       which model a stored reference is of, and in which folder it lies
blocks.py      in which parts a data set is scored
compute.py     log-probs of a part of the data, as a table
artefact.py    the files of a stored reference: their format, and how they are written
config.py      the section `reference`

The providers are imported when they are first used: a configuration is checked without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dpo_fast.references.config import ReferenceModel, ReferenceSection
from dpo_fast.references.table import PROVIDERS, ProviderSpec

if TYPE_CHECKING:
    from dpo_fast.references.cached import CachedReference
    from dpo_fast.references.providers import (
        AdapterOffReference,
        ColumnReference,
        EmaAdapterReference,
        EmaReference,
        FrozenReference,
        NoReference,
    )

__all__ = [
    "PROVIDERS",
    "AdapterOffReference",
    "CachedReference",
    "ColumnReference",
    "EmaAdapterReference",
    "EmaReference",
    "FrozenReference",
    "NoReference",
    "ProviderSpec",
    "ReferenceModel",
    "ReferenceSection",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "cached" if name == "CachedReference" else "providers"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
