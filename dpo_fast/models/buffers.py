"""Buffers of a model in the dtypes that its class gives them, where ZeRO-3 shards it while it loads.

There DeepSpeed makes every number of one dtype. In bf16 the biases by which LFM2-MoE and ZAYA choose
experts were rounded, and tokens went to other experts: DeepSpeed keeps those that transformers lists, and
theirs are not. In fp32 RecurrentGemma's factor of embeddings was no bf16 number, as it is elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed


def kept_in_fp32(skeleton: PreTrainedModel) -> list[str]:
    """Patterns for DeepSpeed's `keep_in_fp32_modules`: the ends of names, and what transformers lists.

    skeleton: the model as its class makes it, in the dtype of a run in bf16.
    """
    wide = {
        name.rsplit(".", 1)[-1]
        for name, buffer in skeleton.named_buffers()
        if buffer.dtype == torch.float32
    }
    listed = {
        each
        for module in skeleton.modules()
        for each in getattr(module, "_keep_in_fp32_modules_strict", None) or ()
    }
    return sorted(wide | listed)


def narrow_buffers(model: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    """Give a loaded model's buffers the dtypes of those that are narrower in a skeleton, in place."""
    dtypes = {name: buffer.dtype for name, buffer in skeleton.named_buffers()}
    for name, buffer in model.named_buffers():
        dtype = dtypes.get(name, buffer.dtype)
        if dtype.is_floating_point and dtype.itemsize < buffer.dtype.itemsize:
            buffer.data = buffer.data.to(dtype)


@contextlib.contextmanager
def unsharded() -> Iterator[None]:
    """A context in which transformers shards nothing of what it makes."""
    kept = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = kept
