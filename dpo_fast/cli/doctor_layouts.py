"""Which layouts a model gets, and which of its layers stand in the way: from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rich.markup import escape
from rich.table import Table
from transformers import AutoConfig

from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.errors import UserError
from dpo_fast.models.architecture import Architecture, architecture_of, choose_layout
from dpo_fast.models.checkpoint import base_of
from dpo_fast.models.hub import source
from dpo_fast.models.layer_kinds import MixingLayer, ranges
from dpo_fast.models.load import auto_class


def read_model(path: str) -> Architecture:
    """The architecture of a folder, of an adapter that of its base, or of a hub id. Raises UserError."""
    try:
        config = AutoConfig.from_pretrained(**source(base_of(path, "--model")))
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        why = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"--model={path}: its configuration cannot be read: {why.rstrip('.')}. Of a model with code "
            "of its own, name a CONFIG with model.trust_remote_code=true"
        ) from error
    return architecture_of(model)


def facts(architecture: Architecture) -> dict:
    """What `--json` says of a model's layouts.

    obstacle: why sequences cannot share a row, or null. in_the_way: the layers that this comes from.
    beside_attention: layers that mix tokens too, and keep the sequences of a row apart.
    """
    return {
        "architecture": architecture.name,
        "layouts": {name: architecture.allows(layout) for name, layout in LAYOUTS.items()},
        "auto": choose_layout("auto", architecture).name,
        "obstacle": architecture.obstacle,
        "in_the_way": [_of_layer(layer) for layer in architecture.blocking],
        "beside_attention": [_of_layer(layer) for layer in architecture.beside],
    }


def _of_layer(layer: MixingLayer) -> dict:
    return layer._asdict() | {"does": layer.meaning}


def layouts_table(models: Mapping[str, Architecture]) -> Table:
    """The layouts of each model. models: by the option that names them."""
    table = Table("model", "layout", "allowed", "why", title="Layouts")
    for option, architecture in models.items():
        chosen = choose_layout("auto", architecture).name
        for name, layout in LAYOUTS.items():
            allowed = architecture.allows(layout)
            why = f"{layout.merit}{'; auto takes it' if name == chosen else ''}"
            cells = (option, name, "yes" if allowed else "no")
            table.add_row(*map(escape, (*cells, why if allowed else str(architecture.obstacle))))
    return table


def layers_table(models: Mapping[str, Architecture]) -> Table:
    """The layers that mix tokens by more than attention; alike ones have one line."""
    columns = ("model", "layers", "kind", "first", "type", "what they do", "in the way")
    table = Table(*columns, title="Layers beside plain attention")
    for option, architecture in models.items():
        for blocks, layers in ((True, architecture.blocking), (False, architecture.beside)):
            groups: dict[tuple[str, str], list[MixingLayer]] = {}
            for layer in layers:
                groups.setdefault((layer.kind, layer.type), []).append(layer)
            for (kind, type_), alike in groups.items():
                places = ranges(layer.index for layer in alike)
                cells = (option, places, kind, alike[0].name, type_, alike[0].meaning)
                table.add_row(*map(escape, (*cells, "yes" if blocks else "no")))
    return table


def model_tables(models: Mapping[str, Architecture]) -> dict[str, Table]:
    """By the names that `--json` has for them; the second one only if it has a line."""
    tables = {"layouts": layouts_table(models), "layers": layers_table(models)}
    return {name: table for name, table in tables.items() if table.row_count}
