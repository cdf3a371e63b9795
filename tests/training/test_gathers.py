"""What ZeRO 3 gathers, by DeepSpeed's rules, on small made-up orders of modules."""

from collections import Counter

from dpo_fast.training.gathers import Rules, Use, gathered

FORWARD = [Use((1,)), Use((2,)), Use((3,))]
ORDER = [*FORWARD, *reversed(FORWARD)]
SIZES = {1: 10, 2: 10, 3: 10}


def test_all_are_gathered_forward_and_backward_but_the_last():
    """The last module of the forward pass is the first of backward."""
    counts, left = gathered(ORDER, SIZES, Rules(reuse=1, prefetch=0, live=1000, persistence=0))
    assert counts == Counter({1: 2, 2: 2, 3: 1}) and not left


def test_nothing_is_kept_without_a_reuse_distance():
    counts, left = gathered(ORDER, SIZES, Rules(reuse=0, prefetch=0, live=1000, persistence=0))
    assert counts == Counter({1: 2, 2: 2, 3: 2}) and not left


def test_what_comes_again_soon_stays():
    far = Rules(reuse=1000, prefetch=0, live=1000, persistence=0)
    assert gathered(ORDER, SIZES, far)[0] == Counter({1: 1, 2: 1, 3: 1})
    near = Rules(reuse=30, prefetch=0, live=1000, persistence=0)
    assert gathered(ORDER, SIZES, near)[0] == Counter({1: 2, 2: 1, 3: 1})


def test_what_runs_again_waits_for_its_backward_pass():
    again = [*FORWARD, Use((3,)), *(Use(each.own, released=False) for each in FORWARD[:2])]
    order = [*again, Use((2,)), Use((1,))]
    counts, left = gathered(order, SIZES, Rules(reuse=0, prefetch=0, live=1000, persistence=0))
    assert counts == Counter({1: 2, 2: 2, 3: 2}) and not left


def test_small_ones_are_never_gathered_here():
    counts, _ = gathered(ORDER, SIZES | {2: 3}, Rules(0, 0, 1000, persistence=3))
    assert counts == Counter({1: 2, 3: 2})


def test_a_prefetch_keeps_what_it_has_looked_past():
    """It passes over what is there, and DeepSpeed does not release that before its next use."""
    ahead = Rules(reuse=0, prefetch=30, live=1000, persistence=0)
    assert gathered(ORDER, SIZES, ahead)[0].total() < 6


def test_what_a_micro_batch_leaves_is_there_for_the_next():
    assert gathered(ORDER, SIZES, Rules(0, 0, 1000, 0), held={1, 2})[0] == Counter(
        {1: 1, 2: 1, 3: 2}
    )
    assert Rules.of({"stage3_max_reuse_distance": 7}) == Rules(7, 50_000_000, 10**9, 100_000)
