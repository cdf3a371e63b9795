"""The mixture of two models of one architecture, tensor by tensor: a reference that moves between stages.

A tensor is the share of the policy and the rest of the reference, in fp32, in the dtype of the policy
(TR-DPO's soft update, arXiv 2404.09656 eq 5, once a stage). Files are read by tensors: the memory is that
of one shard.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.models.checkpoint import weight_files
from dpo_fast.models.load import local_folder
from dpo_fast.models.save import copy_files, read_tensors, tensor_names


def write_average(reference: str, policy: str, share: float, folder: Path) -> None:
    """Write a model folder: `share` of the policy and the rest of the reference. Whole or not at all.

    reference, policy: folders or hub ids. The policy's files of tokenizer and configuration go with it.

    Raises:
        UserError: the two have other tensors, or it cannot be written.
    """
    sources = [local_folder(path) for path in (reference, policy)]
    aside = durable.aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    with durable.writing(
        aside, "Make room, and the same command goes on", (OSError, SafetensorError)
    ):
        aside.mkdir(parents=True)
        copy_files(sources[1], aside)
        for index in sources[1].glob("model.safetensors.index.json"):
            shutil.copyfile(index, aside / index.name)
        _mix_files(*sources, share, aside)
        durable.publish(aside, folder, replace=True)


def _mix_files(reference: Path, policy: Path, share: float, target: Path) -> None:
    places = {name: file for file in weight_files(reference) for name in tensor_names(file)}
    for file in weight_files(policy):
        names = tensor_names(file)
        if missing := [name for name in names if name not in places]:
            raise UserError(
                f"reference=ema mixes {reference} and {policy}, and the first has no tensor {missing[0]}; "
                "choose previous or start"
            )
        mixed = {name: _mixed(name, places[name], file, share) for name in names}
        save_file(mixed, target / file.name, {"format": "pt"})


def _mixed(name: str, before: Path, policy: Path, share: float) -> Tensor:
    ours, theirs = (read_tensors(file, [name])[name] for file in (policy, before))
    if ours.shape != theirs.shape:
        raise UserError(
            f"reference=ema mixes {before} and {policy}, whose tensors {name} have the shapes "
            f"{tuple(theirs.shape)} and {tuple(ours.shape)}; choose previous or start"
        )
    if not ours.is_floating_point():
        return ours
    return theirs.float().lerp(ours.float(), share).to(ours.dtype)
