"""What `dpo-fast doctor` prints: tables as they are found, or all of it as JSON at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.cli import doctor
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.training.config import RunConfig


class Shown:
    """What has been found, and where it is shown.

    as_json: nothing is printed before `end`, which prints one object.
    """

    def __init__(self, console: Console, as_json: bool) -> None:
        self.console, self.as_json = console, as_json
        self.found: dict = {}

    def machine(self) -> None:
        """Versions, devices and implementations."""
        self._show(doctor.tables())

    def model(self, path: str) -> None:
        """The layouts of a model alone. Raises UserError."""
        _be_quiet()
        from dpo_fast.cli.doctor_layouts import facts, model_tables, read_model

        architecture = read_model(path)
        self._show(model_tables({path: architecture}), {"models": {path: facts(architecture)}})

    def run(self, config: RunConfig, memory: float | None, plan: bool) -> None:
        """What a run would use. memory: GiB of a GPU; None for this machine. Raises UserError."""
        _be_quiet()
        from dpo_fast.cli.doctor_plan import render_plan
        from dpo_fast.cli.doctor_run import look, models_of, tables_of
        from dpo_fast.training.memory_plan import Machine

        machine = Machine.gpu(int(memory * (1 << 30))) if memory else Machine.here(config)
        outlook = look(config)
        self._show(tables_of(outlook, machine), _models(models_of(outlook)))
        if plan:
            render_plan(self.console, outlook, machine)

    def stages(self, config: RoundsConfig, where: str) -> None:
        """What the run of each stage would use. Raises UserError."""
        _be_quiet()
        from dpo_fast.cli.doctor_run import models_of, tables_of
        from dpo_fast.cli.doctor_stages import outlooks_of

        for name, outlook in outlooks_of(config, where):
            tables, models = tables_of(outlook), _models(models_of(outlook))
            if self.as_json:
                self.found.setdefault("stages", {})[name] = as_data(tables) | models
                continue
            self.console.rule(name)
            self._show(tables)

    def end(self) -> None:
        if self.as_json:
            print(json.dumps(self.found, indent=2, ensure_ascii=False))

    def _show(self, tables: Mapping[str, Table], facts: dict | None = None) -> None:
        """facts: what JSON says beside the lines of the tables."""
        if self.as_json:
            self.found |= as_data(tables) | (facts or {})
            return
        for table in tables.values():
            self.console.print(table)


def _be_quiet() -> None:
    from dpo_fast.training.console import quiet

    quiet()


def _models(architectures: Mapping) -> dict:
    from dpo_fast.cli.doctor_layouts import facts

    return {"models": {option: facts(each) for option, each in architectures.items()}}


def as_data(tables: Mapping[str, Table]) -> dict[str, list[dict[str, str]]]:
    """The lines of each table, with their cells by the names of the columns."""
    return {name: _rows_of(table) for name, table in tables.items()}


def _rows_of(table: Table) -> list[dict[str, str]]:
    names = [str(column.header) for column in table.columns]
    cells = [[Text.from_markup(str(cell)).plain for cell in each.cells] for each in table.columns]
    return [dict(zip(names, line)) for line in zip(*cells)]
