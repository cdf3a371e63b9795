"""The golden curves: ten steps of every case below, as losses and gradient norms.

`python -m tests.support.golden` runs the cases and rewrites tests/golden/curves.json. Do that only
in a change that is meant to alter numbers, and say in its message why they moved. With `--noise N`
it writes nothing: it moves every weight at random by about one unit in its last place, N times, and
prints how far the curves move.

Adam divides by the size of a gradient, so a weight whose gradient is rounding noise moves by the
noise's sign. Here epsilon is a thousand times any gradient and the rate a thousand times higher:
the update is that of SGD with momentum, and a change in the last bits stays one.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import run_tree, write_completions, write_groups, write_model, write_pairs
from tests.support.paths import ROOT

FILE = ROOT / "tests/golden/curves.json"
STEPS = 10
RATE, EPSILON = 50.0, 1e3  # a step is 0.05 times the clipped gradient

FROZEN, CACHED = {"provider": "frozen"}, {"provider": "cached"}
# name: (data, layout, reference, loss). Layouts and ways to the reference take turns.
CASES = {
    "sigmoid": ("pairs", "shared_prefix", CACHED, {"type": "sigmoid"}),
    "ipo": ("pairs", "packed", CACHED, {"type": "ipo"}),
    "hinge": ("pairs", "padded", FROZEN, {"type": "hinge", "beta": 0.03}),
    "robust": ("pairs", "packed", FROZEN, {"type": "robust", "label_smoothing": 0.1}),
    "apo_zero": ("pairs", "padded", CACHED, {"type": "apo_zero"}),
    "aot_unpaired": ("pairs", "shared_prefix", CACHED, {"type": "aot_unpaired"}),
    "simpo": ("pairs", "shared_prefix", {}, {"type": "simpo", "beta": 2.0}),
    "orpo": ("pairs", "padded", {}, {"type": "orpo"}),
    "mixture": (
        "pairs",
        "packed",
        FROZEN,
        {"type": ["sigmoid", "sft"], "weights": [1.0, 0.5], "token_clamp": 0.5},
    ),
    "kto": ("completions", "packed", FROZEN, {"type": "kto"}),
    "bco": ("completions", "shared_prefix", CACHED, {"type": "bco"}),
    "plackett_luce": ("groups", "shared_prefix", CACHED, {"type": "plackett_luce"}),
    "grpo": ("groups", "padded", FROZEN, {"type": "grpo", "grpo_beta": 0.1}),
    "dapo": ("groups", "packed", {}, {"type": "dapo"}),
}


def write_inputs(folder: Path) -> None:
    write_model(folder / "model")
    for write in (write_pairs, write_completions, write_groups):
        write(folder / f"{write.__name__.removeprefix('write_')}.jsonl", 24)


def tree(folder: Path, name: str) -> dict:
    data, layout, reference, loss = CASES[name]
    tree = run_tree(
        folder,
        output_dir=str(folder / name),
        max_steps=STEPS,
        layout=layout,
        learning_rate=RATE,
        adam_epsilon=EPSILON,
        lr_scheduler_type="constant",
    )
    tree["data"]["train"] = str(folder / f"{data}.jsonl")
    parallel = {"zero_stage": 1}  # DeepSpeed tells no norm at stage 0
    return tree | {"loss": {"beta": 0.1} | loss, "reference": reference, "parallel": parallel}


def curve(folder: Path) -> dict[str, list[float]]:
    return {name: list(series(folder, name).values()) for name in ("loss", "grad_norm")}


def curves(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Runs every case from the inputs in `folder`."""
    ranks.train([tree(folder, name) for name in CASES])
    return {name: curve(folder / name) for name in CASES}


def make() -> dict[str, dict[str, list[float]]]:
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        return curves(Path(folder))


def make_with_noise(seed: int) -> dict[str, dict[str, list[float]]]:
    """As `make`, from weights times 1 + u, u uniform within two units in the last place of 1."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        file = Path(folder) / "model" / "model.safetensors"
        draw = torch.Generator().manual_seed(seed)
        weights = {
            name: weight * (1 + 2**-22 * (2 * torch.rand(weight.shape, generator=draw) - 1))
            for name, weight in load_file(file).items()
        }
        save_file(weights, file, metadata={"format": "pt"})
        return curves(Path(folder))


def distance(got: list[float], expected: list[float]) -> float:
    """Largest difference, relative to the largest value of the curve."""
    return max(abs(a - b) for a, b in zip(got, expected, strict=True)) / max(map(abs, expected))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--noise", type=int, default=0, metavar="N")
    found, asked = make(), parser.parse_args()
    for seed in range(asked.noise):
        for name, noisy in make_with_noise(seed).items():
            moved = {key: f"{distance(noisy[key], found[name][key]):.1e}" for key in noisy}
            print(f"{name:14}", moved)
    if not asked.noise:
        lines = (f'"{name}": {json.dumps(values)}' for name, values in found.items())
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
