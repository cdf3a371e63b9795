"""Files, folders and hub ids: what they give, and what each kind of damage says."""

import gzip
import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from dpo_fast.data.entries import SourceOptions
from dpo_fast.data.sources import FileSource, HubSource, SavedSource, read_rows, resolve
from dpo_fast.data.verdicts import BadRows
from dpo_fast.errors import UserError

ROWS = [{"chosen": "Q: a", "rejected": "Q: b"}, {"chosen": "Q: ü\u2028", "rejected": "Q: d"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(path, on_bad_row="error"):
    """All (where, row) of a name, and the tally of broken rows."""
    bad = BadRows(on_bad_row)
    return [item for source in resolve([str(path)]) for item in read_rows(source, bad)], bad


def fails(path, on_bad_row="error"):
    """The message of the UserError that reading raises."""
    with pytest.raises(UserError) as caught:
        read(path, on_bad_row)
    return str(caught.value)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_json_lines(tmp_path, name):
    content = b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\n", 1)  # BOM, CRLF, a blank line
    path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert read(path)[0] == [(f"{path}:1", ROWS[0]), (f"{path}:3", ROWS[1])]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_names_the_line_of_each_object(tmp_path, indent):
    path = write(tmp_path / "a.json", "\n" + json.dumps(ROWS, indent=indent))
    rows, _ = read(path)
    assert [row for _, row in rows] == ROWS
    assert [where for where, _ in rows] == [f"{path}:{n}" for n in ((2, 2), (3, 7))[bool(indent)]]


@pytest.mark.parametrize("name, mark", [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_cells(tmp_path, name, mark):
    long = "x" * 200_000  # longer than what the module takes by default
    lines = ["a,b,c", '"1, 2","say ""hi""",', "", f'"two\n\nlines",{long},3', "ü,y,z"]
    content = "\r\n".join(lines).replace(",", mark).encode()
    path = write(
        tmp_path / name,
        gzip.compress(b"\xef\xbb\xbf" + content) if name.endswith("gz") else content,
    )
    rows, _ = read(path)
    assert rows == [
        (f"{path}:2", {"a": f"1{mark} 2", "b": 'say "hi"', "c": None}),
        (f"{path}:4", {"a": "two\n\nlines", "b": long, "c": "3"}),
        (f"{path}:7", {"a": "ü", "b": "y", "c": "z"}),
    ]


def test_the_index_that_pandas_writes_is_a_column(tmp_path):
    path = write(tmp_path / "a.csv", ",a,b\n0,1,2\n")
    assert read(path)[0] == [(f"{path}:2", {"Unnamed: 0": "0", "a": "1", "b": "2"})]


def test_broken_cells(tmp_path):
    path = write(tmp_path / "a.csv", "a,b\n1,2\n3\n4,5\n")
    assert f"{path}:3: wrong number of cells: got 1 cells, and the header has 2" in fails(path)
    rows, bad = read(path, "skip")
    assert [where for where, _ in rows] == [f"{path}:2", f"{path}:4"]
    assert bad.counts == {"wrong number of cells": 1}
    assert f"{path}:2: broken CSV" in fails(write(path, 'a,b\n1,"2" x\n'), "skip")
    assert f"{path}:2: broken CSV" in fails(write(path, 'a,b\n1,"2\n3,4\n'), "skip")
    assert f"{path}:1: the header has 'a' twice" in fails(write(path, "a,a\n1,2\n"))
    assert f"{path}:1: the header has a column without a name" in fails(write(path, "a,\n1,2\n"))
    assert "separated by commas, or in a .tsv by tabs, and not by ';'" in fails(
        write(path, "a;b\n1;2\n")
    )
    assert f"{path}:2: bad UTF-8: byte 1" in fails(write(path, b"a,b\n\xff,2\n"))
    assert "there are no rows in it" in fails(write(path, "a,b\n"))


def test_parquet_and_arrow(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as writer:
        writer.write_table(table)
    for path in map(tmp_path.joinpath, ("a.parquet", "stream.arrow", "file.arrow")):
        assert read(path)[0] == [(f"{path}:1", ROWS[0]), (f"{path}:2", ROWS[1])]


def test_saved_folder_and_its_splits(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(str(tmp_path / "many"))
    assert read(tmp_path / "one")[0] == [
        (f"{tmp_path}/one:1", ROWS[0]),
        (f"{tmp_path}/one:2", ROWS[1]),
    ]
    assert len(read(tmp_path / "many")[0]) == 2
    assert read(f"{tmp_path}/many:test")[0] == [(f"{tmp_path}/many:test:1", ROWS[1])]
    assert "no split 'dev'; it has train, test" in fails(f"{tmp_path}/many:dev")
    assert "no splits" in fails(f"{tmp_path}/one:test")


def test_folder_and_glob_read_files_in_order(tmp_path):
    write(tmp_path / "b.jsonl", LINES)
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "notes.txt", "ignored")
    expected = [FileSource(tmp_path / "a.jsonl"), FileSource(tmp_path / "b.jsonl")]
    assert resolve([str(tmp_path)]) == expected
    assert resolve([f"{tmp_path}/*.jsonl"]) == expected
    assert resolve([f"{tmp_path}/b.jsonl", f"{tmp_path}/a.jsonl"]) == expected[::-1]


def test_hub_id(monkeypatch):
    calls = []

    def load_dataset(name, config, split, revision):
        calls.append((name, config, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert resolve(["org/prefs"]) == [HubSource("org/prefs", "train")]
    assert resolve(["prefs:test[:10]"]) == [HubSource("prefs", "test[:10]")]
    assert read("org/prefs:test_prefs")[0][1] == ("org/prefs:test_prefs:2", ROWS[1])
    assert resolve(["org/prefs@refs/pr/1:test"]) == [HubSource("org/prefs", "test", "refs/pr/1")]
    assert read("org/prefs@v2")[0][1] == ("org/prefs@v2:train:2", ROWS[1])
    config = HubSource("org/prefs", "no_think", "v2", "Preference")
    assert resolve(["org/prefs@v2:Preference/no_think"]) == [config]
    assert read("org/prefs:Preference/no_think")[0][1][0] == "org/prefs:Preference/no_think:2"
    assert calls == [
        ("org/prefs", None, "test_prefs", None),
        ("org/prefs", None, "train", "v2"),
        ("org/prefs", "Preference", "no_think", None),
    ]


def test_one_word_is_no_data_set_of_the_hub_and_nothing_is_asked(monkeypatch, tmp_path):
    """A list of texts, or a file without its ending: a hub that is not there takes half a minute."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked"))
    (tmp_path / "pairs.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    message = fails("pairs")
    assert "pairs: no such file or folder. Did you mean 'pairs.jsonl'?" in message
    assert "owner/pairs" in message and "pairs:train" in message


def test_a_revision_of_a_data_set_that_is_not_there_is_named(monkeypatch):
    def load_dataset(name, config, split, revision):
        raise FileNotFoundError(f"Revision Not Found: {revision}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = fails("org/prefs@v9")
    assert "org/prefs@v9:train: no data set on the hub with revision 'v9'" in message


def test_the_revision_of_an_entry_stands_behind_its_hub_id(tmp_path):
    entry = SourceOptions.model_validate({"path": "org/prefs:test", "revision": "v2"})
    assert entry.path == "org/prefs@v2:test" and entry.revision is None
    with pytest.raises(ValueError, match=r"a source.path=.* is a folder"):
        SourceOptions.model_validate({"path": str(tmp_path), "revision": "v2"})


def test_hub_failure_names_both_possibilities(monkeypatch):
    def load_dataset(name, config, split, revision):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = fails("org/prefs")
    assert "org/prefs: neither a file or folder here nor a data set on the hub" in message
    assert "offline" in message
    assert message.endswith("or name:config/split where it has several configurations")


def test_missing_file_suggests_near_names(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    message = fails(tmp_path / "trian.jsonl")
    assert "trian.jsonl: no such file" in message
    assert "Did you mean 'train.jsonl'?" in message
    assert "no folder" in fails(tmp_path / "nowhere" / "train.jsonl")
    assert "no such file, folder or glob match" in fails(f"{tmp_path}/*.parquet")


def test_folder_without_data_and_unknown_suffix(tmp_path):
    assert "no data in this folder" in fails(tmp_path)
    assert "unknown kind of file; expected one of .jsonl" in fails(write(tmp_path / "a.txt", "x"))


BROKEN = [
    (b'{"chosen": "a",}\n', "broken JSON", "at column"),
    (b'{"chosen": "\xff"}\n', "bad UTF-8", "byte 13 of the line"),
    (b"[1, 2]\n", "not an object", "expected an object of fields, got an array"),
    (b"null\n", "not an object", "got null"),
    (b'{"margin": NaN}\n', "field 'margin' is not finite", "NaN is not JSON"),
    (b'{"x": [{"y": -Infinity}]}\n', "field 'x' is not finite", "-Infinity is not JSON"),
    (b'{"x": ' + b"[" * 100_000 + b"\n", "broken JSON", "nested deeper than 60 levels"),
]


@pytest.mark.parametrize("line, kind, detail", BROKEN)
def test_broken_line_stops_or_is_skipped(tmp_path, line, kind, detail):
    path = write(tmp_path / "a.jsonl", LINES + line + LINES)
    message = fails(path)
    assert message.startswith(f"{path}:3: {kind}: ")
    assert detail in message
    assert "data.on_bad_row=skip" in message
    rows, bad = read(path, "skip")
    assert [where for where, _ in rows] == [f"{path}:{number}" for number in (1, 2, 4, 5)]
    assert bad.counts == {kind: 1}
    assert [where for where, _ in bad] == [f"{path}:3"]


def test_broken_row_of_an_array_is_skipped(tmp_path):
    path = write(tmp_path / "a.json", '[{"a": 1},\n 7,\n {"b": NaN}]')
    assert f"{path}:2: not an object" in fails(path)
    rows, bad = read(path, "skip")
    assert rows == [(f"{path}:1", {"a": 1})]
    assert bad.counts == {"not an object": 1, "field 'b' is not finite": 1}


@pytest.mark.parametrize(
    "text, place",
    [
        ('[{"a": 1},\n {"b" 2}]', ":2: broken JSON: Expecting ':' delimiter at column 7"),
        ('[{"a": 1}\n {"b": 2}]', ":2: broken JSON: expected ',' or ']' at column 2"),
        ('[{"a": 1},\n', ":2: broken JSON"),
        ('[{"a": 1}] x', ":1: broken JSON: text after the end"),
        ('[{"a": 1},]', ":1: broken JSON"),
        (b'[{"a": 1},\n{"b": "\xff"}]', ":2: bad UTF-8: byte 8"),
    ],
)
def test_broken_array_always_raises(tmp_path, text, place):
    path = write(tmp_path / "a.json", text)
    assert f"{path}{place}" in fails(path, "skip")


def test_truncated_gzip_always_raises(tmp_path):
    content = "".join(json.dumps({"chosen": f"{n * n}"}) + "\n" for n in range(9999)).encode()
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(content)[:-500])
    assert "the gzip file is damaged or cut short" in fails(path, "skip")
    assert f"{path}:1: the gzip" in fails(write(path, LINES), "skip")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damaged_columnar_file_always_raises(tmp_path, name):
    path = write(tmp_path / name, b"not this")
    kind = {"a.parquet": "Parquet", "a.arrow": "Arrow"}[name]
    assert f"{path}:1: not a readable {kind} file" in fails(path, "skip")


@pytest.mark.parametrize("name, content", [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", "[]")])
def test_empty_file(tmp_path, name, content):
    path = write(tmp_path / name, content)
    assert f"{path}: there are no rows in it" in fails(path, "skip")


def test_json_lines_are_streamed(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES + b"broken\n")
    rows = read_rows(FileSource(path), BadRows("error"))
    assert next(rows)[1] == ROWS[0]  # line 3 has not been looked at


def test_identity_follows_content(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES)
    before = FileSource(path).identity()
    assert FileSource(path).identity() == before
    write(path, LINES + LINES)
    assert FileSource(path).identity() != before
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    datasets.Dataset.from_list(ROWS[:1]).save_to_disk(str(tmp_path / "two"))
    one, two = (SavedSource(tmp_path / name, None).identity() for name in ("one", "two"))
    assert one.split("=")[1] != two.split("=")[1]
