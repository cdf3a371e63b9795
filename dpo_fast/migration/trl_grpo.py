"""TRL's GRPO as rounds: sample all prompts, score them, train on the groups, and once more.

TRL samples for each step from the policy of that step. A round samples from the policy before it, so the
ratios of the loss do what they are for; an epoch there is a round here.
"""

from __future__ import annotations

import math

from dpo_fast.migration.arguments import evaluates
from dpo_fast.migration.arguments_table import above_zero
from dpo_fast.migration.draft import Draft
from dpo_fast.migration.losses import put_losses, put_option
from dpo_fast.migration.option import flag, listed
from dpo_fast.migration.trl_data import put_data
from dpo_fast.migration.trl_grpo_options import ONE_KIND

LOSSES = {"grpo": "grpo", "dapo": "dapo", "bnpo": "dapo", "dr_grpo": "dapo"}
REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")  # of trl.rewards
OWN = "rewards.py"
MADE = {  # that need more than a completion's text
    "get_soft_overlong_punishment": "it counts tokens, which a judge does not see: pairs.unfinished=drop "
    "leaves cut completions out, or write a function of the text"
}
SCALED = {"true": "group", "group": "group", "false": "none", "none": "none"}
ROOM = 7680  # tokens for a prompt, where nothing bounds it
DECIDED = ("train.resume_from_checkpoint", "train.overwrite_output_dir", "data.streaming")


def finish_grpo(
    draft: Draft, micro: str = "per_device_train_batch_size", epochs: str = "num_train_epochs"
) -> None:
    """All that GRPO reads together, behind what every trainer has: the draft is one of rounds.

    micro, epochs: the options that say so.
    """
    draft.rounds = True
    _loss(draft)
    _judge(draft)
    _sampling(draft)
    _stages(draft, micro, epochs)
    _batches(draft, micro)
    put_as(draft, "train.output_dir", "output_dir")
    for key in DECIDED:
        if draft.keys.pop(key, None) is not None:
            for name in draft.options_of(key):
                draft.lose(name, "the same command goes on by itself; rounds read whole files")
    draft.note(
        "TRL samples for every step, from the policy of that step. Here a round samples all prompts from "
        "the policy before it and trains on them; an epoch there is a round here, with a schedule of its "
        "own."
    )


def put_prompts(draft: Draft) -> None:
    """The data as prompts: TRL's GRPO has no other."""
    if evaluates(draft):
        draft.lose(
            "eval_strategy", "held-out prompts are answered and judged by the section generate"
        )
        draft.given["eval_strategy"] = "no"
    put_data(draft)
    as_prompts(draft)


def as_prompts(draft: Draft) -> None:
    """What was put as data of training, as the prompts of rounds."""
    draft.keys.pop("data.eval_rows", None)
    source = draft.keys["data.train"].value
    sources = [each["path"] if isinstance(each, dict) else each for each in listed_or_one(source)]
    if any(isinstance(each, dict) and "weight" in each for each in listed_or_one(source)):
        draft.lose("datasets.fraction", "rounds take all prompts of all sources")
    put_as(draft, "data.train", "sample.prompts", sources if len(sources) > 1 else sources[0])


def listed_or_one(value) -> list:
    return value if isinstance(value, list) else [value]


def put_as(draft: Draft, key: str, other: str, value=None) -> None:
    """Move what was put to another key."""
    entry = draft.keys.pop(key, None)
    if entry is not None:
        names = draft.moved(key, other)
        draft.put(other, entry.value if value is None else value, *names, comment=entry.comment)


def _loss(draft: Draft) -> None:
    theirs = str(draft["loss_type"])
    if theirs not in LOSSES:
        raise draft.fault("loss_type", f"of GRPO's losses {', '.join(LOSSES)} are here")
    name = LOSSES[theirs]
    put_losses(draft, {name: 1.0}, "loss_type")
    if theirs == "bnpo":
        draft.note(
            "bnpo divides by the tokens of a micro-batch; dapo by those of the global batch, so that "
            "accumulation changes nothing."
        )
    scale = SCALED.get(str(draft["scale_rewards"]).lower())
    if scale is None:
        draft.lose("scale_rewards", "group stands in its place; none is there, too")
        scale = "group"
    if theirs == "dr_grpo":
        scale = "none"
    draft.put("loss.scale_rewards", scale, "scale_rewards", "loss_type")
    put_option(draft, [name], "grpo_beta", float(draft["beta"]), "beta")
    for option in ("epsilon", "epsilon_high", "importance_sampling_level"):
        put_option(draft, [name], option, draft[option], option)


def _judge(draft: Draft) -> None:
    """The rewards: functions, whose scores are added, or a model."""
    functions = [str(each) for each in listed(draft["reward_funcs"])]
    model = draft.get("reward_model_name_or_path")
    if model is None and len(functions) == 1 and "/" in functions[0]:
        draft.put("judge.type", "reward_model", "reward_funcs")
        draft.put("judge.path", functions[0], "reward_funcs")
        return
    if not functions and model is None:
        raise draft.missing("reward", "reward_funcs")
    if model is not None:
        draft.put("judge.type", "reward_model", "reward_model_name_or_path")
        draft.put("judge.path", str(model), "reward_model_name_or_path")
        if functions:
            draft.lose("reward_funcs", f"{', '.join(functions)}: {ONE_KIND}")
        if draft.has("reward_weights"):
            draft.lose("reward_weights", ONE_KIND)
        return
    weights = [float(each) for each in listed(draft["reward_weights"])]
    if weights and len(weights) != len(functions):
        raise draft.fault("reward_weights", f"{len(functions)} functions need as many weights")
    shares = dict(zip(functions, weights or [1.0] * len(functions), strict=True))
    for name in [name for name in shares if name in MADE]:
        draft.lose(f"reward_funcs: {name}", MADE[name])
        del shares[name]
    if not shares:
        raise draft.fault("reward_funcs", next(iter(MADE.values())))
    names = [_function(draft, each) for each in shares]
    draft.put("judge.type", "rule", "reward_funcs")
    draft.put("judge.function", names if len(names) > 1 else names[0], "reward_funcs")
    if len(names) > 1:
        _added(draft, list(shares.values()) if weights else [])


def _added(draft: Draft, weights: list[float]) -> None:
    """How the scores of several functions are added."""
    if weights:
        draft.put("judge.weights", weights, "reward_weights")
    name = "multi_objective_aggregation"
    draft.put(f"judge.{name}", str(draft[name]), name)
    if str(draft[name]) == "normalize_then_sum":
        draft.put("loss.scale_rewards", "none", name)
        if "scale_rewards" in draft.given:
            draft.spare("scale_rewards", "the scores of every function are scaled, there too")
        draft.note(
            "normalize_then_sum: TRL divides the sums by their spread in the batch as well, and here they "
            "stay as they are."
        )


def _function(draft: Draft, name: str) -> str:
    """The function of a name: of trl.rewards, a path with dots, or one that a script knows by itself."""
    if name in REWARDS:
        return f"trl.rewards:{name}"
    if "." in name:
        return ":".join(name.rsplit(".", 1))
    draft.lose(
        f"reward_funcs: {name}",
        f"a name that a script has for a function of its own: write that into {OWN}, as a function {name}",
    )
    return f"{OWN}:{name}"


def _sampling(draft: Draft) -> None:
    answers = int(draft["max_completion_length"])
    draft.put("sample.num_generations", int(draft["num_generations"]), "num_generations")
    draft.put("sample.max_new_tokens", answers, "max_completion_length")
    prompt = draft.get("max_prompt_length")
    draft.put(
        "data.max_length",
        answers + (ROOM if prompt is None else int(prompt)),
        *("max_completion_length", "max_prompt_length"),
        comment=f"{answers} and {'room for' if prompt is None else 'those of'} the prompt",
    )
    if prompt is not None:
        draft.put("data.max_prompt_length", int(prompt), "max_prompt_length")
    drop = flag(draft["mask_truncated_completions"])
    draft.put("pairs.unfinished", "drop" if drop else "keep", "mask_truncated_completions")
    if not flag(draft["use_vllm"]):
        return
    draft.put("sample.engine.type", "vllm", "use_vllm")
    options = {"gpu_memory_utilization": float(draft["vllm_gpu_memory_utilization"])}
    if draft["vllm_max_model_length"] is not None:
        options["max_model_len"] = int(draft["vllm_max_model_length"])
    names = ("vllm_gpu_memory_utilization", "vllm_max_model_length")
    draft.put("sample.engine.options", options, *names)


def _stages(draft: Draft, micro: str, epochs: str) -> None:
    """One stage of as many rounds as there are epochs, and what it compares with."""
    stage: dict = {"prompts": draft.keys["sample.prompts"].value}
    rounds = max(math.ceil(float(draft[epochs])), 1)
    names = [epochs]
    if (steps := above_zero(draft["max_steps"] or -1)) is not None:
        count = steps * _groups(draft, micro)
        _forget(draft, "train.max_steps", "sample.max_prompts")
        draft.put("sample.max_prompts", count, "max_steps", comment=f"{steps} steps of groups")
        rounds, names = 1, ["max_steps"]
    stage["rounds"] = rounds
    if float(draft["beta"]):
        names.append("beta")
        stage["reference"] = "ema" if flag(draft["sync_ref_model"]) else "start"
        if stage["reference"] == "ema":
            stage["mixup_alpha"] = float(draft["ref_model_mixup_alpha"])
            names += ["sync_ref_model", "ref_model_mixup_alpha"]
        draft.put("reference.per_token", True, "beta", comment="grpo compares token by token")
    _forget(draft, "sample.prompts", "stages")
    _forget(draft, "train.num_train_epochs", "stages")
    draft.put("stages", [stage], *names, comment="an epoch there is a round here")
    passes = float(draft["num_iterations"])
    draft.put("train.num_train_epochs", passes, "num_iterations")


def _forget(draft: Draft, key: str, other: str) -> None:
    """Take out a key whose options lead to another one, which is put by itself."""
    draft.keys.pop(key, None)
    draft.moved(key, other)


def _groups(draft: Draft, micro: str) -> int:
    """Groups of a step: batches there count completions."""
    own = int(draft[micro]) * int(draft["gradient_accumulation_steps"])
    return max(own * (draft.ranks or 1) // int(draft["num_generations"]), 1)


def _batches(draft: Draft, micro: str) -> None:
    """Whole groups to each forward and to each rank."""
    answers, ranks = int(draft["num_generations"]), draft.ranks or 1
    own = max(int(draft[micro]) // answers, 1)
    share = own * ranks
    names = (micro, "gradient_accumulation_steps", "num_generations")
    told = f"groups of {answers}; batches there count completions"
    draft.put("train.micro_batch_size", own, *names, comment=told)
    whole = -(-_groups(draft, micro) // share) * share
    draft.put("train.global_batch_size", whole, *names, comment=told)
