"""Groups of ranks that DeepSpeed keeps too long. Its decisions of another order: `test_traffic.py`."""

import pytest

pytest.importorskip("deepspeed")

from dpo_fast.training.zero_mends import share_groups


def test_groups_of_copies_are_made_once_and_forgotten_where_none_are_asked_for(monkeypatch):
    from deepspeed import comm
    from deepspeed.utils import groups

    made = []
    name = "_ZERO_PARAM_INTRA_PARALLEL_GROUP"

    def create(size: int) -> None:
        assert getattr(groups, name) is None, "already initialized"
        made.append(size)
        setattr(groups, name, size)

    monkeypatch.setattr(groups, "_create_zero_param_parallel_group", create)
    monkeypatch.setattr(groups, name, None)
    monkeypatch.setattr(comm, "get_world_size", lambda group=None: group)
    for size in (2, 2, 4):  # two models of a run, and a later run
        share_groups(size)
        groups._create_zero_param_parallel_group(size)
    assert made == [2, 4]
    share_groups(1)
    assert getattr(groups, name) is None
