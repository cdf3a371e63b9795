"""load_examples: contents, cache, splits, reports, and a real data set."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import datasets
import multiprocess
import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples, open_examples, publish_unless_there, tokenizer_hash
from dpo_fast.data.report import DataReport, render_examples, render_report
from dpo_fast.data.stream import ExampleStream
from dpo_fast.errors import UserError
from tests.support.paths import ROOT
from tests.support.tokenizers import CHATML, EOS, byte_tokenizer, chat_tokenizer, ids_of

HH = ROOT.parent / "shared" / "data" / "hh_harmless_1500.jsonl.gz"
datasets.disable_progress_bars()


def pair(index, **more):
    return {"prompt": f"Q{index}", "chosen": f"yes {index}", "rejected": f"no {index}", **more}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def load(tmp_path):
    """load(rows, split, tokenizer, **options): writes the rows to pairs.jsonl and loads them."""

    def run(rows=None, split="train", tokenizer=None, eos_ids=(), **options):
        path = tmp_path / "pairs.jsonl"
        if rows is not None:
            write(path, rows)
        defaults = {"train": str(path), "cache_dir": str(tmp_path / "cache")}
        config = DataConfig(**(defaults | options))
        return load_examples(config, tokenizer or byte_tokenizer(), split=split, eos_ids=eos_ids)

    run.cache = tmp_path / "cache"
    return run


def stored(load):
    """The names in the cache."""
    return sorted(path.name for path in load.cache.iterdir())


def test_pairs_and_extras(load):
    tokenizer = byte_tokenizer()
    data = load([pair(1, weight=2, note="x"), pair(22, weight=0.5)])
    assert len(data) == 2
    assert data[1] == {
        "prompt_ids": ids_of(tokenizer, "Q22"),
        "chosen_ids": [*ids_of(tokenizer, "yes 22"), EOS],
        "rejected_ids": [*ids_of(tokenizer, "no 22"), EOS],
        "weight": 0.5,
    }
    assert data[-1] == data[1]
    assert data.numbers == ["weight"]
    assert data.where(1).endswith("pairs.jsonl:2")
    assert {name: values.tolist() for name, values in data.lengths.columns().items()} == {
        "prompt": [2, 3],
        "chosen": [6, 7],
        "rejected": [5, 6],
    }
    assert data.report.ignored_columns == ["note"]
    with pytest.raises(IndexError):
        data[2]


def test_a_column_that_only_some_rows_have(load):
    with pytest.raises(UserError, match=r"pairs.jsonl:2: no 'margin'.*1 of 2 rows lack it"):
        load([pair(1, margin=0.0), pair(2)])


def test_parquet_with_null_columns(load, tmp_path):
    path = tmp_path / "pairs.parquet"
    datasets.Dataset.from_list([pair(1, margin=None), pair(2, margin=None)]).to_parquet(str(path))
    data = load(train=str(path))
    assert len(data) == 2
    assert data.numbers == []


def test_several_sources_and_max_rows(load, tmp_path):
    more = write(tmp_path / "more.jsonl", [pair(8), pair(9)])
    write(tmp_path / "pairs.jsonl", [pair(1)])
    data = load(train=[str(tmp_path / "pairs.jsonl"), str(more)])
    assert [data.where(index).split("/")[-1] for index in range(3)] == [
        "pairs.jsonl:1",
        "more.jsonl:1",
        "more.jsonl:2",
    ]
    few = load([pair(index) for index in range(9)], max_rows=4)
    assert (len(few), few.report.rows_read) == (4, 4)


# Bad rows and drops


def test_bad_row_stops_with_its_place(load):
    with pytest.raises(UserError, match=r"pairs.jsonl:2: BOS inside chosen.*data.on_bad_row=skip"):
        load([pair(1), pair(2, chosen="<s>b")])
    assert stored(load) == []


def test_bad_rows_are_skipped_and_counted(load, tmp_path):
    rows = [pair(1), pair(2, chosen=" "), pair(3), pair(4, rejected=""), pair(5, chosen="<s>b")]
    write(tmp_path / "pairs.jsonl", rows)
    with open(tmp_path / "pairs.jsonl", "a") as file:
        file.write("{broken\n")
    report = load(on_bad_row="skip").report
    assert (report.rows_read, report.examples_kept) == (6, 2)
    assert report.bad.counts == {"broken JSON": 1, "BOS inside chosen": 1}
    assert report.dropped.counts == {"empty chosen": 1, "empty rejected": 1}
    places = [where.rsplit(":", 1)[1] for where, _ in report.bad_rows]
    assert places == ["6", "5"]
    with pytest.raises(UserError, match=r"pairs.jsonl:5: BOS inside chosen"):
        load([pair(1), pair(1), pair(1), pair(1), rows[4]])


def test_every_row_is_counted_but_fifty_are_kept(load):
    rows = [pair(0), *(pair(index, chosen="<s>b") for index in range(60))]
    report = load(rows, on_bad_row="skip").report
    assert report.bad.counts == {"BOS inside chosen": 60}
    assert len(report.bad_rows) == 50


def test_drops_and_cuts_are_counted(load):
    rows = [pair(1), pair(2, prompt="long prompt"), pair(3, chosen="no 3\x00", rejected="no 3")]
    report = load(rows, max_length=12, truncation="drop").report
    assert report.dropped.counts == {"longer than max_length": 1}
    assert list(report.dropped)[0][1] == "longer than max_length: 17 > 12 tokens"
    # Pair 2 has 11 + 6 and 11 + 5 tokens: answers are cut to 12 - 8, or not at all for 12 - 4.
    for reserve, cut in ((8, 2), (4, 0)):
        report = load(rows, max_length=12, max_prompt_length=reserve).report
        assert (report.prompts_cut, report.answers_cut, report.examples_kept) == (1, cut, 3)
    report = load(rows, max_length=5, max_prompt_length=1).report
    assert report.dropped.counts == {"the answers are the same once cut": 1}


def test_truncation_error_is_not_skipped(load):
    with pytest.raises(UserError, match=r"pairs.jsonl:1: .*data.max_length=5; raise it to 8"):
        load([pair(1)], max_length=5, truncation="error", on_bad_row="skip")


def test_nothing_left(load):
    with pytest.raises(UserError, match=r"none of 2 rows.*2 x empty chosen \(first: .*:1"):
        load([pair(1, chosen=""), pair(2, chosen="")], on_bad_row="skip")
    with pytest.raises(UserError, match=r"none of 1 rows.*1 x longer than max_length"):
        load([pair(1)], max_length=3, truncation="drop")
    assert stored(load) == []


def test_the_fingerprint_is_that_of_all_digests_in_order(load):
    for options in ({}, {"eval_rows": 4}):
        data = load([pair(index) for index in range(13)], **options)
        digests = b"".join(data.digests.to_pylist())
        assert len(digests) == 32 * len(data)
        assert data.token_fingerprint == hashlib.sha256(digests).hexdigest()


# The cache


def test_second_call_reuses_the_first(load, monkeypatch):
    first = load([pair(1), pair(2)])
    monkeypatch.setattr("dpo_fast.data.dataset.build", None)  # calling it would fail
    again = load()
    assert again.fingerprint == first.fingerprint
    assert again.report == first.report
    # Options that do not change the stored pairs; and padding state left by another call.
    tokenizer = byte_tokenizer()
    tokenizer(["a", "ab"], padding=True)
    assert len(load(eval_rows=1, workers=3, tokenizer=tokenizer)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 99},
        {"max_prompt_length": 9},
        {"truncation": "keep_start"},
        {"on_bad_row": "skip"},
        {"add_eos": False},
        {"max_rows": 2},
        {"format": "pairs"},
        {"prompt_end": "#"},
        {"columns": {"chosen": "rejected", "rejected": "chosen"}},
        {"eos_ids": (7,)},
        {"tokenizer": byte_tokenizer(bos=True)},
        {"tokenizer": byte_tokenizer(template=CHATML)},
        {"tokenizer": byte_tokenizer(merges=(("y", "e"),))},
        {"tokenizer": byte_tokenizer(eos_token="<|im_end|>")},
        {"rows": [pair(1), pair(3)]},
    ],
)
def test_what_changes_the_pairs_changes_the_key(load, options):
    load([pair(1), pair(2)])
    load(**options)
    assert len(stored(load)) == 2


def test_template_file_is_part_of_the_key(load, tmp_path):
    template = tmp_path / "t.jinja"
    for content in (CHATML, CHATML + " "):
        template.write_text(content)
        load([pair(1)], chat_template=str(template))
    assert len(stored(load)) == 2


def test_arguments_of_the_template_without_a_chat(load):
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(UserError, match="kwargs={'enable_thinking': False} is not used: all rows"):
        load([pair(1), pair(2)], **options)


def test_a_cache_that_cannot_be_written_is_named(load, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/cache cannot be written.*data.cache_dir"):
        load([pair(1)], cache_dir=str(tmp_path / "file" / "cache"))
    assert load(cache_dir=str(tmp_path / "cache"))


def test_a_report_with_other_counts_is_not_read(load, monkeypatch):
    """Another version of the code may count other things. What it stored is not damaged."""

    @dataclass
    class OtherReport(DataReport):
        refunds: int = 0

    def key():  # what a checkpoint of a stream is held to
        config = DataConfig(train=str(load.cache.parent / "pairs.jsonl"))
        return ExampleStream(config, byte_tokenizer()).key

    monkeypatch.setattr("dpo_fast.data.dataset.DataReport", OtherReport)
    load([pair(1)])
    other = key()
    monkeypatch.undo()
    assert other == key()
    assert load([pair(1)]).report.examples_kept == 1
    assert len(stored(load)) == 2


def test_damaged_cache_names_the_folder(load, capsys):
    load([pair(1)])
    (key,) = stored(load)
    (load.cache / key / "report.json").write_text("{")
    with pytest.raises(UserError, match=f"{key}: the stored data is damaged.*delete the folder"):
        open_examples(DataConfig(train="a"), None, split="train", folders=[str(load.cache / key)])
    assert len(load()) == 1
    assert f"{key}: the stored data is damaged (report.json is altered)" in capsys.readouterr().err


def test_publishing_twice_keeps_the_first(tmp_path):
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    publish_unless_there(tmp_path / "theirs", tmp_path / "key")
    publish_unless_there(tmp_path / "mine", tmp_path / "key")
    assert (tmp_path / "key" / "file").read_text() == "theirs"
    with pytest.raises(OSError):
        publish_unless_there(tmp_path / "nothing", tmp_path / "other")


PREPARE = """
import sys
from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from tests.support.paths import ROOT
from tests.support.tokenizers import byte_tokenizer
config = DataConfig(train=sys.argv[1], cache_dir=sys.argv[2])
print(load_examples(config, byte_tokenizer(), split="train").fingerprint)
"""


@pytest.mark.processes
def test_two_processes_at_once(load, tmp_path):
    path = write(tmp_path / "pairs.jsonl", [pair(index) for index in range(300)])
    command = [sys.executable, "-c", PREPARE, str(path), str(load.cache)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    runs = [subprocess.Popen(command, env=environment, text=True, **streams) for _ in range(2)]
    prints = {run.communicate(timeout=120)[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert prints == {load().fingerprint}
    assert len(stored(load)) == 1


def test_processes_that_cannot_share_a_lock_are_told(load, monkeypatch):
    """No /dev/shm: multiprocessing says that some file does not exist."""

    def none():
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(multiprocess, "Lock", none)
    with pytest.raises(UserError, match=r"data.workers=2 needs shared memory \(/dev/shm\).*=1"):
        load([pair(1), pair(2)], workers=2)


def test_workers_give_the_same_pairs(load, tmp_path):
    rows = [pair(index, chosen="" if index % 7 == 0 else "y" * index) for index in range(1, 40)]
    one = load(rows, on_bad_row="skip", cache_dir=str(tmp_path / "one"))
    two = load(on_bad_row="skip", cache_dir=str(tmp_path / "two"), workers=2)
    assert two.fingerprint == one.fingerprint
    assert two.report == one.report


def test_error_in_a_worker_is_a_user_error(load):
    with pytest.raises(UserError, match=r"pairs.jsonl:3: BOS inside chosen"):
        load([pair(1), pair(2), pair(3, chosen="<s>x")], workers=2)


def test_fingerprint_follows_order_and_content(load, tmp_path):
    rows = [pair(1), pair(2), pair(3)]
    same = load(rows).fingerprint
    other_file = write(tmp_path / "other.jsonl", rows)
    assert load(train=str(other_file)).fingerprint == same
    assert load(rows[::-1]).fingerprint != same
    assert load(rows[:2]).fingerprint != same
    assert len(same) == 64


@pytest.mark.parametrize("column", ["weight", "margin", "soft_label", "reference_chosen_logps"])
def test_fingerprint_follows_the_columns_that_losses_read(load, column):
    def of(*values, **more):
        return load(
            [pair(i, **{column: value}, **more) for i, value in enumerate(values)]
        ).fingerprint

    more, low, high = {}, 0.25, 0.5
    if column.startswith("reference"):
        more, low, high = {"reference_rejected_logps": -1.0}, -0.5, -0.25
    assert of(low, high, **more) == of(low, high, **more)
    assert of(low, high, **more) != of(high, low, **more)
    assert of(low, high, **more) != load([pair(0), pair(1)]).fingerprint


def test_tokenizer_hash_is_stable():
    assert tokenizer_hash(byte_tokenizer()) == tokenizer_hash(byte_tokenizer())


# Splits


def test_held_out_pairs_are_disjoint_and_reproducible(load):
    load([pair(index) for index in range(20)])
    train, held_out = (load(split=split, eval_rows=5, seed=3) for split in ("train", "eval"))
    places = [{data.where(i) for i in range(len(data))} for data in (train, held_out)]
    assert [len(place) for place in places] == [15, 5]
    assert not places[0] & places[1]
    assert len(stored(load)) == 1  # tokenised once for both
    assert load(split="eval", eval_rows=5, seed=3).fingerprint == held_out.fingerprint
    assert load(split="eval", eval_rows=5, seed=4).fingerprint != held_out.fingerprint
    assert len(train.lengths) == 15
    assert train.report.held_out == 5


def test_own_evaluation_data(load, tmp_path):
    other = write(tmp_path / "eval.jsonl", [pair(7)])
    data = load([pair(1)], split="eval", eval=str(other))
    assert data.where(0).endswith("eval.jsonl:1")


def test_impossible_splits(load):
    with pytest.raises(UserError, match=r"data.eval_rows=3 leaves nothing.*3 usable pairs; try 1"):
        load([pair(1), pair(2), pair(3)], eval_rows=3)
    with pytest.raises(UserError, match="set data.eval, or data.eval_rows"):
        load(split="eval")
    with pytest.raises(UserError, match="split='test'"):
        load(split="test")


# Reports


def rendered(function, *arguments):
    stream = io.StringIO()
    function(*arguments, Console(file=stream, width=120))
    return stream.getvalue()


def test_report_numbers_round_trip_and_rendering(load):
    report = load([pair(1), pair(22), pair(3, chosen="")], on_bad_row="skip").report
    assert report.lengths["longest"]["max"] == 10
    assert report.lengths["prompt"] == dict.fromkeys(("p75", "p95", "p99", "max"), 3) | {
        "p5": 3,
        "p25": 3,
        "p50": 3,
    }
    assert report.tokens == {
        "prompt": 5,
        "chosen": 13,
        "rejected": 11,
        "total": 29,
        "scored": 24,
        "separate": 34,
    }
    assert DataReport.from_json(report.to_json()) == report
    text = rendered(render_report, report)
    assert "3 rows read, 2 pairs kept, 0 bad, 1 dropped" in text
    assert "empty chosen" in text
    assert "4 of 4 answers did not end their turn; EOS was put last" in text


def test_examples_mark_scored_tokens_without_colour(load):
    data = load([pair(1, prompt="Q\n", chosen="é!")])
    text = rendered(render_examples, data, byte_tokenizer())
    assert "prompt   Q·\\n\n" in text
    assert "chosen   ⟦Ã·©·!·</s>⟧" in text
    assert "rejected ⟦n·o· ·1·</s>⟧" in text


def test_examples_show_what_is_not_scored(load):
    """The answer's other messages, and the headers of its turns."""
    user, yes = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "ab"}
    row = {
        "prompt": [user],
        "chosen": [yes, user, yes, user],
        "rejected": [yes, yes | {"weight": 0}],
    }
    data = load([row], tokenizer=chat_tokenizer())
    text = rendered(render_examples, data, chat_tokenizer()).replace("\n", "")
    header = "<|im_start|>·a·s·s·i·s·t·a·n·t·\\n"
    asked = f"\\n·<|im_start|>·u·s·e·r·\\n·Q·<|im_end|>·\\n·{header}"
    assert f"chosen   ⟦a·b·<|im_end|>⟧{asked}⟦a·b·<|im_end|>⟧" in text
    assert "rejected ⟦a·b·<|im_end|>⟧" in text
    report = rendered(render_report, data.report)
    assert "1 of 2 answers end with messages that are not the assistant's; these are left" in report
    assert "tokens of answers are not scored" in report
    assert data.report.tokens["scored"] == 9


# A real data set


def unusable_by_hand(line):
    """Why a row of the HH sample is unusable, found without the package; None when it is not."""
    row = json.loads(line)
    # Everything before the last turn of the assistant, and that turn.
    heads, tails = zip(*(row[k].rsplit("\n\nAssistant:", 1) for k in ("chosen", "rejected")))
    if row["chosen"] == row["rejected"]:
        return "chosen equals rejected"
    if heads[0] != heads[1]:
        return "no common prompt"
    empty = [name for name, tail in zip(("chosen", "rejected"), tails) if not tail.strip()]
    return f"empty {empty[0]}" if empty else None


@pytest.mark.skipif(not HH.exists(), reason="the HH sample is not beside the repository")
def test_hh_sample(load):
    expected = {}
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if reason := unusable_by_hand(line):
                expected[number] = reason
    assert expected == {
        87: "empty chosen",
        517: "empty chosen",
        926: "empty chosen",
        1104: "empty chosen",
        1255: "no common prompt",
    }
    report = load(train=str(HH), on_bad_row="skip", tokenizer=byte_tokenizer(bos=True)).report
    told = [*report.bad_rows, *(row for rows in report.dropped.rows.values() for row in rows)]
    found = {int(where.rsplit(":", 1)[1]): text.split(":")[0] for where, text in told}
    assert found == expected
    assert (report.rows_read, report.examples_kept, report.dropped.total) == (1500, 1495, 4)
    with pytest.raises(UserError, match=r"hh_harmless_1500.jsonl.gz:1255: no common prompt"):
        load(train=str(HH))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_ignored_column_may_hold_anything(load, tmp_path, suffix):
    """In a stream, too, and in the entry of a mixture that ignores it alone."""
    rows = [pair(i, at=float("nan"), more={"a": 1}) for i in range(4)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write(path, rows)
        path.write_text(path.read_text().replace('"a": 1', '"a": 1, "a": 2'))
    else:
        table = pyarrow.Table.from_pylist(rows)
        offsets = pyarrow.array([0, 1, 1, 1, 1], pyarrow.int32()).buffers()[1]
        damaged = pyarrow.StringArray.from_buffers(4, offsets, pyarrow.py_buffer(b"\xff"))
        pyarrow.parquet.write_table(table.set_column(3, "at", damaged), path)
    ignored = ["at", "more"]
    assert len(load(train=str(path), ignore_columns=ignored)) == 4
    write(tmp_path / "other.jsonl", [pair(9)])
    entries = [{"path": str(path), "ignore_columns": ignored}, str(tmp_path / "other.jsonl")]
    assert len(load(train=entries)) == 5
    entries[0]["rows"] = 3
    assert len(load(train=entries)) == 4
    options = {"train": str(path), "ignore_columns": ignored, "streaming": True}
    stream = ExampleStream(DataConfig(**options), byte_tokenizer(), ())
    assert len(stream.read()) == 4
    if suffix == "parquet":
        with pytest.raises(UserError, match="field 'at' is damaged"):
            load(train=str(path), ignore_columns=["more"])
    else:
        with pytest.raises(UserError, match="'a' stands twice"):
            load(train=str(path), ignore_columns=["at"])
        with pytest.raises(UserError, match="'at' is not finite: .* list 'at' in data.ignore_col"):
            path.write_text(path.read_text().replace('"a": 2', '"b": 2'))
            load(train=str(path), ignore_columns=["more"])
