"""AdamW by name: torch's, and that of bitsandbytes with states of 8 bits."""

import importlib.util

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.training import optimisers
from dpo_fast.training.config import RunConfig, build_config
from dpo_fast.training.engine import build_optimizer, deepspeed_config
from dpo_fast.training.finite_step import FiniteStep
from dpo_fast.training.memory import Sizes, memory
from dpo_fast.training.optimisers import OPTIMISERS, check_optim
from dpo_fast.training.tensor_files import read_tree
from tests.support import ranks
from tests.support.models import changed, run_tree, write_model, write_pairs

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EIGHT = "adamw_bnb_8bit"
has_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed, and BITSANDBYTES names no folder with it",
)


def config_of(optim: str, stage: int = 0, **sections) -> RunConfig:
    tree = {
        "model": {"path": "m", "dtype": "fp32"},
        "data": {"train": "f"},
        "train": {"output_dir": "o", "optim": optim, "learning_rate": 0.05},
        "parallel": {"zero_stage": stage},
    }
    for name, options in sections.items():
        tree[name] = tree.get(name, {}) | options
    return build_config(tree, "tree")


def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(96, 96)


def after(optimizer, model: torch.nn.Module, gradients: list[torch.Tensor]) -> torch.Tensor:
    """The matrix of a layer after steps with these gradients."""
    for gradient in gradients:
        model.weight.grad, model.bias.grad = gradient.clone(), gradient[0].clone()
        optimizer.step()
    return model.weight.detach()


def gradients(count: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    common = torch.randn(96, 96, generator=draw)
    return [common + torch.randn(96, 96, generator=draw) for _ in range(count)]


def test_the_names_are_those_of_transformers():
    from transformers.training_args import OptimizerNames

    theirs = {each.value for each in OptimizerNames}
    ours = {*OPTIMISERS, *optimisers.ALIASES} - {"auto", "adamw_torch_foreach"}
    assert ours <= theirs
    assert config_of("adamw_8bit").train.optim == EIGHT
    with pytest.raises(
        UserError, match="train.optim='lion_8bit': input should be 'auto', 'adamw_torch'"
    ):
        config_of("lion_8bit")


@pytest.mark.parametrize(
    "name, fused, foreach",
    [("auto", None, None), ("adamw_torch", None, None), ("adamw_torch_fused", True, None),
     ("adamw_torch_foreach", None, True)],
)  # fmt: skip
@pytest.mark.parametrize("stage, finite", [(0, True), (2, False)])
def test_torchs_adamw_by_name(name, fused, foreach, stage, finite):
    model, plain = module(), module()
    optimizer = build_optimizer(config_of(name, stage), model)
    assert (optimizer.defaults["fused"], optimizer.defaults["foreach"]) == (fused, foreach)
    assert isinstance(optimizer, FiniteStep) is finite
    expected = after(
        torch.optim.AdamW(plain.parameters(), 0.05, weight_decay=0), plain, gradients(4)
    )
    torch.testing.assert_close(
        after(optimizer, model, gradients(4)), expected, rtol=1e-5, atol=1e-6
    )
    assert "zero_allow_untested_optimizer" not in deepspeed_config(config_of(name, stage), 1, 1)


def test_what_cannot_be_honoured_is_told(monkeypatch):
    found = importlib.util.find_spec
    here = {"bitsandbytes": True}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: here[name] if name in here else found(name)
    )
    for name, each in OPTIMISERS.items():
        if each.paged:
            with pytest.raises(UserError, match=f"train.optim={name} cannot.*no GPU"):
                check_optim(config_of(name), CPU)
        check_optim(config_of(name), GPU)
    check_optim(config_of(EIGHT), CPU)
    with pytest.raises(
        UserError, match=f"train.optim={EIGHT} cannot.*parallel.offload_optimizer=cpu"
    ):
        check_optim(config_of(EIGHT, 2, parallel={"offload_optimizer": "cpu"}), GPU)
    with pytest.raises(UserError, match="train.optimizer_from=c: .*remove one"):
        check_optim(config_of(EIGHT, train={"optimizer_from": "c"}), GPU)
    here["bitsandbytes"] = None
    check_optim(config_of("adamw_torch_fused"), CPU)
    with pytest.raises(UserError, match="pip install bitsandbytes, or set train.optim=auto"):
        check_optim(config_of(EIGHT), GPU)


def test_the_plan_of_memory_counts_the_bytes_of_its_states():
    sizes = Sizes(parameters=1000, trainable=1000, gathered=10, head_bytes=1)

    def states(name: str, stage: int) -> float:
        lines = memory(config_of(name, stage), sizes, 1)
        return next(line.device for line in lines if line.what == "optimiser states")

    assert (states("auto", 0), states("auto", 1)) == (8000, 12000)
    assert (states(EIGHT, 0), states(EIGHT, 1)) == (2031.25, 6031.25)
    assert states("paged_adamw_32bit", 2) == 12000


@has_bitsandbytes
@pytest.mark.parametrize("stage", [0, 1])
def test_eight_bits_follow_adamw(stage):
    model, plain = module(), module()
    optimizer = build_optimizer(config_of(EIGHT, stage), model)
    before = model.weight.detach().clone()
    expected = after(
        torch.optim.AdamW(plain.parameters(), 0.05, weight_decay=0), plain, gradients(10)
    )
    moved = after(optimizer, model, gradients(10))
    state = optimizer.state[model.weight]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    error, way = (moved - expected).norm(), (expected - before).norm()
    assert 0 < error < 0.05 * way
    assert deepspeed_config(config_of(EIGHT, stage), 1, 1)["zero_allow_untested_optimizer"] is True


@has_bitsandbytes
def test_eight_bits_leave_out_a_step_that_is_not_finite():
    model = module()
    optimizer = build_optimizer(config_of(EIGHT), model)
    optimizer.limit = 3
    kept = after(optimizer, model, gradients(2)).clone()
    state = {
        key: torch.clone(each)
        for key, each in optimizer.state[model.weight].items()
        if torch.is_tensor(each)
    }
    after(optimizer, model, [torch.full((96, 96), torch.nan)])
    assert optimizer.skipped and torch.equal(model.weight, kept)
    assert all(torch.equal(optimizer.state[model.weight][key], each) for key, each in state.items())
    assert not torch.equal(after(optimizer, model, gradients(1)), kept)


@has_bitsandbytes
@pytest.mark.processes
@pytest.mark.slow
def test_runs_with_eight_bits_resume_bit_for_bit(tmp_path):
    """Not at another stage, nor with other states."""
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 20)
    base = run_tree(tmp_path, max_steps=3, micro_batch_size=2, save_steps=2, optim=EIGHT)
    whole, model = tmp_path / "whole", base["model"] | {"dtype": "bf16"}
    tree = changed(base, whole, model=model, parallel={"zero_stage": 2})
    again = changed(tree, tmp_path / "again")
    again["train"]["resume_from_checkpoint"] = str(whole / "checkpoint-2")
    ranks.train([tree, again], 2)
    files = [folder / "final" / "model.safetensors" for folder in (whole, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    file = next((whole / "checkpoint-2" / "engine").glob("*zero_pp_rank_0*optim_states.pt"))
    states = read_tree(file)["optimizer_state_dict"]["base_optimizer_state"]["state"]
    theirs = [each["__bnb_optimizer_quant_state__"] for each in states.values()]
    assert theirs[0]["state1"].dtype == torch.uint8 and theirs[0]["state1"].numel() > 4096
    again["train"]["optim"] = "auto"
    assert f"train.optim was '{EIGHT}' and is 'adamw'" in ranks.refusal(again, 2)
    again["train"]["optim"] = EIGHT
    again["parallel"]["zero_stage"] = 3
    assert f"the states of train.optim={EIGHT} do not go to others" in ranks.refusal(again, 2)
