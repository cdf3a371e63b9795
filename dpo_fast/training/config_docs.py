"""docs/CONFIG.md, made of the schema: `python -m dpo_fast.training.config_docs > docs/CONFIG.md`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dpo_fast.training.config_schema import run_schema

HEAD = """# Configuration

Made of the fields of `RunConfig` by `make docs`; a test holds it to the code.

A run is one YAML file with these sections. `dpo-fast train run.yaml train.max_steps=100` changes single
keys, and `dpo-fast config show run.yaml` prints the whole with all defaults. An unknown key is an error,
and so is an option that the run cannot honour: the message names the option, its value and the remedy.

`dpo-fast config schema --out schema.json` writes the same as a JSON schema. An editor with a YAML language
server completes and checks a file whose first line is `# yaml-language-server: $schema=schema.json`.
"""
COLUMNS = "| key | type | default | meaning | refused |\n|---|---|---|---|---|\n"
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
NAMES = {"boolean": "bool", "integer": "int", "number": "float", "string": "str", "object": "dict"}
EMPTY = {"array": [], "object": {}}  # the schema leaves out defaults that a factory makes
BAR = "\\|"  # a bar within a cell
MANY = 8  # more names than this do not fit a cell: the meaning says where they stand


def page() -> str:
    """The page as markdown: every section and every key."""
    return HEAD + "".join(section(name, node) for name, node in run_schema()["properties"].items())


def section(name: str, node: dict[str, Any]) -> str:
    """A section with its keys, and the sections inside it."""
    required = node.get("required", ())
    nested: list[tuple[str, dict]] = []
    rows = []
    for key, field in node["properties"].items():
        rows.append(row(key, field, key in required))
        for of, inner in sections_of(field):
            if inner not in (known for _, known in nested):  # two keys may take the same section
                nested.append((f"{name}.{key}{of}", inner))
    inside = "".join(section(*each) for each in nested)
    return f"\n## `{name}`\n\n{node['description']}\n\n{COLUMNS}{''.join(rows)}{inside}"


def sections_of(field: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sections that may be a field's value (under ""), or stand in its list (under "[]")."""
    if "properties" in field:
        yield "", field
    for variant in field.get("anyOf", ()):
        if "properties" in variant:
            yield "", variant
        for item in variant.get("items", {}).get("anyOf", ()):
            if "properties" in item:
                yield "[]", item


def row(key: str, field: dict[str, Any], required: bool) -> str:
    told = (field.get(name, "") for name in ("description", "refused"))
    cells = (f"`{key}`", type_of(field), "required" if required else default(field), *told)
    return f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |\n"


def default(field: dict[str, Any]) -> str:
    if "properties" in field:
        return ""  # each of its keys has one
    value = field["default"] if "default" in field else EMPTY[field["type"]]
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def type_of(field: dict[str, Any]) -> str:
    """The type of a field in Python's words, with its bounds."""
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        names = [f"`{name}`" for name in field["enum"]]
        return ", ".join(names) if len(names) <= MANY else "str"
    if "anyOf" in field:
        return " or ".join(type_of(each) for each in field["anyOf"] if each.get("type") != "null")
    if "properties" in field:
        return "section"
    if "type" not in field:
        return "any"
    if field["type"] == "array":
        return f"list of {type_of(field['items'])}"
    bounds = [f"{sign} {field[bound]}" for bound, sign in BOUNDS.items() if bound in field]
    return f"{NAMES[field['type']]} {', '.join(bounds)}".strip()


if __name__ == "__main__":
    print(page(), end="")
