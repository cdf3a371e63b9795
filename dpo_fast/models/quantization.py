"""Models whose weights are quantised while they load (bitsandbytes), for adapters on top: QLoRA.

The paper is arXiv 2305.14314. Its adapters and norms are in the dtype of the run here, as TRL has them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from typing import TYPE_CHECKING, Any

import torch

from dpo_fast.errors import UserError
from dpo_fast.models.adapter_targets import layers_never_called
from dpo_fast.models.checkpoint import HEADS
from dpo_fast.models.precision import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dpo_fast.models.config import ModelSection
    from dpo_fast.models.quantization_section import QuantizationSection

LEAST = (0, 46, 1)  # of bitsandbytes: older ones know GPUs of NVIDIA alone


def check_quantization(section: ModelSection, device: torch.device) -> None:
    """Check that bitsandbytes is there and serves a device. Nothing is loaded.

    Raises:
        UserError: naming the option and the remedy.
    """
    options = section.quantization
    if options is None:
        return
    option = f"model.quantization.load_in_{options.bits}bit=true"
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{option} needs the package bitsandbytes, which is not installed: pip install bitsandbytes, "
            "or remove model.quantization"
        ) from None
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < LEAST:
        least = ".".join(map(str, LEAST))
        raise UserError(f"{option} needs bitsandbytes {least} or newer, and {version} is installed")
    if options.bits == 8 and device.type == "cpu":
        raise UserError(
            f"{option} is for GPUs, and there is none here; take load_in_4bit, which also runs on a CPU, "
            "or remove model.quantization"
        )


def loading_options(section: ModelSection, model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise a model while it loads; {} for one that is not.

    model: the same one without quantisation; on the meta device it will do.
    """
    options = section.quantization
    if options is None:
        return {}
    from transformers import BitsAndBytesConfig

    check_quantization(section, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    common = {"llm_int8_skip_modules": kept_whole(model, options)}
    if options.load_in_8bit:
        threshold = options.llm_int8_threshold
        known = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, **common)
        return {"quantization_config": known}
    dtypes = DTYPES | {"fp16": torch.float16}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=options.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtypes[options.bnb_4bit_compute_dtype or section.precision],
            **common,
        )
    }


def kept_whole(model: torch.nn.Module, options: QuantizationSection) -> list[str]:
    """Ends of names of the linear layers that are not quantised.

    They are those that the options name, heads, and layers whose weight a mixer reads without calling
    them, such as Mamba's dt_proj: it would multiply by the packed numbers.
    """
    read = sorted({name.split(".")[-1] for name in layers_never_called(model)})
    return list(dict.fromkeys([*(options.llm_int8_skip_modules or []), *HEADS, *read]))


def quantised_elements(
    model: torch.nn.Module, options: QuantizationSection | None
) -> tuple[int, int]:
    """Weights that are quantised while a model loads, and the elements of the parameters they are in.

    model: loaded, or on the meta device, where the two are the same number.
    """
    weights = held = 0
    if options is None:
        return weights, held
    kept = kept_whole(model, options)
    for name, module in model.named_modules():
        skipped = ".lora_" in name or any(f".{each}." in f".{name}." for each in kept)
        if isinstance(module, torch.nn.Linear) and not skipped:
            weights += module.in_features * module.out_features
            held += module.weight.numel()
    return weights, held


def bytes_of_weight(options: QuantizationSection) -> float:
    """Bytes of a quantised weight, with its share of the scales: one fp32 for 64, or 8 bits for 64."""
    if options.load_in_8bit:
        return 1.0
    return 0.5 + (1 / 64 + 4 / 64 / 256 if options.bnb_4bit_use_double_quant else 4 / 64)


def quantised_identity(identity: str, options: QuantizationSection | None) -> str:
    """The identity of a model as it is loaded: quantised weights give other log-probs."""
    if options is None:
        return identity
    used = options.model_dump(mode="json", exclude_defaults=True)
    text = json.dumps({"weights": identity, "quantization": used}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def settle(model: torch.nn.Module) -> None:
    """Have 4-bit layers compute alike in training and evaluation, and be loaded as they are saved.

    On a CPU with AVX512_BF16 bitsandbytes packs the weights of a layer anew in its first evaluation, for
    a kernel that rounds otherwise and has no gradient. References are evaluations. And it saves the scales
    of a layer under names that it does not load; they are made again from the same base.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.register_state_dict_post_hook(_without_scales)


def _without_scales(module: torch.nn.Module, state: dict, prefix: str, _) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]
