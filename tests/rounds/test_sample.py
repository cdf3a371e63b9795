"""`dpo-fast sample`: the same completions however they are made, resumed, and filled references."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.errors import UserError
from dpo_fast.judging import samples
from dpo_fast.models import end_of_turn_ids, load_model, load_tokenizer
from dpo_fast.models.config import ModelSection
from dpo_fast.references.artefact import read_columns
from dpo_fast.references.compute import score_part
from dpo_fast.references.sequences import read_sequences
from dpo_fast.rounds import sample as module
from dpo_fast.rounds import sampler_model
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.journal import Journal
from dpo_fast.rounds.sample import sole_sample
from dpo_fast.rounds.stored import fill_references
from dpo_fast.training.config import build, build_config
from dpo_fast.training.splits import Split
from tests.support.faults import SLOW
from tests.support.judging import read_rows
from tests.support.models import write_model

COUNT = 7


def write_prompts(file: Path) -> Path:
    rows = [
        {"prompt": f"{i}: {7 * i} or {3 * i}? " + "so " * (i % 4), "id": i} for i in range(COUNT)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    write_model(folder / "model")
    write_prompts(folder / "prompts.jsonl")
    return folder


def config(folder: Path, out: Path, data=None, model=None, **options) -> RoundsConfig:
    section = {"prompts": str(folder / "prompts.jsonl"), "max_new_tokens": 6, "num_generations": 3}
    tree = {
        "output_dir": str(out),
        "model": {"path": str(folder / "model"), "dtype": "fp32", **(model or {})},
        "data": {"max_length": 96, "cache_dir": str(folder / "cache"), **(data or {})},
        "sample": section | {"engine": {"batch_size": 4}} | options,
    }
    return build(RoundsConfig, tree, "case")


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """A sampling that nothing interrupted."""
    return sole_sample(config(folder, folder / "whole")).parent


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in folder.glob("samples*") if file.suffix != ".json"
    }


def test_rows_have_every_completion_in_the_order_of_the_prompts(folder, whole):
    rows = read_rows(whole / "samples.jsonl")
    assert [row["id"] for row in rows] == list(range(COUNT))
    for row in rows:
        assert len(row["completions"]) == len(row["logps"]) == len(row["finish_reasons"]) == 3
        assert row["where"] == f"{folder / 'prompts.jsonl'}:{row['id'] + 1}"
        assert row["prompt"].startswith(f"{row['id']}: ")
    texts = [text for row in rows for text in row["completions"]]
    assert len(set(texts)) == len(texts)  # a seed that repeats would show
    assert not (whole / ".samples.partial").exists()


def test_the_same_command_finds_what_is_there(folder, whole, monkeypatch):
    before = contents(whole)
    monkeypatch.setattr(sampler_model, "load_model", lambda *_, **__: pytest.fail("loaded"))
    (whole / ".samples.partial").mkdir()  # as a kill at the end may leave it
    assert sole_sample(config(folder, whole)) == whole / "samples.jsonl"
    assert not (whole / ".samples.partial").exists()
    assert contents(whole) == before


@pytest.mark.parametrize(
    "options, name", [({"temperature": 0.5}, "sample.temperature"), ({"seed": 1}, "sample.seed")]
)
def test_other_options_are_named_and_nothing_is_mixed(folder, whole, options, name):
    before = contents(whole)
    with pytest.raises(
        UserError,
        match=f"samples.jsonl was made with something else: {name} was .* remove .*to sample anew",
    ):
        sole_sample(config(folder, whole, **options))
    assert contents(whole) == before


def test_other_weights_and_other_prompts_are_named(folder, whole, tmp_path):
    write_model(tmp_path / "model", seed=1)
    with pytest.raises(UserError, match="something else: model was"):
        sole_sample(config(folder, whole, model={"path": str(tmp_path / "model")}))
    (tmp_path / "p.jsonl").write_text('{"prompt": "another"}\n')
    with pytest.raises(UserError, match="something else: prompts was"):
        sole_sample(config(folder, whole, prompts=str(tmp_path / "p.jsonl")))


def test_samples_of_somebody_else_are_left_alone(folder, tmp_path):
    (tmp_path / "samples.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="no samples.manifest.json that says"):
        sole_sample(config(folder, tmp_path))
    assert (tmp_path / "samples.jsonl").read_text() == "mine\n"


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "after", [0, 2, pytest.param(4, marks=SLOW), 5, pytest.param(6, marks=SLOW)]
)
def test_killed_after_any_piece_it_goes_on_and_ends_the_same(
    folder, whole, tmp_path, monkeypatch, after
):
    """The piece in work has left half of its line."""
    count = [0]

    class Torn(Journal):
        def append(self, number, content):
            if count[0] == after:
                place = self.folder / f"{self.name}-00000.jsonl"
                with place.open("a") as file:
                    file.write('{"number": 99, "cont')
                raise Killed
            count[0] += 1
            super().append(number, content)

    monkeypatch.setattr("dpo_fast.rounds.sample_folder.Journal", Torn)
    pytest.raises(Killed, sole_sample, config(folder, tmp_path))
    monkeypatch.undo()
    drawn = []
    complete = module.Sampler.engine

    def watched(self):
        engine = complete(self)
        inner = engine.complete
        engine.complete = lambda own, requests: (
            drawn.append(b[0]) or b for b in inner(own, requests)
        )
        return engine

    monkeypatch.setattr(module.Sampler, "engine", watched)
    sole_sample(config(folder, tmp_path))
    assert len(drawn) == max(6 - after, 0)  # 21 completions, 4 at a time
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(
    "room", [300, 3000, pytest.param(900, marks=SLOW), pytest.param(2000, marks=SLOW)]
)
def test_a_full_disk_is_told_and_what_is_done_is_kept(folder, whole, tmp_path, room):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = pytest.raises(UserError, match="jsonl cannot be written: .*What is done is kept: make")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        with told:
            sole_sample(config(folder, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "samples.jsonl").exists()
    sole_sample(config(folder, tmp_path))
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("name", ["completions", "logps"])
def test_pieces_that_went_elsewhere_are_missed(folder, whole, tmp_path, monkeypatch, name):
    """As on two machines whose folders are not the same."""
    score = module.score_completions

    def lost(partial, sampler):
        score(partial, sampler)
        (file,) = partial.partial.glob(f"{name}-*.jsonl")
        file.write_text("".join(file.read_text().splitlines(True)[1:]))

    monkeypatch.setattr(module, "score_completions", lost)
    with pytest.raises(
        UserError, match=r"\d+ pieces are missing, though all ranks.*all ranks share"
    ):
        sole_sample(config(folder, tmp_path))
    assert not (tmp_path / "samples.jsonl").exists()
    monkeypatch.undo()
    sole_sample(config(folder, tmp_path))
    assert contents(tmp_path) == contents(whole)


def test_what_was_begun_with_other_options_is_not_gone_on_with(folder, tmp_path, monkeypatch):
    def stop(*_):
        raise Killed

    monkeypatch.setattr(module, "score_completions", stop)
    pytest.raises(Killed, sole_sample, config(folder, tmp_path))
    monkeypatch.undo()
    with pytest.raises(
        UserError, match=r"partial was made with something else: sample\.top_p was 1.0 and is 0.9"
    ):
        sole_sample(config(folder, tmp_path, top_p=0.9))
    sole_sample(config(folder, tmp_path))


def test_log_probs_are_those_of_each_sequence_alone_under_transformers(folder, whole):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model").double().eval()
    tokenizer = load_tokenizer(ModelSection(path=str(folder / "model")))
    stored = read_sequences(whole / "samples.logps.parquet")
    row = read_rows(whole / "samples.jsonl")[3]
    assert set(row["finish_reasons"]) <= {"stop", "length"}
    for text, reason, logp in zip(row["completions"], row["finish_reasons"], row["logps"]):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer += [tokenizer.eos_token_id] * (reason == "stop")
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
        assert logp == pytest.approx(expected, abs=1e-4)
    assert sum(stored.table["tokens"].to_pylist()) == len(stored._values_T)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("batches", [{"micro_batch_size": 2}, {"tokens_per_batch": 400}])
def test_a_reference_is_filled_with_what_computing_it_would_give(
    folder, whole, tmp_path, per_token, batches
):
    pairs = tmp_path / "pairs.jsonl"
    rows = read_rows(whole / "samples.jsonl")
    told = [pair_of(row, a, b) for row in rows for a, b in ((0, 1), (2, 0))]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in told))
    run = run_config(folder, tmp_path / "run", pairs, per_token, batches=batches)
    logps = [whole / "samples.logps.parquet"]
    assert fill_references(run, logps) == ["train"]
    assert fill_references(run, logps) == []  # it is there
    (stored,) = (tmp_path / "run" / "reference").glob("train-*")
    names = ["chosen_logps", "rejected_logps", "chosen_tokens"]
    table = read_columns(stored, names + (["rejected_token_logps"] if per_token else []))
    expected = computed(run)
    got = np.stack([table[name].to_numpy() for name in names[:2]], 1)
    assert got == pytest.approx(expected, abs=1e-4)
    if per_token:
        sums = [sum(each) for each in table["rejected_token_logps"].to_pylist()]
        assert sums == pytest.approx(got[:, 1].tolist(), abs=1e-4)


def pair_of(row: dict, chosen: int, rejected: int) -> dict:
    """Two completions of a row, with how they ended."""
    pair = {"prompt": row["prompt"]}
    for name, place in (("chosen", chosen), ("rejected", rejected)):
        pair |= {name: row["completions"][place]}
        pair |= {f"{name}_finish_reason": row["finish_reasons"][place]}
    return pair


def run_config(
    folder: Path, out: Path, pairs: Path, per_token: bool = False, model=None, batches=None
):
    batches = batches or {"micro_batch_size": 2}
    return build_config(
        {
            "model": {"path": str(model or folder / "model"), "dtype": "fp32"},
            "data": {"train": str(pairs), "max_length": 96, "cache_dir": str(folder / "cache")},
            "reference": {"per_token": per_token},
            "train": {"output_dir": str(out), "global_batch_size": 2, **batches},
        },
        "case",
    )


def computed(run) -> np.ndarray:
    """Sums of chosen and rejected answers, [P, 2], from the model."""
    tokenizer, ends = load_tokenizer(run.model), end_of_turn_ids(run.model)
    examples = load_examples(run.data, tokenizer, split="train", eos_ids=ends)
    split = Split("train", examples, None, "padded", 0)
    scorer = load_model(run.model, attention="sdpa").eval()
    rows = range(len(examples))
    batch = split.collate([examples[row] for row in rows], list(rows))
    values_T = score_part(scorer, [batch], rows, examples.lengths, "cpu")
    parts = values_T.split(examples.lengths.scored_S.tolist())
    return np.array([part.sum().item() for part in parts]).reshape(-1, 2)


def test_a_reference_of_other_answers_or_another_model_is_not_filled(folder, whole, tmp_path):
    logps = [whole / "samples.logps.parquet"]
    row = read_rows(whole / "samples.jsonl")[0]
    theirs = pair_of(row, 0, 1)
    mine = theirs | {"rejected": "mine"}
    (tmp_path / "a.jsonl").write_text(json.dumps(mine) + "\n")
    assert fill_references(run_config(folder, tmp_path / "a", tmp_path / "a.jsonl"), logps) == []
    (tmp_path / "b.jsonl").write_text(json.dumps(theirs) + "\n")
    other = write_model(tmp_path / "other", seed=3)
    run = run_config(folder, tmp_path / "b", tmp_path / "b.jsonl", model=other)
    assert fill_references(run, logps) == []
    assert fill_references(run_config(folder, tmp_path / "c", tmp_path / "b.jsonl"), logps) == [
        "train"
    ]


def test_scored_rows_are_groups_that_train_reads(folder, whole, tmp_path):
    rows = [row | {"scores": [0.0, 1.0, 2.0]} for row in read_rows(whole / "samples.jsonl")]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=str(tmp_path / "scores.jsonl"), max_length=96, cache_dir=str(tmp_path))
    tokenizer = load_tokenizer(ModelSection(path=str(folder / "model")))
    examples = load_examples(data, tokenizer, split="train")
    assert examples.kind.name == "groups" and len(examples) == COUNT


def test_parquet_holds_the_same_rows(folder, whole, tmp_path):
    sole_sample(config(folder, tmp_path, output="parquet"))
    files = (tmp_path / "samples.parquet", whole / "samples.jsonl")
    theirs, ours = ([row.content for row in samples.read_rows(file)] for file in files)
    assert theirs == ours


def test_an_adapter_is_sampled_from_as_it_is_trained_further(folder, whole, tmp_path):
    """Its completions and log-probs are its own, and are the reference of the run that continues it."""
    section = ModelSection(path=str(folder / "model"), dtype="fp32", lora={"r": 4})
    adapted = load_model(section, attention="sdpa").model
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    model = {"path": str(tmp_path / "adapter")}
    out = sole_sample(config(folder, tmp_path / "out", model=model)).parent
    rows, plain = read_rows(out / "samples.jsonl"), read_rows(whole / "samples.jsonl")
    assert [row["completions"] for row in rows] != [row["completions"] for row in plain]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair_of(rows[0], 0, 1)) + "\n")
    run = run_config(folder, tmp_path / "run", tmp_path / "pairs.jsonl", model=tmp_path / "adapter")
    assert computed(run)[0] == pytest.approx(rows[0]["logps"][:2], abs=1e-4)
    assert fill_references(run, [out / "samples.logps.parquet"]) == ["train"]


def test_adapters_that_a_run_would_add_change_nothing(folder, whole, tmp_path):
    sole_sample(config(folder, tmp_path, model={"lora": {"r": 4}}))
    assert contents(tmp_path) == contents(whole)


def test_long_prompts_are_left_out_and_counted(folder, tmp_path, capsys):
    """By data.max_length, beyond which `train` would cut."""
    sole_sample(config(folder, tmp_path, data={"max_length": 23}))
    rows = read_rows(tmp_path / "samples.jsonl")
    assert [row["id"] for row in rows] == [0, 1, 4, 5]
    counts = json.loads((tmp_path / "samples.manifest.json").read_text())["counts"]
    assert counts["prompts_left_out_count"] == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "3 prompts are left out; the first:" in said and "leave room for 17" in said
    assert "Most were cut off by sample.max_new_tokens=6;" in said
    with pytest.raises(
        UserError, match="prompts.jsonl:3: its prompt has .*set sample.long_prompts=drop"
    ):
        sole_sample(config(folder, tmp_path / "b", data={"max_length": 23}, long_prompts="error"))


def test_the_models_positions_bound_prompts_too(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.config.max_position_embeddings = 23
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(ModelSection(path=str(folder / "model"))).save_pretrained(tmp_path / "model")
    model = {"path": str(tmp_path / "model")}
    sole_sample(config(folder, tmp_path / "out", model=model))
    assert len(read_rows(tmp_path / "out" / "samples.jsonl")) == 4
    with pytest.raises(
        UserError, match="max_new_tokens=30 leaves no room .* the model's 23 positions"
    ):
        sole_sample(config(folder, tmp_path / "b", model=model, max_new_tokens=30))


def test_bf16_samples_and_scores_with_the_same_rounding(folder, tmp_path):
    out = sole_sample(config(folder, tmp_path, model={"dtype": "bf16"})).parent
    assert read_sequences(out / "samples.logps.parquet").manifest["dtype"] == "bf16"


def test_an_option_of_training_alone_does_not_stop_it(folder, tmp_path):
    data = {"eval_rows": 100, "group_pairs": "best_worst"}
    model = {"torch_compile": True, "gradient_checkpointing": True, "attention": "varlen"}
    sole_sample(config(folder, tmp_path, data=data, model=model))
    with pytest.raises(
        UserError, match="section data: unknown key max_lenght; did you mean max_length"
    ):
        sole_sample(config(folder, tmp_path / "b", data={"max_lenght": 9}))


@pytest.mark.parametrize(
    "rows, words",
    [
        ("", "there are no rows in it"),
        ('{"prompt": "  "}\n', "prompts.jsonl:1: empty prompt"),
        ('{"prompt": "a"\n', "prompts.jsonl:1"),
        ('{"text": "a b"}\n', "prompts.jsonl:1: missing field 'prompt'"),
    ],
)
def test_prompts_that_are_none_are_told(folder, tmp_path, rows, words):
    (tmp_path / "prompts.jsonl").write_text(rows)
    with pytest.raises(UserError, match=words):
        sole_sample(config(folder, tmp_path / "out", prompts=str(tmp_path / "prompts.jsonl")))
    assert not (tmp_path / "out" / "samples.jsonl").exists()


def test_weights_that_are_not_finite_are_told(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.lm_head.weight.data[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(ModelSection(path=str(folder / "model"))).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="weights that are not finite .*lm_head.weight"):
        sole_sample(config(folder, tmp_path / "out", model={"path": str(tmp_path / "model")}))
