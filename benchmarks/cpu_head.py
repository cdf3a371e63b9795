"""The head on a CPU: ours, TRL's and the bare products, interleaved in one run; medians and ratios.

    python -m benchmarks.cpu_head [--tokens 2048 --hidden 896 --vocab 32000 --repeats 7 --csv FILE]

Each contender's gradients are checked against fp32 autograd through whole logits first; a contender
that is off prints no time. Peak memory is measured in a process of its own per contender.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.inputs import head_inputs
from dpo_fast import linear_logp

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXTRAS = ("entropy", "mean_logit", "is_top1")


def contenders(hidden, weight, targets, slopes) -> dict:
    """Name to a function that leaves gradients in hidden.grad and weight.grad."""

    def ours(extras=()):
        linear_logp(hidden, weight, targets, extras=extras).logp.backward(slopes)

    def materialised():
        logits = torch.nn.functional.linear(hidden, weight).float()
        logp = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
        logp.backward(slopes)

    functions = {"dpo_fast": ours, "dpo_fast, extras": lambda: ours(EXTRAS)}
    functions["materialised"] = materialised
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK
    except ImportError:
        print("trl is not installed: its row is missing (pip install trl==1.16.0)")
        return functions

    def trl(outputs):
        arguments = (hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, outputs)
        ChunkedLogProbFunction.apply(*arguments)[0].backward(slopes)

    # As DPOTrainer calls it, with its metrics, and bare.
    functions["trl"] = lambda: trl(())
    functions["trl, extras"] = lambda: trl(("entropy", "mean_logits", "is_top1"))
    return functions


def bare_products(hidden, weight):
    """What cannot be avoided: logits in fp32 (they are needed unrounded), dH and dW in the dtype."""
    h, w = hidden.detach(), weight.detach()
    h32, w32 = h.float(), w.float()
    logits = torch.empty(len(h), len(w))
    tile = torch.rand(len(h), len(w)).to(h.dtype)
    grads = torch.empty_like(h), torch.empty_like(w)

    def run():
        torch.mm(h32, w32.t(), out=logits)
        torch.mm(tile, w, out=grads[0])
        torch.mm(tile.t(), h, out=grads[1])

    return run


def measure(T: int, D: int, V: int, dtype: torch.dtype, repeats: int) -> list[dict]:
    """One row per contender: milliseconds at the 20th, 50th and 80th percentile, and the error."""
    hidden, weight, targets, slopes = head_inputs(T, D, V, dtype)
    functions = contenders(hidden, weight, targets, slopes)
    truth = truth_gradients(hidden, weight, targets, slopes)
    errors = {}
    for name, function in functions.items():
        hidden.grad = weight.grad = None
        function()
        errors[name] = max(
            ((g.float() - t).abs().max() / t.abs().max()).item()
            for g, t in zip((hidden.grad, weight.grad), truth)
        )
    functions["bare products"] = bare_products(hidden, weight)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            hidden.grad = weight.grad = None
            start = time.perf_counter()
            function()
            if repeat:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    rows = []
    for name, series in times.items():
        limits = statistics.quantiles(series, n=5)
        row = {"impl": name, "ms_p20": limits[0], "ms_p50": statistics.median(series)}
        rows.append(row | {"ms_p80": limits[3], "max_err": errors.get(name, 0.0)})
    return rows


def truth_gradients(hidden, weight, targets, slopes):
    """Gradients by autograd through whole fp32 logits."""
    h, w = (x.detach().float().requires_grad_() for x in (hidden, weight))
    logp = torch.log_softmax(h @ w.t(), -1).gather(1, targets[:, None]).squeeze(1)
    return torch.autograd.grad(logp, (h, w), slopes)


def peak_mib(name: str, dtype: str, T: int, D: int, V: int) -> float:
    """Extra peak memory of one forward + backward beyond the gradients, in a fresh process."""
    code = (
        "from benchmarks.cpu_head import extra_peak; "
        f"print(extra_peak({name!r}, {dtype!r}, {T}, {D}, {V}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    )
    return float(result.stdout.split()[-1])


def extra_peak(name: str, dtype: str, T: int, D: int, V: int) -> float:
    small = contenders(*head_inputs(16, D, 64, DTYPES[dtype]))  # loads what a first call loads
    small[name]()
    hidden, weight, *rest = head_inputs(T, D, V, DTYPES[dtype])
    function = contenders(hidden, weight, *rest)[name]
    gradients = sum(x.numel() * x.element_size() for x in (hidden, weight))
    before = _resident()
    _reset_peak()
    function()
    return (_peak() - before - gradients) / (1 << 20)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def environment() -> dict:
    import importlib.metadata

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    version = lambda name: importlib.metadata.version(name)  # noqa: E731
    return {
        "device": f"cpu {platform.machine()}", "threads": torch.get_num_threads(),
        "torch": torch.__version__, "trl": version("trl") if _has("trl") else "",
        "commit": commit, "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def _has(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    T, D, V = options.tokens, options.hidden, options.vocab
    everything = []
    print(f"linear_logp, forward + backward, trainable head, T={T} D={D} V={V}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    for dtype in DTYPES:
        rows = measure(T, D, V, DTYPES[dtype], options.repeats)
        medians = {row["impl"]: row["ms_p50"] for row in rows}
        for row in rows:
            name = row["impl"]
            row |= {"x_of_bare": row["ms_p50"] / medians["bare products"]}
            row |= {"x_of_dpo_fast": row["ms_p50"] / medians["dpo_fast"]}
            row["peak_mib"] = "" if name == "bare products" else peak_mib(name, dtype, T, D, V)
            shape = {"op": "linear_logp", "mode": "fwd+bwd", "T": T, "D": D, "V": V, "dtype": dtype}
            everything.append(shape | row | environment())
            peak = f"{row['peak_mib']:7.0f} MiB" if row["peak_mib"] != "" else ""
            print(
                f"{dtype}  {name:18s} {row['ms_p50']:8.0f} ms  {row['x_of_bare']:5.2f} x bare  "
                f"{row['x_of_dpo_fast']:5.2f} x ours  error {row['max_err']:.1e}  {peak}"
            )
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(everything[0]))
            writer.writeheader()
            writer.writerows(everything)


if __name__ == "__main__":
    main()
