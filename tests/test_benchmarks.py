"""Micro-benchmarks at small sizes, so that none rots. No time is asserted."""

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.cpu_head import contenders, extra_peak, measure
from benchmarks.inputs import head_inputs

T, D, V = 128, 64, 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dpo_fast", "dpo_fast, extras", "materialised", "trl"])
def test_head(benchmark, name, dtype):
    functions = contenders(*head_inputs(T, D, V, dtype))
    if name not in functions:
        pytest.skip("trl is not installed")
    benchmark.pedantic(functions[name], rounds=3, warmup_rounds=1)


def test_measure_gives_rows_with_evidence():
    rows = measure(T, D, V, torch.float32, repeats=2)
    assert {"dpo_fast", "materialised", "bare products"} <= {row["impl"] for row in rows}
    for row in rows:
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["max_err"] < 1e-4


def test_memory_does_not_grow_with_whole_logits():
    """At a workspace that holds everything the extra memory is one [T, V], not several."""
    whole = 2048 * 32000 * 4 / (1 << 20)
    assert extra_peak("dpo_fast", "fp32", 2048, 64, 32000) < 1.2 * whole
    assert extra_peak("materialised", "fp32", 2048, 64, 32000) > 1.8 * whole
