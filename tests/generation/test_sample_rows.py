"""Rows of samples in a file."""

from __future__ import annotations

import pytest

from dpo_fast.generation.sample_rows import write_rows
from dpo_fast.judging.samples import read_rows


@pytest.mark.parametrize("ids, kept", [([7, 8], [7, 8]), ([7, "b"], ["7", "b"]), ([2**63], None)])
def test_parquet_keeps_ids_that_are_whole_numbers(tmp_path, ids, kept):
    """A column of Arrow has one type."""
    file = tmp_path / "samples.parquet"
    write_rows(file, ({"prompt": "[{", "completions": ["a"], "id": each} for each in ids))
    found = [row.content for row in read_rows(file)]
    assert [row["id"] for row in found] == (kept or list(map(str, ids)))
    assert found[0]["prompt"] == "[{"
