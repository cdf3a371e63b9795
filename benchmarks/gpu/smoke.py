"""Every kernel and every schedule of the head against fp64, with the memory full of NaN beforehand.

A check that fails is named with its error. All checks of an item are made, whatever fails.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from benchmarks.cli import Selection
from benchmarks.gpu.shapes import Shape, device
from benchmarks.kernels.case import HeadInputs, Outputs
from benchmarks.kernels.checks import GATES, HeadTruth, compare
from benchmarks.kernels.measure import Lineup, Setting, measure
from benchmarks.kernels.operations import OPERATIONS
from benchmarks.machine import DTYPES, release_memory
from dpo_fast import linear_logp
from dpo_fast.ops import warm_up

SIZES = {
    False: ((1, 129, 4096), (896, 4096), (1000, 50257, 128256, 151936)),
    True: ((1, 33), (64,), (520,)),
}
ODD = {False: Shape(300, 1000, 5003), True: Shape(20, 40, 300)}
OTHERS = {
    False: {"logits_logp": Shape(512, 0, 128256), "preference": Shape(8192, 0, 0)},
    True: {"logits_logp": Shape(4, 0, 520), "preference": Shape(64, 0, 0)},
}
GRAPH = {False: Shape(1000, 896, 50257), True: Shape(20, 64, 300)}
EXTRAS = ("entropy", "log_sum_p2", "mean_logit", "is_top1")
SCHEDULES = {  # needs a gradient of hidden, of the weight; tokens whose exponentials fit
    "logps": (False, False, 1.0),
    "frozen": (True, False, 1.0),
    "keep": (True, True, 1.0),
    "mixed": (True, True, 0.5),
    "recompute": (True, True, 0.0),
}


def items(rehearse: bool) -> dict:
    found = heads("triton", rehearse)
    odd = ODD[rehearse]
    for dtype in ("fp16", "fp32"):
        shape = Shape(odd.T, odd.D, odd.V, dtype)
        found[f"{dtype} {shape}"] = functools.partial(head, "triton", shape)
    found["options"] = functools.partial(options, odd)
    found["graph"] = functools.partial(graph, GRAPH[rehearse])
    found["views"] = functools.partial(views, odd)
    for operation, shape in OTHERS[rehearse].items():
        found[f"{operation} {shape}"] = functools.partial(other, operation, shape)
    return found


def heads(implementation: str, rehearse: bool, least_v: int = 0) -> dict:
    """The items of one implementation in bf16: the largest first, since a pool ends with its last item."""
    shapes = [Shape(*sizes) for sizes in itertools.product(*SIZES[rehearse]) if sizes[2] >= least_v]
    shapes.sort(key=lambda shape: (shape.D != 4096, shape.V != 128256, -shape.T))
    found = {str(shape): functools.partial(head, implementation, shape) for shape in shapes}
    repaired = shapes[0]
    found[f"repair {repaired}"] = functools.partial(repair, implementation, repaired)
    found[f"extras {repaired}"] = functools.partial(extras, implementation, repaired)
    return found


def head(implementation: str, shape: Shape) -> dict:
    """Every schedule at one shape, and that a second call gives the same bits."""
    return against_truth(implementation, shape, shape.inputs())


def repair(implementation: str, shape: Shape) -> dict:
    """Every third row peaks at a column that neither the target nor the sample shows."""
    inputs = shape.inputs()
    with torch.no_grad():
        hidden, weight = inputs.hidden.detach().clone(), inputs.weight.detach().clone()
        column = shape.V // 2 | 1
        direction = torch.nn.functional.normalize(torch.randn_like(hidden[0].float()), dim=0)
        hidden[::3] += (10 * direction).to(hidden.dtype)
        weight[column] = (12 * direction).to(weight.dtype)
        targets = torch.where(inputs.targets == column, 0, inputs.targets)
    leaves = (x.requires_grad_() for x in (hidden, weight))
    return against_truth(implementation, shape, HeadInputs(*leaves, targets, inputs.slopes))


def against_truth(implementation: str, shape: Shape, inputs: HeadInputs) -> dict:
    poison()
    logp, truth = truths(shape, inputs)
    gate = GATES["exact", shape.dtype]
    checks = {}
    for name, (needs_hidden, needs_weight, share) in SCHEDULES.items():
        wanted = [n for n, needs in (("hidden", needs_hidden), ("weight", needs_weight)) if needs]
        run = functools.partial(once, implementation, shape, inputs, wanted, share)
        try:
            outputs, again = run(), run()
            found = truth.gradients("token", inputs.slopes, ("hidden", "weight")) if wanted else {}
            errors = compare(outputs, logp, [found[n] for n in wanted])
            checks[name] = {
                "ok": errors.max_err <= gate.gradient and errors.err_logp <= gate.logp,
                "max_err": errors.max_err,
                "err_logp": errors.err_logp,
                "above_0": bool((outputs.values > 0).any()),
                "schedule": outputs.schedule,
                "same_bits": same(outputs, again),
            }
            checks[name]["ok"] &= checks[name]["same_bits"] and not checks[name]["above_0"]
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            checks[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
    return judged(checks)


def truths(shape: Shape, inputs: HeadInputs) -> tuple[Tensor, HeadTruth]:
    """Log-probs in fp64, and the gradients' truth: in fp64 as well, or in fp32 where fp64 would take tens
    of GiB, which several processes have to share."""
    truth = HeadTruth(inputs, torch.float64)
    logp = truth.logp
    if shape.D * shape.V > 1 << 28:
        del truth
        release_memory(device())
        truth = HeadTruth(inputs, torch.float32)
    return logp, truth


def once(implementation, shape: Shape, inputs: HeadInputs, wanted: list[str], share: float):
    leaves = {
        n: getattr(inputs, n).detach().requires_grad_(n in wanted) for n in ("hidden", "weight")
    }
    size = None if share == 1.0 else int(share * shape.T) * shape.V * inputs.hidden.element_size()
    logp = linear_logp(
        *leaves.values(), inputs.targets, implementation=implementation, workspace_bytes=size
    ).logp
    if not wanted:
        return Outputs(logp.detach())
    plan = logp.grad_fn.plan
    gradients = torch.autograd.grad(logp, [leaves[n] for n in wanted], inputs.slopes)
    return Outputs(logp.detach(), gradients, plan.schedule, plan.gemms)


def same(a: Outputs, b: Outputs) -> bool:
    return all(map(torch.equal, (a.values, *a.gradients), (b.values, *b.gradients)))


def judged(checks: dict) -> dict:
    """A line's fields for checks by name, each with `ok`."""
    wrong = [name for name, found in checks.items() if not found["ok"]]
    return {"checks": checks} | ({"failed": f"wrong: {', '.join(wrong)}"} if wrong else {})


def extras(implementation: str, shape: Shape) -> dict:
    """The extras of log-probs and of a trainable call, against fp64."""
    poison()
    inputs = shape.inputs()
    rows = slice(0, min(shape.T, 512))
    hidden, weight = inputs.hidden.detach()[rows], inputs.weight.detach()
    z = hidden.double() @ weight.double().t()
    p = z.log_softmax(-1)
    target = inputs.targets[rows]
    truth = {
        "logp": p.gather(1, target[:, None])[:, 0],
        "entropy": -(p.exp() * p).sum(-1),
        "log_sum_p2": (2 * p).logsumexp(-1),
        "mean_logit": z.mean(-1),
    }
    top = z.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > 1e-3  # where rounding cannot choose
    is_top1 = z.argmax(-1) == target
    del z, p
    checks = {}
    for name, needs in (("logps", False), ("keep", True)):
        out = linear_logp(
            hidden.requires_grad_(needs),
            weight.requires_grad_(needs),
            target,
            implementation=implementation,
            extras=EXTRAS,
        )
        gaps = {n: (getattr(out, n).double() - t).abs().max().item() for n, t in truth.items()}
        right = torch.equal(out.is_top1.bool()[clear], is_top1[clear])
        ok = right and all(gap <= 2e-3 for gap in gaps.values())
        checks[name] = {"ok": ok, "is_top1": right} | gaps
    return judged(checks)


def options(shape: Shape) -> dict:
    """Bias, scale of either sign, soft cap and temperature, against autograd in fp64."""
    poison()
    inputs, checks = shape.inputs(), {}
    bias = torch.randn(shape.V, device=device()).to(inputs.hidden.dtype)
    for name, given in {
        "bias": {},
        "softcap": {"softcap": 5.0},
        "scale": {"logit_scale": 0.7, "temperature": 1.3},
        "negative": {"logit_scale": -0.7},
    }.items():
        values = [x.detach() for x in (inputs.hidden, inputs.weight, bias)]
        precise = [x.double().requires_grad_() for x in values]
        leaves = [x.clone().requires_grad_() for x in values]
        z = (precise[0] @ precise[1].t() + precise[2]) * given.get("logit_scale", 1.0)
        if cap := given.get("softcap"):
            z = cap * torch.tanh(z / cap)
        z = z / given.get("temperature", 1.0)
        logp = z.log_softmax(-1).gather(1, inputs.targets[:, None])[:, 0]
        truth = torch.autograd.grad(logp, precise, inputs.slopes.double())
        out = linear_logp(
            *leaves[:2], inputs.targets, bias=leaves[2], implementation="triton", **given
        ).logp
        found = torch.autograd.grad(out, leaves, inputs.slopes)
        err = max(relative(a, b) for a, b in zip(found, truth))
        err_logp = (out.double() - logp).abs().max().item()
        checks[name] = {
            "ok": err <= 1e-2 and err_logp <= 2e-3,
            "max_err": err,
            "err_logp": err_logp,
        }
    return judged(checks)


def graph(shape: Shape) -> dict:
    """After `warm_up` a call is captured, forward and backward, and replays with new values.

    In a process where this item comes first, nothing else has been launched before.
    """
    warm_up(device(), shape.D, shape.V, DTYPES[shape.dtype], implementation="triton")
    if device() == "cpu":
        return {"skipped": "a CPU has no graphs; warm_up ran"}
    inputs, new, checks = shape.inputs(), shape.inputs(seed=1), {}
    for name, (needs_hidden, needs_weight, share) in SCHEDULES.items():
        wanted = [n for n, needs in (("hidden", needs_hidden), ("weight", needs_weight)) if needs]
        place = HeadInputs(*(x.detach().clone() for x in inputs))
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            outputs = once("triton", shape, place, wanted, share)
        for x, value in zip(place, new):
            x.copy_(value.detach())
        captured.replay()
        right = once("triton", shape, new, wanted, share)
        torch.cuda.synchronize()
        checks[name] = {"ok": same(outputs, right)}
    return judged(checks)


def other(operation: str, shape: Shape) -> dict:
    """The Triton kernels of another operation, through the checks of `bench kernels`."""
    entry, found = OPERATIONS[operation], {}
    for dtype in entry.dtypes or ("bf16", "fp32"):
        modes = entry.modes
        setting = Setting(operation, shape.T, shape.D, shape.V, dtype, device(), modes)
        outcome = measure(setting, entry, Lineup(Selection(("dpo_fast triton*",)), 2, False))
        for row in outcome.rows:
            if row["impl"].startswith("dpo_fast"):
                ok = not row["note"]
                found[f"{row['impl']}, {row['mode']}, {dtype}"] = {"ok": ok, "error": row["note"]}
    return judged(found)


def relative(a: Tensor, truth: Tensor) -> float:
    return ((a.double() - truth).abs().max() / truth.abs().max()).item()


def views(shape: Shape) -> dict:
    """Layouts without a tensor descriptor: a weight off by one element, a transposed head."""
    poison()
    inputs, checks = shape.inputs(), {}
    weight = inputs.weight.detach()
    flat = torch.empty(weight.numel() + 1, dtype=weight.dtype, device=weight.device)
    flat[1:] = weight.flatten()
    layouts = {"off by one": flat[1:].view(weight.shape), "transposed": weight.t().contiguous().t()}
    for name, laid in layouts.items():
        result = against_truth("triton", shape, inputs._replace(weight=laid.requires_grad_()))
        checks |= {f"{name}, {n}": found for n, found in result["checks"].items()}
    return judged(checks)


def poison() -> None:
    """From now on uninitialised memory is NaN: an element that nobody writes shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
