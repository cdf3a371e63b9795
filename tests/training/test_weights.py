"""A stored reference and a resumed run know which weights they are of."""

import shutil

import pytest

pytest.importorskip("deepspeed")

from safetensors.torch import load_file, save_file

from dpo_fast.errors import UserError
from dpo_fast.models import load_model, load_tokenizer
from dpo_fast.training import weights as weights_module
from dpo_fast.training.config import build_config
from dpo_fast.training.fit import choose
from dpo_fast.training.load_data import load_split
from dpo_fast.training.precompute import store_references
from dpo_fast.training.references import without_training
from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import changed, run_tree, write_model, write_pairs

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 16)
    return folder


def with_other(folder, name: str, tensor: str):
    """A copy of the model with one tensor changed a little."""
    copy = shutil.copytree(folder / "model", folder / name)
    tensors = load_file(copy / WEIGHTS)
    tensors[tensor] = tensors[tensor] * 1.001
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    return str(copy)


def stored(tree: dict):
    """Find or compute the reference in this process. Returns the seconds, None if it was found."""
    config = without_training(build_config(tree, "tree"))
    choices = choose(config)
    config = choices.applied(config)
    split = load_split(config, load_tokenizer(config.model), "train", shuffle=False)
    model = config.reference.model

    def scorer():
        return load_model(model.section(config.model), attention=choices.attention_of(model).name)

    return [each.seconds for each in store_references(config, model, scorer, "cpu", [split])]


def test_a_store_serves_the_same_weights_wherever_they_lie_and_no_others(folder):
    base = run_tree(folder, layout="packed")
    base["reference"] = {"cache_dir": str(folder / "refs"), "path": str(folder / "model")}

    def of(path: str, **train) -> list:
        tree = changed(base, folder / "run", train=train)
        tree["reference"]["path"] = path
        return stored(tree)

    assert of(str(folder / "model")) != [None]
    twin = shutil.copytree(folder / "model", folder / "twin")
    assert of(str(folder / "model")) == of(str(twin)) == [None]
    for tensor in load_file(twin / WEIGHTS):
        other = with_other(folder, f"other-{tensor}", tensor)
        message = (
            rf"refs/train was computed for something else, the weights of {folder}/model as they were, "
            rf"and not reference.path={other}: model is '\w{{64}}' there and '\w{{64}}' here. Name another"
        )
        with pytest.raises(UserError, match=message):
            of(other)


def test_long_hashing_is_told(folder, monkeypatch, capfd):
    monkeypatch.setattr(weights_module, "PATIENCE", 0.0)
    config = build_config(run_tree(folder), "tree")
    weights_module.identities(config)
    assert f"hashing 0.0 GB of weights in {folder}/model; it is done once" in capfd.readouterr().err


# Resuming


@pytest.fixture(scope="module", params=[(1, 0), (2, 3)], ids=["one rank", "two ranks, stage 3"])
def begun(request, folder):
    """Four steps with a checkpoint at the second, and what goes on from there."""
    count, stage = request.param
    root = folder / f"ranks-{count}"
    tree = run_tree(
        folder, num_train_epochs=2, save_steps=2, save_total_limit=9, micro_batch_size=2
    )
    tree |= {"parallel": {"zero_stage": stage}, "loss": {"type": "sigmoid"}}
    tree = changed(tree, root / "whole")
    ranks.train([tree], count)

    def go_on(name: str, **sections) -> dict[int, float]:
        case = changed(tree, root / name, **sections)
        case["train"]["resume_from_checkpoint"] = str(root / "whole" / "checkpoint-2")
        ranks.train([case], count)
        return series(root / name)

    return series(root / "whole"), go_on, root / "whole"


@pytest.mark.processes
@pytest.mark.slow
def test_a_resumed_run_has_the_weights_of_the_interrupted_one(folder, begun):
    whole, go_on, root = begun
    twin = str(shutil.copytree(folder / "model", root.parent / "twin"))
    for name, sections in {
        "moved": {"model": {"path": twin}},
        "named": {"reference": {"path": twin}},
    }.items():
        assert go_on(name, **sections) == {step: whole[step] for step in (3, 4)}, name
    final = str(root / "final")
    for option, sections in {
        "model.path": {"model": {"path": final}, "reference": {"path": str(folder / "model")}},
        "reference.path": {"reference": {"path": final}},
    }.items():
        message = rf"(?s)checkpoint-2 cannot be resumed exactly: the hash of {option}'s weights was"
        with pytest.raises(AssertionError, match=message):
            go_on(f"other {option}", **sections)


@pytest.mark.processes
@pytest.mark.slow
def test_what_changes_rounding_is_said_and_resumed(begun, folder):
    whole, go_on, root = begun
    name = "rounded"
    found = go_on(name, train={"micro_batch_size": 4, "layout": "padded"})
    log = ranks.group(2 if "ranks-2" in str(root) else 1).said()
    for option in ("micro_batch_size was 2 and is 4", "layout was shared_prefix and is padded"):
        assert f"train.{option}: from here on the run differs by rounding" in log
    assert found == {step: pytest.approx(whole[step], abs=1e-5) for step in (3, 4)}
