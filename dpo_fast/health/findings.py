"""The table of rules: the name that `health.stop_on` takes, what it says when all is well, the rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from dpo_fast.health import curves, data
from dpo_fast.health.history import History


class Rule(NamedTuple):
    """fine: what is in order where the rule finds nothing."""

    fine: str
    look: Callable[[History], str | None]


FINDINGS = {  # the most important first
    "not_finite": Rule("all values finite", data.not_finite),
    "start_loss": Rule("start at ln 2", data.start_loss),
    "loss_flat": Rule("loss falls", curves.loss_flat),
    "loss_rising": Rule("loss does not rise", curves.loss_rising),
    "overfitting": Rule("evaluation loss does not turn up", curves.overfitting),
    "reference_mismatch": Rule(
        "reference close to the policy at the start", data.reference_mismatch
    ),
    "always_rejected": Rule("accuracy above 0", curves.always_rejected),
    "always_chosen": Rule("accuracy below 1", curves.always_chosen),
    "chosen_falling": Rule("chosen answers stay likely", curves.chosen_falling),
    "margin_exploding": Rule("margin bounded", curves.margin_exploding),
    "entropy_collapse": Rule("entropy kept", curves.entropy_collapse),
    "gradient_spikes": Rule("gradients even", curves.gradient_spikes),
    "length_drift": Rule("no drift of length", curves.length_drift),
    "length_shortcut": Rule("length does not give the label away", data.length_shortcut),
    "truncated": Rule("few answers cut", data.truncated),
    "duplicates": Rule("few duplicates", data.duplicates),
    "contradictory": Rule("few contradictory pairs", data.contradictory),
    "nearly_equal": Rule("chosen and rejected differ", data.nearly_equal),
    "eval_in_train": Rule("evaluation apart from training", data.eval_in_train),
}


@dataclass
class Check:
    """finding: empty if all is in order; None if the metrics do not allow the check."""

    name: str
    finding: str | None

    @property
    def fine(self) -> str:
        return FINDINGS[self.name].fine


def examine(run: History) -> list[Check]:
    """All checks, the most important first."""
    return [Check(name, rule.look(run)) for name, rule in FINDINGS.items()]
