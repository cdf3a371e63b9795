"""`linear_logp`: our schedules, the materialised head, the peers, and the bare products."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Contender, HeadInputs, Operation, head_inputs
from benchmarks.kernels.checks import HeadTruth
from benchmarks.kernels.contenders import (
    compiled,
    materialised,
    per_token,
    why_not,
    why_not_compile,
)
from benchmarks.kernels.peers import PEERS
from dpo_fast import linear_logp
from dpo_fast.modules.metrics import METRIC_EXTRAS
from dpo_fast.ops.cpu import product, product_dtype
from dpo_fast.ops.dispatch import IMPLEMENTATIONS

GIB = 1 << 30
BARE_TOKENS = {"cpu": 2048, "cuda": 8192}  # rows of a bare product: its tile of [rows, V] must fit
SLOW_FLOPS = 1e13  # of a product, on a GPU in fp32
GRADIENTS = {"logps": (), "frozen": ("hidden",), "trainable": ("hidden", "weight")}
LEAST = {"logps": 1.0, "frozen": 2.0, "trainable": 3.0}


def ours(implementation: str, extras: tuple[str, ...] = (), workspace=lambda case: None):
    """`build` of a contender. `workspace`: (case) -> bytes, None for the default."""

    def build(case: Case, inputs: HeadInputs):
        def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return linear_logp(
                hidden,
                weight,
                targets,
                extras=extras,
                implementation=implementation,
                workspace_bytes=workspace(case),
            ).logp

        return per_token(function)(case, inputs)

    return build


def half(case: Case) -> int:
    """Bytes of the exponentials of half of the tokens."""
    return case.T // 2 * case.V * case.itemsize


def too_slow(implementation: str, default: bool, case: Case) -> bool:
    """`spare` of our `torch` contenders on a GPU: only the default one stands, if its calls are fast.

    It is the fallback where nothing else runs, and its products are in fp32.
    """
    if implementation != "torch" or case.device == "cpu":
        return False
    return not default or 2.0 * case.T * case.V * case.D > SLOW_FLOPS


def bounded(implementation: str, case: Case) -> bool:
    """`spare` of the contender with 1 GiB, which is a CPU's default already."""
    return case.device == "cpu" or too_slow(implementation, False, case)


def _ours(implementation: str) -> list[Contender]:
    """The contenders of one implementation: one for each schedule."""
    make = functools.partial(
        Contender,
        ours=True,
        exact=True,
        obstacle=functools.partial(why_not, implementation),
        spare=functools.partial(too_slow, implementation, False),
    )
    name, build = f"dpo_fast {implementation}", functools.partial(ours, implementation)
    some = {"modes": ("trainable",), "growth": False}
    one_gib = {"spare": functools.partial(bounded, implementation)}
    return [
        make(name, build(), spare=functools.partial(too_slow, implementation, True)),
        make(f"{name}, 1 GiB", build(workspace=lambda case: GIB), **some, **one_gib),
        make(f"{name}, half budget", build(workspace=half), **some),
        make(f"{name}, recompute", build(workspace=lambda case: 0), modes=("trainable",)),
        make(
            f"{name}, extras",
            build(extras=METRIC_EXTRAS),
            modes=("logps", "trainable"),
            growth=False,
        ),
    ]


def products(case: Case, inputs: HeadInputs) -> dict:
    """The bare products by name, in chunks of tokens so that a tile of logits fits.

    On a CPU the logits are made in fp32: they are needed unrounded, and CPU products of 16-bit inputs have
    no fp32 output. The others are in the dtype if the CPU is fast with it, else in fp32; the library is the
    faster one too. On a GPU all products are in the dtype and accumulate in fp32. Chunks of dW add up in
    fp32.
    """
    h, w = inputs.hidden.detach(), inputs.weight.detach()
    rows = min(case.T, BARE_TOKENS[case.device])
    chunks = [slice(i, min(i + rows, case.T)) for i in range(0, case.T, rows)]
    h1, w1 = (h.float(), w.float()) if case.device == "cpu" else (h, w)
    h, w = (x.to(product_dtype(h.device, h.dtype)) for x in (h, w))
    logits = h1.new_empty(rows, case.V)
    tile = torch.rand(rows, case.V, dtype=h.dtype, device=h.device)
    dH, dW = torch.empty_like(h), torch.empty_like(w)

    def make_logits():
        for part in chunks:
            n = part.stop - part.start
            product(h1[part], w1.t(), logits[:n].view(-1))

    def make_dH():
        for part in chunks:
            product(tile[: part.stop - part.start], w, dH[part].view(-1))

    def make_dW():
        total = None
        for part in chunks:
            total = _add_product(total, tile[: part.stop - part.start].t(), h[part], dW, chunks)
        return total

    made = {"logits": make_logits, "dH": make_dH, "dW": make_dW}
    return {name: made[name] for name in needed(case, LEAST[case.mode])}


def _add_product(total, a: Tensor, b: Tensor, out: Tensor, chunks: list):
    if len(chunks) == 1:
        return product(a, b, out.view(-1))
    if out.device.type == "cpu":
        return product(a, b) if total is None else total.add_(product(a, b))
    if out.dtype == torch.float32:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def needed(case: Case, count: float) -> dict[str, float]:
    """How often each bare product stands in a schedule of `count` products.

    Products above the least recompute logits.
    """
    once = dict.fromkeys(("logits", "dH", "dW")[: int(LEAST[case.mode])], 1.0)
    return once | {"logits": 1.0 + count - LEAST[case.mode]}


def work(case: Case, count: float) -> tuple[float, float]:
    """Flops of `count` products; bytes of inputs and outputs, each moved once."""
    matrices = 1 + len(GRADIENTS[case.mode])
    T, D, V = case.T, case.D, case.V
    moved = {1: T * D + V * D, 2: 2 * T * D + V * D, 3: 2 * T * D + 2 * V * D}[matrices]
    return count * 2.0 * T * V * D, moved * case.itemsize + T * 12.0


OPERATION = Operation(
    name="linear_logp",
    contenders=(
        *(contender for name in (*IMPLEMENTATIONS, "cuda") for contender in _ours(name)),
        Contender("materialised", per_token(materialised)),
        Contender(
            "materialised, compiled",
            lambda case, inputs: per_token(compiled(materialised))(case, inputs),
            obstacle=why_not_compile,
            compiled=True,
        ),
        *PEERS,
    ),
    sizes="TDV",
    dtypes=None,
    gradients=GRADIENTS,
    least=LEAST,
    inputs=lambda case, seed: head_inputs(
        case.T, case.D, case.V, case.torch_dtype, case.device, seed
    ),
    truth=HeadTruth,
    products=products,
    needed=needed,
    work=work,
)
