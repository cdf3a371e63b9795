"""The exported folder is the one that came in, with other weights in it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, Gemma3TextConfig

from dpo_fast.models import load_model
from dpo_fast.models.checkpoint import weight_files
from dpo_fast.models.config import ModelSection
from dpo_fast.models.load import auto_class
from dpo_fast.models.save import copy_files, note_vocabulary
from dpo_fast.models.save import write_model as write_over
from dpo_fast.training.config import build_config
from dpo_fast.training.export import export, gather_trained
from dpo_fast.training.model_card import CARD
from tests.support import ranks, tiny
from tests.support.checkpoints import BESIDE, MODELS, shard, tensors_of, write_checkpoint
from tests.support.models import run_tree, write_model, write_pairs

LORA = {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj", "k_proj"]}
IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module", params=MODELS)
def source(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "model", request.param)


@torch.no_grad()
def exported(folder: Path, target: Path, **sections):
    """Load as a run does, change all that is trained, export. Returns the model's own logits."""
    tree = run_tree(folder.parent)
    tree["model"]["path"] = str(folder)
    for name, options in sections.items():
        tree[name] = tree.get(name, {}) | options
    config = build_config(tree, "tree")
    model = load_model(config.model, attention="eager").eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1.5).add_(0.01)
    export(model, config, target)
    return model.model(input_ids=IDS).logits


@torch.no_grad()
def logits(folder: Path, adapter: Path | None = None):
    kind = auto_class(AutoConfig.from_pretrained(folder))
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    return model.eval()(input_ids=IDS).logits


def files_of(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def assert_kept(source: Path, target: Path, weights: bool = True) -> None:
    """All but the weights is as it was, byte for byte; the card is that of the new model."""
    assert files_of(target) == files_of(source) if weights else files_of(target) >= files_of(source)
    for name in files_of(source):
        if name == CARD:
            assert "library_name: transformers" in (target / name).read_text()
        elif not name.endswith((".safetensors", ".index.json")):
            assert (target / name).read_bytes() == (source / name).read_bytes(), name


def test_all_that_came_in_goes_out(source, tmp_path):
    expected = exported(source, tmp_path / "out")
    assert_kept(source, tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert after.keys() == before.keys()
    assert {k: (v.dtype, v.shape) for k, v in after.items()} == {
        k: (v.dtype, v.shape) for k, v in before.items()
    }
    same = {name for name in before if torch.equal(before[name], after[name])}
    seen = ("visual", "vision", "multi_modal")
    assert same == {name for name in before if any(part in name for part in seen)}
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=0, atol=0)


def test_a_merged_adapter_goes_out_in_the_folder_of_its_base(source, tmp_path):
    expected = exported(source, tmp_path / "out", model={"lora": LORA}, train={"merge_lora": True})
    adapter, merged = tmp_path / "out", tmp_path / "out" / "merged"
    torch.testing.assert_close(logits(source, adapter), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert (logits(source) - expected).abs().max() > 1e-2
    before, after = tensors_of(source), tensors_of(merged)
    assert after.keys() == before.keys()
    assert_kept(source, merged)
    # The adapter has what makes texts into ids, and no configuration that would make it a model.
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (adapter / name).read_bytes() == (source / name).read_bytes()
    assert not (adapter / "config.json").exists() and not (adapter / "modeling_own.py").exists()


@pytest.mark.parametrize("name", ["mixtral, fused experts", "gemma3, image and text"])
def test_shards_stay_shards(name, tmp_path):
    source = write_checkpoint(tmp_path / "model", name)
    shard(source, 3)
    expected = exported(source, tmp_path / "out")
    assert_kept(source, tmp_path / "out")
    index = [
        json.loads((f / "model.safetensors.index.json").read_text())
        for f in (source, tmp_path / "out")
    ]
    assert index[0]["weight_map"] == index[1]["weight_map"]
    assert index[1]["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in tensors_of(tmp_path / "out").values()
    )
    assert torch.equal(logits(tmp_path / "out"), expected)


RENAMED = {
    # The names of older checkpoints, which transformers still loads.
    "gemma3, image and text": lambda name: (
        name.replace("model.language_model", "language_model.model")
        .replace("model.vision_tower", "vision_tower")
        .replace("model.multi_modal_projector", "multi_modal_projector")
    ),
    # The checkpoint of a base model, without the prefix.
    "llama, tied": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("name", RENAMED)
def test_other_names_of_the_same_tensors_stay(name, tmp_path):
    source = write_checkpoint(tmp_path / "model", name)
    before = logits(source)
    shard(source, 1, RENAMED[name])
    torch.testing.assert_close(logits(source), before)
    expected = exported(source, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), expected)
    kept, out = tensors_of(source), tensors_of(tmp_path / "out")
    assert len(out) == len(kept), "no tensor is there twice, and none is lost"


def test_tensors_that_no_model_loads_stay(tmp_path):
    source = write_checkpoint(tmp_path / "model", "llama")
    shard(source, 1, lambda name: name)
    file = next(source.glob("model-*.safetensors"))
    tensors = load_file(file) | {"mtp.layers.0.weight": torch.ones(3), "inv_freq": torch.ones(2)}
    save_file(tensors, file, {"format": "pt"})
    exported(source, tmp_path / "out")
    out = tensors_of(tmp_path / "out")
    assert torch.equal(out["mtp.layers.0.weight"], torch.ones(3)) and len(out) == len(tensors)


def test_pickled_weights_become_safetensors(tmp_path):
    source = write_checkpoint(tmp_path / "model", "llama, tied")
    torch.save(tensors_of(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    expected = exported(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert torch.equal(logits(tmp_path / "out"), expected)


@pytest.mark.parametrize("beside", [False, True])
def test_a_file_that_the_configuration_names_is_the_one(beside, tmp_path):
    """transformers loads it before any other; the export has the usual name."""
    source = write_checkpoint(tmp_path / "model", "llama")
    named = source / "mine.safetensors"
    (source / "model.safetensors").rename(named)
    if beside:
        other = {name: -tensor for name, tensor in load_file(named).items()}
        save_file(other, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"transformers_weights": named.name}))
    assert weight_files(source) == [named]
    expected = exported(source, tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == load_file(named).keys()
    assert torch.equal(logits(tmp_path / "out"), expected)


def test_numbers_in_a_pickle_are_no_tensors(tmp_path):
    source = write_checkpoint(tmp_path / "model", "llama")
    tensors = tensors_of(source)
    (source / "model.safetensors").unlink()
    torch.save(tensors | {"version": 3}, source / "pytorch_model.bin")
    expected = exported(source, tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors.keys()
    assert torch.equal(logits(tmp_path / "out"), expected)


def test_more_rows_are_noted_where_the_configuration_leaves_the_default_out():
    """As Gemma 3's does on the hub: its text part has no vocab_size."""
    text = Gemma3TextConfig(vocab_size=262_212)
    part = {"model_type": "gemma3_text", "hidden_size": 32}
    for tree in ({"text_config": dict(part)}, dict(part)):
        note_vocabulary(tree, text)
        assert tree.get("text_config", tree)["vocab_size"] == 262_212
    tree = {"text_config": dict(part)}
    note_vocabulary(tree, Gemma3TextConfig())
    assert tree == {"text_config": part}


def test_a_few_tensors_in_fp32_do_not_hide_the_dtype(tmp_path):
    """OLMo-Hybrid keeps A_log in fp32, whatever the rest is in."""
    tiny.write_tiny(tmp_path / "in", "olmo_hybrid", {})
    loaded = load_model(ModelSection(path=str(tmp_path / "in"), dtype="bf16"), attention="eager")
    state = gather_trained(loaded.model)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16, torch.float32}
    write_over(loaded.causal_lm, state, tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_tied_head_that_is_stored_twice_is_trained_twice(tmp_path):
    source = write_checkpoint(tmp_path / "model", "llama, tied")
    tensors = tensors_of(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    expected = exported(source, tmp_path / "out")
    out = tensors_of(tmp_path / "out")
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])
    assert torch.equal(logits(tmp_path / "out"), expected)


def test_pickled_shards_of_before_archives_are_read(tmp_path):
    """As those of GPT-2 and OPT on the hub are, which cannot be mapped."""
    source = write_checkpoint(tmp_path / "model", "llama")
    tensors, places = tensors_of(source), {}
    (source / "model.safetensors").unlink()
    for part in range(2):
        file = f"pytorch_model-{part + 1:05d}-of-00002.bin"
        own = dict(list(tensors.items())[part::2])
        torch.save(own, source / file, _use_new_zipfile_serialization=False)
        places |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": places}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    expected = exported(source, tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors.keys()
    assert torch.equal(logits(tmp_path / "out"), expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_the_trained_weights(stored, tmp_path):
    """What was not trained keeps its own."""
    source = write_checkpoint(tmp_path / "model", "qwen3.5, image and text", stored)
    for dtype, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        out = tmp_path / dtype
        exported(source, out, model={"dtype": dtype})
        for name, tensor in tensors_of(out).items():
            assert tensor.dtype == (stored if "visual" in name else expected), name
        config = json.loads((out / "config.json").read_text())
        assert config["dtype"] == str(expected).removeprefix("torch.")
        before = json.loads((source / "config.json").read_text())
        for tree in (config, before, config["text_config"], before["text_config"]):
            tree.pop("dtype", None)
        assert config == before
        loaded = auto_class(AutoConfig.from_pretrained(out)).from_pretrained(out)
        assert loaded.lm_head.weight.dtype == expected


def test_another_tokenizer_and_template_take_the_place_of_the_models_own(tmp_path):
    source = write_checkpoint(tmp_path / "model", "llama")
    other = write_model(tmp_path / "other", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(other)
    exported(source, tmp_path / "a", model={"tokenizer": str(other)})
    assert AutoTokenizer.from_pretrained(tmp_path / "a").pad_token is None
    assert not (tmp_path / "a" / "chat_template.jinja").exists()
    template = tmp_path / "mine.jinja"
    template.write_text("mine")
    exported(source, tmp_path / "b", data={"chat_template": str(template)})
    assert AutoTokenizer.from_pretrained(tmp_path / "b").chat_template == "mine"
    assert not (tmp_path / "b" / "additional_chat_templates").is_dir() or not any(
        (tmp_path / "b" / "additional_chat_templates").iterdir()
    )
    for folder in ("a", "b"):
        assert (tmp_path / folder / "preprocessor_config.json").read_text() == BESIDE[
            "preprocessor_config.json"
        ]


def test_what_a_trainer_left_is_not_taken_along(tmp_path):
    source = write_checkpoint(tmp_path / "model", "llama")
    for name in (
        "optimizer.pt",
        "trainer_state.json",
        "scheduler.pt",
        "training_args.bin",
        "merged_from.json",
        ".hidden",
    ):
        (source / name).write_text("x")
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_text("x")
    (source / "package").mkdir()
    (source / "package" / "layers.py").write_text("y = 2")
    copy_files(source, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").touch()
    assert files_of(source) - files_of(tmp_path / "out") == {
        *("optimizer.pt", "trainer_state.json", "scheduler.pt", "training_args.bin", ".hidden"),
        "merged_from.json",
        "original/consolidated.00.pth",
    }


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("count, stage", [(1, 0), (2, 3)])
def test_runs_export_what_came_in(count, stage, tmp_path):
    """Under ZeRO-3 transformers remembers conversions that the checkpoint did not need."""
    write_pairs(tmp_path / "pairs.jsonl", 8)
    names = ("mixtral, fused experts", "qwen3.5, image and text", "qwen3-vl, image and text")
    trees = []
    for name in names:
        folder = write_checkpoint(tmp_path / name, name)
        (folder / "chat_template.jinja").unlink()
        shutil.rmtree(folder / "additional_chat_templates")
        tree = run_tree(tmp_path, max_steps=1, weight_decay=0.1, micro_batch_size=2)
        tree["model"]["path"] = str(folder)
        tree["train"]["output_dir"] = str(tmp_path / f"run {name}")
        trees.append(tree | {"parallel": {"zero_stage": stage}, "loss": {"type": "sigmoid"}})
    ranks.train(trees, count)
    for name in names:
        source, final = tmp_path / name, tmp_path / f"run {name}" / "final"
        assert_kept(source, final)
        before, after = tensors_of(source), tensors_of(final)
        assert before.keys() == after.keys()
        same = {key for key in before if torch.equal(before[key], after[key])}
        assert same == {key for key in before if "visual" in key}, name
