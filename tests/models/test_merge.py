"""An adapter merged into its base, in the dtype that was asked for."""

import pytest
import torch
from safetensors.torch import load_file

peft = pytest.importorskip("peft")
from transformers import AutoModelForCausalLM

from dpo_fast.models.config import ModelSection
from dpo_fast.models.merge import write_merged
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
