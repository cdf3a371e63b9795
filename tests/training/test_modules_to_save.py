"""Modules that are trained whole beside adapters: norms, embeddings and the head, tied or not."""

import math

import pytest
import torch

pytest.importorskip("deepspeed")

from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_fast.errors import UserError
from dpo_fast.models import load_model
from dpo_fast.models.config import ModelSection
from tests.support import ranks
from tests.support.architectures import alone
from tests.support.checkpoints import write_checkpoint
from tests.support.metrics import series
from tests.support.models import changed, run_tree, write_model, write_pairs

CASES = {  # modules, tied
    "norm": (["norm"], False),
    "head": (["lm_head"], False),
    "embeddings": (["embed_tokens"], False),
    "both": (["embed_tokens", "lm_head"], False),
    "tied, embeddings": (["embed_tokens"], True),
    "tied, head": (["lm_head"], True),
    "tied, both": (["embed_tokens", "lm_head"], True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_model(folder / "model")
    write_model(folder / "tied", tied=True)
    write_pairs(folder / "pairs.jsonl", 8)
    return folder


@pytest.fixture(scope="module", params=[(1, 0), (2, 3)], ids=["one rank", "two ranks, stage 3"])
def runs(request, folder):
    count, stage = request.param
    root, trees = folder / f"runs-{count}", []
    for name, (modules, tied) in CASES.items():
        for provider in ("cached", "adapter_off"):
            tree = run_tree(
                folder, max_steps=3, num_train_epochs=3, micro_batch_size=2, merge_lora=True
            )
            tree["model"] |= {"path": str(folder / ("tied" if tied else "model"))}
            tree["model"]["lora"] = {"r": 2, "alpha": 4, "modules_to_save": modules}
            tree |= {"parallel": {"zero_stage": stage}, "reference": {"provider": provider}}
            trees.append(changed(tree, root / name / provider))
    ranks.train(trees, count)
    return root


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_whole_modules_are_trained_and_exported(folder, runs, name):
    modules, tied = CASES[name]
    curves = {p: series(runs / name / p) for p in ("cached", "adapter_off")}
    assert curves["cached"][1] == pytest.approx(math.log(2), abs=1e-6)
    assert curves["cached"][3] < 0.69
    # With the adapters off the modules are the original ones.
    assert curves["adapter_off"] == pytest.approx(curves["cached"], abs=1e-5)
    if runs.name == "runs-2":
        one = series(folder / "runs-1" / name / "cached")
        assert curves["cached"] == pytest.approx(one, abs=1e-5), "as without shards"
    final = runs / name / "cached" / "final"
    base = AutoModelForCausalLM.from_pretrained(folder / ("tied" if tied else "model"))
    before, saved = base.state_dict(), load_file(final / "adapter_model.safetensors")
    wanted = {"embed_tokens", "lm_head"} if tied else set(modules)
    found = {key.removeprefix("base_model.model.") for key in saved if "lora_" not in key}
    assert {key.split(".")[-2].replace("input_layernorm", "norm") for key in found} >= wanted
    for key in found:
        assert not torch.equal(saved[f"base_model.model.{key}"], before[key]), key
    if tied:
        ends = [
            saved[f"base_model.model.{key}"]
            for key in ("lm_head.weight", "model.embed_tokens.weight")
        ]
        assert torch.equal(*ends)
    with torch.no_grad():
        start = alone(base.eval())
        adapted = alone(PeftModel.from_pretrained(base, final).eval())
        merged = alone(AutoModelForCausalLM.from_pretrained(final / "merged").eval())
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4)
    assert (adapted - start).abs().max() > 1e-3


def load(path, modules, **lora):
    lora = {"r": 2, "alpha": 4, "modules_to_save": modules} | lora
    return load_model(ModelSection(path=str(path), dtype="fp32", lora=lora), attention="sdpa")


@pytest.mark.parametrize("modules", [["lm_head"], ["norm", "embed_tokens"]])
def test_the_section_stays_as_it_was_given(folder, modules):
    """A checkpoint notes it, and is resumed with the same section only."""
    section = ModelSection(
        path=str(folder / "tied"), dtype="fp32", lora={"modules_to_save": list(modules)}
    )
    before = section.model_dump()
    load_model(section, attention="sdpa")
    assert section.model_dump() == before and section.lora.modules_to_save == modules


def test_what_cannot_be_trained_whole_is_refused_by_name(folder, tmp_path):
    with pytest.raises(
        UserError, match="modules_to_save=embed: the model has no such module.*lm_head"
    ):
        load(folder / "model", ["norm", "embed"])
    source = write_checkpoint(tmp_path / "model", "gemma3, image and text")
    with pytest.raises(UserError, match="modules_to_save=vision_tower: no text goes through it"):
        load(source, ["vision_tower"], target_modules=["q_proj"])
    with pytest.raises(UserError, match="name it in model.lora.modules_to_save"):
        load(folder / "model", None, target_modules=["lm_head"])
