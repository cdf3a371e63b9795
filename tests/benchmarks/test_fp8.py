"""What the benchmark of products in fp8 compares."""

import pytest

from benchmarks.gpu import fp8


def lines(losses, rate):
    return [
        {"loss": loss, "perf/examples_per_second": 1.0 if step < 20 else rate}
        for step, loss in enumerate(losses)
    ]


def test_losses_step_by_step_and_rates_without_the_first_steps():
    plain = lines([0.5] * 40, 10.0)
    other = lines([0.5] * 30 + [0.7] * 10, 15.0)
    found = fp8.compare(plain, other)
    assert found == pytest.approx(
        {"last": 0.7, "mean": 0.05, "largest": 0.2, "rate": 15.0, "times": 1.5}
    )
    text = fp8.table({"none": plain, "rowwise": other}).splitlines()
    assert text[2].startswith("| bf16 | 0.5000 | 0.0000 | 0.0000 | 10.00 | 1.00 |")
    assert text[3].startswith("| rowwise | 0.7000 | 0.0500 | 0.2000 | 15.00 | 1.50 |")
    with pytest.raises(ValueError):
        fp8.compare(plain, other[:-1])
