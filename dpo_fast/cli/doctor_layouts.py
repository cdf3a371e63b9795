"""Which layouts a model gets, and which of its layers stand in the way: from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.models.architecture import Architecture, architecture_of, choose_layout
from dpo_fast.models.config import ModelSection
from dpo_fast.models.layer_kinds import MixingLayer, ranges
from dpo_fast.models.load import load_skeleton


def read_model(path: str, trust_remote_code: bool = False) -> Architecture:
    """The architecture of a folder or of a hub id, without weights. Raises UserError."""
    section = ModelSection(path=path, trust_remote_code=trust_remote_code)
    return architecture_of(load_skeleton(section, "--model"))


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
