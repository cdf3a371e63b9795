"""A NaN or an infinity at every ZeRO stage, dtype and number of ranks: told, and never in the weights.

tests/training/test_finite.py has a sample that runs always.
"""

import json
import math
import os
from itertools import product

import pytest

pytest.importorskip("deepspeed")

from safetensors.torch import load_file

from tests.support import ranks
from tests.support.models import changed, run_tree, write_model, write_pairs

SLOW = os.environ.get("DPO_FAST_SLOW") == "1"
GRADIENT, OUTPUT = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.up_proj"
ADAPTER = "model.layers.1.self_attn.q_proj.lora_B.default.weight"
STAGES, DTYPES, CLIPS = (0, 1, 2, 3), ("fp32", "bf16"), (1.0, 0.0)


def cases(folder, count: int) -> dict[str, dict]:
    """Runs of three steps whose second is not finite on the last rank, by name; half stop, half skip."""
    made = {}
    options = product(STAGES, DTYPES, CLIPS, (GRADIENT, OUTPUT), ("stop", "skip"), (False, True))
    for stage, dtype, clip, where, policy, adapters in options:
        offloads = (False, True) if stage >= 2 and not adapters else (False,)
        for offload in offloads:
            name = f"{stage}-{dtype}-{clip}-{where[-6:]}-{policy}-{adapters}-{offload}"
            tree = run_tree(
                folder, max_steps=3, micro_batch_size=2, max_grad_norm=clip, nonfinite=policy
            )
            tree["model"] |= {"dtype": dtype} | ({"lora": {"r": 2}} if adapters else {})
            tree["parallel"] = {"zero_stage": stage, "offload_optimizer": offload}
            tree["train"]["save_steps"] = 1
            place = ADAPTER if adapters and where == GRADIENT else where
            value = math.inf if where == GRADIENT else math.nan
            fault = {"where": place, "value": value, "rank": count - 1, "steps": [1]}
            made[name] = {"tree": changed(tree, folder / f"{count}-{name}"), "faults": [fault]}
    return made


@pytest.mark.skipif(not SLOW, reason="320 runs: set DPO_FAST_SLOW=1")
@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [1, 2])
def test_no_step_that_is_not_finite_is_taken(tmp_path, count):
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 20)
    made, wrong = cases(tmp_path, count), []
    for name, case in made.items():
        ranks.group(count).do("train_faulty", [case])
        folder = tmp_path / f"{count}-{name}"
        said = (folder / "ended-0").read_text()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        final = list((folder / "final").glob("*model.safetensors"))
        if "stop" in name:
            told = "step 2 was not taken" in said and (
                GRADIENT in said or OUTPUT in said or ADAPTER in said
            )
            whole = (folder / "latest").read_text() == "checkpoint-1" and not final
        else:
            told = said == "done" and lines[-1]["nonfinite_steps"] == 1
            whole = all(x.isfinite().all() for x in load_file(final[0]).values())
            whole = whole and lines[-2]["loss"] is None and lines[-1]["loss"] < 0.69
        if not (told and whole):
            wrong.append((name, said[:300]))
    print(
        f"{len(made) - len(wrong)} of {len(made)} on {count} ranks: told, and nothing reached the weights"
    )
    assert not wrong
