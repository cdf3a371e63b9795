"""What TRL asks of a model: a forward that returns the log-probabilities of labels."""

from __future__ import annotations

import functools

from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from dpo_fast.integrations.forward import add_forward
from dpo_fast.models.routers import top_k_of
from dpo_fast.models.scoring import fuse_head

IGNORED = -100
FIELDS = {  # of TRL's output: our extra
    "entropy": "entropy",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
    "log_sum_sq_probs": "log_sum_p2",
}


def add_linear_logp(model: PreTrainedModel, outputs: tuple[str, ...] = ("log_probs",)) -> None:
    """Takes the place of TRL's `add_fused_lm_head`.

    `model(..., labels=labels, fused_lm_head=True)` runs the backbone, and `linear_logp` over the positions
    whose next label is not -100.

    outputs: fields of `FusedCausalLMOutput`.
    """
    fields = {name: FIELDS[name] for name in outputs if name != "log_probs"}
    fuse_head(model)
    add_forward(model, "fused_lm_head", functools.partial(_score, fields=fields))


def _score(
    model: PreTrainedModel, *args, labels: Tensor, fields: dict[str, str], **kwargs
) -> FusedCausalLMOutput:
    """Fields [S, L - 1], fp32 (is_top1 bool), 0 where nothing is scored. labels: int64 [S, L]."""
    output = model.base_model(*args, **kwargs | {"use_cache": False})
    head = model.get_output_embeddings()
    hidden = output.last_hidden_state[:, :-1].to(head.weight.device)
    labels = labels[:, 1:].to(hidden.device)
    scored = labels != IGNORED
    values = head(hidden[scored], labels[scored], tuple(fields.values()))
    names = {"log_probs": "logp"} | fields
    # masked_scatter keeps the result connected to the model even if nothing is scored.
    rows = {
        field: values[name].new_zeros(scored.shape).masked_scatter(scored, values[name])
        for field, name in names.items()
    }
    aux_loss = None
    if kwargs.get("output_router_logits"):
        aux_loss = _aux_loss(model, output.router_logits, kwargs.get("attention_mask"))
    return FusedCausalLMOutput(**rows, label_mask=scored, aux_loss=aux_loss)


def _aux_loss(model: PreTrainedModel, router_logits, attention_mask: Tensor | None) -> Tensor:
    """Mixtral's load-balancing loss, which transformers' mixture-of-experts models share."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts, top_k = router_logits[0].shape[-1], top_k_of(model)
    return load_balancing_loss_func(router_logits, experts, top_k, attention_mask)
