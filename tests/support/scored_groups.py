"""Four groups of scored completions, of unequal sizes and lengths, for tests of the losses on groups."""

import itertools

import pytest
import torch

from dpo_fast.losses import LOSSES, GroupLogps, ScoredGroups, Totals

GROUPED = [name for name, spec in LOSSES.items() if spec.grouped]
COUNTS = [3, 2, 4, 2]
SCORES = [0.2, 1.5, -0.3, 2.0, 2.0, 0.0, 1.0, 1.0, -3.0, 0.1, 0.7]  # a tie of all, a tie of two
LENGTHS = [3, 1, 4, 2, 2, 5, 1, 3, 2, 1, 4]
S, T = len(SCORES), sum(LENGTHS)
TOTALS = Totals(pairs=7, chosen_tokens=0, sequences=19, tokens=50)
CASES = {
    "plackett_luce": [{}, {"beta": 0.7}, {"f_divergence_type": "js_divergence"}],
    "grpo": [
        {},
        {"epsilon": 0.05},
        {"epsilon_high": 0.6},
        {"scale_rewards": "none"},
        {"importance_sampling_level": "sequence"},
        {"grpo_beta": 0.3},
        {
            "grpo_beta": 0.3,
            "importance_sampling_level": "sequence",
            "epsilon": 0.1,
            "epsilon_high": 0.0,
        },
    ],
}
CASES["dapo"] = CASES["grpo"]
each_case = pytest.mark.parametrize(
    ("name", "changed"), [(name, changed) for name in GROUPED for changed in CASES[name]]
)


def make(seed: int = 0, dtype=torch.float64) -> GroupLogps:
    g = torch.Generator().manual_seed(seed)
    tokens = -2 * torch.rand(T, generator=g).to(dtype)
    near = lambda: tokens + 0.4 * torch.randn(T, generator=g).to(dtype)  # noqa: E731
    old, reference = near(), near()
    return of_tokens(tokens, old, reference)


def of_tokens(tokens, old, reference) -> GroupLogps:
    sums = lambda x: torch.stack([part.sum() for part in x.split(LENGTHS)])  # noqa: E731
    return GroupLogps(
        sums(tokens),
        torch.tensor(LENGTHS),
        torch.tensor(SCORES, dtype=tokens.dtype),
        torch.tensor(COUNTS),
        sums(reference),
        tokens,
        old,
        reference,
    )


def groups_of(values: list) -> list[list]:
    ends = list(itertools.accumulate(COUNTS))
    return [values[end - count : end] for end, count in zip(ends, COUNTS)]


def arguments(groups: GroupLogps, **more) -> dict:
    return {
        "logp_T": groups.tokens.float(),
        "lengths_S": groups.lengths,
        "reference_S": groups.reference.float(),
        "reference_T": groups.reference_tokens.float(),
        "groups": ScoredGroups(groups.scores.float(), groups.counts, groups.old_tokens.float()),
        "totals": TOTALS,
    } | more


def head(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(S, max(LENGTHS), 8, generator=g).requires_grad_()
    weight = torch.randn(13, 8, generator=g).requires_grad_()
    labels = torch.randint(0, 13, (S, max(LENGTHS)), generator=g)
    labels[torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]] = -100
    return hidden, weight, labels
