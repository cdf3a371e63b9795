"""The losses of `LigerFusedLinearGRPOLoss` and of TRL's GRPOTrainer, on log-probs of tokens.

S completions, L positions each. `gains` are advantages, [S, 1]. Where a ratio is of a whole completion,
tensors are [S, 1] in the place of [S, L].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dpo_fast.losses.options import check_type

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")
# The loss types that read an option. The others are read by all.
READERS = {
    "epsilon_low": CLIPPED,
    "epsilon_high": (*CLIPPED, "cispo"),
    "delta": CLIPPED,
    **dict.fromkeys(("sapo_temperature_pos", "sapo_temperature_neg"), ("sapo",)),
    **dict.fromkeys(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), ("vespo",)
    ),
}
LARGEST_LOG = 20.0  # vespo bounds logarithms of ratios by it, and by the logarithm of
SMALLEST_RATIO = 1e-8


@dataclass(frozen=True)
class GrpoOptions:
    """Arguments of Liger's constructor.

    Raises:
        ValueError: an option that cannot be honoured.
    """

    beta: float = 0.04
    use_ref_model: bool = True
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    loss_type: str = "dapo"
    max_completion_length: int | None = None
    importance_sampling_level: str = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    temperature: float = 1.0
    delta: float | None = None
    use_bias_correction_kl: bool = False
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_type(field.name, getattr(self, field.name), str(field.type))
        for name, known in (("loss_type", LOSS_TYPES), ("importance_sampling_level", LEVELS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose from {', '.join(known)}")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "temperature", "delta"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be greater than 0")
        if self.loss_type == "dr_grpo" and not self.max_completion_length:
            raise ValueError(
                f"max_completion_length={self.max_completion_length}: dr_grpo divides by it; give the "
                "most tokens that a completion may have"
            )
        if self.importance_sampling_level == "sequence" and self.loss_type not in CLIPPED:
            raise ValueError(
                f"importance_sampling_level='sequence' cannot be used by loss_type={self.loss_type!r}; "
                f"set it to 'token', or choose {', '.join(CLIPPED)}"
            )
        self._check_readers()

    def _check_readers(self) -> None:
        for field in fields(self):
            readers = READERS.get(field.name, LOSS_TYPES)
            value = getattr(self, field.name)
            if value != field.default and self.loss_type not in readers:
                raise ValueError(
                    f"{field.name}={value} is not used by loss_type={self.loss_type!r}; set it to "
                    f"{field.default}, or choose {', '.join(readers)}"
                )
        if self.beta != GrpoOptions.beta and self.beta and not self.use_ref_model:
            raise ValueError(
                f"beta={self.beta} weighs the divergence from a reference, and use_ref_model=False has "
                "none: set beta=0.0, or use_ref_model=True"
            )

    @property
    def compares(self) -> bool:
        """Whether a reference has a part in the loss."""
        return self.use_ref_model and self.beta != 0


@dataclass(frozen=True)
class Completions:
    """What the losses look at, fp32; 0 where nothing is scored.

    logps, old_logps: of the policy, and of the model that wrote the completions, [S, L].
    reference_logps: [S, L], or None.
    mask: weights of the tokens, 0 or 1 as a rule, [S, L].
    gains: advantages, [S, 1].
    sampler_ratio: the policy's probabilities over those of another engine that sampled, [S, L] or [S, 1].
    """

    logps: Tensor
    old_logps: Tensor
    reference_logps: Tensor | None
    mask: Tensor
    gains: Tensor
    sampler_ratio: Tensor | None

    @property
    def lengths(self) -> Tensor:
        """[S, 1]."""
        return self.mask.sum(1, keepdim=True)

    def mean(self, values: Tensor) -> Tensor:
        """Over the scored tokens, []."""
        return (values * self.mask).sum() / self.mask.sum().clamp_min(1)


def grpo_loss(
    batch: Completions, options: GrpoOptions, num_items_in_batch: Tensor | float | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, [], and Liger's metrics, detached: the divergence if beta is not 0, and the clipped share.

    num_items_in_batch: scored tokens of the global batch, over all ranks; None: of this one.
    """
    log_ratio = batch.logps - batch.old_logps
    if options.importance_sampling_level == "sequence":
        sums = (log_ratio * batch.mask).sum(1, keepdim=True)
        log_ratio = sums / batch.lengths.clamp_min(1)
    losses, clipped = _POLICY[options.loss_type](log_ratio, batch, options)
    if batch.sampler_ratio is not None and options.loss_type != "vespo":
        losses = losses * batch.sampler_ratio
    metrics = []
    if options.beta != 0:
        kl = divergence(log_ratio, batch, options)
        losses = losses + options.beta * kl
        metrics.append(batch.mean(kl.detach()))
    metrics.append(batch.mean(clipped.expand_as(batch.mask)))
    return _reduced(losses, batch, options, num_items_in_batch), tuple(metrics)


def divergence(log_ratio: Tensor, batch: Completions, options: GrpoOptions) -> Tensor:
    """exp(ref - logp) - (ref - logp) - 1, [S, L]: an estimate of the KL divergence that is never below 0.

    Source: GRPO, arXiv 2402.03300 eq 4; times the ratio with use_bias_correction_kl (DeepSeek-V3.2).
    """
    reference = batch.logps.detach() if batch.reference_logps is None else batch.reference_logps
    log = reference - batch.logps
    kl = log.exp() - log - 1
    return kl * log_ratio.exp() if options.use_bias_correction_kl else kl


def clipped_losses(log_ratio: Tensor, batch: Completions, options: GrpoOptions):
    """-min(R A, clip(R, 1 - epsilon_low, 1 + epsilon_high) A), and what is clipped.

    Source: GRPO, arXiv 2402.03300 eq 3; of whole completions GSPO, arXiv 2507.18071; with R at most delta
    INTELLECT-2, arXiv 2505.07291.
    """
    ratio, gains = log_ratio.exp(), batch.gains
    low, high = 1 - options.epsilon_low, 1 + options.epsilon_high
    clipped = ((ratio < low) & (gains < 0)) | ((ratio > high) & (gains > 0))
    bounded = ratio if options.delta is None else ratio.clamp(max=options.delta)
    return -torch.min(bounded * gains, ratio.clamp(low, high) * gains), clipped


def cispo_losses(log_ratio: Tensor, batch: Completions, options: GrpoOptions):
    """-min(R, epsilon_high) A logp, R without gradient. Source: CISPO, arXiv 2506.13585."""
    ratio = log_ratio.exp().detach()
    clipped = (ratio > options.epsilon_high) & (batch.gains > 0)
    return -ratio.clamp(max=options.epsilon_high) * batch.gains * batch.logps, clipped


def sapo_losses(log_ratio: Tensor, batch: Completions, options: GrpoOptions):
    """-4 sigmoid(t (R - 1)) A / t, t by the sign of A. Source: SAPO, arXiv 2511.20347."""
    ratio = log_ratio.exp()
    sides = (
        torch.sigmoid(t * (ratio - 1)) * 4 / t
        for t in (options.sapo_temperature_pos, options.sapo_temperature_neg)
    )
    gate = torch.where(batch.gains > 0, *sides)
    return -gate * batch.gains, torch.zeros_like(ratio, dtype=torch.bool)


def vespo_losses(log_ratio: Tensor, batch: Completions, options: GrpoOptions):
    """-phi(W) A logp, W the ratio of a whole completion, phi(W) = exp(l + k log W - l W) without gradient.

    Source: VESPO, arXiv 2602.10693, as in TRL's `GRPOTrainer.get_gamma_weights`. The sampler's ratio goes
    into W.
    """
    lowest = math.log(SMALLEST_RATIO)
    log_weight = (log_ratio.detach().clamp(-LARGEST_LOG, LARGEST_LOG) * batch.mask).sum(
        1, keepdim=True
    )
    if batch.sampler_ratio is not None:
        log_weight = log_weight + batch.sampler_ratio.log().clamp(lowest, LARGEST_LOG).sum(
            1, keepdim=True
        )
    log_weight = log_weight.clamp(lowest, LARGEST_LOG)
    good = batch.gains >= 0
    k = torch.where(good, options.vespo_k_pos, options.vespo_k_neg)
    rate = torch.where(good, options.vespo_lambda_pos, options.vespo_lambda_neg).clamp_min(1e-4)
    phi = (rate + k * log_weight - rate * log_weight.exp()).exp().nan_to_num(0.0, 0.0, 0.0)
    return -phi * batch.gains * batch.logps, torch.zeros_like(batch.logps, dtype=torch.bool)


_POLICY = dict.fromkeys(CLIPPED, clipped_losses) | {
    "cispo": cispo_losses,
    "sapo": sapo_losses,
    "vespo": vespo_losses,
}


def _reduced(
    losses: Tensor, batch: Completions, options: GrpoOptions, items: Tensor | float | None
) -> Tensor:
    """One number of the losses of tokens, [S, L] or [S, 1].

    Sources: grpo, dapo and dr_grpo as in `dpo_fast.losses.groups`; luspo, arXiv 2602.05261, which adds up a
    completion's tokens, as in TRL 1.16. Liger's is the same where no token is masked, or ratios are of
    completions and beta is 0.
    """
    S, mask = len(batch.mask), batch.mask
    if options.loss_type in ("grpo", "sapo"):
        means = (losses * mask).sum(1, keepdim=True) / batch.lengths.clamp_min(1)
        return means.sum() / S
    if options.loss_type == "bnpo":
        return batch.mean(losses)
    if options.loss_type == "dr_grpo":
        return (losses * mask).sum() / (S * options.max_completion_length)
    if options.loss_type == "luspo":
        return (losses * mask).sum() / S
    return (losses * mask).sum() / _tokens_of_a_rank(mask, items)


def _tokens_of_a_rank(mask: Tensor, items: Tensor | float | None) -> Tensor:
    """Scored tokens of the global batch over the ranks, whose gradients are averaged, []; at least 1."""
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = torch.distributed.get_world_size() if parallel else 1
    if items is None:
        count = mask.sum()
        if parallel:
            torch.distributed.all_reduce(count)
    else:
        count = torch.as_tensor(items, dtype=torch.float32, device=mask.device)
    return (count / ranks).clamp_min(1)
