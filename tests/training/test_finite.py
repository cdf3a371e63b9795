"""Numbers that are not finite never reach the weights, and the message says where they came from."""

import json
import math
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("deepspeed")

from safetensors.torch import load_file

from dpo_fast.errors import UserError
from dpo_fast.report.read import read_run
from dpo_fast.training import finite, nonfinite
from dpo_fast.training.engine import build_optimizer
from dpo_fast.training.finite import Guard
from dpo_fast.training.finite_step import FiniteAdamW
from dpo_fast.training.loss_pass import Statistics
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.run_log import finite_line, step_of_line
from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import changed, run_tree, write_model, write_pairs
from tests.support.paths import ENVIRONMENT
from tests.support.tokenizers import byte_tokenizer

WEIGHT = "model.layers.1.mlp.down_proj.weight"
GRADIENT = {"where": WEIGHT, "value": math.inf}
CULPRIT = 17  # a line that comes in the second step, with a letter that no other row has
CASES = {  # stage, dtype, clipping, adapters, ranks
    "fp32": (0, "fp32", 1.0, False, 1),
    "fp32-unclipped": (0, "fp32", 0.0, False, 1),
    "bf16": (0, "bf16", 1.0, False, 1),
    "sharded-bf16": (3, "bf16", 1.0, False, 1),
    "offloaded-bf16": (2, "bf16", 1.0, False, 1),
    "two": (0, "fp32", 1.0, False, 2),
    "two-bf16-unclipped": (1, "bf16", 0.0, False, 2),
    "two-gradients": (2, "fp32", 1.0, False, 2),
    "two-adapters": (3, "fp32", 1.0, True, 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finite")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 20)
    rows = (folder / "pairs.jsonl").read_text().splitlines()
    row = json.loads(rows[CULPRIT - 1])
    rows[CULPRIT - 1] = json.dumps(row | {"chosen": row["chosen"] + " ~"})
    (folder / "culprit.jsonl").write_text("\n".join(rows))
    return folder


def odd_token() -> dict:
    (token,) = byte_tokenizer(bos=True)("~", add_special_tokens=False)["input_ids"]
    return {"where": "model.embed_tokens", "token": token, "value": math.nan}


def case(folder, name: str, *faults: dict, **sections) -> dict:
    base = run_tree(folder, max_steps=3, micro_batch_size=2, save_steps=1)
    base["parallel"] = {"zero_stage": 0}
    return {"tree": changed(base, folder / name, **sections), "faults": faults}


def ended(folder, name: str, rank: int = 0) -> str:
    return (folder / name / f"ended-{rank}").read_text()


def skipping(folder, name: str) -> dict:
    """A run of two steps; in the first the gradient of one weight is not finite on one rank."""
    stage, dtype, clip, adapters, count = CASES[name]
    train = {"max_steps": 2, "nonfinite": "skip", "max_grad_norm": clip}
    model = {"dtype": dtype} | ({"lora": {"r": 2}} if adapters else {})
    fault = GRADIENT | {"rank": count - 1, "steps": [0]}
    if adapters:
        fault["where"] = "model.layers.1.self_attn.q_proj.lora_B.default.weight"
    parallel = {"zero_stage": stage, "offload_optimizer": "offloaded" in name}
    return case(folder, name, fault, model=model, train=train, parallel=parallel)


@pytest.fixture(scope="module")
def skipped(folder):
    for count in (1, 2):
        names = [name for name, options in CASES.items() if options[-1] == count]
        ranks.group(count).do("train_faulty", [skipping(folder, name) for name in names])


@pytest.mark.processes
@pytest.mark.parametrize("name", CASES)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_but_the_schedule(
    folder, skipped, name
):
    assert ended(folder, name) == "done"
    text = (folder / name / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    first, second = lines[-2:]
    assert first["loss"] is None and first["nonfinite"]["loss"] == "nan"
    assert first["grad_norm"] is None and first["nonfinite"]["grad_norm"] in ("nan", "inf")
    assert second["nonfinite_steps"] == first["nonfinite_steps"] == 1
    # The weights are still those of the start.
    assert second["loss"] == pytest.approx(math.log(2), abs=1e-3 if "bf16" in name else 1e-6)
    assert second["grad_norm"] > 0
    assert second["learning_rate"] == pytest.approx(first["learning_rate"] / 2)
    (file,) = (folder / name / "final").glob("*model.safetensors")
    weights = load_file(file)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert read_run(folder / name).not_finite == {"loss": 1, "grad_norm": 1}


@pytest.fixture(scope="module")
def stopped(folder):
    """Runs that end by themselves, one rank each."""
    data = {"train": str(folder / "culprit.jsonl")}
    last = {"max_steps": 1}
    ranks.group(1).do(
        "train_faulty",
        [
            case(folder, "last", GRADIENT, train=last),
            case(
                folder,
                "output",
                {"where": "model.layers.0.mlp.up_proj", "value": 1e39, "steps": [1]},
            ),
            case(
                folder,
                "in-a-row",
                GRADIENT | {"steps": [1, 2]},
                train={"nonfinite": "skip", "max_nonfinite_steps": 2},
            ),
            case(folder, "weight", {"weight": WEIGHT, "value": math.inf}),
            case(folder, "row", odd_token(), data=data),
            case(folder, "coupled", odd_token(), data=data, loss={"type": "aot"}),
        ],
    )


def latest(folder, name: str) -> str:
    return (folder / name / "latest").read_text()


@pytest.mark.processes
def test_the_last_step_is_looked_at_too(folder, stopped):
    assert "step 1 was not taken" in ended(folder, "last")
    assert f"a gradient of {WEIGHT} that is not" in ended(folder, "last")
    assert not (folder / "last" / "final").exists() and not (folder / "last" / "latest").exists()


@pytest.mark.processes
def test_the_message_names_the_first_layer(folder, stopped):
    said = ended(folder, "output")
    assert "8 of the 8 rows of its batch" in said and "weights have probably diverged" in said
    assert "the first such output is that of model.layers.0.mlp.up_proj" in said
    assert latest(folder, "output") == "checkpoint-1"
    assert "train.change_on_resume=[learning_rate]" in said and "skip_rows" not in said


@pytest.mark.processes
def test_so_many_in_a_row_end_the_run(folder, stopped):
    assert ended(folder, "in-a-row").startswith("steps 2 to 3 were not taken")
    assert latest(folder, "in-a-row") == "checkpoint-2"


@pytest.mark.processes
def test_weights_that_are_not_finite_are_not_saved(folder, stopped):
    said = ended(folder, "weight")
    assert f"after step 1 {WEIGHT} is not finite, though every gradient was" in said
    assert "train.learning_rate=0.001" in said
    assert (
        not (folder / "weight" / "latest").exists() and not (folder / "weight" / "final").exists()
    )


@pytest.mark.processes
@pytest.mark.parametrize("name", ["row", "coupled"])
def test_the_row_that_did_it_is_named(folder, stopped, name):
    where = f"{folder / 'culprit.jsonl'}:{CULPRIT}"
    said = ended(folder, name)
    assert f"1 of the 8 rows of its batch gives such numbers alone. {where}: log-probs" in said
    assert "is that of model.embed_tokens" in said
    assert f'train.skip_rows=["{where}"]' in said
    told = json.loads((folder / name / "nonfinite-step-2.json").read_text())
    assert [row["where"] for row in told["rows"] if row["fault"]] == [where]
    assert len({row["where"] for row in told["rows"]}) == 8


@pytest.mark.processes
def test_the_run_goes_on_in_each_way_that_the_message_names(folder, stopped):
    data, where = {"train": str(folder / "culprit.jsonl")}, f"{folder / 'culprit.jsonl'}:{CULPRIT}"
    checkpoint = str(folder / "row" / "checkpoint-1")
    ways = {
        "again": {},
        "without": {"skip_rows": [where]},
        "past": {"nonfinite": "skip"},
        "slower": {
            "learning_rate": 5e-4,
            "change_on_resume": ["learning_rate"],
            "skip_rows": [where],
        },
        "unasked": {"learning_rate": 5e-4},
    }
    cases = [
        case(
            folder, name, odd_token(), data=data, train={"resume_from_checkpoint": checkpoint} | way
        )
        for name, way in ways.items()
    ]
    counted = {"resume_from_checkpoint": str(folder / "in-a-row" / "checkpoint-2")}
    cases.append(case(folder, "counted", train=counted))
    for each in cases:
        (folder / each["tree"]["train"]["output_dir"]).mkdir(exist_ok=True)
    ranks.group(1).do("train_faulty", cases)
    assert "step 2 was not taken" in ended(folder, "again") and where in ended(folder, "again")
    assert ended(folder, "without") == ended(folder, "past") == ended(folder, "slower") == "done"
    assert "train.learning_rate was 0.001 and is 0.0005" in ended(folder, "unasked")
    assert "train.change_on_resume=[learning_rate]" in ended(folder, "unasked")
    assert series(folder / "past", "nonfinite_steps") == {2: 1, 3: 1}
    assert series(folder / "without", "nonfinite_steps") == {2: 0, 3: 0}
    assert series(folder / "counted", "nonfinite_steps") == {3: 1}  # one before it was resumed
    rates = {name: series(folder / name, "learning_rate") for name in ("without", "slower")}
    assert rates["slower"] == {step: rate / 2 for step, rate in rates["without"].items()}
    # The first step that differs in the rate begins at the same weights.
    losses = {name: series(folder / name) for name in ("without", "slower")}
    assert losses["slower"][2] == losses["without"][2]
    assert losses["slower"][3] != losses["without"][3]


@pytest.mark.processes
def test_replay_shows_the_rows_of_a_step_and_leaves_the_run_as_it_was(folder, stopped):
    before = {p: p.read_bytes() for p in (folder / "output").rglob("*") if p.is_file()}
    command = [sys.executable, "-m", "dpo_fast", "replay", str(folder / "output")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # The fault was in that process alone.
    assert "step 2: Each of the 8 rows of its batch alone gives finite numbers" in done.stderr
    told = json.loads((folder / "output" / "replay-step-2.json").read_text())
    assert [row["where"] in done.stdout for row in told["rows"]] == [True] * 8
    assert sum(row["loss"] for row in told["rows"]) < math.log(2)
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.processes
def test_an_evaluation_names_the_rows_that_are_not_finite(folder):
    data = {"eval": str(folder / "culprit.jsonl")}
    ranks.group(1).do("train_faulty", [case(folder, "eval", odd_token(), data=data)])
    assert ended(folder, "eval") == "done"
    where = f"{folder / 'culprit.jsonl'}:{CULPRIT}"
    said = "eval step 3: the loss is nan; the rewards of 1 of 20 pairs are not finite: "
    assert said + where in ranks.group(1).said()


def adam(fused: bool) -> FiniteAdamW:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = FiniteAdamW([weight], lr=0.1, fused=fused)
    optimizer.limit = 2
    return optimizer


@pytest.mark.parametrize("fused", [False, True], ids=["loop", "fused"])
def test_the_optimiser_leaves_steps_out_and_stops_after_the_limit(fused):
    """The fused one decides on the device; the host may be a step behind, and none is taken any more."""
    optimizer = adam(fused)
    (weight,) = optimizer.param_groups[0]["params"]
    moved = []
    for value in (1.0, math.nan, 1.0, math.inf, -math.inf, 1.0):
        before = weight.detach().clone()
        weight.grad = torch.tensor([1.0, value, 1.0])
        optimizer.step()
        moved.append(not torch.equal(before, weight.detach()))
        assert bool(optimizer.skipped) != moved[-1]
    assert moved == [True, False, True, False, False, False]
    assert optimizer.state[weight]["step"] == 2
    assert all(value.isfinite().all() for value in optimizer.state[weight].values())


def test_a_finite_gradient_whose_norm_overflows_is_not_taken():
    optimizer = adam(False)
    (weight,) = optimizer.param_groups[0]["params"]
    weight.grad = torch.full((3,), 3e38)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3))


class Later:
    """What a device does not say at once."""

    def __init__(self, value: bool) -> None:
        self.value, self.asked = value, False

    def __bool__(self) -> bool:
        self.asked = True
        return self.value


def test_the_newest_step_is_not_waited_for():
    engine = SimpleNamespace(optimizer=None, skipped_steps=0)
    guard, flags = Guard(engine, limit=2), [Later(x) for x in (False, True, True, False)]
    split = SimpleNamespace(
        sampler=SimpleNamespace(global_batch=lambda number: [number]),
        examples=SimpleNamespace(where=lambda index: f"rows:{index}"),
    )
    found = []
    for step, flag in enumerate(flags[:3]):
        guard._unseen.append((finite.Place(step, split, step), flag))
        found.append(guard.look(ahead=1))
        assert not flag.asked
    assert found == [None] * 3 and guard.count == 1
    assert guard.look(ahead=0).step == 2 and guard.count == 2


def test_a_loss_that_is_not_finite_makes_the_gradient_so():
    x = torch.tensor(2.0, requires_grad=True)
    (x * finite.backward_scale(x, 3.0)).backward()
    assert x.grad == 3.0
    loss = x * math.inf
    (loss.detach() * 0 + x * finite.backward_scale(loss, 3.0)).backward()
    assert x.grad.isnan()


def test_a_step_that_was_not_taken_is_in_no_mean():
    sums = MetricSums(torch.device("cpu"))
    for value, skipped in ((1.0, False), (math.nan, True), (3.0, False)):
        sums.begin()
        sums.note({"loss": torch.tensor(value), "watched": torch.tensor(value)})
        sums._count("num_tokens", 10, 0)
        sums.step(torch.tensor(skipped))
    read = sums.read()
    assert (read["loss"], read["watched"], read["num_tokens"]) == (2.0, 2.0, 30)


def test_rewards_of_a_step_that_was_not_taken_are_in_no_statistic():
    statistics = Statistics(("delta",))
    for rewards in ([1.0, 3.0], [math.nan, 1.0], [2.0, 2.0]):
        statistics.add(torch.tensor(rewards))
        statistics.end_step()
    assert statistics.rewards.tolist() == [8.0, 4.0]


def test_a_line_is_json_whatever_the_numbers_are():
    line = finite_line({"step": 1, "loss": math.nan, "a": -math.inf, "b": 1.0, "c": None})
    assert line == {
        "step": 1,
        "loss": None,
        "a": None,
        "b": 1.0,
        "c": None,
        "nonfinite": {"loss": "nan", "a": "-inf"},
    }


def test_what_adamw_keeps_is_looked_at(folder):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    (weight,) = optimizer.param_groups[0]["params"]
    weight.grad = torch.ones(2)
    optimizer.step()
    assert finite.not_finite(nonfinite.averages_of(optimizer)) == []
    optimizer.state[weight]["exp_avg_sq"][1] = math.inf
    wrapped = SimpleNamespace(optimizer=optimizer)
    assert finite.not_finite(nonfinite.averages_of(wrapped)) == ["AdamW's exp_avg_sq"]


def test_the_optimiser_that_looks_is_for_fp32_without_zero(folder):
    from dpo_fast.training.config import build_config

    def kind(stage: int, dtype: str) -> type:
        tree = run_tree(folder) | {"parallel": {"zero_stage": stage}}
        tree["model"]["dtype"] = dtype
        return type(build_optimizer(build_config(tree, "tree"), torch.nn.Linear(2, 2)))

    assert kind(0, "fp32") is FiniteAdamW
    # DeepSpeed asks for the class itself, and looks on its own.
    assert kind(0, "bf16") is kind(2, "fp32") is torch.optim.AdamW


def load(path, **section):
    from dpo_fast.models import load_model
    from dpo_fast.models.config import ModelSection

    return load_model(ModelSection(path=str(path), dtype="fp32", **section), attention="sdpa")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_weights_that_come_not_finite_are_told_with_tensor_and_file(folder, tmp_path, value, lora):
    model = load(folder / "model").causal_lm
    finite.check_loaded(model, str(folder / "model"), "model.path")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 2] = value
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    damaged = load(tmp_path, lora=lora).causal_lm
    with pytest.raises(UserError) as refusal:
        finite.check_loaded(damaged, str(tmp_path), "reference.path")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert f"reference.path={tmp_path}: 1 of its tensors" in str(refusal.value)
    assert f": {name} in {index[name]}. " in str(refusal.value)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"learning_rate": 1e300},
            r"train.learning_rate=1e\+300 is out of range; numbers go up to 1e",
        ),
        ({"learning_rate": 1000.0}, "train.learning_rate=1000.0.* less than or equal to 100"),
        ({"weight_decay": 1e30}, r"train.weight_decay=1e\+30 is out of range"),
        ({"max_nonfinite_steps": 2}, "max_nonfinite_steps=2 is not used with train.nonfinite=stop"),
        ({"change_on_resume": ["learning_rate"]}, "set train.resume_from_checkpoint too"),
        ({"change_on_resume": ["seed"]}, "train.change_on_resume.0='seed'"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(folder, train, message):
    from dpo_fast.training.config import build_config

    with pytest.raises(UserError, match=message):
        build_config(run_tree(folder, **train), "tree")


def test_rows_to_leave_out_are_rows_of_the_data(folder):
    from dpo_fast.models import load_tokenizer
    from dpo_fast.training.config import build_config
    from dpo_fast.training.load_data import load_split

    def split(*rows: str):
        config = build_config(run_tree(folder, skip_rows=list(rows), layout="packed"), "tree")
        return load_split(config, load_tokenizer(config.model), "train", shuffle=True)

    file = folder / "pairs.jsonl"
    found = split(f"{file}:3", f"{file}:20")
    left_out = {found.examples.where(index) for index in found.sampler.left_out}
    assert left_out == {f"{file}:3", f"{file}:20"}
    with pytest.raises(
        UserError, match="skip_rows='pairs.jsonl:3' is no row of data.train: .* as in"
    ):
        split("pairs.jsonl:3")
    with pytest.raises(UserError, match="leaves out all rows"):
        split(*(f"{file}:{line}" for line in range(1, 21)))
    assert found.totals([]).pairs == 1  # a step of such rows alone has the loss 0


def test_the_advice_is_one_word_for_a_shell_and_keeps_earlier_rows_out(tmp_path):
    """Else the row before comes back in the next epoch."""
    train = SimpleNamespace(output_dir=str(tmp_path), skip_rows=["my pairs.jsonl:3"])
    run = SimpleNamespace(config=SimpleNamespace(train=train))
    said = nonfinite.way_on(run, ["my pairs.jsonl:7", "my pairs.jsonl:9"])
    (option,) = (word for word in shlex.split(said) if word.startswith("train.skip_rows="))
    rows = json.loads(option.removeprefix("train.skip_rows=").rstrip(";"))
    assert rows == [f"my pairs.jsonl:{line}" for line in (3, 7, 9)]


def test_a_line_that_is_torn_or_damaged_has_no_step():
    assert step_of_line('{"step": 3, "health": {"a": "b"}}') == 3
    for line in (
        "",
        "\0\0",
        '{"step": 3, "health": {"a": "b"}',
        "[3]",
        "{}",
        '{"step": "3"}',
        "[" * 9999,
    ):
        assert step_of_line(line) is None, line
