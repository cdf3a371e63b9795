"""DPO on top of an adapter that SFT has left: trained further, or merged first."""

import json
import math
import shutil
import threading
import time

import pytest
import torch

pytest.importorskip("deepspeed")

from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_fast.data.batch import collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models import load_model, load_tokenizer
from dpo_fast.models.config import ModelSection
from dpo_fast.models.identity import model_identity
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training import merge
from dpo_fast.training.config import build_config
from dpo_fast.training.export import export
from dpo_fast.training.fit import check_run
from dpo_fast.training.merge import merged_first
from tests.support import ranks
from tests.support.adapters import write_adapter
from tests.support.architectures import TREES, alone
from tests.support.metrics import series
from tests.support.models import changed, run_tree, write_model, write_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 16)
    write_adapter(folder / "sft", folder / "model")
    return folder


def section(path, **options) -> ModelSection:
    return ModelSection(path=str(path), dtype="fp32", **options)


def base_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


@torch.no_grad()
def logps(scoring):
    return scoring(**forward_arguments(collate_trees(TREES, "padded")))["logp"]


@torch.no_grad()
def expected(folder, adapter):
    return alone(PeftModel.from_pretrained(base_of(folder), adapter).eval())


def test_an_adapter_folder_is_the_model_with_it(folder):
    scoring = load_model(section(folder / "sft"), attention="sdpa", keep_start=True)
    torch.testing.assert_close(logps(scoring), expected(folder, folder / "sft"), rtol=0, atol=1e-5)
    trained = {name for name, p in scoring.named_parameters() if p.requires_grad}
    assert trained and all(".default." in name for name in trained)
    before = logps(scoring)
    with torch.no_grad():
        for parameter in scoring.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert (logps(scoring) - before).abs().max() > 0.01
    with scoring.as_started():
        assert torch.equal(logps(scoring), before)
    assert {name for name, p in scoring.named_parameters() if p.requires_grad} == trained


def test_the_identity_is_of_base_and_adapter(folder, tmp_path):
    def of(path) -> str:
        return model_identity(str(path))

    copy = shutil.copytree(folder / "sft", tmp_path / "copy")
    first = of(folder / "sft")
    assert first == of(copy) != of(folder / "model")
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: v * (1.001 if i == 3 else 1) for i, (k, v) in enumerate(tensors.items())}, file)
    assert of(copy) != first
    shutil.copy(folder / "sft" / "adapter_model.safetensors", file)
    for name, value, same in (
        ("lora_alpha", 99, False),
        ("lora_dropout", 0.5, True),
        ("base_model_name_or_path", str(write_model(tmp_path / "other", seed=3)), False),
        ("base_model_name_or_path", str(write_model(tmp_path / "twin")), True),
    ):
        config = json.loads((folder / "sft" / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | {name: value}))
        assert (of(copy) == first) == same, name


CONTINUED = {
    "cached": {},
    "frozen": {"reference": {"provider": "frozen"}},
    "adapter_off": {"reference": {"provider": "adapter_off"}},
    "whole": {"reference": {"provider": "adapter_off"}, "train": {"save_steps": 2}},
}


def tree_of(folder, output, stage, **sections) -> dict:
    tree = run_tree(folder, num_train_epochs=2, micro_batch_size=2)
    tree |= {"loss": {"type": "sigmoid"}, "parallel": {"zero_stage": stage}}
    tree["model"]["path"] = str(folder / "sft")
    return changed(tree, output, **sections)


@pytest.fixture(scope="module", params=[(1, 0), (2, 3)], ids=["one rank", "two ranks, stage 3"])
def runs(request, folder):
    count, stage = request.param
    root = folder / f"runs-{count}"
    sections = CONTINUED | {
        "merged": {"model": {"adapter": "merge"}, "train": {"learning_rate": 1e-4}},
        "merged, new": {
            "model": {"adapter": "merge", "lora": {"r": 2, "alpha": 4}},
            "train": {"merge_lora": True},
        },
        "as a reference": {
            "reference": {"path": str(folder / "sft")},
            "model": {"path": str(folder / "model")},
        },
    }
    ranks.train([tree_of(folder, root / n, stage, **o) for n, o in sections.items()], count)
    resumed = tree_of(folder, root / "resumed", stage, **CONTINUED["whole"])
    resumed["train"]["resume_from_checkpoint"] = str(root / "whole" / "checkpoint-2")
    ranks.train([resumed], count)
    return root


@pytest.mark.processes
@pytest.mark.slow
def test_the_reference_is_the_adapter_frozen(folder, runs):
    curves = {name: series(runs / name) for name in CONTINUED}
    for name, curve in curves.items():
        assert curve[1] == pytest.approx(math.log(2), abs=1e-6), name
        assert curve == pytest.approx(curves["cached"], abs=1e-5), name
    assert curves["cached"][4] < 0.69
    by_copy = expected(folder, runs / "adapter_off" / "final")
    torch.testing.assert_close(
        by_copy, expected(folder, runs / "cached" / "final"), rtol=0, atol=1e-3
    )
    assert series(runs / "resumed") == {step: curves["whole"][step] for step in (3, 4)}
    final = runs / "cached" / "final"
    assert not (final / "config.json").exists()
    start, end = expected(folder, folder / "sft"), expected(folder, final)
    assert 1e-3 < (end - start).abs().max() < 5
    config = json.loads((final / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "model")
    assert config["lora_dropout"] == 0.1 and not (final / "ref").exists()
    assert len(load_tokenizer(section(final))) == len(load_tokenizer(section(folder / "model")))


@pytest.mark.processes
@pytest.mark.slow
def test_two_commands_that_merge_at_once_do_it_once(folder, tmp_path, monkeypatch):
    """`reference` and `train` of one configuration, say, before either has a lock on the folder."""
    config = build_config(tree_of(folder, tmp_path / "run", 0, model={"adapter": "merge"}), "tree")
    there, write, written, failed = threading.Barrier(4), merge.write_merged, [], []
    identity = merge.identity_on_this_rank

    def together(*arguments):
        there.wait(60)
        return identity(*arguments)

    def slowly(*arguments):
        written.append(1)
        write(*arguments)
        time.sleep(0.2)

    def begin():
        try:
            assert merged_first(config).model.path == str(tmp_path / "run" / "merged_base")
        except BaseException as error:
            failed.append(error)

    monkeypatch.setattr(merge, "identity_on_this_rank", together)
    monkeypatch.setattr(merge, "write_merged", slowly)
    threads = [threading.Thread(target=begin) for _ in range(4)]
    [each.start() for each in threads]
    [each.join(120) for each in threads]
    assert not failed and len(written) == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["merged_base"]


@pytest.mark.processes
def test_a_merged_adapter_is_where_training_begins(folder, runs):
    start = expected(folder, folder / "sft")
    for name in ("merged", "merged, new"):
        assert series(runs / name)[1] == pytest.approx(math.log(2), abs=1e-6)
        assert series(runs / name)[4] < 0.69
        merged = AutoModelForCausalLM.from_pretrained(
            runs / name / "merged_base", dtype=torch.float32
        )
        with torch.no_grad():
            torch.testing.assert_close(alone(merged.eval()), start, rtol=0, atol=1e-4)
    whole = AutoModelForCausalLM.from_pretrained(runs / "merged" / "final", dtype=torch.float32)
    with torch.no_grad():
        assert 1e-3 < (alone(whole.eval()) - start).abs().max() < 5
    adapter = runs / "merged, new" / "final"
    config = json.loads((adapter / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(
        config["base_model_name_or_path"], dtype=torch.float32
    )
    again = AutoModelForCausalLM.from_pretrained(adapter / "merged", dtype=torch.float32)
    with torch.no_grad():
        adapted = alone(PeftModel.from_pretrained(base, adapter).eval())
        torch.testing.assert_close(alone(again.eval()), adapted, rtol=0, atol=1e-4)
        assert (adapted - start).abs().max() > 1e-3


@pytest.mark.processes
@pytest.mark.slow
def test_an_adapter_may_be_the_reference_of_another_model(folder, runs):
    """The first loss, by plain transformers."""
    import pyarrow.parquet

    (stored,) = (runs / "as a reference").glob("reference/train-*")
    rows = pyarrow.parquet.read_table(stored).to_pylist()
    tokenizer = load_tokenizer(section(folder / "model"))
    adapted = PeftModel.from_pretrained(base_of(folder), folder / "sft").eval()
    for row, line in zip(rows, (folder / "pairs.jsonl").read_text().splitlines()):
        pair = json.loads(line)
        prompt = tokenizer(pair["prompt"])["input_ids"]
        answers = [
            tokenizer(pair[side], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            for side in ("chosen", "rejected")
        ]
        with torch.no_grad():
            sums = [alone(adapted, [(prompt, [answer])]).sum().item() for answer in answers]
        assert [row["chosen_logps"], row["rejected_logps"]] == pytest.approx(sums, abs=1e-3)


# Tokens that SFT has added

ENDS = ["embed_tokens", "lm_head"]


def with_tokens(folder, name: str, tied: bool, whole) -> tuple:
    """An adapter whose embeddings have more rows than its base, and the number of rows."""
    base = folder / f"{name}-base"
    if not base.exists():
        write_model(base, tied=tied)
    tokenizer = load_tokenizer(section(base))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>", "<c>"]})
    options = {"modules_to_save": whole, "ensure_weight_tying": bool(whole and tied)}
    return write_adapter(folder / name, base, tokenizer=tokenizer, **options), len(tokenizer)


def plain_logits(base, rows, adapter=None):
    """By transformers and peft alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.arange(250, 264)[None]).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whole", [None, ENDS])
def test_tokens_that_an_adapter_has_added(tied, whole, tmp_path):
    sft, rows = with_tokens(tmp_path, "sft", tied, whole)
    base, start = tmp_path / "sft-base", plain_logits(tmp_path / "sft-base", rows, sft)
    tree = run_tree(tmp_path, merge_lora=True)
    tree["model"]["path"] = str(sft)
    config = build_config(tree, "tree")
    check_run(config)
    scoring = load_model(config.model, attention="sdpa", keep_start=True).eval()
    ids = torch.arange(250, 264)[None]
    with torch.no_grad():
        torch.testing.assert_close(scoring.model(ids).logits, start)
        for parameter in scoring.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
        changed_logits = scoring.model(ids).logits
        with scoring.as_started():
            torch.testing.assert_close(scoring.model(ids).logits, start)
    export(scoring, config, tmp_path / "out")
    assert (changed_logits - start).abs().max() > 1e-2
    torch.testing.assert_close(plain_logits(base, rows, tmp_path / "out"), changed_logits)
    merged = plain_logits(tmp_path / "out" / "merged", None)
    torch.testing.assert_close(merged, changed_logits, rtol=0, atol=1e-4)
    # Merged first.
    tree["model"]["adapter"], tree["train"]["merge_lora"] = "merge", False
    config = merged_first(build_config(tree, "tree"))
    torch.testing.assert_close(plain_logits(config.model.path, None), start, rtol=0, atol=1e-4)
    assert len(load_tokenizer(config.model)) == rows


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("whole", [None, ENDS], ids=["frozen", "whole"])
def test_tokens_that_an_adapter_has_added_under_zero_3(folder, whole):
    name = "whole" if whole else "frozen"
    sft, rows = with_tokens(folder, name, False, whole)
    found = []
    for count, stage in ((1, 0), (2, 3)):
        run = folder / f"tokens-{name}-{count}"
        ranks.train([tree_of(folder, run, stage, model={"path": str(sft)})], count)
        found.append(
            series(run) | {f"logps {k}": v for k, v in series(run, "logps/chosen").items()}
        )
        found[-1]["end"] = plain_logits(folder / f"{name}-base", rows, run / "final").tolist()
    one, two = (torch.tensor(each.pop("end")) for each in found)
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert found[0][1] == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


# Errors


def refused(tree: dict) -> str:
    with pytest.raises(UserError) as error:
        check_run(build_config(tree, "tree"))
    return str(error.value)


def test_what_cannot_be_an_adapter_is_refused_by_name(folder, tmp_path):
    def case(path, **sections) -> str:
        return refused(tree_of(folder, tmp_path / "run", 0, model={"path": str(path)}, **sections))

    def with_config(name: str, **changes):
        copy = shutil.copytree(folder / "sft", tmp_path / name)
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | changes))
        return copy

    lost = case(with_config("lost", base_model_name_or_path=str(tmp_path / "nowhere")))
    assert "model.path=" in lost and "nowhere: no such folder" in lost
    assert "Correct base_model_name_or_path in" in lost
    assert "has no base_model_name_or_path" in case(
        with_config("none", base_model_name_or_path=None)
    )
    nested = case(with_config("nested", base_model_name_or_path=str(folder / "sft")))
    assert "is an adapter on another adapter" in nested and "model.adapter=merge" in nested
    damaged = with_config("damaged")
    (damaged / "adapter_config.json").write_text("{")
    assert "is no adapter's configuration" in case(damaged)
    empty = with_config("empty")
    (empty / "adapter_model.safetensors").unlink()
    assert "has an adapter_config.json but no weights" in case(empty)
    head = case(with_config("head", target_modules=["q_proj", "lm_head"]))
    assert "target_modules has the head" in head and "model.adapter=merge" in head
    assert "peft does not know this adapter" in case(with_config("odd", peft_type="ODD"))
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(base_of(folder), prompts).save_pretrained(tmp_path / "prompts")
    assert "peft_type=PROMPT_TUNING adds virtual tokens" in case(tmp_path / "prompts")


def test_options_that_contradict_an_adapter_are_refused(folder, tmp_path):
    def case(**model) -> str:
        with pytest.raises(UserError) as error:
            build_config(tree_of(folder, tmp_path, 0, model=model), "tree")
        return str(error.value)

    assert "set model.adapter=merge to merge it and start new ones" in case(lora={"r": 2})
    plain = case(path=str(folder / "model"), adapter="continue")
    assert "model.adapter=continue, but model.path=" in plain and "no adapter_config.json" in plain
    ema = {"provider": "ema", "path": str(folder / "model")}
    with pytest.raises(UserError, match="reference.path=.* is not used by reference.provider=ema"):
        build_config(tree_of(folder, tmp_path, 0, reference=ema), "tree")


def test_an_adapter_of_another_base_is_told(folder, tmp_path):
    copy = shutil.copytree(folder / "sft", tmp_path / "sft")
    tensors = load_file(copy / "adapter_model.safetensors")
    wide = {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}
    save_file(wide, copy / "adapter_model.safetensors")
    with pytest.raises(UserError, match="the adapter does not fit its base model"):
        load_model(section(copy), attention="sdpa")


def test_biases_that_an_adapter_trains_need_a_reference_of_their_own(folder, tmp_path):
    adapter = write_adapter(tmp_path / "sft", folder / "model", bias="all")
    with pytest.raises(UserError, match="bias=all: the biases of the base model are trained"):
        load_model(section(adapter), attention="sdpa", keep_start=True)
