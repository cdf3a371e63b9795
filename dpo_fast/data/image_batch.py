"""The images of a micro-batch: every distinct one once, and where its tokens lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class ImageBatch:
    """D distinct images, and their I occurrences among the B * L positions of `input_ids`.

    inputs: what the model's processor makes of the distinct images, in their order, by the names of the
        model's arguments: `pixel_values`, and by model `image_grid_thw`, `pixel_attention_mask`,
        `image_sizes` and so on. Floats are fp32.
    tokens_D: int64, image tokens of each distinct image: the rows that it fills in the flattened hidden
        states. An image may have other tokens between them, such as those that end a row of patches.
    order_I: int64, the distinct image of every occurrence, along the flattened `input_ids`.
    image_tokens_N: bool [B * L], positions that an image fills. The image tokens of occurrence i are the
        next `tokens_D[order_I[i]]` of them.
    token_id: the token that `input_ids` has there.

    A prompt that sequences share has its images once; in layouts that repeat it they occur as often.
    """

    inputs: dict[str, Tensor]
    tokens_D: Tensor
    order_I: Tensor
    image_tokens_N: Tensor
    token_id: int

    def to(self, device: torch.device | str) -> ImageBatch:
        """The images on another device."""
        names = ("tokens_D", "order_I", "image_tokens_N")
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        inputs = {name: each.to(device, non_blocking=True) for name, each in self.inputs.items()}
        return replace(self, **tensors, inputs=inputs)
