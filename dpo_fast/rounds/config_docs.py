"""docs/ROUNDS_CONFIG.md, made of the schema by `python -m dpo_fast.rounds.config_docs`."""

from __future__ import annotations

from typing import Any

from dpo_fast.judging.config import EVERYWHERE, USES
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.training.config_docs import COLUMNS, row, section
from dpo_fast.training.config_schema import schema_of

HEAD = """# Configuration of rounds

Made of the fields of `RoundsConfig` by `make docs`; a test holds it to the code. What the keys are for:
[ROUNDS.md](ROUNDS.md).

`dpo-fast sample`, `judge` and `iterate` read the same YAML file, each the sections that it needs. The
sections `model`, `data`, `loss`, `reference`, `train`, `parallel`, `log` and `health` have the keys of a
run: [CONFIG.md](CONFIG.md).
"""
OWN = ("sample", "judge", "pairs", "stages")  # sections that a run has not


def page() -> str:
    """The page as markdown: the keys of the file, and every key of the sections that are its own."""
    tree = rounds_schema()
    plain = {name: node for name, node in tree["properties"].items() if name not in OWN}
    rows = "".join(
        row(name, _short(node), name in tree["required"]) for name, node in plain.items()
    )
    return (
        HEAD + f"\n## The file\n\n{COLUMNS}{rows}" + "".join(_section(tree, name) for name in OWN)
    )


def rounds_schema() -> dict[str, Any]:
    """RoundsConfig as a JSON schema; an option of some judges says which."""
    tree = schema_of(RoundsConfig)
    options = _options(tree["properties"]["judge"])["properties"]
    for name in options.keys() - set(EVERYWHERE):
        types = [kind for kind, names in USES.items() if name in names]
        options[name]["refused"] = f"unless type is {' or '.join(types)}"
    return tree


def _section(tree: dict[str, Any], name: str) -> str:
    node = _options(tree["properties"][name])
    return section(name, {"description": tree["properties"][name].get("description", "")} | node)


def _options(node: dict[str, Any]) -> dict[str, Any]:
    """The section that a key holds, which may be left out, or stand in a list."""
    if "properties" in node:
        return node
    if "items" in node:
        return _options(node["items"])
    return next(each for each in node["anyOf"] if "properties" in each)


def _short(node: dict[str, Any]) -> dict[str, Any]:
    """A key of the file without the keys inside it."""
    if "properties" in node:
        return {"description": "which model: the section of a run", "default": {}, "type": "object"}
    return node


if __name__ == "__main__":
    print(page(), end="")
