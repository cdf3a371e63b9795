"""The section `health` of a configuration: which findings stop a run, and whether it can make them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, field_validator

from dpo_fast.health import FINDINGS, History
from dpo_fast.references.table import ProviderSpec
from dpo_fast.training.sections import FORBID


class HealthSection(BaseModel):
    """What is done about findings: signs that a run goes wrong (docs/TRAINING.md lists them)."""

    model_config = FORBID

    stop_on: list[str] = Field(
        default_factory=list,
        description="findings that stop the run, with a checkpoint and exit code 4; by default none does",
        json_schema_extra={
            "refused": "a finding that the run cannot make: overfitting without data.eval"
        },
    )

    @field_validator("stop_on", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """One name is a list of it."""
        return [value] if isinstance(value, str) else value

    @field_validator("stop_on")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in FINDINGS:
                raise ValueError(f"health.stop_on={name}: choose from {', '.join(FINDINGS)}")
        return names


def check_stop_on(
    health: HealthSection, provider: ProviderSpec, tree: dict[str, Any], has_eval: bool
) -> None:
    """Raises ValueError for a finding that cannot be made, with the option that it would need.

    tree: the resolved configuration.
    """
    lacks = {}
    if not tree["log"]["token_metrics"]:
        lacks["entropy_collapse"] = "the entropy, but log.token_metrics=false: set it to true"
    if not has_eval:
        evaluation = "something to evaluate on: set data.eval or data.eval_rows"
        lacks |= dict.fromkeys(("overfitting", "eval_in_train"), evaluation)
    if provider.follows:
        still = (
            f"a reference that stays, and reference.provider={provider.name} moves with the policy, and "
            "the loss with it: choose another"
        )
        lacks |= dict.fromkeys(("loss_flat", "loss_rising", "overfitting"), still)
    if not provider.compares:
        lacks["reference_mismatch"] = (
            f"a reference, and reference.provider={provider.name} gives none: choose a loss with one"
        )
    if not History(config=tree).starts_at_ln2:
        lacks["start_loss"] = (
            "a loss that begins at a known value: loss.type=sigmoid alone, with the starting model as its "
            "reference; set these"
        )
    for name in health.stop_on:
        if name in lacks:
            raise ValueError(f"health.stop_on={name} needs {lacks[name]}, or leave {name} out")
