"""Tiny models and data for tests, made on the spot."""

import copy
import json
import random
from pathlib import Path

import torch

from tests.support.tokenizers import byte_tokenizer

# Adam with an epsilon far above every gradient is SGD with momentum. As it comes, it moves a weight
# whose gradient is rounding noise by the noise's sign, and the noise is the processor's.
LIKE_SGD = {"learning_rate": 0.1, "adam_epsilon": 1.0}


def write_model(
    folder: Path, *, seed: int = 0, tied: bool = False, vocab: int | None = None
) -> Path:
    """A Llama of 30,000 parameters with a byte-level tokenizer, as save_pretrained writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(bos=True)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab or len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_architecture(folder: Path, name: str) -> Path:
    """A model of tests/support/architectures.py with the same tokenizer."""
    from tests.support.architectures import make

    tokenizer = byte_tokenizer(bos=True)
    make(name, vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(file: Path, count: int = 24, seed: int = 0) -> Path:
    """Pairs of very unequal lengths, so that a wrong normaliser shows."""
    draw = random.Random(seed)
    with file.open("w") as stream:
        for index in range(count):
            a, b = draw.sample(range(1000), 2)
            row = {
                "prompt": f"{index}: {a} or {b}? ",
                "chosen": f"{max(a, b)}" + " because it is larger" * draw.randint(0, 2),
                "rejected": f"{min(a, b)}" + "!" * draw.randint(0, 9),
            }
            stream.write(json.dumps(row) + "\n")
    return file


def write_completions(file: Path, count: int = 24, seed: int = 0) -> Path:
    """Single answers, two to every prompt, of which about half are good."""
    draw = random.Random(seed)
    with file.open("w") as stream:
        for index in range(count):
            a, b = 10 * (index // 2), 7 * (index // 2) + 3
            good = draw.random() < 0.5
            right = f"{max(a, b)}" + " because it is larger" * draw.randint(0, 2)
            wrong = f"{min(a, b)}" + "!" * draw.randint(0, 9)
            row = {"prompt": f"{a} or {b}? ", "completion": right if good else wrong, "label": good}
            stream.write(json.dumps(row) + "\n")
    return file


def write_groups(file: Path, count: int = 24, seed: int = 0) -> Path:
    """Groups of 3 and 4 answers of very unequal lengths; some scores tie, the last group's all do."""
    draw = random.Random(seed)
    with file.open("w") as stream:
        for index in range(count):
            a, b = draw.sample(range(1000), 2)
            completions = [
                f"{max(a, b)}" + " because it is larger" * draw.randint(0, 2),
                f"{max(a, b)}?" + "?" * draw.randint(0, 3),
                f"{min(a, b)}" + "!" * draw.randint(0, 9),
                "no idea",
            ][: 3 + index % 2]
            scores = [1.0, draw.choice([0.5, 1.0]), draw.choice([-1.0, 0.5]), -1.0]
            row = {
                "prompt": f"{index}: {a} or {b}? ",
                "completions": completions,
                "scores": [0.5] * 4 if index == count - 1 else scores,
            }
            row["scores"] = row["scores"][: len(completions)]
            stream.write(json.dumps(row) + "\n")
    return file


def run_tree(folder: Path, **train) -> dict:
    """A configuration as a tree, for the model and pairs that stand in `folder`."""
    defaults = {
        "output_dir": str(folder / "run"),
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 1e-3,
        # Larger than usual: a weight whose gradient is rounding noise shall not move by its sign.
        "adam_epsilon": 1e-3,
        "warmup_ratio": 0.0,
    }
    return {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {
            "train": str(folder / "pairs.jsonl"),
            "max_length": 128,
            "cache_dir": str(folder / "cache"),
        },
        "train": defaults | train,
        "log": {"logging_steps": 1},
    }


def changed(tree: dict, output: Path, **sections) -> dict:
    """A copy of a tree with its own output folder and some options changed."""
    tree = copy.deepcopy(tree)
    for section, options in sections.items():
        tree[section] = tree.get(section, {}) | options
    tree["train"]["output_dir"] = str(output)
    return tree
