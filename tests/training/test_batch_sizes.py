"""A micro-batch that nobody chose divides the global batch on any number of ranks."""

import pytest

from dpo_fast.errors import UserError
from dpo_fast.training.config import build_config, check_batch_sizes


def config_of(**train):
    tree = {
        "model": {"path": "m"},
        "data": {"train": "d.jsonl"},
        "train": {"output_dir": "o"} | train,
    }
    return build_config(tree, "test")


@pytest.mark.parametrize(
    "batch, ranks, micro", [(64, 1, 4), (6, 1, 3), (2, 1, 2), (16, 8, 2), (8, 8, 1), (7, 1, 1)]
)
def test_it_is_the_largest_part_of_a_ranks_share(batch, ranks, micro):
    config = config_of(global_batch_size=batch)
    check_batch_sizes(config, ranks)
    assert config.train.micro_batch_size == micro
    # It stays what nobody chose: another number of ranks chooses anew.
    assert "micro_batch_size" not in config.train.model_fields_set
    check_batch_sizes(config, 1)
    assert batch % config.train.micro_batch_size == 0


def test_one_that_was_chosen_stays_and_is_refused_where_it_does_not_divide():
    config = config_of(global_batch_size=6, micro_batch_size=2)
    check_batch_sizes(config, 1)
    assert config.train.micro_batch_size == 2
    with pytest.raises(UserError, match=r"micro_batch_size \* world_size = 4 \* 1 = 4; try 8"):
        check_batch_sizes(config_of(global_batch_size=6, micro_batch_size=4), 1)


def test_ranks_that_do_not_divide_the_global_batch_are_refused():
    with pytest.raises(UserError, match="global_batch_size=6 must be a multiple"):
        check_batch_sizes(config_of(global_batch_size=6), 4)
    with pytest.raises(UserError, match="global_batch_size=2 must be a multiple"):
        check_batch_sizes(config_of(global_batch_size=2), 4)
