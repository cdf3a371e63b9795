"""A second forward beside a model's own, so that scoring goes through whatever wraps the model."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpo_fast.errors import UserError
from dpo_fast.models.scoring import head_options_of
from dpo_fast.modules.head import FusedHead


def add_forward(model: PreTrainedModel, keyword: str, forward: Callable) -> None:
    """`model(..., keyword=True)` becomes `forward(model, ...)`. Other calls run the model's own forward.

    Either is a call of the model, so hooks of DDP, DeepSpeed and peft see it.
    """
    own = model.forward
    # A method is bound anew at each call: in a copy of the model `self` must be the copy.
    method = own.__func__ if getattr(own, "__self__", None) is model else None

    @functools.wraps(type(model).forward)  # `generate` and the trainers read the signature
    def chosen(self, *args, **kwargs):
        if kwargs.pop(keyword, False):
            return forward(self, *args, **kwargs)
        return own(*args, **kwargs) if method is None else method(self, *args, **kwargs)

    model.forward = types.MethodType(chosen, model)


def fuse_head(model: PreTrainedModel) -> None:
    """Put a `FusedHead` over the weights of the model's `lm_head`.

    Raises:
        UserError: a head that is not a plain linear layer: an adapter on it, quantised or sharded.
    """
    head = model.get_output_embeddings()
    plain = isinstance(head, (nn.Linear, FusedHead)) and head.weight.is_floating_point()
    if not plain or isinstance(head.weight, DTensor):
        raise UserError(
            f"the lm_head of {type(model).__name__} is a {type(head).__name__}; expected a linear layer "
            "with whole weights, no adapter and no quantisation: leave lm_head out of target_modules "
            "and modules_to_save, and out of quantisation and tensor parallelism"
        )
    model.set_output_embeddings(
        FusedHead(head.weight, head.bias, options=head_options_of(model.config))
    )
