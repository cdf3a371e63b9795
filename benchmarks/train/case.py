"""What a step of `bench train` is about: who takes it, the model, and the work in it.

A model is a configuration. Its weights are drawn at random and written once, for every contender. The work
of a step is counted from the lengths of its pairs: it is the numerator of MFU. The denominator is the
fastest matrix product that this machine showed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import DTYPES, Stopwatch, synchronize
from dpo_fast.data.layouts import LAYOUTS

TRL_LAYOUT = "padded"
# Steps before the rounds. The first allocates and compiles; the memory of the second is measured.
WARM_UP = 2
QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "max_position_embeddings": 4096}
HYBRID = {"model_type": "qwen3_next", "mlp_only_layers": list(range(8)), "num_experts": 0}
# TRL adds a balancing loss wherever there is a coefficient for one; then the first loss is not ln 2.
PLAIN = {"tie_word_embeddings": False, "max_position_embeddings": 4096, "router_aux_loss_coef": 0.0}
HYBRID |= PLAIN
MIXTURE = {"model_type": "qwen3_moe"} | PLAIN
MODELS = {
    "tiny": LLAMA | {  # 8.9 million parameters, 4.2 of them embedding and head
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    },
    "qwen2.5-0.5b": QWEN | {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "qwen2.5-1.5b": QWEN | {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "tiny-hybrid": HYBRID | {  # three layers with a state to one of attention
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "tiny-mixture": MIXTURE | {
        "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 6, "moe_intermediate_size": 256,
        "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "quick": LLAMA | {
        "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    },
    "quick-hybrid": HYBRID | {
        "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
    },
    "quick-mixture": MIXTURE | {
        "vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 32,
        "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}  # fmt: skip

# Large for DPO, so that the losses of a few steps tell one contender from another. The larger a model, the
# more a step of AdamW moves its loss, and what rounding in bf16 makes of it.
LEARNING_RATE = {"qwen2.5-0.5b": 2e-5, "qwen2.5-1.5b": 1e-5}
LEARNING_RATE |= {name: 1e-4 for name in MODELS if name.startswith("tiny")}
LEARNING_RATE |= {name: 1e-2 for name in MODELS if name.startswith("quick")}
PRODUCT = {"cpu": 1024, "cuda": 8192}  # rows and columns of the square product
REPEATS = {"cpu": 12, "cuda": 30}


@dataclass(frozen=True)
class Contender:
    """One way to take a training step.

    layout: one of ours, or "" for TRL's own, `TRL_LAYOUT`.
    stored: the reference's log-probs come from a table made before training, not from a frozen model.
    checkpointing: activations are recomputed in backward.
    options: further arguments of TRL's configuration.
    """

    name: str
    layout: str = ""
    stored: bool = False
    checkpointing: bool = False
    options: dict = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return bool(self.layout)


OURS = tuple(
    Contender(f"dpo_fast {layout}, {provider}", layout, stored=provider == "cached")
    for provider in ("cached", "frozen")
    for layout in LAYOUTS
)
TRL = (
    Contender("trl", checkpointing=True),
    Contender("trl, no checkpointing"),
    Contender("trl, precomputed", stored=True, checkpointing=True),
    Contender("trl, precomputed, no checkpointing", stored=True),
    Contender("trl, padding_free", checkpointing=True, options={"padding_free": True}),
)
CONTENDERS = {contender.name: contender for contender in (*TRL, *OURS)}


@dataclass(frozen=True)
class Task:
    """The same for every contender: model, pairs, order of the pairs, optimiser.

    model: folder with the weights.
    tokenizer: folder of the tokenizer. Beside a model's configuration transformers would take the class of
        the model's own tokenizer, which splits texts otherwise.
    data: file of the pairs.
    rows: the pairs as `Pairs.rows` has them.
    order: indices into rows, by step.
    works: the work of each step.
    folder: for what contenders write.
    padded_pairs: micro-batch of TRL and of our padded layout.
    packed_pairs: micro-batch of our layouts without padding.
    attention: `model.attention` of our layouts without padding.
    liger: norms, MLPs and rotary embeddings of every contender are liger-kernel's.
    """

    model: Path
    tokenizer: Path
    data: Path
    rows: list[dict]
    order: list[list[int]]
    works: list[StepWork]
    folder: Path
    stopwatch: Stopwatch
    device: str
    dtype: str
    padded_pairs: int
    packed_pairs: int
    max_length: int
    zero_stage: int
    learning_rate: float
    attention: str = "auto"
    liger: bool = False
    seed: int = 42
    max_grad_norm: float = 1.0

    def attention_of(self, layout: str) -> str:
        return self.attention if LAYOUTS[layout].shares_rows else "auto"

    @property
    def steps(self) -> int:
        return len(self.order)

    @property
    def global_batch_size(self) -> int:
        return len(self.order[0])

    def micro_batch_size(self, layout: str) -> int:
        shared = LAYOUTS[layout or TRL_LAYOUT].shares_rows
        return self.packed_pairs if shared else self.padded_pairs


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model.

    parameters: in all.
    layers: weights in the products of all layers.
    head: weights of the head.
    attention: layers x heads x head width.
    """

    parameters: int
    layers: int
    head: int
    attention: int


def write_model(name: str, tokenizer, folder: Path, device: str, seed: int = 0) -> ModelSizes:
    """Draw the weights in fp32 and save the model as `save_pretrained` does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tree = dict(MODELS[name])
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(tree.pop("model_type"), **tree, bos_token_id=None, **tokens)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return model_sizes(model)


def model_sizes(model) -> ModelSizes:
    config, head = model.config, model.get_output_embeddings()
    linear = (m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelSizes(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=sum(m.weight.numel() for m in linear),
        head=head.weight.numel(),
        attention=config.num_hidden_layers * config.num_attention_heads * width,
    )


def lengths_of(rows: list[dict]) -> np.ndarray:
    """Tokens of prompt, chosen and rejected, int64 [pairs, 3]."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return np.array([[len(row[name]) for name in names] for row in rows], dtype=np.int64)


@dataclass(frozen=True)
class StepWork:
    """Counts of one step over its global batch.

    tokens: of every whole sequence, so a prompt counts twice.
    scored: answer tokens.
    once: tokens with every prompt counted once.
    flops: forward and backward of the layers over `tokens` (each weight 6 times, causal attention by the
        squares of the lengths) and of the head over `scored`. No reference, recomputation or padding.
    flops_once: the same with every prompt once.
    """

    pairs: int
    tokens: int
    scored: int
    once: int
    flops: float
    flops_once: float


def step_work(lengths: np.ndarray, sizes: ModelSizes) -> StepWork:
    """The work of a step on pairs. lengths: tokens of prompt, chosen and rejected, [pairs, 3]."""
    P, C, R = lengths.T.astype(np.float64)
    tokens, scored, once = (2 * P + C + R).sum(), (C + R).sum(), (P + C + R).sum()
    # Token j attends to j tokens, half of a square in all; an answer also attends to its whole prompt.
    whole = (((P + C) ** 2 + (P + R) ** 2) / 2).sum()
    prompt_once = (P**2 / 2 + P * (C + R) + (C**2 + R**2) / 2).sum()
    head = sizes.head * scored

    def flops(tokens: float, attended: float) -> float:
        return 6 * (sizes.layers * tokens + head + 2 * sizes.attention * attended)

    return StepWork(
        pairs=len(lengths),
        tokens=int(tokens),
        scored=int(scored),
        once=int(once),
        flops=flops(tokens, whole),
        flops_once=flops(once, prompt_once),
    )


def matmul_flops(device: str, dtype: str) -> float:
    """Flops per second of the fastest of several square products in the dtype."""
    size = PRODUCT[device]
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS[device]):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
