"""Options that only a card runs as they are meant: a tiny run with each, beside the plain run.

A run is a `dpo-fast train` in a process of its own. Policy and reference are one model, so the first loss
is ln 2; behind it come the losses of the plain run, as near as the option promises. What needs a package
that is absent is left out by name. Attention has items of its own: gradients of rows of trees against
those of every sequence in a row of its own, with each backend that the card has.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import jsonl
from benchmarks.gpu import clock
from benchmarks.gpu.shapes import device
from benchmarks.gpu.smoke import judged
from benchmarks.machine import ROOT

STEPS = 6
LN_2 = 2e-3  # that the first loss may be from ln 2: policy and reference are one model
FALL = 0.05  # by which the last loss is below the first at least
EXACT, ROUNDED, QUANTISED = 2e-2, 4e-2, 0.1  # nats that a loss may be from the plain run's


@dataclass(frozen=True)
class Option:
    """What a run is started with, how near its losses come, and what it needs.

    more: arguments after those of the plain run.
    needs: packages. card: whether a CPU has none of it.
    """

    more: tuple[str, ...]
    near: float = EXACT
    needs: tuple[str, ...] = ()
    card: bool = False


LORA = ("model.lora.r=8", "train.learning_rate=0.01")
OPTIONS = {
    "packed": Option(("train.layout=packed",)),
    "padded": Option(("train.layout=padded",)),
    "FlexAttention": Option(("model.attention=flex_attention",), card=True),
    "varlen": Option(("model.attention=varlen",), card=True),
    "sdpa": Option(("model.attention=sdpa",)),
    "stored reference": Option(("reference.provider=cached",)),
    "activation offloading": Option(("model.activation_offloading=true",)),
    "tiles": Option(("model.tiled_mlp=16",)),
    "compiled": Option(("model.torch_compile=true",), ROUNDED, card=True),
    "Liger's layers": Option(
        ("model.use_liger_kernel=true",), ROUNDED, ("liger_kernel",), card=True
    ),
    "saved beside the run": Option(("train.async_save=true", "train.save_steps=2")),
    "ZeRO-3": Option(("parallel.zero_stage=3",)),
    "ZeRO-3, quantised gathers": Option(
        ("parallel.zero_stage=3", "parallel.zero_quantized_weights=true"), QUANTISED, card=True
    ),
    "fp8, tensorwise": Option(("model.fp8=tensorwise",), QUANTISED, ("torchao",), card=True),
    "fp8, rowwise": Option(("model.fp8=rowwise",), QUANTISED, ("torchao",), card=True),
    "paged AdamW, 8 bits": Option(
        ("train.optim=paged_adamw_8bit",), QUANTISED, ("bitsandbytes",), card=True
    ),
    "paged AdamW, 32 bits": Option(
        ("train.optim=paged_adamw_32bit",), ROUNDED, ("bitsandbytes",), card=True
    ),
    "LoRA": Option(LORA, math.inf),
    "QLoRA": Option(
        (*LORA, "model.quantization.load_in_4bit=true"),
        math.inf,
        ("bitsandbytes", "peft"),
        card=True,
    ),
    "generates while it trains": Option(
        ("generate.max_prompts=2", "generate.max_new_tokens=8", "generate.temperature=0")
    ),
    "optimiser in CPU memory": Option(
        ("parallel.zero_stage=2", "parallel.offload_optimizer=true"), ROUNDED, card=True
    ),
}
REHEARSED = ("activation offloading",)
# By whether a token's experts could be others in bf16, whose errors then say nothing.
MODELS = {
    "llama": False,
    "qwen2, a window in one layer": False,
    "gemma2, caps and windows": False,
    "gpt-oss, sinks": True,
    "deepseek-v3, unequal head sizes": True,
    "llama4, chunks, temperatures, experts": True,
}
FP32_ERROR = 1e-3  # of the largest element; a wrong mask is off by far more


def items(rehearse: bool) -> dict[str, Callable[[], dict]]:
    models = list(MODELS)[:1] if rehearse else MODELS
    found = {f"attention of {name}": functools.partial(attention, name) for name in models}
    options = {name: OPTIONS[name] for name in REHEARSED} if rehearse else OPTIONS
    return found | {name: functools.partial(run, each) for name, each in options.items()}


def run(option: Option) -> dict:
    """Losses of a run with an option, and of the plain one."""
    if option.card and device() == "cpu":
        return {"skipped": "it needs a GPU"}
    if absent := [name for name in option.needs if importlib.util.find_spec(name) is None]:
        return {"skipped": f"{', '.join(absent)} not installed"}
    with tempfile.TemporaryDirectory() as folder:
        plain, lines = plain_losses(), train(Path(folder), option.more)
    losses = [line["loss"] for line in lines]
    if len(losses) != STEPS:
        return {"losses": losses, "failed": f"wrong: a number of losses, {len(losses)} of {STEPS}"}
    gaps = [abs(a - b) for a, b in zip(losses, plain)]
    found = {"losses": losses, "plain": plain, "gap": max(gaps)}
    wrong = [
        *(["a loss that is not finite"] * (not all(map(math.isfinite, losses)))),
        *(["the first loss, which is not ln 2"] * (abs(losses[0] - math.log(2)) > LN_2)),
        *(["losses that do not fall"] * (losses[-1] > losses[0] - FALL)),
        *(["losses unlike the plain run's"] * (not all(gap <= option.near for gap in gaps))),
    ]
    return found | ({"failed": f"wrong: {', '.join(wrong)}"} if wrong else {})


@functools.cache
def plain_losses() -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        return [line["loss"] for line in train(Path(folder), ())]


def train(folder: Path, more: tuple[str, ...]) -> list[dict]:
    """The training lines of a run. Raises RuntimeError with its last words."""
    write(folder)
    command = [sys.executable, "-m", "dpo_fast", "train", str(folder / "run.yaml"), *more]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=clock.left()
        )
    except subprocess.TimeoutExpired as late:
        words = (late.stdout or b"").decode(errors="replace")[-500:]
        raise RuntimeError(f"the run had no time to end: {words}") from None
    print(done.stdout[-4000:], done.stderr[-4000:], file=sys.stderr)
    if done.returncode:
        words = (done.stdout + done.stderr)[-900:].strip()
        raise RuntimeError(f"the run ended with exit code {done.returncode}: {words}")
    return [line for line in jsonl.read(folder / "out" / "metrics.jsonl") if "loss" in line]


def write(folder: Path) -> None:
    """A Llama of 100,000 parameters whose sides fp8 and 4 bits take, pairs, and a configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.models import write_pairs
    from tests.support.tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer(bos=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_pairs(folder / "pairs.jsonl", 32)
    tree = {
        "model": {"path": str(folder / "model"), "dtype": "bf16" if device() == "cuda" else "fp32"},
        "data": {
            "train": str(folder / "pairs.jsonl"),
            "eval_rows": 4,
            "max_length": 128,
            "cache_dir": str(folder / "cache"),
        },
        "train": {
            "output_dir": str(folder / "out"),
            "layout": "shared_prefix",
            "max_steps": STEPS,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 3e-4,
            "warmup_ratio": 0.0,
        },
        "log": {"logging_steps": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(tree))  # JSON is YAML


def attention(name: str) -> dict:
    """Log-probs and gradients of rows of trees, by every backend, against sequences alone on the host."""
    from dpo_fast.data.batch import collate_trees
    from dpo_fast.errors import UserError
    from dpo_fast.models import ScoringModel
    from dpo_fast.models.architecture import architecture_of, choose_attention
    from dpo_fast.models.scoring import forward_arguments
    from tests.support.architectures import TREES, alone, errors, make, slopes

    def scored(dtype: torch.dtype, layout: str, requested: str):
        model = make(name).to(device(), dtype)
        place, architecture = torch.device(device()), architecture_of(model)
        chosen = choose_attention(requested, layout, place, dtype, architecture).name
        model.set_attn_implementation(chosen)
        batch = collate_trees(TREES, layout).to(place)
        logp_T = ScoringModel(model)(**forward_arguments(batch))["logp"]
        return chosen, logp_T, slopes(logp_T, model.parameters())

    truth = make(name) if MODELS[name] else make(name).double()  # experts have no products in fp64
    expected = alone(truth)
    right = slopes(expected, truth.parameters())
    checks = {}
    for dtype in (torch.float32, torch.bfloat16)[: 1 if MODELS[name] else 2]:
        precise = dtype == torch.float32
        _, logp_T, gradients = scored(dtype, "padded", "auto")
        own = max(errors(*on_host(logp_T, gradients), expected, right))
        # What rounding does to rows of their own, it may do to trees, and a little more.
        limit = FP32_ERROR if precise else 3 * own + 1e-2
        checks[f"padded {dtype}"] = {"ok": own <= limit, "max_err": own}
        for backend in ("auto", "sdpa", "flex_attention", "varlen"):
            key = f"{backend} {dtype}".replace("torch.", "")
            try:
                chosen, logp_T, gradients = scored(dtype, "shared_prefix", backend)
                found = errors(*on_host(logp_T, gradients), expected, right)
                ok = all(each <= limit for each in found)  # not of a NaN either
                checks[key] = {"ok": ok, "max_err": max(found), "chosen": chosen}
            except UserError as refused:
                checks[key] = {"ok": True, "refused": str(refused)[:200]}
            except Exception as error:
                if "CUDA error" in str(error):
                    raise
                checks[key] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
    return judged(checks)


def on_host(logp_T: torch.Tensor, gradients) -> tuple:
    return logp_T.cpu().double(), [None if x is None else x.cpu().double() for x in gradients]
