"""What DeepSpeed's ZeRO 3 keeps of one model, or of one pass, and should not for the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def forget_modules(model: nn.Module) -> None:
    """Let ZeRO 3 forget the modules of a model that has been let go of.

    DeepSpeed (0.19) has every model on its list of the modules that a forward is in, and takes none off,
    nor those of a forward that an error ended. They hold the engine and its process group.
    """
    from deepspeed.runtime.zero import parameter_offload as place

    own = set(model.modules())
    stack = getattr(place, "FWD_MODULE_STACK", [])
    stack[:] = [each for each in stack if each not in own]
    if (decided := _decided()) is not None:
        decided.cache_clear()


def follow_new_order() -> None:
    """Let ZeRO 3 decide anew what stays gathered when it records another order of modules.

    DeepSpeed (0.19) keeps what it has decided for each place. After a pass without gradients, as that of a
    reference, it would release in forward what backward needs next, and gather everything twice.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator as place

    kind = place.PartitionedParameterCoordinator
    invalidate = kind._invalidate_trace
    if getattr(invalidate, "forgets", False):
        return
    decided = _decided()
    if decided is None:
        return

    def forget(coordinator) -> None:
        decided.cache_clear()
        invalidate(coordinator)

    forget.forgets = True
    kind._invalidate_trace = forget


def _decided() -> Any:
    """What remembers the decisions; None in a version that remembers nothing."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as place

    kind = place.PartitionedParameterCoordinator
    decide = getattr(kind, "_PartitionedParameterCoordinator__params_to_release", None)
    inside = [cell.cell_contents for cell in getattr(decide, "__closure__", None) or ()]
    return next((each for each in inside if hasattr(each, "cache_clear")), None)


def keep_names_of_the_model() -> None:
    """Let a tensor keep its name at stage 3 if the model has that name, and not what it is renamed to.

    So transformers (5.23) does without ZeRO. DeepSeek-V4's `model.norm.weight`, for one, would else become
    a norm of its compressed keys, which there is none of.
    """
    from transformers import core_model_loading as place

    rename = getattr(place, "rename_source_key", None)
    if rename is None or getattr(rename, "keeps", False):
        return

    def rename_or_keep(key, renamings, converters, prefix=None, model=None, **options):
        renamed, pattern = rename(key, renamings, converters, prefix, model, **options)
        if not model or renamed in model or key not in model:
            return renamed, pattern
        return rename(key, [], [], prefix, model, **options)

    def by_any_name(source_key, weight_renamings, weight_converters, *rest, **options):
        names = ("base_model_prefix", "meta_state_dict")
        options = dict(zip(names, rest)) | options
        rest = (options.pop(name, None) for name in names)
        return rename_or_keep(source_key, weight_renamings, weight_converters, *rest, **options)

    by_any_name.keeps = True
    place.rename_source_key = by_any_name


def record_whole_passes() -> None:
    """Let ZeRO 3 record the order of a training pass, and not that of a forward without gradients.

    DeepSpeed (0.19) records the first pass after an order was broken. Where a forward and a training pass
    come in turn, that is always the forward, whose order the other breaks: nothing is ever fetched ahead or
    kept, and ranks compare their orders in every pass. A forward is the beginning of a training pass, so
    the order of the latter serves both.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator as place

    kind = place.PartitionedParameterCoordinator
    reset = kind.reset_step
    if getattr(reset, "of_whole_passes", False):
        return

    def reset_to_whole(coordinator) -> None:
        whole = torch.is_grad_enabled()
        recorded = not coordinator.is_invalid_trace()
        if whole and recorded and not getattr(coordinator, "recorded_whole", False):
            coordinator._invalidate_trace()
        reset(coordinator)
        if coordinator.is_record_trace():
            coordinator.recorded_whole = whole

    reset_to_whole.of_whole_passes = True
    kind.reset_step = reset_to_whole


def share_groups(size: int) -> None:
    """Let all models of a process share the groups of ranks that keep a copy of parameters (hpZ).

    DeepSpeed (0.19) makes them for the first model, and refuses the second: that of a reference, or the
    policy of a later round. It keeps them for a later one that asks for none.

    size: ranks of a group; 1 for none.
    """
    from deepspeed import comm
    from deepspeed.utils import groups

    create, name = groups._create_zero_param_parallel_group, "_ZERO_PARAM_INTRA_PARALLEL_GROUP"
    if size == 1:
        setattr(groups, name, None)
    if getattr(create, "shares", False):
        return

    def create_once(size: int) -> None:
        there = getattr(groups, name)
        if there is None or comm.get_world_size(group=there) != size:
            setattr(groups, name, None)
            create(size)

    create_once.shares = True
    groups._create_zero_param_parallel_group = create_once
