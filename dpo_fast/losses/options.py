"""Options that losses share, under TRL's names where TRL has them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

SCALES = ("group", "none")
LEVELS = ("token", "sequence")
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
CHOICES = {
    "f_divergence_type": DIVERGENCES,
    "scale_rewards": SCALES,
    "importance_sampling_level": LEVELS,
}
NOT_NEGATIVE = (
    "simpo_gamma",
    "cpo_alpha",
    "dpop_lambda",
    "slic_delta",
    "slic_lambda",
    "desirable_weight",
    "undesirable_weight",
    "epsilon_high",
    "grpo_beta",
)


def check_type(name: str, value, kind: str) -> None:
    """Raises ValueError for what is no finite number or no bool where `kind`, an annotation, says so.

    Numbers of numpy and tensors of one number are numbers.
    """
    if value is None and "None" in kind:
        return
    if kind == "bool" and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")
    if kind.split(" ")[0] not in ("float", "int"):
        return
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise ValueError(f"{name}={value!r} must be a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")


def option(default, meaning: str):
    """A field whose meaning stands in the configuration and docs/LOSSES.md."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class LossOptions:
    """Options of all losses. `LossSpec.options` says which loss uses which.

    Raises:
        ValueError: naming the option, its value and what it must be.
    """

    beta: float = option(
        0.1, "strength of the pull towards the reference; rewards are beta * log-ratio"
    )
    label_smoothing: float = option(
        0.0, "probability that a label is flipped; at least 0, below 0.5"
    )
    length_average: bool = option(True, "ipo: mean (true) or summed (false) log-ratios")
    f_divergence_type: str = option(
        "reverse_kl", f"how a log-ratio is shaped: {', '.join(DIVERGENCES)} (2309.16240)"
    )
    f_alpha_divergence_coef: float = option(0.5, "alpha of alpha_divergence; 1 is reverse_kl")
    discopop_tau: float = option(0.05, "temperature of discopop's blend; above 0, at most 1")
    simpo_gamma: float = option(0.5, "reward margin that simpo wants")
    cpo_alpha: float = option(1.0, "weight of cpo's sft term")
    dpop_lambda: float = option(50.0, "weight of dpop's penalty on falling chosen log-probs")
    slic_delta: float = option(1.0, "margin of log-probs that slic wants")
    slic_lambda: float = option(0.1, "weight of slic's sft term")
    desirable_weight: float = option(
        1.0, "weight of desirable completions (kto, bco, apo_zero_unpaired)"
    )
    undesirable_weight: float = option(1.0, "weight of undesirable completions")
    ld_alpha: float | None = option(
        None,
        "weight of the tokens of a pair's longer answer beyond the shorter one's length, 0 to 1 "
        "(2409.06411)",
    )
    ld_reference: bool = option(True, "ld_alpha weights the reference's tokens as well")
    token_clamp: float | None = option(None, "bound on the log-ratio of every token")
    reference_free: bool = option(False, "log-probs themselves in place of log-ratios")
    use_weighting: bool = option(
        False, "weight pairs by how likely the policy is to write them (WPO, 2406.11827)"
    )
    weighting_clamp: float | None = option(None, "the largest weight that use_weighting gives")

    epsilon: float = option(0.2, "grpo, dapo: how far below 1 a probability ratio still counts")
    epsilon_high: float | None = option(
        None, "grpo, dapo: how far above 1 it still counts; null: as epsilon"
    )
    scale_rewards: str = option(
        "group",
        f"grpo, dapo: what scores are divided by: {', '.join(SCALES)}; group: their standard "
        "deviation in the group",
    )
    importance_sampling_level: str = option(
        "token", f"grpo, dapo: the probability ratio is of each: {', '.join(LEVELS)}"
    )
    grpo_beta: float = option(
        0.0, "grpo, dapo: weight of the divergence from the reference; 0 needs no reference"
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            check_type(each.name, getattr(self, each.name), str(each.type))
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta} must be greater than 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5: at 0.5 "
                "the labels say nothing"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)}: choose from {', '.join(choices)}")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon={self.epsilon} must be above 0 and below 1")
        if not 0 < self.discopop_tau <= 1:
            raise ValueError(f"discopop_tau={self.discopop_tau} must be above 0 and at most 1")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha={self.ld_alpha} must be between 0 and 1")
        for name in ("token_clamp", "weighting_clamp"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be greater than 0")
        for name in NOT_NEGATIVE:
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        self._check_companions()

    def _check_companions(self) -> None:
        """An option that only modifies another one needs it."""
        if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
            raise ValueError(
                f"f_alpha_divergence_coef={self.f_alpha_divergence_coef} is not used by "
                f"f_divergence_type={self.f_divergence_type}; set alpha_divergence"
            )
        if self.weighting_clamp is not None and not self.use_weighting:
            raise ValueError(
                f"weighting_clamp={self.weighting_clamp} bounds the weights of use_weighting, which is "
                "false; set it to true"
            )
        if not self.ld_reference and self.ld_alpha is None:
            raise ValueError("ld_reference=false concerns ld_alpha, which is not set; set it")
        if self.reference_free:
            self._check_reference_free()

    def _check_reference_free(self) -> None:
        for name, unused in (("token_clamp", None), ("ld_reference", True)):
            if getattr(self, name) != unused:
                raise ValueError(
                    f"{name}={getattr(self, name)} concerns the reference, which reference_free=true "
                    "leaves out; remove one of them"
                )

    @property
    def changes_sums(self) -> bool:
        """Whether an option changes the policy's sums over tokens."""
        return self.token_clamp is not None or self.ld_alpha is not None

    @property
    def needs_reference_tokens(self) -> bool:
        """Whether sums of the reference are not enough."""
        beyond = self.ld_alpha is not None and self.ld_reference
        return not self.reference_free and (self.token_clamp is not None or beyond)

    @property
    def largest_gain(self) -> float:
        """epsilon_high, or epsilon where that is not set."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the options that differ from their defaults."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != f.default)
