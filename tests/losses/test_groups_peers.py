"""grpo and dapo against the code of TRL's trainer and of Liger's fused loss, on the same numbers."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dpo_fast.losses import GroupLogps, LossOptions, Objective, Totals, preference
from dpo_fast.modules import FusedLinearPreferenceLoss
from tests.support.scored_groups import (
    CASES,
    COUNTS,
    LENGTHS,
    SCORES,
    S,
    T,
    arguments,
    groups_of,
    head,
    make,
)

pytestmark = pytest.mark.peers


def rows(values: torch.Tensor) -> torch.Tensor:
    """[S, longest] of values [T], 0 where there is no token."""
    return torch.nn.utils.rnn.pad_sequence(values.split(LENGTHS), batch_first=True)


def padded(groups: GroupLogps):
    mask = rows(torch.ones(T)) > 0
    return mask, [rows(x) for x in (groups.old_tokens, groups.reference_tokens)]


def gains(scale: bool) -> torch.Tensor:
    """As TRL computes advantages, a group at a time."""
    found = []
    for scores in groups_of(SCORES):
        x = torch.tensor(scores)
        found.append((x - x.mean()) / (x.std() + 1e-4) if scale else x - x.mean())
    return torch.cat(found)


PEER_CASES = [(name, changed) for name in ("grpo", "dapo") for changed in CASES[name]]


def ours(name, changed, groups: GroupLogps):
    leaf = groups.tokens.clone().requires_grad_()
    objective = Objective((name,), (1.0,), LossOptions(**changed))
    totals = Totals(len(COUNTS), 0, S, T)
    result = preference(
        **arguments(replace(groups, tokens=leaf), objective=objective, totals=totals)
        | {"logp_T": leaf}
    )
    return result, torch.autograd.grad(result.loss, leaf)[0]


@pytest.mark.parametrize(("name", "changed"), PEER_CASES)
def test_trl(name, changed):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    groups, o = make(seed=5, dtype=torch.float32), LossOptions(**changed)
    leaf = rows(groups.tokens).requires_grad_()
    mask, (old, reference) = padded(groups)
    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        sync_gradients=True,
    )
    high = o.epsilon if o.epsilon_high is None else o.epsilon_high
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(leaf), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=o.importance_sampling_level,
        beta=o.grpo_beta,
        loss_type=name,
        epsilon_low=o.epsilon,
        epsilon_high=high,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        current_gradient_accumulation_steps=1,
        _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
    )
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    loss = trainer.GRPOTrainer._compute_loss(
        stand_in,
        None,
        {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1] + 1,
            "completion_ids": ids,
            "completion_mask": mask.long(),
            "advantages": gains(o.scale_rewards == "group"),
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
            "num_items_in_batch": mask.sum(),
        },
    )
    result, slopes = ours(name, changed, groups)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-6, abs=1e-6)
    theirs = torch.autograd.grad(loss, leaf)[0][mask]
    torch.testing.assert_close(slopes, theirs, rtol=1e-5, atol=1e-6)
    watched = {key: values.mean().item() for key, values in result.watched.items()}
    found = {key: values[0] for key, values in stand_in._metrics["train"].items()}
    if o.importance_sampling_level == "token":  # TRL counts sequences where ratios are theirs
        assert {key: found[key] for key in watched} == pytest.approx(watched, abs=1e-6)
        assert o.epsilon > 0.1 or 0 < watched["clip_ratio/region_mean"] < 1


@pytest.mark.parametrize(("name", "changed"), PEER_CASES)
def test_liger(name, changed):
    peer = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    o = LossOptions(**changed)
    hidden, weight, labels = head()
    other = head(1)[:2]
    mask = labels != -100
    g = torch.Generator().manual_seed(2)
    old = torch.where(mask, -3 * torch.rand(mask.shape, generator=g), 0.0)
    theirs = peer.LigerFusedLinearGRPOLoss(
        beta=o.grpo_beta,
        compiled=False,
        use_ref_model=o.grpo_beta > 0,
        epsilon_low=o.epsilon,
        epsilon_high=o.epsilon if o.epsilon_high is None else o.epsilon_high,
        loss_type=name,
        importance_sampling_level=o.importance_sampling_level,
        temperature=1.0,
    )
    referring = {"ref_input": other[0].detach(), "ref_weight": other[1].detach()}
    loss, _ = theirs(
        hidden,
        weight,
        labels.clamp(min=0),
        mask.float(),
        gains(o.scale_rewards == "group"),
        old_per_token_logps=old,
        **(referring if o.grpo_beta else {}),
    )
    reference = {"reference_hidden": other[0], "reference_weight": other[1]} if o.grpo_beta else {}
    mine, _ = FusedLinearPreferenceLoss(name, **changed)(
        hidden,
        weight,
        labels,
        scores=torch.tensor(SCORES),
        counts=torch.tensor(COUNTS),
        old_logps=old,
        **reference,
    )
    assert mine.item() == pytest.approx(loss.item(), rel=1e-6, abs=1e-6)
    for got, want in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (mine, loss))):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
