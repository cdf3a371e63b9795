"""What the best checkpoint is, as far as options tell: transformers' names and rules, checked."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from dpo_fast.losses import Objective

EVALUATION, OF_ANSWERS = "eval_", "generate/"
ASKING = ("metric_for_best_model", "load_best_model_at_end", "early_stopping_patience")
# Metrics of an evaluation, whatever the loss; those of the head with log.token_metrics; those of groups.
ALWAYS = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "perf/padding_fraction", "perf/shared_prefix_saving"),
)
OF_TOKENS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
OF_GROUPS = ("reward", "reward_std", "frac_reward_zero_std")
CLIPPED = tuple(f"clip_ratio/{name}_mean" for name in ("low", "high", "region"))


@dataclass(frozen=True)
class Selection:
    """What `train` asks for.

    metric: with `eval_` before it. greater: whether more of it is better.
    patience: evaluations without an improvement of more than `threshold`, after which the run ends.
    load: whether the best checkpoint is exported.
    """

    metric: str
    greater: bool
    patience: int | None
    threshold: float
    load: bool

    @property
    def of_answers(self) -> bool:
        """Whether it is a metric of held-out prompts that are answered, and not of an evaluation."""
        return self.metric.startswith(EVALUATION + OF_ANSWERS)

    def better(self, value: float, than: float) -> bool:
        """Whether a value is better than another. NaN never is."""
        return value > than if self.greater else value < than


def selection_of(train: Any) -> Selection | None:
    """The selection of the section `train`; None if no option asks for one."""
    if not any(getattr(train, name) for name in ASKING):
        return None
    named = train.metric_for_best_model or "loss"
    greater = train.greater_is_better
    return Selection(
        metric=named if named.startswith(EVALUATION) else EVALUATION + named,
        greater=not named.endswith("loss") if greater is None else greater,
        patience=train.early_stopping_patience,
        threshold=train.early_stopping_threshold,
        load=train.load_best_model_at_end,
    )


def check_selection(
    train: Any, generate: Any, has_eval: bool, objective: Objective, token_metrics: bool
) -> None:
    """Check the options of the best checkpoint and of early stopping against each other.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    chosen = selection_of(train)
    if train.early_stopping_threshold and train.early_stopping_patience is None:
        raise ValueError(
            f"train.early_stopping_threshold={train.early_stopping_threshold} is not used: set "
            "train.early_stopping_patience, or remove it"
        )
    if chosen is None:
        if train.greater_is_better is not None:
            value = str(train.greater_is_better).lower()
            raise ValueError(
                f"train.greater_is_better={value} is not used: set train.metric_for_best_model, or "
                "remove it"
            )
        return
    name = next(name for name in ASKING if getattr(train, name))
    value = getattr(train, name)
    asked = f"train.{name}={str(value).lower() if value is True else value}"
    if not has_eval:
        raise ValueError(
            f"{asked}, but there is nothing to evaluate on: set data.eval or data.eval_rows"
        )
    every = generate.steps if chosen.of_answers else train.eval_steps
    option = "generate.steps" if chosen.of_answers else "train.eval_steps"
    if chosen.of_answers and not generate.max_prompts:
        raise ValueError(f"{asked}, but no prompt is answered: set generate.max_prompts")
    if every is None:
        raise ValueError(
            f"{asked} compares evaluations, and there is one after the last step alone: set {option}"
        )
    saves = train.save_steps
    if saves is None and chosen.of_answers and _keeps(train):
        raise ValueError(
            f"{asked} compares checkpoints, and the last one alone is written: set train.save_steps={every}"
        )
    if saves is not None and saves % every and _keeps(train):
        fitting = max(round(saves / every), 1) * every
        raise ValueError(
            f"{asked} compares checkpoints, but train.save_steps={saves} is no multiple of "
            f"{option}={every}, so that some have no evaluation; try train.save_steps={fitting}"
        )
    known = metric_names(objective, token_metrics)
    if generate.max_prompts:
        known += [OF_ANSWERS + name for name in generate.metrics]
    bare = chosen.metric.removeprefix(EVALUATION)
    if bare not in known:
        raise ValueError(
            f"train.metric_for_best_model={train.metric_for_best_model}: {hint(bare, known)}"
        )


def default_save_steps(train: Any) -> int | None:
    """Checkpoints that are to be compared are written after every evaluation, unless the user says when."""
    if train.save_steps is not None or not _keeps(train) or selection_of(train).of_answers:
        return train.save_steps
    return train.eval_steps


def _keeps(train: Any) -> bool:
    """Whether checkpoints are compared: to stop early, evaluations are enough."""
    return bool(train.metric_for_best_model or train.load_best_model_at_end)


def metric_names(objective: Objective, token_metrics: bool) -> list[str]:
    """Every metric that an evaluation may have with these losses, without `eval_`."""
    names = [*ALWAYS, *(OF_TOKENS if token_metrics else ()), *objective.statistics]
    if objective.grouped:
        clipped = any(spec.by_token for spec in objective.specs)
        return names + [*OF_GROUPS, *((*CLIPPED, "kl") if clipped else ())]
    names.append("rewards/longer")
    return names + (_watched(objective) if any(spec.watch for spec in objective.specs) else [])


def _watched(objective: Objective) -> list[str]:
    """What losses on pairs plot by themselves: their functions say, for any pair."""
    import torch

    from dpo_fast.losses.from_tokens import as_pairs

    logps_S = torch.tensor([-1.0, -2.0])
    return [*objective.watched(as_pairs(logps_S, torch.ones(2, dtype=torch.long), logps_S))]


def hint(name: str, known: list[str]) -> str:
    """What to write in place of a metric that does not exist."""
    near = difflib.get_close_matches(name, known, 1, 0.75)
    listed = f"an evaluation has {', '.join(sorted(known))}"
    return f"did you mean {near[0]}? {listed}" if near else f"there is no such metric; {listed}"
