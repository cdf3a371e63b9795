"""The configuration as a JSON schema: editors complete YAML with it, and docs/CONFIG.md is made of it.

A field says what refuses it with `json_schema_extra={"refused": "..."}`.
"""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel

from dpo_fast.data.config import ALL_COLUMNS
from dpo_fast.losses import LOSSES
from dpo_fast.losses.options import CHOICES
from dpo_fast.losses.spec import SHARED
from dpo_fast.training.config import RunConfig

COMPANIONS = {  # options of the losses that only modify another one, and what refuses them besides
    "f_alpha_divergence_coef": "unless `f_divergence_type` is alpha_divergence",
    "weighting_clamp": "without `use_weighting`",
    "ld_reference": "false without `ld_alpha`",
    "token_clamp": "with `reference_free`",
}
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def editor_schema() -> dict[str, Any]:
    """`run_schema` with each refusal as a last sentence of its description, where editors show it."""
    tree = run_schema()
    for section in tree["properties"].values():
        _tell_refusals(section["properties"])
    return {"$schema": DRAFT, **tree}


def run_schema() -> dict[str, Any]:
    """RunConfig as a JSON schema without references: each section stands where it is used."""
    tree = schema_of(RunConfig)
    tree |= {"title": "dpo_fast run", "description": "The configuration of `dpo-fast train`."}
    for name, section in tree["properties"].items():
        section.pop("default", None)  # that of each key stands beside the key
        section["description"] = _first_paragraph(RunConfig.model_fields[name].annotation)
    _add_losses(tree["properties"]["loss"]["properties"])
    columns = tree["properties"]["data"]["properties"]["columns"]
    columns["propertyNames"] = {"enum": list(ALL_COLUMNS)}
    return tree


def schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    """A configuration as a JSON schema in which each section stands where it is used."""
    tree = kind.model_json_schema()
    return _in_place(tree, tree.pop("$defs"))


def _in_place(node: Any, sections: dict[str, Any]) -> Any:
    """A copy with every `$ref` replaced by its section, and without titles that repeat the key."""
    if isinstance(node, list):
        return [_in_place(item, sections) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        node = sections[node["$ref"].rpartition("/")[2]] | node
    keep = {key: value for key, value in node.items() if key not in ("$ref", "title")}
    properties = keep.pop("properties", None)
    copy = {key: _in_place(value, sections) for key, value in keep.items()}
    if properties is not None:
        copy["properties"] = {key: _in_place(value, sections) for key, value in properties.items()}
    return copy


def _first_paragraph(section: type) -> str:
    return " ".join(inspect.getdoc(section).split("\n\n")[0].split())


def _add_losses(properties: dict[str, Any]) -> None:
    """Names of the losses, choices of their options, and which losses take an option."""
    named = {"type": "string", "pattern": r"^.+:\w+$"}
    one = {"anyOf": [{"type": "string", "enum": list(LOSSES)}, named]}
    properties["type"]["anyOf"] = [one, {"type": "array", "items": one}]
    for option, choices in CHOICES.items():
        properties[option]["enum"] = list(choices)
    for option in properties.keys() - {"type", "weights", "beta"}:
        refusals = (_loss_refusal(option), COMPANIONS.get(option))
        properties[option]["refused"] = "; ".join(filter(None, refusals))


def _loss_refusal(option: str) -> str:
    """Which losses refuse an option, in words."""
    if option in SHARED:
        return "if one of the losses, `sft` aside, does not use it"
    *others, last = (f"`{name}`" for name, spec in LOSSES.items() if option in spec.options)
    return (
        f"unless `type` has {', '.join(others)} or {last}"
        if others
        else f"unless `type` has {last}"
    )


def _tell_refusals(properties: dict[str, Any]) -> None:
    for field in properties.values():
        for variant in field.get("anyOf", ()):
            for each in (variant, *variant.get("items", {}).get("anyOf", ())):
                _tell_refusals(each.get("properties", {}))
        if refused := field.pop("refused", None):
            field["description"] = f"{field['description'].rstrip('.')}. Refused {refused}."
