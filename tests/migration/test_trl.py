"""TRL's configurations as ours: against its own dataclasses, as they are installed."""

import dataclasses
import importlib
import warnings

import pytest
import yaml

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

from dpo_fast.errors import UserError
from dpo_fast.migration.draft import CARRIED, LOST, NEEDLESS, our_default
from dpo_fast.migration.importers import check, import_file, lost
from dpo_fast.migration.trl_options import TABLES
from dpo_fast.migration.yaml_file import text_of
from dpo_fast.training.config import build_config

LEAST = {"model_name_or_path": "org/model", "dataset_name": "org/data", "output_dir": "out"}
# Fields whose default depends on the machine, or is made anew for each object.
MACHINE = {"accelerator_config", "output_dir", "lr_scheduler_kwargs"}


def configuration(name: str):
    """A class of TRL by the name of its trainer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in ("cpo", "orpo"):
            module = importlib.import_module(f"trl.experimental.{name}")
        else:
            module = trl
        return getattr(module, f"{name.upper()}Config")


def made_of(tmp_path, **options):
    options = LEAST | options
    file = tmp_path / "trl.yaml"
    file.write_text(yaml.safe_dump(options, sort_keys=False))
    return import_file("trl", file, ranks=options.get("ranks"))


def run_of(draft):
    assert check(draft) is None
    return build_config(draft.tree(), "test")


def default_of(field) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@pytest.mark.parametrize("name", TABLES)
def test_every_option_of_trl_is_in_the_table_with_its_default(name):
    script = trl.ScriptArguments
    if name == "grpo":
        script = importlib.import_module("trl.scripts.grpo").GRPOScriptArguments
    kinds = (configuration(name), trl.ModelConfig, script, trl.DatasetMixtureConfig)
    theirs = {field.name: field for kind in kinds for field in dataclasses.fields(kind)}
    known = {option: each for option, each in TABLES[name].items() if not each.older}
    assert known.keys() == theirs.keys() | {"env"}, "env is a key of the file alone"
    for option, field in theirs.items():
        if option not in MACHINE:
            assert known[option].default == default_of(field), option
    older = {option for option, each in TABLES[name].items() if each.older}
    assert older and not older & theirs.keys()


def test_what_is_left_out_is_as_trl_has_it(tmp_path):
    """Values of the run equal those of a DPOConfig without arguments, ours or not."""
    run, theirs = run_of(made_of(tmp_path)), trl.DPOConfig(output_dir="out", bf16=False)
    train = run.train
    assert run.learning_rate == theirs.learning_rate
    assert train.num_train_epochs == theirs.num_train_epochs
    assert train.micro_batch_size == theirs.per_device_train_batch_size
    assert train.global_batch_size == theirs.per_device_train_batch_size
    assert train.lr_scheduler_type == theirs.lr_scheduler_type.value
    assert train.schedule.warm_up(1000) == theirs.get_warmup_steps(1000) == 0
    for name in ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"):
        assert getattr(train, name) == getattr(theirs, name), name
    for name in ("seed", "save_steps", "save_total_limit"):
        assert getattr(train, name) == getattr(theirs, name), name
    assert run.log.logging_steps == theirs.logging_steps
    assert run.model.gradient_checkpointing is theirs.gradient_checkpointing is True
    assert list(run.loss.names) == theirs.loss_type and run.loss.beta == theirs.beta
    assert run.data.max_length == theirs.max_length
    assert run.data.truncation == theirs.truncation_mode and run.data.max_prompt_length == 1023
    assert not run.data.has_eval and run.data.train == "org/data:train"


def test_a_file_as_people_have_them(tmp_path):
    draft = made_of(
        tmp_path,
        dataset_config="pairs",
        learning_rate="5e-7",
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        eval_strategy="steps",
        eval_steps=50,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.2],
        beta=0.05,
        bf16=True,
        max_length=2048,
        optim="adamw_torch",
        report_to=["wandb"],
        ranks=4,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        push_to_hub=True,
        hub_token="hf_secret",
        env={"HF_TOKEN": "hf_secret"},
        my_api_key="hf_secret",
        remove_unused_columns=False,
    )
    run = run_of(draft)
    assert (run.train.micro_batch_size, run.train.global_batch_size) == (2, 64)
    assert run.learning_rate == 5e-7 and run.train.warmup_ratio == 0.1
    assert (run.data.train, run.data.eval) == ("org/data:pairs/train", "org/data:pairs/test")
    assert run.train.eval_steps == 50 and run.model.dtype == "bf16"
    assert run.loss.names == ("sigmoid", "sft") and list(run.loss.weights) == [1.0, 0.2]
    assert lost(draft) == ["ranks", "env", "my_api_key"]
    assert run.train.push_to_hub and run.train.hub_strategy == "every_save", "as there"
    fates = {fate.name: fate for fate in draft.fates}
    assert set(draft.given) == set(fates), "every option is accounted for"
    assert fates["eval_steps"].what == CARRIED and "train.eval_steps" in fates["eval_steps"].why
    assert fates["remove_unused_columns"].what == NEEDLESS
    assert "hf_secret" not in str(draft.fates) + text_of(draft, "run.yaml")


OPTIONS = {  # theirs: ours
    "steps of warm-up": ({"warmup_steps": 100}, {"train.warmup_steps": 100}),
    "a share of warm-up": ({"warmup_steps": 0.05}, {"train.warmup_ratio": 0.05}),
    "a limit": ({"save_total_limit": 3}, {"train.save_total_limit": 3}),
    "no checkpoints": ({"save_strategy": "no"}, {"train.save_steps": None}),
    "fp16": ({"fp16": True}, {"model.dtype": "bf16"}),
    "fp32": ({"bf16": False}, {"model.dtype": "fp32"}),
    "an AdamW": ({"optim": "adamw_8bit"}, {"train.optim": "adamw_bnb_8bit"}),
    "seconds": ({"ddp_timeout": 7200}, {"parallel.timeout_minutes": 120.0}),
    "a name of digits": ({"run_name": 2026}, {"log.run_name": "2026"}),
    "the hub": (
        {"push_to_hub": True, "hub_model_id": "me/x", "hub_private_repo": True}
        | {"hub_strategy": "checkpoint", "hub_revision": "v2", "hub_always_push": True},
        {"train.push_to_hub": True, "train.hub_model_id": "me/x", "train.hub_private_repo": True}
        | {"train.hub_strategy": "checkpoint", "train.hub_revision": "v2"},
    ),
    "the hub at the end": (
        {"push_to_hub": True, "hub_strategy": "end"},
        {"train.push_to_hub": True, "train.hub_strategy": "end"},
    ),
    "the hub of older versions": (
        {"push_to_hub": True, "push_to_hub_organization": "team", "output_dir": "runs/x"},
        {"train.hub_model_id": "team/x"},
    ),
    "no hub": ({"hub_model_id": "me/x"}, {"train.push_to_hub": False, "train.hub_model_id": None}),
    "trackio's project": (
        {"report_to": "trackio", "project": "mine"},
        {"log.report_to": ["trackio"], "log.project": "mine"},
    ),
    "attention": ({"attn_implementation": "sdpa"}, {"model.attention": "sdpa"}),
    "model_init_kwargs": (
        {"model_init_kwargs": {"revision": "v1", "attn_implementation": "eager"}},
        {"model.revision": "v1", "model.attention": "eager"},
    ),
    "ema": (
        {"sync_ref_model": True, "ref_model_sync_steps": 64},
        {"reference.provider": "ema", "reference.sync_steps": 64, "reference.mixup_alpha": 0.6},
    ),
    "robust": (
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss.type": "robust", "loss.label_smoothing": 0.1},
    ),
    "f-divergence": (
        {"f_divergence_type": "js_divergence"},
        {"loss.f_divergence_type": "js_divergence"},
    ),
    "rpo": ({"rpo_alpha": 0.5}, {"loss.type": ["sigmoid", "sft"], "loss.weights": [1.0, 0.5]}),
    "a text of names": ({"loss_type": "sigmoid,sft"}, {"loss.type": ["sigmoid", "sft"]}),
    "deepspeed": (
        {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
        {"parallel.zero_stage": 2, "parallel.offload_optimizer": "cpu"},
    ),
    "fsdp": ({"fsdp": "full_shard auto_wrap"}, {"parallel.zero_stage": 3}),
    "prompt": ({"max_prompt_length": 512}, {"data.max_prompt_length": 512}),
    "mixture": (
        {
            "datasets": [
                {"path": "a/b", "fraction": 0.3},
                {"path": "c/d", "split": "s", "fraction": 0.7},
            ]
        },
        {"data.train": [{"path": "a/b:train", "weight": 0.3}, {"path": "c/d:s", "weight": 0.7}]},
    ),
    "adapters": (
        {"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj"]},
        {"model.lora.r": 8, "model.lora.dropout": 0.05, "model.lora.target_modules": ["q_proj"]},
    ),
    "kto": ({"desirable_weight": 2.0}, {"loss.type": "kto", "loss.desirable_weight": 2.0}),
    "simpo with sft": (
        {"loss_type": "simpo", "simpo_gamma": 0.8, "beta": 2.0},
        {"loss.type": ["simpo", "sft"], "loss.simpo_gamma": 0.8, "loss.beta": 2.0},
    ),
    "simpo alone": ({"loss_type": "simpo", "cpo_alpha": 0.0}, {"loss.type": "simpo"}),
    "cpo": (
        {"cpo_alpha": 0.5, "loss_type": "sigmoid", "label_smoothing": 0.1},
        {"loss.type": "cpo", "loss.cpo_alpha": 0.5, "loss.label_smoothing": 0.1},
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_go_where_they_belong(tmp_path, case):
    given, wanted = OPTIONS[case]
    draft = made_of(tmp_path, **given)
    run_of(draft)
    for key, value in wanted.items():
        found = draft.keys[key].value if key in draft.keys else our_default(key)
        assert found == value, key
    assert not {fate.name for fate in draft.fates} - set(draft.given) - {"model_init_kwargs"}


def test_the_alignment_handbooks_recipes(tmp_path):
    draft = made_of(
        tmp_path,
        dataset_name=None,
        torch_dtype="bfloat16",
        use_flash_attention_2=True,
        dataset_mixer={"org/pairs": 1.0, "org/more": 0.5},
        dataset_splits=["train_prefs", "test_prefs"],
        preprocessing_num_workers=12,
        bf16=True,
        do_eval=True,
        evaluation_strategy="steps",
        eval_steps=100,
        max_prompt_length=512,
        warmup_ratio=0.1,
        optim="adamw_torch",
        hub_model_id="zephyr",
        log_level="info",
    )
    run = run_of(draft)
    assert run.data.train == ["org/pairs:train_prefs", "org/more:train_prefs"]
    assert run.data.eval == ["org/pairs:test_prefs", "org/more:test_prefs"]
    assert (run.data.workers, run.data.max_prompt_length, run.train.eval_steps) == (12, 512, 100)
    assert run.train.warmup_ratio == 0.1 and run.model.dtype == "bf16"
    assert set(lost(draft)) == {"torch_dtype", "dataset_mixer.org/more"}
    assert run.train.hub_model_id is None, "without push_to_hub nothing is pushed"


def test_the_alignment_handbooks_mixture(tmp_path):
    mixture = {"id": "org/pairs", "config": "en", "split": "part", "weight": 1.0}
    mixture = {"datasets": [mixture], "test_split_size": 0.01}
    draft = made_of(tmp_path, dataset_name=None, dataset_mixture=mixture)
    run = run_of(draft)
    assert [source.path for source in run.data.train] == ["org/pairs:en/part"]
    assert lost(draft) == ["test_split_size"], "a share is counted where the rows are here"
    with pytest.raises(UserError, match="dataset_mixture=.*expected a list `datasets`"):
        made_of(tmp_path, dataset_mixture={"org/pairs": 1.0})


@pytest.mark.parametrize("adapters", [False, True])
def test_a_stream_has_a_reference_that_needs_no_table(tmp_path, adapters):
    peft = {"use_peft": True, "lora_target_modules": ["q_proj"]} if adapters else {}
    run = run_of(made_of(tmp_path, dataset_streaming=True, max_steps=10, **peft))
    assert run.data.streaming
    assert run.reference.provider == ("adapter_off" if adapters else "frozen")


def test_a_script_of_the_handbook_names_its_file(tmp_path):
    (tmp_path / "conf.yaml").write_text(yaml.safe_dump(LEAST))
    (tmp_path / "acc.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    script = tmp_path / "run.sh"
    script.write_text(
        "ACCELERATE_LOG_LEVEL=info accelerate launch --config_file acc.yaml \\\n"
        " scripts/run_dpo.py conf.yaml --learning_rate=1e-5 --beta=0.3\n"
    )
    draft = import_file("trl", script)
    run = run_of(draft)
    assert run.learning_rate == 1e-5 and run.loss.beta == 0.3
    assert run.train.global_batch_size == 32 and run.parallel.zero_stage == 0


LEFT = {  # theirs: what is said of it
    "smoothed there by nothing": ({"label_smoothing": 0.1}, "TRL's sigmoid ignore it"),
    "an optimiser": ({"optim": "adafactor"}, "AdamW stands in its place"),
    "a schedule of epochs": ({"save_strategy": "epoch"}, "once an epoch"),
    "quantised": ({"load_in_4bit": True}, "a base for adapters: set model.lora"),
    "misspelt": ({"learnin_rate": 1}, "did you mean learning_rate?"),
    "evaluation without data": (
        {
            "eval_strategy": "steps",
            "eval_steps": 5,
            "dataset_name": None,
            "datasets": [{"path": "a/b"}],
        },
        "nothing to evaluate on",
    ),
    "attention": ({"attn_implementation": "kernels-community/x"}, "not an attention"),
    "a model's dtype": ({"dtype": "bfloat16"}, "fp32 beside"),
    "all loggers": ({"report_to": "all"}, "name them: tensorboard"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_has_no_counterpart_is_said(tmp_path, case):
    given, said = LEFT[case]
    draft = made_of(tmp_path, **given)
    run_of(draft)
    told = {fate.name: fate.why for fate in draft.fates if fate.what == LOST}
    name = next(iter(given))
    assert said in told[name if case != "evaluation without data" else "eval_steps"]


def test_at_its_default_nothing_is_lost(tmp_path):
    harmless = {n: o.default for n, o in TABLES["dpo"].items() if o.lost and not o.older}
    draft = made_of(tmp_path, **harmless)
    assert len(harmless) > 20 and lost(draft) == []


REFUSED = {
    "no model": ({"model_name_or_path": None}, "names no model: add model_name_or_path"),
    "no data": ({"dataset_name": None}, "names no data"),
    "a loss": ({"loss_type": "nonsense"}, "loss_type='nonsense': nonsense is no loss here"),
    "weights": ({"loss_weights": [1, 2]}, "1 losses need as many weights"),
    "GRPO without a reward": ({"num_generations": 8}, "names no reward: add reward_funcs"),
    "a reward model": ({"center_rewards_coefficient": 0.1}, "reward models are not trained here"),
    "a word for a number": ({"weight_decay": "much"}, "weight_decay='much': not a value"),
    "a hinge of CPO": ({"loss_type": "hinge", "cpo_alpha": 1}, "CPOTrainer's hinge is not there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_the_file_and_the_option(tmp_path, case):
    given, said = REFUSED[case]
    with pytest.raises(UserError, match=said) as error:
        made_of(tmp_path, **given)
    assert "trl.yaml" in str(error.value)


def test_rows_that_are_here_are_counted(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 400)
    draft = made_of(
        tmp_path,
        dataset_name=str(data),
        test_split_size=0.1,
        per_device_train_batch_size=4,
        save_strategy="epoch",
    )
    run = run_of(draft)
    assert run.data.train == str(data) and run.data.eval_rows == 40
    assert run.train.save_steps == 90, "360 rows are left, in batches of 4"


def test_a_row_is_cut_where_trl_cuts_it(tmp_path):
    from dpo_fast.data.rows import parse_row
    from dpo_fast.data.tokenise import RowTokeniser
    from tests.support.tokenizers import byte_tokenizer

    run = run_of(made_of(tmp_path, max_length=12))
    tokeniser = RowTokeniser(byte_tokenizer(), run.data, ())
    for prompt, chosen, rejected in (("p" * 5, "c" * 20, "r" * 3), ("p" * 11, "cc", "rr")):
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if prompt == "p" * 11:
            row["chosen"], row["rejected"] = "cx", "rx"  # one token of each stays
        found = tokeniser(parse_row("f:1", row, run.data))
        for name in ("chosen", "rejected"):
            whole = byte_tokenizer()(prompt + row[name] + "</s>", add_special_tokens=False)[
                "input_ids"
            ]
            assert [*found.prompt_ids, *getattr(found, f"{name}_ids")] == whole[:12], (prompt, name)
