"""Each fault of data on rows that have it, counted by hand; and the command and its page."""

import json
import random
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

pytest.importorskip("datasets")

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.quality import Quality, Rule, measure
from dpo_fast.data.quality_notes import notes
from dpo_fast.data.traits import NO_SCRIPT, TRAITS, normalised, script, traits
from dpo_fast.report.data_page import data_page
from tests.support.models import run_tree, write_model
from tests.support.paths import ENVIRONMENT
from tests.support.tokenizers import byte_tokenizer

HOSTILE = "\x1b[31m</title><script>alert(1)</script>"


def words(draw, count: int) -> str:
    return " ".join("".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(count))


def rows(count: int = 100) -> list[dict]:
    draw = random.Random(0)
    return [
        {
            "prompt": words(draw, 12),
            "chosen": words(draw, 12) + ".",
            "rejected": words(draw, 12) + ".",
        }
        for _ in range(count)
    ]


def look(folder, train: list[dict], evaluation=None, logps=None) -> Quality:
    def write(name, some):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
        return str(file)

    options = {"eval": write("eval", evaluation)} if evaluation else {}
    config = DataConfig(
        train=write("train", train), cache_dir=str(folder), max_length=4096, **options
    )
    tokenizer = byte_tokenizer()
    parts = [load_examples(config, tokenizer, split=name) for name in ("train", *options)]
    return measure(parts[0], parts[1] if evaluation else None, tokenizer, logps)


def test_good_rows_have_nothing_but_their_counts(tmp_path):
    quality = look(tmp_path, rows())
    assert (quality.near, quality.near_prompts, quality.equal, quality.across) == (0, 0, 0, 0)
    assert quality.prompts == 100 and not quality.repeated and not quality.largest
    assert not any(rule.gives_away for rule in quality.rules) and quality.ratios is None
    assert quality.scripts == {"Latin": 100} and quality.changed == 0


def test_repetitions_within_and_across(tmp_path):
    train = rows()
    train += [row | {"chosen": row["chosen"] + "!"} for row in train[:5]]  # nearly
    train += [train[0], train[50] | {"rejected": words(random.Random(1), 12)}]
    evaluation = [*rows()[90:93], *({**row, "prompt": row["prompt"][::-1]} for row in rows()[:2])]
    quality = look(tmp_path, train, evaluation)
    assert quality.near == 6 and round(quality.facts["duplicates"] * 107) == 1
    assert quality.largest[0][0] == 3 and quality.largest[0][1].endswith("train.jsonl:1")
    assert quality.prompts == 100 and quality.near_prompts == 7
    assert quality.repeated[0] == (3, train[0]["prompt"][-60:])
    assert quality.across == 3 and quality.across_places[0][0].endswith("eval.jsonl:1")
    text = "\n".join(notes(quality))
    assert "6 of 107 (5.6%) pairs are nearly the same as an earlier one, 1 of them token" in text
    assert "3 of 5 (60.0%) evaluation pairs" in text


def test_answers_that_differ_in_form_alone(tmp_path):
    train = rows()
    train[3]["rejected"] = "  " + train[3]["chosen"].upper().rstrip(".") + " ?"
    quality = look(tmp_path, train)
    assert quality.equal == 1 and quality.equal_places[0].endswith("train.jsonl:4")
    assert normalised("Caf\u00e9,  au\nlait!") == normalised("CAFE\u0301 AU LAIT")
    assert normalised("a") != normalised("b")


def test_contradictions_and_languages(tmp_path):
    train = rows()
    train.append(train[0] | {"chosen": train[0]["rejected"], "rejected": train[0]["chosen"]})
    train[7]["chosen"] = "\u043f\u0440\u0438\u0432\u0435\u0442 " * 9
    train[8]["prompt"] = "\u4f60\u597d\u5417 " * 9
    quality = look(tmp_path, train)
    assert quality.facts["contradictory"] == pytest.approx(2 / 101)
    assert quality.scripts["Han"] == 1 and quality.changed == 2
    assert "2 of 101 (2.0%) pairs stand there the other way round too" in list(notes(quality))[0]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hello there", "Latin"),
        ("\u65e5\u672c\u8a9e\u3092\u8a71\u3059\u4eba", "Japanese"),
        ("\u4e2d\u6587 ok", "Han"),
        ("\ud55c\uad6d\uc5b4", "Korean"),
        ("\u0440\u0443\u0441\u0441\u043a\u0438\u0439", "Cyrillic"),
        ("\u0645\u0631\u062d\u0628\u0627", "Arabic"),
        ("12 + 3 = 15", NO_SCRIPT),
    ],
)
def test_scripts(text, name):
    assert script(text) == name


def has(text: str) -> set[str]:
    return {name for name, there in zip(TRAITS, traits(text), strict=True) if there}


def test_traits():
    assert has("It is so.") == set()
    assert has("# Title\n\n- one\n- two.") == {"a heading", "a list", "several paragraphs"}
    assert "an opening that refuses" in has("I\u2019m sorry, but I can't help.")
    assert "an opening that refuses" in has("As an AI language model, I agree.")
    assert "an opening that refuses" not in has("The sorry state of it.")
    assert has("Sure! **Now** 1") >= {"an opening that agrees", "bold text", "a digit"}
    assert has("and then it") == {"no end of sentence"} and has("Is it?") == {
        "a question at its end"
    }
    assert "a block of code" in has("```py\nx\n```") and "a link" in has("see https://a.b.")


def test_what_gives_the_label_away(tmp_path):
    train, draw = rows(), random.Random(2)
    for row in train:
        side = "chosen" if draw.random() < 0.95 else "rejected"
        row[side] = "- " + row[side].replace(" ", "\n- ", 2)
        row["rejected"] += " " + words(draw, 3) + "."
    quality = look(tmp_path, train)
    found = {rule.name: rule for rule in quality.rules if rule.gives_away}
    assert set(found) == {"a list", "more tokens"}
    assert found["a list"].side == "chosen" and found["a list"].right > 0.9
    assert found["more tokens"].side == "rejected" and found["more tokens"].right == 1
    # Few pairs, rare pairs, and weak rules give nothing away.
    assert not Rule("x", 49, 49, 100).gives_away and not Rule("x", 60, 60, 2000).gives_away
    assert not Rule("x", 1000, 705, 1000).gives_away and Rule("x", 1000, 260, 1000).gives_away


def test_labels_that_a_reference_doubts(tmp_path):
    logps = np.zeros((100, 2))
    logps[:, 1] = -30.0
    logps[:4] = [-200.0, -10.0]
    quality = look(tmp_path, rows(), logps=logps)
    lengths = quality.lengths
    assert quality.ratios[0] == pytest.approx(
        -200 / lengths["chosen"][0] + 10 / lengths["rejected"][0]
    )
    assert quality.doubtful_share == pytest.approx(0.04) and len(quality.doubtful) == 4
    assert any("by more than 1 nat a token in 4.0%" in note for note in notes(quality))


class Tags(HTMLParser):
    """Every tag is closed, no file or script is asked for."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open, self.all = [], []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.all.append(tag)
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.all.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_what_rows_say_stays_text(tmp_path):
    train = rows()
    train += [{"prompt": HOSTILE, "chosen": "yes", "rejected": "no " * i} for i in range(2, 30)]
    quality = look(tmp_path, train, logps=np.random.default_rng(0).normal(-50, 9, (128, 2)))
    source = data_page(f"Data of {HOSTILE}", {}, quality)
    tags = Tags(source).all
    assert tags.count("figure") == 4 and tags.count("polygon") == 5 and tags.count("script") == 1
    assert "src=" not in source and "\x1b" not in source and "<script>alert" not in source
    assert "&lt;script&gt;" in source and "28 times" in source


@pytest.mark.processes
def test_the_command_shows_quality_and_writes_the_page(tmp_path):
    write_model(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows(60) + rows(6))
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_tree(tmp_path)))
    command = [sys.executable, "-m", "dpo_fast", "data", "run.yaml", "--html", "page/data.html"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert "6 of 66 (9.1%) pairs are nearly the same" in " ".join(ended.stdout.split())
    Tags((tmp_path / "page/data.html").read_text())
