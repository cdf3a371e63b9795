"""The plan of the head: a pure function of sizes that stays within its budget."""

import pytest
import torch

from dpo_fast.ops import plan

BF16 = torch.bfloat16
SHAPES = [(32_000, 896), (151_936, 4096)]  # V, D


@pytest.mark.parametrize("T", [0, 1, 2047, 8192, 1_000_000])
@pytest.mark.parametrize("budget", [0, 1 << 20, 1 << 30, 1 << 34])
def test_torch(T, budget):
    for V, D in SHAPES:
        chosen = plan(T, V, D, BF16, workspace_bytes=budget)
        assert chosen.kept_bytes <= budget
        assert chosen.token_chunk * chosen.vocab_block <= 1 << 22
        assert 3.0 <= chosen.gemms <= 4.0
        assert chosen.schedule in str(chosen) and f"{chosen.gemms:.2f}" in str(chosen)
        assert plan(T, V, D, torch.float16, workspace_bytes=budget).kept_tokens == 0
    assert plan(T, V, D, BF16, needs_head=False).gemms == 2.0
    assert plan(T, V, D, BF16, needs_head=False, needs_hidden=False).gemms == 1.0
    assert plan(T, V, D, BF16, needs_hidden=False, workspace_bytes=1 << 40).gemms == 2.0


@pytest.mark.parametrize("T", [1, 100, 2047, 8192, 65_536])
@pytest.mark.parametrize("budget", [1 << 30, 1 << 33, 1 << 35])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_triton_stays_within_its_budget(T, budget, dtype, needs):
    """Everything beside inputs and outputs: exponentials, tiles and the sums of products."""
    for V, D in SHAPES:
        chosen = plan(
            T,
            V,
            D,
            dtype,
            needs_hidden=needs[0],
            needs_head=needs[1],
            workspace_bytes=budget,
            implementation="triton",
        )
        assert chosen.bytes <= budget
        kept = dtype != torch.float16
        assert 2.0 <= chosen.gemms <= 3.0 or (all(needs) and chosen.gemms <= 4.0)
        if needs == (True, False):
            assert chosen.gemms == (2.0 if kept else 3.0)
        elif T * V * dtype.itemsize * 1.1 < budget and kept:
            assert chosen.schedule == "keep" and chosen.gemms == 1 + sum(needs)
        if chosen.token_chunk and T > 4096 and chosen.gemms != 2.0:
            # Products of 2,048 rows and more, or launches would cost what the products do.
            assert chosen.token_chunk >= 2048 and chosen.vocab_block >= min(V, 2048)


def test_triton_with_more_memory_does_less():
    """The named budgets of a 65,536-token step: recompute, mixed, keep."""
    found = [
        plan(65_536, 151_936, 4096, BF16, workspace_bytes=gib << 30, implementation="triton")
        for gib in (0, 1, 8, 20)
    ]
    assert [p.schedule for p in found] == ["recompute", "recompute", "mixed", "keep"]
    assert found[0].residual_sums and found[1].residual_sums and not found[2].residual_sums
    gemms = [p.gemms for p in found]
    assert gemms == sorted(gemms, reverse=True) and gemms[-1] == 3.0


def test_without_memory_what_remains_is_small():
    """A workspace of 0: one tile of 4096 x 1024, the smaller of two sums, and a chunk's product."""
    chosen = plan(8192, 151_936, 4096, BF16, workspace_bytes=0, implementation="triton")
    assert chosen.kept_tokens == 0 and chosen.tile_bytes <= 8 << 20
    assert chosen.sum_bytes <= 8192 * 4096 * 2 + 2 * 4096 * 4096 * 4


@pytest.mark.parametrize("T", [0, 1, 27, 2048, 5000])
def test_the_weight_is_never_copied_whole(T):
    """A few tokens leave room for a wide tile of logits; the fp32 copy of a block stays within 32 MiB."""
    for V, D in SHAPES:
        for dtype in (BF16, torch.float16):
            chosen = plan(T, V, D, dtype, products=torch.float32)
            copied = chosen.vocab_block * D * 4
            assert copied <= 32 << 20 and chosen.vocab_block >= min(V, 512)
            tile = chosen.token_chunk * chosen.vocab_block * 4
            assert chosen.tile_bytes == tile + copied
        own = plan(T, V, D, torch.float32)
        assert own.tile_bytes == own.token_chunk * own.vocab_block * 4


def test_products_in_fp32_from_what_is_kept_in_bf16():
    """As much is kept; the gradient of the hidden states is summed over tiles, in fp32.

    Hidden states whose logits are made again are copied to fp32.
    """
    for budget in (1 << 30, 1 << 26, 0):
        half = plan(2048, 32_000, 896, BF16, workspace_bytes=budget)
        whole = plan(2048, 32_000, 896, BF16, workspace_bytes=budget, products=torch.float32)
        assert (half.schedule, half.gemms) == (whole.schedule, whole.gemms)
        assert half.kept_bytes == whole.kept_bytes <= budget
        rows = 2048 + (2048 - whole.kept_tokens) + whole.vocab_block
        assert whole.sum_bytes == rows * 896 * 4 >= half.sum_bytes
        assert "multiplied in float32" in str(whole) and "multiplied in bfloat16" in str(half)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("needs_head", [True, False])
def test_a_million_tokens_take_what_some_take(dtype, implementation, needs_head):
    """Inputs and outputs aside the head's memory has an end, whatever the number of tokens."""
    for V, D in SHAPES:
        options = {"needs_head": needs_head, "implementation": implementation}
        many, more = (
            plan(T, V, D, dtype, workspace_bytes=1 << 30, **options).bytes
            for T in (1 << 18, 1 << 20)
        )
        assert more <= many * 1.01
