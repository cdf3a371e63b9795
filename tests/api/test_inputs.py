"""Models and tokenizers as files, and names told from objects."""

import json
from pathlib import Path

import pytest

from dpo_fast.api.inputs import (
    changed_weight,
    check_trainable,
    check_unquantised,
    is_name,
    model_folder,
    uncompiled,
)
from dpo_fast.api.processing import tokenizer_folder
from dpo_fast.errors import UserError


def test_names_are_told_from_objects_and_other_objects_are_refused(tmp_path):
    assert is_name("a") and is_name(Path("a")) and is_name(["a", "b"])
    assert not is_name([]) and not is_name([{}]) and not is_name(3)
    with pytest.raises(UserError, match="model is a int: expected a model of transformers"):
        model_folder(3, tmp_path, "model")
    with pytest.raises(UserError, match="processing_class is a int"):
        tokenizer_folder(3, tmp_path)
    with pytest.raises(UserError, match="processing_class is the class Path"):
        tokenizer_folder(Path, tmp_path)


def test_an_adapter_on_weights_that_its_base_does_not_have_is_refused(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from tests.support.models import write_model

    write_model(tmp_path / "model")

    def adapted(change=lambda base: base, **options):
        base = change(AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options))
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))

    def trained(base):
        with torch.no_grad():
            base.model.layers[1].self_attn.q_proj.weight[0, 0] += 1e-3
        return base

    # As it was loaded, rounded, and rounded and widened again.
    assert model_folder(adapted(), tmp_path, "model").is_dir()
    rounded = adapted(dtype=torch.bfloat16).get_base_model()
    assert changed_weight(rounded, str(tmp_path / "model")) is None
    assert changed_weight(rounded.float(), str(tmp_path / "model")) is None
    with pytest.raises(UserError, match=r"layers.1.self_attn.q_proj.weight differs.*peft_config"):
        model_folder(adapted(trained), tmp_path, "model")


def test_a_model_that_cannot_be_saved_is_told_with_the_reason(tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from tests.support.models import write_model

    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model"))
    model.generation_config.temperature = 0.3
    with pytest.raises(UserError, match="model cannot be saved.*temperature.*Mend it until"):
        model_folder(model, tmp_path, "model")
    with pytest.raises(UserError, match="model is the class AutoModelForCausalLM: expected"):
        model_folder(AutoModelForCausalLM, tmp_path, "model")


def test_of_several_adapters_the_active_one_is_taken_whatever_its_name(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from tests.support.models import write_model

    base = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    model.add_adapter("sft", config)
    for name in ("sft", "default"):
        model.set_adapter(name)
        folder = model_folder(model, tmp_path, "model")
        assert {each.name for each in folder.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        own = peft.get_peft_model_state_dict(model, adapter_name=name)
        kept = load_file(folder / "adapter_model.safetensors")
        assert all(torch.equal(kept[each], own[each]) for each in own.keys() | kept.keys())
    model.base_model.set_adapter(["sft", "default"])
    with pytest.raises(UserError, match=r"2 active adapters \(sft, default\).*set_adapter"):
        model_folder(model, tmp_path, "model")


def test_a_model_that_is_frozen_in_part_is_refused_and_one_inside_a_compiled_is_taken(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from tests.support.models import write_model

    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model"))
    check_trainable(model, "model")
    assert uncompiled(torch.compile(model)) is model and uncompiled("name") == "name"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    check_trainable(adapted, "model")
    model.is_quantized = True
    with pytest.raises(UserError, match="adapter on quantised weights.*quantization="):
        check_unquantised(adapted, "model")
    file = tmp_path / "model/config.json"
    stored = {"quantization_config": {"quant_method": "fp8"}}  # and so it is loaded again
    file.write_text(json.dumps(json.loads(file.read_text()) | stored))
    check_unquantised(adapted, "model")
    model.is_quantized = False
    check_unquantised(adapted, "model")
    merged = adapted.merge_and_unload()  # frozen throughout
    check_trainable(merged, "model")
    merged.requires_grad_(True).model.embed_tokens.requires_grad_(False)
    with pytest.raises(
        UserError, match="1 of 21, model.embed_tokens.weight the first.*peft_config"
    ):
        check_trainable(merged, "model")
