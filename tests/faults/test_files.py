"""Malformed data files: no traceback, no dead process, bounded time and memory, nothing wrong trained."""

import gzip
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pytest

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.files import read_file
from dpo_fast.data.sources import FileSource, SavedSource, resolve
from dpo_fast.data.stream import ExampleStream
from dpo_fast.data.verdicts import KINDS_KEPT, BadRows, Tally
from dpo_fast.errors import LONGEST, UserError
from tests.support import malformed
from tests.support.faults import SLOW
from tests.support.memory import grown
from tests.support.paths import ROOT
from tests.support.tokenizers import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer(bos=True, template=CHATML)
SECONDS = 20  # for one file, on a busy machine


def outcome(path: Path, on_bad_row: str) -> tuple[str, ExampleStream | None, object]:
    """The message about a file, or the stream and its first chunk."""
    config = DataConfig(
        train=str(path),
        streaming=True,
        stream_buffer=100,
        on_bad_row=on_bad_row,
        max_length=2**17,
        max_row_bytes=2**16,
    )
    stream = ExampleStream(config, TOKENIZER)
    try:
        return "", stream, stream.read()
    except UserError as error:
        return str(error), None, None


def check(folder: Path, count: int, seed: int) -> Counter:
    """Counts of (suffix, refused) among so many files that are drawn."""
    counts: Counter = Counter()
    for index, (suffix, content) in enumerate(malformed.cases(malformed.bad_file, count, seed)):
        path = folder / f"{index}{suffix}"
        path.write_bytes(content)
        start = time.monotonic()
        for on_bad_row in ("error", "skip"):
            message, _, chunk = outcome(path, on_bad_row)
            assert len(message) <= LONGEST + 100 and "\x1b" not in message, index
            if chunk is not None and suffix in (".jsonl", ".ndjson"):
                check_texts(path, chunk)
        assert time.monotonic() - start < SECONDS, index
        counts[suffix, bool(message)] += 1
        path.unlink()
    return counts


def check_texts(path: Path, chunk) -> None:
    """What is trained on of pairs of text is what a line says, and says without doubt."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for place, example in zip(chunk.places, chunk.examples):
        row = sound(lines[int(place.rpartition(":")[2]) - 1])
        answer = row.get("chosen", row.get("completion"))
        if not isinstance(row.get("prompt"), str) or not isinstance(answer, str):
            continue
        ids = example.get("chosen_ids", example.get("completion_ids"))
        if (
            ids is None
            or answer.lstrip()[:1] in ("[", "{")
            or row["prompt"].lstrip()[:1] in ("[", "{")
        ):
            continue  # of a group, or messages as text
        written = TOKENIZER.decode([*example["prompt_ids"], *ids], skip_special_tokens=True)
        assert written == TOKENIZER.decode(
            TOKENIZER(row["prompt"] + answer)["input_ids"], skip_special_tokens=True
        ), place


def sound(line: bytes) -> dict:
    """The row of a line; fails where it is not one, or may mean two things."""

    def once(pairs: list) -> dict:
        assert len(dict(pairs)) == len(pairs), line
        return dict(pairs)

    def number(text: str) -> float:
        assert math.isfinite(float(text)), line
        return float(text)

    row = json.loads(line, object_pairs_hook=once, parse_constant=number, parse_float=number)
    assert isinstance(row, dict)
    return row


def check_saved(folder: Path, count: int, seed: int) -> Counter:
    """The same for folders that `datasets` has saved: each ends in rows or in one message."""
    data = datasets.Dataset.from_list([malformed.sound_row(index) for index in range(50)])
    data.save_to_disk(str(folder / "plain"))
    datasets.DatasetDict(train=data, test=data).save_to_disk(str(folder / "splits"))
    counts: Counter = Counter()
    for index in range(count):
        draw = random.Random(seed * 1_000_003 + index)
        spoiled = folder / "spoiled"
        shutil.copytree(folder / draw.choice(("plain", "splits")), spoiled)
        malformed.spoil(draw, spoiled)
        try:
            for source in resolve([str(spoiled)], "train"):
                assert source.identity()
                counts["datasets", len(list(source.rows(BadRows("skip")))) < 50] += 1
        except UserError as error:
            assert len(str(error)) <= LONGEST + 100, index
            counts["datasets", True] += 1
        shutil.rmtree(spoiled)
    return counts


def test_a_sample_of_spoiled_folders(tmp_path):
    assert check_saved(tmp_path, 40, seed=1)["datasets", True] > 20


def test_a_sample_of_malformed_ones(tmp_path):
    """In this process: before Arrow validated what it reads, one of thirty Arrow files ended it."""
    with grown(mib=400):
        counts = check(tmp_path, 300, seed=1)
    assert {suffix for suffix, _ in counts} == set(malformed.SUFFIXES)
    assert sum(counts[suffix, True] for suffix in malformed.SUFFIXES) > 100


THOUSANDS = """
import sys
from pathlib import Path
from tests.faults.test_files import check, check_saved, grown
with grown(mib=600):
    counts = check(Path(sys.argv[1]), 10_000, seed=2) + check_saved(Path(sys.argv[1]), 1000, seed=2)
for key, count in sorted(counts.items()):
    print(*key, count)
"""


@pytest.mark.slow
@pytest.mark.processes
@SLOW
def test_malformed_ones_by_the_thousand(tmp_path):
    """In a process of its own, which a fault of Arrow may end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", THOUSANDS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]


def told(path: Path, content: bytes | str, **options) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        list(read_file(path, BadRows("error", **options)))
    return str(error.value)


GOOD = '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
DEEP = "[" * 100 + "]" * 100
FAULTS = {
    "a key twice": ('{"prompt": "q", "prompt": "r"}', "'prompt' stands twice"),
    "a key twice, with NaN": ('{"a": NaN, "a": 1}', "'a' stands twice"),
    "a key twice, below": ('{"tools": [{"a": 1, "a": 2}]}', "'a' stands twice"),
    "NaN": ('{"margin": NaN}', "field 'margin' is not finite: NaN is not JSON"),
    "NaN, deep": ('{"a": ' + "[" * 50 + "NaN" + "]" * 50 + "}", "field 'a' is not finite"),
    "NaN alone": ("NaN", "not an object: expected an object of fields; NaN"),
    "beyond double": ('{"margin": 1e999}', "field 'margin' is not finite: 1e999 is out of range"),
    "deep": ('{"a": ' + DEEP + "}", "nested deeper than 60 levels"),
    "too deep for Python": ('{"a": ' + "[" * 100_000, "nested deeper than 60 levels"),
    "deep NaN": ('{"a":' * 5000 + "NaN" + "}" * 5000, "nested deeper than 60 levels"),
    "a number of 5,000 digits": ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
    "escape": ('{"a\x1b]0;x\x07": 1}', "broken JSON: Invalid control character"),
}


IGNORED = {
    "NaN": '"at": NaN',
    "a number beyond a double, below": '"at": [{"x": 1e999}]',
    "a key twice, below": '"at": {"a": 1, "a": 2}',
    "the column twice": '"at": 1, "at": 2',
    "deep": f'"at": {DEEP}',
    "all, in two columns": f'"at": NaN, "at": {{"a": 1, "a": {DEEP}}}, "of": -Infinity',
}


@pytest.mark.parametrize("what", IGNORED)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_what_is_wrong_with_an_ignored_column_is_ignored(tmp_path, what, suffix):
    row = GOOD.strip()[:-1] + ", " + IGNORED[what] + "}"
    text = f"[{row},\n{GOOD.strip()}]" if suffix == ".json" else f"{row}\n{GOOD}"
    path, bad = tmp_path / f"a{suffix}", BadRows("error")
    told(path, text)
    bad.ignored = ("at", "of")
    assert [found for _, found in read_file(path, bad)] == [json.loads(GOOD)] * 2
    # Another column that is as wrong is refused all the same, and so is the row itself.
    for more in ('"more": NaN', '"more": {"b": 1, "b": 1}', '"prompt": "r"'):
        told(path, text.replace('"at"', f'{more}, "at"', 1))
        with pytest.raises(UserError):
            list(read_file(path, bad))


@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_row_that_is_refused(tmp_path, what, suffix):
    line, message = FAULTS[what]
    found = told(tmp_path / f"a{suffix}", GOOD + line)
    assert message in found and found.startswith(f"{tmp_path}/a{suffix}:2: ")
    if suffix == ".json" and (
        "twice" in message or "finite" in message
    ):  # the others end the array
        array = f"[{GOOD.strip()},\n{line},\n{GOOD.strip()}]"
        assert message in told(tmp_path / "b.json", array)
        bad = BadRows("skip")
        rows = list(read_file(tmp_path / "b.json", bad))
        assert [where.rpartition(":")[2] for where, _ in rows] == ["1", "3"] and bad.total == 1


def test_a_json_array_is_read_piece_by_piece(tmp_path):
    """40 MB on one line, in the memory of a piece and a row."""
    path = tmp_path / "a.json.gz"
    row = {"prompt": "ü" * 5000, "chosen": "\u2028", "rejected": '\\"]}'}
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        file.write("[" + ", ".join([json.dumps(row, ensure_ascii=False)] * 4000) + "]")
    with grown(mib=60):
        assert all(found == row for _, found in read_file(path, BadRows("error")))
    assert sum(1 for _ in read_file(path, BadRows("error"))) == 4000


def test_places_in_an_array_of_many_pieces(tmp_path, monkeypatch):
    """Pieces of seven bytes cut characters, numbers and escapes; lines and columns stay what they are."""
    monkeypatch.setattr("dpo_fast.data.json_files.PIECE", 7)
    rows = [malformed.sound_row(index) | {"n": 123456, "ü": "€😀"} for index in range(20)]
    text = "[\n\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n\n"
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    found = list(read_file(path, BadRows("error")))
    assert [row for _, row in found] == rows
    assert [int(where.rpartition(":")[2]) for where, _ in found] == list(range(3, 23))
    message = told(path, text.replace('"Q7 "', '"Q7 " x'))
    assert f"{path}:10: broken JSON: Expecting ',' delimiter at column 18" in message
    broken = text.encode().replace("€".encode(), b"\xff", 1)
    assert f"{path}:3: bad UTF-8: byte {broken.splitlines()[2].index(255) + 1} of" in told(
        path, broken
    )
    assert "ends within a character" in told(path, b'[{"a": "\xe2\x82')
    assert "123456" in told(path, "[1, 2, 123456]") or "got a number" in told(path, "[123456]")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_gz_bomb(tmp_path, suffix):
    """300 MB on a line of a file of 300 KB."""
    path = tmp_path / f"a{suffix}.gz"
    head = {".jsonl": GOOD + '{"a": "', ".json": '[{"a": "', ".csv": "prompt,chosen,rejected\nq,a,"}
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head[suffix].encode())
        for _ in range(300):
            file.write(b"x" * 10**6)
    for on_bad_row in ("error", "skip"):
        with grown(mib=40), pytest.raises(UserError, match="max_row_bytes"):
            list(read_file(path, BadRows(on_bad_row)))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz"])
def test_a_gz_bomb_of_blank_lines(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(30):
            file.write(b"\n" * 10**6)
    with grown(mib=40), pytest.raises(UserError, match="no row for long"):
        list(read_file(path, BadRows("skip", 2**16)))


def test_a_long_row_is_passed_over(tmp_path):
    long = '{"a": "' + "x" * 5000 + '"}\n'
    for suffix, join in ((".jsonl", "".join), (".json", lambda rows: f"[{','.join(rows)}]")):
        path = tmp_path / f"a{suffix}"
        path.write_text(join([GOOD, long, GOOD]))
        bad = BadRows("skip", 1000)
        assert len(list(read_file(path, bad))) == 2
        assert bad.counts == {"more than data.max_row_bytes=1000": 1}
        assert "raise it if rows are meant" in told(path, join([GOOD, long]), max_row_bytes=1000)
    table = pyarrow.Table.from_pylist([json.loads(each) for each in (GOOD, GOOD, GOOD)])
    table = table.set_column(1, "chosen", pyarrow.array(["a", "x" * 5000, "b"]))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    bad = BadRows("skip", 1000)
    assert len(list(read_file(tmp_path / "a.parquet", bad))) == 2
    assert bad.counts == {"more than data.max_row_bytes=1000": 1}
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    bad = BadRows("skip", 1000)
    assert len(list(SavedSource(tmp_path / "saved", None).rows(bad))) == 2 and bad.total == 1


def test_the_default_follows_max_length():
    sizes = [DataConfig(train="a", max_length=length).row_bytes for length in (64, 10**6, 2**50)]
    assert sizes == [2**20, 64 * 10**6, 2**30]
    assert DataConfig(train="a", max_row_bytes=5).row_bytes == 5


def test_a_text_far_beyond_max_length_costs_nothing(tmp_path):
    """10 MB took 5 GB and 40 s."""
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + json.dumps({"prompt": "q", "chosen": "x " * 5_000_000, "rejected": "b"}))
    with grown(mib=40):
        message, _, _ = outcome(path, "error")
    assert f"{path}:2: more than data.max_row_bytes" in message


VALUES = {
    "text that is none": (malformed._not_text(3), "Invalid UTF8"),
    "an interval": (pyarrow.array([2**62] * 3).view(pyarrow.duration("s")), None),
    "a day after all": (pyarrow.array([2**30] * 3, pyarrow.int32()).view(pyarrow.date32()), None),
    "a moment after all": (pyarrow.array([2**40] * 3).cast(pyarrow.timestamp("s")), None),
    "a key twice": (
        pyarrow.array([[("a", 1), ("a", 2)]] * 3, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "duplicate keys",
    ),
}


@pytest.mark.parametrize("what", VALUES)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_values_that_python_cannot_hold(tmp_path, what, suffix):
    """A time out of Python's range is text, as nothing is trained on it; other values make a bad row."""
    column, fault = VALUES[what]
    rows = [malformed.sound_row(index) for index in range(3)]
    table = pyarrow.Table.from_pylist(rows).append_column("extra", column)
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    bad = BadRows("skip")
    found = [row for _, row in read_file(path, bad)]
    if fault is None:
        assert [{k: v for k, v in row.items() if k != "extra"} for row in found] == rows
        return
    assert not found and bad.counts == {"field 'extra' is damaged": 3}
    assert fault in str(list(bad))


def test_a_column_that_stands_twice(tmp_path):
    table = pyarrow.table([["q"], ["a"], ["b"]], names=["prompt", "chosen", "chosen"])
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="'chosen' stands twice"):
        list(read_file(tmp_path / "a.arrow", BadRows("skip")))


def test_a_damaged_folder_of_datasets(tmp_path):
    """Offsets that point beyond their buffers ended the process."""
    rows = [malformed.sound_row(index) for index in range(200)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "a"))
    (file,) = (tmp_path / "a").glob("*.arrow")
    content, refused = file.read_bytes(), 0
    for place in range(len(content) // 2, len(content), len(content) // 40):
        file.write_bytes(content[:place] + b"\xff\xff\xff\x7f" + content[place + 4 :])
        try:
            assert len(list(SavedSource(tmp_path / "a", None).rows(BadRows("skip")))) == 200
        except UserError as error:
            refused += str(tmp_path / "a") in str(error)
    assert refused


def test_a_device_is_no_file(tmp_path):
    for name in ("/dev/zero", "/dev/stdin"):
        with pytest.raises(UserError, match="a device or a pipe"):
            ExampleStream(DataConfig(train=name, streaming=True), TOKENIZER)
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="a device or a pipe"):
        ExampleStream(DataConfig(train=str(tmp_path / "a.jsonl"), streaming=True), TOKENIZER)


def test_what_is_counted_of_verdicts_is_bounded():
    """A verdict may quote its row: a file of unknown roles has as many kinds of faults as rows."""
    tally, other = Tally(), Tally()
    for index in range(5000):
        tally.add("a:1", f"unknown role {index}", "m")
        other.add("a:1", f"unknown role {-index}", "m")
    tally.update(other)
    assert tally.total == 10_000 and len(tally.counts) == KINDS_KEPT + 1


def test_rows_of_a_source_are_counted_as_they_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + '{"a": "' + "x" * 5000 + '"}\n\n' + GOOD)
    assert FileSource(path).count(BadRows("skip", 1000)) == 3


def test_a_name_that_is_no_unicode(tmp_path):
    (tmp_path / "rows").mkdir()
    with open(os.fsencode(tmp_path / "rows") + b"/\xff\x1b[31m.jsonl", "w") as file:
        file.write(GOOD)
    config = DataConfig(train=str(tmp_path / "rows"), cache_dir=str(tmp_path / "cache"))
    examples = load_examples(config, TOKENIZER, split="train")
    assert examples.where(0).endswith("\\udcff\\x1b[31m.jsonl:1")
    assert load_examples(config, TOKENIZER, split="train").fingerprint == examples.fingerprint


def stored_and_streamed(folder: Path, count: int, seed: int) -> None:
    """A stored data set refuses what a stream refuses, and has the same examples."""
    for index, (suffix, content) in enumerate(malformed.cases(malformed.bad_file, count, seed)):
        (folder / f"a{suffix}").write_bytes(content)
        options = {"train": str(folder / f"a{suffix}"), "on_bad_row": ("skip", "error")[index % 2]}
        found = []
        for read in (_stored, _streamed):
            try:
                found.append(read(DataConfig(**options, cache_dir=str(folder / str(index)))))
            except (
                UserError
            ):  # of two bad rows each may tell another: a stream tokenises on the way
                found.append("refused")
        assert found[0] == found[1], index


def _stored(config: DataConfig) -> list:
    examples = load_examples(config, TOKENIZER, split="train")
    return [examples[place]["prompt_ids"] for place in range(len(examples))]


def _streamed(config: DataConfig) -> list:
    chunk = ExampleStream(
        config.model_copy(update={"streaming": True, "stream_buffer": 1000}), TOKENIZER
    ).read()
    return [chunk[place]["prompt_ids"] for place in range(len(chunk))]


def test_stored_and_streamed_agree(tmp_path):
    stored_and_streamed(tmp_path, 30, seed=3)


@pytest.mark.slow
@SLOW
def test_stored_and_streamed_agree_by_the_hundred(tmp_path):
    stored_and_streamed(tmp_path, 500, seed=4)
