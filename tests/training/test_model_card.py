"""The card beside an exported model: true, readable by the hub's client, and silent about folders."""

import importlib
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
import yaml

from dpo_fast.losses.papers import IDS, PAPERS, bibtex, numbers
from dpo_fast.losses.table import LOSSES
from dpo_fast.report.card import illustrate
from dpo_fast.training import model_card
from dpo_fast.training.config import build_config
from dpo_fast.training.model_card import CARD, card, metadata, write_card
from tests.support.models import run_tree

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"
HASHES = {"train": "1" * 64, "eval": "2" * 64, "model.path": "3" * 64}


@pytest.fixture
def config(tmp_path):
    """A run that is over, as its files tell; its base model has a card with a license."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / CARD).write_text(
        "---\nlicense: apache-2.0\nlanguage: [en]\nbase_model: org/base\ntags: [chat]\n---\n# Base\n"
    )
    tree = run_tree(tmp_path)
    tree["data"]["eval_rows"] = 4
    tree["loss"] = {"type": ["ipo", "sft"], "weights": [1.0, 0.1], "beta": 0.25}
    tree["log"]["run_name"] = f"try {SECRET}"[:5] + "|1"
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        {"step": 0, "eval_loss": 0.9, "eval_rewards/accuracies": 0.0},
        {"step": 1, "loss": 0.7, "rewards/accuracies": 0.25},
        {"step": 2, "loss": 0.5, "rewards/accuracies": 0.75},
        {"step": 2, "eval_loss": 0.625, "eval_rewards/accuracies": 0.5},
        {"step": 3, "loss": 0.125},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{torn")
    rows = {"train": {"rows": 1234}, "eval": {"rows": 4}}
    data = {name: each | {"sha256": HASHES[name]} for name, each in rows.items()}
    facts = {
        "starts": [
            {"ranks": 2, "device": "H100", "versions": {"dpo_fast": "0.1", "torch": "2.13"}}
        ],
        "made_of": {"data": data, "weights": {"model.path": HASHES["model.path"]}},
    }
    (run / "run.json").write_text(json.dumps(facts))
    report = {"sources": [], "rows_read": 1300, "examples_kept": 1238, "kind": "pairs"}
    (run / "data-report.json").write_text(json.dumps(report))
    return build_config(tree, "run")


def test_a_card_says_what_was_done(config, tmp_path):
    text = card(config, None, False)
    for words in (
        "# try h|1",
        "`ipo` + `sft`",
        "| `ipo` | 1 |",
        "| `sft` | 0.1 |",
        "beta = 0.25",
        "| train | `pairs.jsonl` | 1,234 | `" + HASHES["train"],
        "| eval | held out of train | 4 | `" + HASHES["eval"],
        "Of 1,300 rows read, 1,238 were kept (pairs).",
        "`" + HASHES["model.path"] + "`",
        "| evaluation | loss | 0.9000 (0) | 0.6250 (2) |",
        "| training | loss | 0.7000 (1) | 0.1250 (3) |",
        "dpo_fast 0.1, torch 2.13. Trained on 2 x H100.",
        "AutoModelForCausalLM.from_pretrained(path",
        "eprint = {2310.12036}",
        "A General Theoretical Paradigm",
        "eprint = {2404.19733}",
        "| `train.learning_rate` |",
    ):
        assert words in text, words
    assert str(tmp_path) not in text


def test_a_card_of_an_earlier_step_has_the_metrics_of_that_step(config):
    text = card(config, 2, False)
    assert "| training | loss | 0.7000 (1) | 0.5000 (2) |" in text and "2 steps" in text
    (run,) = [config.train.output_dir]
    train = config.train.model_copy(update={"load_best_model_at_end": True})
    with open(f"{run}/best.json", "w") as stream:
        json.dump({"step": 1}, stream)
    best = card(config.model_copy(update={"train": train}), None, False)
    assert "0.7000 (1) | 0.7000 (1)" in best  # the weights are those of the best step


def test_the_client_of_the_hub_reads_a_card(config, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    write_card(config, tmp_path)
    read = hub.ModelCard.load(tmp_path / CARD)
    data = read.data.to_dict()
    assert data["license"] == "apache-2.0" and data["language"] == ["en"]
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"dpo_fast", "ipo", "sft"} <= set(data["tags"])


def test_an_adapter_names_its_base_and_how_to_put_it_on(config, monkeypatch):
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # nothing of it is here
    section = config.model.model_copy(update={"path": "org/chat@v2"})
    hub = config.model_copy(update={"model": section})
    text, meta = card(hub, None, True), metadata(hub, True)
    assert meta["library_name"] == "peft" and meta["base_model"] == "org/chat"
    assert meta["base_model_relation"] == "adapter"
    assert "[org/chat@v2](https://huggingface.co/org/chat)" in text
    assert 'from_pretrained("org/chat"' in text and "PeftModel.from_pretrained(model, path)" in text


def test_an_adapter_of_a_folder_is_not_one_of_the_base_that_the_folder_came_from(config):
    text, meta = card(config, None, True), metadata(config, True)
    assert "base_model" not in meta and "base_model_relation" not in meta
    assert "org/base" not in text and "# BASE: model\nmodel = " in text


@pytest.mark.parametrize("path", ["folder", "org/chat"])
def test_what_the_hub_would_refuse_of_the_base_models_card_is_not_taken(
    config, tmp_path, monkeypatch, path
):
    """A card that the hub refuses keeps the whole model from it."""
    front = "license: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: [no, en, 3]\n"
    front += "base_model: [/scratch/me/model, org/base]\n"
    (tmp_path / "model" / CARD).write_text(f"---\n{front}---\n# Base\n")
    if path != "folder":
        monkeypatch.setattr(model_card, "local_folder", lambda _: tmp_path / "model")
        section = config.model.model_copy(update={"path": path})
        config = config.model_copy(update={"model": section})
    meta = metadata(config, False)
    assert meta["language"] == ["no", "en"] and meta["license"] == "other"
    link = "https://huggingface.co/org/chat/blob/main/LICENSE"
    assert meta.get("license_link") == (None if path == "folder" else link)
    assert meta["base_model"] == (["org/base"] if path == "folder" else path)
    read = yaml.safe_load(yaml.safe_dump(meta))
    assert read == meta, "the language no is a text again"


def test_a_loss_of_a_file_is_named_without_its_folder(config, tmp_path):
    file = tmp_path / "my_losses.py"
    file.write_text("def wide(logps, options):\n    return options.beta * logps.chosen\n")
    tree = config.resolved()
    tree["loss"] = {"type": f"{file}:wide"}
    own = build_config(tree, "run")
    text = card(own, None, False)
    assert str(tmp_path) not in text and "the loss `my_losses.py:wide`" in text
    assert "| `my_losses.py:wide` | 1 |" in text and "wide" in metadata(own, False)["tags"]


def test_files_are_no_data_sets_of_the_hub(config):
    """Where they are not any more, too: a card may be written anew on another machine."""
    for name, found in (("data/pairs.jsonl", []), ("org/pairs", ["org/pairs"])):
        data = config.data.model_copy(update={"train": name})
        meta = metadata(config.model_copy(update={"data": data}), False)
        assert meta.get("datasets", []) == found


def test_a_card_without_any_file_of_a_run(tmp_path):
    config = build_config(run_tree(tmp_path), "run")
    text = card(config, None, False)
    assert "## Metrics" not in text and "not recorded" in text and "2305.18290" in text


def test_every_paper_of_a_loss_can_be_cited():
    known = {number for spec in LOSSES.values() for number in IDS.findall(spec.source)}
    assert known == PAPERS.keys()
    assert numbers([LOSSES["sft"], LOSSES["sft"]]) == ["2404.19733", "2411.10442"]
    entry = bibtex("2305.18290")
    assert entry.startswith("@misc{rafailov2023,\n") and entry.endswith("\n}")
    assert "title = {{arXiv 2601.00001}}" in bibtex("2601.00001")
    assert len({bibtex(number) for number in PAPERS}) == len(PAPERS)


def test_curves_are_drawn_into_the_card_and_anew(config, tmp_path):
    run = tmp_path / "run"
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace("{torn", ""))
    assert illustrate(run) is None  # no model yet
    (run / "final").mkdir()
    write_card(config, run / "final")
    plain = (run / "final" / CARD).read_text()
    for _ in range(2):
        assert illustrate(run) == run / "final" / CARD
        text = (run / "final" / CARD).read_text()
        pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
        assert pictures == ["curves/loss.svg", "curves/accuracy.svg"]
        for name in pictures:
            root = ElementTree.parse(run / "final" / name).getroot()
            assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("width")
            assert any("polyline" in each.tag for each in root.iter())
    assert len(text) > len(plain)
    own = run / "final" / CARD
    own.write_text("mine")
    illustrate(run)
    assert own.read_text() == "mine"  # a card that somebody has written anew stays
