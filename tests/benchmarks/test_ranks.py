"""The benchmark against ranks: one task for every number of ranks, and its bytes are counted."""

import pytest
import yaml

pytest.importorskip("deepspeed")

from benchmarks import ranks
from dpo_fast.training.config import build_config, check_batch_sizes


def test_the_task_is_one_run_for_all_ranks(tmp_path, monkeypatch):
    file = ranks.write_task(tmp_path, 16, 4, 5, 3)
    config = build_config(yaml.safe_load(file.read_text()), str(file))
    sent = {}
    for count in (1, 2, 4):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        check_batch_sizes(config, count)
        sent[count] = ranks.sent_by_a_rank(file, count)
    # Fewer micro-batches of a rank gather and reduce less often; a rank sends 1/2 and 3/4 of the whole.
    assert sent[1] == 0 and 0 < sent[4] < sent[2]
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 2 * ranks.BATCH


def test_numbers_are_read_from_a_list():
    assert ranks.whole_numbers("1,2,4") == [1, 2, 4]
