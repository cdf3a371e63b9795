"""The benchmark of a hybrid and a mixture: its models, its rows and its table."""

import csv
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from benchmarks import hybrids
from benchmarks.train.case import CONTENDERS, LEARNING_RATE
from benchmarks.train.case import MODELS as SIZES
from dpo_fast.errors import UserError
from dpo_fast.models.layer_kinds import mixing_layers


@pytest.mark.parametrize("size", ["tiny", "quick"])
@pytest.mark.parametrize("kind", hybrids.MODELS)
def test_the_models_are_what_they_are_called(size, kind):
    name = f"{size}-{kind}"
    assert name in LEARNING_RATE
    tree = dict(SIZES[name])
    config = transformers.AutoConfig.for_model(tree.pop("model_type"), **tree)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert bool(mixing_layers(model)) == (kind == "hybrid")
    experts = [module for module in model.modules() if "Experts" in type(module).__name__]
    assert bool(experts) == (kind == "mixture")


def test_rows_of_a_run_are_taken_over(monkeypatch, tmp_path, capsys):
    asked = []

    def bench(command, check):
        asked.append(command)
        file = command[command.index("--csv") + 1]
        row = {"impl": "trl", "layout": "padded", "pairs_per_s": "4", "x_of_trl": "1", "mfu": "0.1"}
        row |= {"peak_mib": "1234.5", "computed_tokens": "3412.0", "note": ""}
        missing = dict.fromkeys(row, "") | {"impl": "trl, padding_free", "note": "missing: a GPU"}
        with open(file, "w", newline="") as stream:
            writer = csv.DictWriter(stream, row)
            writer.writeheader()
            writer.writerows([row, missing])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(hybrids.subprocess, "run", bench)
    assert hybrids.main(["--quick", "--csv", str(tmp_path / "rows.csv")]) == 0
    printed = capsys.readouterr().out
    assert "| trl | 4.00 | 1.00 | 3,412 | 1,234 MiB |" in printed and "*Qwen3-MoE*" in printed
    assert "| trl, padding_free | missing: a GPU |" in printed
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [row["kind"] for row in rows] == ["hybrid", "hybrid", "mixture", "mixture"]
    assert [each[each.index("--model") + 1] for each in asked] == ["quick-hybrid", "quick-mixture"]
    for name in hybrids.CONTENDERS:
        assert name in asked[0] and (name in CONTENDERS or "*" in name)
    assert {"--rounds", "--max-length"} <= set(asked[0])


def test_a_run_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(hybrids.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(UserError, match="tiny-hybrid: bench train ended with 1"):
        hybrids.main([])
