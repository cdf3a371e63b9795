"""TRL's GRPO as rounds."""

import json

import pytest
import yaml

pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.migration.draft import LOST
from dpo_fast.migration.importers import check, import_file, lost
from dpo_fast.migration.yaml_file import text_of
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.plan import Plan
from dpo_fast.training.config import build
from tests.support import ranks
from tests.support.models import write_model

LEAST = {
    "model_name_or_path": "org/model",
    "dataset_name": "org/prompts",
    "reward_funcs": ["accuracy_reward"],
    "output_dir": "out",
    "num_generations": 4,
}


def longer(completions, **columns):
    """A reward as TRL's functions are: of lists."""
    return [float(len(str(each))) for each in completions]


def longest(completion):
    return -len(completion)


def made_of(tmp_path, count=None, **options):
    file = tmp_path / "grpo.yaml"
    given = {name: value for name, value in (LEAST | options).items() if value is not None}
    file.write_text(yaml.safe_dump(given))
    return import_file("trl", file, ranks=count)


def rounds_of(draft) -> RoundsConfig:
    assert check(draft) is None, check(draft)
    written = yaml.safe_load(text_of(draft, "run.yaml"))
    assert written == draft.tree(), "what is read is what is written"
    return build(RoundsConfig, written, "test")


def test_a_file_as_people_have_them(tmp_path):
    draft = made_of(
        tmp_path,
        count=4,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        max_completion_length=256,
        max_prompt_length=512,
        num_train_epochs=2,
        num_iterations=3,
        beta=0.04,
        temperature=0.9,
        epsilon_high=0.28,
        mask_truncated_completions=True,
        use_vllm=True,
        vllm_gpu_memory_utilization=0.4,
        log_completions=True,
        report_to="wandb",
        chat_template_kwargs={"enable_thinking": False},
    )
    rounds = rounds_of(draft)
    assert rounds.output_dir == "out" and rounds.data["max_length"] == 768
    assert (rounds.sample.num_generations, rounds.sample.max_new_tokens) == (4, 256)
    assert rounds.sample.temperature == 0.9 and rounds.sample.engine.type == "vllm"
    assert rounds.sample.engine.options == {"gpu_memory_utilization": 0.4}
    assert rounds.judge.function == "trl.rewards:accuracy_reward"
    assert rounds.pairs.unfinished == "drop"
    (stage,) = rounds.stages
    assert (stage.prompts, stage.rounds, stage.reference) == ("org/prompts:train", 2, "start")
    assert rounds.data["chat_template_kwargs"] == {"enable_thinking": False}
    run = Plan(rounds, "test").steps and Plan(rounds, "test").rehearsal(
        Plan(rounds, "test").steps[0]
    )
    assert run.loss.names == ("dapo",) and run.loss.grpo_beta == 0.04
    assert run.loss.epsilon_high == 0.28 and run.reference.per_token
    assert (run.train.num_train_epochs, run.train.micro_batch_size) == (3, 2)
    assert run.train.global_batch_size == 8 * 4 * 4 // 4, "groups of 4"
    assert lost(draft) == []
    assert set(draft.given) <= {fate.name for fate in draft.fates}


CASES = {  # theirs: ours
    "grpo": ({"loss_type": "grpo"}, {"loss.type": "grpo", "loss.scale_rewards": "group"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"loss.type": "dapo", "loss.scale_rewards": "none"}),
    "unscaled": ({"scale_rewards": False}, {"loss.scale_rewards": "none"}),
    "GSPO": (
        {"importance_sampling_level": "sequence", "epsilon": 3e-4},
        {"loss.importance_sampling_level": "sequence", "loss.epsilon": 3e-4},
    ),
    "a function": ({"reward_funcs": ["mine.of.words"]}, {"judge.function": "mine.of:words"}),
    "functions": (
        {"reward_funcs": ["accuracy_reward", "a.b"], "reward_weights": [1, 0.5]},
        {"judge.function": ["trl.rewards:accuracy_reward", "a:b"], "judge.weights": [1.0, 0.5]},
    ),
    "functions that count alike": (
        {"reward_funcs": ["a.b", "c.d"], "multi_objective_aggregation": "normalize_then_sum"},
        {"judge.multi_objective_aggregation": "normalize_then_sum", "loss.scale_rewards": "none"},
    ),
    "a model": (
        {"reward_funcs": None, "reward_model_name_or_path": "org/reward"},
        {"judge.type": "reward_model", "judge.path": "org/reward"},
    ),
    "steps": (
        {"max_steps": 10, "per_device_train_batch_size": 8},
        {"sample.max_prompts": 20, "train.max_steps": None},
    ),
    "a reference that follows": (
        {"beta": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 0.5},
        {
            "stages": [
                {"prompts": "org/prompts:train", "rounds": 3}
                | {"reference": "ema", "mixup_alpha": 0.5}
            ]
        },
    ),
    "several sources": (
        {"dataset_name": None, "datasets": [{"path": "a/b"}, {"path": "c/d"}]},
        {"stages": [{"prompts": ["a/b:train", "c/d:train"], "rounds": 3}]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_options_go_where_they_belong(tmp_path, case):
    given, wanted = CASES[case]
    draft = made_of(tmp_path, **given)
    rounds_of(draft)
    found = {key: entry.value for key, entry in draft.keys.items()}
    assert {key: found.get(key) for key in wanted} == wanted


LEFT = {
    "functions beside a model": (
        {"reward_funcs": ["a.b", "c.d"], "reward_model_name_or_path": "m"},
        "reward_funcs",
        "a.b, c.d: functions or one model score",
    ),
    "a name of a script": (
        {"reward_funcs": ["accuracy", "tag_count"], "reward_weights": [1.0, 0.5]},
        "reward_funcs: tag_count",
        "write that into rewards.py, as a function tag_count",
    ),
    "one that counts tokens": (
        {"reward_funcs": ["a.b", "get_soft_overlong_punishment"]},
        "reward_funcs: get_soft_overlong_punishment",
        "it counts tokens",
    ),
    "a server": ({"use_vllm": True, "vllm_mode": "server"}, "vllm_mode", "each new policy"),
    "batches": ({"scale_rewards": "batch"}, "scale_rewards", "group stands in its place"),
    "entropy": ({"top_entropy_quantile": 0.2}, "top_entropy_quantile", "all tokens"),
    "evaluation": ({"eval_strategy": "steps"}, "eval_strategy", "the section generate"),
    "resumption": ({"resume_from_checkpoint": True}, "resume_from_checkpoint", "goes on by itself"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_has_no_counterpart_is_said(tmp_path, case):
    given, name, said = LEFT[case]
    draft = made_of(tmp_path, **given)
    rounds_of(draft)
    told = {fate.name: fate.why for fate in draft.fates if fate.what == LOST}
    assert said in told[name]


@pytest.mark.parametrize(
    "given, said",
    [
        ({"reward_weights": [1, 2]}, "reward_weights=.*: 1 functions need as many weights"),
        ({"reward_funcs": ["get_soft_overlong_punishment"]}, "it counts tokens"),
        ({"loss_type": "sapo"}, "loss_type='sapo': of GRPO's losses grpo, dapo"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, given, said):
    with pytest.raises(UserError, match=said):
        made_of(tmp_path, **given)


@pytest.mark.processes
@pytest.mark.slow
def test_what_is_imported_samples_scores_and_trains(tmp_path):
    write_model(tmp_path / "model")
    rows = [{"prompt": f"{number}? "} for number in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft = made_of(
        tmp_path,
        model_name_or_path=str(tmp_path / "model"),
        dataset_name=str(tmp_path / "prompts.jsonl"),
        reward_funcs=[f"tests.migration.test_trl_grpo.{name}" for name in ("longer", "longest")],
        reward_weights=[2.0, 0.5],
        output_dir=str(tmp_path / "out"),
        max_completion_length=8,
        num_generations=2,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        bf16=False,
        gradient_checkpointing=False,
    )
    rounds_of(draft)
    ranks.group(1).do("iterate", [draft.tree()])
    (step,) = (tmp_path / "out").glob("stage-1*")
    lines = (step / "train" / "metrics.jsonl").read_text().splitlines()
    assert (step / "train" / "final").is_dir() and len(lines) >= 2
