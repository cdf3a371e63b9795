"""The sampler of train.sampler: found by its name, tried once, and the same on every rank."""

from __future__ import annotations

from typing import Any

from dpo_fast.data.own_order import OPTION, OwnOrder, Rows, check_sampler
from dpo_fast.data.sampler import Sampler
from dpo_fast.errors import UserError
from dpo_fast.losses.custom import loaded
from dpo_fast.training import data_ranks, distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.own_code import SAMPLERS, find
from dpo_fast.training.splits import Examples


def open_sampler(config: RunConfig) -> Any:
    """What train.sampler names; None without one. Raises UserError if it cannot be loaded, or is none."""
    name = config.train.sampler
    if name is None:
        return None
    give = find(name, OPTION, SAMPLERS)
    if isinstance(give, type):
        give = loaded(f"{OPTION}={name}", give)
    check_sampler(name, give)
    return give


def own_sampler(config: RunConfig, examples: Examples, left_out: frozenset[int]) -> Sampler:
    """A sampler that takes the examples in the order of train.sampler. Collective.

    left_out: as of `Sampler`.

    Raises:
        UserError: it gives what are no places, or another order on another rank or the second time.
    """
    train, name = config.train, config.train.sampler
    assert name is not None and train.micro_batch_size is not None  # who calls has looked
    if examples.mixture is not None:
        raise UserError(
            f"{OPTION}={name}, but data.train is a mixture, which draws its rows itself: give one source, "
            "or leave the sampler out"
        )
    size, kl = train.global_batch_size, "kl" in config.loss.objective.statistics
    rows = Rows(examples, train.seed)
    own = OwnOrder(name, open_sampler(config), rows, size if kl else None)
    own(0)
    first = own(0)  # the same once more, or it is refused
    if len(set(distributed.gathered(own.identity))) > 1:
        raise UserError(
            f"{OPTION}={name} gave another order on another rank: it must follow from rows and epoch alone"
        )
    return Sampler(
        len(first),
        size,
        train.micro_batch_size,
        data_ranks.data_ranks(),
        seed=train.seed,
        left_out=left_out,
        own=own,
    )
