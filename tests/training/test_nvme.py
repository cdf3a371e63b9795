"""Optimiser and parameters in files: the same run, and checkpoints like all others."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from safetensors.torch import load_file

from dpo_fast.training.checkpoint_run import export_checkpoint
from dpo_fast.training.tensor_files import read_tree
from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import changed, run_tree, write_model, write_pairs

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in for files is that of CPUs"),
]
SMALL = {  # the model is: several groups of parameters, and none too small for a file
    "aio": {"block_size": 1024},
    "zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 9000},
}
STEPS, SAVED = 4, 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, the same with states in files on two ranks, and both gone on with the other way round."""
    folder = tmp_path_factory.mktemp("nvme")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 20)
    base = run_tree(folder, max_steps=STEPS, micro_batch_size=2, save_steps=SAVED)
    files = {"nvme_path": str(folder / "disk"), "deepspeed": SMALL, "zero_stage": 3}
    optimiser = files | {"offload_optimizer": "nvme"}
    both = optimiser | {"offload_parameters": "nvme"}

    def run(name: str, parallel: dict, resumed: str | None = None, **train) -> dict:
        if resumed:
            train["resume_from_checkpoint"] = str(folder / resumed / f"checkpoint-{SAVED}")
        return changed(base, folder / name, parallel=parallel, train=train)

    ranks.train([run("plain", {"zero_stage": 3, "deepspeed": SMALL})], 2)
    ranks.group(2).do("train_with_files", [run("optimiser", optimiser), run("both", both)])
    again = [
        run("back", both, "both"),
        run("from memory", optimiser, "plain"),
        run("beside", optimiser, "both", async_save=True),
        run("other groups", {"zero_stage": 3}, "both"),
    ]
    ranks.group(2).do("train_with_files", again)
    ranks.group(1).do("train_with_files", [run("one rank", both, "optimiser")])
    ranks.train([run("to memory", {"zero_stage": 1}, "both")], 1)
    return folder


@pytest.mark.parametrize(
    "name", ["optimiser", "both", "back", "from memory", "beside", "other groups"]
)
def test_on_as_many_ranks_the_run_is_the_same(runs, name):
    """To rounding: offloaded norms are added in another order."""
    plain, found = series(runs / "plain"), series(runs / name)
    assert found == pytest.approx({step: plain[step] for step in found}, abs=1e-6)
    assert max(found) == STEPS
    first, second = (load_file(runs / x / "final" / "model.safetensors") for x in ("plain", name))
    assert all(torch.allclose(first[key], second[key], rtol=0, atol=2e-6) for key in first)


@pytest.mark.parametrize("name", ["one rank", "to memory"])
def test_on_other_ranks_the_run_goes_on(runs, name):
    plain, found = series(runs / "plain"), series(runs / name)
    assert found == pytest.approx({step: plain[step] for step in found}, abs=1e-6)
    assert min(found) == SAVED + 1 and max(found) == STEPS


@pytest.mark.parametrize("name", ["optimiser", "both", "beside"])
def test_a_checkpoint_is_as_those_of_memory(runs, name, tmp_path):
    place = f"checkpoint-{STEPS}"
    assert not list((runs / name / place).rglob("*.swp"))
    files = sorted((runs / "plain" / place / "engine").glob("*optim_states.pt"))
    assert len(files) == 2
    for file in files:
        plain, found = (
            read_tree(runs / each / place / "engine" / file.name)["optimizer_state_dict"]
            for each in ("plain", name)
        )
        for one, other in zip(flat_states(plain), flat_states(found), strict=True):
            assert one.numel() and torch.allclose(one, other, rtol=0, atol=2e-6)
    export_checkpoint(runs / name / place, tmp_path / "out")
    out, final = (
        load_file(x / "model.safetensors") for x in (tmp_path / "out", runs / name / "final")
    )
    assert all(torch.equal(out[key], final[key]) for key in final)


def flat_states(tree: dict) -> list[torch.Tensor]:
    """Weights and AdamW's states, group by group."""
    states = tree["optimizer_state_dict"]["state"]
    found = list(tree["fp32_flat_groups"])
    assert len(states) == len(found) > 1
    return found + [states[group][key] for group in states for key in ("exp_avg", "exp_avg_sq")]


def test_a_run_leaves_no_file_behind(runs):
    assert (runs / "disk").is_dir() and not list(Path(runs / "disk").rglob("*.swp"))
