"""`dpo-fast demo --real --rounds`: its rule, and the whole of it on a stand-in of model and rows."""

import gzip
import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("deepspeed")

from dpo_fast.cli.app import app
from dpo_fast.demo import real_rounds
from dpo_fast.demo.real_rounds import RoundsScale, run_rounds
from dpo_fast.demo.short import at_most_two_sentences
from dpo_fast.errors import UserError
from tests.support.models import write_model
from tests.support.tokenizers import CHATML, byte_tokenizer

# The tiny model ends with one token in 260, and what has not ended is never chosen: it writes much.
SMALL = RoundsScale(
    prompts=12,
    held_out=4,
    characters=200,
    completions=6,
    answer_tokens=64,
    examples_per_step=8,
    epochs=1,
    rate=3e-3,
    shown=2,
)
EVEN = "def at_most_two_sentences(completion):\n    return len(completion) % 2 == 0\n"


@pytest.mark.parametrize(
    "text", ["No.", "No! Why?", " It costs 2.50 dollars. \n", "Really?! Yes...", 'He said "no".']
)
def test_short_answers_that_end_keep_the_rule(text):
    assert at_most_two_sentences(text)


@pytest.mark.parametrize("text", ["", "No", "No. Why", "One. Two. Three.", "1. No\n2. Yes", "..a"])
def test_long_and_unfinished_answers_do_not(text):
    assert not at_most_two_sentences(text)


def test_rounds_are_of_the_real_model():
    with pytest.raises(UserError, match="--rounds is for the real model: add --real"):
        CliRunner().invoke(app, ["demo", "--rounds"], catch_exceptions=False)


@pytest.mark.slow
@pytest.mark.processes
def test_two_rounds_and_their_numbers(tmp_path):
    rows = tmp_path / "rows.jsonl.gz"
    start = "\n\nHuman: {}?\n\nAssistant:"
    with gzip.open(rows, "wt") as stream:
        for number in range(40):
            asked = start.format(number)
            pair = {"chosen": f"{asked} I am sorry.", "rejected": f"{asked} Of course!"}
            stream.write(json.dumps(pair) + "\n")
    (tmp_path / "even.py").write_text(EVEN)
    model = write_model(tmp_path / "tiny")
    byte_tokenizer(bos=True, template=CHATML).save_pretrained(model)
    out = tmp_path / "out"
    result = run_rounds(out, model=str(model), rows=rows, scale=SMALL, rule=tmp_path / "even.py")
    assert json.loads((out / "results.json").read_text()) == result
    assert len(result["rounds"]) == 3 and len(result["pairs"]) == 2 and min(result["pairs"]) > 0
    for number, file in enumerate(sorted((out / "rounds").glob("stage-*/train/generations.jsonl"))):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert lines[0]["metrics"] == result["rounds"][number]
    assert lines[-1]["metrics"] == result["rounds"][2]
    kept = [len(each["answers"][0]) % 2 == 0 for each in result["answers"]]
    first = json.loads(next((out / "rounds").glob("*1/train/generations.jsonl")).open().readline())
    scores = [each["scores"]["greedy"] == 1.0 for each in first["answers"][:2]]
    assert kept == scores and [len(each["answers"]) for each in result["answers"]] == [3, 3]
    rows = real_rounds.columns(result)
    assert [row["rounds"] for row in rows] == ["0", "1", "2"]
    assert rows[0]["keep the rule, greedy"] == f"{100 * result['rounds'][0]['score']:.1f} %"
