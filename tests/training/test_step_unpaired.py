"""Unpaired losses, on completions and on pairs: steps against plain PyTorch, whole runs, resume, TRL."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.data.dataset import load_examples
from dpo_fast.data.sampler import Sampler, TokenSampler
from dpo_fast.errors import UserError
from dpo_fast.losses import Objective, Preference, Totals
from dpo_fast.training.config import build_config
from dpo_fast.training.load_data import make_split
from dpo_fast.training.loss_pass import Statistics
from dpo_fast.training.metrics import MetricSums
from tests.support import ranks
from tests.support.metrics import lines_of, series
from tests.support.models import run_tree, write_completions, write_model, write_pairs
from tests.support.plain_torch import assert_same_step, token_logps
from tests.support.tokenizers import byte_tokenizer

ROWS, GLOBAL, STEPS, SEED = 20, 8, 6, 42
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
LOSSES = {
    "kto": {"type": "kto", "beta": 0.03} | WEIGHTS,
    "bco": {"type": "bco", "beta": 0.3} | WEIGHTS,
    "apo_zero_unpaired": {"type": "apo_zero_unpaired", "beta": 0.3} | WEIGHTS,
}
OPTIONS = {
    "kto, clamp": {"type": "kto", "beta": 0.03, "token_clamp": 0.5},
    "kto, free": {"type": "kto", "beta": 0.003, "reference_free": True},
    "kto, bco": {"type": ["kto", "bco"], "weights": [1.0, 0.3], "beta": 0.03},
}
LOSSES |= OPTIONS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model` and its reference `near` differ so much that kl is above 0 in both files."""
    folder = tmp_path_factory.mktemp("unpaired")
    write_model(folder / "model", seed=0)
    write_model(folder / "near", seed=2)
    write_completions(folder / "completions.jsonl", ROWS)
    write_pairs(folder / "pairs.jsonl", ROWS)
    return folder


def tree_of(folder: Path, file: str, loss: dict, **changes) -> dict:
    """A run on one of the files of `folder`, from another reference than the policy."""
    sections = {name: changes.pop(name, {}) for name in ("model", "data", "parallel", "reference")}
    tree = run_tree(folder, global_batch_size=GLOBAL, seed=SEED, **changes)
    tree["data"]["train"] = str(folder / f"{file}.jsonl")
    tree["loss"] = loss
    for name, options in sections.items():
        tree[name] = tree.get(name, {}) | options
    return tree


# One step against plain PyTorch


def plain_rows(folder: Path, data: str) -> list[dict]:
    """Step 0's rows, in the sampler's order, as ids: a prompt and (completion, good) of each answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    lines = (folder / f"{data}.jsonl").read_text().splitlines()
    rows = []
    for index in Sampler(ROWS, GLOBAL, 4, seed=SEED).global_batch(0):
        raw = json.loads(lines[index])
        texts = (
            [(raw["completion"], raw["label"])]
            if data == "completions"
            else [(raw["chosen"], True), (raw["rejected"], False)]
        )
        answers = [([*encode(text), tokenizer.eos_token_id], good) for text, good in texts]
        rows.append(
            {"prompt": [tokenizer.bos_token_id, *encode(raw["prompt"])], "answers": answers}
        )
    return rows


def plain_step(folder: Path, data: str, o: dict) -> tuple[float, dict, float]:
    """Loss, gradients and kl of step 0 by transformers alone, in fp64, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    load = lambda name: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        folder / name, dtype=torch.float64, attn_implementation="eager"
    )
    policy, reference, rows = load("model"), load("near"), plain_rows(folder, data)

    def ratio(prompt, completion):
        own, _ = token_logps(policy, prompt, completion)
        if o.get("reference_free"):
            return own.sum()
        with torch.no_grad():
            other, _ = token_logps(reference, prompt, completion)
        bound = o.get("token_clamp", 1e9)
        return (own - other).clamp(-bound, bound).sum()

    with torch.no_grad():
        moved = [
            ratio(row["prompt"], completion)
            for index, row in enumerate(rows)
            for completion, _ in rows[index - 1]["answers"]
        ]
    kl = torch.stack(moved).mean().clamp(min=0)
    terms = []
    for row in rows:
        for completion, good in row["answers"]:
            r = ratio(row["prompt"], completion)
            sign, beta = (1 if good else -1), o["beta"]
            weight = o.get("desirable_weight" if good else "undesirable_weight", 1.0)
            values = {
                "kto": 1 - torch.sigmoid(sign * beta * (r - kl)),
                "bco": -torch.log(torch.sigmoid(sign * beta * r)),  # delta is 0 in the first step
                "apo_zero_unpaired": 1 - torch.sigmoid(sign * beta * r),
            }
            names = o["type"] if isinstance(o["type"], list) else [o["type"]]
            factors = o.get("weights", [1.0])
            terms.append(weight * sum(f * values[name] for f, name in zip(factors, names)))
    loss = torch.stack(terms).mean()
    loss.backward()
    gradients = {f"model.{n}": p.grad for n, p in policy.named_parameters()}
    return loss.item(), gradients, kl.item()


def step_case(folder: Path, data: str, name: str, stage: int = 0, **changes) -> dict:
    loss = LOSSES[name]
    reference = {"provider": "frozen", "path": str(folder / "near")}
    return tree_of(
        folder,
        data,
        loss,
        max_steps=1,
        parallel={"zero_stage": stage},
        reference={} if loss.get("reference_free") else reference,
        **changes,
    )


@pytest.mark.processes
def test_every_loss_equals_plain_pytorch(folder):
    names = [(data, name) for data in ("completions", "pairs") for name in LOSSES]
    cases = {
        f"{data}, {name}": step_case(folder, data, name, layout="shared_prefix")
        for data, name in names
    }
    results = ranks.first_steps(cases)
    kls = {}
    for data, name in names:
        loss, gradients, kls[data, name] = plain_step(folder, data, LOSSES[name])
        assert_same_step(results[f"{data}, {name}"], (loss, gradients), 2e-5, f"{data}, {name}")
    assert min(kls["completions", "kto"], kls["pairs", "kto"]) > 0.5, kls
    assert 0 in kls.values(), kls


@pytest.mark.processes
def test_the_split_does_not_matter(folder):
    """Any micro-batch, number of ranks, ZeRO stage and layout: also of the mismatched completions."""
    loss, gradients, _ = plain_step(folder, "completions", LOSSES["kto, bco"])
    splits = [(0, 1, "padded"), (0, 8, "shared_prefix"), (0, 4, "packed")]
    for count, more in (
        (1, splits),
        (2, [(3, 1, "padded"), (3, 4, "shared_prefix"), (2, 2, "packed")]),
    ):
        cases = {
            f"{count} ranks, zero {stage}, micro {micro}, {layout}": step_case(
                folder, "completions", "kto, bco", stage, micro_batch_size=micro, layout=layout
            )
            for stage, micro, layout in more
        }
        for name, result in ranks.first_steps(cases, count).items():
            assert_same_step(result, (loss, gradients), 1e-5, name)


# Whole runs


@pytest.fixture(scope="module")
def runs(folder):
    """All runs; those that resume start from copies of a checkpoint at step 3."""
    common = {
        "max_steps": STEPS,
        "micro_batch_size": 2,
        "layout": "shared_prefix",
        "parallel": {"zero_stage": 0},
    }
    plain = {name: {"type": name} | WEIGHTS for name in ("kto", "bco", "apo_zero_unpaired")}

    def tree(name, file, loss, **changes):
        options = copy.deepcopy(common) | changes
        return tree_of(folder, file, loss, output_dir=str(folder / name), **options)

    trees = {
        f"{data}-{name}": tree(f"{data}-{name}", data, loss, data={"eval_rows": 4}, save_steps=3)
        for data in ("completions", "pairs")
        for name, loss in plain.items()
    }
    trees["micro"] = tree(
        "micro", "completions", plain["bco"], data={"eval_rows": 4}, micro_batch_size=8
    )
    trees["lora"] = tree(
        "lora",
        "completions",
        plain["kto"],
        model={"lora": {"r": 4, "alpha": 8}},
        parallel={"zero_stage": 3},
        micro_batch_size=4,
    )
    trees["budget"] = tree(
        "budget",
        "completions",
        plain["kto"],
        micro_batch_size=None,
        tokens_per_batch=150,
        parallel={"zero_stage": 3},
    )
    trees["stream"] = tree(
        "stream", "completions", plain["kto"], data={"streaming": True, "stream_buffer": 9}
    )
    ranks.train(list(trees.values()))
    resumed = []
    for name in ("completions-bco", "completions-kto"):
        again = copy.deepcopy(trees[name])
        again["train"]["output_dir"] = str(folder / f"{name}-resumed")
        again["train"]["resume_from_checkpoint"] = True
        place = folder / f"{name}-resumed"
        shutil.copytree(folder / name / "checkpoint-3", place / "checkpoint-3")
        resumed.append(again)
    ranks.train(resumed)
    return trees


def desirable_of_first_step(folder: Path) -> int:
    """How many rows of step 0 are desirable, in runs that hold four rows out."""
    from transformers import AutoTokenizer

    tree = tree_of(folder, "completions", {"type": "bco"}, data={"eval_rows": 4})
    data = build_config(tree, "test").data
    rows = load_examples(data, AutoTokenizer.from_pretrained(folder / "model"), split="train")
    return int(rows.labels[Sampler(len(rows), GLOBAL, 2, seed=SEED).global_batch(0)].sum())


@pytest.mark.processes
def test_losses_of_the_first_step_are_known(folder, runs):
    """Where policy and reference are one model, kl and delta are 0 and so is every log-ratio."""
    good = desirable_of_first_step(folder)
    assert 0 < good < GLOBAL
    mean = {"completions": (good * 1.5 + (GLOBAL - good) * 0.7) / GLOBAL, "pairs": (1.5 + 0.7) / 2}
    at = {"kto": 0.5, "bco": 0.6931472, "apo_zero_unpaired": 0.5}
    for data, weight in mean.items():
        for name, value in at.items():
            found = series(folder / f"{data}-{name}", "loss")
            assert found[1] == pytest.approx(weight * value, abs=1e-6), (data, name)
            assert found[STEPS] < found[1] - 0.01, (data, name, found)  # it learns


@pytest.mark.processes
def test_metrics_of_completions(folder, runs):
    for line in lines_of(folder / "completions-kto"):
        prefix = "eval_" if "eval_loss" in line else ""
        names = (
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "logps/chosen",
            "logps/rejected",
            "logits/chosen",
            "mean_token_accuracy",
            "kl",
        )
        assert all(f"{prefix}{name}" in line for name in names), line
        assert f"{prefix}rewards/accuracies" not in line and "delta" not in line
        chosen, rejected, margins = (line[f"{prefix}{name}"] for name in names[:3])
        assert margins == pytest.approx(chosen - rejected)
    assert series(folder / "pairs-kto", "rewards/accuracies").keys() == set(range(1, STEPS + 1))
    kl = series(folder / "completions-kto", "kl")
    assert kl[1] == 0 and all(value >= 0 for value in kl.values())
    assert "kl" not in lines_of(folder / "completions-bco")[1]
    assert not {"kl", "delta"} & lines_of(folder / "completions-apo_zero_unpaired")[1].keys()


@pytest.mark.processes
def test_delta_is_the_mean_reward_of_the_steps_before(folder, runs):
    """On pairs every step but the odd ones has as many good as bad rewards."""
    run = folder / "pairs-bco"
    chosen, rejected = series(run, "rewards/chosen"), series(run, "rewards/rejected")
    delta = series(run, "delta")
    means = [(chosen[step] + rejected[step]) / 2 for step in range(1, STEPS + 1)]
    assert delta[1] == 0
    for step in range(2, STEPS + 1):
        assert delta[step] == pytest.approx(sum(means[: step - 1]) / (step - 1), abs=1e-6)
    assert abs(delta[STEPS]) > 1e-3
    assert series(run, "eval_delta")[0] == 0 and series(run, "eval_delta")[STEPS] != 0


@pytest.mark.processes
def test_resume_is_bitwise_and_delta_goes_on(folder, runs):
    from safetensors.torch import load_file

    for name, statistic in (("completions-bco", "delta"), ("completions-kto", "kl")):
        whole, resumed = folder / name, folder / f"{name}-resumed"
        for metric in ("loss", statistic, "rewards/chosen"):
            expected, found = series(whole, metric), series(resumed, metric)
            assert found and found == {step: expected[step] for step in found}, metric
        a, b = (load_file(run / "final" / "model.safetensors") for run in (whole, resumed))
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert series(folder / "completions-bco-resumed", "delta")[4] != 0


@pytest.mark.processes
def test_the_curve_does_not_depend_on_micro_batches(folder, runs):
    for name in ("loss", "delta", "eval_loss", "rewards/margins"):
        one, other = series(folder / "completions-bco", name), series(folder / "micro", name)
        assert one.keys() == other.keys()
        for step, value in one.items():
            assert other[step] == pytest.approx(value, abs=1e-5), (name, step)


@pytest.mark.processes
def test_where_the_reference_comes_from(folder, runs):
    import pandas

    def provider(name):
        import yaml

        return yaml.safe_load((folder / name / "config.yaml").read_text())["reference"]["provider"]

    assert [provider(n) for n in ("completions-kto", "lora", "completions-bco")] == [
        "frozen",
        "adapter_off",
        "cached",
    ]
    stored = next((folder / "completions-bco" / "reference").glob("train-*"))
    assert {"completion_logps", "completion_tokens"} <= set(pandas.read_parquet(stored))


@pytest.mark.processes
def test_adapters_budgets_and_streams(folder, runs):
    for name in ("lora", "budget", "stream"):
        found = series(folder / name, "loss")
        assert len(found) == STEPS and 0.3 < found[1] < 0.8, (name, found)
        assert max(series(folder / name, "kl").values()) > 0, name


# What is refused, and the parts by themselves


def config(folder: Path, file: str, loss: dict, **changes):
    return build_config(tree_of(folder, file, loss, **changes), "test")


def split_of(run, tokenizer=None, shuffle=True):
    tokenizer = tokenizer or byte_tokenizer(bos=True)
    return make_split(
        run, tokenizer, "train", load_examples(run.data, tokenizer, split="train"), shuffle
    )


def test_losses_on_pairs_refuse_completions(folder):
    with pytest.raises(
        UserError, match=r"loss.type=sigmoid compares.*completions.jsonl:1; set loss.type to kto or"
    ):
        split_of(config(folder, "completions", {"type": "sigmoid"}))
    mixture = {"type": ["kto", "simpo"], "weights": [1.0, 1.0]}
    with pytest.raises(UserError, match="loss.type=simpo compares"):
        split_of(config(folder, "completions", mixture))
    split_of(config(folder, "completions", {"type": ["kto", "sft"]}))  # learns the desirable ones
    with pytest.raises(UserError, match="no columns reference_completion_logps"):
        columns = {"provider": "columns"}
        split_of(config(folder, "completions", {"type": "bco"}, reference=columns))


@pytest.mark.parametrize("provider", ["cached", "columns"])
def test_kl_needs_a_live_reference(folder, provider):
    with pytest.raises(
        UserError, match=f"reference.provider={provider} holds.*loss.type=kto.*frozen"
    ):
        config(folder, "pairs", {"type": "kto"}, reference={"provider": provider})
    free = {"type": "kto", "reference_free": True}
    assert config(folder, "pairs", free).reference_provider == "none"


def test_kl_needs_more_than_one_row(folder, tmp_path):
    with pytest.raises(UserError, match="train.global_batch_size=1, but loss.type=kto"):
        build_config(
            run_tree(folder, global_batch_size=1, micro_batch_size=1) | {"loss": {"type": "kto"}},
            "t",
        )
    one = tmp_path / "one.jsonl"
    one.write_text((folder / "completions.jsonl").read_text().splitlines()[0])
    with pytest.raises(UserError, match="data.train has one row, .*one.jsonl:1; give it two"):
        split_of(config(folder, "completions", {"type": "kto"}, data={"train": str(one)}))


def test_dpo_fast_reference_says_that_there_is_nothing_to_store(folder):
    from dpo_fast.training.references import check_stores

    with pytest.raises(UserError, match="loss.type=kto reads its reference from a model"):
        check_stores(config(folder, "completions", {"type": "kto"}))


@pytest.mark.parametrize("data", ["completions", "pairs"])
@pytest.mark.parametrize(
    "size", [{"micro_batch_size": 3}, {"micro_batch_size": None, "tokens_per_batch": 160}]
)
@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_mismatched_batches_hold_every_row_once(folder, monkeypatch, data, size, layout):
    """Two ranks have equally many batches. Each completion follows the prompt of the next row."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    split = split_of(config(folder, data, {"type": "kto"}, layout=layout, **size))
    assert isinstance(split.sampler, TokenSampler) == ("tokens_per_batch" in size)
    rows = split.sampler.global_batch(0)
    found_by = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        found_by.append(list(split.mismatched(rows)))
    assert len(found_by[0]) == len(found_by[1])
    found = {}
    for batch in (batch for mine in found_by for batch in mine):
        if "tokens_per_batch" in size:
            assert batch.input_ids.numel() <= 160
        for row, targets in zip(
            batch.indices_P.repeat_interleave(
                len(batch.lengths_S) // max(batch.num_examples, 1)
            ).tolist(),
            batch.targets_T.split(batch.lengths_S.tolist()),
        ):
            found.setdefault(row, []).append(targets.tolist())
    assert found.keys() == set(rows)
    for index, row in enumerate(rows):
        before = split.examples[rows[index - 1]]
        assert found[row] == [before[f"{name}_ids"] for name in split.examples.kind.answers]


def test_no_mismatched_batches_where_no_loss_wants_them(folder):
    assert (
        list(split_of(config(folder, "pairs", {"type": "bco"}, layout="padded")).mismatched([0, 1]))
        == []
    )


def test_delta_counts_every_sequence_once(monkeypatch):
    """Two micro-batches are one step. The step that is running does not count yet."""
    statistics = Statistics(("delta",))

    def delta():
        return statistics.estimate(None, [], None, None)["delta"].item()

    statistics.add(torch.tensor([1.0, 2.0]))
    statistics.add(torch.tensor([6.0]))
    assert delta() == 0
    statistics.end_step()
    assert delta() == 3
    statistics.add(torch.tensor([5.0]))
    assert delta() == 3
    statistics.end_step()
    other = Statistics(("delta",))
    other.load_state_dict(statistics.state_dict())
    assert delta() == 3.5 == other.estimate(None, [], None, None)["delta"].item()


def test_metrics_of_a_batch_without_bad_ones():
    from dpo_fast.data.batch import collate
    from dpo_fast.data.kinds import COMPLETIONS

    rows = [{"prompt_ids": [1], "completion_ids": [2, 3], "label": True}] * 2
    batch = collate(rows, "padded", kind=COMPLETIONS)
    sums = MetricSums(torch.device("cpu"))
    result = Preference(torch.tensor(0.5), torch.tensor([-1.0, -2.0]), torch.tensor([0.2, 0.4]))
    sums.add(result, {"mean_logit": torch.ones(4)}, batch)
    sums.step()
    found = sums.read()
    assert found["rewards/chosen"] == pytest.approx(0.3) and found["logits/chosen"] == 1
    assert not {"rewards/rejected", "rewards/margins", "logps/rejected"} & found.keys()


def test_totals_count_completions(folder):
    split = split_of(config(folder, "completions", {"type": "bco"}, layout="padded"))
    answers_S, labels = split.lengths.answers_S, split.examples.labels
    some = list(range(8))
    desirable = int(answers_S[some][labels[some]].sum())
    assert 0 < desirable < answers_S[some].sum()
    assert split.totals(some) == Totals(0, desirable, 8, int(answers_S[some].sum()))
    undesirable = [index for index in some if not labels[index]]
    assert split.totals(undesirable).chosen_tokens == 1  # it divides a sum of zeros
    assert Objective(("kto",)).coefficients(split.totals([1, 2, 3])) == (1 / 3,)


# TRL's own trainer


@pytest.mark.peers
@pytest.mark.processes
@pytest.mark.parametrize("data", ["completions"])
def test_ten_steps_of_trl_are_ten_of_ours(folder, tmp_path, data):
    pytest.importorskip("trl")
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    steps, names = 10, ("kto", "apo_zero_unpaired")
    rate = {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "adam_epsilon": 1e-3,
    }
    many = folder / "many.jsonl"
    write_completions(many, 32)
    ranks.train(
        [
            tree_of(
                folder,
                "many",
                {"type": name, "beta": 0.1} | WEIGHTS,
                max_steps=steps,
                output_dir=str(tmp_path / name),
                **rate,
            )
            for name in names
        ]
    )
    rows = [json.loads(line) for line in many.read_text().splitlines()]
    sampler = Sampler(len(rows), GLOBAL, GLOBAL, 1, SEED)
    order = [row for step in range(steps) for row in sampler.global_batch(step)]
    for name in names:
        args = trl.KTOConfig(
            output_dir=str(tmp_path / f"trl-{name}"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=GLOBAL,
            max_steps=steps,
            gradient_checkpointing=False,
            loss_type=name,
            beta=0.1,
            **WEIGHTS,
            **rate,
        )
        trainer = trl.KTOTrainer(
            model=str(folder / "model"),
            args=args,
            train_dataset=Dataset.from_list([rows[row] for row in order]),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        )
        trainer.train()
        for metric in (
            "loss",
            "rewards/chosen",
            "rewards/margins",
            *(["kl"] if name == "kto" else []),
        ):
            theirs = [line[metric] for line in trainer.state.log_history if metric in line]
            ours = list(series(tmp_path / name, metric).values())
            assert len(theirs) == steps
            assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-3), (name, metric)
            if metric in ("loss", "kl"):
                assert max(theirs) - min(theirs) > 0.01  # ten steps of something
