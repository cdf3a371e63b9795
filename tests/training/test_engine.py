"""What DeepSpeed is given: the optimiser and the configuration."""

import gc
import json
from unittest.mock import MagicMock

import pytest
import torch

from dpo_fast.training import loop, precompute
from dpo_fast.training import prepare as loading
from dpo_fast.training.config import build_config
from dpo_fast.training.engine import build_optimizer, deepspeed_config, reference_config
from tests.support import here, ranks
from tests.support.models import run_tree, write_model, write_pairs

TREE = {
    "model": {"path": "some/model"},
    "data": {"train": "pairs.jsonl"},
    "train": {"output_dir": "out", "weight_decay": 0.1},
}


@pytest.mark.parametrize(
    ("on_gpu", "offloads", "fused"), [(True, False, True), (True, True, None), (False, False, None)]
)
def test_the_optimiser_is_one_kernel_where_its_states_lie_on_a_gpu(
    on_gpu, offloads, fused, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    tree = TREE | {"parallel": {"zero_stage": 2, "offload_optimizer": offloads}}
    optimizer = build_optimizer(build_config(tree, "test"), torch.nn.Linear(3, 2))
    matrices, vectors = optimizer.param_groups
    assert optimizer.defaults["fused"] is matrices["fused"] is vectors["fused"] is fused
    assert [len(p.shape) for p in (*matrices["params"], *vectors["params"])] == [2, 1]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("reference", [False, True])
def test_deepspeed_does_not_wait_for_the_gpu_to_time_micro_batches(reference):
    """Its throughput timer is on by default, and synchronises before and after each."""
    from deepspeed.utils.config import get_timers_config

    config = build_config(TREE, "test")
    made = deepspeed_config(config, 1, 1)
    assert not get_timers_config(reference_config(config, made) if reference else made).enabled
    assert get_timers_config({}).enabled


@pytest.mark.processes
@pytest.mark.parametrize("provider", ["cached", "frozen"])
def test_a_run_keeps_no_memory_when_it_is_over(tmp_path, provider):
    """DeepSpeed's hooks kept an engine, its buffers of 2 GB and AdamW's states. Rounds are many runs."""
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 8)
    tree = run_tree(tmp_path, max_steps=1, output_dir=str(tmp_path / "run"))
    reference = {"provider": provider, "path": str(tmp_path / "model")}
    tree |= {"parallel": {"zero_stage": 3}, "reference": reference}
    ranks.group(1).do("held_by_runs", tree, str(tmp_path / "held.json"))
    before, after = json.loads((tmp_path / "held.json").read_text())
    assert after < before + 100_000


def held() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    tensors = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
    storages = {each.untyped_storage()._cdata: each.untyped_storage() for each in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    ("place", "name"),
    [(loading, "check_loaded"), (precompute, "score_part"), (loop, "train_step"), (loop, "export")],
)
def test_an_error_leaves_nothing_of_a_sharded_run_in_the_process(
    tmp_path, monkeypatch, place, name
):
    """A notebook keeps the latest error, whose traceback has what was there; then it tries once more."""
    from deepspeed.runtime.zero import parameter_offload, partition_parameters
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 8)
    tree = run_tree(tmp_path, max_steps=1) | {"parallel": {"zero_stage": 3}}

    def fails(*arguments, **options):
        raise ZeroDivisionError(name)

    before, stack = held(), len(parameter_offload.FWD_MODULE_STACK)
    with monkeypatch.context() as broken:
        broken.setattr(place, name, fails)
        with pytest.raises(ZeroDivisionError, match=name) as error:
            here.train(build_config(tree, "test"))
    assert not is_deepspeed_zero3_enabled() and partition_parameters.zero_init_context == 0
    assert len(parameter_offload.FWD_MODULE_STACK) == stack
    # The weights alone are 130 kB, and AdamW's states twice as much.
    assert held() < before + (200_000 if name == "check_loaded" else 60_000)
    assert error.value.__traceback__ is not None
    if name == "check_loaded":
        again = tree | {"parallel": {"zero_stage": 0}}
        assert here.train(build_config(again, "test")) == tmp_path / "run/final"


def test_the_engine_trains_whatever_transformers_loaded_for(monkeypatch):
    """Layers in evaluation neither recompute nor have dropout of adapters, and say nothing of it."""
    import deepspeed

    from dpo_fast.models import ScoringModel
    from dpo_fast.training.engine import build_engine
    from tests.support.architectures import make

    model = ScoringModel(make("llama").eval())
    assert model.training and not model.causal_lm.training
    monkeypatch.setattr(deepspeed, "initialize", lambda **_: (MagicMock(), None, None, None))
    build_engine(build_config(TREE, "tree"), model, {}, total_steps=2)
    assert all(module.training for module in model.modules())
