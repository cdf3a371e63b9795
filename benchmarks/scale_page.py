"""docs/SCALE.md, made of the numbers of `scale.py`: `python -m benchmarks.scale_page > docs/SCALE.md`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.scale import (
    GB,
    GIB,
    HOP,
    MACHINE,
    PEAK,
    TERA,
    UPDATE,
    Plan,
    activations,
    buckets,
    collectives,
    elementwise_bytes,
    least_tokens,
    lines_of_memory,
    measured,
    model,
    parameters,
    plans,
    step,
    transfers,
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


HEAD = """# Seventy billion parameters, on paper

Made by `python -m benchmarks.scale_page`; a test holds this page to the code. Nothing here was run at this
size. Sizes come from the model, built without weights; bytes from what `dpo-fast doctor` prints, which is
checked against DeepSpeed's log on two ranks; rates from rows measured on one H100; the network from data
sheets.

The run: Llama 3.1 70B, full training in bf16, ZeRO-3, every layer recomputed in backward, the reference
stored beforehand, `shared_prefix`, one micro-batch a step. A pair has a prompt of {prompt:,} tokens and two
answers of {answer:,}: {pair:,} tokens go through the backbone and {scored:,} are scored.
"""

RATES = """
## What the numbers rest on

| number | value | from |
|---|---|---|
| matrix products | {product:.0f} TFLOP/s | `benchmarks/results/kernels_h100.csv`: bare products at D 4096 |
| the trainable head | {head:.0f} TFLOP/s | the same file, `dpo_fast triton` |
| copies in device memory | {copy:,.0f} GB/s | `benchmarks/results/h100/1.jsonl`, step `machine` |
| peak in bf16, dense | 989 TFLOP/s | NVIDIA, H100 SXM5 data sheet |
| NVLink, one direction | 450 GB/s | the same: 900 GB/s in both together |
| network of a machine | 8 x 50 GB/s | NVIDIA, DGX H100 data sheet: eight ConnectX-7 of 400 Gb/s |
| of these, reached | 80 % | assumed; `all_gather_perf` of nccl-tests tells it for a cluster |
| one step of a ring | 3 us | assumed |

Not measured by us: products at D 8192, attention by itself, anything between two GPUs.
"""

FORMULAS = """
## Formulas

`N` parameters, `n` ranks, `t` tokens of a rank through the backbone, `s` scored ones, `L` layers, `D`
hidden, `V` vocabulary.

| | formula |
|---|---|
| products of the layers | (6 + 2) x elements of matrices x t, the 2 for recomputation; rate of products |
| attention | 4/3 x 12 L D x attended pairs; rate of products |
| head | 6 D V s; rate of the head, which keeps what it needs in its workspace |
| norms, RoPE, SwiGLU, residuals | {elementwise:,.0f} bytes for a token and layer; rate of copies |
| AdamW | {update} bytes x N / n; rate of copies |
| parameters, gathered | 2 N bytes x gathers of a step; a rank sends (n - 1) / n of it |
| gradients, reduced | 2 N bytes; a rank sends (n - 1) / n of it |
| rate of a ring | 0.8 x min(NVLink, network of a machine), within a machine 0.8 x NVLink |
| steps of rings | calls x (n - 1) x 3 us |
| MFU | (6 x elements x t + 12 L D x attended pairs + 6 D V s) / seconds / 989 TFLOP/s |

Recomputation does not count as work. Norms and the like make four passes: forward, again, and two backward.
"""


def page() -> str:
    """docs/SCALE.md."""
    first, rates = next(iter(plans().values())), measured()
    text = model().causal_lm.config
    pair = first.prompt + 2 * first.answer
    parts = [
        HEAD.format(prompt=first.prompt, answer=first.answer, pair=pair, scored=2 * first.answer),
        RATES.format(product=rates.product / TERA, head=rates.head / TERA, copy=rates.copy / GB),
        FORMULAS.format(elementwise=elementwise_bytes(text), update=UPDATE),
        "\n## Memory of a GPU\n\n" + memory_page() + "\n",
        "\n## Bytes of a step\n\n" + bytes_page() + "\n",
        "\n## Seconds of a step\n\n" + seconds_page() + "\n",
        "\n## What follows\n\n" + conclusions() + "\n",
    ]
    return "".join(parts)


def memory_page() -> str:
    """Lines of memory for plans of different sizes of a micro-batch."""
    chosen = {name: plan for name, plan in plans().items() if not plan.merged}
    columns = []
    for plan in chosen.values():
        parts = {line.what: line.device for line in lines_of_memory(plan)}
        parts |= activations(plan) | {"DeepSpeed's buckets": buckets()}
        columns.append(parts)
    rows = [[what, *(f"{column[what] / GIB:.1f} GiB" for column in columns)] for what in columns[0]]
    logits = 4 * 128_256 * chosen["64 GPUs, 512 pairs"].scored
    totals = [sum(column.values()) / GIB for column in columns]
    rows.append(["**together**", *(f"**{total:.1f} GiB**" for total in totals)])
    return table(["", *chosen], rows) + (
        "\n\nThe first rows are those of `doctor`. The head's workspace is 1 GiB at any length; its "
        f"logits would take {logits / GIB:.0f} GiB in fp32 for 512 pairs on 64 GPUs."
    )


def bytes_page() -> str:
    """Transfers of a step by group, plain and with ZeRO++."""
    rows = []
    extra = {
        "ZeRO-3": (),
        "and hpZ, groups of 8": (("zero_hpz_partition_size", MACHINE),),
        "and qwZ": (("zero_quantized_weights", True),),
    }
    for gpus in (64, 1024):
        for name, zero in extra.items():
            plan = Plan(gpus, gpus, zero=zero)
            for line in transfers(plan):
                sent = f"{line.sent / GB:,.1f} GB"
                rows.append([f"{gpus:,}, {name}", line.what, line.kind, f"{line.ranks:,}", sent])
    return table(["GPUs", "what", "collective", "among", "a GPU sends"], rows)


def seconds_page() -> str:
    rows = []
    for name, plan in plans().items():
        once = step(plan)
        shares = (once.layers, once.head, once.memory_bound, once.update, once.exchange)
        rows.append(
            [
                name,
                f"{plan.tokens:,.0f}",
                *(f"{value:.2f}" for value in shares),
                f"{once.hidden:.1f} to {once.open:.1f}",
                f"{100 * once.mfu(once.open, PEAK):.0f} to {100 * once.mfu(once.hidden, PEAK):.0f} %",
                f"{plan.batch / once.open:.0f} to {plan.batch / once.hidden:.0f}",
            ]
        )
    head = ["", "tokens of a GPU", "layers", "head", "norms, ...", "AdamW", "exchange"]
    return table([*head, "step", "MFU", "pairs a second"], rows) + (
        "\n\nA step lasts between what it takes with everything exchanged behind computing, and with "
        "nothing. DeepSpeed gathers a prefetch ahead, and reduces while it computes. How near it comes "
        "must be measured: `perf/mfu` of a run tells it."
    )


def conclusions() -> str:
    """What the numbers say, in words that hold them."""
    small, large = Plan(64, 128), Plan(1024, 1024)
    merged = Plan(1024, 1024, merged=True)
    latency = sum(collectives(large, line) * (line.ranks - 1) * HOP for line in transfers(large))
    saved = latency - sum(
        collectives(merged, line) * (line.ranks - 1) * HOP for line in transfers(merged)
    )
    points = [
        f"On 64 GPUs exchanging takes as long as computing at {least_tokens(small):,.0f} tokens of a GPU "
        "in a micro-batch. Above that products can be the limit.",
        f"On 1,024 GPUs that is {least_tokens(large):,.0f} tokens, and {least_tokens(merged):,.0f} with a "
        f"layer gathered in one call: the steps of the rings take {latency:.1f} s of a step, of which "
        f"{saved:.1f} s go away. `stage3_module_granularity_threshold` in "
        "`parallel.deepspeed.zero_optimization` does that.",
        "hpZ takes the gathers of backward out of the network. It pays where a machine's network is slower "
        "than NVLink: with eight adapters the two are alike, with one NVLink is nine times as fast. It "
        f"costs {2 * parameters() / MACHINE / GIB:.1f} GiB of every GPU.",
        "qwZ halves what is gathered and rounds the policy's weights to 8 bits. Log-probs are those of the "
        "rounded weights then, and those of the reference must be too.",
        "Sequence parallelism changes none of these bytes: a rank gathers the same parameters for its part "
        "of the tokens. With it, count the tokens of a rank.",
    ]
    return "\n".join(f"- {point}" for point in points)


if __name__ == "__main__":
    print(page(), end="")
