"""`dpo-fast judge`: files of a folder, whole or absent, and going on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.errors import UserError
from dpo_fast.judging.lines import Lines
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.judge import judge
from dpo_fast.rounds.made import MakeAnew
from dpo_fast.training.config import build
from tests.support import ranks
from tests.support.judging import read_rows, write_code, write_rows
from tests.support.paths import ENVIRONMENT, ROOT
from tests.support.tokenizers import CHATML, byte_tokenizer

pytestmark = pytest.mark.processes
RULE = "def score(completion):\n    return len(completion.split())\n"
MADE = ("samples.jsonl", "rules.py", "scores.jsonl", "scores.manifest.json", "pairs.jsonl")
MADE += ("pairs.manifest.json", "judge-report.json")


def rows(count: int = 12) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": f"{index}?"}],
            "completions": [
                f"{word} {index}{' more' * index}" for word in ("yes", "no so", "if and")
            ],
            "finish_reasons": ["stop", "stop", "length"],
            "logps": [-1.5, -2.0, -3.0],
            "id": index,
        }
        for index in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "samples.jsonl", rows())
    write_code(tmp_path / "rules.py", RULE)
    return tmp_path


def config(folder, judge=None, **pairs) -> RoundsConfig:
    rule = {"type": "rule", "function": f"{folder}/rules.py:score"}
    tree = {"output_dir": str(folder), "model": {"path": "m"}, "judge": rule | (judge or {})}
    return build(RoundsConfig, tree | {"pairs": pairs}, "file")


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        judge(config(*arguments, **options))
    return str(error.value)


def examples(folder, name: str, **options):
    data = DataConfig(train=str(folder / name), cache_dir=str(folder / "cache"), **options)
    return load_examples(data, byte_tokenizer(template=CHATML), split="train")


def test_scores_and_pairs_are_rows_that_train_reads(folder):
    report = judge(config(folder, only_length="keep"))
    assert sorted(each.name for each in folder.iterdir()) == sorted(MADE)
    scored = read_rows(folder / "scores.jsonl")
    assert [row["scores"] for row in scored[:2]] == [[2, 3, 3], [3, 4, 4]]
    kept = [{k: row[k] for k in rows()[0]} for row in scored]
    assert kept == rows() and scored[0]["verdicts"] == ["scored"] * 3
    assert report["pairs"] == 12 and report["unfinished"] == 12
    assert report["verdicts"] == {"scored": 36, "refused": 0, "unparsable": 0, "failed": 0}
    pairs, groups = examples(folder, "pairs.jsonl"), examples(folder, "scores.jsonl")
    assert len(pairs) == len(groups) == 12
    assert list(groups[0]["scores"]) == [2, 3, 3]
    # The answer is the assistant's, with its end of turn.
    text = byte_tokenizer().decode(pairs[0]["chosen_ids"])
    assert text.startswith("no so 0") and text.endswith("<|im_end|>")


def test_what_is_complete_is_used_and_what_was_edited_is_named(folder):
    first = judge(config(folder))
    before = {name: (folder / name).stat().st_mtime_ns for name in MADE}
    assert judge(config(folder)) == first
    assert {name: (folder / name).stat().st_mtime_ns for name in MADE} == before
    said = refusal(folder, margin=0.5)
    assert (
        f"{folder}/pairs.jsonl was made with something else: pairs.margin was 0.0 and is 0.5"
        in said
    )
    assert f"remove {folder}/pairs.jsonl to make the pairs anew; scores stay" in said
    write_code(folder / "rules.py", RULE + "# edited\n")
    said = refusal(folder)
    assert "scores.jsonl was made with something else: judge.sha256 was" in said
    assert f"remove {folder}/scores.jsonl and {folder}/pairs.jsonl to judge anew" in said
    write_code(folder / "rules.py", RULE)
    write_rows(folder / "samples.jsonl", rows(11))
    assert "samples was" in refusal(folder)


def test_pairs_alone_are_made_anew(folder):
    judge(config(folder))
    (folder / "pairs.jsonl").unlink()
    assert judge(config(folder, strategy="all", margin=0.5))["pairs"] == 12
    assert judge(config(folder, strategy="all", margin=0.5))["pairs"] == 12


def test_the_file_in_the_documents_is_one():
    text = (ROOT / "docs/ROUNDS.md").read_text(encoding="utf-8").partition("## Judging")[2]
    lines = re.search(r"^    output_dir: .*\n(?:    .*\n)+", text, re.MULTILINE)[0]
    assert build(RoundsConfig, yaml.safe_load(lines), "docs").judge.function == "rules.py:score"


def test_groups_in_place_of_pairs(folder):
    report = judge(config(folder, strategy="groups", unfinished="keep"))
    assert report["groups"] == 12 and "pairs" not in report
    groups = examples(folder, "pairs.jsonl")
    assert len(groups) == 12 and list(groups[1]["scores"]) == [3, 4, 4]


def test_what_was_made_with_something_else_is_told_key_by_key(tmp_path):
    before = {"judge": {"type": "rule", "kwargs": {"a": 1}}, "samples": "x"}
    now = {"judge": {"type": "rule", "kwargs": {"a": 2}, "new": None}, "samples": "x"}
    anew = MakeAnew(tmp_path / "s.jsonl", [tmp_path / "s.jsonl"], "judge anew")
    anew.check(before, before)
    with pytest.raises(UserError, match=r"else: judge\.kwargs\.a was 1 and is 2\. Set it back"):
        anew.check(before, now)


def test_a_manifest_that_is_gone_is_named(folder):
    judge(config(folder))
    (folder / "scores.manifest.json").unlink()
    assert "scores.manifest.json cannot be read (No such file or directory)" in refusal(folder)


def test_a_judge_that_always_answers_the_same_is_named(folder):
    write_code(folder / "rules.py", "def score(completion):\n    return 1\n")
    said = refusal(folder)
    assert "judge.type=rule always answers the same: every one of 36 completions got 1" in said
    assert (folder / "scores.jsonl").exists() and not (folder / "pairs.jsonl").exists()
    report = json.loads((folder / "judge-report.json").read_text())
    assert report["prompts_tied"] == 12 and report["distinct_scores"] == 1


def test_no_pair_says_why(folder):
    said = refusal(folder, margin=100)
    assert "no pair can be made" in said and "scores within pairs.margin: 12" in said


def test_verdicts_without_a_score_are_counted_and_kept_apart(folder):
    rule = """
    def score(completion):
        if completion.startswith("yes"):
            return None
        if completion.startswith("no so 3"):
            return float("nan")
        if completion.startswith("if and 4"):
            raise KeyError("gone")
        return len(completion)
    """
    write_code(folder / "rules.py", rule)
    report = judge(config(folder, unfinished="keep"))
    assert report["verdicts"] == {"scored": 22, "refused": 12, "unparsable": 1, "failed": 1}
    (failed,), (unparsable,) = report["reasons"]["failed"], report["reasons"]["unparsable"]
    assert failed.startswith(f"{folder}/scores.jsonl:5: KeyError: 'gone'")
    assert f"({folder}/rules.py, line 8)" in failed and "nan is not finite" in unparsable
    scored = read_rows(folder / "scores.jsonl")
    assert scored[4]["scores"] == [None, 27, None] and scored[3]["scores"] == [None, None, 23]
    assert report["pairs"] == 10 and report["refused"] == {"fewer than two scores": 2}


def test_judging_goes_on_where_it_stopped_and_comes_to_the_same(folder, tmp_path):
    judge(config(folder, only_length="keep"))
    whole = {name: (folder / name).read_bytes() for name in ("scores.jsonl", "pairs.jsonl")}
    for name in MADE[2:]:
        (folder / name).unlink()
    crash = RULE.replace(
        "    return",
        "    if open('count', 'a').write('x') and "
        "open('count').read().count('x') > 20: raise SystemExit(7)\n    return",
    )
    count = folder / "count"
    write_code(folder / "rules.py", crash.replace("'count'", repr(str(count))))
    said = refusal(folder, {"max_failures": 5, "max_retries": 0})
    assert "judge.type=rule failed 5 times in a row (judge.max_failures=5)" in said
    assert f"{folder}/samples.jsonl:9" in said and "it ended with code 7" in said
    assert "the same command goes on after it" in said
    journal = read_rows(folder / ".judging/rows-00000.jsonl")
    assert [entry["number"] for entry in journal] == list(range(8))
    assert journal[7]["content"]["words"] == ["failed"] * 3  # and so it is judged again
    # Another rule would go on with scores of two kinds.
    code = (folder / "rules.py").read_text()
    write_code(folder / "rules.py", RULE)
    assert ".judging was made with something else: judge.sha256" in refusal(folder)
    write_code(folder / "rules.py", code)
    count.unlink()
    judge(config(folder, {"max_failures": 5, "max_retries": 0}, only_length="keep"))
    assert {name: (folder / name).read_bytes() for name in whole} == whole
    assert (
        count.read_text().count("x") == 3 * 6
    )  # six rows of the twelve were left, the first with one failure


def test_bad_rows_are_named_by_file_line_and_field(folder):
    for change, said in (
        ({"completions": "text"}, "'completions' is no list of texts: 'text'"),
        ({"completions": []}, "'completions' is no list of texts: []"),
        ({"completions": ["a", 3]}, "completions[1] is no text: 3"),
        ({"finish_reasons": ["stop"]}, "'finish_reasons' does not have one for each completion"),
        ({"prompt": 3}, "'prompt' is neither text nor messages: 3"),
        ({"prompt": None}, "no field 'prompt'"),
        (
            {"completions": ["a", "b\ud800"]},
            "completions[1] is not Unicode text: it has a lone surrogate",
        ),
        ({"logps": [float("nan")]}, "field 'logps' is not finite: NaN is not JSON"),
    ):
        bad = rows(3)
        bad[1] |= change
        write_rows(folder / "samples.jsonl", bad)
        assert f"{folder}/samples.jsonl:2: {said}" in refusal(folder)
        assert not (folder / "scores.jsonl").exists()
    (folder / "samples.jsonl").write_text("")
    assert "samples.jsonl has no rows" in refusal(folder)
    (folder / "samples.jsonl").unlink()
    assert "samples.jsonl is not there: run dpo-fast sample first" in refusal(folder)


def test_half_a_character_in_a_column_that_nobody_reads_is_kept(folder):
    odd = [each | {"row": {"note": "\ud800 \u2028"}} for each in rows(3)]
    write_rows(folder / "samples.jsonl", odd)
    judge(config(folder, {"type": "rule"}, only_length="keep"))
    assert [row["row"] for row in read_rows(folder / "scores.jsonl")] == [odd[0]["row"]] * 3


def test_a_full_disk_loses_nothing(folder, monkeypatch):
    append, room = Lines.append, [5]

    def full(self, value):
        def write(descriptor, content):
            room[0] -= 1
            if room[0] < 0:
                raise OSError(28, "No space left on device")
            return real(descriptor, content)

        real = os.write
        with monkeypatch.context() as patch:
            patch.setattr("dpo_fast.judging.lines.os.write", write)
            append(self, value)

    monkeypatch.setattr(Lines, "append", full)
    said = refusal(folder, only_length="keep")
    assert "rows-00000.jsonl cannot be written" in said and "No space left on device" in said
    assert "make room, and run the same command" in said
    monkeypatch.undo()
    assert len(read_rows(folder / ".judging/rows-00000.jsonl")) == 5
    assert judge(config(folder, only_length="keep"))["pairs"] == 12


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_bytes(folder):
    """SIGKILL while a rule is in an endless loop, which ends with it; and the same command again."""
    judge(config(folder, only_length="keep"))
    whole = {name: (folder / name).read_bytes() for name in ("scores.jsonl", "pairs.jsonl")}
    for name in MADE[2:]:
        (folder / name).unlink()
    go, pid = folder / "go", folder / "pid"
    endless = f"""
    import os
    def score(completion):
        if completion.startswith("yes 5") and not os.path.exists({str(go)!r}):
            open({str(pid)!r}, "w").write(str(os.getpid()))
            while True:
                pass
        return len(completion.split())
    """
    write_code(folder / "rules.py", endless)
    (folder / "file.yaml").write_text(json.dumps(tree(folder)), encoding="utf-8")
    command = [sys.executable, "-m", "dpo_fast", "judge", str(folder / "file.yaml"), "--quiet"]
    journal = folder / ".judging/rows-00000.jsonl"
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        assert soon(lambda: pid.exists() and pid.read_text())
        process.send_signal(signal.SIGKILL)
    assert journal.read_bytes().count(b"\n") == 5
    assert soon(lambda: not Path(f"/proc/{pid.read_text()}").exists())
    go.touch()
    judge(build(RoundsConfig, tree(folder), "file"))
    assert {name: (folder / name).read_bytes() for name in whole} == whole
    assert not journal.exists()


def soon(what) -> bool:
    deadline = time.monotonic() + 60
    while not (found := bool(what())) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


@pytest.mark.slow
def test_two_ranks_share_the_rows_and_write_the_same_files(folder, tmp_path):
    (tmp_path / "two").mkdir()
    judge(config(folder, only_length="keep"))
    other = tree(folder) | {"output_dir": str(tmp_path / "two")}
    other["judge"]["samples"] = str(folder / "samples.jsonl")
    ranks.group(2).do("judge", other)
    for name in ("scores.jsonl", "pairs.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (folder / name).read_bytes()


def tree(folder) -> dict:
    """The file of a command."""
    return config(folder, only_length="keep").model_dump(exclude_unset=True)


def test_a_report_that_is_gone_is_made_again(folder):
    first = judge(config(folder))
    (folder / "judge-report.json").unlink()
    assert judge(config(folder)) == first
    assert json.loads((folder / "judge-report.json").read_text()) == first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scores": None}, "expected one score for each of 3 completions"),
        ({"scores": [1, 2]}, "expected one score for each of 3 completions"),
        ({"scores": [1, "2", 3]}, "the score '2' is no number, and not null"),
    ],
)
def test_scores_that_an_edit_has_spoilt(folder, change, said):
    judge(config(folder))
    (folder / "pairs.jsonl").unlink()
    scored = read_rows(folder / "scores.jsonl")
    write_rows(folder / "scores.jsonl", [scored[0], scored[1] | change, *scored[2:]])
    assert f"scores.jsonl:2: {said}" in refusal(folder)
    edited = {"prompt": "q", "completions": ["yes", "no so"], "scores": [2, 1]}
    write_rows(folder / "scores.jsonl", [edited])  # scores of somebody's own
    assert judge(config(folder))["pairs"] == 1


def test_lines_of_the_journal_that_are_none_are_passed_over(folder):
    (folder / ".judging").mkdir()
    (folder / ".judging" / "rows-00000.jsonl").write_text('{"x": 1}\n{"number": 3}\n')
    assert judge(config(folder))["pairs"]


def test_why_there_are_no_pairs(folder):
    write_code(folder / "rules.py", "def score(completion):\n    pass\n")
    said = refusal(folder)
    assert "judge.type=rule scored none of 36 completions (36 refused); the first: " in said
    write_rows(folder / "samples.jsonl", [{"prompt": "q", "completions": ["one"]}])
    for name in ("scores.jsonl", "pairs.jsonl"):
        (folder / name).unlink(missing_ok=True)
    assert "one completion. Sample more of each, with sample.num_generations=4" in refusal(folder)
