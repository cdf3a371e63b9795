"""The same rows give the same token ids from every container."""

import csv
import gzip
import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.plain import plain
from dpo_fast.data.stream import ExampleStream
from dpo_fast.errors import UserError
from tests.support.forms import CASES, PAIR, A, B, U, say
from tests.support.tokenizers import byte_tokenizer, chat_tokenizer

datasets.disable_progress_bars()

# It writes whatever it is given, as JSON.
TEMPLATE = (
    "{% if tools %}{{ tools|tojson }}{% endif %}{% if style %}{{ style|tojson }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% endif %}"
    "{{ m.keys()|list|tojson }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def function(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def calls(name, content="", **arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [say("assistant", content, tool_calls=[call])]


CITY, ZONE = {"type": "string", "enum": ["Oslo", "Rome"]}, {"type": "number", "minimum": 1}
TOOLS = [function("weather", city=CITY), function("clock", zone=ZONE)]
NESTED = {"where": {"city": "Oslo", "at": [1, 2]}, "days": 3}
ROWS = [
    {
        "prompt": [U],
        "chosen": calls("weather", city="Oslo"),
        "rejected": calls("weather", city="Rome"),
        "tools": TOOLS,
        "chat_template_kwargs": {"style": {"terse": True}},
    },
    {
        "prompt": [
            say("system", "be brief"),
            U,
            *calls("clock", "wait", zone=1),
            say("tool", "12:00", name="clock"),
        ],
        "chosen": calls("clock", zone=2.5),
        "rejected": [say("assistant", "no idea", name="me")],
        "tools": TOOLS[1:],
    },
    {
        "prompt": [U],
        "chosen": calls("weather", "so", **NESTED),
        "rejected": calls("none"),
        "tools": TOOLS[:1],
        "chat_template_kwargs": {"style": {"lines": 2, "marks": ["a", "b"]}},
    },
    PAIR,
]


def jsonl(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def json_array(folder, rows):
    path = folder / "rows.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows, indent=1).encode()))
    return path


def parquet_file(folder, rows):
    parquet.write_table(pyarrow.Table.from_pylist(united(rows)), folder / "rows.parquet")
    return folder / "rows.parquet"


def arrow_file(folder, rows):
    table = pyarrow.Table.from_pylist(united(rows))
    with pyarrow.ipc.new_file(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    return folder / "rows.arrow"


def arrow_stream(folder, rows):
    table = pyarrow.Table.from_pylist(united(rows))
    with pyarrow.ipc.new_stream(str(folder / "stream.arrow"), table.schema) as writer:
        writer.write_table(table)
    return folder / "stream.arrow"


def saved(folder, rows):
    datasets.Dataset.from_list(united(rows)).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def united(rows):
    """Every row with the columns of all: both libraries look for them in the first row alone."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


COLUMNAR = (parquet_file, arrow_file, arrow_stream, saved)


def load(path, tmp_path, tokenizer, streaming=False, **options):
    options |= {"train": str(path), "cache_dir": str(tmp_path / "cache")}
    if streaming:
        data = ExampleStream(DataConfig(streaming=True, **options), tokenizer).read()
    else:
        data = load_examples(DataConfig(**options), tokenizer, split="train")
    return [data[index] for index in range(len(data))]


def many(**options):
    return byte_tokenizer(template=TEMPLATE, eos_token="<|im_end|>", **options)


@pytest.mark.parametrize("write", [json_array, *COLUMNAR])
@pytest.mark.parametrize("streaming", [False, True])
def test_tools_calls_and_arguments(tmp_path, write, streaming):
    tokenizer = many()
    right = load(jsonl(tmp_path, ROWS), tmp_path, tokenizer)
    assert load(write(tmp_path, ROWS), tmp_path, tokenizer, streaming) == right
    text = tokenizer.decode(right[0]["prompt_ids"])
    assert "null" not in text and '"terse": true' in text and "weather" in text


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("write", [parquet_file, saved])
def test_every_form(tmp_path, write, case):
    form, raw, canonical = CASES[case]
    raw = {name: value for name, value in raw.items() if value is not None}
    right = load(jsonl(tmp_path, [canonical, canonical]), tmp_path, chat_tokenizer())
    path = write(tmp_path, [raw, raw | {"weight": None}])
    assert load(path, tmp_path, chat_tokenizer(), format=form) == right


def test_nulls_that_are_meant_are_kept_in_json_text(tmp_path):
    """They cannot be told from those of Arrow, so objects lose them everywhere; text keeps them."""
    tool = function("f", x={"default": None})
    row = PAIR | {"tools": [tool]}
    text = PAIR | {"tools": json.dumps([tool])}
    tokenizer = many()
    for each, kept in ((row, False), (text, True)):
        right = load(jsonl(tmp_path, [each]), tmp_path, tokenizer)
        assert ('"default": null' in tokenizer.decode(right[0]["prompt_ids"])) == kept
    for write in COLUMNAR:
        right = load(jsonl(tmp_path, [text]), tmp_path, tokenizer)
        assert load(write(tmp_path, [text]), tmp_path, tokenizer) == right


def test_plain_values():
    raw = {"a": None, "b": [None, {"c": None, "d": 1.0}], "e": 0.5, "f": True, "g": 1e300}
    assert plain(raw) == {"b": [None, {"d": 1}], "e": 0.5, "f": True, "g": 1e300}
    assert type(plain(2.0)) is int and type(plain(1e300)) is float and plain(True) is True


def test_objects_as_maps_and_lists_as_columns(tmp_path):
    """Arrow's maps, and the columns that older `datasets` make of a list of objects."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "1", "y": "2"}}}
    chosen = [say("assistant", "so", tool_calls=[call])]
    rows = [{"prompt": [U], "chosen": chosen, "rejected": [B]}]
    tokenizer = many()
    right = load(jsonl(tmp_path, rows), tmp_path, tokenizer)
    text = pyarrow.string()
    function_type = pyarrow.struct([("name", text), ("arguments", pyarrow.map_(text, text))])
    call_type = pyarrow.struct([("type", text), ("function", function_type)])
    plain_message = pyarrow.struct([("role", text), ("content", text)])
    message = pyarrow.struct([*plain_message, ("tool_calls", pyarrow.list_(call_type))])
    schema = pyarrow.schema(
        [("prompt", pyarrow.list_(plain_message)), ("chosen", pyarrow.list_(message))]
        + [("rejected", pyarrow.list_(plain_message))]
    )
    as_maps = json.loads(json.dumps(rows))
    arguments = as_maps[0]["chosen"][0]["tool_calls"][0]["function"]
    arguments["arguments"] = list(arguments["arguments"].items())
    parquet.write_table(pyarrow.Table.from_pylist(as_maps, schema), tmp_path / "maps.parquet")
    assert load(tmp_path / "maps.parquet", tmp_path, tokenizer) == right

    columns = {"prompt": {"role": ["user"], "content": ["why so?"]}, "chosen": A, "rejected": B}
    assert load(jsonl(tmp_path, [columns]), tmp_path, tokenizer) == load(
        jsonl(tmp_path, [PAIR]), tmp_path, tokenizer
    )


def csv_file(folder, rows):
    """Text and numbers as they are, all else as JSON; null is an empty cell."""
    path = folder / "rows.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(united(rows)[0])
        for row in united(rows):
            writer.writerow(
                "" if v is None else v if isinstance(v, str) else json.dumps(v)
                for v in row.values()
            )
    return path


def json_columns(folder, rows):
    """A table whose columns are text, lists and objects as JSON."""
    texts = [
        {k: v if isinstance(v, (str, int, float)) else json.dumps(v) for k, v in row.items()}
        for row in rows
    ]
    return parquet_file(folder, texts)


# HelpSteer2 has a row for each response, and no lists.
@pytest.mark.parametrize("case", sorted(set(CASES) - {"helpsteer2"}))
@pytest.mark.parametrize("write", [csv_file, json_columns])
def test_every_form_with_its_lists_as_json_text(tmp_path, write, case):
    form, raw, canonical = CASES[case]
    raw = {name: value for name, value in raw.items() if value is not None}
    right = load(jsonl(tmp_path, [canonical, canonical]), tmp_path, chat_tokenizer())
    assert load(write(tmp_path, [raw, raw]), tmp_path, chat_tokenizer(), format=form) == right


def test_text_that_is_json_stays_text(tmp_path):
    answers = ['[{"name": "Oslo"}]', '{"messages": [1]}', "[1, 2]", '{"role": "mayor"}']
    rows = [{"prompt": "[]", "chosen": each, "rejected": "no idea"} for each in answers]
    tokenizer = chat_tokenizer()
    for write in (jsonl, csv_file, parquet_file):
        found = load(write(tmp_path, rows), tmp_path, tokenizer)
        assert [tokenizer.decode(each["chosen_ids"][:-1]) for each in found] == answers


@pytest.mark.parametrize("name", ["chosen", "prompt", "messages"])
def test_messages_as_python_prints_them_are_refused(tmp_path, name):
    """That is what pandas writes into CSV for a column of lists."""
    text = str([{"content": "why so?", "role": "user"}])
    with pytest.raises(UserError, match=f"field '{name}' is not JSON: .*json.dumps"):
        load(csv_file(tmp_path, [PAIR | {name: text}]), tmp_path, chat_tokenizer())


@pytest.mark.parametrize("kind", ["numpy", "pandas", "arrow", "columns"])
def test_a_format_saved_with_the_data(tmp_path, kind):
    rows = [PAIR | {"weight": 0.5}]
    right = load(jsonl(tmp_path, rows), tmp_path, chat_tokenizer())
    data = datasets.Dataset.from_list(rows)
    data.set_format(columns=["chosen", "rejected"]) if kind == "columns" else data.set_format(kind)
    data.save_to_disk(str(tmp_path / kind))
    assert load(tmp_path / kind, tmp_path, chat_tokenizer()) == right


def test_objects_that_datasets_stores_as_json(tmp_path):
    """It does where objects of several rows have values of different types."""
    rows = [*ROWS, PAIR | {"chosen": calls("weather", city=3)}]
    tokenizer = many()
    right = load(jsonl(tmp_path, rows), tmp_path, tokenizer)
    data = datasets.Dataset.from_list(united(rows), on_mixed_types="use_json")
    assert "Json" in str(data.features)
    data.to_parquet(str(tmp_path / "json.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for path in (tmp_path / "json.parquet", tmp_path / "saved", arrow):
        assert load(path, tmp_path, tokenizer) == right


def test_empty_prompts(tmp_path):
    """Of a table that has prompts a null is a prompt that is missing; a cell of CSV cannot be null."""
    rows = [{"prompt": prompt, "chosen": "The cat", "rejected": "The dog"} for prompt in ("Q", "")]
    tokenizer = byte_tokenizer(bos=True)
    right = load(jsonl(tmp_path, rows), tmp_path, tokenizer)
    for write in (csv_file, parquet_file):
        assert load(write(tmp_path, rows), tmp_path, tokenizer) == right
    rows[1]["prompt"] = None
    with pytest.raises(
        UserError, match="rows.parquet:2: field 'prompt' is null: an empty prompt is"
    ):
        load(parquet_file(tmp_path, rows), tmp_path, tokenizer)
    found = load(parquet_file(tmp_path, rows), tmp_path, tokenizer, ignore_columns=["prompt"])
    assert tokenizer.decode(found[0]["prompt_ids"]) == "<s>The"
    chat = {"chosen": [U, A], "rejected": [U, B]}
    right = load(jsonl(tmp_path, [PAIR]), tmp_path, chat_tokenizer())
    for prompt in (None, "", []):
        path = parquet_file(tmp_path, [chat | {"prompt": prompt}])
        assert load(path, tmp_path, chat_tokenizer()) == right


def test_cells_of_text_are_numbers_labels_and_messages(tmp_path):
    rows = {
        "pairs": [{"prompt": "Q", "chosen": "42", "rejected": "0.5", "weight": 2.0}],
        "chats": [PAIR | {"margin": -1.5}],
        "labels": [{"prompt": "Q", "completion": "12", "label": bool(n)} for n in (0, 1)],
        "groups": [{"prompt": "Q", "completions": ["7", "b"], "scores": [1, 0.5]}],
    }
    for name, each in rows.items():
        right = load(jsonl(tmp_path, each), tmp_path, chat_tokenizer())
        path = tmp_path / f"{name}.csv"
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, [*each[0], "note"])
            writer.writeheader()
            for row in each:
                texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
                writer.writerow(texts | {"note": ""})
        assert load(path, tmp_path, chat_tokenizer()) == right
    path = tmp_path / "words.tsv"
    path.write_text("prompt\tcompletion\tlabel\nQ\t12\tFalse\nQ\t12\t1\n")
    right = load(jsonl(tmp_path, rows["labels"]), tmp_path, chat_tokenizer())
    assert load(path, tmp_path, chat_tokenizer()) == right
