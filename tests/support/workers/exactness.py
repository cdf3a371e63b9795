"""Runs one optimiser step per case and writes its loss and whole gradients. Started by a test, as one
rank or several: `python -m dpo_fast`-style environment variables tell which."""

import json
import os
import sys
from pathlib import Path

if "triton" in sys.argv[2:]:
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

import torch

from dpo_fast.training import distributed
from dpo_fast.training.config import build_config
from dpo_fast.training.console import quiet
from dpo_fast.training.metrics import MetricSums


def one_step(tree: dict) -> tuple[float, dict]:
    """Loss of step 0 over all ranks, and the gradient of every parameter before clipping."""
    from deepspeed.utils import safe_get_full_grad

    from dpo_fast.training.loop import update
    from dpo_fast.training.prepare import prepare

    run = prepare(build_config(tree, "case"))
    gradients, step = {}, run.engine.step

    def capture():
        if run.engine.is_gradient_accumulation_boundary():
            for name, parameter in run.model.named_parameters():
                value = safe_get_full_grad(parameter) if parameter.requires_grad else None
                if value is not None:
                    gradients[name] = value.detach().float().clone()
        step()

    run.engine.step = capture
    share = update(run, 0, MetricSums(run.engine.device))
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(share)
    run.engine.destroy()
    return share.item(), gradients


def main() -> None:
    folder = Path(sys.argv[1])
    quiet()
    distributed.init_distributed()
    results = {}
    for name, tree in json.loads((folder / "cases.json").read_text()).items():
        results[name] = one_step(tree)
    if distributed.is_main():
        torch.save(results, folder / f"results-{distributed.world_size()}.pt")


main()
