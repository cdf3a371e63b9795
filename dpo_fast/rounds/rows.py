"""The rows of a round: prompts answered by the policy, answers judged, and pairs made of them."""

from __future__ import annotations

import json
from typing import Any

from dpo_fast.data.parts import parts_of
from dpo_fast.errors import UserError
from dpo_fast.generation.prompts import read_prompts
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.judge import PAIRS, SAMPLES, SCORES, judge, judge_identity, judge_section
from dpo_fast.rounds.plan import Plan, Step
from dpo_fast.rounds.sample import data_of, sample, section_of
from dpo_fast.rounds.sample_folder import LOGPS
from dpo_fast.rounds.sampler_model import Sampler
from dpo_fast.training import distributed

MADE = (SAMPLES, LOGPS, SCORES, PAIRS)
# Options of sampling and judging that change neither completions nor scores.
FREE = {
    *("output_dir", "model", "data", "sample.prompts", "sample.output", "sample.long_prompts"),
    *(f"sample.engine.{n}" for n in ("concurrency", "timeout_seconds", "max_retries", "url")),
    *("sample.engine.api_key_env", "sample.engine.model", "judge.samples", "judge.max_failures"),
    *("judge.concurrency", "judge.timeout_seconds", "judge.max_retries", "judge.api_key_env"),
    *("judge.cache", "judge.batch_size", "judge.url"),
}
HEAVY = ("reward_model", "implicit")  # judges that are known by all of their weights
TOLD = ("completions", "verdicts", "mean_score", "pairs", "prompts_with_pairs", "unfinished")


def make_rows(config: RoundsConfig) -> dict[str, Any]:
    """Sample, judge and pair; what is there already is used as it is. Collective.

    Returns:
        What is told of the rows afterwards: counts and the mean score.

    Raises:
        UserError, Interrupted: as `sample` and `judge` do.
    """
    sample(config)
    found = judge(config)
    return {name: found[name] for name in TOLD if name in found}


def check_rounds(plan: Plan, step: Step) -> None:
    """Check what can be told before anything is sampled. Raises UserError."""
    config = plan.rounds(step, plan.config.model)  # the policy may be yet to be made
    section_of(config)
    judge_section(config)
    parts_of(data_of(config), "train")
    check_server(plan, step, config)
    if config.judge.type not in HEAVY:
        judge_identity(config)


def check_server(plan: Plan, step: Step, config: RoundsConfig) -> None:
    """Raises UserError if one name on a server is to be the policy of two steps."""
    engine = config.sample.engine
    for before in plan.steps[: plan.steps.index(step)] if engine.model else ():
        if not before.stage.samples:
            continue
        theirs = plan.rounds(before, plan.config.model).sample.engine
        if (theirs.url, theirs.model) == (engine.url, engine.model):
            raise UserError(
                f"sample.engine.model={engine.model}: {before.name} has its answers from the same name at "
                f"{engine.url}, and {step.name} is to have them from another policy. Leave the option out: "
                "then each is asked for by the path of its model, and the command ends until it is served"
            )


def check_prompts(config: RoundsConfig) -> None:
    """Read the prompts and the judge, as sampling and judging will. Collective. Raises UserError."""
    section, data = section_of(config), data_of(config)
    prompts = distributed.from_main(lambda: read_prompts(data, section))
    sampler = Sampler(config.model, section, data)
    sampler.see(prompts.items)
    sampler.encode(prompts.items)
    distributed.from_main(lambda: judge_identity(config))


def options(config: RoundsConfig) -> dict[str, Any]:
    """The options that decide what the rows are, by name."""
    return dict(_flat(config.model_dump(mode="json", include={"sample", "judge", "pairs"}), ""))


def _flat(tree: dict[str, Any], prefix: str):
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in ("sample", "judge", "pairs", "sample.engine"):
            yield from _flat(value, f"{key}.")
        elif key not in FREE:
            yield key, value


def judge_of(config: RoundsConfig, complete: bool) -> dict[str, str]:
    """What the judge is, as text by name. complete: leave out what takes reading weights, or is gone."""
    if complete and config.judge.type in HEAVY:
        return {}
    try:
        found = judge_identity(config)
    except UserError:
        if complete:
            return {}
        raise
    return {name: json.dumps(value, sort_keys=True) for name, value in found.items()}
