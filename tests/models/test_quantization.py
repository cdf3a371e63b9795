"""QLoRA: 4 bits a weight on a CPU, against the same layers with the weights that they stand for."""

import importlib.util
from dataclasses import replace
from unittest.mock import ANY

import pytest
import torch

pytest.importorskip("peft")

from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_fast.data.batch import collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models import load_model, quantization
from dpo_fast.models.config import LoraSection, ModelSection
from dpo_fast.models.lora import add_lora
from dpo_fast.models.merge import write_merged
from dpo_fast.models.quantization import (
    bytes_of_weight,
    check_quantization,
    quantised_elements,
    quantised_identity,
)
from dpo_fast.models.quantization_section import QuantizationSection
from dpo_fast.models.scoring import ScoringModel, forward_arguments
from dpo_fast.models.skeleton import scoring_skeleton
from dpo_fast.training.memory import sizes_of
from tests.support import hybrids
from tests.support.adapters import write_adapter
from tests.support.architectures import TREES, alone, slopes
from tests.support.models import write_model

has_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed, and BITSANDBYTES names no folder with it",
)
FOUR = {"load_in_4bit": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    write_model(folder / "model")
    return folder


def section(folder, **options) -> ModelSection:
    options = {"lora": {"r": 2}, "quantization": FOUR, "dtype": "fp32"} | options
    return ModelSection(path=str(folder / "model"), **options)


def logps(scoring, layout="padded"):
    return scoring(**forward_arguments(collate_trees(TREES, layout)))["logp"]


def dequantised(folder, scoring):
    """A plain model with the weights that quantised layers compute with."""
    import bitsandbytes.functional as known

    plain = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    layers = dict(scoring.causal_lm.named_modules())
    changed = 0
    for name, module in plain.named_modules():
        base = getattr(layers.get(name), "base_layer", None)
        if base is not None and type(base.weight).__name__ == "Params4bit":
            module.weight.data = known.dequantize_4bit(base.weight.data, base.weight.quant_state)
            changed += 1
    assert changed == 14
    return plain.eval()


@has_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4", "plain scales", "dora", "pissa"])
def test_log_probs_and_gradients_are_those_of_the_weights_that_it_stands_for(folder, kind):
    options = FOUR | ({"bnb_4bit_quant_type": kind} if kind in ("nf4", "fp4") else {})
    options |= {"bnb_4bit_use_double_quant": False} if kind == "plain scales" else {}
    lora = {"r": 2} | ({"use_dora": True} if kind == "dora" else {})
    lora |= {"init_lora_weights": "pissa"} if kind == "pissa" else {}
    scoring = load_model(section(folder, quantization=options, lora=lora), attention="sdpa")
    plain = dequantised(folder, scoring)
    start = alone(plain)
    torch.testing.assert_close(logps(scoring), start, rtol=0, atol=1e-5)
    full = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    assert (alone(full) - start).abs().max() > 0.01, "nothing was quantised"
    other = ScoringModel(plain)  # the same adapters on the plain weights
    add_lora(other, LoraSection(**lora))
    known = dict(other.named_parameters())
    trained = {n: p for n, p in scoring.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for index, parameter in enumerate(trained.values()):
            draw = torch.Generator().manual_seed(index)
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
        for name, parameter in scoring.named_parameters():
            if ".default." in name or ".taken." in name:
                known[name].copy_(parameter)
    wanted = logps(other.eval())
    found = logps(scoring)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (found - start).abs().max() > 0.01
    expected = slopes(wanted, [known[name] for name in trained])
    for name, one, two in zip(trained, slopes(found, trained.values()), expected):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        scoring.eval()
        one = logps(scoring)
        scoring.train()
        assert torch.equal(logps(scoring), one), "alike in training and evaluation"
        with scoring.as_started():
            torch.testing.assert_close(logps(scoring), start, rtol=0, atol=1e-5)


@has_bitsandbytes
def test_what_is_not_quantised(folder):
    """The head, embeddings and norms; what a state dict holds can be loaded again."""
    scoring = load_model(section(folder), attention="sdpa")
    assert scoring.causal_lm.get_output_embeddings().weight.dtype == torch.float32
    kept = section(folder, quantization=FOUR | {"llm_int8_skip_modules": ["down_proj"]})
    names = load_model(kept, attention="sdpa").causal_lm.named_parameters()
    small = {name.split(".")[-3] for name, p in names if p.dtype == torch.uint8}
    assert small == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    scoring.load_state_dict(scoring.state_dict())


@has_bitsandbytes
def test_layers_whose_weight_a_mixer_reads_are_not_quantised(tmp_path):
    """Mamba multiplies by the weight of dt_proj itself, which would be packed."""
    hybrids.make("mamba").save_pretrained(tmp_path / "model")
    scoring = load_model(section(tmp_path), attention="eager")
    names = scoring.causal_lm.named_parameters()
    packed = {part for name, p in names if p.dtype == torch.uint8 for part in name.split(".")}
    assert "in_proj" in packed and "dt_proj" not in packed
    assert logps(scoring, "shared_prefix").isfinite().all()


@has_bitsandbytes
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_the_merged_model_is_the_one_that_was_trained(folder, tmp_path, options):
    write_adapter(tmp_path / "adapter", folder / "model", lora_dropout=0, **options)
    adapter = ModelSection(path=str(tmp_path / "adapter"), dtype="fp32", quantization=FOUR)
    scoring = load_model(adapter, attention="sdpa")
    assert write_merged(adapter, tmp_path / "adapter", tmp_path / "merged", "fp32") == "float32"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(alone(merged.eval()), logps(scoring), rtol=0, atol=5e-5)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_options_that_cannot_be_honoured_are_refused_by_name(folder, monkeypatch):
    def told(**options) -> str:
        with pytest.raises(ValidationError) as error:
            QuantizationSection(**options)
        return str(error.value)

    assert "set one of them to true" in told()
    assert "load_in_8bit=true; set one" in told(load_in_4bit=True, load_in_8bit=True)
    assert "is an option of load_in_4bit" in told(load_in_8bit=True, bnb_4bit_quant_type="fp4")
    assert "is an option of load_in_8bit" in told(load_in_4bit=True, llm_int8_threshold=3.0)
    with pytest.raises(ValidationError, match="set model.lora to train adapters on them"):
        section(folder, lora=None)
    cpu, versions = torch.device("cpu"), {"bitsandbytes": "0.50.2"}

    def version(name):
        if name not in versions:
            raise quantization.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(quantization.importlib.metadata, "version", version)
    check_quantization(section(folder), cpu)
    eight = section(folder, quantization={"load_in_8bit": True})
    check_quantization(eight, torch.device("cuda"))
    with pytest.raises(UserError, match="load_in_8bit=true is for GPUs"):
        check_quantization(eight, cpu)
    versions["bitsandbytes"] = "0.43.0"
    with pytest.raises(UserError, match="needs bitsandbytes 0.46.1 or newer, and 0.43.0"):
        check_quantization(section(folder), cpu)
    versions.clear()
    with pytest.raises(UserError, match="which is not installed: pip install bitsandbytes"):
        check_quantization(section(folder), cpu)
    check_quantization(section(folder, quantization=None), cpu)


def test_a_quantised_model_is_another_model():
    four, eight = QuantizationSection(**FOUR), QuantizationSection(load_in_8bit=True)
    same = QuantizationSection(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    known = {quantised_identity("abc", each) for each in (None, four, eight)}
    assert len(known) == 3 and quantised_identity("abc", None) == "abc"
    assert quantised_identity("abc", four) == quantised_identity("abc", same)


def test_what_quantised_weights_take(folder):
    """As many elements on the meta device; fewer bytes."""
    quantised = scoring_skeleton(section(folder))
    weights, held = quantised_elements(quantised.causal_lm, QuantizationSection(**FOUR))
    kept = QuantizationSection(load_in_4bit=True, llm_int8_skip_modules=["mlp"])
    layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48
    assert weights == held == 2 * layer
    assert quantised_elements(quantised.causal_lm, kept)[0] == 2 * (layer - 3 * 32 * 48)
    assert quantised_elements(quantised.causal_lm, None) == (0, 0)
    assert bytes_of_weight(QuantizationSection(**FOUR)) == pytest.approx(0.5 + 1 / 64, abs=1e-3)
    assert sizes_of(quantised, {}, 0, kept).quantised == 2 * (layer - 3 * 32 * 48)


@has_bitsandbytes
def test_a_loaded_model_has_as_many(folder):
    loaded, options = load_model(section(folder), attention="sdpa"), QuantizationSection(**FOUR)
    skeleton = sizes_of(scoring_skeleton(section(folder)), {}, 0, options)
    assert sizes_of(loaded, {}, 0, options) == replace(skeleton, gathered=ANY)
