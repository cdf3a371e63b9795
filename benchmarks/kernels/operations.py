"""The operations that are measured, each in a file with the name of its kernel's file in kernels/ops."""

from __future__ import annotations

from benchmarks.kernels import linear_logp, logits_logp, preference

MODULES = (linear_logp, logits_logp, preference)
OPERATIONS = {module.OPERATION.name: module.OPERATION for module in MODULES}


def contender_names() -> list[str]:
    """Names over all operations, in their order, each once."""
    names = (c.name for operation in OPERATIONS.values() for c in operation.contenders)
    return list(dict.fromkeys(names))
