"""A paper plan: what one step of DPO takes on many GPUs. `scale_page.py` makes docs/SCALE.md of it.

Nothing here is run on those GPUs. Sizes come from the model itself, built without weights; bytes from
`dpo_fast.training.traffic` and `memory`, which are checked against DeepSpeed; rates from the rows that were
measured on one H100 (`benchmarks/results/`); the network from its maker's data sheet.
"""

from __future__ import annotations

import csv
import json
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_fast.models import ScoringModel
from dpo_fast.training.config import RunConfig, build_config
from dpo_fast.training.memory import Line, Sizes, memory, sizes_of
from dpo_fast.training.perf import work_of
from dpo_fast.training.traffic import GATHER, REDUCE, Transfer, traffic

RESULTS = Path(__file__).parent / "results"
GIB, GB, TERA = 2**30, 1e9, 1e12

# NVIDIA's data sheets. H100 SXM5: 989 TFLOP/s dense in bf16, 900 GB/s of NVLink, both directions together.
# DGX H100: eight ConnectX-7 adapters of 400 Gb/s for eight GPUs.
PEAK = 989 * TERA
NVLINK = 450 * GB
ADAPTER = 400e9 / 8
MACHINE = 8  # GPUs, and adapters
# Of the slower of the two, what NCCL reaches in long all-gathers: an assumption, not a measurement of ours.
REACHED = 0.8
HOP = 3e-6  # seconds for one step of a ring, launch included: an assumption
DEVICE = 80 * GIB


@dataclass(frozen=True)
class Measured:
    """Rates of one H100, from the rows of `results/`.

    product: FLOP/s of large bf16 matrix products. head: FLOP/s of the trainable head. copy: bytes a second.
    """

    product: float
    head: float
    copy: float


@cache
def measured() -> Measured:
    """From `kernels_h100.csv` (product and head at D 4096) and `h100/1.jsonl` (copy)."""
    rows = list(csv.DictReader((RESULTS / "kernels_h100.csv").open()))
    large = [r for r in rows if r["D"] == "4096" and r["mode"] == "trainable"]
    rate = {
        name: statistics.median(float(r["tflops"]) for r in large if r["impl"] == name) * TERA
        for name in ("bare products", "dpo_fast triton")
    }
    lines = map(json.loads, (RESULTS / "h100/1.jsonl").read_text().splitlines())
    copy = next(line["gbps"] for line in lines if line["item"] == "copy")
    return Measured(rate["bare products"], rate["dpo_fast triton"], copy * GB)


@dataclass(frozen=True)
class Plan:
    """A run on paper.

    gpus: ranks. batch: pairs of a step. prompt, answer: tokens of a pair's prompt, and of each answer.
    zero: options of DeepSpeed's `zero_optimization`. merged: modules gathered with one collective.
    """

    gpus: int
    batch: int
    prompt: int = 512
    answer: int = 1024
    zero: tuple[tuple[str, object], ...] = ()
    merged: bool = False

    @property
    def pairs(self) -> float:
        """Of a GPU in a step, in one micro-batch."""
        return self.batch / self.gpus

    @property
    def tokens(self) -> float:
        """Through the backbone of a GPU: every prompt once."""
        return self.pairs * (self.prompt + 2 * self.answer)

    @property
    def scored(self) -> float:
        return self.pairs * 2 * self.answer

    @property
    def attended_pairs(self) -> float:
        """Positions that attention computes for a GPU's pairs, with shared prompts."""
        p, a = self.prompt, self.answer
        return self.pairs * (p * p / 2 + 2 * (p * a + a * a / 2))


@cache
def model() -> ScoringModel:
    """Llama 3.1 70B without weights."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        return ScoringModel(LlamaForCausalLM(config).to(torch.bfloat16))


@cache
def config() -> RunConfig:
    tree = {
        "model": {"path": "meta-llama/Llama-3.1-70B", "dtype": "bf16"},
        "data": {"train": "pairs.jsonl", "max_length": 4096},
        "train": {"output_dir": "out", "micro_batch_size": 1},
        "parallel": {"zero_stage": 3},
    }
    return build_config(tree, "plan")


@cache
def transfers(plan: Plan) -> tuple[Transfer, ...]:
    layers = range(model().causal_lm.config.num_hidden_layers)
    return tuple(traffic(config(), dict(plan.zero), model(), layers, plan.gpus, 1))


def bus(group: int) -> float:
    """Bytes a second that a GPU sends in a collective of so many GPUs, whole machines or within one.

    A ring passes through all GPUs of a machine and leaves it by an adapter. With a ring for each adapter
    a machine sends what one of its GPUs sends over NVLink.
    """
    within = NVLINK if group <= MACHINE else min(NVLINK, MACHINE * ADAPTER)
    return REACHED * within


def collectives(plan: Plan, line: Transfer) -> float:
    """Calls in a step. A matrix of a layer is larger than a prefetch; merged, a layer is one call."""
    layers = model().causal_lm.config.num_hidden_layers
    if line.kind != GATHER:
        return line.payload / (5e8 * 2)  # DeepSpeed's reduce_bucket_size, in bf16
    passes = line.payload / (2 * parameters())
    return passes * (layers if plan.merged else 6 * layers) + 2  # k and v share a call


def seconds(plan: Plan, line: Transfer) -> float:
    """Of the collectives of one kind: bytes by rate, and the steps of the rings."""
    hops = (line.ranks - 1) * (2 if line.kind == REDUCE else 1)
    return line.sent / bus(line.ranks) + collectives(plan, line) * hops * HOP


def parameters() -> int:
    return sum(p.numel() for p in model().parameters())


@dataclass(frozen=True)
class Step:
    """Seconds of a step, and what they come to.

    layers, head, memory_bound, update: of computing. exchange: of all collectives.
    """

    layers: float
    head: float
    memory_bound: float
    update: float
    exchange: float
    useful: float
    tokens: float

    @property
    def compute(self) -> float:
        return self.layers + self.head + self.memory_bound + self.update

    @property
    def hidden(self) -> float:
        """With all collectives behind computing, as far as it lasts."""
        return max(self.compute, self.exchange)

    @property
    def open(self) -> float:
        """With nothing hidden."""
        return self.compute + self.exchange

    def mfu(self, whole: float, peak: float) -> float:
        return self.useful / whole / peak


def step(plan: Plan) -> Step:
    """The step on paper: formulas stand in docs/SCALE.md."""
    rates, work, text = measured(), work_of(model()), model().causal_lm.config
    dense = work.per_token * plan.tokens + work.per_attended_pair * plan.attended_pairs
    again = dense / 3  # checkpointing computes the forward of every layer once more
    head = work.per_scored * plan.scored
    return Step(
        layers=(dense + again) / rates.product,
        head=head / rates.head,
        memory_bound=elementwise_bytes(text) * text.num_hidden_layers * plan.tokens / rates.copy,
        update=UPDATE * parameters() / plan.gpus / rates.copy,
        exchange=sum(seconds(plan, line) for line in transfers(plan)),
        useful=dense + head,
        tokens=plan.tokens,
    )


def elementwise_bytes(text) -> float:
    """Bytes that a token moves in a layer beside products: two norms, RoPE, SwiGLU, two residual sums.

    Each reads its inputs and writes its output once forward, once more recomputed, and twice that backward;
    bf16.
    """
    hidden, inner = text.hidden_size, text.intermediate_size
    rope = (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    forward = 2 * (2 * hidden) + 2 * rope + 3 * inner + 2 * (3 * hidden)
    return 2 * 4 * forward


UPDATE = (
    4 * (4 + 3) + 2
)  # bytes of AdamW per parameter: reads w, m, v and g in fp32, writes w, m, v and bf16


def lines_of_memory(plan: Plan) -> list[Line]:
    """Of a GPU, without activations."""
    sizes: Sizes = sizes_of(model(), {}, head_bytes=GIB)
    return memory(config(), sizes, plan.gpus)


def activations(plan: Plan) -> dict[str, float]:
    """Bytes of a GPU: inputs of the checkpointed layers, and the layer that is computed again."""
    text = model().causal_lm.config
    hidden, inner = text.hidden_size, text.intermediate_size
    kept = 2 * hidden * text.num_hidden_layers * plan.tokens
    width = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    again = 2 * (6 * hidden + 2 * width + 4 * inner) * plan.tokens
    return {"inputs of 80 layers": kept, "one layer, computed again": again}


def buckets() -> float:
    """DeepSpeed's own: a bucket of gradients, the parameters it may keep gathered, and a prefetch."""
    return 2 * (5e8 + 1e9 + 5e7)


def least_tokens(plan: Plan) -> float:
    """Tokens of a GPU in a micro-batch from which computing lasts as long as exchanging."""
    once = step(plan)
    return once.exchange / ((once.compute - once.update) / plan.tokens)


def plans() -> dict[str, Plan]:
    return {
        "64 GPUs, 128 pairs": Plan(64, 128),
        "64 GPUs, 512 pairs": Plan(64, 512),
        "1,024 GPUs, 1,024 pairs": Plan(1024, 1024),
        "1,024 GPUs, 1,024 pairs, a layer a call": Plan(1024, 1024, merged=True),
        "1,024 GPUs, 4,096 pairs, a layer a call": Plan(1024, 4096, merged=True),
    }
