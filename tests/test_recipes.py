"""The published runs in recipes/, with small models and rows in place of those of the hub."""

import io
import json
import re

import pytest
import yaml

pytest.importorskip("transformers")

from rich.console import Console
from typer.testing import CliRunner

from dpo_fast.cli.app import _prepare_data, app
from dpo_fast.cli.doctor_run import look
from dpo_fast.cli.doctor_show import Shown
from dpo_fast.cli.init import IN_STAGES, PUBLISHED
from dpo_fast.data.kinds import DEMONSTRATIONS
from dpo_fast.errors import UserError
from dpo_fast.generation.prompts import read_prompts
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.plan import Plan
from dpo_fast.rounds.rows import check_rounds
from dpo_fast.rounds.sample import data_of
from dpo_fast.training.config import build, build_config
from dpo_fast.training.memory import memory
from tests.support.models import write_model
from tests.support.paths import ROOT
from tests.support.tokenizers import CHATML, byte_tokenizer

RUNS = tuple(name for name in PUBLISHED if name not in IN_STAGES)
FILES = {name: ROOT / "recipes" / f"{name}.yaml" for name in PUBLISHED}


def say(role: str, content: str) -> dict:
    return {"role": role, "content": content}


ASKED = [say("user", "why so?")]
TALK = [*ASKED, say("assistant", "as it is"), say("user", "and why not?")]
GOOD, BAD = say("assistant", "because"), say("assistant", "no idea")
CONFIGURED = {
    "custom_instructions": "",
    "enable_thinking": False,
    "python_tools": None,
    "xml_tools": None,
}
# Rows with the columns of the data sets of the hub that the recipes name.
ROWS = {
    "HuggingFaceH4/ultrafeedback_binarized": [
        {
            "prompt": "why so?",
            "prompt_id": "0f",
            "chosen": [*ASKED, GOOD],
            "rejected": [*ASKED, BAD],
            "messages": [*ASKED, GOOD],
            "score_chosen": 8.5,
            "score_rejected": 2.0,
        }
    ],
    "HuggingFaceH4/ultrachat_200k": [
        {"prompt": "why so?", "prompt_id": "0f", "messages": [*TALK, GOOD]},
    ],
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": [
        {"id": "a", "source": "x", "prompt": "why so?", "chosen": [*x, GOOD], "rejected": [*x, BAD]}
        for x in (ASKED, TALK)
    ],
    "HuggingFaceTB/smoltalk2": [
        {
            "chosen": [*ASKED, GOOD],
            "rejected": [*ASKED, BAD],
            "prompt": "why so?",
            "chat_template_kwargs": CONFIGURED,
            "source": "x",
        }
    ],
    "Intel/orca_dpo_pairs": [
        {"system": "", "question": "why so?", "chosen": "because", "rejected": "no idea"}
    ],
    "argilla/ultrafeedback-binarized-preferences-cleaned": [
        {
            "source": "x",
            "prompt": "why so?",
            "chosen": [*ASKED, GOOD],
            "chosen-rating": 5.0,
            "chosen-model": "m",
            "rejected": [*ASKED, BAD],
            "rejected-rating": 1.0,
            "rejected-model": "n",
        }
    ],
    "openbmb/UltraFeedback": [
        {
            "source": "x",
            "instruction": "why so?",
            "models": ["m", "n"],
            "completions": [
                {"model": "m", "response": "because", "overall_score": 8.0},
                {"model": "n", "response": "no idea", "overall_score": 2.0},
            ],
            "correct_answers": ["None"],
            "incorrect_answers": ["None"],
        }
    ],
    **{
        f"RLHFlow/ultrafeedback_iter{n}": [{"context_messages": ASKED, "source": "x"}]
        for n in (1, 2, 3)
    },
}  # fmt: skip
COPIES = 12  # of every row, each with another question


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Puts small models and files of rows in place of the ids of the hub in a tree."""
    folder = tmp_path_factory.mktemp("hub")
    write_model(folder / "model")
    byte_tokenizer(bos=True, template=CHATML).save_pretrained(folder / "model")

    def stand_in(name: str) -> str:
        data_set, _, split = name.partition(":")
        split = re.sub(r"\W", "_", split.rpartition("/")[2] or "train")
        file = folder / re.sub(r"\W", "_", name) / f"{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        texts = [json.dumps(row) for row in ROWS[data_set]]
        lines = [x.replace("why so?", f"why {split} {n}?") for x in texts for n in range(COPIES)]
        file.write_text("\n".join(lines))
        return str(file)

    def localise(tree: dict) -> dict:
        tree["model"]["path"] = str(folder / "model")
        tree["model"].pop("revision", None)
        tree["model"].pop("tokenizer", None)
        for section in (*tree.get("stages", ()), tree.get("sample", {})):
            for name in section.keys() & {"data", "prompts"}:
                given = section[name]
                if isinstance(given, str):
                    section[name] = stand_in(given)
                else:
                    section[name] = given | {key: stand_in(given[key]) for key in ("train", "eval")}
        data = tree["data"] | {"cache_dir": str(folder / "cache")}
        for name in data.keys() & {"train", "eval"}:
            given = data[name]
            if isinstance(given, str):
                data[name] = stand_in(given)
            else:
                data[name] = [x | {"path": stand_in(x["path"]), "rows": COPIES // 2} for x in given]
        return tree | {"data": data}

    return localise


def tree_of(recipe: str) -> dict:
    return yaml.safe_load(FILES[recipe].read_text())


def test_recipes_are_the_files_in_the_folder_and_on_the_page():
    assert sorted(PUBLISHED) == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    page = (ROOT / "docs/RECIPES.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.M)) == sorted(PUBLISHED)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_says_where_it_comes_from_what_it_needs_and_what_to_expect(recipe):
    text = FILES[recipe].read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    for word in ("Source: ", "Hardware: ", "Expect"):
        assert any(line.startswith(f"# {word}") for line in head), word
    command = "iterate" if recipe in IN_STAGES else "train"
    assert f"#   dpo-fast {command} {recipe}.yaml" in text
    assert re.search(r"model cards?\b|https://", text)
    for line in text.splitlines():
        key = re.match(r" *(- )?[a-z_]+: ", line)  # the text of a rubric has none
        assert key is None or "#" in line, line


@pytest.mark.parametrize("recipe", RUNS)
def test_the_doctor_accepts_a_recipe_and_its_rows(recipe, hub, monkeypatch):
    ranks = re.search(r"--nproc (\d+)", FILES[recipe].read_text())
    monkeypatch.setenv("WORLD_SIZE", ranks[1] if ranks else "1")
    run = build_config(hub(tree_of(recipe)), recipe)
    outlook = look(run)
    assert outlook.world == int(ranks[1] if ranks else 1)
    prepared = _prepare_data(run)
    assert len(prepared["train"]) == COPIES * (2 if "tulu" in recipe else 1)
    assert prepared["train"].report.dropped.counts == {}
    # An answer is its last turn, with its end: the turns before it are the prompt's, or are not scored.
    for example in prepared["train"]:
        flags = example.get("chosen_scored") or [True] * len(example["chosen_ids"])
        assert sum(flags) == len("because") + 1


def test_the_card_of_the_lora_recipe_is_large_enough(tmp_path, monkeypatch):
    """Weights, states and workspace of a model of Mistral's size, as the doctor counts them."""
    from transformers import MistralConfig

    monkeypatch.setenv("WORLD_SIZE", "1")
    MistralConfig(architectures=["MistralForCausalLM"]).save_pretrained(tmp_path)
    byte_tokenizer(bos=True).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    tree = tree_of("lora_24gb")
    tree["model"]["path"] = str(tmp_path)
    outlook = look(build_config(tree, "tree"))
    total = sum(line.device for line in memory(outlook.config, outlook.sizes, 1)) / (1 << 30)
    assert f"counts {total:.1f} GiB" in FILES["lora_24gb"].read_text()
    assert total < 16  # of 24 GB, which are 22.4 GiB


@pytest.mark.parametrize("recipe", IN_STAGES)
def test_the_doctor_accepts_every_stage_of_a_recipe_and_its_rows(recipe, hub, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = build(RoundsConfig, hub(tree_of(recipe)), recipe)
    console = Console(file=io.StringIO(), width=200)
    Shown(console, as_json=False).stages(config, recipe)
    plan = Plan(config, recipe)
    for step in plan.steps:
        assert step.name in console.file.getvalue()
        if step.stage.samples:
            check_rounds(plan, step)
            rounds = plan.rounds(step, config.model)
            prompts = read_prompts(data_of(rounds), rounds.sample)
            assert len(prompts.items) == COPIES and prompts.items[0].is_chat
            assert (
                plan.rehearsal(step).data.columns == {}
            )  # those of prompts are not those of pairs
        else:
            assert len(_prepare_data(plan.rehearsal(step))["train"]) == COPIES
    assert "sharded over 8 ranks" in console.file.getvalue()
    last = plan.rehearsal(plan.steps[-1])
    assert last.loss.names == ("sigmoid",) and last.reference_spec.compares
    if recipe == "zephyr_ddpo":
        first = plan.rehearsal(plan.steps[0])
        assert first.loss.names == ("sft",) and not first.reference_spec.compares
        talks = _prepare_data(first)
        assert talks["train"].kind == talks["eval"].kind == DEMONSTRATIONS
        ends = len(GOOD["content"]) + len(TALK[1]["content"]) + 2
        assert sum(talks["train"][0]["completion_scored"]) == ends  # both turns and their ends


def test_doctor_takes_a_file_of_stages(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    file = tmp_path / "stages.yaml"
    file.write_text(yaml.safe_dump(hub(tree_of("sdpo"))))
    result = CliRunner().invoke(app, ["doctor", str(file), "--nproc", "8"])
    assert result.exit_code == 0, result.exception
    assert "stage-1" in result.output and "stage-2" in result.output
    monkeypatch.setenv("WORLD_SIZE", "1")  # --nproc has set it
    file.write_text(file.read_text().replace("previous", "earlier"))
    result = CliRunner().invoke(app, ["doctor", str(file)])
    assert isinstance(result.exception, UserError) and "stages.1.reference" in str(result.exception)
