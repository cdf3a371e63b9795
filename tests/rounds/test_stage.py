"""What a step of `iterate` does with the memory of its process."""

import gc
import weakref

import pytest

from dpo_fast.rounds.stage import modules_passed_over


class Cycle:
    """Refers to itself, so that only a collection of garbage ends it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def nothing_frozen():
    """As a run finds its process; the tests' own is frozen by tests/conftest.py."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_what_a_step_leaves_is_collected_and_what_was_there_before_is_not_looked_at(nothing_frozen):
    kept, leftover = Cycle(), weakref.ref(Cycle())  # from before: it is not to be kept alive inside
    with modules_passed_over():
        assert leftover() is None and gc.get_freeze_count() > 10_000
        inside = weakref.ref(Cycle())
        gc.collect()
        assert inside() is None and kept.itself is kept
    assert gc.get_freeze_count() == 0


def test_a_step_that_fails_leaves_nothing_frozen(nothing_frozen):
    with pytest.raises(RuntimeError), modules_passed_over():
        raise RuntimeError
    assert gc.get_freeze_count() == 0


def test_what_the_caller_has_frozen_stays_frozen():
    before = gc.get_freeze_count()
    assert before > 10_000  # by tests/conftest.py
    with modules_passed_over():
        pass
    assert gc.get_freeze_count() == before
