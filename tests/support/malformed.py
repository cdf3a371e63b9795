"""Malformed rows, files and configurations, drawn by a seeded generator.

Each is a sound one with one to three faults of the kinds that files meet: cut, altered bytes, other types,
deep nesting, text that is not Unicode, numbers out of range, keys that stand twice.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow
from pyarrow import parquet

SUFFIXES = (
    *(".jsonl", ".jsonl.gz", ".json", ".json.gz", ".ndjson", ".csv", ".csv.gz", ".tsv"),
    *(".parquet", ".arrow"),
)
DEEP = 3000
VALUES = [
    *("null", "true", "false", "0", "-1", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1e-999"),
    *("9" * 400, "9" * 5000, '""', '" "', '"\\ud800"', '"\\u0000"', '"\\u001b]0;x\\u0007"', "[]", "{}"),
    *("[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "NaN" + "}" * DEEP, "[" * DEEP, "[NaN]", '{"a": NaN}'),
    *('{"role": "user"}', '[{"role": "user", "content": 3}]', '[{"role": 7, "content": "x"}]'),
    *('[{"role": "user", "content": null}]', '[{"content": "x"}]', '[["user", "x"]]', "[null]"),
    *('[{"role": "assistant", "content": "x", "tool_calls": 3}]', '"[{\\"role\\": \\"user\\"}]"'),
    *('[{"role": "assistant", "content": "", "tool_calls": "[[[["}]', '"' + "[" * DEEP + '"'),
    *('[{"role": "assistant", "content": "x", "tool_calls": [{"function": 3}]}]', '"{\\"a\\": NaN}"'),
    *('[{"role": "assistant", "content": "x", "tool_calls": [null]}]', '"' + "x" * 70_000 + '"'),
    *('[{"role": "assistant", "content": [{"type": "text", "text": 3}]}]', '[{"role": {}}]'),
    *('[{"role": "user", "content": "\\ud800"}]', '[{"role": "\\ud800", "content": "x"}]', '"<s>"'),
    *('[{"from": ["user"], "value": "x"}]', '{"role": ["user", "assistant"], "content": "x"}'),
    *('{"role": [], "content": []}', '{"role": [[]], "content": [[]]}', '"\\u2028\\u0085"', '"\U0001f600"'),
]  # fmt: skip
NAMES = [
    *("prompt", "chosen", "rejected", "completion", "label", "completions", "scores", "ranks", "system"),
    *("tools", "chat_template_kwargs", "weight", "margin", "soft_label", "messages", "history", "at"),
    *("conversations", "responses", "score_chosen", "input", "instruction", "output", "kto_tag", "images"),
    *("reference_chosen_logps", "reference_rejected_logps", "trajectory", "ratings", "a\\ud800"),
    *("conversation_a", "conversation_b", "winner", "better_response_id", "response_0", "response_1"),
    *("human_ref_A", "human_ref_B", "labels", "all_rejected", "preference", "answers", "generations"),
]  # fmt: skip


def sound_row(index: int) -> dict:
    """A pair whose texts say which row they are of."""
    return {"prompt": f"Q{index} ", "chosen": f"yes {index}", "rejected": f"no {index}"}


def _chat_row(index: int) -> dict:
    say = [{"role": "assistant", "content": f"{word} {index}"} for word in ("yes", "no")]
    prompt = [{"role": "user", "content": f"Q{index}"}]
    return {"prompt": prompt, "chosen": say[:1], "rejected": say[1:]}


def _completion_row(index: int) -> dict:
    return {"prompt": f"Q{index} ", "completion": f"yes {index}", "label": bool(index % 2)}


def _group_row(index: int) -> dict:
    texts = [f"a{index}", f"b{index}", f"c{index}"]
    return {"prompt": f"Q{index} ", "completions": texts, "scores": [1.0, 2.0, 0.5]}


def altered(draw: random.Random, content: bytes) -> bytes:
    """The bytes with a few of them changed, removed, doubled or cut off."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(data) + 1)
        kind = draw.randrange(6)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[place : place + draw.randint(1, 40)]
        elif kind == 2:
            data[place:place] = draw.randbytes(draw.randint(1, 8))
        elif kind == 3:
            data[place : place + 8] = struct.pack("<q", draw.choice([-1, 0, 1, 2**31, 2**62]))
        elif kind == 4:
            data[place:place] = data[place : place + draw.randint(1, 200)]
        else:
            del data[max(place, len(data) // 4) :]
    return bytes(data)


def bad_line(draw: random.Random, index: int) -> bytes:
    """One line of JSON with a fault in it; some are sound after all."""
    make = draw.choice([sound_row, _chat_row, _completion_row, _group_row])
    fields = [(name, json.dumps(value)) for name, value in make(index).items()]
    for _ in range(draw.randint(1, 2)):
        kind = draw.randrange(5)
        place = draw.randrange(len(fields))
        if kind == 0:
            fields[place] = (fields[place][0], draw.choice(VALUES))
        elif kind == 1:
            fields.append((draw.choice(NAMES), draw.choice(VALUES)))
        elif kind == 2 and len(fields) > 1:
            fields.pop(place)
        elif kind == 3:
            fields.append((draw.choice(fields)[0], draw.choice(VALUES)))  # a key twice
        else:
            text = draw.choice(VALUES)
            return text.encode("utf-8", "surrogatepass")
    line = "{" + ", ".join(f'"{name}": {value}' for name, value in fields) + "}"
    content = line.encode()
    return altered(draw, content).replace(b"\n", b" ") if draw.random() < 0.3 else content


def _table(draw: random.Random, count: int) -> pyarrow.Table:
    make = draw.choice([sound_row, _chat_row, _completion_row, _group_row])
    table = pyarrow.Table.from_pylist([make(index) for index in range(count)])
    extra = {
        "raw": pyarrow.array([b"\xff\xfe"] * count),
        "day": pyarrow.array([2**40] * count, pyarrow.int64()).cast(pyarrow.timestamp("s")),
        "date": pyarrow.array([2**30] * count, pyarrow.int32()).view(pyarrow.date32()),
        "took": pyarrow.array([2**62] * count, pyarrow.int64()).view(pyarrow.duration("s")),
        "at": pyarrow.array([-1] * count, pyarrow.int64()).view(pyarrow.time64("ns")),
        "map": pyarrow.array(
            [[("a", 1), ("a", 2)]] * count, pyarrow.map_(pyarrow.string(), pyarrow.int64())
        ),
        "big": pyarrow.array([b"\xff" * 16] * count, pyarrow.binary(16)).view(
            pyarrow.decimal128(38)
        ),
        "text": _not_text(count),
        "half": pyarrow.array([float("nan")] * count, pyarrow.float32()),
    }
    for name in draw.sample(list(extra), draw.randint(0, 2)):
        table = table.append_column(name, extra[name])
    if draw.random() < 0.3:
        place = draw.randrange(table.num_columns)
        name = draw.choice(list(extra))
        table = table.set_column(place, table.column_names[place], extra[name])
    return table


def _not_text(count: int) -> pyarrow.Array:
    """Bytes that are typed as text."""
    raw = pyarrow.array([b"\xff\xfe"] * count)
    return pyarrow.Array.from_buffers(pyarrow.string(), count, raw.buffers())


def _tabular(draw: random.Random, suffix: str) -> bytes:
    table = _table(draw, draw.randint(1, 30))
    sink = io.BytesIO()
    if suffix == ".parquet":
        kinds = ["NONE", "SNAPPY", "ZSTD"]
        parquet.write_table(table, sink, compression=draw.choice(kinds), row_group_size=10)
    else:
        open_ = draw.choice([pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
        with open_(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    return sink.getvalue()


def _cells(draw: random.Random, delimiter: str) -> bytes:
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter=delimiter)
    rows = [sound_row(index) for index in range(draw.randint(1, 6))]
    writer.writerow(rows[0])
    for row in rows:
        values = list(row.values())
        if draw.random() < 0.5:
            values[draw.randrange(3)] = draw.choice([*VALUES, "'[{", "a\rb", '"', "x\0y"])
        writer.writerow(values)
    return sink.getvalue().encode("utf-8", "surrogatepass")


def bad_file(draw: random.Random) -> tuple[str, bytes]:
    """(suffix, content) of a data file with a fault in it; some are sound after all."""
    suffix = draw.choice(SUFFIXES)
    if suffix in (".parquet", ".arrow"):
        content = _tabular(draw, suffix)
        return suffix, altered(draw, content) if draw.random() < 0.8 else content
    if "json" in suffix:
        lines = [json.dumps(sound_row(index)).encode() for index in range(draw.randint(0, 4))]
        for _ in range(draw.randint(1, 2)):
            lines.insert(draw.randint(0, len(lines)), bad_line(draw, len(lines)))
        array = suffix.startswith(".json") and "l" not in suffix and draw.random() < 0.7
        content = b"[" + b",\n".join(lines) + b"]" if array else b"\n".join(lines) + b"\n"
    else:
        content = _cells(draw, "\t" if suffix.startswith(".tsv") else ",")
    if draw.random() < 0.3:
        content = altered(draw, content)
    if suffix.endswith(".gz"):
        content = gzip.compress(content, 1)
        content = altered(draw, content) if draw.random() < 0.5 else content
    return suffix, content


def other_value(draw: random.Random, text: str) -> bytes:
    """JSON or YAML with a value of another type in the place of one of its values."""
    places = [index for index, letter in enumerate(text) if letter in ":["] or [0]
    place = draw.choice(places) + 1
    ends = [text.find(mark, place) for mark in ",}]\n"]
    end = min((each for each in ends if each > 0), default=len(text))
    return f"{text[:place]} {draw.choice(VALUES)}{text[end:]}".encode("utf-8", "surrogatepass")


def spoil(draw: random.Random, folder: Path) -> None:
    """Alters one file of a folder, in its bytes or, where it is JSON, in its values."""
    file = draw.choice(sorted(each for each in folder.rglob("*") if each.is_file()))
    if file.suffix == ".json" and draw.random() < 0.5:
        file.write_bytes(other_value(draw, file.read_text()))
    else:
        file.write_bytes(altered(draw, file.read_bytes()))


SOUND_CONFIG = """\
model: {path: my-model, dtype: fp32, lora: {r: 8}}
data: {train: pairs.jsonl, max_length: 512, eval_rows: 10, columns: {chosen: better}}
loss: {type: [sigmoid, sft], weights: [1.0, 0.1], beta: 0.1}
reference: {provider: adapter_off}
train: {output_dir: runs/a, global_batch_size: 64, learning_rate: 5.0e-6, max_steps: 10}
parallel: {zero_stage: 2, deepspeed: {a: 1}}
log: {logging_steps: 1, run_name: first}
"""
SCALARS = [
    *("null", "true", "no", "1", "0", "-1", "1.5", ".nan", ".inf", "1e30", "1.0e+30", "9" * 5000, "0x1F"),
    *("2020-99-99", "2020-01-01", "2020-01-01T99:99:99", "!!int abc", "!!float x", "!!map [1]"),
    *("!!timestamp x", "!!bool 7", "!!binary '*'", "!!omap [1]", "!!pairs [a]", "!!python/name:os.system"),
    *("!!python/object/apply:os.system [id]", "!x y", "&a [*a]", "*b", "&a {a: *a}", "<<: 1", "{<<: [1]}"),
    *('"\\ud800"', '"\\0"', '"\\x1b]0;x\\a"', "'" + "x" * 5000 + "'", "[" * DEEP + "]" * DEEP, "[" * DEEP),
    *("{a: " * DEEP + "}" * DEEP, "? {a: 1}\n: 2", "{[1]: 2}", "{? [a] : b}", "!!null x", "12:99:99"),
    *("{}", "[]", "[[]]", "!!set {a}", "{a: 1, a: 2}", "%", "@x", "`", "|\n x", "- a", "0o9"),
    *("!!str [1]", "!!seq {}", "[1, true]", "{path: x, weight: true}", "[{path: x, weight: -1}]"),
]  # fmt: skip


def bomb(levels: int = 9, width: int = 9) -> str:
    """A YAML file of some hundred bytes that stands for width ** levels values."""
    lines = ["a0: &a0 [" + ",".join(["x"] * width) + "]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [" + ",".join([f"*a{level - 1}"] * width) + "]")
    return "\n".join([*lines, f"data: *a{levels - 1}", ""])


def bad_config(draw: random.Random) -> bytes:
    """A YAML file of a run with a fault in it; some are sound after all."""
    if draw.random() < 0.02:
        return bomb(draw.randint(2, 9)).encode()
    sections = [line.split(": ", 1) for line in SOUND_CONFIG.splitlines()]
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(sections))
        name, body = sections[place]
        kind = draw.randrange(5)
        pairs = body.strip("{}").split(", ") if body.startswith("{") else [body]
        if kind == 0:
            sections[place] = [name, draw.choice(SCALARS)]
        elif kind in (1, 2):
            index = draw.randrange(len(pairs))
            pairs[index] = f"{pairs[index].split(':')[0]}: {draw.choice(SCALARS)}"
            sections[place] = [name, "{" + ", ".join(pairs) + "}"]
        elif kind == 3:
            key = draw.choice(["x", "'\\0'", "1", "null", "~", "? [a]", "!!int x", "2020-99-99"])
            pairs.append(f"{key}: {draw.choice(SCALARS)}")
            sections[place] = [name, "{" + ", ".join(pairs) + "}"]
        else:
            sections.insert(place, [draw.choice(["data", "x", "1", "!!int x"]), "{}"])
    text = "".join(f"{name}: {body}\n" for name, body in sections)
    content = text.encode()
    return altered(draw, content) if draw.random() < 0.2 else content


def cases(make: Callable, count: int, seed: int) -> list:
    """`count` of them, the same for the same seed, each drawn by a generator of its own."""
    return [make(random.Random(seed * 1_000_003 + index)) for index in range(count)]
