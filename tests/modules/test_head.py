"""`FusedHead`: a linear layer to others; in a model under FSDP2 and tensor parallelism, on two ranks."""

import copy
import pickle

import pytest
import torch
from torch import nn

from dpo_fast import FusedHead
from tests.support.models import write_model
from tests.support.ranks import group
from tests.support.sharded import OF_MODELS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sharded")
    write_model(place / "untied")
    write_model(place / "tied", tied=True)
    return str(place)


@pytest.mark.processes
@pytest.mark.parametrize("job", OF_MODELS)
def test_two_ranks_against_the_whole(job, folder):
    group(2).do("sharded", job, folder)


def test_it_is_a_linear_layer_to_others():
    layer = nn.Linear(4, 9)
    head = FusedHead(layer.weight, layer.bias)
    assert isinstance(head, nn.Linear) and head.weight is layer.weight
    assert (head.in_features, head.out_features) == (4, 9)
    assert "in_features=4, out_features=9, bias=True, implementation='auto'" in repr(head)
    hidden = torch.randn(3, 4)
    assert torch.equal(head(hidden), layer(hidden))
    assert list(head.state_dict()) == list(layer.state_dict())
    for copied in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        ids = torch.tensor([0, 8, 3])
        assert torch.equal(copied(hidden, ids)["logp"], head(hidden, ids)["logp"])
