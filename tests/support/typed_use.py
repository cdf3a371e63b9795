"""Uses of the public interface, for a type checker: what it infers of them is what we promise."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import dpo_fast
from dpo_fast import FusedHead, FusedLinearPreferenceLoss, LinearLogp, PreferenceLoss, linear_logp
from dpo_fast.errors import UserError

hidden, weight, labels = torch.randn(6, 8), torch.randn(9, 8), torch.zeros(6, dtype=torch.int64)
assert_type(linear_logp(hidden, weight, labels), LinearLogp)
assert_type(linear_logp(hidden, weight, labels).logp, Tensor)
assert_type(dpo_fast.__version__, str)
loss = FusedLinearPreferenceLoss(beta=0.1)
plain = PreferenceLoss("sigmoid", beta=0.1)
plain.beta, plain.loss_type = 0.2, ["sigmoid", "sft"]
head: type[torch.nn.Module] = FusedHead
error: ValueError = UserError("a message")
