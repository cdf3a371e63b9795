"""All trainers: their tables, files that they name, and that nothing is lost in silence."""

import json

import pytest
import yaml

pytest.importorskip("pydantic")

from dpo_fast.errors import UserError
from dpo_fast.migration.draft import CARRIED, LOST, NEEDLESS, our_default
from dpo_fast.migration.files import beside, read_mapping
from dpo_fast.migration.importers import IMPORTERS, check, import_file, lost
from dpo_fast.migration.option import flag, listed, plain
from dpo_fast.migration.yaml_file import text_of
from dpo_fast.training.config import build_config, load_config

SECTIONS = {"model", "parallel", "model.lora"}
EVERY = [(kind, name) for kind, each in IMPORTERS.items() for name in each.tables]
LEAST = {
    "trl": {"model_name_or_path": "m", "dataset_name": "org/data"},
    "llamafactory": {"model_name_or_path": "m", "dataset": "org/data", "dataset_dir": "ONLINE"},
    "openrlhf": {"pretrain": "m", "dataset": "org/data"},
    "axolotl": {
        "base_model": "m",
        "datasets": [{"path": "org/data", "type": "chat_template.default"}],
        "learning_rate": 1e-6,
        "micro_batch_size": 2,
        "rl": "dpo",
    },
}


def imported(tmp_path, kind: str, method: str | None = None, **options):
    file = tmp_path / "theirs.json"
    reward = {"reward_funcs": ["accuracy_reward"]} if method == "grpo" else {}
    rl = {"rl": None if method == "sft" else method} if kind == "axolotl" else {}
    names = IMPORTERS[kind].names(method) if kind == "axolotl" and method else {}
    given = {names.get(name, name): value for name, value in (reward | options).items()}
    file.write_text(json.dumps(LEAST[kind] | rl | given))
    return import_file(kind, file, method)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_key_of_a_table_is_one_of_ours_and_every_other_option_says_why(kind, name):
    for option in IMPORTERS[kind].tables[name].values():
        for key in filter(None, option.here.split(", ")):
            if key not in SECTIONS:
                our_default(key)
        assert option.here or option.note, option.name
        assert not option.joint or not option.lost


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_the_least_that_a_file_may_have_gives_a_run(tmp_path, kind, name):
    stage = {"stage": name} if kind == "llamafactory" else {}
    draft = imported(tmp_path, kind, name, **stage)
    assert check(draft) is None
    text = text_of(draft, "run.yaml")
    assert yaml.safe_load(text) == draft.tree(), "comments do not change what the file says"
    if draft.rounds:
        assert "org/data" in str(draft.tree()["stages"])
        return
    (tmp_path / "run.yaml").write_text(text)
    run = load_config(str(tmp_path / "run.yaml"))
    assert run.model.path == "m" and "org/data" in str(run.data.train)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_defaults_that_are_written_out_differ_from_ours(tmp_path, kind, name):
    draft = imported(tmp_path, kind, name)
    defaults = {k: e for k, e in draft.keys.items() if "'s default of" in e.comment}
    assert len(defaults) > 3
    for key, entry in defaults.items():
        assert entry.value != our_default(key), key


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_option_that_is_given_is_accounted_for(tmp_path, kind, name):
    """Whatever is in a table, with a value that is not its default: it is carried, spared or lost.

    What goes somewhere is given by itself, since it may be of no use beside others; the rest together.
    """
    options = IMPORTERS[kind].tables[name].values()
    values = {
        each.name: _value(each)
        for each in options
        if each.name not in (*LEAST[kind], "rl") and (each.name != "reward_funcs")
    }
    alone = {each.name for each in options if each.here and not each.lost}
    together = {n: value for n, value in values.items() if n not in alone}
    counts = {CARRIED: 0, NEEDLESS: 0, LOST: 0}
    for given in (together, *({n: values[n]} for n in values if n in alone)):
        draft = imported(tmp_path, kind, name, **given)
        fates = {fate.name: fate for fate in draft.fates}
        for option in given:
            found = fates.get(draft.written.get(option, option))
            assert found is not None, option
            counts[found.what] += 1
            lost = IMPORTERS[kind].tables[name][option].loses(given[option])
            assert found.what == LOST or not lost, option
        assert check(draft) is None, (given, check(draft))
    assert all(counts.values()), counts


def _value(option):
    value = 1 if option.default in (None, False, 0, 0.0) else option.default
    return VALUES.get(option.name, list(value) if isinstance(value, tuple) else value)


VALUES = {  # for the test above, where 1 or the default is none
    **dict.fromkeys(("reward_model", "process_reward_model", "pretrain_mode"), False),
    **dict.fromkeys(("pretraining_dataset",), [{"path": "org/texts"}]),
    **dict.fromkeys(("lora_rank_pattern", "lora_alpha_pattern"), {}),
    **dict.fromkeys(("excess_length_strategy",), "truncate"),
    **dict.fromkeys(("input_key", "output_key", "label_key"), "column"),
    **dict.fromkeys(("evaluation_strategy",), "steps"),
    **dict.fromkeys(("plugins",), ["a.b"]),
    **dict.fromkeys(("eval_strategy", "save_strategy", "evaluation_strategy"), "steps"),
    **dict.fromkeys(("output_dir", "save_path", "run_name", "wandb_run_name", "wandb_name"), "x"),
    **dict.fromkeys(
        ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"), ["a"]
    ),
    **dict.fromkeys(
        ("lr_scheduler_kwargs", "chat_template_kwargs", "trl.chat_template_kwargs"), {}
    ),
    **dict.fromkeys(("reward_funcs",), ["accuracy_reward"]),
    "max_seq_length": 64,
    **dict.fromkeys(("min_p", "delta", "epsilon_high"), 0.3),
    **dict.fromkeys(("datasets", "test_datasets"), [{"path": "org/other"}]),
    **dict.fromkeys(("deepspeed", "fsdp_config", "model_init_kwargs"), {}),
    **dict.fromkeys(("report_to",), "wandb"),
    **dict.fromkeys(("metric_for_best_model",), "loss"),
    **dict.fromkeys(("resume_from_checkpoint",), "true"),
    **dict.fromkeys(("model_revision", "revision_of_model"), "v1"),
    **dict.fromkeys(("adapter",), "lora"),
    **dict.fromkeys(("attn_implementation",), "sdpa"),
    **dict.fromkeys(("dpo_loss_type",), ["sigmoid"]),
    **dict.fromkeys(("interleave_probs", "dataset_probs"), "1.0"),
    **dict.fromkeys(("pref_loss",), "hinge"),
    **dict.fromkeys(("loss_weights", "dpo_loss_weights"), [1.0]),
    **dict.fromkeys(("eval_dataset",), "org/held"),
    **dict.fromkeys(("dataset_config",), "c"),
    **dict.fromkeys(
        ("adapter_name_or_path", "lora_model_dir", "ref_model", "ref_pretrain"), "other"
    ),
    **dict.fromkeys(("tokenizer_config",), "other"),
    **dict.fromkeys(("chat_template_jinja",), "own.jinja"),
    **dict.fromkeys(("prompt_key",), "ask"),
    **dict.fromkeys(("dataset_dir",), "ONLINE"),
    **dict.fromkeys(("streaming", "dataset_streaming"), False),
    **dict.fromkeys(("zpg",), 1),
    **dict.fromkeys(("resume_from_checkpoint",), "ckpt"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), "linear"),
    **dict.fromkeys(("disable_dropout",), True),
    **dict.fromkeys(("stage",), "dpo"),
    **dict.fromkeys(("optim",), "adamw_torch"),
    **dict.fromkeys(("ring_attn_size", "context_parallel_size", "sequence_parallel_degree"), 2),
    **dict.fromkeys(("label_smoothing", "dpo_label_smoothing"), 0.1),
    **dict.fromkeys(("ld_alpha",), 0.5),
    **dict.fromkeys(("min_lr_ratio", "cosine_min_lr_ratio"), 0.1),
    **dict.fromkeys(("test_split_size", "val_size", "val_set_size"), 0.1),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), 0.9),
    **dict.fromkeys(("gradient_checkpointing",), True),
    **dict.fromkeys(("max_prompt_len", "max_prompt_length"), 64),
    **dict.fromkeys(("lora_dropout",), 0.1),
    **dict.fromkeys(("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_swiglu"), True),
    **dict.fromkeys(("reference_free",), True),
    **dict.fromkeys(("merge_lora",), False),
    **dict.fromkeys(("warmup_ratio",), 0.2),
    **dict.fromkeys(("trust_remote_code",), True),
    **dict.fromkeys(("torch_compile",), True),
    **dict.fromkeys(("use_liger_kernel", "enable_liger_kernel"), False),
    **dict.fromkeys(("sync_ref_model",), True),
    **dict.fromkeys(("adam_offload",), True),
    **dict.fromkeys(("logging_dir",), "x"),
    **dict.fromkeys(("additional_target",), "embed_tokens"),
    **dict.fromkeys(("batch_size",), 4),
    **dict.fromkeys(("dataset_mixer",), {"org/mixed": 1.0}),
    **dict.fromkeys(("dataset_mixture",), {"datasets": [{"id": "org/mixed"}]}),
    **dict.fromkeys(("dataset_splits",), ["train", "test"]),
    **dict.fromkeys(("dataset_configs",), ["c"]),
}


def test_the_accelerate_file_beside_says_ranks_and_stage(tmp_path):
    (tmp_path / "acc.yaml").write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 8\nmixed_precision: bf16\n"
        "deepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu, offload_param_device: none}\n"
    )
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump(LEAST["trl"] | {"per_device_train_batch_size": 2}))
    draft = import_file("trl", file, accelerate=tmp_path / "acc.yaml")
    run = build_config(draft.tree(), "test")
    assert run.train.global_batch_size == 16
    assert (run.parallel.zero_stage, run.parallel.offload_optimizer) == (3, "cpu")
    (tmp_path / "acc.yaml").write_text(
        "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {}\n"
    )
    draft = import_file("trl", file, accelerate=tmp_path / "acc.yaml")
    assert build_config(draft.tree(), "test").parallel.zero_stage == 3


def test_a_deepspeed_file_is_found_above_and_its_sizes_go_through(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "ds.json").write_text(
        json.dumps(
            {
                "train_batch_size": "auto",
                "bf16": {"enabled": "auto"},
                "fp16": {"enabled": True},
                "optimizer": {"type": "Lion"},
                "communication_data_type": "fp32",
                "zero_optimization": {
                    "stage": 3,
                    "reduce_bucket_size": 1000,
                    "stage3_prefetch_bucket_size": "auto",
                    "offload_param": {"device": "nvme", "nvme_path": "/local"},
                    "odd": 1,
                },
            }
        )
    )
    file = tmp_path / "conf" / "theirs.yaml"
    file.write_text(yaml.safe_dump(LEAST["trl"] | {"deepspeed": "ds.json"}))
    draft = import_file("trl", file)
    parallel = build_config(draft.tree(), "test").parallel
    assert (parallel.zero_stage, parallel.offload_parameters) == (3, "nvme")
    assert parallel.nvme_path == "/local"
    assert parallel.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}}
    assert {name.partition(": ")[2] for name in lost(draft)} == {
        *("fp16", "optimizer", "communication_data_type", "zero_optimization.odd")
    }


BROKEN = {
    "not YAML": ("a.yaml", "a: [1", "is not YAML"),
    "a list": ("a.yaml", "- 1", "expected sections|expected a mapping"),
    "not JSON": ("a.json", '{"a": \n nope}', "line 2 is not JSON"),
    "twice": ("a.yaml", "beta: 1\nbeta: 2", "stands twice"),
    "a number for a name": ("a.yaml", "1: 2", "1 is not the name of an option"),
    "a script of another": ("a.sh", "python other.py --x 1", "no line starts TRL"),
    "an open quote": ("a.sh", "#!/bin/sh\ntrl dpo --run_name 'x", "command of line 2 breaks off"),
    "YAML with a fault below": ("a.yaml", "a: 1\nb:\n  - [x\nc: 2\n", "line 4"),
    "nothing": ("a.yaml", "", "expected sections .names of options"),
    "bytes": ("a.yaml", b"\xff\xfe\x00", "cannot be read|not UTF-8|is not YAML"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_told_with_its_name(tmp_path, case):
    name, content, said = BROKEN[case]
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as error:
        import_file("trl", file)
    assert name in str(error.value)


def test_a_file_that_is_named_and_missing_is_told_and_the_rest_is_read(tmp_path):
    told = {
        "deepspeed": imported(tmp_path, "trl", deepspeed="no.json", beta=0.3),
        "fsdp_config": imported(
            tmp_path, "trl", fsdp="full_shard", fsdp_config="no.json", beta=0.3
        ),
        "dataset": imported(
            tmp_path, "llamafactory", dataset_dir="nowhere", pref_beta=0.3, stage="dpo"
        ),
        "train": imported(
            tmp_path, "llamafactory", dataset_dir="REMOTE:a/b", pref_beta=0.3, stage="dpo"
        ),
    }
    for name, draft in told.items():
        why = {fate.name: fate.why for fate in draft.fates if fate.what == LOST}
        name = "dataset" if name == "train" else name
        assert "there is no" in why[name] or "is on the hub (REMOTE:a/b)" in why[name], why
        assert check(draft) is None and draft.keys["loss.beta"].value == 0.3
    with pytest.raises(UserError, match="cannot be read"):
        import_file("trl", tmp_path / "none.json")
    assert beside("theirs.json", tmp_path / "x.yaml", "file", "o").name == "theirs.json"
    assert read_mapping(tmp_path / "theirs.json")


@pytest.mark.parametrize("named", ["no.yaml", "$CONFIG_THAT_NOBODY_SETS"])
def test_a_launchers_file_that_is_not_here_is_told(tmp_path, named):
    file = tmp_path / "run.sh"
    command = f"accelerate launch --config_file {named} dpo.py --model_name_or_path m"
    file.write_text(f"{command} --dataset_name d/d --beta 0.3 --output_dir o\n")
    draft = import_file("trl", file)
    why = {fate.name: fate.why for fate in draft.fates if fate.what == LOST}
    assert named in why["--config_file"] and "--accelerate" in why["--config_file"]
    assert check(draft) is None and draft.keys["loss.beta"].value == 0.3
    assert "--config_file: is" in text_of(draft, "run.yaml"), "it has no value of its own"
    with pytest.raises(UserError, match="no such configuration file"):
        import_file("trl", file, accelerate=tmp_path / named)


FSDP = {  # of transformers or of accelerate, with and without the prefix: stage, and what is offloaded
    "all": ({"fsdp_version": 1}, 3, None),
    "gradients": ({"fsdp_sharding_strategy": "SHARD_GRAD_OP"}, 2, None),
    "a number": ({"fsdp_sharding_strategy": 2}, 2, None),
    "nothing": ({"sharding_strategy": "NO_SHARD"}, 0, None),
    "version 2": ({"fsdp_version": 2, "fsdp_reshard_after_forward": False}, 2, None),
    "in memory": ({"fsdp_offload_params": True}, 3, "cpu"),
    "recomputed": ({"activation_checkpointing": True}, 3, None),
}


@pytest.mark.parametrize("case", FSDP)
def test_fsdp_is_the_stage_that_shards_the_same(tmp_path, case):
    own, stage, offloaded = FSDP[case]
    draft = imported(tmp_path, "trl", fsdp_config=own, gradient_checkpointing=False)
    run = build_config(draft.tree(), "test")
    assert run.parallel.zero_stage == stage
    assert run.parallel.offload_parameters == (offloaded or False)
    assert run.model.gradient_checkpointing is (case == "recomputed")
    (tmp_path / "acc.yaml").write_text(
        yaml.safe_dump({"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": own})
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(LEAST["trl"]))
    draft = import_file("trl", tmp_path / "run.yaml", accelerate=tmp_path / "acc.yaml")
    assert draft.keys["parallel.zero_stage"].value == stage and lost(draft) == []
    words = imported(tmp_path, "trl", fsdp="shard_grad_op auto_wrap offload")
    assert words.keys["parallel.zero_stage"].value == 2
    assert words.keys["parallel.offload_optimizer"].value == "cpu"


def test_keys_of_accelerate_that_nothing_takes_up_are_told(tmp_path):
    (tmp_path / "ds.json").write_text(
        '{"zero_optimization": {"stage": 2, "max_live_parameters": 7}}'
    )
    (tmp_path / "acc.yaml").write_text(
        "distributed_type: DEEPSPEED\nmachine_rank: 0\ndynamo_config: {dynamo_backend: INDUCTOR}\n"
        "mixed_precision: fp16\nodd: 1\ndeepspeed_config: {deepspeed_config_file: ds.json}\n"
    )
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump(LEAST["trl"]))
    draft = import_file("trl", file, accelerate=tmp_path / "acc.yaml")
    run = build_config(draft.tree(), "test")
    assert run.parallel.zero_stage == 2, "of the file that accelerate's file names"
    assert run.parallel.deepspeed["zero_optimization"] == {"stage3_max_live_parameters": 7}
    told = {name.partition(": ")[2] for name in lost(draft)}
    assert told == {"dynamo_config", "mixed_precision", "odd"}
    (tmp_path / "ds.json").unlink()
    draft = import_file("trl", file, accelerate=tmp_path / "acc.yaml")
    assert "acc.yaml: deepspeed_config_file" in lost(draft) and check(draft) is None


def test_what_cannot_stand_side_by_side_here_is_settled(tmp_path):
    few = {"use_peft": True, "load_in_4bit": True, "lora_target_modules": ["q_proj"]}
    draft = imported(tmp_path, "trl", **few, fsdp_config={"offload_params": True})
    parallel = build_config(draft.tree(), "test").parallel
    assert (parallel.zero_stage, parallel.offload_parameters) == (2, False)
    assert any("stays whole on every rank" in note for note in draft.notes)
    draft = imported(tmp_path, "trl", use_liger_kernel=True, torch_compile=True)
    assert build_config(draft.tree(), "test").model.use_liger_kernel
    assert lost(draft) == ["torch_compile"]
    offloaded = {"activation_offloading": True, "gradient_checkpointing": False}
    draft = imported(tmp_path, "trl", **offloaded)
    assert build_config(draft.tree(), "test").model.activation_offloading
    assert lost(draft) == ["gradient_checkpointing"]
    draft = imported(tmp_path, "trl", dataset_streaming=True)
    assert lost(draft) == ["dataset_streaming"] and check(draft) is None, "without train.max_steps"
    constant = {"lr_scheduler_type": "constant", "warmup_ratio": 0.1, "stage": "dpo"}
    draft = imported(tmp_path, "llamafactory", **constant)
    assert build_config(draft.tree(), "test").train.lr_scheduler_type == "constant"
    assert "warmup_ratio" not in lost(draft)


def test_values_are_read_as_they_were_meant():
    assert plain({"a": ["1e-6", "5E+3", "1e", "1-2"]}) == {"a": [1e-6, 5000.0, "1e", "1-2"]}
    assert listed("a, b,") == ["a", "b"] and listed(None) == [] and listed(3) == [3]
    assert [flag(each) for each in ("false", "No", 0, None, "true", 1)] == [False] * 4 + [True] * 2
