"""FlexAttention's mask by blocks against the mask of all tokens, which PyTorch would make."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from dpo_fast.models import attention_blocks
from dpo_fast.models.attention_plan import AttentionPlan
from tests.support.attention import Largest

CPU = torch.device("cpu")
BLOCKS = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip


def listed(numbers: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Bool [rows, blocks]: the first so many places of every row."""
    assert numbers.dtype == places.dtype == torch.int32 and places.shape[:2] == (1, 1)
    found = torch.zeros(places.shape[2:], dtype=torch.bool)
    for row, (number, each) in enumerate(zip(numbers[0, 0].tolist(), places[0, 0])):
        assert each[:number].tolist() == sorted(set(each[:number].tolist()))
        found[row, each[:number]] = True
    return found


def check(plan: AttentionPlan, window: int | None, size: int = 128, exact: bool = False) -> None:
    """All that is seen is in a block, a block that is not asked again has all, both ways of listing agree.

    exact: the blocks are those of PyTorch's.
    """
    with mock.patch.object(attention_blocks, "BLOCK", size):
        found = plan.block_mask(window)
    rows = sum(own for own, *_ in plan.spans)
    assert found.seq_lengths == (rows, rows) and (size, size) == found.BLOCK_SIZE
    true = create_block_mask(found.mask_mod, None, None, rows, rows, "cpu", BLOCK_SIZE=size)
    if exact:
        for name in BLOCKS:
            assert torch.equal(getattr(found, name), getattr(true, name)), name
    some, every, some_q, every_q, needed, all_of_it = (
        listed(*(getattr(each, name) for name in names))
        for each, names in (
            *((found, BLOCKS[i : i + 2]) for i in (0, 2, 4, 6)),
            (true, BLOCKS[:2]),
            (true, BLOCKS[2:4]),
        )
    )
    assert torch.equal(some_q, some.T) and torch.equal(every_q, every.T)
    assert not (some & every).any()
    assert not ((needed | all_of_it) & ~(some | every)).any()
    assert not (every & ~all_of_it).any()


@st.composite
def rows(draw) -> tuple[tuple, tuple]:
    """Spans in which all that continues a token lies directly behind it, and runs within branches."""
    spans: list[tuple[int, int, int]] = []
    open_: list[tuple[int, int, int]] = []  # place, first and end of what can be continued of it
    for place in range(draw(st.integers(1, 7))):
        own = draw(st.integers(1, 14))
        prefix, parent = 0, -1
        if open_ and draw(st.booleans()):
            depth = draw(st.integers(0, len(open_) - 1))
            parent, low, high = open_[depth]
            prefix = draw(st.integers(low, high))
            # What comes later continues no token behind this fork.
            open_[depth:] = [(parent, low, prefix)]
        else:
            open_.clear()
        spans.append((own, prefix, parent))
        open_.append((place, prefix + 1, prefix + own))
    edges, start = [], 0
    for own, *_ in spans:
        cuts = sorted(draw(st.sets(st.integers(0, own), max_size=4)))
        edges += [(start + a, start + b) for a, b in zip(cuts[::2], cuts[1::2])]
        start += own
    return tuple(spans), tuple(edges)


@settings(deadline=None, max_examples=40)
@given(rows(), st.sampled_from([2, 3, 8]), st.sampled_from([1, 3, 9]))
def test_blocks_of_random_rows(row, size, local):
    """Trees and runs have PyTorch's own blocks; windows and chunks have those and maybe others."""
    spans, runs = row
    plan = AttentionPlan(spans, CPU)
    check(plan, None, size, exact=True)
    check(AttentionPlan(spans, CPU, runs=runs), None, size, exact=True)
    check(AttentionPlan(spans, CPU, runs=runs), local, size)
    check(plan, local, size)
    check(plan.chunked(local), None, size)


@pytest.mark.parametrize("spans", [
    ((1, 0, -1),), ((100, 0, -1),), ((128, 0, -1),), ((129, 0, -1),), ((512, 0, -1),),
    ((300, 0, -1), (170, 280, 0), (50, 450, 1), (33, 100, 0), (290, 0, -1)),
])  # fmt: skip
def test_blocks_of_flex_attentions_own_size(spans):
    plan = AttentionPlan(spans, CPU)
    for window, exact in ((None, True), (40, False), (200, False)):
        check(plan, window, exact=exact)
    check(plan.chunked(64), None)
    runs = ((0, 7), (100, 290)) if spans[0][0] >= 300 else ((0, spans[0][0]),)
    check(AttentionPlan(spans, CPU, runs=runs), None, exact=True)


def test_a_window_and_chunks_leave_blocks_out():
    """One sequence: its blocks are PyTorch's. A mask that keeps them all would be right, too, and slow."""
    plan = AttentionPlan(((2048, 0, -1),), CPU)
    for window in (64, 128, 300):
        check(plan, window, exact=True)
    check(plan.chunked(512), None, exact=True)


@pytest.mark.parametrize("window", [None, 4096])
def test_nothing_is_of_the_rows_size_squared(window):
    plan = AttentionPlan(
        ((40000, 0, -1), (15536, 30000, 0), (10000, 30000, 0)), CPU, runs=((1000, 3000),)
    )
    with Largest() as largest:
        plan.block_mask(window)
        plan.chunked(8192).block_mask(None)
    assert largest.elements <= 2 * 65536 + 2 * 512 * 513
