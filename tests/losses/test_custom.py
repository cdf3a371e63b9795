"""Losses of a user's own: registered, named by module or file, of a plugin; and what is wrong with them."""

import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from dpo_fast.errors import UserError
from dpo_fast.losses import (
    LOSSES,
    Objective,
    PairLogps,
    SequenceLogps,
    Totals,
    custom,
    register_loss,
)
from dpo_fast.modules import PreferenceLoss
from dpo_fast.training.config import build_config
from tests.support import ranks
from tests.support.metrics import lines_of, series
from tests.support.models import changed, run_tree, write_model, write_pairs

SOURCE = '''
import torch
from dpo_fast.losses import register_loss

def plain(logps, options):
    """DPO once more."""
    return -torch.nn.functional.logsigmoid(
        options.beta * (logps.chosen_ratio - logps.rejected_ratio)
    )

@register_loss(needs_reference=False, options=("beta", "simpo_gamma"))
def wide(logps, options):
    return (options.simpo_gamma - options.beta * (logps.chosen - logps.rejected)).relu()

@register_loss(kind="completions")
def each(logps, options):
    return -torch.where(logps.desirable, logps.ratio, -logps.ratio)

def broken(logps, options):
    return logps.chosen * nothing

def mean(logps, options):
    return logps.chosen.mean()

def apart(logps, options):
    return torch.zeros_like(logps.chosen)

number = 3
'''


@pytest.fixture(autouse=True)
def forget():
    yield
    custom.CUSTOM.clear()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("custom") / "mine.py"
    file.write_text(SOURCE)
    return file


def pairs(count: int = 3) -> PairLogps:
    draws = torch.randn(4, count, generator=torch.Generator().manual_seed(0))
    lengths = torch.full((count,), 4)
    return PairLogps(draws[0].requires_grad_(), draws[1], lengths, lengths, draws[2], draws[3])


def value(name: str, logps=None, **options) -> torch.Tensor:
    from dpo_fast.losses import LossOptions

    objective = Objective((name,), (1.0,), LossOptions(**options))
    return objective(logps or pairs(), Totals(3, 9))


def test_a_function_of_a_file_is_a_loss_with_values_gradients_and_facts(file):
    a, b = pairs(), pairs()
    value(f"{file}:plain", a, beta=0.3).backward()
    value("sigmoid", b, beta=0.3).backward()
    torch.testing.assert_close(value(f"{file}:plain"), value("sigmoid"))
    torch.testing.assert_close(a.chosen.grad, b.chosen.grad)
    objective = Objective((f"{file}:plain", "sft"), (1.0, 0.1))
    assert objective.needs_reference and objective.paired and not objective.specs[0].kernel
    assert not Objective((f"{file}:wide",)).needs_reference
    assert not Objective((f"{file}:each",)).paired
    with pytest.raises(ValueError, match="loss.label_smoothing=0.1 is not used by .*plain"):
        value(f"{file}:plain", label_smoothing=0.1)
    assert not [name for name in LOSSES if "mine" in name or name == "wide"]


def test_registered_losses_have_names_and_go_into_modules():
    @register_loss(name="mine", needs_reference=False)
    def function(logps, options):
        return -options.beta * logps.chosen

    assert value("mine").item() == pytest.approx(-0.1 * pairs().chosen.mean().item())
    module = PreferenceLoss("mine", beta=0.5)
    assert module(pairs().chosen, pairs().rejected)[0].item() == pytest.approx(
        5 * value("mine").item()
    )
    with pytest.raises(UserError, match="there is a loss sigmoid already"):
        register_loss(name="sigmoid")(function)
    with pytest.raises(UserError, match="needs_referenc.*facts are the fields of LossSpec"):
        register_loss(needs_referenc=False)(function)
    with pytest.raises(UserError, match="kind='pair'"):
        register_loss(kind="pair")(function)
    with pytest.raises(UserError, match=r"options=\['bta'\]"):
        register_loss(options=("bta",))(function)


def test_a_module_of_the_folder_is_found_and_the_path_stays_as_it_was(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    before = list(sys.path)
    assert torch.equal(value("mine:plain"), value(f"{file}:plain"))
    assert sys.path == before
    sys.modules.pop("mine")


def test_a_file_that_was_changed_is_loaded_anew_where_that_is_asked_for(tmp_path):
    file = tmp_path / "mine.py"
    text = "def scaled(logps, options):\n    return {} * logps.chosen\n"
    file.write_text(text.format(1))
    name = f"{file}:scaled"
    first, objective = value(name).item(), Objective((name,))
    assert objective.specs[0].function(pairs(), objective.options).shape == (3,)
    file.write_text(text.format(2))
    assert value(name).item() == first  # in the middle of a run nothing changes
    custom.refresh()
    assert value(name).item() == pytest.approx(2 * first)
    assert objective(pairs(), Totals(3, 9)).item() == first
    file.unlink()
    custom.refresh()
    assert value(name).item() == pytest.approx(2 * first)


def test_a_plugin_brings_losses_by_its_entry_points(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    monkeypatch.syspath_prepend(str(file.parent))
    found = [EntryPoint("theirs", "mine:plain", custom.GROUP), EntryPoint("gone", "nowhere:f", "")]
    monkeypatch.setattr(
        custom, "entry_points", lambda group: found if group == custom.GROUP else []
    )
    assert torch.equal(value("theirs"), value(f"{file}:plain"))
    with pytest.raises(UserError, match="loss.type=gone, of the plugin nowhere:f cannot be loaded"):
        value("gone")
    with pytest.raises(ValueError, match="choose from .*theirs"):
        value("nobodys")


@pytest.mark.parametrize(
    "name, message",
    [
        ("{file}:other", "mine.py has no other; it has .*plain"),
        ("{file}:number", "is a int: expected a function"),
        ("{folder}/absent.py:f", "no such file .*absent.py"),
        ("no_such_module:f", "no module no_such_module is installed or lies in"),
        ("{folder}/bad.py:f", r"bad.py, line 2: invalid syntax"),
        ("{folder}/fails.py:f", r"fails.py, line 1: ZeroDivisionError: division by zero"),
    ],
)
def test_code_that_is_no_loss_is_told_with_its_place(file, name, message):
    (file.parent / "bad.py").write_text("x = 1\nx = = 2\n")
    (file.parent / "fails.py").write_text("1 / 0\n")
    tree = {"model": {"path": "."}, "data": {"train": "x"}, "train": {"output_dir": "x"}}
    with pytest.raises(UserError, match=message) as error:
        build_config(
            tree | {"loss": {"type": name.format(file=file, folder=file.parent)}}, "run.yaml"
        )
    assert str(error.value).startswith("run.yaml: ")


@pytest.mark.parametrize(
    "name, message",
    [
        ("broken", r"mine.py, line \d+: NameError: name 'nothing' is not defined"),
        (
            "mean",
            r"gave a tensor of shape \[\]: expected one value for each pair.*\[3\]; do not take",
        ),
        ("apart", "does not depend on the policy's log-probs"),
    ],
)
def test_what_a_loss_does_wrong_is_told(file, name, message):
    with pytest.raises(UserError, match=message):
        value(f"{file}:{name}")


def test_completions_have_a_value_each(file):
    logps = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    desirable = torch.tensor([True, False, True])
    found = value(f"{file}:each", SequenceLogps(logps, torch.ones(3), desirable))
    assert found.item() == pytest.approx((1 - 2 + 3) / 3)


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_of_ones_own_loss_is_that_of_the_table_and_goes_on(tmp_path, file):
    """DPO as a function of a file, on two ranks: the curve is sigmoid's; then resumed and evaluated."""
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 16)
    base = run_tree(tmp_path, max_steps=3, micro_batch_size=2, save_steps=2)
    base["data"]["eval_rows"] = 4
    own = {"type": f"{file}:plain"}
    cases = {
        "table": {},
        "own": {"loss": own},
        "padded": {"loss": own, "train": {"layout": "padded"}, "reference": {"provider": "frozen"}},
    }
    trees = {name: changed(base, tmp_path / name, **sections) for name, sections in cases.items()}
    ranks.train(list(trees.values()), ranks=2)
    curves = {name: list(series(tmp_path / name).values()) for name in trees}
    for name in ("own", "padded"):
        assert curves[name] == pytest.approx(curves["table"], rel=1e-4), name
    assert curves["table"][-1] < 0.99 * curves["table"][0]
    checkpoint = str(tmp_path / "own/checkpoint-2")
    again = changed(trees["own"], tmp_path / "again", train={"resume_from_checkpoint": checkpoint})
    ranks.train([again], ranks=2)
    assert series(tmp_path / "again")[3] == series(tmp_path / "own")[3]
    words = {"model": str(tmp_path / "own/final"), "data": None}
    found = ranks.evaluate({"own": words}, ranks=2)["own"]["metrics"]["eval_loss"]
    last = [line["eval_loss"] for line in lines_of(tmp_path / "own") if "eval_loss" in line][-1]
    assert found == pytest.approx(last, rel=1e-4)
