"""The code that a run is of: noted with module, file and hash, and told where it has changed."""

import hashlib
import json

import pytest

from dpo_fast.losses import custom, register_loss
from dpo_fast.training.calling import open_callbacks
from dpo_fast.training.code_sources import source, sources_of, sources_of_callbacks, tell_changed
from dpo_fast.training.config import build_config
from dpo_fast.training.own_code import given
from tests.support.models import run_tree

LOSS = "def mine(logps, options):\n    return logps.chosen * {}\n"


@pytest.fixture(autouse=True)
def forget():
    yield
    custom.CUSTOM.clear()


def test_losses_and_samplers_of_ones_own_are_noted_and_ours_are_not(tmp_path):
    tree, file = run_tree(tmp_path), tmp_path / "mine.py"
    file.write_text(LOSS.format(1))
    assert sources_of(build_config(tree, "case")) == {}
    tree["loss"] = {"type": ["sigmoid", f"{file}:mine"]}
    tree["train"]["sampler"] = "order"
    with given({"order": forget}):
        found = sources_of(build_config(tree, "case"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    loss = found.pop(f"loss.type={file}:mine")
    assert loss.pop("module").startswith("dpo_fast_custom_mine_")
    assert loss == {"file": str(file), "sha256": digest}
    (sampler,) = found.values()
    assert sampler["file"] == __file__ and sampler["module"] == __name__
    assert json.loads(json.dumps(found)) == found


def test_registered_losses_and_code_without_a_file():
    @register_loss(name="registered", needs_reference=False)
    def function(logps, options):
        return -logps.chosen

    assert source(custom.spec_of("registered").function)["file"] == __file__
    scope = {}
    exec("def one(x):\n    return x + 1\ndef two(x):\n    return x + 2\n", scope)
    one, two = source(scope["one"]), source(scope["two"])
    assert "file" not in one and one["sha256"] != two["sha256"] and source(scope["one"]) == one


CALLBACKS = """
from transformers import TrainerCallback
from dpo_fast import Callback
class Ours(Callback):
    at = {}
class Theirs(TrainerCallback):
    pass
"""


def test_callbacks_are_noted_those_of_transformers_as_well(tmp_path, capsys):
    file = tmp_path / "calls.py"
    file.write_text(CALLBACKS.format(1))
    tree = run_tree(tmp_path)
    tree["train"]["callbacks"] = names = [f"{file}:Ours", f"{file}:Theirs"]
    before = sources_of_callbacks(open_callbacks(build_config(tree, "case")))
    assert list(before) == [f"train.callbacks={name}" for name in names]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert {(each["file"], each["sha256"]) for each in before.values()} == {(str(file), digest)}
    file.write_text(CALLBACKS.format(2))
    custom.refresh()
    tell_changed(before, sources_of_callbacks(open_callbacks(build_config(tree, "case"))))
    told = " ".join(capsys.readouterr().err.split())
    assert all(f"{name}: {file} has changed since the checkpoint" in told for name in names)


def test_what_has_changed_is_told(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(LOSS.format(1))
    tree = run_tree(tmp_path) | {"loss": {"type": f"{file}:mine"}}
    before = sources_of(build_config(tree, "case"))
    tell_changed(before, before)
    tell_changed({}, before)  # a checkpoint of an older version knows nothing
    assert capsys.readouterr().err == ""
    file.write_text(LOSS.format(2))
    custom.refresh()
    tell_changed(before, sources_of(build_config(tree, "case")))
    told = " ".join(capsys.readouterr().err.split())
    assert f"{file} has changed since the checkpoint was written" in told
