"""TR-DPO: the reference follows the policy, on whole weights and on shards, and through a checkpoint."""

import shutil

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.references import EmaReference
from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import changed, run_tree, write_model, write_pairs

EMA = {"provider": "ema", "mixup_alpha": 0.5, "sync_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ema")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 20)
    base = run_tree(folder, max_steps=6, micro_batch_size=2)
    whole, shards = {"zero_stage": 0}, {"zero_stage": 3}
    saving = {"save_steps": 3}
    ranks.train(
        [
            changed(base, folder / "ema", reference=EMA, parallel=whole),
            changed(base, folder / "never", reference=EMA | {"sync_steps": 100}, parallel=whole),
            changed(base, folder / "frozen", reference={"provider": "frozen"}, parallel=whole),
        ]
    )
    sharded = changed(base, folder / "sharded", reference=EMA, parallel=shards, train=saving)
    copies = {"zero_stage": 3, "zero_hpz_partition_size": 2}
    ranks.train([sharded, changed(sharded, folder / "copies", parallel=copies)], 2)
    shutil.copytree(folder / "sharded" / "checkpoint-3", folder / "resumed" / "checkpoint-3")
    resume = {"resume_from_checkpoint": True}
    ranks.train([changed(sharded, folder / "resumed", train=resume)], 2)
    return folder


@pytest.mark.processes
def test_the_curve_changes_when_the_reference_has_moved(folder):
    ema, frozen = series(folder / "ema"), series(folder / "frozen")
    assert [ema[step] for step in (1, 2)] == [frozen[step] for step in (1, 2)]
    assert all(abs(ema[step] - frozen[step]) > 1e-3 for step in (4, 5, 6))
    assert series(folder / "never") == frozen


@pytest.mark.processes
def test_shards_on_two_ranks_follow_like_whole_weights(folder):
    whole, sharded = series(folder / "ema"), series(folder / "sharded")
    assert all(sharded[step] == pytest.approx(whole[step], abs=1e-5) for step in whole)


@pytest.mark.processes
def test_copies_that_groups_of_ranks_keep_follow_too(folder):
    """hpZ gathers from them, and DeepSpeed renews none of a model that is not trained."""
    assert series(folder / "copies") == series(folder / "sharded")


@pytest.mark.processes
def test_resume_is_bitwise(folder):
    """The checkpoint at step 3 lies between two updates of the reference."""
    whole, resumed = series(folder / "sharded"), series(folder / "resumed")
    assert sorted(resumed) == [4, 5, 6]
    assert all(resumed[step] == whole[step] for step in resumed)


def test_the_weights_are_mixed_as_the_paper_says():
    torch.manual_seed(0)
    policy, reference = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    start = {name: p.detach().clone() for name, p in reference.named_parameters()}
    ema = EmaReference(reference, policy, alpha=0.3, sync_steps=4)
    for step in (1, 2, 3):
        ema.after_step(step)
    assert all(torch.equal(p, start[name]) for name, p in reference.named_parameters())
    ema.after_step(4)
    for name, p in reference.named_parameters():
        mixed = 0.3 * dict(policy.named_parameters())[name] + 0.7 * start[name]
        torch.testing.assert_close(p, mixed)
    state = ema.state_dict()
    ema.after_step(8)
    ema.load_state_dict(state)
    assert all(torch.equal(p, state[name]) for name, p in reference.named_parameters())
