"""Checkpoints whose weights are stored quantised: they cannot be trained whole, nor written back."""

from __future__ import annotations

from transformers import PretrainedConfig

from dpo_fast.errors import UserError
from dpo_fast.models.config import ModelSection

# What makes transformers give plain weights: they are known to it while it loads.
PLAIN = {"mxfp4": "Mxfp4Config(dequantize=True)", "fp8": "FineGrainedFP8Config(dequantize=True)"}


def check_whole_weights(config: PretrainedConfig, section: ModelSection, merged: bool) -> None:
    """Check that the weights that are trained and written are not quantised. Adapters beside them may be.

    The trained tensors would have other names and forms than the checkpoint has, and its configuration
    would have them read as quantised.

    merged: the adapter is written merged into the weights, too.

    Raises:
        UserError: naming the method and the remedy.
    """
    quantised = getattr(config, "quantization_config", None)
    if quantised is None or (section.has_adapters and not merged):
        return
    known = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method = str(getattr(known.get("quant_method"), "value", known.get("quant_method")))
    how = "write it with plain weights to another folder and name that"
    if method in PLAIN:
        how += (
            f": AutoModelForCausalLM.from_pretrained(path, quantization_config={PLAIN[method]})"
            ".save_pretrained(folder)"
        )
    option = "train.merge_lora=true" if section.has_adapters else f"model.path={section.path}"
    raise UserError(
        f"{option}: the weights of this model are quantised (quantization_config, {method}), and quantised "
        f"weights are neither trained nor written back; {how}. Adapters alone (model.lora) can be trained "
        "on a quantised model"
    )
