"""Quantised checkpoints are not trained whole: what was exported would be read as quantised."""

import json

import pytest

from dpo_fast.errors import UserError
from dpo_fast.training.config import build_config
from dpo_fast.training.fit import check_run
from tests.support.models import run_tree, write_model, write_pairs

LORA = {"lora": {"r": 2, "alpha": 4}}


@pytest.fixture
def check(tmp_path):
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 8)
    file = tmp_path / "model" / "config.json"
    plain = json.loads(file.read_text())

    def checked(method=None, train=None, **model):
        changes = {} if method is None else {"quantization_config": {"quant_method": method}}
        file.write_text(json.dumps(plain | changes))
        tree = run_tree(tmp_path, **(train or {}))
        tree["model"] |= model
        return check_run(build_config(tree, "run"))

    return checked


@pytest.mark.parametrize(
    ("method", "remedy"),
    [("mxfp4", "Mxfp4Config"), ("fp8", "FineGrainedFP8Config"), ("awq", "plain weights")],
)
def test_whole_weights_are_refused_and_adapters_are_not(check, method, remedy):
    with pytest.raises(UserError, match=rf"model.path=.* quantised .*{method}.*{remedy}.*lora"):
        check(method)
    with pytest.raises(UserError, match=rf"train.merge_lora=true: .*{method}"):
        check(method, train={"merge_lora": True}, **LORA)
    check(method, **LORA)
    check()
