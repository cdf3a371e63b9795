"""The dtype of a model: the one that is named, or what the device multiplies well."""

from __future__ import annotations

import torch

from dpo_fast.ops.cpu import half_products
from dpo_fast.ops.dispatch import Choice

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def choose_dtype(requested: str) -> Choice:
    """bf16 or fp32, by its name, for a model on this machine's device.

    requested: `auto`, or a name, which is always honoured.
    """
    if torch.cuda.is_available():
        fast, reason = True, "the run is on a GPU"
    else:
        fast, reason = half_products(torch.bfloat16)
    if requested == "auto":
        return Choice("bf16" if fast else "fp32", reason)
    if requested == "bf16" and not fast:
        return Choice(
            "bf16", f"asked for by name; it is slow here, because {reason}: fp32 is faster"
        )
    return Choice(requested, "asked for by name")
