"""Which stage of ZeRO `auto` means."""

import pytest

from dpo_fast.errors import UserError
from dpo_fast.training.config import build_config
from dpo_fast.training.engine import deepspeed_config
from dpo_fast.training.fit import choose
from dpo_fast.training.zero import choose_stage
from tests.support.models import run_tree, write_model

OF_DEEPSPEED = {"deepspeed": {"zero_optimization": {"stage": 2}}}
THRESHOLD = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
CASES = {  # ranks, sections: the stage
    "one rank": (1, {}, 0),
    "one rank in bf16": (1, {"model": {"dtype": "bf16"}}, 1),
    "several": (2, {}, 3),
    "several, compiled": (2, {"model": {"torch_compile": True}}, 2),
    "by number": (2, {"parallel": {"zero_stage": 1}}, 1),
    "an offloaded optimiser": (1, {"parallel": {"offload_optimizer": True}}, 2),
    "offloaded parameters": (1, {"parallel": {"offload_parameters": True}}, 3),
    "an offloaded reference": (1, {"reference": {"provider": "frozen", "offload": True}}, 3),
    "DeepSpeed's own word": (2, {"parallel": OF_DEEPSPEED}, 2),
    "DeepSpeed's options of stage 3": (1, {"parallel": THRESHOLD}, 3),
}


def config_of(folder, sections: dict):
    tree = run_tree(folder)
    for name, options in sections.items():
        tree[name] = tree.get(name, {}) | options
    return build_config(tree, "tree")


@pytest.mark.parametrize("name", CASES)
def test_the_stage_is_what_the_ranks_need(tmp_path, monkeypatch, name):
    ranks, sections, stage = CASES[name]
    config = config_of(tmp_path, sections)
    choice = choose_stage(config, ranks)
    assert (choice.name, bool(choice.reason)) == (str(stage), True)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert config.zero_stage == stage
    assert deepspeed_config(config, ranks, 1)["zero_optimization"]["stage"] == stage


def test_a_run_notes_the_stage_that_it_takes(tmp_path):
    write_model(tmp_path / "model")
    config = config_of(tmp_path, {})
    assert config.resolved()["parallel"]["zero_stage"] == "auto"
    applied = choose(config).applied(config)
    assert applied.resolved()["parallel"]["zero_stage"] == applied.zero_stage == 0


def test_a_stage_that_contradicts_is_refused(tmp_path):
    for parallel in ({"zero_stage": 1, "offload_optimizer": True}, {"zero_stage": "all"}):
        with pytest.raises(UserError, match="parallel"):
            config_of(tmp_path, {"parallel": parallel})
    config = config_of(tmp_path, {"parallel": OF_DEEPSPEED | {"zero_stage": 1}})
    with pytest.raises(UserError, match=r"zero_optimization.stage=2 contradicts 1"):
        deepspeed_config(config, 1, 1)
