"""Takes two steps per case and writes losses, reference log-probs and where tensors live.

A test starts it, as one rank or several."""

import json
import sys
from pathlib import Path

import torch

from dpo_fast.training import distributed
from dpo_fast.training.config import build_config
from dpo_fast.training.console import quiet
from dpo_fast.training.metrics import MetricSums
from tests.support.liger import interpret_liger

STEPS = 2


def run_case(tree: dict) -> dict:
    from dpo_fast.training.prepare import prepare
    from dpo_fast.training.step import train_step

    run = prepare(build_config(tree, "case"))
    sums, losses = MetricSums(run.engine.device), []
    for step in range(STEPS):
        totals = run.train.totals(run.train.sampler.global_batch(step))
        share = train_step(
            run.engine,
            run.train.batches(step),
            run.loss_pass,
            run.references["train"],
            totals,
            sums,
            run.statistics,
        )
        torch.distributed.all_reduce(share)
        losses.append(share.item())
    batch = next(run.train.batches(0)).to(run.engine.device)
    found = {
        "losses": losses,
        "reference": run.references["train"](batch).tolist(),
        "weights": weights(run.model),
        "optimizer": type(getattr(run.engine.optimizer, "optimizer", None)).__module__,
        "policy": [
            name
            for name, found in (
                ("optimizer", run.engine.zero_offload_optimizer()),
                ("parameters", run.engine.zero_offload_param()),
            )
            if found is not None and str(found.device) == "cpu"
        ],
        **places(run),
    }
    run.engine.destroy()
    return found


def weights(model) -> dict[str, float]:
    """For every trained parameter how far it is from zero, whole."""
    import deepspeed

    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sharded = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
                found[name] = parameter.detach().double().norm().item()
    return found


def places(run) -> dict:
    """For a second model at stage 3: is it offloaded, and (elements held here, elements in all)."""
    if run.config.reference_provider != "frozen" or run.config.parallel.zero_stage < 3:
        return {}
    scorer = run.references["train"].scorer
    offload = scorer.zero_offload_param()
    held = [(p.ds_tensor.ds_numel, p.ds_numel) for p in scorer.module.parameters()]
    return {"offloaded": offload is not None and str(offload.device) == "cpu", "held": held}


def main() -> None:
    folder = Path(sys.argv[1])
    quiet()
    distributed.init_distributed()
    interpret_liger(setattr)
    cases = json.loads((folder / "cases.json").read_text())
    results = {name: run_case(tree) for name, tree in cases.items()}
    file = folder / f"results-{distributed.rank()}.json"
    file.write_text(json.dumps(results))
    distributed.leave_distributed()


main()
