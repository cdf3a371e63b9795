"""The operations that are measured, each in a file with the name of its kernel's file in kernels/ops."""

from __future__ import annotations

import dataclasses
import importlib

from benchmarks.kernels import linear_logp, logits_logp, preference
from dpo_fast.errors import UserError

MODULES = (linear_logp, logits_logp, preference)
OPERATIONS = {module.OPERATION.name: module.OPERATION for module in MODULES}
_added: list[str] = []


def contender_names() -> list[str]:
    """Names over all operations, in their order, each once."""
    names = (c.name for operation in OPERATIONS.values() for c in operation.contenders)
    return list(dict.fromkeys(names))


def add(module: str) -> None:
    """Measure the contenders of a module too: its CONTENDERS, a tuple of them by operation's name.

    Raises:
        UserError: it cannot be imported, or lacks the table.
    """
    if module in _added:
        return
    try:
        table = importlib.import_module(module).CONTENDERS
    except (ImportError, AttributeError) as error:
        raise UserError(f"--contenders {module}: {error}") from error
    for name, contenders in table.items():
        if name not in OPERATIONS:
            raise UserError(
                f"--contenders {module}: no operation {name}: choose from {', '.join(OPERATIONS)}"
            )
        operation = OPERATIONS[name]
        both = operation.contenders + tuple(contenders)
        OPERATIONS[name] = dataclasses.replace(operation, contenders=both)
    _added.append(module)


def added() -> list[str]:
    """The modules that were added, in their order."""
    return list(_added)
