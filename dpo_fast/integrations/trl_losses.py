"""The losses of a DPOConfig: which TRL computes, which we compute, and ours on TRL's batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from trl import DPOConfig

from dpo_fast.errors import UserError
from dpo_fast.losses import LOSSES, LossOptions, Objective, Totals, preference
from dpo_fast.losses.custom import known_names, spec_of
from dpo_fast.ops.segments import sum_sequences

TRL_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
# Options of a DPOConfig that only some of TRL's own losses read; its others ignore them.
READERS = {
    "label_smoothing": ("robust", "exo_pair", "aot", "aot_unpaired"),
    "discopop_tau": ("discopop",),
}
SHARED = (
    "beta",
    "label_smoothing",
    "discopop_tau",
    "ld_alpha",
    "use_weighting",
    "f_divergence_type",
    "f_alpha_divergence_coef",
)


@dataclass(frozen=True)
class Shares:
    """Who computes what.

    names, weights: TRL's losses.
    objective: ours beside them, or None.
    """

    names: list[str]
    weights: list[float]
    objective: Objective | None


def share_losses(args: DPOConfig, loss_options: Mapping[str, object]) -> Shares:
    """Divide `args.loss_type` between TRL, which computes the names it knows, and us.

    loss_options: for our losses, fields of `LossOptions` that a DPOConfig lacks.

    Raises:
        UserError: an unknown name, or an option that no loss of the list reads.
    """
    weights = args.loss_weights or [1.0] * len(args.loss_type)
    both = list(zip(args.loss_type, weights, strict=True))
    theirs = [pair for pair in both if pair[0] in TRL_LOSSES]
    ours = [pair for pair in both if pair[0] not in TRL_LOSSES]
    _check_names([name for name, _ in ours])
    _check_readers(args, [name for name, _ in both])
    objective = _objective(args, ours, loss_options, alone=not theirs)
    return Shares([n for n, _ in theirs], [w for _, w in theirs], objective)


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if spec_of(name) is None:
            others = (n for n in known_names() if n not in TRL_LOSSES and not _wants(n))
            known = ", ".join([*TRL_LOSSES, *others])
            raise UserError(f"loss_type={name} is not known; choose from {known}")
        if wants := ", ".join(_wants(name)):
            trainer = "GRPOTrainer" if spec_of(name).grouped else "KTOTrainer for kto"
            raise UserError(
                f"loss_type={name} needs {wants}, which TRL's DPO batches do not have: use dpo-fast "
                f"train, or {trainer}"
            )


def _wants(name: str) -> list[str]:
    """What a loss needs and pairs of TRL do not have."""
    spec = spec_of(name)
    scores = ["the scores of groups"] if spec.grouped else []
    return [*spec.statistics, *spec.needs_columns, *scores]


def _check_readers(args: DPOConfig, names: list[str]) -> None:
    for option, readers in READERS.items():
        value, default = getattr(args, option), DPOConfig.__dataclass_fields__[option].default
        known = dict.fromkeys([*LOSSES, *names])
        takers = {*readers, *(n for n in known if n not in TRL_LOSSES and _reads(n, option))}
        if value != default and not takers & set(names):
            raise UserError(
                f"{option}={value} is not read by loss_type={names}; set it to {default}, or choose "
                f"{' or '.join(sorted(takers))}"
            )
    kind = args.f_divergence_type
    kind = getattr(kind, "value", kind)
    if args.f_alpha_divergence_coef != 0.5 and kind != "alpha_divergence":
        raise UserError(
            f"f_alpha_divergence_coef={args.f_alpha_divergence_coef} is not read by "
            f"f_divergence_type={kind}; set alpha_divergence"
        )


def _reads(name: str, option: str) -> bool:
    return option in spec_of(name).options


def _objective(
    args: DPOConfig, ours: list[tuple[str, float]], loss_options: Mapping[str, object], alone: bool
) -> Objective | None:
    names = tuple(name for name, _ in ours)
    if not names:
        if loss_options:
            raise UserError(
                f"loss_options={dict(loss_options)} are for losses that TRL lacks; "
                f"loss_type={args.loss_type} takes its options from DPOConfig"
            )
        return None
    if twice := set(loss_options) & set(SHARED):
        raise UserError(f"loss_options: {', '.join(sorted(twice))} belongs into DPOConfig")
    # An option that only TRL's losses read is not given to ours.
    shared = [option for option in SHARED if alone or any(_reads(n, option) for n in names)]
    values = {option: getattr(args, option) for option in shared} | {"beta": args.beta}
    if args.precompute_ref_log_probs and values.get("ld_alpha") is not None:
        values["ld_reference"] = False  # TRL's stored sums are weighted already
    try:
        options = LossOptions(**values, **loss_options)
        objective = Objective(names, tuple(weight for _, weight in ours), options)
    except (TypeError, ValueError) as error:
        raise UserError(f"loss_type={list(names)}: {error}") from None
    if args.precompute_ref_log_probs and options.needs_reference_tokens:
        raise UserError(
            "precompute_ref_log_probs=True keeps sums, and loss_options token_clamp wants the "
            "reference's tokens: set it to False"
        )
    return objective


def our_loss(objective: Objective, inputs: Mapping[str, Tensor], policy, reference) -> Tensor:
    """The objective's mean over a micro-batch of TRL's, [], differentiable.

    policy, reference: outputs of the fused forward; reference is None if `inputs` hold its sums.
    """
    mask_SL = _in_pairs(inputs["completion_mask"][:, 1:].bool())
    lengths_S = mask_SL.sum(1)

    def tokens(rows_SL: Tensor) -> Tensor:
        return _in_pairs(rows_SL[:, -mask_SL.shape[1] :])[mask_SL]

    if reference is None:
        reference_T = None
        sums = [inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]
        reference_S = torch.stack(sums, 1).flatten().float()
    else:
        reference_T = tokens(reference.log_probs)
        reference_S = sum_sequences(reference_T, lengths_S)
    weighting = objective.options.use_weighting
    result = preference(
        tokens(policy.log_probs),
        lengths_S,
        reference_S,
        objective,
        Totals(len(lengths_S) // 2, int(lengths_S[0::2].sum()), len(lengths_S)),
        reference_T=reference_T,
        log_sum_p2_T=tokens(policy.log_sum_sq_probs) if weighting else None,
    )
    return result.loss


def _in_pairs(rows: Tensor) -> Tensor:
    """Chosen and rejected in turn, from TRL's order: all chosen rows, then all rejected ones."""
    return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
