"""Sources with weights: shares of every epoch, which rows they draw, and runs that train on them."""

import gzip
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.mixture import Interleaving, Mixture, epoch_quotas, plan, quotas, shares
from dpo_fast.data.packing import Costs
from dpo_fast.data.sampler import Sampler, TokenSampler
from dpo_fast.data.stream_mixture import open_stream
from dpo_fast.errors import UserError
from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import changed, run_tree, write_completions, write_model, write_pairs
from tests.support.tokenizers import CHATML, byte_tokenizer, chat_tokenizer

datasets.disable_progress_bars()
WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


# Shares


@given(WEIGHTS, st.integers(0, 5000))
def test_quotas_are_the_largest_remainder(weights, total):
    parts = shares(weights)
    found = quotas(total, parts)
    assert sum(parts) == 1
    assert sum(found) == total
    rest = [total * share - quota for share, quota in zip(parts, found)]
    assert all(-1 < each < 1 for each in rest)
    up = [each for each in rest if each < 0]
    down = [each for each in rest if each > 0]
    assert not up or not down or min(1 + each for each in up) >= max(down)


def test_decimals_are_taken_as_written():
    assert shares([0.7, 0.3]) == [Fraction(7, 10), Fraction(3, 10)]
    assert quotas(1000, shares([0.7, 0.2, 0.1])) == [700, 200, 100]
    assert quotas(10, shares([1, 1, 1])) == [4, 3, 3]


@given(st.lists(st.tuples(st.integers(1, 200), st.floats(0.05, 20)), min_size=1, max_size=4))
def test_an_epoch_ends_with_the_first_or_the_last_source(sources):
    sizes, parts = [size for size, _ in sources], shares([weight for _, weight in sources])
    first = epoch_quotas(sizes, parts, "first_exhausted")
    assert all(quota <= size for quota, size in zip(first, sizes))
    longer = [(sum(first) + 1) * share for share in parts]
    assert any(each > size for each, size in zip(longer, sizes)), "the epoch could be longer"
    last = epoch_quotas(sizes, parts, "all_exhausted")
    assert all(quota >= size for quota, size in zip(last, sizes))
    shorter = [(sum(last) - 1) * share for share in parts]
    assert any(each < size for each, size in zip(shorter, sizes)), "the epoch could be shorter"


def test_a_source_without_an_example_in_an_epoch_is_named():
    with pytest.raises(
        UserError, match=r"data.train\[1\].weight=0.01 is no example of an epoch.* 10 "
    ):
        plan([10, 10], [5, 0.01], [0, 0], "first_exhausted")
    assert plan([10, 10], [5, 0.01], [0, 0], "all_exhausted").quotas == (5000, 10)


@given(WEIGHTS, st.integers(1, 400))
@settings(max_examples=50)
def test_a_stream_is_exact_wherever_it_can_be(weights, count):
    """At any place within one of the exact share, so exact where that is whole."""
    parts = shares(weights)
    turns = Interleaving(parts, [0] * len(parts))
    for place in range(1, count + 1):
        turns.next()
        gaps = [abs(taken - place * share) for taken, share in zip(turns.taken, parts)]
        assert max(gaps) <= max(1, len(parts) / 2), gaps
        if all((place * share).denominator == 1 for share in parts):
            assert max(gaps) == 0
    again = Interleaving(parts, turns.taken)
    assert [again.next() for _ in range(20)] == [turns.next() for _ in range(20)]


# Which examples an epoch has


MIXTURE = Mixture((7, 100, 12), (10, 20, 5), (0, 0, 3))


def by_source(places, mixture=MIXTURE) -> list[list[int]]:
    starts = np.cumsum((0, *mixture.sizes))
    return [[int(p) for p in places if a <= p < b] for a, b in zip(starts, starts[1:])]


def test_every_source_is_gone_through_before_it_begins_again():
    epochs = [MIXTURE.examples(5, epoch) for epoch in range(12)]
    for epoch in epochs:
        assert [len(each) for each in by_source(epoch)] == [10, 20, 5]
    for index, size in enumerate(MIXTURE.sizes):
        places = [p for epoch in range(12) for p in by_source(MIXTURE.drawn(5, epoch))[index]]
        rounds = [places[start : start + size] for start in range(0, len(places), size)]
        whole = [each for each in rounds if len(each) == size]
        assert whole
        assert all(len(set(each)) == size for each in whole), "an example came twice in a round"
        assert len(whole) == 1 or whole[0] != whole[1], "the second round is not shuffled anew"
    counts = Counter(epochs[0].tolist())
    assert {counts[place] for place in range(7)} == {1, 2}, (
        "the small source is not repeated evenly"
    )


def test_seeds_decide():
    def epoch(mixture, seed=5, number=0):
        return mixture.examples(seed, number).tolist()

    assert epoch(MIXTURE) == epoch(MIXTURE)
    assert epoch(MIXTURE) != epoch(MIXTURE, seed=6)
    assert epoch(MIXTURE) != epoch(MIXTURE, number=1)
    other = Mixture(MIXTURE.sizes, MIXTURE.quotas, (0, 0, 4))
    first, second = (by_source(each.drawn(5, 0)) for each in (MIXTURE, other))
    assert first[:2] == second[:2]
    assert first[2] != second[2]


def test_a_data_set_without_the_examples_that_no_epoch_draws():
    narrow = MIXTURE.narrowed(5, 2)
    assert len(narrow.used) == 7 + 40 + 10
    for epoch in range(2):
        places = narrow.used[narrow.examples(5, epoch)]
        assert places.tolist() == MIXTURE.examples(5, epoch).tolist()


@pytest.mark.parametrize("world", [1, 2])
def test_samplers_draw_from_it(world):
    costs = Costs(np.random.default_rng(0).integers(5, 60, sum(MIXTURE.sizes)))
    for sampler in (
        Sampler(len(MIXTURE), 8, 2, world, seed=5, mixture=MIXTURE),
        TokenSampler(costs, 200, 8, world, seed=5, mixture=MIXTURE),
    ):
        assert sampler.steps(2) > sampler.steps(1)
        for epoch in range(3):
            steps = range(sampler.steps(epoch) if epoch else 0, sampler.steps(epoch + 1))
            seen = []
            for step in steps:
                shares = [sampler.micro_batches(step, rank) for rank in range(world)]
                together = [index for share in shares for batch in share for index in batch]
                assert sorted(together) == sorted(sampler.global_batch(step))
                seen += together
            assert sorted(seen) == sorted(MIXTURE.examples(5, epoch).tolist())
    assert isinstance(sampler.global_batch(0)[0], int)


# From files


def write(path: Path, count: int, **names) -> str:
    """A file of pairs whose texts say where they are from. names: columns with other names."""
    keys = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"} | names
    rows = [
        {keys["prompt"]: f"{path.stem} {n}", keys["chosen"]: f"yes {n}", keys["rejected"]: "no"}
        for n in range(count)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path):
    """config(entries, **options): `a` has 30 rows, `b` 8 with other columns and `c` 12 of messages."""
    a = write(tmp_path / "a.jsonl", 30)
    b = write(tmp_path / "b.jsonl", 8, chosen="good", rejected="bad")
    said = [("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")]
    rows = [
        {name: [{"role": role, "content": f"c {name} {n}"}] for name, role in said}
        for n in range(12)
    ]
    (tmp_path / "c.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    entries = {
        "a": {"path": a},
        "b": {"path": b, "columns": {"chosen": "good", "rejected": "bad"}},
        "c": {"path": str(tmp_path / "c.jsonl"), "format": "messages"},
    }

    def make(train: dict, **options) -> DataConfig:
        listed = [entries[name] | more for name, more in train.items()]
        return DataConfig(train=listed, cache_dir=str(tmp_path / "cache"), **options)

    return make


def load(config, split="train"):
    return load_examples(config, chat_tokenizer(), split=split)


def sources(examples, places=None) -> Counter:
    """How many examples are of each file."""
    places = range(len(examples)) if places is None else places
    return Counter(Path(examples.where(int(place)).rpartition(":")[0]).stem for place in places)


def test_sources_of_different_formats_and_columns(config):
    examples = load(config({"a": {}, "b": {}, "c": {}}))
    assert sources(examples) == {"a": 30, "b": 8, "c": 12}
    assert examples.mixture is None
    assert [(each.drawn, each.share) for each in examples.report.mixture] == [
        (30, None), (8, None), (12, None),
    ]  # fmt: skip
    alone = load(config({"c": {}}))
    assert [alone[index] for index in range(12)] == [examples[38 + index] for index in range(12)]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("first_exhausted", {"a": 16, "b": 8, "c": 4}),
        ("all_exhausted", {"a": 44, "b": 22, "c": 12}),
    ],
)
def test_shares_of_an_epoch(config, strategy, expected):
    """Weights 4, 2 and 1.1: b ends first, c last."""
    weights = {"a": {"weight": 4}, "b": {"weight": 2}, "c": {"weight": 1.1}}
    examples = load(config(weights, stopping_strategy=strategy))
    for epoch in range(3):
        assert sources(examples, examples.mixture.examples(0, epoch)) == expected
    total = sum(expected.values())
    report = type(examples.report).from_json(examples.report.to_json())
    assert [each.drawn for each in report.mixture] == list(expected.values())
    assert [each.share for each in report.mixture] == pytest.approx([4 / 7.1, 2 / 7.1, 1.1 / 7.1])
    name, told = report.shares()[1]
    assert name.endswith("b.jsonl")
    assert f"{expected['b']} of {total} examples of an epoch" in told
    assert "(planned 28.17%)" in told
    assert ("2.75 times each" in told) == (strategy == "all_exhausted")


def test_rows_are_chosen_by_the_seed(config):
    def taken(**options) -> list[str]:
        examples = load(config({"a": options, "b": {}}))
        return [examples.where(place) for place in range(len(examples) - 8)]

    ten = taken(rows=10)
    assert len(ten) == 10
    assert ten == sorted(ten, key=lambda where: int(where.rpartition(":")[2]))
    assert ten == taken(rows=10) == taken(rows=10, seed=0) != taken(rows=10, seed=1)
    assert set(ten) < set(taken(rows=20))
    assert len(taken(rows=30)) == 30
    with pytest.raises(UserError, match=r"data.train\[0\].rows=31, but .*a.jsonl has 30 rows"):
        load(config({"a": {"rows": 31}, "b": {}}))


def test_rows_that_become_one_are_chosen_together(tmp_path):
    """HelpSteer2 has a row for each response of a prompt."""
    rows = [{"prompt": f"Q{n // 2}", "response": f"{n}", "helpfulness": n % 2} for n in range(20)]
    path = tmp_path / "rated.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    entry = {"path": str(path), "rows": 4}
    chosen = load(DataConfig(train=[entry], cache_dir=str(tmp_path)))
    assert len(chosen) == 4
    with pytest.raises(UserError, match="has 10 rows"):
        load(DataConfig(train=[entry | {"rows": 11}]))


def test_columns_are_passed_over_source_by_source(tmp_path):
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "system": "Be brief."}
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    a, b = ({"path": str(tmp_path / f"{name}.jsonl")} for name in "ab")
    passing = {"ignore_columns": ["system"]}
    cache = {"cache_dir": str(tmp_path / "cache")}
    assert len(load(DataConfig(train=[a | passing, b | passing], **cache))) == 2
    with pytest.raises(UserError, match=r"b.jsonl:1: .*data.train\[1\].ignore_columns"):
        load(DataConfig(train=[a | passing, b], **cache))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow", "saved", "gz", "csv"])
def test_rows_of_every_container(tmp_path, kind):
    lines = Path(write(tmp_path / "a.jsonl", 25)).read_text()
    rows = datasets.Dataset.from_list([json.loads(line) for line in lines.splitlines()])
    path = tmp_path / f"d.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows.to_list()))
    elif kind == "parquet":
        rows.to_parquet(str(path))
    elif kind == "csv":
        rows.to_csv(str(path))
    elif kind == "gz":
        path = tmp_path / "d.jsonl.gz"
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "arrow":
        rows.save_to_disk(str(tmp_path / "folder"))
        path = next((tmp_path / "folder").glob("*.arrow")).rename(path)
    elif kind == "jsonl":
        path.write_text("\n" + lines)
    else:
        rows.save_to_disk(str(path))
    config = DataConfig(train=[{"path": str(path), "rows": 6, "seed": 2}], cache_dir=str(tmp_path))
    found = load(config)
    chosen = sorted(np.random.default_rng(2).permutation(25)[:6].tolist())
    texts = [chat_tokenizer().decode(found[index]["prompt_ids"]) for index in range(6)]
    assert texts == [f"a {row}" for row in chosen]


def test_broken_rows_count_only_where_they_are_chosen(tmp_path):
    lines = Path(write(tmp_path / "a.jsonl", 40)).read_text().splitlines()
    lines[5::2] = ["{broken"] * len(lines[5::2])
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    chosen = set(np.random.default_rng(0).permutation(40)[:12].tolist())
    broken = {row for row in chosen if row >= 5 and row % 2}
    entries = [{"path": str(tmp_path / "a.jsonl"), "rows": 12}]
    config = DataConfig(train=entries, cache_dir=str(tmp_path), on_bad_row="skip")
    report = load(config).report
    assert report.bad.counts == {"broken JSON": len(broken)}
    assert report.rows_read == 12
    stop = config.model_copy(update={"on_bad_row": "error"})
    with pytest.raises(UserError, match=rf"a.jsonl:{min(broken) + 1}: broken JSON"):
        load(stop)


def test_held_out_rows_have_the_shares_of_the_mixture(config):
    mixed = config({"a": {"weight": 3}, "c": {"weight": 1}}, eval_rows=8)
    train, evaluation = load(mixed), load(mixed, "eval")
    assert sources(evaluation) == {"a": 6, "c": 2}
    assert sources(train) == {"a": 24, "c": 10}
    assert train.mixture.quotas == (24, 8)
    assert evaluation.mixture is None
    places = [{data.where(i) for i in range(len(data))} for data in (train, evaluation)]
    assert not places[0] & places[1]
    few = config({"a": {"weight": 9}, "c": {"weight": 1}}, eval_rows=2)
    assert sources(load(few, "eval")) == {"a": 2}
    with pytest.raises(UserError, match=r"eval_rows=50 \(38 of them of .*a.jsonl\) leaves nothing"):
        load(config({"a": {"weight": 3}, "c": {"weight": 1}}, eval_rows=50))


def test_without_weights_held_out_rows_are_those_of_a_plain_list(config, tmp_path):
    write(tmp_path / "b.jsonl", 8)
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    cache = {"cache_dir": str(tmp_path / "cache"), "eval_rows": 9}
    plain = DataConfig(train=names, **cache)
    mapped = DataConfig(train=[{"path": name} for name in names], **cache)
    for split in ("train", "eval"):
        first, second = load(plain, split), load(mapped, split)
        assert first.fingerprint == second.fingerprint


def test_a_changed_weight_tokenises_nothing_again(config, monkeypatch):
    load(config({"a": {"weight": 1}, "b": {"weight": 1}}))
    monkeypatch.setattr("dpo_fast.data.dataset.build", None)  # calling it would fail
    again = load(
        config({"b": {"weight": 9}, "a": {"weight": 3}}, stopping_strategy="all_exhausted")
    )
    assert again.mixture.quotas == (90, 30)


def test_evaluation_may_have_sources_with_options(config, tmp_path):
    entry = {"path": str(tmp_path / "b.jsonl"), "columns": {"chosen": "good", "rejected": "bad"}}
    both = DataConfig(
        train=str(tmp_path / "a.jsonl"),
        eval=[entry, {"path": str(tmp_path / "c.jsonl"), "rows": 5}],
        cache_dir=str(tmp_path / "cache"),
    )
    assert sources(load(both, "eval")) == {"b": 8, "c": 5}
    assert sources(load(both)) == {"a": 30}


def test_sources_of_two_kinds_or_with_uneven_columns(config, tmp_path):
    write_completions(tmp_path / "singles.jsonl", 4)
    entries = [{"path": str(tmp_path / name)} for name in ("a.jsonl", "singles.jsonl")]
    cache = {"cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UserError, match=r"singles.jsonl:1 is a completion .*a.jsonl:1 is a pair"):
        load(DataConfig(train=entries, **cache))
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "margin": 0.5}
    (tmp_path / "margins.jsonl").write_text(json.dumps(row))
    entries = [{"path": str(tmp_path / name)} for name in ("a.jsonl", "margins.jsonl")]
    for each in (entries, entries[::-1]):
        with pytest.raises(UserError, match=r"a.jsonl:1: no 'margin', which .*margins.jsonl:1 has"):
            load(DataConfig(train=each, **cache))


BAD = {  # entries of data.train, and what the message must say
    "unknown key": (
        [{"path": "a", "wieght": 1}],
        r"unknown key data.train\[0\].wieght; did you mean w",
    ),
    "no path": ([{"weight": 1}], r"data.train\[0\].path is missing"),
    "blank path": ([{"path": ""}], r"data.train\[0\].path=''"),
    "weight 0": (
        [{"path": "a", "weight": 0}],
        r"data.train\[0\].weight=0: input should be greater",
    ),
    "weight nan": ([{"path": "a", "weight": float("nan")}], r"data.train\[0\].weight=nan"),
    "weight text": (
        ["b", {"path": "a", "weight": "x"}],
        r"data.train\[1\].weight='x': input should",
    ),
    "rows 0": ([{"path": "a", "rows": 0}], r"data.train\[0\].rows=0: input should be greater"),
    "format": (
        [{"path": "a", "format": "pear"}],
        r"data.train\[0\].format='pear': input should be",
    ),
    "column": (
        [{"path": "a", "columns": {"x": "y"}}],
        r"data.train\[0\].columns.x='y': there is no",
    ),
    "some weights": (
        ["b", {"path": "a", "weight": 1}],
        r"data.train\[0\] has no weight, but .*\[1\]",
    ),
    "idle seed": ([{"path": "a", "seed": 1}], r"data.train\[0\].seed=1 is not used"),
    "twice": ([{"path": "a"}, {"path": "a"}], r"data.train\[1\].path='a' is also data.train\[0\]"),
    "twice, plain": (["a", "b", "a"], r"data.train\[2\]='a' is also data.train\[0\]"),
    "a mapping": ({"path": "a"}, r"data.train is a mapping; expected a name, or a list"),
    "a number": (["a", 7], r"data.train\[1\]=7: expected a name, or a mapping"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_entries_are_named(what, tmp_path):
    from dpo_fast.training.config import build_config

    train, message = BAD[what]
    tree = run_tree(tmp_path)
    tree["data"]["train"] = train
    with pytest.raises(UserError, match=message):
        build_config(tree, "tree")


OPTIONS = {
    "strategy": (
        {"stopping_strategy": "all_exhausted"},
        "data.stopping_strategy=all_exhausted is not",
    ),
    "max_rows": ({"max_rows": 5}, "data.max_rows=5 does not say which source"),
    "eval weight": (
        {"eval": [{"path": "z", "weight": 1}]},
        r"data.eval\[0\].weight=1.0 is not used",
    ),
    "columns": ({"columns": {"chosen": "x"}}, "data.columns={'chosen': 'x'} is not used"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options_beside_entries_that_are_not_used(what):
    options, message = OPTIONS[what]
    entry = {"path": "a", "columns": {"chosen": "y"}}
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"train": [entry]} | options)


def test_arguments_of_the_template_count_for_the_chats_of_any_source(config):
    given = {"chat_template_kwargs": {"enable_thinking": False}}
    for entries in ({"a": {}}, {"a": {}, "b": {}}):
        with pytest.raises(UserError, match="is not used: all rows are text"):
            load_examples(config(entries, **given), byte_tokenizer(), split="train")
    template = CHATML + "{% if enable_thinking %} {% endif %}"
    tokenizer = byte_tokenizer(template=template, eos_token="<|im_end|>")
    both = config({"a": {}, "c": {}}, **given)
    assert len(load_examples(both, tokenizer, split="train")) == 42


def test_a_configuration_can_be_built_again(tmp_path):
    from dpo_fast.training.config import build_config

    tree = run_tree(tmp_path)
    columns = {"chosen": "good", "rejected": "bad"}
    tree["data"]["train"] = [
        {"path": "a", "weight": 0.25, "rows": 3, "seed": 2},
        {"path": "b", "weight": 3, "format": "pairs", "columns": columns},
    ]
    config = build_config(tree, "tree")
    assert build_config(config.resolved(), "resolved") == config


def test_a_missing_or_repeated_source_is_named(config, tmp_path):
    entries = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "aa.jsonl")}]
    with pytest.raises(
        UserError, match=r"data.train\[1\].path=.*no such file.*Did you mean 'a.jsonl'"
    ):
        load(DataConfig(train=entries))
    entries[1]["path"] = f"{tmp_path}/a*.jsonl"
    with pytest.raises(
        UserError, match=r"a.jsonl is read twice, the second time by data.train\[1\]"
    ):
        load(DataConfig(train=entries))
    other = {"chosen": "rejected", "rejected": "chosen"}
    twice = load(
        DataConfig(train=[entries[0], entries[0] | {"columns": other}], cache_dir=str(tmp_path))
    )
    assert len(twice) == 60, "the same file read in another way is other data"
    with pytest.raises(
        UserError, match=r"data.eval\[0\] reads .*a.jsonl, which is also in data.train"
    ):
        load(
            DataConfig(train=entries[:1], eval=[{"path": f"{tmp_path}/a*.jsonl", "columns": other}])
        )


def test_a_bad_row_names_the_options_of_its_source(config):
    with pytest.raises(
        UserError, match=r"b.jsonl:1: missing field 'great'.*data.train\[1\].columns.chosen"
    ):
        load(config({"a": {}, "b": {"columns": {"chosen": "great", "rejected": "bad"}}}))


# Streams


def stream(config, **options):
    given = {"streaming": True, "stream_buffer": 10} | options
    return open_stream(config.model_copy(update=given), chat_tokenizer())


def test_a_stream_has_the_shares_in_every_chunk(config):
    flow = stream(config({"a": {"weight": 0.7}, "b": {"weight": 0.2}, "c": {"weight": 0.1}}))
    chunks = [flow.read() for _ in range(12)]
    for chunk in chunks:
        assert sources(chunk) == {"a": 7, "b": 2, "c": 1}
    places = [place for chunk in chunks for place in chunk.places]
    rows = [place.rpartition(":")[2] for place in places if "b.jsonl" in place]
    assert rows == [str(row % 8 + 1) for row in range(24)], "b does not begin again at its end"
    assert [(each.drawn, each.examples) for each in chunks[-1].report.mixture] == [
        (84, None), (24, None), (12, None),
    ]  # fmt: skip
    assert chunks[-1].report.rows_read == 120
    other = stream(config({"a": {"weight": 0.6}, "b": {"weight": 0.2}, "c": {"weight": 0.1}}))
    assert flow.key != other.key


def test_a_stream_goes_to_a_position(config):
    mixed = config({"a": {"weight": 1}, "b": {"weight": 1}, "c": {"weight": 1.5, "rows": 7}})
    flow = stream(mixed, stream_buffer=9)
    for chunk in [flow.read() for _ in range(9)]:
        again = stream(mixed, stream_buffer=9)
        place = json.loads(json.dumps(chunk.sources))
        again.seek(chunk.number, chunk.row, place)
        found = again.read()
        assert (found.number, found.places, found.sources) == (
            chunk.number,
            chunk.places,
            chunk.sources,
        )
        assert [found[index] for index in range(9)] == [chunk[index] for index in range(9)]


def test_a_stream_without_weights_reads_one_source_after_the_other(config):
    flow = stream(config({"b": {}, "a": {"rows": 3}}), stream_buffer=20)
    chunk = flow.read()
    assert sources(chunk) == {"b": 8, "a": 3}
    assert len(flow.read()) == 11


def test_a_source_of_a_stream_without_a_usable_row(config, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"prompt": "Q", "good": " ", "bad": "x"}\n' * 3)
    flow = stream(config({"a": {"weight": 1}, "b": {"weight": 1}}, on_bad_row="skip"))
    with pytest.raises(UserError, match=r"b.jsonl: none of its rows is usable. 3 x empty chosen"):
        flow.read()


def test_a_stream_takes_no_stopping_strategy():
    entries = [{"path": "a", "weight": 1}]
    with pytest.raises(
        ValueError, match="stopping_strategy=all_exhausted is not used with data.stream"
    ):
        DataConfig(train=entries, streaming=True, stopping_strategy="all_exhausted")


# Training


STEPS = 9


def mixed_tree(folder: Path, name: str, data: dict | None = None, **sections) -> dict:
    """Shares of 3 to 1 of 9 and 30 pairs: 12 an epoch, steps of 4, so three epochs of three steps."""
    large, small = folder / "pairs.jsonl", folder / "small.jsonl"
    tree = run_tree(folder, max_steps=STEPS, micro_batch_size=2, global_batch_size=4)
    entries = [{"path": str(small), "weight": 3}, {"path": str(large), "weight": 1}]
    tree["data"]["train"] = entries
    return changed(tree, folder / name, data=data or {}, **sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one rank, some of them resumed, and of two ranks."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("mixture")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 30)
    write_pairs(folder / "small.jsonl", 9, seed=1)
    write_pairs(folder / "tiny.jsonl", 2, seed=2)
    one = mixed_tree(
        folder, "one", {"eval_rows": 4}, train={"save_steps": 5}, parallel={"zero_stage": 1}
    )
    tokens = {"train": {"micro_batch_size": None, "tokens_per_batch": 400, "layout": "packed"}}
    live = {"reference": {"provider": "frozen"}, "parallel": {"zero_stage": 1}}
    flow = mixed_tree(
        folder, "flow", {"streaming": True, "stream_buffer": 12}, train={"save_steps": 5}, **live
    )
    twice = [
        {"path": str(folder / "tiny.jsonl"), "weight": 1},
        {"path": str(folder / "pairs.jsonl"), "weight": 1, "rows": 4},
    ]
    often = {"train": twice, "stopping_strategy": "all_exhausted"}
    # Every step has all of an epoch: each of two pairs twice, and each of four once.
    whole = {"train": {"global_batch_size": 8, "micro_batch_size": 4, "max_steps": 3}}
    cases = [one, changed(one, folder / "tokens", **tokens), flow]
    for loss in ("aot", "kto"):
        cases.append(mixed_tree(folder, loss, often, loss={"type": loss}, **whole, **live))
    resumed = [
        changed(tree, folder / f"{name}-resumed", train={
            "resume_from_checkpoint": str(folder / name / "checkpoint-5"), "save_steps": None,
        })
        for name, tree in (("one", one), ("flow", flow))
    ]  # fmt: skip
    two = [changed(tree, folder / f"{Path(tree['train']['output_dir']).name}-two",
                   train={"save_steps": None}, parallel={"zero_stage": 3})
           for tree in (one, flow)]  # fmt: skip
    for loss in ("aot", "kto"):
        small = {"train": {**whole["train"], "micro_batch_size": 1}}
        tree = mixed_tree(folder, f"{loss}-two", often, loss={"type": loss}, **small, **live)
        two.append(tree)
    ranks.train(cases)
    ranks.train(resumed)
    ranks.train(two, 2)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


@pytest.mark.processes
@pytest.mark.parametrize("name", ["one", "flow"])
def test_a_resumed_run_draws_the_same(folder, name):
    whole, resumed = folder / name, folder / f"{name}-resumed"
    assert sorted(series(resumed)) == list(range(6, STEPS + 1))
    for metric in ("loss", "grad_norm", "num_tokens"):
        before, after = series(whole, metric), series(resumed, metric)
        assert all(before[step] == after[step] for step in after), metric
    first, second = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["one", "flow", "aot", "kto"])
def test_two_ranks_train_as_one(folder, name):
    one, two = folder / name, folder / f"{name}-two"
    assert len(series(one)) == len(series(two)) > 2
    assert series(two) == pytest.approx(series(one), abs=2e-6)
    assert series(two, "num_tokens") == series(one, "num_tokens")


@pytest.mark.processes
def test_a_run_tells_its_shares(folder):
    report = json.loads((folder / "one" / "data-report.json").read_text())
    # 9 - 3 and 30 - 1 pairs are left by the evaluation: 8 an epoch.
    assert [(each["drawn"], each["share"]) for each in report["mixture"]] == [(6, 0.75), (2, 0.25)]
    assert series(folder / "one", "epoch")[STEPS] == STEPS / 2
    flow = json.loads((folder / "flow" / "data-report.json").read_text())
    assert [each["drawn"] for each in flow["mixture"]] == [9, 3]
    from dpo_fast.report import write_report

    text = Path(write_report(folder / "one")).read_text()
    assert "small.jsonl" in text
    assert "6 of 8 examples of an epoch, 75.00% (planned 75.00%)" in text


@pytest.mark.processes
def test_only_what_epochs_draw_is_scored(folder):
    (stored,) = (folder / "one" / "reference").glob("train-*")
    wheres = pyarrow.parquet.read_table(stored)["where"].to_pylist()
    files = Counter(Path(where.rpartition(":")[0]).stem for where in wheres)
    assert files == {"small": 6, "pairs": 10}, "five epochs draw two of 29 pairs each"


@pytest.mark.processes
def test_other_weights_are_not_resumed(folder):
    from dpo_fast.models import load_tokenizer
    from dpo_fast.training.config import build_config
    from dpo_fast.training.load_data import load_split
    from dpo_fast.training.resume import must_fit

    state = json.loads((folder / "one" / "checkpoint-5" / "state.json").read_text())

    def fits(**entry) -> dict:
        tree = mixed_tree(folder, "one", {"eval_rows": 4}, parallel={"zero_stage": 1})
        tree["data"]["train"][0] |= entry
        config = build_config(tree, "tree")
        train = load_split(config, load_tokenizer(config.model), "train", shuffle=True)
        run = SimpleNamespace(config=config, train=train, total_steps=STEPS, weights={})
        return must_fit(run)

    assert fits().items() <= state.items()
    assert fits(seed=7)["mixture"] != state["mixture"]
    assert fits(weight=1)["mixture"] != state["mixture"]


def test_a_repeated_example_counts_as_often_as_it_comes():
    """The table of a coupled loss against the same examples with a place each."""
    from dpo_fast.losses import LossOptions, Objective, Totals
    from dpo_fast.training.step import BatchTable

    draw = np.random.default_rng(3)
    values = torch.tensor(draw.normal(size=(3, 3, 2)))
    values[2] = values[2].abs() + 1
    loss_pass = SimpleNamespace(objective=Objective(("aot",), options=LossOptions(beta=0.7)))
    device = torch.device("cpu")
    often, apart = (
        BatchTable(indices, loss_pass, device) for indices in ([4, 8, 4, 1, 4], [0, 1, 2, 3, 4])
    )
    rows = {4: 0, 8: 1, 1: 2}
    for index, place in rows.items():
        often.values[:, often.place[index]] = values[:, place]
    for place, index in enumerate([4, 8, 4, 1, 4]):
        apart.values[:, place] = values[:, rows[index]]
    totals = Totals(5, 9, 10, 30)
    (loss, slopes), (expected, wanted) = (table.loss(totals, {}) for table in (often, apart))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for place, index in enumerate([4, 8, 4, 1, 4]):
        copies = [wanted[k] for k, each in enumerate([4, 8, 4, 1, 4]) if each == index]
        torch.testing.assert_close(slopes[often.place[index]], torch.stack(copies).mean(0))
        assert place < 5
