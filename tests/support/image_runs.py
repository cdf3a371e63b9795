"""Tiny image-text models with tokenizer and processor on disk, and pairs with images."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import transformers
from PIL import Image

from tests.support.image_models import FAMILIES
from tests.support.tokenizers import byte_tokenizer

TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}IMAGE{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QWEN: dict[str, Any] = {
    "tokens": {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
    },
    "placeholder": "<|vision_start|><|image_pad|><|vision_end|>",
    "processor": "Qwen3VLProcessor",
    "image_processor": "Qwen2VLImageProcessor",
    "options": {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2,
                "size": {"shortest_edge": 64, "longest_edge": 512}},
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "qwen3-vl": QWEN,
    "qwen3.5": QWEN,
    "gemma3": {
        "tokens": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
                   "eoi_token": "<end_of_image>"},
        "placeholder": "<start_of_image>",
        "processor": "Gemma3Processor",
        "image_processor": "Gemma3ImageProcessor",
        "options": {"size": {"height": 16, "width": 16}},
        "own": {"image_seq_length": 4},
    },
}  # fmt: skip


def write_image_model(folder: Path, name: str) -> Path:
    """A model of `FAMILIES` with a byte-level tokenizer, a chat template and its processor."""
    kind = KINDS[name]
    template = TEMPLATE.replace("IMAGE", kind["placeholder"])
    tokenizer = byte_tokenizer(eos_token="<|im_end|>", template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(kind["tokens"].values())})
    ids = {each: tokenizer.convert_tokens_to_ids(token) for each, token in kind["tokens"].items()}
    changes = {f"{each}_id": number for each, number in ids.items()}
    changes |= {f"{each}_index": number for each, number in ids.items()}
    # Some rows to spare: transformers adds tokens of its own to those of some families.
    text = {"vocab_size": len(tokenizer) + 8, "max_position_embeddings": 1024}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    FAMILIES[name].make(text, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _merge(folder / "tokenizer_config.json", {"extra_special_tokens": kind["tokens"]})
    image = getattr(transformers, kind["image_processor"] + "Pil", None)
    image = image or getattr(transformers, kind["image_processor"])
    image(**kind["options"]).save_pretrained(folder)
    told = {"processor_class": kind["processor"], "image_processor_type": kind["image_processor"]}
    _merge(folder / "preprocessor_config.json", told)
    if "own" in kind:
        _merge(
            folder / "processor_config.json", {"processor_class": kind["processor"]} | kind["own"]
        )
    return folder


def _merge(file: Path, values: dict) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | values))


def write_image_pairs(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """Pairs of conversations in `folder`/pairs.jsonl: about some images, beside others about none.

    Images have several sizes, and some rows share one.
    """
    draw = random.Random(seed)
    sides = [(16, 16), (24, 12), (40, 20), (9, 31)]
    for number, side in enumerate(sides):
        image = Image.new("RGB", side)
        image.putdata(
            [tuple(draw.randrange(256) for _ in range(3)) for _ in range(side[0] * side[1])]
        )
        image.save(folder / f"{number}.png")
    file = folder / "pairs.jsonl"
    with file.open("w") as stream:
        for index in range(count):
            images = [f"{draw.randrange(len(sides))}.png" for _ in range(index % 3)]
            question = "<image>" * len(images) + f"What is it? {index}"
            answers = [f"{word}{'!' * draw.randrange(9)}" for word in ("a cat", "no idea")]
            chosen, rejected = ([{"role": "assistant", "content": each}] for each in answers)
            row = {"prompt": [{"role": "user", "content": question}], "chosen": chosen}
            stream.write(json.dumps(row | {"rejected": rejected, "images": images}) + "\n")
    return file
