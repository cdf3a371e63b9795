"""First launches ahead of time: a CUDA graph cannot capture them, and a first step would wait for them."""

from __future__ import annotations

import torch

from dpo_fast.ops.linear_logp.op import linear_logp

TOKENS = 2  # kernels are compiled for any number of tokens


def warm_up(
    device: torch.device | str,
    D: int,
    V: int,
    dtype: torch.dtype,
    *,
    frozen: bool = False,
    bias: bool = False,
    extras: tuple[str, ...] = (),
    implementation: str = "auto",
    **options,
) -> None:
    """Run every schedule of `linear_logp` once for a [V, D] head, on two tokens.

    A CUDA graph captures launches and nothing else: a first launch, which loads a kernel, ends the capture
    with an error. After this call the same head may be captured, forward and backward, at any number of
    tokens. It also keeps compilation out of the first step of a run.

    It takes the memory of a head, and of its gradient unless `frozen`, for as long as it runs.

    Args:
        frozen: the head has no gradient (LoRA): leave out the schedules that give it one.
        bias: the head has one.
        extras, implementation, options: as the calls to come will have them (logit_scale, softcap,
            temperature).

    Raises:
        UnavailableError: as `linear_logp`.
    """
    device = torch.device(device)
    # Not zeros in a new layout: alignment and strides decide what is compiled, values do not.
    hidden_TD = torch.zeros(TOKENS, D, dtype=dtype, device=device)
    weight_VD = torch.zeros(V, D, dtype=dtype, device=device)
    bias_V = torch.zeros(V, dtype=dtype, device=device) if bias else None
    targets_T = torch.zeros(TOKENS, dtype=torch.int64, device=device)
    head = [x for x in (weight_VD, bias_V) if x is not None]
    for trained in (False,) if frozen else (False, True):
        for x in head:
            x.requires_grad_(trained)
        for needs_hidden, workspace_bytes in ((False, None), (True, None), (True, 0)):
            leaf_TD = hidden_TD.detach().requires_grad_(needs_hidden)
            logp_T = linear_logp(
                leaf_TD,
                weight_VD,
                targets_T,
                bias=bias_V,
                extras=extras,
                implementation=implementation,
                workspace_bytes=workspace_bytes,
                **options,
            ).logp
            if logp_T.requires_grad:
                torch.autograd.grad(logp_T.sum(), [leaf_TD] * needs_hidden + head * trained)
