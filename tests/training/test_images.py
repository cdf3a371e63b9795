"""Whole runs on rows with images."""

import json
import shutil

import pytest
import torch

pytest.importorskip("deepspeed")

from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from dpo_fast.api.process import as_found
from dpo_fast.data.images.processor import load_processor
from dpo_fast.errors import UserError
from dpo_fast.models.config import ModelSection
from dpo_fast.models.image_places import ImagePlaces
from dpo_fast.models.load import load_model, load_skeleton
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training import data_ranks
from dpo_fast.training.config import build_config
from dpo_fast.training.engine import release
from dpo_fast.training.loop import train
from dpo_fast.training.prepare import prepare
from tests.support import ranks
from tests.support.image_runs import write_image_model, write_image_pairs
from tests.support.models import run_tree, write_model
from tests.support.plain_torch import assert_same_step

NAMES = ("qwen3-vl", "gemma3", "qwen3.5")  # of the last there is a class for texts alone, too


@pytest.fixture(scope="module", autouse=True)
def process():
    """Runs are begun in this process, beside those of ranks: it is left as it was."""
    with as_found():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name in NAMES:
        write_image_model(folder / name, name)
    write_image_pairs(folder)
    write_model(folder / "llama")
    return folder


def case(folder, name: str, layout: str, stage: int, micro: int, **model) -> dict:
    tree = run_tree(folder, micro_batch_size=micro, max_steps=1, layout=layout)
    tree["model"] |= {"path": str(folder / name)} | model
    tree["data"]["max_length"] = 256
    tree["parallel"] = {"zero_stage": stage}
    return tree | {"loss": {"type": "simpo"}}


@pytest.mark.slow
@pytest.mark.processes
def test_ranks_with_and_without_images_at_a_time_give_the_step_of_one(folder):
    """Two ranks, one pair at a time: the tower frozen, trained, recomputed, and with adapters."""
    trained = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
    kinds = {"frozen": {}, "trained": trained, "adapters": trained | {"lora": {"r": 4}}}
    truths = ranks.first_steps(
        {kind: case(folder, "qwen3-vl", "padded", 0, 8, **kinds[kind]) for kind in kinds}
    )
    recomputed = trained | {"gradient_checkpointing": True}
    cases = {
        "trained, stage 0": case(folder, "qwen3-vl", "packed", 0, 1, **trained),
        "trained, stage 2": case(folder, "qwen3-vl", "padded", 2, 1, **trained),
        "trained, stage 3": case(folder, "qwen3-vl", "shared_prefix", 3, 1, **recomputed),
        "frozen, stage 3": case(folder, "qwen3-vl", "shared_prefix", 3, 1),
        "adapters, stage 3": case(folder, "qwen3-vl", "packed", 3, 1, **kinds["adapters"]),
    }
    for name, result in ranks.first_steps(cases, 2).items():
        assert_same_step(result, truths[name.partition(",")[0]], 1e-5, name)
    of_tower = {kind: [n for n in truths[kind][1] if ".visual." in n] for kind in kinds}
    assert not of_tower["frozen"] and all("lora_" in name for name in of_tower["adapters"])
    assert max(truths["trained"][1][name].abs().max() for name in of_tower["trained"]) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_run_its_export_and_transformers_score_alike(folder, tmp_path, name):
    """A file of conversations with images; adapters, a stored reference, the layout that auto takes.

    The merged export, loaded by transformers, scores what its own processor makes of each conversation as
    we score the rows.
    """
    tree = case(folder, name, "auto", 0, 4, lora={"r": 4})
    tree["train"] |= {"output_dir": str(tmp_path / "run"), "merge_lora": True, "max_steps": 3}
    tree["train"]["learning_rate"] = 0.05
    final = train(build_config(tree | {"loss": {"type": "sigmoid"}}, "run"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    goes_on = load_skeleton(ModelSection(path=str(final)))
    assert type(goes_on).__name__.endswith("ForConditionalGeneration")
    merged = final / "merged"
    tree["model"] = {"path": str(merged), "dtype": "fp32"}
    del tree["train"]["merge_lora"]
    run = prepare(build_config(tree | {"loss": {"type": "simpo"}}, "merged"))
    assert run.config.train.layout == "shared_prefix"
    ours = {}
    for batch in run.train.batches(0):
        with torch.no_grad():
            logps = run.engine(**forward_arguments(batch))["logp"].split(batch.lengths_S.tolist())
        ours |= {
            (int(index), side): logps[2 * place + side].sum().item()
            for place, index in enumerate(batch.indices_P)
            for side in (0, 1)
        }
    release(run.engine)
    theirs = Transformers(merged, folder)
    assert len(ours) == 16 and any(theirs.images(index) for index, _ in ours)
    for (index, side), logp in ours.items():
        assert abs(theirs.logp(index, side) - logp) < 1e-3, (index, side)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (
            "qwen3-vl",
            ("positions", lambda self, model, position_ids: position_ids.expand(3, -1, -1)),
        ),
        ("gemma3", ("runs", lambda self: ())),
    ],
)
def test_a_model_that_goes_by_other_rules_is_refused_before_the_first_step(
    folder, monkeypatch, name, fault
):
    """As if its positions, or what its image tokens see, were not known."""
    config = build_config(case(folder, name, "auto", 0, 4), "case")
    data_ranks.join(config.parallel)
    release(prepare(config).engine)
    monkeypatch.setattr(ImagePlaces, *fault)
    with pytest.raises(
        UserError, match=r"pairs.jsonl:2: .* differ by .* by rules that are not known"
    ):
        prepare(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.images": False},
            "model.images=false cannot be honoured: data.train has rows with images",
        ),
        ({"reference.path": "llama", "loss.type": "sigmoid"}, "reference.path=.*no vision tower"),
    ],
)
def test_what_images_cannot_go_with_is_refused_by_name(folder, changes, message):
    tree = case(folder, "qwen3-vl", "auto", 0, 4)
    for key, value in changes.items():
        section, name = key.split(".")
        value = str(folder / value) if name == "path" else value
        tree[section] = tree.get(section, {}) | {name: value}
    with pytest.raises(UserError, match=message):
        prepare(build_config(tree, "case"))


def test_held_out_prompts_with_images_are_answered(folder, tmp_path):
    """Before the first step as transformers answers them with its own processor."""
    tree = case(folder, "gemma3", "auto", 0, 4)
    tree["data"]["eval_rows"] = 6
    tree["generate"] = {"max_prompts": 6, "max_new_tokens": 5}
    tree["train"] |= {"output_dir": str(tmp_path), "global_batch_size": 4}
    train(build_config(tree, "case"))
    first, last = (json.loads(line) for line in (tmp_path / "generations.jsonl").open())
    theirs = Transformers(folder / "gemma3", folder)
    asked = [each["prompt"][0]["content"] for each in first["answers"]]
    assert {each.count("[image ") for each in asked} == {0, 1, 2}
    for each in first["answers"]:
        index = int(each["where"].rpartition(":")[2]) - 1
        assert each["greedy"]["text"] == theirs.answer(index)
    assert last["step"] == 1 and len(last["answers"]) == 6


def test_a_tower_that_the_files_lack_is_not_made_up(folder, tmp_path):
    shutil.copytree(folder / "gemma3", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "projector" not in name}
    save_file(kept, file, {"format": "pt"})
    section = {"path": str(tmp_path / "model"), "dtype": "fp32"}
    load_model(ModelSection(**section), attention="sdpa")  # for texts alone it serves
    with pytest.raises(UserError, match="the files lack 2 of the weights .*multi_modal_projector"):
        load_model(ModelSection(**section, images=True), attention="sdpa")


@pytest.mark.processes
def test_ranks_that_share_a_row_and_images_are_refused(folder):
    tree = case(folder, "qwen3-vl", "auto", 0, 4)
    tree["parallel"]["sequence_parallel"] = 2
    assert "parallel.sequence_parallel=2 cannot be honoured" in ranks.refusal(tree, 2)


class Transformers:
    """transformers' own model and processor, on the rows of a file."""

    def __init__(self, model, folder) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        source = {"pretrained_model_name_or_path": str(model)}
        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
        self.processor = load_processor(source, tokenizer, "the model")
        self.rows = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
        self.folder = folder

    def images(self, index: int) -> list[Image.Image]:
        return [Image.open(self.folder / name) for name in self.rows[index]["images"]]

    def user(self, index: int) -> list[dict]:
        text = self.rows[index]["prompt"][0]["content"].replace("<image>", "")
        parts = [{"type": "image"} for _ in self.images(index)] + [{"type": "text", "text": text}]
        return [{"role": "user", "content": parts}]

    @torch.no_grad()
    def answer(self, index: int) -> str:
        tokenizer, images = self.processor.tokenizer, self.images(index)
        prompt = tokenizer.apply_chat_template(
            self.user(index), tokenize=False, add_generation_prompt=True
        )
        given = {"images": images} if images else {}
        inputs = self.processor(text=[prompt], return_tensors="pt", **given)
        end = tokenizer.eos_token_id
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": end}
        ids = self.model.generate(**inputs, **options, pad_token_id=end)
        size = inputs["input_ids"].shape[1]
        return tokenizer.decode(ids[0, size:], skip_special_tokens=True)

    @torch.no_grad()
    def logp(self, index: int, side: int) -> float:
        row, images, user = self.rows[index], self.images(index), self.user(index)
        answer = row[("chosen", "rejected")[side]]
        template = self.processor.tokenizer.apply_chat_template
        prompt = template(user, tokenize=False, add_generation_prompt=True)
        texts = [prompt, template(user + answer, tokenize=False).removesuffix("\n")]
        given = {"images": images} if images else {}
        start, whole = (self.processor(text=[t], return_tensors="pt", **given) for t in texts)
        start = start["input_ids"].shape[1]
        logits = self.model(**whole).logits[0].log_softmax(-1)[start - 1 : -1]
        return logits.gather(1, whole["input_ids"][0, start:, None]).sum().item()
