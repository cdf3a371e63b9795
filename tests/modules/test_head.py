"""A model with a `FusedHead` under FSDP2 and tensor parallelism: two gloo ranks against whole weights."""

import pytest

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
