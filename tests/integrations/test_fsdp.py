"""Trainers under accelerate's FSDP2 on two gloo ranks: what they do under DDP."""

import pytest

from tests.support.models import write_model, write_pairs
from tests.support.ranks import group

JOBS = (
    "ours_in_fsdp2",
    "adapters_in_fsdp2",
    "saved_in_fsdp2",
    "mixed_precision_in_fsdp2",
    "trl_in_fsdp2",
    "trl_in_zero_3",
    "tensor_parallel",
    "loaded_sharded",
    "refused",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("fsdp")
    write_model(place / "untied")
    write_model(place / "tied", tied=True)
    write_model(place / "other", seed=1)
    write_pairs(place / "pairs.jsonl", count=10)
    return str(place)


@pytest.mark.processes
@pytest.mark.peers
@pytest.mark.parametrize("job", JOBS)
def test_trainer(job, folder):
    group(2).do("in_trainers", job, folder)
