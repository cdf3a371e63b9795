"""The table of `dpo-fast doctor CONFIG --plan`: which options make a run fit."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dpo_fast.cli.doctor_run import Outlook
from dpo_fast.errors import UserError
from dpo_fast.training.memory import in_units
from dpo_fast.training.memory_plan import Machine, Rung, Uncounted, plan


def render_plan(console: Console, outlook: Outlook, machine: Machine) -> None:
    """Print what the run takes with more and more options, up to the first that fits.

    Raises:
        UserError: the activations of the model cannot be counted.
    """
    title = f"A plan for {machine.name} of {in_units(machine.capacity)}"
    table = Table("options", "on the device", "in CPU memory", "fits", title=title)
    config, world = outlook.config, outlook.world
    rungs: list[Rung] = []
    try:
        for rung in plan(config, outlook.choices, outlook.second_models, machine, world):
            table.add_row(
                words(rung) or "as configured",
                in_units(rung.device),
                in_units(rung.host),
                "yes" if rung.fits else "no",
            )
            rungs.append(rung)
    except Uncounted as error:
        if not rungs:
            raise UserError(
                f"doctor --plan: the activations of {type(outlook.policy.causal_lm).__name__} cannot be "
                f"counted ({error}); its model runs only with numbers"
            ) from error
        table.add_row("adapters (model.lora)", "not counted", "", "")
    console.print(table)
    console.print(verdict(rungs), soft_wrap=True)


def words(rung: Rung) -> str:
    """The options as the command line takes them."""
    return " ".join(f"{key}={_value(value)}" for key, value in rung.options.items())


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def verdict(rungs: list[Rung]) -> str:
    """The plan in a sentence."""
    last = rungs[-1]
    if not last.fits:
        least = min(rungs, key=lambda rung: rung.device)
        return (
            f"None of these fits; the least is {in_units(least.device)} on the device. Take shorter rows "
            "(train.tokens_per_batch, data.max_length), more ranks, or a smaller model"
        )
    if not last.options:
        return "It fits as it is"
    return f"It fits with {words(last)}"
