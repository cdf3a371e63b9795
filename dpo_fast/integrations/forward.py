"""A second forward beside a model's own, so that scoring goes through whatever wraps the model."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager

from transformers import PreTrainedModel


def add_forward(
    model: PreTrainedModel,
    keyword: str,
    forward: Callable,
    within: Callable[[PreTrainedModel], AbstractContextManager] = contextlib.nullcontext,
) -> None:
    """`model(..., keyword=True)` becomes `forward(model, ...)`. Other calls run the model's own forward.

    Either is a call of the model, so hooks of DDP, DeepSpeed and peft see it.

    within: the context in which the model's own forward runs.
    """
    own = model.forward
    # A method is bound anew at each call: in a copy of the model `self` must be the copy.
    method = own.__func__ if getattr(own, "__self__", None) is model else None

    @functools.wraps(type(model).forward)  # `generate` and the trainers read the signature
    def chosen(self, *args, **kwargs):
        if kwargs.pop(keyword, False):
            return forward(self, *args, **kwargs)
        with within(self):
            return own(*args, **kwargs) if method is None else method(self, *args, **kwargs)

    model.forward = types.MethodType(chosen, model)
