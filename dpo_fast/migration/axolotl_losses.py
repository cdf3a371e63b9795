"""The losses of an Axolotl file: `rl`, and the options of TRL's trainers behind it."""

from __future__ import annotations

from dpo_fast.losses import LOSSES
from dpo_fast.migration.draft import Draft
from dpo_fast.migration.losses import put_losses, put_option
from dpo_fast.migration.option import flag, listed
from dpo_fast.migration.trl import SMOOTHED


def put_loss(draft: Draft, method: str) -> None:
    names = ["rl"]
    if method == "dpo":
        shares = _dpo_losses(draft, names)
    else:
        shares = {method: 1.0}
    if draft.has("rpo_alpha") and method in ("dpo", "ipo"):
        shares["sft"] = float(draft["rpo_alpha"])
        names.append("rpo_alpha")
    if method == "simpo":
        alpha = float(draft["cpo_alpha"]) if draft.has("cpo_alpha") else 1.0
        if alpha:
            shares["sft"] = alpha
            draft.put(
                "loss.weights", [1.0, alpha], "cpo_alpha", comment="cpo_alpha, 1 by default there"
            )
            names.append("cpo_alpha")
    put_losses(draft, shares, *names, comment=f"rl: {method}")
    own = [name for name in shares if name != "sft"] or ["sft"]
    option = next(
        (n for n in ("trl.beta", "rl_beta", "dpo_beta", "orpo_alpha") if draft.has(n)), "rl_beta"
    )
    put_option(draft, own, "beta", float(draft[option]) if draft.has(option) else 0.1, option)
    for ours, theirs in (
        ("simpo_gamma", "simpo_gamma"),
        ("desirable_weight", "kto_desirable_weight"),
        ("undesirable_weight", "kto_undesirable_weight"),
        ("use_weighting", "dpo_use_weighting"),
    ):
        if draft.has(theirs):
            value = flag(draft[theirs]) if ours == "use_weighting" else float(draft[theirs])
            put_option(draft, own, ours, value, theirs)
    if draft.has("dpo_label_smoothing"):
        _smoothing(draft, own)
    if draft.has("precompute_ref_log_probs"):
        draft.spare(
            "precompute_ref_log_probs", "the reference is stored by default: the same numbers, once"
        )


def _dpo_losses(draft: Draft, names: list[str]) -> dict[str, float]:
    losses = [str(each) for each in listed(draft["dpo_loss_type"])] or ["sigmoid"]
    if flag(draft["dpo_norm_loss"]):
        losses = ["sigmoid_norm"]
        names.append("dpo_norm_loss")
    if unknown := [each for each in losses if each not in LOSSES]:
        raise draft.fault(
            "dpo_loss_type", f"{', '.join(unknown)} is no loss here; docs/LOSSES.md has them"
        )
    weights = listed(draft["dpo_loss_weights"]) or [1.0] * len(losses)
    if len(weights) != len(losses):
        raise draft.fault("dpo_loss_weights", f"{len(losses)} losses need as many weights")
    names += ["dpo_loss_type", "dpo_loss_weights"]
    return dict(zip(losses, map(float, weights), strict=True))


def _smoothing(draft: Draft, losses: list[str]) -> None:
    if set(losses) & set(SMOOTHED):
        put_option(
            draft,
            losses,
            "label_smoothing",
            float(draft["dpo_label_smoothing"]),
            "dpo_label_smoothing",
        )
    else:
        draft.lose(
            "dpo_label_smoothing",
            "TRL 1.16, which Axolotl trains with, smooths no labels of these losses; for cDPO set "
            "loss.label_smoothing",
        )
