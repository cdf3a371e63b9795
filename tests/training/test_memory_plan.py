"""The plan: options are added until a run fits, those that cost the least first."""

import re

import pytest
import yaml

pytest.importorskip("deepspeed")

from typer.testing import CliRunner

from dpo_fast.cli import app
from dpo_fast.cli.doctor_plan import verdict, words
from dpo_fast.cli.doctor_run import look
from dpo_fast.errors import UserError
from dpo_fast.training import memory_plan
from dpo_fast.training.config import build_config
from dpo_fast.training.memory_plan import Machine, plan, shape_of
from tests.support.models import run_tree, write_architecture, write_model
from tests.support.paths import ROOT

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    write_model(folder / "model")
    write_architecture(folder / "experts", "qwen3-moe, experts")
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")


def tree(folder, tokens: int = 1 << 16, **sections) -> dict:
    tree = run_tree(folder)
    tree["data"]["max_length"] = tokens
    tree["train"]["tokens_per_batch"] = tokens
    tree["parallel"] = {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}}}
    del tree["train"]["micro_batch_size"]
    for name, options in sections.items():
        tree[name] = tree.get(name, {}) | options
    return tree


def rungs(tree: dict, capacity: int, ranks: int = 1) -> list:
    outlook = look(build_config(tree, "tree"))
    machine = Machine(capacity, on_cpu=False, head="triton", workspace=MIB)
    return list(plan(outlook.config, outlook.choices, outlook.second_models, machine, ranks))


def test_options_are_added_until_it_fits(folder):
    found = rungs(tree(folder), capacity=1)  # nothing fits: every rung
    assert [words(rung).split()[-1:] for rung in found] == [
        [],
        ["model.gradient_checkpointing=true"],
        ["model.tiled_mlp=true"],
        ["parallel.offload_optimizer=true"],
        ["model.activation_offloading=true"],
        ["parallel.offload_parameters=true"],
        ["model.activation_offloading=true"],
    ]
    assert words(found[-1]).startswith("model.lora.r=16 model.gradient_checkpointing=true")
    sizes = [rung.device for rung in found[:-1]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[2]
    assert verdict(found).startswith("None of these fits; the least is")
    enough = rungs(tree(folder), capacity=int(found[2].device / memory_plan.USABLE) + 1)
    assert enough == [*found[:2], found[2]._replace(fits=True)]
    assert verdict(enough) == (
        "It fits with model.gradient_checkpointing=true model.tiled_mlp=true"
    )
    assert verdict(rungs(tree(folder), capacity=1 << 40)) == "It fits as it is"


def test_every_set_of_options_is_one_that_a_run_takes(folder):
    """As the command line takes them, on top of a configuration that names a lower stage."""
    start = tree(folder, parallel={"zero_stage": 1})
    found = rungs(start, capacity=1)
    assert "parallel.zero_stage=3" in words(found[5])
    for rung in found:
        changed = yaml.safe_load(yaml.safe_dump(start))
        for key, value in rung.options.items():
            *sections, name = key.split(".")
            place = changed
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
        look(build_config(changed, "tree"))


def test_ranks_share_rows_where_there_are_some(folder, monkeypatch):
    """By powers of two that divide ranks and heads, of which the model has 4."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = rungs(tree(folder), capacity=1, ranks=8)
    shares = [rung.options.get("parallel.sequence_parallel") for rung in found]
    assert shares == [None] * 5 + [2, 4, 4, 4]
    saved = [before.device - after.device for before, after in zip(found[4:], found[5:7])]
    assert saved[0] == pytest.approx(2 * saved[1], rel=0.1) and saved[1] > 0
    # The page on long context has all of them, in this order; adapters take the place of the model.
    page = (ROOT / "docs/LONG_CONTEXT.md").read_text(encoding="utf-8")
    *options, lora = re.findall(r"^\| `([\w.]+): ", page, re.M)
    assert options == [*found[-2].options] and lora == "model.lora"
    started = rungs(tree(folder, parallel={"sequence_parallel": 2}), capacity=1, ranks=8)
    assert [rung.options.get("parallel.sequence_parallel") for rung in started][4:7] == [None, 4, 4]


def test_what_cannot_be_had_is_not_offered(folder):
    path = str(folder / "experts")
    experts = tree(folder, model={"path": path, "dtype": "bf16"})
    experts["model"]["lora"] = {"r": 2, "target_modules": ["q_proj"]}
    keys = {key for rung in rungs(experts, capacity=1) for key in rung.options}
    assert "model.tiled_mlp" not in keys and "model.lora.r" not in keys
    assert {"model.gradient_checkpointing", "model.activation_offloading"} <= keys


def test_the_largest_micro_batch(folder):
    def shape(**train):
        made = run_tree(folder, **train)
        made["data"]["max_length"] = 101
        return shape_of(build_config(made, "tree"), "packed", on_cpu=True)

    pairs = shape(micro_batch_size=3, global_batch_size=3)
    assert (pairs.sequences, pairs.length, pairs.scored) == (6, 100, 600)
    budget = shape(micro_batch_size=None, tokens_per_batch=60)
    assert (budget.sequences, budget.length, budget.scored) == (2, 30, 60)
    budget = shape(micro_batch_size=None, tokens_per_batch=1000)
    assert (budget.sequences, budget.length, budget.scored) == (10, 100, 1000)


def invoke(*arguments):
    return CliRunner().invoke(app.app, list(map(str, arguments)))


def test_the_command(folder):
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree(folder, tokens=4096)))
    result = invoke("doctor", file, "--plan", "--memory", 80)
    assert result.exit_code == 0, result.exception
    for word in ("activations kept", "A plan for a GPU of 80.0 GiB", "It fits as it is"):
        assert word in result.output
    result = invoke("doctor", "--plan")
    assert isinstance(result.exception, UserError)
    assert "doctor --plan is about a run" in str(result.exception)


def test_a_model_that_cannot_run_without_numbers_is_named(folder, monkeypatch):
    def fails(*_, **__):
        raise NotImplementedError("a number\nis read")

    monkeypatch.setattr(memory_plan, "count", fails)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree(folder, tokens=4096)))
    result = invoke("doctor", file)
    assert result.exit_code == 0 and "could not be counted" in result.output
    result = invoke("doctor", file, "--plan")
    assert "LlamaForCausalLM cannot be counted (NotImplementedError: a number)" in str(
        result.exception
    )
