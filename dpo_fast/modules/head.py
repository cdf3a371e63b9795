"""The language-model head as a module: log-probabilities of targets when asked, logits otherwise."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dpo_fast.ops.linear_logp.call import HeadOptions
from dpo_fast.ops.linear_logp.dtensor import plain_weight
from dpo_fast.ops.linear_logp.op import linear_logp
from dpo_fast.ops.linear_logp.vocab_shard import VocabShard


class FusedHead(nn.Linear):
    """Takes the place of `lm_head`. Owns the very Parameter it is given, so tied embeddings stay tied.

    It is an `nn.Linear` to all others: transformers resizes it, peft puts adapters on it.

    With targets it returns log-probabilities, through `linear_logp`. Without, it returns logits, so that
    `generate` and plain forwards work as before. It reads its weight only inside `forward`, because hooks
    of DeepSpeed and of FSDP2 gather a sharded weight when a module is called. A weight that is a DTensor
    there too is gathered here, as by `linear_logp`.

    Args:
        weight: [V, D] Parameter.
        bias: [V] Parameter or None.
        options: the head's scale and soft cap, for log-probabilities only: a model that scales or caps
            its logits does so itself, after its head.
        implementation, workspace_bytes: as in `linear_logp`.
        tensor_parallel: the weight is a DTensor, sharded over the vocabulary, and hidden states and targets
            are the same on all ranks that share it: each scores with its own rows, nothing is gathered.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        options: HeadOptions = HeadOptions(),  # noqa: B008 (frozen)
        implementation: str = "auto",
        workspace_bytes: int | None = None,
        tensor_parallel: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a weight of its own
        self.out_features, self.in_features = getattr(weight, "ds_shape", weight.shape)
        self.weight = weight
        self.register_parameter("bias", bias)
        self.options = options
        self.implementation = implementation
        self.workspace_bytes = workspace_bytes
        self.tensor_parallel = tensor_parallel

    @classmethod
    def in_place(cls, head: nn.Linear, **attributes) -> FusedHead:
        """The very module `head` as a FusedHead, for one that `fully_shard` knows: its hooks stay.

        attributes: every one of the constructor's but weight and bias.
        """
        sharded = isinstance(head, FSDPModule)
        own = {"__deepcopy__": head.__deepcopy__} if sharded else {}
        head.__class__ = type(f"FSDP{cls.__name__}", (FSDPModule, cls), own) if sharded else cls
        vars(head).pop("forward", None)  # of a plan of tensor parallelism
        for name, value in attributes.items():
            setattr(head, name, value)
        return head

    def forward(
        self, hidden: Tensor, targets_T: Tensor | None = None, extras: tuple[str, ...] = ()
    ) -> Tensor | dict[str, Tensor]:
        """Logits [..., V] in the dtype of `hidden`; with targets [T], and hidden [T, D], log-probabilities.

        These come as {"logp": fp32 [T], **extras}, a plain dict so that hooks find its tensors.
        """
        if targets_T is None:
            if extras:
                raise ValueError(f"extras={tuple(extras)} belong to scored tokens: give targets_T")
            weight, bias = (plain_weight(x, hidden) for x in (self.weight, self.bias))
            return nn.functional.linear(hidden, weight, bias)
        check_policy(self)
        result = linear_logp(
            hidden,
            self.weight,
            targets_T,
            bias=self.bias,
            logit_scale=self.options.logit_scale,
            softcap=self.options.softcap,
            temperature=self.options.temperature,
            extras=extras,
            implementation=self.implementation,
            workspace_bytes=self.workspace_bytes,
            shard=VocabShard.of(self.weight) if self.tensor_parallel else None,
        )
        return {name: getattr(result, name) for name in ("logp", *extras)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, implementation={self.implementation!r}, {self.options}"


def check_policy(module: nn.Module) -> None:
    """Raises ValueError if FSDP2's mixed precision would round log-probabilities that a module returns."""
    state = module._get_fsdp_state() if isinstance(module, FSDPModule) else None
    policy = getattr(state, "_mp_policy", None)
    dtype = getattr(policy, "output_dtype", None)
    if dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"MixedPrecisionPolicy.output_dtype={dtype} would round the log-probabilities of "
            f"{type(module).__name__}, -200 to one nat: leave it out, or set torch.float32"
        )
