"""What TRL asks of a model: a forward that returns the log-probabilities of labels."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from dpo_fast.integrations.forward import add_forward
from dpo_fast.models.routers import top_k_of
from dpo_fast.models.scoring import fuse_head, scoring_head

IGNORED = -100
FIELDS = {  # of TRL's output: our extra
    "entropy": "entropy",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
    "log_sum_sq_probs": "log_sum_p2",
}


def add_linear_logp(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """Takes the place of TRL's `add_fused_lm_head`, and its arguments.

    `model(..., labels=labels, fused_lm_head=True)` runs the backbone, and `linear_logp` over the positions
    whose next label is not -100.

    temperature: what logits are divided by, where they are scored.
    cast_lm_head_to_fp32: the products of the head are fp32, in autocast too. Its weights are already.
    outputs: fields of `FusedCausalLMOutput`.
    """
    fields = {name: FIELDS[name] for name in outputs if name != "log_probs"}
    fuse_head(model, temperature=temperature)
    if cast_lm_head_to_fp32:
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, arguments: (arguments[0].float(), *arguments[1:]))
    forward = functools.partial(
        _score, fields=fields, in_fp32=cast_lm_head_to_fp32, temperature=temperature
    )
    add_forward(model, "fused_lm_head", forward)


def _score(
    model: PreTrainedModel,
    *args,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    fields: dict[str, str],
    in_fp32: bool,
    temperature: float,
    **kwargs,
) -> FusedCausalLMOutput:
    """Fields [S, L - 1], fp32 (is_top1 bool), 0 where nothing is scored; [S, L] with shift_labels.

    labels: int64 [S, L], the tokens themselves; or
    shift_labels: int64 [S, L], the token that each position predicts.
    num_items_in_batch: what `loss` is divided by; None: the scored tokens.
    """
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    head = scoring_head(model, temperature)
    output = model.base_model(*args, **kwargs | {"use_cache": False})
    hidden = output.last_hidden_state.to(head.weight.device)
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(head.weight.dtype)  # a head in fp32 over a backbone of 16 bits
    if shift_labels is None:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    else:
        labels = shift_labels
    labels = labels.to(hidden.device)
    scored = labels != IGNORED
    with torch.autocast(hidden.device.type, enabled=False) if in_fp32 else nullcontext():
        values = head(hidden[scored], labels[scored], tuple(fields.values()))
    names = {"log_probs": "logp"} | fields
    # masked_scatter keeps the result connected to the model even if nothing is scored.
    rows = {
        field: values[name].new_zeros(scored.shape).masked_scatter(scored, values[name])
        for field, name in names.items()
    }
    count = scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss, aux_loss = -rows["log_probs"].sum() / count, None
    if kwargs.get("output_router_logits"):
        aux_loss = _aux_loss(model, output.router_logits, kwargs.get("attention_mask"))
        weight = getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)
        loss = loss + weight * aux_loss
    return FusedCausalLMOutput(loss=loss, **rows, label_mask=scored, aux_loss=aux_loss)


def _aux_loss(model: PreTrainedModel, router_logits, attention_mask: Tensor | None) -> Tensor:
    """Mixtral's load-balancing loss, which transformers' mixture-of-experts models share."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts, top_k = router_logits[0].shape[-1], top_k_of(model)
    return load_balancing_loss_func(router_logits, experts, top_k, attention_mask)
