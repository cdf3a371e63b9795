"""The interface of Liger's `LigerFusedLinearGRPOLoss`, with our head behind it."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn

from dpo_fast.integrations.grpo_losses import Completions, GrpoOptions, grpo_loss
from dpo_fast.integrations.liger_loss import check_reference, in_one_dtype
from dpo_fast.ops.linear_logp.op import linear_logp

NAMES = tuple(field.name for field in fields(GrpoOptions))


class LigerFusedLinearGRPOLoss(nn.Module):
    """GRPO and its variants, on completions with advantages.

    loss_type: grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo or vespo; `grpo_losses.py` says what each is.
    max_completion_length: read by dr_grpo alone; others may be given it, as TRL does.

    Tokens that are masked have no part in the loss. In Liger's luspo they have, unless ratios are of
    completions and beta is 0. The arguments are attributes, which may be set; the next call checks them.

    Raises:
        ValueError: an option that cannot be honoured, or that the loss does not use.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        *,
        implementation: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.beta, self.use_ref_model = beta, use_ref_model
        self.compiled, self.chunk_size = compiled, chunk_size  # without effect
        self.epsilon_low, self.epsilon_high, self.delta = epsilon_low, epsilon_high, delta
        self.loss_type, self.importance_sampling_level = loss_type, importance_sampling_level
        self.max_completion_length, self.temperature = max_completion_length, temperature
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg
        self.implementation, self.workspace_bytes = implementation, workspace_bytes
        self.options()

    def options(self) -> GrpoOptions:
        """The attributes as they are now. Raises ValueError for what cannot be honoured."""
        return GrpoOptions(**{name: getattr(self, name) for name in NAMES})

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss, [], and (divergence,) clipped share, [] each, detached; the divergence if beta is not 0.

        Args:
            _input: [S, L, D].
            lin_weight: [V, D].
            selected_token_ids: integers [S, L], the token that each position predicts.
            attention_mask: [S, L], 0 where no token is scored.
            advantages: [S].
            bias: [V] or None.
            ref_per_token_logps, old_per_token_logps: [S, L], under the reference and under the model that
                wrote the completions; without the latter ratios are 1.
            ref_input, ref_weight, ref_bias: of the reference, to be scored here.
            vllm_is_ratio: [S, L], [S, 1] or [S], factors of the loss of tokens.
            num_items_in_batch: scored tokens of the global batch over all ranks, for dapo, cispo and
                vespo; left out, ranks add up those of this batch.

        Raises:
            ValueError: an input is missing, is not used, or does not fit the others.
        """
        options, shape = self.options(), tuple(selected_token_ids.shape)
        _check_shapes(
            _input,
            selected_token_ids,
            attention_mask,
            advantages,
            ref_per_token_logps,
            old_per_token_logps,
        )
        head = ref_input, ref_weight, ref_bias
        _check_reference(options, ref_per_token_logps, head)
        scored = attention_mask != 0

        def grid(values_T: Tensor) -> Tensor:
            return values_T.new_zeros(shape).masked_scatter(scored, values_T)

        def given(logps: Tensor | None) -> Tensor | None:
            return None if logps is None else grid(logps.detach().float()[scored])

        logps = grid(self._tokens(_input, lin_weight, bias, selected_token_ids, scored))
        reference = given(ref_per_token_logps)
        if options.compares and reference is None:
            with torch.no_grad():
                reference = grid(self._tokens(*head, selected_token_ids, scored))
        batch = Completions(
            logps,
            logps.detach() if old_per_token_logps is None else given(old_per_token_logps),
            reference if options.compares else None,
            attention_mask.float(),
            advantages.detach().float()[:, None],
            _sampler_ratio(vllm_is_ratio, shape),
        )
        return grpo_loss(batch, options, num_items_in_batch)

    def _tokens(self, hidden, weight, bias, token_ids: Tensor, scored: Tensor) -> Tensor:
        """Log-probabilities of the scored tokens, [T]."""
        rows_TD, weight, bias = in_one_dtype(hidden[scored], weight, bias)
        return linear_logp(
            rows_TD,
            weight,
            token_ids[scored],
            bias=bias,
            temperature=self.temperature,
            implementation=self.implementation,
            workspace_bytes=self.workspace_bytes,
        ).logp

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in NAMES)


def _check_shapes(hidden, token_ids, mask, advantages, *logps: Tensor | None) -> None:
    shape = tuple(token_ids.shape)
    if hidden.dim() != 3 or len(shape) != 2 or tuple(hidden.shape[:2]) != shape:
        raise ValueError(
            f"expected _input [S, L, D] and selected_token_ids [S, L]; got {tuple(hidden.shape)} and "
            f"{shape}"
        )
    others = {
        "attention_mask": mask,
        "ref_per_token_logps": logps[0],
        "old_per_token_logps": logps[1],
    }
    for name, tensor in others.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}; expected {shape}, as selected_token_ids"
            )
    if tuple(advantages.shape) != shape[:1]:
        raise ValueError(
            f"advantages are {tuple(advantages.shape)}; expected {shape[:1]}, one for each completion"
        )


def _check_reference(options: GrpoOptions, logps: Tensor | None, head: tuple) -> None:
    """Raises ValueError unless there is one reference if it has a part, and none without use_ref_model."""
    given = any(part is not None for part in head)
    if logps is not None and given:
        raise ValueError("give ref_per_token_logps, or ref_input and ref_weight, not both")
    if logps is not None and not options.use_ref_model:
        raise ValueError("use_ref_model=False, ref_per_token_logps is given: leave it out")
    if logps is None and (options.compares or given):
        check_reference(options.use_ref_model, *head)


def _sampler_ratio(ratio: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """[S, L] or [S, 1], fp32."""
    if ratio is None:
        return None
    S, L = shape
    if tuple(ratio.shape) not in ((S,), (S, 1), (S, L)):
        raise ValueError(
            f"vllm_is_ratio is {tuple(ratio.shape)}; expected ({S},), ({S}, 1) or ({S}, {L})"
        )
    return ratio.detach().float().view(S, -1)
