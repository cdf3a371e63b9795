"""Tiny models of image-text families, images for them, and batches of prompts with images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch, collate_trees
from dpo_fast.data.image_batch import ImageBatch

TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "patch_size": 4, "image_size": 16, "num_channels": 3,
}  # fmt: skip
IMAGE, VIDEO, START, END = 97, 98, 95, 96  # ids of special tokens
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


class Picture(NamedTuple):
    """One image as the processor of a family gives it.

    inputs: by the names of the model's arguments, with one image each.
    tokens: how many image tokens it has.
    """

    inputs: dict[str, Tensor]
    tokens: int


@dataclass(frozen=True)
class Family:
    """How to build a model of a family.

    picture: draws an image; the argument makes it another one, of another size where sizes are free.
    types: the argument by which transformers' own forward is told which tokens are of images.
    """

    config: str
    text: str | None
    text_changes: dict
    tower: str | None
    tower_changes: dict
    changes: dict
    picture: Callable[[int], Picture]
    types: str | None = None
    framed: str | None = None  # the same with the tokens that begin and end an image

    def make(self, sizes: dict | None = None, **changes) -> transformers.PreTrainedModel:
        """A model in fp32 with weights large enough for sharp logits. sizes: changes of its text part."""
        text = getattr(transformers, self.text)(**(TEXT | self.text_changes | (sizes or {})))
        tower = getattr(transformers, self.tower)(**(TOWER | self.tower_changes))
        config = getattr(transformers, self.config)(
            text_config=text.to_dict(), vision_config=tower.to_dict(), **(self.changes | changes)
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.1)
            if "norm" in name and parameter.dim() == 1:
                parameter.data += 0.5
        return model.eval()


def _drawn(number: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def _patches(patch: int, temporal: int, merge: int = 2) -> Callable[[int], Picture]:
    """Qwen's kind: patches of all images in one tensor, and the grid of each."""

    def picture(number: int) -> Picture:
        high, wide = merge * (1 + number % 2), merge * (2 + number % 3)
        values = _drawn(number, high * wide, 3 * temporal * patch * patch)
        grid = torch.tensor([[1, high, wide]])
        inputs = {"pixel_values": values, "image_grid_thw": grid}
        return Picture(inputs, high * wide // merge**2)

    return picture


def _square(tokens: int, side: int = 16, **more) -> Callable[[int], Picture]:
    def picture(number: int) -> Picture:
        return Picture({"pixel_values": _drawn(number, 1, 3, side, side)}, tokens)

    return picture


def _sized(number: int) -> Picture:
    """Mistral's kind: each image in its own size, in a frame of the largest."""
    high, wide = 8 * (1 + number % 2), 8 * (2 - number % 2)
    values = torch.zeros(1, 3, 16, 16)
    values[:, :, :high, :wide] = _drawn(number, 1, 3, high, wide)
    sizes = torch.tensor([[high, wide]])
    return Picture({"pixel_values": values, "image_sizes": sizes}, high * wide // 64)


def _split(number: int) -> Picture:
    """Idefics' kind: an image is one or two frames."""
    frames = 1 + number % 2
    values = torch.zeros(1, 2, 3, 16, 16)  # frames of zeros are padding
    values[:, :frames] = _drawn(number, 1, frames, 3, 16, 16)
    mask = torch.zeros(1, 2, 16, 16, dtype=torch.int64)
    mask[:, :frames] = 1
    return Picture({"pixel_values": values, "pixel_attention_mask": mask}, 4 * frames)


def _strips(number: int) -> Picture:
    """LLaVA's later kind: the whole image, and tiles of it, here two, with a token behind each row."""
    high, wide = (32, 16) if number % 2 else (16, 32)
    inputs = {"pixel_values": _drawn(number, 1, 3, 3, 16, 16)}
    rows, columns = high // 4, wide // 4
    return Picture(
        inputs | {"image_sizes": torch.tensor([[high, wide]])}, 16 + rows * (columns + 1)
    )


def _grid(number: int) -> tuple[int, int]:
    return 2 * (1 + number % 2), 2 * (1 + number % 3)


def _rows(number: int) -> Picture:
    """HunYuan's kind: a token behind each row of an image, and one at either end."""
    picture = _patches(4, 1)(number)
    _, high, wide = picture.inputs["image_grid_thw"][0].tolist()
    return picture._replace(tokens=high // 2 * (wide // 2 + 1) + 2)


def _placed(number: int) -> Picture:
    """Gemma 4's kind: patches with their places, filled up to the most that there are."""
    high, wide = _grid(number)
    count, values, places = high * wide, torch.zeros(1, 24, 48), torch.full((1, 24, 2), -1)
    values[:, :count] = _drawn(number, 1, count, 48).sigmoid()
    places[0, :count] = torch.tensor([[x, y] for y in range(high) for x in range(wide)])
    return Picture({"pixel_values": values, "image_position_ids": places}, count // 4)


def _masked(number: int) -> Picture:
    """LFM2's kind: patches with a mask, and how many there are each way."""
    high, wide = _grid(number)
    count, values, mask = high * wide, torch.zeros(1, 24, 48), torch.zeros(1, 24, dtype=torch.int64)
    values[:, :count], mask[:, :count] = _drawn(number, 1, count, 48), 1
    inputs = {"pixel_values": values, "pixel_attention_mask": mask}
    return Picture(inputs | {"spatial_shapes": torch.tensor([[high, wide]])}, count // 4)


QWEN_TOWER = {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "spatial_merge_size": 2,
              "temporal_patch_size": 2, "in_channels": 3}  # fmt: skip
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
        "vision_end_token_id": END}  # fmt: skip
GEMMA4 = {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": 94,
          "boi_token_id": START, "eoi_token_id": END, "audio_config": None}  # fmt: skip
GEMMA4_TEXT = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2,
               "num_hidden_layers": 4, "hidden_size_per_layer_input": 8,
               "vocab_size_per_layer_input": 99, "global_head_dim": 16}  # fmt: skip
GEMMA4_TOWER = {"head_dim": 8, "num_key_value_heads": 2, "pooling_kernel_size": 2,
                "position_embedding_size": 16}  # fmt: skip
TILES = {"image_token_index": IMAGE, "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
FAMILIES = {
    "qwen3-vl": Family(
        "Qwen3VLConfig", "Qwen3VLTextConfig", {"rope_parameters": MROPE},
        "Qwen3VLVisionConfig",
        QWEN_TOWER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        QWEN, _patches(4, 2), "mm_token_type_ids",
    ),
    "gemma3": Family(
        "Gemma3Config", "Gemma3TextConfig",
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention",
                                              "sliding_attention"]},
        "SiglipVisionConfig", {"vision_use_head": False},
        {"image_token_index": IMAGE, "image_token_id": IMAGE, "boi_token_index": START,
         "eoi_token_index": END, "mm_tokens_per_image": 4},
        _square(4), "token_type_ids",
    ),
    "qwen2.5-vl": Family(
        "Qwen2_5_VLConfig", "Qwen2_5_VLTextConfig", {"rope_parameters": MROPE},
        "Qwen2_5_VLVisionConfig",
        QWEN_TOWER | {"window_size": 16, "fullatt_block_indexes": [1]},
        QWEN, _patches(4, 2), "mm_token_type_ids",
    ),
    "qwen2-vl": Family(
        "Qwen2VLConfig", "Qwen2VLTextConfig", {"rope_parameters": MROPE},
        "Qwen2VLVisionConfig", QWEN_TOWER | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        QWEN, _patches(4, 2), "mm_token_type_ids",
    ),
    "llava": Family(
        "LlavaConfig", "LlamaConfig", {}, "CLIPVisionConfig", {},
        {"image_token_id": IMAGE, "image_token_index": IMAGE, "vision_feature_layer": -2}, _square(16),
    ),
    "internvl": Family(
        "InternVLConfig", "Qwen2Config", {}, "InternVLVisionConfig",
        {"image_size": [16, 16], "patch_size": [4, 4]},
        {"image_token_id": IMAGE, "image_token_index": IMAGE, "downsample_ratio": 0.5}, _square(4),
    ),
    "idefics3": Family(
        "Idefics3Config", "LlamaConfig", {}, "Idefics3VisionConfig", {},
        {"image_token_id": IMAGE, "scale_factor": 2}, _split,
    ),
    "smolvlm": Family(
        "SmolVLMConfig", "LlamaConfig", {}, "SmolVLMVisionConfig", {},
        {"image_token_id": IMAGE, "scale_factor": 2}, _split,
    ),
    "mistral3": Family(
        "Mistral3Config", "MistralConfig", {}, "PixtralVisionConfig", {"head_dim": 8},
        {"image_token_id": IMAGE, "image_token_index": IMAGE, "spatial_merge_size": 2}, _sized,
    ),
    "gemma4": Family(
        "Gemma4Config", "Gemma4TextConfig", GEMMA4_TEXT | {"use_bidirectional_attention": "vision"},
        "Gemma4VisionConfig", GEMMA4_TOWER, GEMMA4, _placed, "mm_token_type_ids",
    ),
    "gemma4, shared keys": Family(
        "Gemma4Config", "Gemma4TextConfig", GEMMA4_TEXT | {"num_kv_shared_layers": 2},
        "Gemma4VisionConfig", GEMMA4_TOWER, GEMMA4, _placed, "mm_token_type_ids",
    ),
    "qwen3-vl-moe": Family(
        "Qwen3VLMoeConfig", "Qwen3VLMoeTextConfig",
        {"rope_parameters": MROPE, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16},
        "Qwen3VLMoeVisionConfig",
        QWEN_TOWER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        QWEN, _patches(4, 2), "mm_token_type_ids",
    ),
    "qwen3.5": Family(
        "Qwen3_5Config", "Qwen3_5TextConfig",
        {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0, "mrope_interleaved": True},
         "layer_types": ["linear_attention", "full_attention", "linear_attention"],
         "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8},
        "Qwen3_5VisionConfig", QWEN_TOWER | {"num_position_embeddings": 16},
        QWEN, _patches(4, 2), "mm_token_type_ids",
    ),
    "glm4v": Family(
        "Glm4vConfig", "Glm4vTextConfig",
        {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
        "Glm4vVisionConfig", QWEN_TOWER,
        {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START,
         "image_end_token_id": END, "video_start_token_id": 93, "video_end_token_id": 92},
        _patches(4, 2), "mm_token_type_ids",
    ),
    "llava-next": Family(
        "LlavaNextConfig", "LlamaConfig", {}, "CLIPVisionConfig", {}, TILES, _strips,
    ),
    "llava-onevision": Family(
        "LlavaOnevisionConfig", "Qwen2Config", {}, "SiglipVisionConfig", {"vision_use_head": False},
        TILES, _strips,
    ),
    "vipllava": Family(
        "VipLlavaConfig", "LlamaConfig", {}, "CLIPVisionConfig", {},
        {"image_token_index": IMAGE, "vision_feature_layers": [-2, -1]}, _square(16),
    ),
    "ernie4.5-vl": Family(
        "Ernie4_5_VLMoeConfig", "Ernie4_5_VLMoeTextConfig",
        {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}, "moe_num_experts": 4, "moe_k": 2,
         "moe_intermediate_size": [16, 12], "moe_num_shared_experts": 1,
         "mlp_layer_types": ["dense", "sparse", "sparse"]},
        "Ernie4_5_VLMoeVisionConfig",
        {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_merge_size": 2,
         "in_channels": 3},
        QWEN | {"image_start_token_id": START, "image_end_token_id": END,
                "video_start_token_id": 93, "video_end_token_id": 92},
        _patches(4, 1), "mm_token_type_ids", "moe_mm_token_type_ids",
    ),
    "cosmos3-edge": Family(
        "Cosmos3EdgeConfig", "Cosmos3EdgeTextConfig", {"rope_parameters": MROPE},
        "Cosmos3EdgeVisionConfig", {"num_patches": 16, "spatial_merge_size": 2},
        QWEN | {"projector_hidden_size": 24}, _patches(4, 1), "mm_token_type_ids",
    ),
    "hunyuan-vl": Family(
        "HunYuanVLConfig", "HunYuanVLTextConfig",
        {"rope_parameters": ROPE | {"mrope_section": [1, 1, 1, 1]}},
        "HunYuanVLVisionConfig",
        {"spatial_merge_size": 2, "temporal_patch_size": 1, "out_hidden_size": 32,
         "text_hidden_size": 32, "max_image_size": 32},
        {"image_token_id": IMAGE}, _rows, "mm_token_type_ids",
    ),
    "got-ocr2": Family(
        "GotOcr2Config", "Qwen2Config", {}, "GotOcr2VisionConfig",
        {"output_channels": 8, "image_size": 32, "window_size": 2, "global_attn_indexes": [1],
         "mlp_dim": 24},
        {"image_token_index": IMAGE, "image_seq_length": 1}, _square(4, 32),
    ),
    "lfm2-vl": Family(
        "Lfm2VlConfig", "Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"]},
        "Siglip2VisionConfig", {"num_patches": 16, "vision_use_head": False},
        {"image_token_id": IMAGE, "downsample_factor": 2, "projector_hidden_size": 16}, _masked,
    ),
}  # fmt: skip

# Prompts in which a picture stands as its number, 1000 and above, and the answers to each.
TREES = [
    ([1, 5, 6, START, 1000, END, 7, 33], [[8, 9, 2], [10, 2], [8, 11, 2]]),
    ([1, 90, 4], [[11, 2], [12, 13, 14, 15, 44, 2]]),
    ([1, 5, 6, START, 1001, END, 7, 33], [[8, 9, 2], [2]]),
    (
        [1, 5, 6, 8, 9, 3, 3, 8, 21, 22, 23, 24, 25, 26, 27, 28, START, 1002, END, 4, START, 1001, END, 6],
        [[9, 9, 2], [9, 5, 6, 2]],
    ),
    (
        [1, 5, 6, 8, 9, 3, 3, 8, 21, 22, 23, 24, 25, 26, 27, 28, START, 1002, END, 4, 50],
        [[9, 3, 2], [9, 9, 9, 9, 2]],
    ),
]  # fmt: skip


def batch_of(
    family: Family, layout: str, trees: Sequence[tuple[list[int], list[list[int]]]] = TREES
) -> ScoredBatch:
    """The batch of prompts with pictures in them."""
    numbers = sorted({id for prompt, _ in trees for id in prompt if id >= 1000})
    pictures = {number: family.picture(number) for number in numbers}

    def spread(prompt: list[int]) -> list[int]:
        """Each picture as often as it has tokens."""
        return [
            id for each in prompt for id in [each] * (pictures[each].tokens if each >= 1000 else 1)
        ]

    batch = collate_trees([(spread(prompt), answers) for prompt, answers in trees], layout)
    if not numbers:
        return batch
    flat = batch.input_ids.flatten()
    flags = flat >= 1000
    order, at = [], 0
    of_images = flat[flags].tolist()
    while at < len(of_images):
        order.append(numbers.index(of_images[at]))
        at += pictures[of_images[at]].tokens
    images = ImageBatch(
        inputs=joined([pictures[number] for number in numbers]),
        tokens_D=torch.tensor([pictures[number].tokens for number in numbers]),
        order_I=torch.tensor(order),
        image_tokens_N=flags,
        token_id=IMAGE,
    )
    ids = flat.where(~flags, IMAGE).view_as(batch.input_ids)
    return replace(batch, input_ids=ids, images=images)


def joined(pictures: Sequence[Picture]) -> dict[str, Tensor]:
    names = pictures[0].inputs
    return {name: torch.cat([each.inputs[name] for each in pictures]) for name in names}


def alone(
    family: Family, model, trees: Sequence[tuple[list[int], list[list[int]]]] = TREES
) -> Tensor:
    """Log-probs of every answer token by transformers' own forward of one sequence at a time, [T]."""
    scores = []
    for prompt, answers in trees:
        pictures = [family.picture(each) for each in prompt if each >= 1000]
        ids, rest = [], iter(pictures)
        for each in prompt:
            ids += [each] if each < 1000 else [IMAGE] * next(rest).tokens
        for answer in answers:
            row = torch.tensor([ids + answer])
            inputs = joined(pictures) if pictures else {}
            if family.types and pictures:
                inputs[family.types] = (row == IMAGE).long()
            if family.framed and pictures:
                inputs[family.framed] = torch.isin(row, torch.tensor([IMAGE, START, END])).long()
            logits = model(
                row, attention_mask=torch.ones_like(row), use_cache=False, **inputs
            ).logits
            logp = logits[0].float().log_softmax(-1)[len(ids) - 1 : -1]
            scores.append(logp.gather(1, row[0, len(ids) :, None]).squeeze(1))
    return torch.cat(scores)
