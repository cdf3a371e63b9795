"""What the doctor says: of the machine, and of a run before it begins."""

import json
import re

import pytest
import yaml

pytest.importorskip("transformers")

from rich.console import Console, ConsoleDimensions
from typer.testing import CliRunner

from dpo_fast.cli import app
from dpo_fast.cli.doctor_layouts import facts, read_model
from dpo_fast.cli.doctor_run import decisions, look
from dpo_fast.errors import UserError
from dpo_fast.references import ReferenceModel
from dpo_fast.training import distributed
from dpo_fast.training.config import build_config
from dpo_fast.training.memory import Sizes, in_units, memory
from tests.support.models import run_tree, write_model, write_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models whose weights cannot be read, and no data at all: the doctor asks for neither."""
    folder = tmp_path_factory.mktemp("doctor")
    for name in ("model", "reference-model"):
        write_model(folder / name)
        (folder / name / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Nothing may join a process group, and --nproc must not outlive a test."""
    refuse = lambda *_: pytest.fail("a process group was made")  # noqa: E731
    monkeypatch.setattr(distributed, "init_distributed", refuse)
    monkeypatch.setenv("WORLD_SIZE", "1")
    # Whatever another test has made of the terminal: nothing wraps.
    monkeypatch.setattr(Console, "size", property(lambda self: ConsoleDimensions(250, 50)))


def table(folder, **sections) -> dict[str, tuple[str, str, str]]:
    """value, from and why of each choice."""
    tree = run_tree(folder)
    for name, options in sections.items():
        tree[name] = tree.get(name, {}) | options
    return {row.what: row[1:] for row in decisions(look(build_config(tree, "tree")))}


def invoke(*arguments):
    return CliRunner().invoke(app.app, list(map(str, arguments)))


def write(folder, **train):
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run_tree(folder, **train)))
    return file


def test_the_machine():
    result = invoke("doctor")
    assert result.exit_code == 0
    for word in ("torch", "deepspeed", "linear_logp", "cpu", "attention, packed", "liger-kernel"):
        assert word in result.output
    assert "This run would use" not in result.output


def test_plugins_of_installed_packages_are_listed(tmp_path, monkeypatch):
    assert "Plugins" not in invoke("doctor").output
    info = tmp_path / "theirs-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[dpo_fast.losses]\nwide = theirs:wide\n"
        "[dpo_fast.callbacks]\nstop = theirs:Stop\n[dpo_fast.samplers]\ngone = theirs:gone\n"
    )
    source = "from dpo_fast import Callback\nwide = lambda logps, options: logps.chosen\n"
    (tmp_path / "theirs.py").write_text(source + "class Stop(Callback):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = json.loads(invoke("doctor", "--json").output)["plugins"]
    assert [list(each.values()) for each in found[:2]] == [
        ["loss.type", "wide", "theirs:wide", "theirs 1.2", "loads"],
        ["train.callbacks", "stop", "theirs:Stop", "theirs 1.2", "loads"],
    ]
    assert found[2]["state"].startswith("train.sampler=gone cannot be loaded: AttributeError")
    assert "theirs:Stop" in invoke("doctor").output


def test_a_run_needs_no_weight_no_data_and_no_folder(folder):
    output = folder / "never"
    result = invoke("doctor", write(folder, output_dir=str(output)), "--nproc", "2")
    assert result.exit_code == 0, result.exception
    for words in ("This run would use", "shared_prefix", "sharded over 2 ranks", "/ 2 ranks"):
        assert words in result.output
    assert not output.exists()


def test_defaults_are_told_from_options(folder):
    found = table(folder)
    assert found["layout"][:2] == ("shared_prefix", "default")
    assert found["dtype"][:2] == ("fp32", "option")
    assert found["micro-batch"][:2] == ("4 pairs", "option")
    assert found["activation checkpointing"][:2] == ("off", "default")
    assert found["reference"][:2] == ("cached", "default")
    assert found["ZeRO stage"] == (
        "0",
        "default",
        "nothing sharded over 1 rank: one rank has nothing to shard",
    )
    assert found["head's plan"][0].startswith("keep: 3.00 GEMMs, 1016 tokens kept")
    tree = run_tree(folder)
    del tree["train"]["micro_batch_size"]
    found = {row.what: row[1:] for row in decisions(look(build_config(tree, "tree")))}
    assert found["micro-batch"][:2] == ("4 pairs", "default")


def test_how_many_completions_a_group_has_is_not_known(folder):
    pairs = table(folder)["head's plan"][2]
    assert pairs == f"{2 * 4 * 127} scored tokens in a micro-batch, at most"
    groups = table(folder, loss={"type": "grpo"})["head's plan"][2]
    assert groups == f"{8 * 4 * 127} scored tokens in a micro-batch, if groups have 8 completions"
    budget = {"micro_batch_size": None, "tokens_per_batch": 512}
    found = table(folder, loss={"type": "grpo"}, train=budget)["head's plan"][2]
    assert found == "512 scored tokens in a micro-batch, at most"


def test_options_show(folder):
    found = table(
        folder,
        model={"lora": {"r": 2}, "checkpoint_layers": [1], "torch_compile": True},
        train={"layout": "padded", "implementation": "torch", "workspace_bytes": 0},
        reference={"provider": "adapter_off"},
        parallel={"zero_stage": 2, "offload_optimizer": True},
    )
    assert found["layout"] == ("padded", "option", "train.layout says so")
    assert found["attention"][0] == "sdpa"
    assert found["head"] == ("torch", "option", "asked for by name")
    assert found["head's plan"][0].startswith("frozen: 2.00 GEMMs")
    assert found["activation checkpointing"][:2] == ("layer 1 of 2", "option")
    assert found["torch.compile"] == ("on", "option", "blocks of 2 layers")
    assert found["LoRA"] == ("r 2", "option", "1,856 of 34,080 are trained")
    assert "no second copy" in found["reference"][2]
    assert found["offload of optimiser"] == ("on", "option", "in CPU memory")
    assert found["offload of parameters"] == ("off", "default", "on the device (cpu)")


def test_where_a_second_model_lives(folder):
    path = str(folder / "reference-model")
    frozen = {"provider": "frozen", "path": path}
    assert (
        "sharded over 1 rank, off"
        in table(folder, reference=frozen | {"offload": True})["reference"][2]
    )
    stage = {"zero_stage": 1}
    assert "whole on every rank" in table(folder, reference=frozen, parallel=stage)["reference"][2]
    assert (
        "computed once by a second model" in table(folder, reference={"path": path})["reference"][2]
    )


def test_what_wrote_the_completions_is_told(folder, tmp_path):
    stored = {"provider": "cached", "per_token": True}
    grpo, divergence = {"type": "grpo"}, {"type": "grpo", "grpo_beta": 0.1}
    assert "old log-probs" not in table(folder, loss={"type": "plackett_luce"})
    own = table(folder, loss=grpo)["old log-probs"]
    assert own[1:] == (
        "default",
        "computed once by the policy as it starts; then read from a table",
    )
    assert table(folder, loss=divergence, reference=stored)["old log-probs"][2].endswith("serves")
    path = str(write_model(tmp_path / "old", vocab=1000))
    found = table(folder, loss=divergence, reference=stored | {"old_path": path})
    assert path in found["old log-probs"][2]
    assert "by the policy as it starts" in found["reference"][2]
    tree = run_tree(folder) | {"loss": grpo, "reference": {"old_path": path}}
    outlook = look(build_config(tree, "tree"))
    lines = {line.what: line.device for line in memory(outlook.config, outlook.sizes, 1)}
    assert lines["reference.old_path, before training"] > lines["weights"]
    assert "reference model, before training" not in lines


@pytest.mark.parametrize(("loss", "option"), [("grpo", "old_path"), ("plackett_luce", "path")])
def test_a_second_model_with_too_small_a_vocabulary(folder, tmp_path, loss, option):
    path = str(write_model(tmp_path / "small", vocab=100))
    with pytest.raises(UserError, match=f"vocabulary of 100.*reference.{option}"):
        table(folder, loss={"type": loss}, reference={option: path})


MISTAKES = [
    "model.path=./no-such",
    "train.global_batch_size=7",
    "model.attention=flash_attention_2",
    "model.checkpoint_layers=3",
    "parallel={zero_stage: 1, offload_optimizer: true}",
    "reference.offload=true",
    "parallel={zero_stage: 2, offload_parameters: true}",
]


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_told_as_train_tells_it(folder, tmp_path, override):
    file = write(folder, output_dir=str(folder / "never"))
    data = write_pairs(tmp_path / "pairs.jsonl", 2)  # train looks for the data first
    words = (file, override, f"data.train={data}")
    doctor, train = (invoke(command, *words) for command in ("doctor", "train"))
    assert isinstance(doctor.exception, UserError)
    assert str(doctor.exception) == str(train.exception)
    assert not (folder / "never").exists()


def test_a_contradiction_with_deepspeeds_section_is_told(folder):
    with pytest.raises(UserError, match="parallel.deepspeed.gradient_clipping=3 contradicts"):
        table(folder, parallel={"deepspeed": {"gradient_clipping": 3}})


SECOND = {ReferenceModel(None, "reference.path"): 600}
SIZES = Sizes(parameters=1000, trainable=800, gathered=100, head_bytes=7, second_models=SECOND)


@pytest.mark.parametrize(
    ("dtype", "parallel", "expected"),
    [  # weights, gathered, gradients, optimiser, reference: bytes on the device and in CPU memory
        ("bf16", {"zero_stage": 0}, [(2000, 0), (1600, 0), (9600, 0), (1200, 0)]),
        ("fp32", {"zero_stage": 0}, [(4000, 0), (3200, 0), (6400, 0), (2400, 0)]),
        ("bf16", {"zero_stage": 1}, [(2000, 0), (3200, 0), (2400, 0), (1200, 0)]),
        ("bf16", {"zero_stage": 2}, [(2000, 0), (800, 0), (2400, 0), (1200, 0)]),
        ("bf16", {"zero_stage": 3}, [(500, 0), (200, 0), (800, 0), (2400, 0), (300, 0)]),
        (
            "bf16",
            {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
            [(0, 500), (200, 0), (0, 800), (0, 2400), (0, 300)],
        ),
        (  # both models once more in every two ranks
            "bf16",
            {"zero_stage": 3, "zero_hpz_partition_size": 2},
            [(500, 0), (200, 0), (800, 0), (2400, 0), (300, 0), (1600, 0)],
        ),
    ],
)
def test_memory_of_a_rank(folder, dtype, parallel, expected):
    tree = run_tree(folder) | {"parallel": parallel, "reference": {"provider": "frozen"}}
    tree["model"]["dtype"] = dtype
    lines = memory(build_config(tree, "tree"), SIZES, ranks=4)
    assert [(line.device, line.host) for line in lines] == [*expected, (7, 0)]


def test_units():
    assert [in_units(size) for size in (0, 2048, 3 << 20, 5 << 29)] == [
        "-",
        "2 KiB",
        "3.0 MiB",
        "2.5 GiB",
    ]


def test_what_ranks_exchange_is_told(folder, monkeypatch):
    result = invoke("doctor", write(folder), "--nproc", "2")
    assert result.exit_code == 0, result.exception
    for words in ("Communication of a step", "all-gather", "reduce-scatter", "a rank sends"):
        assert words in result.output
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "Communication" not in invoke("doctor", write(folder)).output


def test_when_zero_plus_plus_pays_is_told_with_the_runs_numbers(folder, monkeypatch):
    assert "ZeRO++ hpZ" not in table(folder)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    small = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    batch = {"global_batch_size": 64, "micro_batch_size": 2}
    found = table(folder, parallel={"deepspeed": small}, train=batch)
    assert found["ZeRO++ hpZ"][:2] == ("off", "default")
    assert "with groups of 8 ranks" in found["ZeRO++ hpZ"][2]
    assert "rounded to 8 bits" in found["ZeRO++ qwZ"][2]
    found = table(folder, parallel={"zero_hpz_partition_size": 4}, train=batch)
    assert found["ZeRO++ hpZ"][:2] == ("4 ranks", "option")
    assert found["ZeRO++ qgZ"][:2] == ("off", "default")


def test_states_in_files_are_in_no_memory(folder, tmp_path, monkeypatch):
    from dpo_fast.training import zero_checks

    monkeypatch.setattr(zero_checks, "missing_op", lambda builder: None)
    files = {"offload_optimizer": "nvme", "nvme_path": str(tmp_path)}
    found = table(folder, parallel=files)
    assert found["offload of optimiser"][0] == "on"
    assert str(tmp_path) in found["offload of optimiser"][2]
    assert "read and written in every step" in found["NVMe"][2]
    config = build_config(run_tree(folder) | {"parallel": files}, "tree")
    lines = {x.what: x for x in memory(config, Sizes(10, 10, 10, 0), 1)}
    states = lines["optimiser states"]
    assert (states.device, states.host) == (0, 0) and "in files" in states.how


@pytest.fixture(scope="module")
def blocked(tmp_path_factory):
    """A model whose layers carry a state that nothing here serves, and no file of weights."""
    import transformers

    folder = tmp_path_factory.mktemp("blocked")
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 4}
    transformers.RwkvConfig(**sizes).save_pretrained(folder)
    return folder


def test_the_layouts_of_a_model_alone(blocked):
    result = invoke("doctor", "--model", blocked, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert {"software", "hardware", "implementations", "layouts", "layers", "models"} <= set(found)
    (told,) = found["models"].values()
    assert told == facts(read_model(str(blocked)))
    assert told["layouts"] == {"padded": True, "packed": False, "shared_prefix": False}
    assert told["auto"] == "padded" and told["beside_attention"] == []
    assert [layer["index"] for layer in told["in_the_way"]] == [0, 1, 2, 3]
    assert told["in_the_way"][2] == {
        "index": 2,
        "kind": "recurrent",
        "name": "rwkv.blocks.2.attention",
        "type": "RwkvSelfAttention",
        "does": "carry state along the tokens",
    }
    assert found["layouts"][1]["allowed"] == "no" and told["obstacle"] == found["layouts"][1]["why"]
    result = invoke("doctor", "--model", blocked)
    assert result.exit_code == 0
    for words in ("0-3", "recurrent", "rwkv.blocks.0.attention", "RwkvSelfAttention"):
        assert words in result.output
    assert "auto takes it" in result.output


def test_the_layouts_of_a_run_are_told_as_train_tells_them(folder, tmp_path, blocked):
    result = invoke("doctor", write(folder, output_dir=str(tmp_path / "never")), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    told = found["models"]["model.path"]
    assert all(told["layouts"].values()) and told["obstacle"] is None and not told["in_the_way"]
    assert "layers" not in found and {"run", "memory"} <= set(found)
    (layout,) = [line for line in found["run"] if line["choice"] == "layout"]
    assert layout["value"] == told["auto"] == "shared_prefix"

    write_model(tmp_path / "model", vocab=400)
    for file in blocked.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    result = invoke("doctor", write(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    (layout,) = [line for line in found["run"] if line["choice"] == "layout"]
    obstacle = found["models"]["model.path"]["obstacle"]
    assert layout["value"] == "padded" and layout["why"].endswith(obstacle)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["CONFIG", "--plan", "--json"], "--plan prints a table .* leave out --json"),
        (["CONFIG", "--model", "MODEL"], "--model is for a model alone"),
        (["--model", "nowhere/at/all"], "--model=nowhere/at/all"),
    ],
)
def test_what_does_not_go_together(folder, arguments, told):
    places = {"CONFIG": write(folder), "MODEL": folder / "model"}
    result = invoke("doctor", *(places.get(each, each) for each in arguments))
    assert isinstance(result.exception, UserError) and re.search(told, str(result.exception))
