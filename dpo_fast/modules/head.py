"""The language-model head as a module: log-probabilities of targets when asked, logits otherwise."""

from __future__ import annotations

from torch import Tensor, nn

from dpo_fast.ops.linear_logp.call import HeadOptions
from dpo_fast.ops.linear_logp.op import linear_logp


class FusedHead(nn.Module):
    """Takes the place of `lm_head`. Owns the very Parameter it is given, so tied embeddings stay tied.

    With targets it returns log-probabilities, through `linear_logp`. Without, it returns logits, so that
    `generate` and plain forwards work as before. It reads its weight only inside `forward`, because
    DeepSpeed's hooks gather a sharded weight when a module is called.

    Args:
        weight: [V, D] Parameter.
        bias: [V] Parameter or None.
        options: the head's scale and soft cap, for log-probabilities only: a model that scales or caps
            its logits does so itself, after its head.
        implementation, workspace_bytes: as in `linear_logp`.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        options: HeadOptions = HeadOptions(),  # noqa: B008 (frozen)
        implementation: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.options = options
        self.implementation = implementation
        self.workspace_bytes = workspace_bytes

    def forward(
        self, hidden: Tensor, targets_T: Tensor | None = None, extras: tuple[str, ...] = ()
    ) -> Tensor | dict[str, Tensor]:
        """Logits [..., V] in the dtype of `hidden`; with targets [T], and hidden [T, D], log-probabilities.

        These come as {"logp": fp32 [T], **extras}, a plain dict so that hooks find its tensors.
        """
        if targets_T is None:
            if extras:
                raise ValueError(f"extras={tuple(extras)} belong to scored tokens: give targets_T")
            return nn.functional.linear(hidden, self.weight, self.bias)
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
        )
        return {name: getattr(result, name) for name in ("logp", *extras)}

    def extra_repr(self) -> str:
        return f"implementation={self.implementation!r}, {self.options}"
