"""ZeRO++ and NVMe: what is asked for is passed on, or refused by name before anything is loaded."""

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.training import zero_checks
from dpo_fast.training.config import build_config
from dpo_fast.training.engine import deepspeed_config, reference_config, zero_config
from dpo_fast.training.zero_checks import check_zero
from tests.support import ranks
from tests.support.models import changed, run_tree, write_model, write_pairs


def config_of(folder, **parallel):
    return build_config(run_tree(folder) | {"parallel": parallel}, "tree")


REFUSED = {  # options of parallel: what is said of them
    "a stage below": (
        {"zero_stage": 2, "zero_hpz_partition_size": 2},
        "parallel.zero_hpz_partition_size=2 needs parallel.zero_stage=3 or more; it is 2",
    ),
    "weights below": (
        {"zero_stage": 0, "zero_quantized_weights": True},
        "parallel.zero_quantized_weights=true needs parallel.zero_stage=3",
    ),
    "states in files below": (
        {"zero_stage": 2, "offload_optimizer": "nvme", "nvme_path": "disk"},
        "parallel.offload_optimizer=nvme needs parallel.zero_stage=3",
    ),
    "no folder": (
        {"offload_parameters": "nvme"},
        "parallel.offload_parameters=nvme needs parallel.nvme_path",
    ),
    "an unused folder": (
        {"offload_optimizer": "cpu", "nvme_path": "disk"},
        "parallel.nvme_path=disk is not used",
    ),
    "copies of files": (
        {"offload_parameters": "nvme", "nvme_path": "disk", "zero_hpz_partition_size": 2},
        "parallel.zero_hpz_partition_size=2 keeps a second copy",
    ),
    "another word": (
        {"offload_optimizer": "disk"},
        "parallel.offload_optimizer='disk': input should be False, True, 'cpu'",
    ),
    "a number": ({"offload_optimizer": 1}, "parallel.offload_optimizer=1: expected true or false"),
    "no ranks": ({"zero_hpz_partition_size": 0}, "parallel.zero_hpz_partition_size=0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_section_refuses(tmp_path, name):
    parallel, told = REFUSED[name]
    with pytest.raises(UserError, match=f"tree: {told}"):
        config_of(tmp_path, **parallel)


def test_true_is_cpu_memory_and_files_have_a_folder(tmp_path):
    for value in (True, "cpu"):
        zero = zero_config(config_of(tmp_path, offload_optimizer=value))
        assert zero["offload_optimizer"]["device"] == "cpu" and zero["stage"] == 2
    for option, name in (("offload_optimizer",) * 2, ("offload_parameters", "offload_param")):
        zero = zero_config(config_of(tmp_path, **{option: "nvme", "nvme_path": "~/disk"}))
        assert zero["stage"] == 3 and zero[name]["device"] == "nvme"
        assert "/disk/dpo_fast-" in zero[name]["nvme_path"] and "~" not in zero[name]["nvme_path"]


def test_what_is_asked_for_reaches_deepspeed_and_makes_it_stage_3(tmp_path):
    assert "zero_hpz_partition_size" not in zero_config(config_of(tmp_path))
    options = {"zero_hpz_partition_size": 4, "zero_quantized_weights": True}
    options["zero_quantized_gradients"] = True
    for name, value in options.items():
        config = config_of(tmp_path, **{name: value})
        zero = zero_config(config)
        assert (zero[name], zero["stage"]) == (value, 3)
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    whole = dict.fromkeys((*names, "bf16", "steps_per_print", "timers"), 1)
    frozen = reference_config(config, whole | {"zero_optimization": zero})["zero_optimization"]
    assert "zero_quantized_gradients" not in frozen  # it has no gradients


def test_a_reference_that_follows_needs_the_parameters_in_memory(tmp_path):
    files = {"offload_parameters": "nvme", "nvme_path": "disk"}
    tree = run_tree(tmp_path) | {"parallel": files, "reference": {"provider": "ema"}}
    with pytest.raises(UserError, match="offload_parameters=nvme, but reference.provider=ema"):
        build_config(tree, "tree")
    config = build_config(tree | {"reference": {"provider": "frozen"}}, "tree")
    whole = deepspeed_config(config, 1, 1)
    assert reference_config(config, whole)["zero_optimization"]["offload_param"]["device"] == "cpu"


def test_deepspeeds_own_section_may_say_it_too_and_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    own = {"zero_optimization": {"zero_hpz_partition_size": 3}}
    with pytest.raises(UserError, match="zero_hpz_partition_size=3 does not divide the 4 ranks"):
        check_zero(config_of(tmp_path, zero_stage=3, deepspeed=own))
    with pytest.raises(UserError, match="contradicts 2"):
        zero_config(config_of(tmp_path, zero_hpz_partition_size=2, deepspeed=own))


@pytest.mark.parametrize(
    ("count", "size", "told"), [(6, 4, "set it to 2 or 3 or 6"), (1, 2, "remove")]
)
def test_copies_must_divide_the_ranks(tmp_path, monkeypatch, count, size, told):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    with pytest.raises(UserError, match=f"zero_hpz_partition_size={size} does not divide.*{told}"):
        check_zero(config_of(tmp_path, zero_stage=3, zero_hpz_partition_size=size))
    monkeypatch.setenv("WORLD_SIZE", str(size * 2))
    check_zero(config_of(tmp_path, zero_stage=3, zero_hpz_partition_size=size))


def on_gpus(monkeypatch, count: int, world: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(zero_checks, "missing_op", lambda builder: None)
    monkeypatch.setenv("WORLD_SIZE", str(world))


@pytest.mark.parametrize("option", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_what_needs_a_gpu_is_refused_without_one(tmp_path, monkeypatch, option):
    config = config_of(tmp_path, zero_stage=3, **{option: True})
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(UserError, match=f"parallel.{option}=true: DeepSpeed has it for GPUs only"):
        check_zero(config)
    on_gpus(monkeypatch, 8, 16)
    check_zero(config)
    monkeypatch.setattr(zero_checks, "missing_op", lambda builder: "no nvcc")
    with pytest.raises(UserError, match=f"parallel.{option}=true needs .* nvcc: no nvcc"):
        check_zero(config)


@pytest.mark.parametrize("world", [8, 4, 12])
def test_quantised_gradients_need_whole_machines(tmp_path, monkeypatch, world):
    on_gpus(monkeypatch, 8, world)
    config = config_of(tmp_path, zero_stage=3, zero_quantized_gradients=True)
    with pytest.raises(UserError, match=f"two or more machines, and there are {world} ranks"):
        check_zero(config)


def test_files_need_a_library_and_a_folder_that_can_be_written(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    options = {"offload_optimizer": "nvme", "nvme_path": str(file / "disk")}
    monkeypatch.setattr(zero_checks, "missing_op", lambda builder: "no libaio")
    with pytest.raises(
        UserError, match="offload_optimizer=nvme needs DeepSpeed's async_io.*no libaio"
    ):
        check_zero(config_of(tmp_path, **options))
    monkeypatch.setattr(zero_checks, "missing_op", lambda builder: None)
    with pytest.raises(
        UserError, match="parallel.nvme_path=.*/file is no folder that can be written"
    ):
        check_zero(config_of(tmp_path, **options))
    check_zero(config_of(tmp_path, **options | {"nvme_path": str(tmp_path / "disk")}))
    assert not (tmp_path / "disk").exists()  # the doctor looks, too


def test_an_extension_that_is_not_there_is_told():
    if torch.cuda.is_available():
        pytest.skip("a GPU may have it")
    assert "Quantizer" in zero_checks.missing_op("QuantizerBuilder")


@pytest.mark.processes
def test_copies_among_ranks_change_no_number(tmp_path):
    """hpZ: losses and gradients, also of LoRA and beside a frozen model, and in a checkpoint's run."""
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 16)
    base = run_tree(tmp_path, max_steps=3, micro_batch_size=2, global_batch_size=8)
    none_small = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    lora = base["model"] | {"lora": {"r": 2, "alpha": 4}}
    frozen = {"provider": "frozen", "path": str(tmp_path / "model")}
    kinds = {"full": {}, "lora": {"model": lora}, "frozen": {"reference": frozen}}
    trees = {}
    for copies in (1, 2):  # the last has none again: nothing of the groups may stay
        for kind, sections in kinds.items():
            parallel = {"zero_stage": 3, "deepspeed": none_small}
            parallel["zero_hpz_partition_size"] = copies
            name = f"{kind} {copies}"
            trees[name] = changed(base, tmp_path / name, parallel=parallel, **sections)
    trees["full again 1"] = trees["full 1"]
    found = ranks.first_steps(dict(reversed(trees.items())), 2)
    for name, (loss, gradients) in found.items():
        plain_loss, plain = found[f"{name.split()[0]} 1"]
        assert loss == plain_loss and gradients and gradients.keys() == plain.keys()
        assert all(torch.equal(gradients[key], plain[key]) for key in plain), name
