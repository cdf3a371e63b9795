"""Files of LLaMA-Factory, OpenRLHF and Axolotl as people have them, in words of our own."""

import json

import pytest
import yaml

pytest.importorskip("pydantic")

from dpo_fast.errors import UserError
from dpo_fast.migration.draft import LOST
from dpo_fast.migration.importers import check, import_file, lost
from dpo_fast.migration.yaml_file import text_of
from dpo_fast.training.config import build_config

INFO = {
    "chats": {
        "file_name": "chats.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "asks": {
        "hf_hub_url": "org/asks",
        "subset": "en",
        "ranking": True,
        "columns": {"prompt": "ask", "query": "about", "chosen": "good", "rejected": "bad"},
    },
    "tagged": {
        "file_name": "tagged.json",
        "formatting": "sharegpt",
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "person"},
    },
    "elsewhere": {"script_url": "loader"},
}
FACTORY = {
    "model_name_or_path": "org/model",
    "stage": "dpo",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "pref_beta": 0.2,
    "pref_loss": "sigmoid",
    "dataset": "chats",
    "dataset_dir": "data",
    "template": "llama3",
    "cutoff_len": 4096,
    "max_samples": 1000,
    "preprocessing_num_workers": 4,
    "output_dir": "saves/dpo",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": "5.0e-6",
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "plot_loss": True,
    "ddp_timeout": 180000000,
}


@pytest.fixture
def factory(tmp_path):
    (tmp_path / "examples" / "train_lora").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))

    def make(**options):
        file = tmp_path / "examples" / "train_lora" / "dpo.yaml"
        file.write_text(yaml.safe_dump(FACTORY | options))
        draft = import_file("llamafactory", file, ranks=2)
        assert check(draft) is None, check(draft)
        return draft, build_config(draft.tree(), "test")

    make.folder = tmp_path
    return make


def test_llamafactory_with_its_dataset_info(factory):
    draft, run = factory()
    assert run.data.train == str(factory.folder / "data" / "chats.json")
    assert (run.data.format, run.data.max_rows, run.data.workers) == ("sharegpt", 1000, 4)
    assert (run.model.lora.r, run.model.lora.alpha) == (8, 16), "lora_alpha is twice the rank there"
    assert run.model.lora.target_modules == "all-linear"
    assert run.train.global_batch_size == 16 and run.learning_rate == 5e-6
    assert run.parallel.timeout_minutes == 43_200
    assert run.model.gradient_checkpointing is True
    assert run.log.logging_steps == 500 and run.train.save_steps == 500, "transformers' defaults"
    assert lost(draft) == ["template"]


def test_llamafactory_pushes_and_reports(factory):
    draft, run = factory(push_to_hub=True, hub_model_id="me/x", report_to="wandb,swanlab")
    assert (run.train.hub_model_id, run.train.hub_strategy) == ("me/x", "every_save")
    assert run.log.report_to == ["wandb"] and "report_to" in lost(draft)


def test_llamafactory_of_several_sources(factory):
    draft, run = factory(
        dataset="chats,asks", mix_strategy="interleave_over", interleave_probs="0.3,0.7"
    )
    first, second = run.data.train
    assert (first.weight, second.weight, run.data.stopping_strategy) == (0.3, 0.7, "all_exhausted")
    assert second.path == "org/asks:en/train" and second.format == "alpaca"
    assert second.columns == {
        "prompt": "ask",
        "query": "about",
        "chosen": "good",
        "rejected": "bad",
    }
    assert "max_samples" in lost(draft)
    draft, _ = factory(dataset="tagged", max_samples=None)
    assert lost(draft) == ["dataset_info.json: tagged: user_tag", "template"] or set(
        lost(draft)
    ) == {*("dataset_info.json: tagged: user_tag", "template")}


LOSSES = {  # options: names, weights
    "with sft": ({"pref_ftx": 0.5}, ("sigmoid", "sft"), [1.0, 0.5]),
    "with bco": ({"pref_bco_weight": 1.0}, ("sigmoid", "bco_pair"), [0.5, 0.5]),
    "orpo": ({"pref_loss": "orpo"}, ("orpo",), None),
    "kto": ({"stage": "kto", "kto_chosen_weight": 2.0}, ("kto",), None),
    "sft": ({"stage": "sft", "pissa_init": True, "quantization_bit": 4}, ("sft",), None),
}


@pytest.mark.parametrize("case", LOSSES)
def test_llamafactory_losses(factory, case):
    options, names, weights = LOSSES[case]
    _, run = factory(**options)
    assert run.loss.names == names
    assert weights is None or list(run.loss.weights) == weights
    if case == "kto":
        assert run.loss.desirable_weight == 2.0 and run.loss.beta == 0.2
    if case == "sft":
        assert run.model.quantization.load_in_4bit
        assert run.model.lora.init_lora_weights == "pissa_niter_16"
        assert not run.loss.objective.needs_reference


WRONG = {
    "a stage": ({"stage": "ppo"}, "stage=ppo: there is no PPO"),
    "a method": ({"finetuning_type": "freeze"}, "choose full or lora"),
    "a loss": ({"pref_loss": "kto_pair"}, "pref_loss='kto_pair': choose from"),
    "a name": ({"dataset": "nothing"}, "nothing is not in .*dataset_info.json"),
    "a script": ({"dataset": "elsewhere"}, "loading scripts are not read"),
    "probabilities": (
        {"mix_strategy": "interleave_under", "interleave_probs": "1,2"},
        "1 sources need",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_llamafactory_that_cannot_be(factory, case):
    options, said = WRONG[case]
    with pytest.raises(UserError, match=said):
        factory(**options)


def test_llamafactory_from_its_command(factory):
    factory()
    script = factory.folder / "run.sh"
    script.write_text(
        "export CUDA_VISIBLE_DEVICES=0,1,2,3\n"
        "FORCE_TORCHRUN=1 llamafactory-cli train examples/train_lora/dpo.yaml learning_rate=1e-6\n"
    )
    draft = import_file("llamafactory", script)
    run = build_config(draft.tree(), "test")
    assert run.train.global_batch_size == 32 and run.learning_rate == 1e-6


SCRIPT = r"""
set -x
MODEL=org/sft
read -r -d '' training_commands <<EOF
openrlhf.cli.train_dpo \
   --save_path ./ckpt/dpo \
   --save_steps -1 \
   --train_batch_size 256 \
   --micro_train_batch_size 2 \
   --pretrain ${MODEL} \
   --bf16 \
   --max_len 8192 \
   --zero_stage 3 \
   --learning_rate 5e-7 \
   --adam_betas 0.9 0.98 \
   --beta 0.2 \
   --dataset org/pairs,mine.jsonl \
   --dataset_probs 0.5,0.5 \
   --apply_chat_template \
   --chosen_key good \
   --rejected_key rejected \
   --flash_attn \
   --packing_samples \
   --nll_loss_coef 0.2 \
   --input_template "Q: {}" \
   --use_wandb abcdef0123 \
   --gradient_checkpointing
EOF
# --ipo [for IPO]
if [[ ${1} != "slurm" ]]; then
    deepspeed --include localhost:0,1 --module $training_commands
fi
"""


def test_openrlhf_from_its_script(tmp_path):
    file = tmp_path / "train_dpo.sh"
    file.write_text(SCRIPT)
    draft = import_file("openrlhf", file)
    assert check(draft) is None
    run = build_config(draft.tree(), "test")
    assert run.model.path == "org/sft" and run.model.dtype == "bf16"
    assert (run.train.global_batch_size, run.train.micro_batch_size) == (256, 2)
    assert (run.train.adam_beta1, run.train.adam_beta2) == (0.9, 0.98)
    assert run.train.lr_scheduler_type == "cosine_with_min_lr" and run.train.warmup_ratio == 0.03
    assert [(s.path, s.weight) for s in run.data.train] == [
        ("org/pairs:train", 0.5),
        ("mine.jsonl", 0.5),
    ]
    assert run.data.columns == {"chosen": "good"} and run.data.apply_chat_template is True
    assert run.loss.names == ("sigmoid", "sft") and list(run.loss.weights) == [1.0, 0.2]
    assert run.train.save_steps is None and run.log.report_to == ["wandb"]
    assert run.log.project == "openrlhf_train_dpo", "as it is called there"
    assert lost(draft) == ["input_template"]
    shown = text_of(draft, "run.yaml") + str(draft.fates)
    assert "abcdef0123" not in shown, "a key is shown nowhere"


def test_openrlhf_ipo_sums(tmp_path):
    file = tmp_path / "a.sh"
    file.write_text(
        "python -m openrlhf.cli.train_dpo --pretrain m --dataset d --ipo --lora_rank 16\n"
    )
    run = build_config(import_file("openrlhf", file).tree(), "test")
    assert run.loss.names == ("ipo",) and run.loss.length_average is False
    assert (run.model.lora.r, run.model.lora.alpha) == (16, 16)
    file.write_text("python -m openrlhf.cli.train_dpo --pretrain $UNSET --dataset d\n")
    with pytest.raises(UserError, match=r"pretrain is \$UNSET, which neither the script nor the"):
        import_file("openrlhf", file)


NEWER = r"""
read -r -d '' training_commands <<EOF
openrlhf.cli.train_%s \
   --model.model_name_or_path org/base \
   --data.dataset org/rows \
   --data.max_len 4096 \
   --train.batch_size 256 \
   --train.micro_batch_size 2 \
   --ckpt.output_dir ./ckpt/run \
   --adam.lr 3e-6 \
   --adam.betas 0.9 0.98 \
   --ds.zero_stage 3 \
   --ds.lora.rank 8 \
   --ds.packing_samples \
   --eval.dataset "" \
   --logger.wandb.key hidden0123 \
   --model.gradient_checkpointing_enable %s
EOF
deepspeed --module $training_commands
"""
RENAMED = {  # method: its own flags, what is ours, what is told
    "dpo": (
        "--model.beta 0.2 --ref.model_name_or_path org/ref --data.chosen_key good",
        {"loss.beta": 0.2, "reference.path": "org/ref", "data.columns": {"chosen": "good"}},
        set(),
    ),
    "sft": (
        "--data.input_key question --data.output_key response --optim muon",
        {"data.columns": {"prompt": "question", "completion": "response"}, "loss.type": "sft"}
        | {"data.apply_chat_template": False},
        {"data.input_template", "optim"},
    ),
}


@pytest.mark.parametrize("method", RENAMED)
def test_openrlhf_by_its_newer_names(tmp_path, method):
    flags, wanted, told = RENAMED[method]
    file = tmp_path / "run.sh"
    file.write_text(NEWER % (method, flags))
    draft = import_file("openrlhf", file)
    assert check(draft) is None, check(draft)
    run = build_config(draft.tree(), "test")
    assert (run.model.path, run.model.dtype, run.model.lora.r) == ("org/base", "bf16", 8)
    assert (run.train.global_batch_size, run.train.micro_batch_size) == (256, 2)
    assert (run.learning_rate, run.train.adam_beta2, run.data.max_length) == (3e-6, 0.98, 4096)
    assert run.parallel.zero_stage == 3 and run.train.output_dir == "ckpt/run"
    assert run.train.num_train_epochs == (2 if method == "sft" else 1), "as it is there"
    assert {key: draft.keys[key].value for key in wanted} == wanted
    assert set(lost(draft)) == told, "names are those of the file"
    assert draft.keys["train.learning_rate"].comment == "adam.lr"
    assert "hidden0123" not in text_of(draft, "run.yaml") + str(draft.fates)
    (tmp_path / "a.yaml").write_text(
        "model: {model_name_or_path: m}\ndata: {dataset: d}\nds: {lora: {rank: 4}}\n"
    )
    run = build_config(import_file("openrlhf", tmp_path / "a.yaml").tree(), "test")
    assert (run.model.path, run.model.lora.r) == ("m", 4), "sections of a file"


ROWS = {  # of train_sft or train_kto: flags, ours
    "texts": (
        "sft",
        "--input_key body --pretrain_mode",
        {"data.format": "text", "data.columns": {"text": "body"}},
    ),
    "the last answer": (
        "sft",
        "--input_key talk --apply_chat_template",
        {"data.columns": {"messages": "talk"}, "data.scored": "last"},
    ),
    "all answers": (
        "sft",
        "--input_key talk --apply_chat_template --multiturn",
        {"data.columns": {"messages": "talk"}},
    ),
    "chats of two texts": (
        "sft",
        "--input_key ask --output_key say --apply_chat_template",
        {"data.columns": {"prompt": "ask", "completion": "say"}, "data.apply_chat_template": True},
    ),
    "labels": (
        "kto",
        "--input_key ask --output_key say --label_key good --desirable_loss_weight 2",
        {"data.columns": {"prompt": "ask", "completion": "say", "label": "good"}}
        | {"loss.type": "kto", "loss.desirable_weight": 2.0, "loss.beta": 0.01},
    ),
    "labels of conversations": (
        "kto",
        "--input_key talk --apply_chat_template",
        {"data.format": "sharegpt", "data.columns": {"messages": "talk"}},
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_openrlhf_rows(tmp_path, case):
    method, flags, wanted = ROWS[case]
    file = tmp_path / "run.sh"
    file.write_text(f"deepspeed train_{method}.py --pretrain m --dataset d --bf16 {flags}\n")
    draft = import_file("openrlhf", file)
    assert check(draft) is None, check(draft)
    assert {key: draft.keys[key].value for key in wanted} == wanted
    assert draft.tree()["model"]["dtype"] == "bf16"
    assert lost(draft) == (["input_template"] if case == "labels" else [])
    if case == "all answers":
        assert build_config(draft.tree(), "test").data.scored == "assistant"


AXOLOTL = {
    "base_model": "org/base",
    "rl": "dpo",
    "rl_beta": 0.2,
    "datasets": [
        {
            "path": "org/pairs",
            "type": "chat_template.default",
            "split": "train",
            "field_messages": "conversation",
            "field_chosen": "better",
            "message_property_mappings": {"role": "role", "content": "content"},
            "roles": {"user": ["user"], "assistant": ["assistant"]},
        }
    ],
    "val_set_size": 0.05,
    "output_dir": "./out",
    "sequence_len": 4096,
    "sample_packing": False,
    "adapter": "lora",
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "gradient_accumulation_steps": 4,
    "micro_batch_size": 2,
    "num_epochs": 2,
    "optimizer": "adamw_torch",
    "learning_rate": 0.0002,
    "bf16": "auto",
    "gradient_checkpointing": True,
    "warmup_steps": 10,
    "evals_per_epoch": 4,
    "saves_per_epoch": 1,
    "wandb_project": None,
}


def axolotl(tmp_path, **options):
    file = tmp_path / "axolotl.yml"
    file.write_text(yaml.safe_dump(AXOLOTL | options))
    draft = import_file("axolotl", file, ranks=2)
    assert check(draft) is None, check(draft)
    return draft, build_config(draft.tree(), "test")


def test_axolotl(tmp_path):
    draft, run = axolotl(tmp_path)
    assert run.data.train == "org/pairs:train"
    assert run.data.columns == {"messages": "conversation", "chosen": "better"}
    assert (run.model.lora.r, run.model.lora.target_modules) == (32, "all-linear")
    assert run.train.global_batch_size == 16 and run.train.warmup_steps == 10
    assert run.loss.beta == 0.2 and run.train.lr_scheduler_type == "cosine"
    assert set(lost(draft)) == {"val_set_size", "saves_per_epoch"}


def test_axolotl_with_rows_that_are_here(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 1000)
    source = {"path": "json", "data_files": [str(data)], "type": "chatml.prompt_pairs"}
    draft, run = axolotl(tmp_path, datasets=[source])
    assert (run.data.train, run.data.format, run.data.eval_rows) == (str(data), "alpaca", 50)
    assert (run.train.eval_steps, run.train.save_steps) == (15, 60), "950 rows in batches of 16"
    assert lost(draft) == ["datasets.type=chatml.prompt_pairs"]


LOGS = {  # options: ours
    "wandb": (
        {"wandb_project": "p", "wandb_name": "n"},
        {"log.report_to": ["wandb"], "log.project": "p", "log.run_name": "n"},
    ),
    "mlflow": (
        {"use_mlflow": True, "mlflow_experiment_name": "p", "mlflow_run_name": "n"},
        {"log.report_to": ["mlflow"], "log.project": "p", "log.run_name": "n"},
    ),
    "comet and trackio": (
        {"use_comet": True, "use_trackio": True}
        | {"comet_project_name": "p", "trackio_project_name": "p"},
        {"log.report_to": ["comet_ml", "trackio"], "log.project": "p"},
    ),
    "the hub": (
        {"hub_model_id": "me/x", "hub_strategy": "end", "hub_revision": "v2"},
        {"train.push_to_hub": True, "train.hub_model_id": "me/x", "train.hub_private_repo": True}
        | {"train.hub_revision": "v2"},
    ),
    "the hub as it is there": ({"hub_model_id": "me/x"}, {"train.hub_strategy": "every_save"}),
}


@pytest.mark.parametrize("case", LOGS)
def test_axolotl_loggers_and_the_hub(tmp_path, case):
    given, wanted = LOGS[case]
    draft, _ = axolotl(tmp_path, **given)
    assert {key: draft.keys[key].value for key in wanted} == wanted
    assert not set(lost(draft)) & set(given)


def test_axolotl_names_of_loggers_that_do_not_agree_or_are_not_there(tmp_path):
    two = {"wandb_project": "p", "use_mlflow": True, "mlflow_experiment_name": "q"}
    draft, run = axolotl(tmp_path, **two, trackio_run_name="n", comet_api_key="hidden-key")
    assert run.log.project == "p" and "mlflow_experiment_name" in lost(draft)
    fates = {fate.name: fate.why for fate in draft.fates}
    assert "wandb_project has set it" in fates["mlflow_experiment_name"]
    assert "nothing is reported to trackio" in fates["trackio_run_name"]
    assert "hidden-key" not in text_of(draft, "run.yaml") + str(draft.fates)
    draft, run = axolotl(tmp_path, hub_strategy="end")
    assert not run.train.push_to_hub and "hub_strategy" not in lost(draft)


METHODS = {  # rl and its options: losses
    "ipo": ({"rl": "ipo"}, ("ipo",), 0.2),
    "orpo": ({"rl": "orpo", "rl_beta": None, "orpo_alpha": 0.3}, ("orpo",), 0.3),
    "simpo": ({"rl": "simpo", "simpo_gamma": 0.7}, ("simpo", "sft"), 0.2),
    "kto": ({"rl": "kto", "kto_desirable_weight": 0.5}, ("kto",), 0.2),
    "several": (
        {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1, 0.5]},
        ("sigmoid", "sft"),
        0.2,
    ),
    "by trl": ({"trl": {"beta": 0.4}}, ("sigmoid",), 0.4),
}


@pytest.mark.parametrize("case", METHODS)
def test_axolotl_methods(tmp_path, case):
    options, names, beta = METHODS[case]
    _, run = axolotl(tmp_path, **options)
    assert run.loss.names == names and run.loss.beta == beta
    if case == "simpo":
        assert list(run.loss.weights) == [1.0, 1.0] and run.loss.simpo_gamma == 0.7


def test_axolotl_says_what_has_no_counterpart(tmp_path):
    draft, run = axolotl(
        tmp_path,
        adapter="qlora",
        load_in_4bit=True,
        peft_use_dora=True,
        loraplus_lr_ratio=16,
        optimizer="lion_8bit",
        chat_template="llama3",
        special_tokens={"pad_token": "x"},
        plugins=["a.b"],
        nonsense=1,
    )
    told = {fate.name: fate.why for fate in draft.fates if fate.what == LOST}
    wanted = {"loraplus_lr_ratio", "optimizer", "chat_template", "special_tokens", "plugins"}
    assert wanted <= set(told) and "load_in_4bit" not in told
    assert run.model.quantization.load_in_4bit and run.model.lora.use_dora
    assert "no such option" in told["nonsense"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rl": "ebft"}, "it has no counterpart here"),
        ({"rl": "grpo"}, "names no reward: add reward_funcs"),
        ({"rl": None, "reward_model": True}, "reward models are not trained here"),
        ({"excess_length_strategy": "wrap"}, "choose from drop, truncate, raise"),
        ({"datasets": [{"type": "x"}]}, "expected a list of mappings with a path"),
        ({"adapter": "llama-adapter"}, "choose lora"),
        ({"learning_rate": None}, "add learning_rate"),
    ],
)
def test_axolotl_that_cannot_be(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        axolotl(tmp_path, **change)


DEMONSTRATIONS = {  # a source of SFT: ours, what is told of it
    "chats": (
        {"type": "chat_template", "field_messages": "conversations", "train_on_eos": "last"}
        | {"message_property_mappings": {"role": "from", "content": "value"}},
        {"data.columns": {"messages": "conversations"}},
        ["datasets.train_on_eos"],
    ),
    "questions, too": (
        {"type": "chat_template", "roles_to_train": ["user", "assistant"]},
        {"data.scored": "all"},
        [],
    ),
    "alpaca": ({"type": "alpaca"}, {"data.format": "alpaca"}, ["datasets.type=alpaca"]),
    "texts": (
        {"type": "completion", "field": "body"},
        {"data.format": "text", "data.columns": {"text": "body"}},
        [],
    ),
    "written out": (
        {
            "type": {
                "field_instruction": "ask",
                "field_output": "output",
                "format": "Q: {instruction}",
            }
        },
        {"data.format": "alpaca", "data.columns": {"prompt": "ask"}},
        ["datasets.type.format"],
    ),
    "another": ({"type": "jeopardy"}, {}, ["datasets.type=jeopardy"]),
}


@pytest.mark.parametrize("case", DEMONSTRATIONS)
def test_axolotl_sft(tmp_path, case):
    source, wanted, told = DEMONSTRATIONS[case]
    chosen = {"rl": None, "rl_beta": None, "val_set_size": 0, "saves_per_epoch": None}
    draft, run = axolotl(
        tmp_path, **chosen, datasets=[{"path": "org/rows"} | source], sample_packing=case == "chats"
    )
    assert run.loss.names == ("sft",) and run.learning_rate == 0.0002
    assert run.train.global_batch_size == 16 and run.data.truncation == "drop", "as it is there"
    assert {key: draft.keys[key].value for key in wanted} == wanted
    assert set(lost(draft)) == {*told, *(["sample_packing"] if case == "chats" else [])}


def test_axolotl_reads_texts_while_it_trains(tmp_path):
    texts = [{"path": "org/texts", "name": "en", "text_column": "body"}]
    draft, run = axolotl(
        tmp_path, rl=None, rl_beta=None, datasets=None, pretraining_dataset=texts, max_steps=10
    )
    assert (run.data.train, run.data.streaming) == ("org/texts:en/train", True)
    assert run.data.columns == {"text": "body"} and run.train.max_steps == 10


def test_axolotl_samples_in_rounds(tmp_path):
    file = tmp_path / "grpo.yaml"
    trl = {"reward_funcs": ["mine.right", "mine.short"], "reward_weights": [1.0, 0.2], "beta": 0.01}
    trl |= {"num_generations": 4, "max_completion_length": 128, "use_vllm": True, "top_k": None}
    own = {"rl": "gdpo", "trl": trl, "vllm": {"gpu_memory_utilization": 0.6, "port": 8000}}
    own |= {"rl_beta": None, "micro_batch_size": 8, "num_epochs": 2}
    file.write_text(yaml.safe_dump(AXOLOTL | own))
    draft = import_file("axolotl", file, ranks=2)
    assert check(draft) is None and draft.rounds, check(draft)
    keys = {key: entry.value for key, entry in draft.keys.items()}
    assert keys["judge.function"] == ["mine:right", "mine:short"]
    assert keys["judge.weights"] == [1.0, 0.2] and keys["loss.grpo_beta"] == 0.01
    assert keys["judge.multi_objective_aggregation"] == "normalize_then_sum", "that is GDPO"
    assert (keys["sample.num_generations"], keys["sample.max_new_tokens"]) == (4, 128)
    assert keys["sample.engine.options"] == {"gpu_memory_utilization": 0.6}
    assert keys["stages"][0] | {"prompts": 0} == {"prompts": 0, "rounds": 2, "reference": "start"}
    assert (keys["train.micro_batch_size"], keys["train.global_batch_size"]) == (2, 16)
    assert draft.keys["sample.num_generations"].comment == "trl.num_generations"
    assert {"val_set_size", "evals_per_epoch"} & set(lost(draft))


BATCHES = {  # theirs: the global batch of 4 ranks
    "accumulated": ({"gradient_accumulation_steps": 4}, 32),
    "by rank": ({"gradient_accumulation_steps": None, "batch_size": 16}, 64),
    "ranks that share rows": ({"gradient_accumulation_steps": 4, "context_parallel_size": 2}, 16),
}


@pytest.mark.parametrize("case", BATCHES)
def test_axolotl_batches(tmp_path, case):
    options, size = BATCHES[case]
    file = tmp_path / "axolotl.yml"
    file.write_text(yaml.safe_dump(AXOLOTL | options))
    run = build_config(import_file("axolotl", file, ranks=4).tree(), "test")
    assert (run.train.micro_batch_size, run.train.global_batch_size) == (2, size)


def test_axolotl_cuts_rows_only_where_it_is_asked_to(tmp_path):
    for strategy, ours in (("truncate", "keep_start"), ("raise", "error"), (None, "drop")):
        _, run = axolotl(tmp_path, excess_length_strategy=strategy)
        assert run.data.truncation == ours and run.data.max_length == 4096


COMMANDS = (
    "torchrun --nproc_per_node 4 -m llamafactory.cli train {file} learning_rate=1e-6",
    "deepspeed --num_gpus 4 src/train.py {file} learning_rate=1e-6",
    "CUDA_VISIBLE_DEVICES=0,1,2,3 lmf  train \\\r\n  {file} \\\r\n  learning_rate=1e-6\r\n",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_llamafactory_is_started_in_several_ways(factory, command):
    factory()
    script = factory.folder / "run.sh"
    script.write_bytes(command.format(file="examples/train_lora/dpo.yaml").encode())
    run = build_config(import_file("llamafactory", script).tree(), "test")
    assert run.train.global_batch_size == 32 and run.learning_rate == 1e-6
    script.write_text("llamafactory-cli train $CONFIG_OF_NOBODY\n")
    with pytest.raises(UserError, match=r"its options stand in \$CONFIG_OF_NOBODY"):
        import_file("llamafactory", script)


def test_llamafactorys_packs_are_no_rows(factory):
    draft, _ = factory(stage="sft", neat_packing=True, packing=True)
    assert {"packing", "neat_packing"} <= set(lost(draft))
    draft, _ = factory(packing=True)
    assert "packing" not in lost(draft), "pairs are never packed there"


STARTED = {  # a command: the loss that it is for, or what is said
    "trl dpo": "sigmoid",
    "accelerate launch examples/scripts/kto.py": "kto",
    "python examples/scripts/orpo.py": "orpo",
    "python cpo.py": "cpo",
    "python -m trl.scripts.kto": "kto",
    "python online_dpo.py": "TRL's online_dpo, which has no counterpart",
    "trl sft": "sft",
    "SCRIPT=scripts/kto.py\necho kto.py\naccelerate launch $SCRIPT": "kto",
    "python sft.py --x 1\npython dpo.py": "2 commands start TRL: line 1 .sft., line 2 .dpo.",
    "trl reward": "reward models are not trained here",
    "trl rloo": "TRL's rloo, which has no counterpart",
    "python grpo_vlm.py": "names no reward: add reward_funcs",
}


@pytest.mark.parametrize("command", STARTED)
def test_a_command_of_trl_says_for_which_trainer_it_is(tmp_path, command):
    file = tmp_path / "run.sh"
    file.write_text(f"{command} --model_name_or_path m --dataset_name d/d --output_dir o\n")
    if " " in STARTED[command]:
        with pytest.raises(UserError, match=STARTED[command]):
            import_file("trl", file)
    else:
        draft = import_file("trl", file)
        assert build_config(draft.tree(), "test").loss.names == (STARTED[command],)


@pytest.mark.parametrize(("name", "loss"), [("orpo.yaml", "orpo"), ("my_kto_2.yaml", "kto")])
def test_a_file_of_trl_whose_options_say_nothing_goes_by_its_name(tmp_path, name, loss):
    (tmp_path / name).write_text("model_name_or_path: m\ndataset_name: d/d\noutput_dir: o\n")
    draft = import_file("trl", tmp_path / name)
    assert build_config(draft.tree(), "test").loss.names == (loss,)
    assert import_file("trl", tmp_path / name, "dpo").tree().get("loss") is None


def test_of_several_commands_the_method_chooses(tmp_path):
    file = tmp_path / "run.sh"
    words = "--model_name_or_path m --dataset_name d/d --output_dir o --beta"
    file.write_text(f"trl kto {words} 0.3\ntrl dpo {words} 0.4\n")
    assert import_file("trl", file, "kto").tree()["loss"] == {"type": "kto", "beta": 0.3}
    assert import_file("trl", file, "dpo").tree()["loss"] == {"beta": 0.4}
    with pytest.raises(UserError, match="2 commands start TRL: .* Choose with --method"):
        import_file("trl", file)


@pytest.mark.parametrize("method", ["rm", "ppo_ray"])
def test_another_command_of_openrlhf_is_no_dpo(tmp_path, method):
    file = tmp_path / "run.sh"
    file.write_text(f"deepspeed --module openrlhf.cli.train_{method} --pretrain m --dataset d\n")
    with pytest.raises(UserError, match=f"is for OpenRLHF's {method}"):
        import_file("openrlhf", file)


@pytest.mark.parametrize(
    ("words", "stage", "size"),
    [
        ("--accelerate_config zero3", 3, 64),
        ("--accelerate_config fsdp2 --num_processes 2", 3, 16),
        ("--accelerate_config multi_gpu", 0, 64),
    ],
)
def test_trls_command_launches_by_itself(tmp_path, words, stage, size):
    (tmp_path / "dpo.yaml").write_text("model_name_or_path: m\ndataset_name: d/d\n")
    file = tmp_path / "run.sh"
    file.write_text(f"trl dpo --config dpo.yaml {words} --output_dir o\n")
    draft = import_file("trl", file)
    run = build_config(draft.tree(), "test")
    assert (run.parallel.zero_stage, run.train.global_batch_size) == (stage, size)
    assert lost(draft) == []


NO_NUMBERS = {
    "trl": {"max_length": "2k"},
    "llamafactory": {"pref_beta": "high"},
    "axolotl": {"sequence_len": "4k"},
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_a_word_where_a_number_is_read_with_others_is_told_by_its_option(tmp_path, factory, kind):
    file = tmp_path / "theirs.yaml"
    trl = {"model_name_or_path": "m", "dataset_name": "d/d", "output_dir": "o"}
    options = {"trl": trl, "llamafactory": FACTORY, "axolotl": AXOLOTL}[kind] | NO_NUMBERS[kind]
    file.write_text(yaml.safe_dump(options))
    (name, value), *_ = NO_NUMBERS[kind].items()
    with pytest.raises(UserError, match=f"theirs.yaml: {name}='{value}': not a value"):
        import_file(kind, file)


def test_trls_sft(tmp_path):
    file = tmp_path / "run.sh"
    file.write_text(
        "trl sft --model_name_or_path m --dataset_name d/d --max_seq_length 512 --packing "
        '--eos_token "<|im_end|>" --dataset_text_field body --output_dir o\n'
    )
    draft = import_file("trl", file)
    run = build_config(draft.tree(), "test")
    assert (run.loss.names, run.learning_rate, run.data.max_length) == (("sft",), 2e-5, 512)
    assert run.data.scored == "all" and run.data.columns == {"text": "body"}
    assert set(lost(draft)) == {"packing", "eos_token"}
    assert "<|im_end|>" in str(draft.fates), "a token of a tokenizer is no secret"
