"""The loss modules against plain PyTorch with full logits, and against each other."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from dpo_fast.losses import LOSSES, LossOptions, Objective, PairLogps, SequenceLogps, Totals
from dpo_fast.losses.from_tokens import as_pairs
from dpo_fast.modules import (
    FusedHead,
    FusedLinearPreferenceLoss,
    PreferenceLoss,
    UnpairedPreferenceLoss,
)
from dpo_fast.modules.scored_rows import pair_order, scored_rows

PAIRS, L, D, V = 3, 7, 8, 29
LENGTHS = (1, 5, 7, 3, 6, 2)  # chosen first, then rejected: very unequal


def make(seed=0):
    """hidden [B, L, D], weight, bias, labels in concatenated order, a reference with another size."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * PAIRS, L, D, generator=g)
    weight, bias = torch.randn(V, D, generator=g) / 2, torch.randn(V, generator=g)
    labels = torch.randint(V, (2 * PAIRS, L), generator=g)
    for row, length in enumerate(LENGTHS):
        labels[row, length:] = -100
    reference = {
        "reference_hidden": torch.randn(2 * PAIRS, L, D + 3, generator=g),
        "reference_weight": torch.randn(V, D + 3, generator=g) / 2,
        "reference_bias": torch.randn(V, generator=g),
    }
    return hidden, weight, bias, labels, reference


def logps_of(hidden, weight, bias, labels):
    """[B] by full logits in fp64; a label of -100 counts nothing."""
    logp = (hidden.double() @ weight.double().t() + bias.double()).log_softmax(-1)
    logp = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == -100, 0.0, logp).sum(1)


def expected(objective, hidden, weight, bias, labels, reference=None, columns=None):
    """Loss of concatenated pairs, in fp64."""
    lengths = (labels != -100).sum(1)
    columns = columns or {}
    sides = [x.chunk(2) for x in (logps_of(hidden, weight, bias, labels), lengths)]
    reference = (None, None) if reference is None else logps_of(*reference, labels).chunk(2)
    rows = PairLogps(
        *sides[0], *sides[1], *reference, columns.get("margin"), columns.get("soft_label")
    )
    totals = Totals(PAIRS, int(lengths[:PAIRS].sum()), 2 * PAIRS)
    return objective(rows, totals, columns.get("weight"))


# Those on groups: tests/losses/test_groups.py.
UNGROUPED = [name for name, spec in LOSSES.items() if not spec.grouped]


def arguments_of(name) -> dict:
    """Options and columns that the loss needs."""
    return {"label_smoothing": 0.1} if "label_smoothing" in LOSSES[name].options else {}


def referring(name, reference) -> dict:
    return reference if LOSSES[name].needs_reference else {}


@pytest.mark.parametrize("name", UNGROUPED)
def test_every_loss_and_its_gradients(name):
    *leaves, labels, reference = make()
    leaves = [x.requires_grad_() for x in leaves]
    options = arguments_of(name)
    columns = {c: torch.rand(PAIRS) for c in LOSSES[name].columns}
    loss, _ = FusedLinearPreferenceLoss(name, **options)(
        *leaves[:2], labels, leaves[2], columns=columns, **referring(name, reference)
    )
    objective = Objective((name,), (1.0,), LossOptions(**options))
    head = tuple(reference.values()) if LOSSES[name].needs_reference else None
    truth = expected(objective, *leaves, labels, head, columns)
    torch.testing.assert_close(loss, truth.float())
    for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, leaves)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_batch_orders_and_packed_rows_are_one_loss():
    hidden, weight, bias, labels, reference = make()
    margin = torch.rand(PAIRS)
    concatenated = FusedLinearPreferenceLoss(["sigmoid", "sft"], [1.0, 0.2])
    loss, metrics = concatenated(
        hidden, weight, labels, bias, columns={"margin": margin}, **reference
    )
    interleaved = FusedLinearPreferenceLoss(
        ["sigmoid", "sft"], [1.0, 0.2], batch_order="interleaved"
    )
    order = pair_order(2 * PAIRS, "concatenated", labels.device)
    assert order.tolist() == [0, 3, 1, 4, 2, 5]
    moved = reference | {"reference_hidden": reference["reference_hidden"][order]}
    again, metrics_again = interleaved(
        hidden[order], weight, labels[order], bias, columns={"margin": margin}, **moved
    )
    assert torch.equal(loss, again) and all(
        torch.equal(metrics[name], metrics_again[name]) for name in metrics
    )
    # Packed: the prompt of two ignored rows belongs to a sequence too.
    keep = (labels != -100) | (torch.arange(L) >= L - 2)
    lengths = keep.sum(1)
    packed = {"reference_hidden": reference["reference_hidden"][keep]}
    again, metrics_again = concatenated(
        hidden[keep],
        weight,
        labels[keep],
        bias,
        lengths=lengths,
        columns={"margin": margin},
        **(reference | packed),
    )
    assert torch.equal(loss, again) and metrics_again.keys() == metrics.keys()
    # By number, sequences mixed with each other, and rows of none of them in between.
    ids = torch.arange(2 * PAIRS)[:, None].expand(-1, L).masked_fill(labels == -100, -1)
    # The first row of each, the second, ...
    places = torch.arange(2 * PAIRS * L).view(-1, L).T.flatten()
    mixed = {"reference_hidden": reference["reference_hidden"].flatten(0, 1)[places]}
    again, _ = concatenated(
        hidden.flatten(0, 1)[places],
        weight,
        labels.flatten()[places],
        bias,
        sequence_ids=ids.flatten()[places],
        columns={"margin": margin},
        **(reference | mixed),
    )
    torch.testing.assert_close(loss, again, rtol=1e-6, atol=0)
    whole = torch.where(labels == -100, 3, labels)
    again, _ = concatenated(
        hidden, weight, whole, bias, mask=labels != -100, columns={"margin": margin}, **reference
    )
    assert torch.equal(loss, again)


def test_labels_of_hugging_face_are_shifted():
    hidden, weight, bias, labels, _ = make()
    tokens = torch.cat([torch.full((2 * PAIRS, 1), 5), labels[:, :-1]], 1)  # the first is no target
    tokens[LENGTHS.index(7), 0] = -100
    shifted = FusedLinearPreferenceLoss("simpo", shift=True)(hidden, weight, tokens, bias)[0]
    last = labels.clone()
    last[:, -1] = -100
    torch.testing.assert_close(
        shifted, FusedLinearPreferenceLoss("simpo")(hidden, weight, last, bias)[0]
    )


def test_sequence_ids_that_do_not_fit():
    labels = torch.tensor([4, 5, -100])
    for ids, message in (
        (torch.tensor([0, -1, -1]), "some such rows are"),
        (torch.tensor([0, 1]), r"sequence_ids are \(2,\); expected \(3,\)"),
        (torch.tensor([0.0, 1.0, 1.0]), "sequence_ids are torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            scored_rows(labels, sequence_ids_N=ids)
    assert scored_rows(labels, sequence_ids_N=torch.tensor([2, 0, -1])).lengths_S.tolist() == [
        1,
        0,
        1,
    ]


def test_orpo_shows_its_log_odds():
    chosen, rejected = torch.tensor([-2.0, -3.0]), torch.tensor([-4.0, -1.0])
    lengths = {"chosen_lengths": torch.tensor([2, 3]), "rejected_lengths": torch.tensor([2, 2])}
    metrics = PreferenceLoss("orpo")(chosen, rejected, **lengths)[1]
    odds = lambda p: math.exp(p) / (1 - math.exp(p))  # noqa: E731
    gaps = [math.log(odds(-1.0) / odds(-2.0)), math.log(odds(-1.0) / odds(-0.5))]
    assert metrics["log_odds"].item() == pytest.approx(sum(gaps) / 2, rel=1e-5)
    assert "log_odds" not in PreferenceLoss("simpo")(chosen, rejected, **lengths)[1]


def test_rows_keep_their_sequences():
    labels = torch.tensor([[-100, 4, 5], [6, -100, -100], [7, 8, 9], [-100, 1, -100]])
    rows = scored_rows(labels, order_S=pair_order(4, "concatenated", labels.device))
    assert rows.targets_T.tolist() == [4, 5, 7, 8, 9, 6, 1]
    assert rows.rows_T.tolist() == [1, 2, 6, 7, 8, 3, 10]
    assert rows.lengths_S.tolist() == [2, 3, 1, 1]


def test_stored_and_scored_references_are_one():
    hidden, weight, bias, labels, reference = make()
    module = FusedLinearPreferenceLoss("ipo", beta=0.3)
    scored = module(hidden, weight, labels, bias, **reference)[0]
    logps = logps_of(*reference.values(), labels).float()
    stored = module(hidden, weight, labels, bias, reference_logps=logps)[0]
    torch.testing.assert_close(scored, stored)


def test_metrics():
    hidden, weight, bias, labels, reference = make()
    module = FusedLinearPreferenceLoss(beta=0.3, extras=("entropy", "mean_logit", "is_top1"))
    leaf = weight.clone().requires_grad_()
    loss, metrics = module(hidden, leaf, labels, bias, **reference)
    assert loss.requires_grad and not any(x.requires_grad for x in metrics.values())
    logps = logps_of(hidden, weight, bias, labels)
    rewards = 0.3 * (logps - logps_of(*reference.values(), labels))
    chosen, rejected = rewards.chunk(2)
    logits = hidden @ weight.t() + bias
    scored = labels != -100
    side = torch.arange(2 * PAIRS)[:, None] < PAIRS
    probabilities = logits.softmax(-1)
    truth = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "logps/chosen": logps[:PAIRS].mean(),
        "logps/rejected": logps[PAIRS:].mean(),
        "logits/chosen": logits.mean(-1)[scored & side].mean(),
        "logits/rejected": logits.mean(-1)[scored & ~side].mean(),
        "entropy": -(probabilities * probabilities.log()).sum(-1)[scored].mean(),
        "mean_token_accuracy": (logits.argmax(-1) == labels)[scored].double().mean(),
    }
    assert metrics.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(metrics[name], truth[name].float(), rtol=1e-4, atol=1e-5)


def test_a_tie_is_half_right():
    zeros = torch.zeros(4)
    assert PreferenceLoss(reference_free=True)(zeros, zeros)[1]["rewards/accuracies"] == 0.5


@pytest.mark.parametrize("name", ["sigmoid", "sft", "cpo", "kto", "sigmoid_norm"])
def test_shares_of_micro_batches_add_up(name):
    hidden, weight, bias, labels, reference = make()
    weight.requires_grad_()
    module = FusedLinearPreferenceLoss(name)
    reference = referring(name, reference)
    whole = module(hidden, weight, labels, bias, **reference)[0]
    totals = Totals(PAIRS, sum(LENGTHS[:PAIRS]), 2 * PAIRS)
    shares = []
    for first, last in pairwise((0, 1, 3)):
        own = [*range(first, last), *range(PAIRS + first, PAIRS + last)]
        part = {k: v[own] if k == "reference_hidden" else v for k, v in reference.items()}
        shares.append(module(hidden[own], weight, labels[own], bias, totals=totals, **part)[0])
    torch.testing.assert_close(sum(shares), whole)
    parts = [torch.autograd.grad(loss, weight)[0] for loss in shares]
    torch.testing.assert_close(sum(parts), torch.autograd.grad(whole, weight)[0])


@pytest.mark.parametrize("name", [name for name in UNGROUPED if not LOSSES[name].paired])
def test_unpaired(name):
    hidden, weight, bias, labels, reference = make()
    good = torch.tensor([True, False, False, True, True])
    hidden, labels = hidden[:5], labels[:5]
    reference["reference_hidden"] = reference["reference_hidden"][:5]
    statistics = {x: torch.tensor(0.3) for x in LOSSES[name].statistics}
    weights = torch.rand(5)
    options = {"beta": 0.4, "desirable_weight": 1.5}
    fused, metrics = FusedLinearPreferenceLoss(name, **options)(
        hidden,
        weight,
        labels,
        bias,
        desirable=good,
        statistics=statistics,
        columns={"weight": weights},
        **reference,
    )
    logps = logps_of(hidden, weight, bias, labels).float()
    referred = logps_of(*reference.values(), labels).float()
    loss, same = UnpairedPreferenceLoss(name, **options)(
        logps, good, referred, statistics=statistics, columns={"weight": weights}
    )
    rows = SequenceLogps(logps, None, good, referred, statistics.get("kl"), statistics.get("delta"))
    truth = (weights * LOSSES[name].function(rows, LossOptions(**options))).mean()
    torch.testing.assert_close(fused, truth)
    torch.testing.assert_close(loss, truth)
    rewards = 0.4 * (logps - referred)
    torch.testing.assert_close(metrics["rewards/chosen"], rewards[good].mean())
    torch.testing.assert_close(same["rewards/rejected"], rewards[~good].mean())
    assert same.keys() == metrics.keys() and "rewards/margins" not in same
    only_good = UnpairedPreferenceLoss(name)(logps, torch.ones_like(good), referred)[1]
    assert only_good["rewards/rejected"].isnan() and only_good["rewards/chosen"].isfinite()


def pairs_of(seed=1):
    g = torch.Generator().manual_seed(seed)
    logps = [-5 * torch.rand(4, generator=g) for _ in range(4)]
    return logps, [torch.randint(1, 9, (4,), generator=g) for _ in range(2)]


@pytest.mark.parametrize("name", UNGROUPED)
def test_losses_of_sums(name):
    """The module is the objective; and only losses that divide by lengths look at them."""
    logps, lengths = pairs_of()
    logps = logps if LOSSES[name].needs_reference else logps[:2]
    columns = {c: torch.rand(4) for c in LOSSES[name].columns}
    options = arguments_of(name)
    module = PreferenceLoss(name, **options)
    totals = Totals(4, 11, 8)

    def run(lengths, totals=None):
        sides = dict(zip(("chosen_lengths", "rejected_lengths"), lengths))
        return module(*logps, **sides, columns=columns, totals=totals)[0]

    flat = [torch.stack(x, 1).flatten() for x in (logps[:2], lengths, logps[2:]) if len(x)]
    rows = as_pairs(flat[0], flat[1], flat[2] if len(flat) > 2 else None, columns)
    objective = Objective((name,), (1.0,), LossOptions(**options))
    truth = objective(rows, totals, columns.get("weight"))
    assert torch.equal(run(lengths, totals), truth)
    if LOSSES[name].divides(module.objective.options):
        assert run([lengths[0] + 1, lengths[1]], totals) != truth
        with pytest.raises(ValueError, match="divide by lengths"):
            run([], totals)
    else:
        assert run([], totals) == truth
    own = Totals(4, int(lengths[0].sum()), 8)
    assert torch.equal(run(lengths), run(lengths, own))


def test_one_value_by_hand():
    chosen = torch.tensor([-11.5, -11.5, -11.5])
    rejected = torch.tensor([-51.1, -20.3, -20.3])
    loss, metrics = PreferenceLoss(beta=0.1)(
        chosen, rejected, chosen, rejected + torch.tensor([0.0, 10.0, 20.0])
    )
    truth = -F.logsigmoid(torch.tensor([0.0, 1.0, 2.0])).mean()
    torch.testing.assert_close(loss, truth)
    assert metrics["rewards/accuracies"] == pytest.approx(2.5 / 3)


def test_tokens_of_a_scored_reference():
    """token_clamp and ld_alpha see its tokens; of stored sums they cannot."""
    hidden, weight, bias, labels, reference = make()
    for options in ({"token_clamp": 0.1}, {"ld_alpha": 0.0}):
        module = FusedLinearPreferenceLoss(**options)
        loss = module(hidden, weight, labels, bias, **reference)[0]
        assert loss != FusedLinearPreferenceLoss()(hidden, weight, labels, bias, **reference)[0]
        with pytest.raises(ValueError, match="need the reference's log-prob of every token"):
            module(hidden, weight, labels, bias, reference_logps=torch.zeros(2 * PAIRS))
        with pytest.raises(ValueError, match="acts on tokens"):
            PreferenceLoss(**options)
    # With ld_alpha 0 the answers of a pair are as long as the shorter one.
    short = labels.clone()
    for p in range(PAIRS):
        shorter = min(LENGTHS[p], LENGTHS[PAIRS + p])
        short[[p, PAIRS + p], shorter:] = -100
    cut = FusedLinearPreferenceLoss()(hidden, weight, short, bias, **reference)[0]
    torch.testing.assert_close(loss, cut)


def test_head_options_reach_the_head():
    hidden, weight, bias, labels, _ = make()
    module = FusedLinearPreferenceLoss("cpo", logit_scale=0.5, softcap=3.0, temperature=1.3)
    raw = 0.5 * (hidden.double() @ weight.double().t() + bias.double())
    logp = (3 * torch.tanh(raw / 3) / 1.3).log_softmax(-1)
    logp = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    sums = torch.where(labels == -100, 0.0, logp).sum(1).chunk(2)
    rows = PairLogps(*sums, *(labels != -100).sum(1).chunk(2))
    truth = Objective(("cpo",))(rows, Totals(PAIRS, sum(LENGTHS[:PAIRS])))
    torch.testing.assert_close(module(hidden, weight, labels, bias)[0], truth.float())


def test_weighting_asks_the_head_for_what_it_needs():
    hidden, weight, bias, labels, reference = make()
    module = FusedLinearPreferenceLoss(use_weighting=True, weighting_clamp=1.0)
    loss, metrics = module(hidden, weight, labels, bias, **reference)
    plain = FusedLinearPreferenceLoss()(hidden, weight, labels, bias, **reference)[0]
    assert loss != plain and "logits/chosen" not in metrics


@pytest.mark.parametrize(
    "make_module, message",
    [
        (lambda: FusedLinearPreferenceLoss("dpo"), "loss .'dpo'. is not known"),
        (lambda: FusedLinearPreferenceLoss(simpo_gamma=1.0), "simpo_gamma=1.0 is not used"),
        (lambda: FusedLinearPreferenceLoss(batch_order="mixed"), "batch_order='mixed'"),
        (lambda: FusedLinearPreferenceLoss(extras=("entropi",)), "extras=.'entropi'.: choose"),
        (lambda: FusedLinearPreferenceLoss(softcap=-1.0), "softcap=-1.0"),
        (lambda: FusedLinearPreferenceLoss(["sigmoid", "sft"], [1.0]), "expected one for each"),
        (lambda: PreferenceLoss(use_weighting=True), "use_weighting=True acts on tokens"),
        (lambda: UnpairedPreferenceLoss("sigmoid"), "compare the answers of pairs"),
    ],
)
def test_options_that_cannot_be_honoured(make_module, message):
    with pytest.raises(ValueError, match=message):
        make_module()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.zeros(6, 7)}, "labels are torch.float32"),
        ({"labels": torch.zeros(6, 5, dtype=torch.int64)}, "expected a row of hidden states"),
        ({"labels": torch.zeros(42, dtype=torch.int64)}, "packed labels need them"),
        ({"labels": torch.zeros(5, 7, dtype=torch.int64)}, "5 sequences are no pairs"),
        ({"reference_logps": torch.zeros(6)}, "not both"),
        ({"reference_weight": None}, "belong together"),
        ({"reference_weight": None, "reference_hidden": None}, "need a reference"),
        ({"columns": {"margin": torch.zeros(6)}}, "vectors of one length"),
        ({"columns": {"soft_label": torch.zeros(3)}}, "do not use the columns"),
        ({"statistics": {"kl": torch.zeros(())}}, "do not use the statistics"),
        ({"desirable": torch.ones(6, dtype=torch.bool)}, "compare the answers of pairs"),
        ({"lengths": torch.full((6,), 7)}, "one of them, belong to packed labels"),
        ({"sequence_ids": torch.arange(42) // 7}, "one of them, belong to packed labels"),
        ({"mask": torch.ones(6, 7)}, r"mask is torch.float32 \(6, 7\); expected torch.bool"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    hidden, weight, bias, labels, reference = make()
    inputs = {"labels": labels, "bias": bias, **reference} | change
    with pytest.raises(ValueError, match=message):
        FusedLinearPreferenceLoss()(hidden, weight, **inputs)


def test_sums_that_do_not_fit():
    (chosen, rejected, *reference), lengths = pairs_of()
    with pytest.raises(ValueError, match="need the reference"):
        PreferenceLoss()(chosen, rejected)
    with pytest.raises(ValueError, match="or of neither"):
        PreferenceLoss()(chosen, rejected, reference[0])
    with pytest.raises(ValueError, match="reference_free=True uses no reference"):
        PreferenceLoss(reference_free=True)(chosen, rejected, *reference)
    with pytest.raises(ValueError, match="vectors of one length"):
        PreferenceLoss()(chosen, rejected[:1], *reference)
    with pytest.raises(ValueError, match="chosen_lengths and rejected_lengths, or neither"):
        PreferenceLoss("sft")(chosen, rejected, chosen_lengths=lengths[0])
    with pytest.raises(ValueError, match="number of chosen tokens"):
        PreferenceLoss("sft")(chosen, rejected)
    with pytest.raises(ValueError, match="need the columns"):
        PreferenceLoss("soft")(chosen, rejected, *reference)
    with pytest.raises(ValueError, match="desirable is torch.float32"):
        UnpairedPreferenceLoss()(chosen, rejected, reference[0])


DIVIDING = [name for name, spec in LOSSES.items() if spec.paired and spec.divides(LossOptions())]


@pytest.mark.parametrize("name", DIVIDING)
def test_a_sequence_without_scored_tokens_has_no_mean(name):
    """Its mean would be nan, and so would all gradients be."""
    hidden, weight, bias, labels, reference = make()
    labels = labels.clone()
    labels[1] = -100
    with pytest.raises(ValueError, match="a sequence has no scored token: leave the pair out"):
        FusedLinearPreferenceLoss(name)(hidden, weight, labels, bias, **reference)
    sums, lengths = pairs_of()
    lengths = [x.clone() for x in lengths]
    lengths[1][0] = 0
    with pytest.raises(ValueError, match="a sequence has no scored token: leave the pair out"):
        PreferenceLoss(name)(*sums, chosen_lengths=lengths[0], rejected_lengths=lengths[1])


def test_totals_that_leave_rows_out():
    """Counts left at 0 would make a mean a sum; and parts of a sorted batch have no losses of their own."""
    sums, lengths = pairs_of()
    pairs = len(lengths[0])
    with pytest.raises(ValueError, match="totals.pairs=1: sigmoid divides by it"):
        PreferenceLoss()(*sums, totals=Totals(1, 0))
    with pytest.raises(ValueError, match=r"totals.chosen_tokens=0: losses \('cpo',\) divide by"):
        PreferenceLoss("cpo")(*sums[:2], totals=Totals(pairs, 0))
    with pytest.raises(ValueError, match="losses .'aot',. sort the pairs of the global batch"):
        PreferenceLoss("aot")(*sums, totals=Totals(2 * pairs, 0))
    good = torch.arange(pairs) == 0
    with pytest.raises(ValueError, match="totals.sequences=0: kto divides by it"):
        UnpairedPreferenceLoss()(sums[0], good, sums[2], totals=Totals(0, 0))
    hidden, weight, bias, labels, reference = make()
    with pytest.raises(ValueError, match="totals.chosen_tokens=0"):
        FusedLinearPreferenceLoss("sft")(hidden, weight, labels, bias, totals=Totals(PAIRS, 0))
    with pytest.raises(ValueError, match="its parts have no losses of their own; give it whole"):
        FusedLinearPreferenceLoss("aot")(
            hidden, weight, labels, bias, **reference, totals=Totals(2 * PAIRS, 0)
        )


def test_what_would_be_ignored_is_refused():
    hidden, weight, bias, labels, _ = make()
    logps = torch.zeros(len(labels))
    with pytest.raises(ValueError, match="reference_bias belongs to reference_hidden"):
        FusedLinearPreferenceLoss()(
            hidden, weight, labels, reference_logps=logps, reference_bias=bias
        )
    with pytest.raises(ValueError, match=r"statistics\['kl'\] is .* expected one number"):
        FusedLinearPreferenceLoss("kto")(
            hidden, weight, labels, reference_logps=logps, statistics={"kl": logps}
        )
    with pytest.raises(ValueError, match=r"extras=\('entropy',\) belong to scored tokens"):
        FusedHead(torch.nn.Parameter(weight.detach()))(hidden, extras=("entropy",))
    with pytest.raises(ValueError, match=r"weights=\[nan\]: each must be a finite number"):
        FusedLinearPreferenceLoss("sigmoid", [float("nan")])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.bfloat16])
def test_columns_of_another_dtype(dtype):
    hidden, weight, bias, labels, _ = make()
    logps, column = torch.zeros(len(labels)), torch.arange(PAIRS) % 2
    results = [
        FusedLinearPreferenceLoss()(
            hidden, weight, labels, bias, reference_logps=logps, columns={name: column.to(kind)}
        )[0]
        for name in ("weight", "margin")
        for kind in (dtype, torch.float32)
    ]
    assert all(loss.dtype == torch.float32 for loss in results)
    assert results[0] == results[1] and results[2] == results[3]


def test_the_module_is_one_graph_for_any_shape():
    """Labels decide how many rows are scored; of sequences there are as many as labels have rows."""
    module = FusedLinearPreferenceLoss(["sigmoid"], extras=("entropy",))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    weight = torch.randn(30, 8, requires_grad=True)
    for B, L in ((4, 6), (6, 9), (2, 5)):
        hidden, labels = torch.randn(B, L, 8), torch.randint(30, (B, L))
        labels[:, : L // 2] = -100
        inputs = (hidden, weight, labels)
        reference = torch.randn(B)
        got, want = (each(*inputs, reference_logps=reference)[0] for each in (compiled, module))
        torch.testing.assert_close(got, want)
        got, want = (torch.autograd.grad(loss, weight)[0] for loss in (got, want))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shift", [False, True])
def test_labels_of_the_other_shift_are_noticed_by_the_tokens(shift):
    hidden, weight, _, _, _ = make()
    tokens = torch.arange(2 * PAIRS * L).view(2 * PAIRS, L) % V
    unshifted = tokens.masked_fill(torch.arange(L) < 3, -100)
    shifted = torch.cat([unshifted[:, 1:], unshifted.new_full((2 * PAIRS, 1), -100)], 1)
    right, wrong = (unshifted, shifted) if shift else (shifted, unshifted)
    module = FusedLinearPreferenceLoss("simpo", shift=shift)
    loss, _ = module(hidden, weight, right, input_ids=tokens)
    assert loss == module(hidden, weight, right)[0]
    with pytest.raises(ValueError, match="leave it out" if shift else "pass shift=True"):
        module(hidden, weight, wrong, input_ids=tokens)
    with pytest.raises(ValueError, match=r"input_ids are \(5, 7\); expected"):
        module(hidden, weight, right, input_ids=tokens[1:])
    # One token over and over tells nothing.
    module(hidden, weight, torch.ones_like(tokens), input_ids=torch.ones_like(tokens))
