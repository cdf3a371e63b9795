"""Models' processors, small, without their models, and pictures to give them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers import Gemma3ImageProcessorPil as GemmaPictures
from transformers import Qwen2VLImageProcessorPil as QwenPictures

from tests.support.tokenizers import byte_tokenizer

TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.content is string %}{{ m.content }}{%- else %}{%- for p in m.content %}"
    "{%- if p.type == 'image' %}{{ IMAGE }}{%- else %}{{ p.text }}{%- endif %}{%- endfor %}"
    "{%- endif %}{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
GEMMA = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")


def image_tokenizer(tokens: tuple[str, ...], image: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer with more special tokens, and a template that writes `image` for images."""
    tokenizer = byte_tokenizer(
        template=TEMPLATE.replace("IMAGE", repr(image)), eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(token, special=True) for token in tokens]}
    )
    return tokenizer


def write_qwen(folder: Path, **kwargs) -> PreTrainedTokenizerFast:
    """The files of Qwen3-VL's tokenizer and processor: an image has one token for 8 x 8 pixels."""
    tokenizer = image_tokenizer(QWEN, "<|vision_start|><|image_pad|><|vision_end|>")
    sizes = {"patch_size": 4, "merge_size": 2, "min_pixels": 256, "max_pixels": 4096} | kwargs
    return _write(folder, tokenizer, QwenPictures(**sizes), "Qwen3VLProcessor", "qwen3_vl", QWEN[2])


def write_gemma(folder: Path) -> PreTrainedTokenizerFast:
    """Those of Gemma 3: an image has 4 tokens, and line breaks round it."""
    tokenizer = image_tokenizer(GEMMA, GEMMA[0])
    names = {"boi_token": GEMMA[0], "eoi_token": GEMMA[1], "image_token": GEMMA[2]}
    pictures = GemmaPictures(size={"height": 28, "width": 28})
    return _write(
        folder,
        tokenizer,
        pictures,
        "Gemma3Processor",
        "gemma3",
        GEMMA[2],
        names,
        {"image_seq_length": 4},
    )


def _write(folder, tokenizer, pictures, name, model, image_token, names=(), own=()):
    tokenizer.save_pretrained(folder)
    if names:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"extra_special_tokens": names}))
    pictures.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processor_class": name}))
    if own:
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": name, **own}))
    config = {"model_type": model, "image_token_id": tokenizer.convert_tokens_to_ids(image_token)}
    (folder / "config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


def picture(seed: int, width: int = 32, height: int = 24) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
