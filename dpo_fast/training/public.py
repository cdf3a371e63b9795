"""What of a configuration may leave the machine: all but secrets. Loggers and model cards show this."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

SECRET = "***"
# Of an option that holds one. `api_key_env` names a variable, which may be shown if it is a name.
NAMES = re.compile(
    r"(^|[_.-])(api[_-]?key|key|token|secret|password|passwd|authorization|credential)s?$", re.I
)
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*\Z")
VALUES = (
    re.compile(r"(?<=://)[^/@\s:]+:[^/@\s]+(?=@)"),  # user:password of an address
    re.compile(r"(?<=[?&])((?:\w*[_-])?(?:token|key|sig|signature|password)=)[^&\s]+", re.I),
    re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|xox[bp]-|AKIA)[A-Za-z0-9_-]{12,}"),
)


def public(value: Any, name: str = "") -> Any:
    """A tree of options with `***` in place of secrets.

    name: of the option that holds the value.
    """
    if isinstance(value, dict):
        return {key: public(each, str(key)) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(each, name) for each in value]
    if not isinstance(value, str):
        return value
    if NAMES.search(name):
        return SECRET
    if name.endswith("_env") and not VARIABLE.match(value):
        return SECRET
    for pattern in VALUES:
        value = pattern.sub(lambda found: (found[1] if found.re.groups else "") + SECRET, value)
    return value


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option by its dotted name, as `section.key=value` has it."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
