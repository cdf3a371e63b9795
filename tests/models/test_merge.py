"""An adapter merged into its base, in the dtype that was asked for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")
from transformers import AutoModelForCausalLM

from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel
from dpo_fast.models.config import LoraSection, ModelSection
from dpo_fast.models.lora import add_lora
from dpo_fast.models.merge import check_merges, write_merged
from tests.support.adapters import write_adapter
from tests.support.hybrids import make
from tests.support.models import write_model

IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("merge") / "base")


@pytest.fixture(scope="module")
def adapter(base):
    """An adapter that moves logits a little: less than rounding the base to bf16 would."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    model.save_pretrained(base.parent / "adapter")
    return base.parent / "adapter"


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits.double()


@pytest.mark.parametrize("trained_in", ["bf16", "fp32"])
def test_merged_weights_have_the_dtype_of_the_base_whatever_the_run_has(
    base, adapter, tmp_path, trained_in
):
    section = ModelSection(path=str(base), dtype=trained_in)
    assert write_merged(section, adapter, tmp_path / "merged") == "float32"
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = logits(peft.PeftModel.from_pretrained(plain, adapter))
    before = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    moved = (wanted - before).abs().max()
    assert (logits(merged) - wanted).abs().max() < 1e-2 * moved
    in_bf16 = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert (
        logits(in_bf16) - wanted
    ).abs().max() > moved  # what a base in fp32 must not be rounded to


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_the_dtype_that_is_asked_for(base, adapter, tmp_path, name):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    section = ModelSection(path=str(base), dtype="fp32")
    assert write_merged(section, adapter, tmp_path / "merged", name) == str(dtype).split(".")[1]
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == dtype


ROUNDED = [("bf16", {}), ("bf16", {"use_rslora": True}), ("bf16", {"use_dora": True})]
ROUNDED += [("fp16", {}), ("fp16", {"use_dora": True}), ("fp32", {}), ("fp32", {"use_dora": True})]


@pytest.mark.parametrize(("name", "options"), ROUNDED, ids=str)
def test_weights_are_rounded_once(base, tmp_path, name, options):
    """Against the formulas in fp64: no further from them than the nearest number of the dtype."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    write_adapter(tmp_path / "adapter", base, lora_dropout=0, **options)
    write_merged(ModelSection(path=str(base)), tmp_path / "adapter", tmp_path / "merged", name)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    plain = load_file(base / "model.safetensors")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    scaling = 8 / (2 if options.get("use_rslora") else 4)  # alpha / sqrt(r), alpha / r
    layers = {name.split(".lora_")[0] for name in factors}
    assert len(layers) == 6
    for layer in layers:
        name = layer.removeprefix("base_model.model.") + ".weight"
        assert merged[name].dtype == dtype
        first, second = (factors[f"{layer}.lora_{part}.weight"].double() for part in "AB")
        # The base is loaded in the dtype that the result is written in.
        weight = plain[name].to(dtype).double() + scaling * second @ first
        if options.get("use_dora"):
            lengths = factors[f"{layer}.lora_magnitude_vector"].double()
            weight = lengths[:, None] * weight / weight.norm(dim=1, keepdim=True)
        error = (merged[name].double() - weight).abs()
        assert (error <= torch.finfo(dtype).eps * weight.abs() + 1e-7).all(), name
        nearest = (weight.to(dtype).double() - weight).abs()
        # Products in fp32 are rounded themselves.
        allowed = 1.001 if dtype == torch.bfloat16 else 1.01 if dtype == torch.float16 else 4
        assert error.sum() <= allowed * nearest.sum(), "rounded once"


def test_what_fp16_cannot_hold_is_told(base, adapter, tmp_path):
    folder = write_model(tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="dtype fp16: .*model.norm.weight is beyond.*bf16 or fp32"):
        write_merged(ModelSection(path=str(folder)), adapter, tmp_path / "merged", "fp16")
    assert not (tmp_path / "merged").exists()


def test_what_an_adapter_does_not_change_keeps_its_bytes(base, adapter, tmp_path):
    """A checkpoint in bf16 with some tensors in fp32, as recurrent layers have them."""
    folder = write_model(tmp_path / "mixed")
    tensors = load_file(folder / "model.safetensors")
    exact = ("norm.weight", "o_proj.weight")
    mixed = {
        name: (each + torch.rand_like(each) / 3 if name.endswith(exact) else each.bfloat16())
        for name, each in tensors.items()
    }
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    section = ModelSection(path=str(folder), dtype="fp32")
    assert write_merged(section, adapter, tmp_path / "merged") == "bfloat16"
    out = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: each.dtype for name, each in out.items()} == {
        name: each.dtype for name, each in mixed.items()
    }
    changed = {name for name in out if not torch.equal(out[name], mixed[name])}
    assert changed and all("q_proj" in name for name in changed)
    write_merged(section, adapter, tmp_path / "in fp32", "fp32")
    found = load_file(tmp_path / "in fp32" / "model.safetensors").values()
    assert {each.dtype for each in found} == {torch.float32}


def test_layers_that_share_a_weight_keep_their_adapters_apart(tmp_path):
    """Zamba's blocks have one weight and an adapter each: a merged weight would hold the sum of all."""
    make("zamba").save_pretrained(tmp_path / "base")
    section = ModelSection(path=str(tmp_path / "base"), dtype="fp32")
    shared = r".*shared_transf.*"
    for excluded in (None, shared):
        model = AutoModelForCausalLM.from_pretrained(section.path, dtype=torch.float32)
        scoring = ScoringModel(model)
        add_lora(scoring, LoraSection(r=2, exclude_modules=excluded))
        scoring.model.save_pretrained(tmp_path / str(bool(excluded)))
        if excluded:
            check_merges(scoring.model, "train.merge_lora=true")
    with pytest.raises(UserError, match="shared_transf.* have one weight.*exclude_modules"):
        write_merged(section, tmp_path / "False", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    write_merged(section, tmp_path / "True", tmp_path / "merged")
