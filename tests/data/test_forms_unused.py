"""Columns that nothing uses: which are errors, which are named, and real data sets that have them."""

import json

import pytest

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.rows import parse_row
from dpo_fast.data.stream import ExampleStream
from dpo_fast.data.verdicts import BadRow
from dpo_fast.errors import UserError
from tests.support.forms import ANSWERS, PAIR, SYSTEM, A, B, U, say, talk
from tests.support.tokenizers import byte_tokenizer, chat_tokenizer

TEXT = {"prompt": "why so?", **ANSWERS}
WHOLE = {"prompt": "why so?", "chosen": [U, A], "rejected": [U, B]}


def parse(raw, **options):
    """The row, and the columns that are passed over."""
    unused = set()
    row = parse_row("f:1", raw, DataConfig(train="f", **options), unused)
    return row, unused


WORDS = {
    "system": "be brief",
    "input": "the sky",
    "query": "the sky",
    "question": "the sky?",
    "instruction": "tell me",
    "history": [["hello", "hi"]],
    "context": [say("user", "the sky")],
    "messages": [say("user", "the sky")],
    "conversations": [talk("human", "the sky")],
    "documents": [{"title": "the sky", "text": "is blue"}],
    "video": {"bytes": "00", "path": None},
    "videos": ["a.mp4"],
    "audio": "a.wav",
}


@pytest.mark.parametrize("name", WORDS)
def test_words_that_nothing_uses_are_an_error(name):
    with pytest.raises(
        BadRow, match=f"column {name!r} is not used: .*data.ignore_columns"
    ) as found:
        parse(TEXT | {name: WORDS[name]})
    assert name in ("video", "videos", "audio") or "data.columns" in str(found.value)
    row, unused = parse(TEXT | {name: WORDS[name], "id": 1}, ignore_columns=[name])
    assert (row, unused) == (parse(TEXT)[0], {"id"})
    if name != "system":  # which a chat begins with
        with pytest.raises(BadRow, match=f"column {name!r} is not used"):
            parse(PAIR | {name: WORDS[name]})


PNG, URI = b"\x89PNG\r\n", "data:image/png;base64,iVBO"
PICTURES = {
    "img": {"bytes": PNG, "path": None},
    "pictures": [{"bytes": None, "path": "a.JPG"}],
    "image_path": "cats/1.jpeg",
    "image_url": "https://cats.org/1.png",
    "shown": URI,
    "seen": b"\xff\xd8\xff\xe0",
}


@pytest.mark.parametrize("name", PICTURES)
def test_images_under_another_name_are_an_error(name):
    """A run on the texts alone would not be told from one that sees them."""
    with pytest.raises(BadRow, match=f"{name!r} holds images, .*data.columns=.images: {name}.*ign"):
        parse(TEXT | {name: PICTURES[name]})
    assert parse(TEXT | {name: PICTURES[name]}, columns={"images": name})[0].optional["images"]
    assert parse(TEXT | {name: PICTURES[name], "image": "b.png"})[1] == {name}
    others = {"logo": "a.png", "sound": {"bytes": b"RIFF0000WAVE", "path": None}, "image_id": "17"}
    assert parse(TEXT | others)[1] == others.keys()


@pytest.mark.parametrize("value", [None, "", " \n", [], {}, [None], [""], {"bytes": None}])
def test_empty_columns_are_no_words(value):
    for name in (*WORDS, "images", "image"):
        assert parse(TEXT | {name: value})[0] == parse(TEXT)[0]


def test_a_system_prompt_of_a_chat_is_its_first_message():
    expected = parse(PAIR | {"prompt": [SYSTEM, U]})[0]
    assert parse(PAIR | {"system": "be brief"})[0] == expected
    assert parse(PAIR | {"prompt": [SYSTEM, U], "system": "be brief"})[0] == expected
    assert parse({**WHOLE, "system_prompt": "be brief"})[0] == expected
    assert parse(PAIR | {"sys": "be brief"}, columns={"system": "sys"})[0] == expected
    with pytest.raises(BadRow, match="two system messages"):
        parse(PAIR | {"prompt": [say("system", "be long"), U], "system": "be brief"})
    with pytest.raises(BadRow, match="field 'system' is not text: got int"):
        parse(PAIR | {"system": 3})
    # A text has no place for it; the format says that the texts are a chat.
    with pytest.raises(BadRow, match="column 'system' is not used.*data.format=alpaca"):
        parse(TEXT | {"system": "be brief"})
    assert parse(TEXT | {"system": "be brief"}, format="alpaca")[0] == expected
    single = {"prompt": "why so?", "completion": "because", "label": 1, "system": "be brief"}
    group = {"prompt": "why so?", "completions": ["a", "b"], "ranks": [1, 2], "system": "be brief"}
    for raw in (single, group):
        with pytest.raises(BadRow, match="column 'system' is not used.*data.format=alpaca"):
            parse(raw)
        assert parse(raw, format="alpaca")[0].prompt == [SYSTEM, U]


def test_a_column_of_data_columns_that_nothing_uses():
    with pytest.raises(BadRow, match="data.columns.winner='who' is not used: the row is a pair"):
        parse(TEXT | {"who": "model_a"}, columns={"winner": "who"})
    with pytest.raises(BadRow, match="data.columns.completion='c' is not used: the row is a pair"):
        parse(TEXT | {"c": "x"}, columns={"completion": "c"})
    with pytest.raises(ValueError, match="ignore_columns=.'q'. passes over a column that data.col"):
        DataConfig(train="f", columns={"prompt": "q"}, ignore_columns=["q"])


# A row without a prompt whose prompt may have another name


def test_an_unmapped_prompt_is_found_out():
    raw = {"ask": "What is the sky?", "chosen": "The sky is blue", "rejected": "The sky is red"}
    message = "no prompt, and a column that is not used: 'ask' has words.*data.columns.prompt=ask"
    with pytest.raises(BadRow, match=message):
        parse(raw)
    assert parse(raw, columns={"prompt": "ask"})[0].prompt == raw["ask"]
    assert parse(raw, ignore_columns=["ask"])[0].prompt == "The sky is"
    with pytest.raises(BadRow, match=message):
        parse({"ask": [U], "chosen": [A], "rejected": [B]})
    # Ids and categories are no prompts, and neither is what the answers begin with.
    assert parse(raw | {"ask": "harmless-base"})[1] == {"ask"}
    assert parse(raw | {"ask": "The sky is"})[1] == {"ask"}


@pytest.mark.parametrize(
    "raw, hint",
    [
        ({"Question": "q", "good": "a", "bad": "b"}, "missing field 'chosen'.*did you mean 'good'"),
        ({"chosen": "a", "worse": "b"}, "missing field 'rejected'.*did you mean 'worse'"),
        ({"Chosen": "a", "Rejected": "b"}, "missing field 'chosen'.*did you mean 'Chosen'"),
        ({"response": "a", "label": True}, "missing field 'prompt'"),
    ],
)
def test_a_missing_column_hints_at_one_that_may_be_it(raw, hint):
    with pytest.raises(BadRow, match=hint):
        parse(raw)


# Data sets of the hub, by the columns that they have

RATED = {"score_chosen": 8.5, "score_rejected": 2.0}
HUB = {
    "HuggingFaceH4/ultrafeedback_binarized": (
        WHOLE | RATED | {"prompt_id": "0f", "messages": [U, A]},
        {"prompt_id", "messages", *RATED},
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        WHOLE | {"source": "x", "chosen-rating": 5.0, "chosen-model": "m", "rejected-rating": 1.0},
        {"source", "chosen-rating", "chosen-model", "rejected-rating"},
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        {
            "system": "",
            "input": "why so?",
            **ANSWERS,
            "generations": ["because", "no idea"],
            "order": ["chosen", "rejected"],
            "labelling_prompt": [say("user", "Which answer is better?")],
            "rating": [9.0, 1.0],
            "status": "unchanged",
        },
        {"generations", "order", "labelling_prompt", "rating", "status"},
    ),
    "mlabonne/orpo-dpo-mix-40k": (
        WHOLE | {"question": "why so?", "source": "x"},
        {"question", "source"},
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        WHOLE
        | {
            "conversation": [{"input": "why so?", "output": "as it is"}],
            "original_response": "as it is",
            "new_generations": ["no idea"],
            "rating_chosen": 5,
        },
        {"conversation", "original_response", "new_generations", "rating_chosen"},
    ),
    "snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset": (
        WHOLE | {"prompt_id": "x", "all_generated_responses": ["a b"], "all_rm_scores": [0.5]},
        {"prompt_id", "all_generated_responses", "all_rm_scores"},
    ),
    "argilla/dpo-mix-7k": (
        {"dataset": "x", "chosen": [U, A], "rejected": [U, B], "chosen_rating": 5.0},
        {"dataset", "chosen_rating"},
    ),
    "openbmb/UltraInteract_pair": (
        {"task": "code", "id": "x", "trajectory": [talk("user", "why so?")], **ANSWERS},
        {"task", "id"},
    ),
    "nvidia/HelpSteer3": (
        {
            "context": [U],
            "response1": "because",
            "response2": "no idea",
            "overall_preference": -2,
            "domain": "code",
            "language": "python",
            "individual_preference": [{"score": -2, "reasoning": "the first is better"}],
        },
        {"domain", "language", "individual_preference"},
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_data_sets_of_the_hub_need_no_options(name):
    raw, unused = HUB[name]
    assert parse(raw) == (parse(PAIR)[0], unused)


# Through files and streams


@pytest.mark.parametrize("streaming", [False, True])
def test_files_and_streams_say_the_same(tmp_path, streaming):
    rows = [{**TEXT, "id": 1}, {**TEXT, "chosen": "so", "system": "be brief", "note": "x"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(**options):
        options |= {"train": str(path), "cache_dir": str(tmp_path / "cache")}
        if streaming:
            return ExampleStream(DataConfig(streaming=True, **options), byte_tokenizer()).read()
        return load_examples(DataConfig(**options), byte_tokenizer(), split="train")

    with pytest.raises(UserError, match=r"rows.jsonl:2: column 'system' is not used"):
        load()
    skipped = load(on_bad_row="skip").report
    assert skipped.bad.counts == {"column 'system' is not used": 1}
    kept = load(ignore_columns=["system"])
    assert (len(kept), kept.report.ignored_columns) == (2, ["id", "note"])
    assert "columns not used: id, note" in kept.report.notes()


@pytest.mark.parametrize("streaming", [False, True])
def test_ties_are_dropped_and_merged_rows_counted(tmp_path, streaming):
    def row(prompt, response, helpfulness):
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": 1}

    rows = [
        row("p", "a", 1),
        row("p", "b", 3),
        row("q", "c", 2),
        row("q", "d", 2),
        row("r", "e", 2),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    options = {"train": str(path), "cache_dir": str(tmp_path / "cache"), "on_bad_row": "skip"}
    if streaming:
        config = DataConfig(streaming=True, stream_buffer=1, **options)
        stream = ExampleStream(config, chat_tokenizer())
        first, second = stream.read(), stream.read()
        assert [chunk.where(0) for chunk in (first, second)] == [f"{path}:1"] * 2
        report = second.report
        stream.seek(1, 3)
        assert stream.read().where(0) == f"{path}:1"
    else:
        config = DataConfig(**options)
        report = load_examples(config, chat_tokenizer(), split="train").report
        assert (report.rows_read, report.examples_kept) == (3, 1)
    assert report.dropped.counts == {"a tie": 1}
    assert report.dropped.rows["a tie"][0][0] == f"{path}:3"
    assert report.bad.counts == {"one response to a prompt": 1}
    path.write_text("".join(json.dumps(each) + "\n" for each in rows[2:4]))
    with pytest.raises(UserError, match="none of 1 rows is usable. 1 x a tie"):
        load_examples(DataConfig(**options), chat_tokenizer(), split="train")


def test_what_would_use_a_column_is_said():
    with pytest.raises(BadRow, match=r"'system' is not used: .*data\.apply_chat_template=true"):
        parse(TEXT | {"system": "Be very brief"})
    chats = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    context = [{"role": "user", "content": "why is it blue"}]
    with pytest.raises(BadRow, match=r"'context' is not used: .*data\.columns=\{prompt: context\}"):
        parse(chats | {"context": context})
    assert parse(chats | {"context": context}, columns={"prompt": "context"})[0].prompt == context
    assert parse(TEXT | {"system": "Be very brief"}, apply_chat_template=True)[0].prompt[0] == {
        "role": "system",
        "content": "Be very brief",
    }
