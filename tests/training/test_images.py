"""Whole runs on rows with images."""

import pytest

pytest.importorskip("deepspeed")

from tests.support import ranks
from tests.support.image_runs import write_image_model, write_image_pairs
from tests.support.models import run_tree
from tests.support.plain_torch import assert_same_step

NAMES = ("qwen3-vl", "gemma3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name in NAMES:
        write_image_model(folder / name, name)
    write_image_pairs(folder)
    return folder


def case(folder, name: str, layout: str, stage: int, micro: int, **model) -> dict:
    tree = run_tree(folder, micro_batch_size=micro, max_steps=1, layout=layout)
    tree["model"] |= {"path": str(folder / name)} | model
    tree["data"]["max_length"] = 256
    tree["parallel"] = {"zero_stage": stage}
    return tree | {"loss": {"type": "simpo"}}


@pytest.mark.slow
@pytest.mark.processes
def test_ranks_with_and_without_images_at_a_time_give_the_step_of_one(folder):
    """Two ranks, one pair at a time: the tower frozen, trained, recomputed, and with adapters."""
    trained = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
    kinds = {"frozen": {}, "trained": trained, "adapters": trained | {"lora": {"r": 4}}}
    truths = ranks.first_steps(
        {kind: case(folder, "qwen3-vl", "padded", 0, 8, **kinds[kind]) for kind in kinds}
    )
    recomputed = trained | {"gradient_checkpointing": True}
    cases = {
        "trained, stage 0": case(folder, "qwen3-vl", "packed", 0, 1, **trained),
        "trained, stage 2": case(folder, "qwen3-vl", "padded", 2, 1, **trained),
        "trained, stage 3": case(folder, "qwen3-vl", "shared_prefix", 3, 1, **recomputed),
        "frozen, stage 3": case(folder, "qwen3-vl", "shared_prefix", 3, 1),
        "adapters, stage 3": case(folder, "qwen3-vl", "packed", 3, 1, **kinds["adapters"]),
    }
    for name, result in ranks.first_steps(cases, 2).items():
        assert_same_step(result, truths[name.partition(",")[0]], 1e-5, name)
    of_tower = {kind: [n for n in truths[kind][1] if ".visual." in n] for kind in kinds}
    assert not of_tower["frozen"] and all("lora_" in name for name in of_tower["adapters"])
    assert max(truths["trained"][1][name].abs().max() for name in of_tower["trained"]) > 1e-4
