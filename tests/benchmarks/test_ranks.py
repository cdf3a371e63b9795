"""The benchmark against ranks: one task for every number of ranks, and its bytes are counted."""

import pytest
import yaml

pytest.importorskip("deepspeed")

from benchmarks import ranks
from dpo_fast.training.config import build_config, check_batch_sizes


def test_the_task_is_one_run_for_all_ranks(tmp_path, monkeypatch):
    file = ranks.write_task(tmp_path, 16, 1, 5, 3)
    config = build_config(yaml.safe_load(file.read_text()), str(file))
    sent = {}
    for count in (1, 2, 4):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        check_batch_sizes(config, count)
        sent[count] = ranks.sent_by_a_rank(file, count, 4096)
    # Fewer micro-batches of a rank gather and reduce less often; a rank sends 1/2 and 3/4 of the whole.
    assert sent[1] == 0 and 0 < sent[4] < sent[2]
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 2 * ranks.BATCH


def test_ranks_with_one_row_send_their_heads_too(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    sent = {}
    for shared in (1, 2):
        file = ranks.write_task(tmp_path / str(shared), 16, shared, 5, 3)
        few, many = (ranks.sent_by_a_rank(file, 2, tokens) for tokens in (1000, 2000))
        sent[shared] = many - few
    # 4 layers there and back, 4 x 128 numbers a token of a slice, half of them to the other rank.
    assert sent[1] == 0 and sent[2] >= 4 * 2 * 4 * 128 * 500 * 4 / 2


def test_numbers_are_read_from_a_list():
    assert ranks.whole_numbers("1,2,4") == [1, 2, 4]
