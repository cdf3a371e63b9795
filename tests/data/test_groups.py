"""Groups: rows with several scored completions, from the file to token ids."""

import json

import datasets
import numpy as np
import pytest

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import GroupDataset, load_examples
from dpo_fast.data.kinds import GROUPS, PAIRS, ExampleLengths
from dpo_fast.data.report import DataReport, render_examples, render_report
from dpo_fast.data.rows import CompletionRow, GroupRow, PairRow, parse_row
from dpo_fast.data.stream import ExampleStream
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError
from tests.support.models import write_groups
from tests.support.tokenizers import BOS, EOS, byte_tokenizer, chat_tokenizer, ids_of

datasets.disable_progress_bars()
TEXT = {"prompt": "2 + 2? ", "completions": ["4", "5", "four"], "scores": [1, 0.0, 0.5]}
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
BYE = {"role": "assistant", "content": "bye"}
PAIR = {"prompt": "2 + 2? ", "chosen": "4", "rejected": "5"}
SINGLE = {"prompt": "2 + 2? ", "completion": "4", "label": True}


def unused(raw, config):
    """The columns of a row that are passed over."""
    names = set()
    parse_row("f.jsonl:7", raw, config, names)
    return names


def parse(raw, **options):
    return parse_row("f.jsonl:7", raw, DataConfig(train="f.jsonl", **options))


def tokenise(tokenizer, completions, prompt="ab", **options):
    """Scores are the completions' numbers."""
    raw = {"prompt": prompt, "completions": completions, "scores": list(range(len(completions)))}
    config = DataConfig(train="f", **options)
    return RowTokeniser(tokenizer, config)(parse_row("f.jsonl:7", raw, config))


@pytest.fixture
def load(tmp_path):
    def run(rows, tokenizer=None, split="train", make=load_examples, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
        config = DataConfig(
            **({"train": str(path), "cache_dir": str(tmp_path / "cache")} | options)
        )
        if make is ExampleStream:
            return ExampleStream(config, tokenizer or byte_tokenizer(bos=True))
        return make(config, tokenizer or byte_tokenizer(bos=True), split=split)

    return run


@pytest.fixture
def rows(tmp_path):
    """Groups of three and four, the last of which has one score for all."""
    lines = write_groups(tmp_path / "groups.jsonl", 9).read_text().splitlines()
    return [json.loads(line) for line in lines]


def everything(data):
    return [data[index] for index in range(len(data))]


# Rows


def test_the_columns_tell_what_a_row_is():
    answers = ["4", "5", "four"]
    assert parse(TEXT) == GroupRow("f.jsonl:7", "2 + 2? ", answers, [1.0, 0.0, 0.5], {})
    assert parse(TEXT | {"weight": 2}, format="groups").optional == {"weight": 2.0}
    # Arrow gives every row the columns of all others.
    empty = dict.fromkeys(("chosen", "rejected", "completion", "label"))
    assert isinstance(parse(TEXT | empty), GroupRow)
    assert isinstance(parse(TEXT | {"label": True}), GroupRow)
    assert isinstance(parse(PAIR | TEXT), PairRow)
    assert isinstance(parse(SINGLE | {"scores": [1.0]}), CompletionRow)
    assert isinstance(parse(PAIR | SINGLE | TEXT, format="groups"), GroupRow)
    renamed = {"q": "2 + 2? ", "answers": answers, "rewards": [3, 2, 1]}
    columns = {"prompt": "q", "completions": "answers", "scores": "rewards"}
    assert parse(renamed, columns=columns).scores == [3.0, 2.0, 1.0]
    config = DataConfig(train="f")
    used = {"weight": 1.0, "tools": None}
    assert unused(TEXT | used | {"id": 1, "margin": 0.1}, config) == {"id", "margin"}
    assert unused(PAIR | {"scores": [1, 2]}, config) == {"scores"}


@pytest.mark.parametrize(
    "prompt, completions",
    [
        ([USER], [[ASSISTANT], [BYE]]),
        ("hi", [[ASSISTANT], [BYE]]),
        ([USER], ["hello", "bye"]),
        (USER, [ASSISTANT, [BYE]]),
    ],
)
def test_prompt_and_completions_may_be_messages(prompt, completions):
    raw = {"prompt": prompt, "completions": completions, "scores": [1, 2], "tools": [{}]}
    parsed = parse(raw)
    assert (parsed.prompt, parsed.completions) == ([USER], [[ASSISTANT], [BYE]])
    assert (parsed.is_chat, parsed.optional) == (True, {"tools": [{}]})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"completions": ["4"], "scores": [1]}, "a group of one: got 1 completions"),
        ({"completions": [], "scores": []}, "a group of one: got 0 completions"),
        ({"scores": [1, 2]}, "scores and completions differ in number: 2 and 3"),
        ({"scores": [1, 2, 3, 4]}, "differ in number: 4 and 3"),
        ({"scores": [1, float("nan"), 2]}, r"field 'scores\[1\]' is not finite: got nan"),
        ({"scores": [1, 2, 10**400]}, r"field 'scores\[2\]' is not finite: got inf"),
        (
            {"scores": [1, 2, -1e39]},
            r"field 'scores\[2\]' is out of range: -1e\+39 is beyond 1e\+18",
        ),
        ({"scores": ["1", 2, 3]}, r"field 'scores\[0\]' is not a number: got '1'"),
        ({"scores": [1, True, 3]}, r"field 'scores\[1\]' is not a number: got True"),
        ({"scores": [1, 2, None]}, r"field 'scores\[2\]' is not a number: got None"),
        ({"scores": 1.0}, "field 'scores' is not a list.*each completion, got float"),
        ({"completions": "4"}, "field 'completions' is not a list.*got str"),
        ({"completions": None}, "field 'completions' is not a list"),
        ({"completions": ["4", [ASSISTANT], "5"]}, "completions differ in kind: some are text"),
        ({"completions": ["4", None, "5"]}, r"field 'completions\[1\]' has the wrong type.*null"),
        ({"completions": ["4", "5", " \n"]}, r"empty completions\[2\]"),
        ({"completions": [[ASSISTANT], [], [BYE]]}, r"empty completions\[1\]: the message list"),
        (
            {"completions": [[ASSISTANT], [USER], [BYE]]},
            r"completions\[1\] begins with a user message",
        ),
        ({"completions": ["4", "\ud800", "5"]}, r"field 'completions\[1\]' is not Unicode"),
        ({"prompt": " \n"}, "empty prompt"),
        ({"weight": -1}, "field 'weight' is out of range"),
        ({"tools": [{}]}, "tools without messages"),
    ],
)
def test_bad_rows(changes, message):
    with pytest.raises(Dropped if "empty completions" in message else BadRow, match=message):
        parse(TEXT | changes)


@pytest.mark.parametrize(
    "raw, options, message",
    [
        (
            {"completions": ["b", "c"], "scores": [1, 2]},
            {},
            "'prompt': the row has 'completions', ",
        ),
        (
            {"prompt": "a", "scores": [1, 2]},
            {},
            "'completions': .*; data.columns.completions=... names",
        ),
        (
            {"prompt": "a", "completion": "b", "scores": [1]},
            {"format": "groups"},
            "'completions'.*did you mean 'completion'",
        ),
        ({"prompt": "a", "completions": ["b"], "score": [1]}, {}, "'scores'.*did you mean 'score'"),
        (TEXT, {"format": "pairs"}, "'chosen'"),
        (PAIR, {"format": "groups"}, "'completions'"),
        (TEXT, {"columns": {"scores": "rewards"}}, "'rewards': data.columns.scores names it"),
    ],
)
def test_what_is_missing_is_named(raw, options, message):
    with pytest.raises(BadRow, match=f"missing field {message}"):
        parse(raw, **options)


# Tokens

A, B, C, D = range(69, 73)
BC = 261  # the first merge


def test_a_straddling_token_of_one_answer_moves_the_boundary_of_all():
    tokenizer = byte_tokenizer(merges=(("b", "c"),))
    group = tokenise(tokenizer, ["d", "c", "a", "bc"])
    assert group.prompt_ids == [A]
    assert group.completions_ids == [[B, D, EOS], [BC, EOS], [B, A, EOS], [B, BC, EOS]]
    assert (group.merged, group.eos_added) == (1, 4)
    group = tokenise(tokenizer, ["d", "a", "b"])
    assert (group.prompt_ids, group.merged) == ([A, B], 0)
    # "ab|c" is [a bc], the others begin with the joined "ab": the difference is before the straddle.
    tokenizer = byte_tokenizer(merges=(("b", "c"), ("a", "b")))
    group = tokenise(tokenizer, ["d", "c", "a"])
    assert group.prompt_ids == tokenizer("ab")["input_ids"]
    assert group.completions_ids == [[D, EOS], [C, EOS], [A, EOS]]


def test_all_answers_are_cut_with_one_prompt():
    options = {"max_length": 8, "max_prompt_length": 3, "add_eos": False, "prompt": "aabbccdda"}
    answers = ["bb", "a" * 7, "c" * 9, "d" * 5]
    group = tokenise(byte_tokenizer(), answers, **options)
    assert group.prompt_ids == [D, D, A]
    assert group.completions_ids == [[B] * 2, [A] * 5, [C] * 5, [D] * 5]
    assert (group.prompt_cut, group.answers_cut) == (6, 2)
    start = tokenise(byte_tokenizer(), answers, truncation="keep_start", **options)
    assert (start.prompt_ids, start.completions_ids) == ([A, A, B], group.completions_ids)
    counts = r"9 prompt, 2 completions\[0\], 7 completions\[1\], 9 .*\[2\] and 5 .*\[3\] tokens do"
    with pytest.raises(UserError, match=f"f.jsonl:7: {counts} not fit.*raise it to 18"):
        tokenise(byte_tokenizer(), answers, truncation="error", **options)
    with pytest.raises(Dropped, match="longer than max_length: 18 > 8 tokens"):
        tokenise(byte_tokenizer(), answers, truncation="drop", **options)


def test_groups_in_which_all_answers_are_the_same_are_dropped():
    with pytest.raises(Dropped, match="the answers are the same tokens"):
        tokenise(byte_tokenizer(), ["a", "a", "a"])
    options = {"max_length": 4, "max_prompt_length": 1, "prompt": "dd"}
    with pytest.raises(Dropped, match="the answers are the same once cut: all keep 3 tokens"):
        tokenise(byte_tokenizer(), ["aaab", "aaac", "aaad"], **options)
    # Samples of a model repeat themselves.
    assert tokenise(byte_tokenizer(), ["a", "b", "a"]).completions_ids[2] == [A, EOS]


def test_chat_is_rendered_as_for_pairs(load):
    group = tokenise(chat_tokenizer(), ["a", "b", "c"], prompt=[USER])
    pair = load([{"prompt": [USER], "chosen": "a", "rejected": "b"}], chat_tokenizer())[0]
    assert group.prompt_ids == pair["prompt_ids"]
    assert group.completions_ids[:2] == [pair["chosen_ids"], pair["rejected_ids"]]


# Data sets


def test_what_is_stored(load, rows):
    tokenizer = byte_tokenizer(bos=True)
    rows[0]["scores"][0] = 0.1  # which fp32 does not hold
    data = load([row | {"weight": index} for index, row in enumerate(rows)])
    assert isinstance(data, GroupDataset)
    assert (len(data), data.numbers, data.kind) == (9, ["weight"], GROUPS)
    for index, row in enumerate(rows):
        assert data[index] == {
            "prompt_ids": [BOS, *ids_of(tokenizer, row["prompt"])],
            "completions_ids": [[*ids_of(tokenizer, each), EOS] for each in row["completions"]],
            "scores": row["scores"],
            "weight": index,
        }
    assert data.where(2).endswith("rows.jsonl:3")
    lengths, truth = data.lengths, ExampleLengths.of(everything(data), GROUPS)
    for name in ("prompt_P", "answers_S", "counts_P"):
        assert getattr(lengths, name).tolist() == getattr(truth, name).tolist(), name


def test_parquet_gives_the_same_rows(load, rows, tmp_path):
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([row | {"chosen": None} for row in rows]).to_parquet(str(path))
    assert load([], train=str(path)).fingerprint == load(rows).fingerprint


def test_the_scores_are_part_of_the_data_but_not_of_a_rows_tokens(load, rows):
    one = load(rows)
    changed = [row | {"scores": [9.0, *row["scores"][1:]]} for row in rows[:1]] + rows[1:]
    other = load(changed)
    assert one.digests == other.digests and one.fingerprint != other.fingerprint
    assert load(rows).fingerprint == one.fingerprint != load(rows[:5]).fingerprint
    swapped = [row | {"completions": row["completions"][::-1]} for row in rows]
    assert load(swapped).digests != one.digests


def test_held_out_groups_keep_their_scores(load, rows):
    held = load(rows, split="eval", eval_rows=3)
    training = load(rows, eval_rows=3)
    assert (len(held), len(training), held.report.held_out) == (3, 6, 3)
    numbers = [int(held.where(index).rsplit(":", 1)[1]) - 1 for index in range(3)]
    assert [each["scores"] for each in everything(held)] == [rows[n]["scores"] for n in numbers]
    assert held.lengths.counts_P.tolist() == [len(rows[n]["scores"]) for n in numbers]
    rows[numbers[1]]["scores"][0] += 1.0
    assert load(rows, eval_rows=3).fingerprint == training.fingerprint
    assert load(rows, split="eval", eval_rows=3).fingerprint != held.fingerprint


def test_the_report(load, rows):
    report = load(rows).report
    assert (report.kind, report.examples_kept, report.answers, report.even) == ("groups", 9, 31, 1)
    assert report.kept == "9 groups kept of 31 completions"
    assert report.notes() == [
        "9 of 9 prompts did not have their BOS token; it was put first",
        "31 of 31 answers did not end their turn; EOS was put last",
        "1 of 9 groups have one score for all their completions; nothing is preferred there",
    ]
    assert list(report.lengths) == ["prompt", "completions", "longest", "total"]
    small = load([TEXT]).report  # 8 tokens, then 2, 2 and 5
    sums = {"prompt": 8, "completions": 9, "total": 17, "scored": 9, "separate": 33}
    assert small.tokens == sums
    longest = {name: values["max"] for name, values in small.lengths.items()}
    assert longest == {"prompt": 8, "completions": 5, "longest": 13, "total": 17}
    for each in (report, small):
        assert DataReport.from_json(each.to_json()) == each


def test_bad_and_dropped_groups_are_counted(load, rows):
    rows[1]["scores"].pop()
    rows[2]["completions"] = ["one"] * 3
    with pytest.raises(UserError, match="rows.jsonl:2: scores and completions differ.*on_bad_row"):
        load(rows)
    rows[3]["scores"][1], rows[4]["scores"][2] = "a", "b"
    report = load(rows, on_bad_row="skip").report
    assert report.bad.counts == {
        "scores and completions differ in number": 1,
        "field 'scores' is not a number": 2,  # one fault, whichever completion it is about
    }
    assert any("scores[2]' is not a number: got 'b'" in message for _, message in report.bad_rows)
    assert report.dropped.counts == {"the answers are the same tokens": 1}
    kept = rows[:1] + rows[5:]
    assert (report.examples_kept, report.answers) == (5, sum(len(row["scores"]) for row in kept))


def test_kinds_do_not_mix(load):
    with pytest.raises(UserError, match="rows.jsonl:2 is a pair and .*rows.jsonl:1 is a group of"):
        load([TEXT, PAIR])
    with pytest.raises(UserError, match="rows.jsonl:2 is a group of completions with scores and"):
        load([SINGLE, TEXT], make=ExampleStream).read()
    for name, kind in (("groups", GROUPS), ("pairs", PAIRS)):
        kept = load([TEXT, PAIR], format=name, on_bad_row="skip")
        assert (len(kept), kept.report.bad.total, kept.kind) == (1, 1, kind)


def test_a_stream_reads_the_same(load, rows):
    rows = [row | {"weight": 1.0} for row in rows]
    stored = load(rows)
    stream = load(rows, make=ExampleStream, streaming=True, stream_buffer=4)
    chunks = [stream.read() for _ in range(3)]
    assert [(chunk.kind, len(chunk)) for chunk in chunks] == [(GROUPS, 4), (GROUPS, 4), (GROUPS, 1)]
    assert sum(map(everything, chunks), []) == everything(stored)
    answers = np.concatenate([chunk.lengths.answers_S for chunk in chunks])
    assert answers.tolist() == stored.lengths.answers_S.tolist()
    assert chunks[0].numbers == ["weight"]
    # Counts are of the stream so far.
    assert [chunk.report.answers for chunk in chunks] == [14, 28, 31]
    assert (chunks[2].report.kept, chunks[2].report.even) == (stored.report.kept, 1)
    assert chunks[2].report.notes() == stored.report.notes()


def test_the_preview_shows_every_answer_with_its_score(load, rows):
    from rich.console import Console

    rows[0] |= {"completions": ["x", "yy", "z"], "scores": [1.0, -0.25, 1.0]}
    data, console = load(rows), Console(record=True, width=120)
    render_report(data.report, console)
    render_examples(data, byte_tokenizer(bos=True), console, n=1)
    text = console.export_text()
    assert "9 rows read, 9 groups kept of 31 completions, 0 bad, 0 dropped" in text
    assert "group 0 " in text
    for line in ("1        ⟦x·</s>⟧", "-0.25    ⟦y·y·</s>⟧", "1        ⟦z·</s>⟧"):
        assert line in text


def test_ranks_are_scores_turned_round(load):
    """Rank 1 is the best, and two may share a rank."""
    row = {"prompt": "2 + 2? ", "completions": ["4", "5", "four"], "ranks": [1, 3, 2]}
    assert parse(row).scores == [-1.0, -3.0, -2.0]
    data = load([row, row | {"prompt": "3? ", "ranks": [2, 1, 1]}])
    assert [data[index]["scores"] for index in range(2)] == [[-1, -3, -2], [-2, -1, -1]]
    assert data.report.ignored_columns == []
    theirs = {"prompt": "a", "completions": ["b", "c"], "order": [2, 1]}
    assert parse(theirs, columns={"ranks": "order"}).scores == [-2.0, -1.0]
    for wrong, message in (
        ({"scores": [1, 2, 3]}, "scores and ranks: both say how good"),
        ({"ranks": [1, 2]}, "ranks and completions differ in number: 2 and 3"),
        ({"ranks": [1, "x", 2]}, r"field 'ranks\[1\]' is not a number"),
        ({"ranks": None}, "missing field 'scores'"),
    ):
        with pytest.raises(BadRow, match=message):
            parse(row | wrong)
