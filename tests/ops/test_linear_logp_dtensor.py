"""Weights that are DTensors, on two gloo ranks: gathered, or cut by vocabulary, against whole ones."""

import pytest

from tests.support.ranks import group


@pytest.mark.processes
@pytest.mark.parametrize("job", ["passed_weights", "vocabulary_shards"])
def test_two_ranks_against_the_whole(job):
    group(2).do("sharded", job)
