"""Groups of ranks that DeepSpeed keeps too long. Its decisions of another order: `test_traffic.py`."""

import pytest

pytest.importorskip("deepspeed")

from dpo_fast.training.zero_mends import keep_names_of_the_model, share_groups


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


def test_a_tensor_by_a_name_of_the_model_keeps_it(monkeypatch):
    """DeepSeek-V4's files may have its names or the model's; the one rule is of a norm of other layers."""
    from transformers import core_model_loading as loading

    monkeypatch.setattr(loading, "rename_source_key", loading.rename_source_key)
    renaming = loading.WeightRenaming(source_patterns=r"\.norm\.", target_patterns=r"\.kv_norm\.")
    model = {"model.norm.weight": 0, "model.layers.0.kv_norm.weight": 0}
    for _ in range(2):  # two models of a run
        keep_names_of_the_model()
        for name, found in (
            ("model.norm.weight", "model.norm.weight"),
            ("norm.weight", "model.norm.weight"),
            ("model.layers.0.norm.weight", "model.layers.0.kv_norm.weight"),
        ):
            assert loading.rename_source_key(name, [renaming], [], "model", model)[0] == found
