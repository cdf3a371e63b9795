"""Lengths of rows, and adapters: what several trainers say in other words."""

from __future__ import annotations

from typing import Any

from dpo_fast.migration.draft import Draft
from dpo_fast.migration.option import listed

NO_LIMIT = 8192  # in place of no limit at all
PEFTS_CHOICE = ["q_proj", "v_proj"]  # of Llama, Mistral, Qwen 2 and 3, Gemma and most others
ALL_LINEAR = "all-linear"


def put_lengths(draft: Draft, name: str, length: int | None, prompt: str | None = None) -> None:
    """The longest row, whose completions lose their end first, as a cut after so many tokens does.

    name: of the option. prompt: of the one that bounds the prompt, if there is one.
    """
    if length is None:
        draft.put("data.max_length", NO_LIMIT, name, comment="no limit there; see below")
        draft.put("data.truncation", "error", name)
        draft.note(
            f"{draft.trainer} cuts no row here. data.max_length needs a number: a row of more tokens stops "
            "the run, and `dpo-fast data` tells the longest."
        )
        return
    draft.put("data.max_length", int(length), name)
    bound = draft[prompt] if prompt else None
    kept = min(int(bound), int(length) - 1) if bound else int(length) - 1
    draft.put(
        "data.max_prompt_length",
        kept,
        *([prompt] if bound else [name]),
        comment="" if bound else "the prompt is kept first, as there",
    )


def put_quantised(
    draft: Draft, bits: int, kind: tuple[str, str], double: tuple[str, bool], *names: str
) -> None:
    """The section model.quantization, where there are adapters.

    kind: the option of the values of 4 bits, and its value. double: that of quantised scales.
    names: of the options that ask for it.
    """
    if not {key for key in draft.keys if key.startswith("model.lora.")} and not _on_adapter(draft):
        for name in names:
            draft.lose(name, "weights of few bits are a base for adapters: set model.lora")
        return
    if bits not in (4, 8):
        for name in names:
            draft.lose(name, "4 and 8 bits a weight are there, of bitsandbytes")
        return
    draft.put(f"model.quantization.load_in_{bits}bit", True, *names)
    if bits == 4:
        draft.put("model.quantization.bnb_4bit_quant_type", kind[1], kind[0])
        draft.put("model.quantization.bnb_4bit_use_double_quant", double[1], double[0])


def _on_adapter(draft: Draft) -> bool:
    return draft.has("adapter_name_or_path") or draft.has("lora_model_dir")


def put_lora(
    draft: Draft,
    values: dict[str, tuple[str, Any]],
    targets: tuple[str, Any],
    everything: tuple[str, ...] = (ALL_LINEAR,),
) -> None:
    """The section model.lora.

    values: key of the section -> the option and its value.
    targets: the option that names the modules, and its value. everything: values that mean all layers.
    """
    for key, (name, value) in values.items():
        if value is not None:
            draft.put(f"model.lora.{key}", value, name)
    name, value = targets
    found = listed(value)
    if not found:
        draft.put(
            "model.lora.target_modules", PEFTS_CHOICE, name, comment="peft's choice for most models"
        )
        draft.note(
            "No modules are named for the adapters, and peft chooses by architecture: q_proj "
            "and v_proj for "
            "most. Look into its table for others, or choose all-linear."
        )
    elif any(str(each) in everything for each in found):
        draft.put("model.lora.target_modules", ALL_LINEAR, name)
    else:
        regular = isinstance(value, str) and len(found) == 1 and not value.isidentifier()
        draft.put("model.lora.target_modules", value if regular else found, name)
    if "model.lora.r" not in draft.keys:  # the section must be there
        draft.put("model.lora.r", 16)
