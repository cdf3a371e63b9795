"""Losses on groups from hidden states: the fused module against its formula, and what it refuses."""

import pytest
import torch

from dpo_fast.losses import LossOptions, Objective, Totals
from dpo_fast.modules import FusedLinearPreferenceLoss, PreferenceLoss
from tests.support.scored_groups import COUNTS, LENGTHS, SCORES, S, T, each_case, head, of_tokens


def token_logps(hidden, weight, labels) -> torch.Tensor:
    logp = (hidden.double() @ weight.double().T).log_softmax(-1)
    return logp.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)[labels != -100]


@each_case
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_module(name, changed, packed):
    hidden, weight, labels = head()
    other = head(1)[:2]
    g = torch.Generator().manual_seed(2)
    old = torch.where(labels != -100, -3 * torch.rand(labels.shape, generator=g), torch.nan)
    groups = of_tokens(
        token_logps(hidden, weight, labels),
        old[labels != -100].double(),
        token_logps(*(x.detach() for x in other), labels),
    )
    objective = Objective((name,), (1.0,), LossOptions(**changed))
    truth = objective(groups, Totals(len(COUNTS), 0, S, T))
    module = FusedLinearPreferenceLoss(name, **changed)
    inputs = {"hidden": hidden, "labels": labels}
    if objective.needs_old_tokens:
        inputs["old_logps"] = old
    if packed:
        inputs = {key: x.flatten(0, 1) for key, x in inputs.items()}
        inputs["lengths"] = torch.full((S,), max(LENGTHS))
    reference = {}
    if objective.needs_reference:
        reference = {
            "reference_hidden": other[0].flatten(0, 1) if packed else other[0],
            "reference_weight": other[1],
        }
    loss, metrics = module(
        weight=weight,
        scores=torch.tensor(SCORES),
        counts=torch.tensor(COUNTS),
        **inputs,
        **reference,
    )
    torch.testing.assert_close(loss, truth.float(), rtol=1e-5, atol=1e-6)
    mine, theirs = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, truth))
    for got, want in zip(mine, theirs):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert 0 <= metrics["rewards/accuracies"] <= 1
    assert ("clip_ratio/region_mean" in metrics) == (name != "plackett_luce")
    assert ("kl" in metrics) == (changed.get("grpo_beta", 0) > 0)


def test_labels_that_are_tokens_take_their_own_old_log_probs():
    """shift=True: row l - 1 predicts labels[b, l], and old_logps[b, l] is of that token."""
    hidden, weight, labels = head()
    old = torch.where(labels != -100, -torch.rand(labels.shape), torch.nan)
    groups = {"scores": torch.tensor(SCORES), "counts": torch.tensor(COUNTS)}
    plain = FusedLinearPreferenceLoss("grpo")(hidden, weight, labels, old_logps=old, **groups)[0]
    first = torch.full((S, 1), -100)
    shifted = FusedLinearPreferenceLoss("grpo", shift=True)(
        torch.cat([hidden, hidden[:, :1]], 1),
        weight,
        torch.cat([first, labels], 1),
        old_logps=torch.cat([torch.full((S, 1), torch.nan), old], 1),
        **groups,
    )[0]
    assert torch.equal(plain, shifted)


def test_modules_name_what_they_cannot_do():
    hidden, weight, labels = head()
    scores, counts = torch.tensor(SCORES), torch.tensor(COUNTS)
    module = FusedLinearPreferenceLoss("grpo")
    with pytest.raises(ValueError, match="take groups of scored completions: use FusedLinear"):
        PreferenceLoss("plackett_luce")
    with pytest.raises(ValueError, match="scores and counts belong together"):
        module(hidden, weight, labels, scores=scores)
    with pytest.raises(ValueError, match="need old_T"):
        module(hidden, weight, labels, scores=scores, counts=counts)
    with pytest.raises(ValueError, match=r"old_logps is \(11,\)"):
        module(hidden, weight, labels, scores=scores, counts=counts, old_logps=scores)
    with pytest.raises(ValueError, match="give desirable, or scores and counts, not both"):
        module(hidden, weight, labels, scores=scores, counts=counts, desirable=scores > 0)
    with pytest.raises(ValueError, match="need groups: scores and counts"):
        module(hidden[:10], weight, labels[:10])
    with pytest.raises(ValueError, match="'plackett_luce',. do not use old_logps; leave them out"):
        FusedLinearPreferenceLoss("plackett_luce", reference_free=True)(
            hidden, weight, labels, scores=scores, counts=counts, old_logps=labels.float()
        )
