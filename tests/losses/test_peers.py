"""Our losses against the code of TRL's trainers and of Liger's chunked losses, on the same numbers.

TRL's own `_compute_loss` runs here, on a model that returns chosen log-probabilities. What differs by
design is at the end.
"""

import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from dpo_fast.losses import LOSSES, LossOptions, Objective, PairLogps, Totals, preference
from dpo_fast.modules.metrics import means, sequence_metrics

PROMPT, LONGEST = 2, 9
LENGTHS = [3, 9, 1, 5, 2, 7, 6, 4]  # chosen ones first, then rejected, as TRL lays out a batch
PAIRS = len(LENGTHS) // 2
INTERLEAVED = torch.arange(2 * PAIRS).view(2, PAIRS).T.flatten()  # our order
TOTALS = Totals(PAIRS, sum(LENGTHS[:PAIRS]), 2 * PAIRS)


class Tokens:
    """A model's log-probs of the batch, in TRL's rows (0 outside completions) and in ours."""

    def __init__(self, seed: int = 0, spread: float = 1.0):
        g = torch.Generator().manual_seed(seed)
        place = torch.arange(1, PROMPT + LONGEST)
        ends = PROMPT + torch.tensor(LENGTHS)[:, None]
        self.mask = (place >= PROMPT) & (place < ends)
        self.logp = self._negative(g, 1.5).requires_grad_()
        self.reference = self._negative(g, 1.5 * spread)
        self.log_sum_p2 = self._negative(g, 1.0)

    def _negative(self, g, scale: float) -> torch.Tensor:
        return -scale * torch.rand(self.mask.shape, generator=g) * self.mask

    def flat(self, rows: torch.Tensor) -> torch.Tensor:
        """[T], in our order."""
        return rows[INTERLEAVED][self.mask[INTERLEAVED]]

    def sums(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[INTERLEAVED].sum(1)

    @property
    def completion_mask(self) -> torch.Tensor:
        """As TRL has it: with the first token, which nothing predicts."""
        return torch.cat([torch.zeros(2 * PAIRS, 1, dtype=torch.bool), self.mask], 1).long()


class Model(torch.nn.Module):
    """Gives what TRL's patched forward would."""

    is_gradient_checkpointing = False

    def __init__(self, tokens: Tokens, logp: torch.Tensor):
        super().__init__()
        shape = tokens.mask.shape
        self.outputs = SimpleNamespace(
            log_probs=logp,
            log_sum_sq_probs=tokens.log_sum_p2,
            entropy=torch.zeros(shape),
            mean_logits=torch.zeros(shape),
            is_top1=torch.zeros(shape, dtype=torch.bool),
        )

    def forward(self, **_):
        return self.outputs


def same(x):
    return x


def trainer(tokens: Tokens, **attributes) -> SimpleNamespace:
    """What `_compute_loss` reads of a trainer."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same
    )
    return SimpleNamespace(
        model=Model(tokens, tokens.logp),
        ref_model=Model(tokens, tokens.reference),
        accelerator=accelerator,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=defaultdict(dict_of_lists),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def dict_of_lists() -> dict:
    return defaultdict(list)


def batch(tokens: Tokens) -> dict:
    ids = torch.ones_like(tokens.completion_mask)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": tokens.completion_mask}


DPO_DEFAULTS = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
}


def trl_dpo(tokens: Tokens, losses, weights=None, discopop_tau: float = 0.05, **options):
    """Loss and slopes, in our order, of trl.DPOTrainer."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    weights = weights or [1.0] * len(losses)
    own = trainer(tokens, loss_types=losses, loss_weights=weights, **(DPO_DEFAULTS | options))
    own.args.discopop_tau = discopop_tau
    loss = trl.DPOTrainer._compute_loss(own, own.model, batch(tokens), return_outputs=False)
    return loss.detach(), tokens.flat(torch.autograd.grad(loss, tokens.logp)[0]), own._metrics


def ours(tokens: Tokens, losses, weights=None, good=None, statistics=None, **options):
    objective = Objective(
        tuple(losses), tuple(weights or [1.0] * len(losses)), LossOptions(**options)
    )
    order = INTERLEAVED if good is None else torch.arange(2 * PAIRS)
    result = preference(
        tokens.logp[order][tokens.mask[order]],
        torch.tensor(LENGTHS)[order],
        tokens.reference[order].sum(1) if objective.needs_reference else None,
        objective,
        TOTALS,
        reference_T=tokens.reference[order][tokens.mask[order]],
        log_sum_p2_T=tokens.log_sum_p2[order][tokens.mask[order]],
        desirable_S=good,
        statistics=statistics,
        implementation="torch",
    )
    slopes = torch.autograd.grad(result.loss, tokens.logp)[0]
    return result.loss.detach(), slopes[order][tokens.mask[order]], result


def check(got, expected) -> None:
    """Loss to 1e-6, or a rounding of terms that cancel; slopes to 1e-6 of the largest."""
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=1e-7)
    largest = expected[1].abs().max().item()
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6 * largest)


DIVERGENCES = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.7},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
]
WITH_DIVERGENCES = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"]
OF_DPO_TRAINER = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
NEEDED = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}}


@pytest.mark.peers
def test_these_are_all_losses_of_trl():
    with pytest.raises(ValueError, match="Should be one of") as error:
        trl_dpo(Tokens(), ["no such loss"])
    names = re.findall(r"'(\w+)'", str(error.value).split("Should be one of")[1])
    assert sorted(names) == sorted(OF_DPO_TRAINER)
    assert set(names) <= set(LOSSES)


@pytest.mark.peers
@pytest.mark.parametrize("beta", [0.1, 1.3])
@pytest.mark.parametrize("name", OF_DPO_TRAINER)
def test_trl_dpo(name, beta):
    tokens, options = Tokens(), {"beta": beta} | NEEDED.get(name, {})
    check(ours(tokens, [name], **options), trl_dpo(tokens, [name], **options))


@pytest.mark.peers
@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
@pytest.mark.parametrize("name", WITH_DIVERGENCES)
def test_trl_divergences(name, options):
    tokens, options = Tokens(), options | NEEDED.get(name, {})
    check(ours(tokens, [name], **options), trl_dpo(tokens, [name], **options))


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("exo_pair", {"label_smoothing": 0.2}),
        ("robust", {"label_smoothing": 0.4}),
        ("aot", {"label_smoothing": 0.3}),
        ("aot_unpaired", {"label_smoothing": 0.3}),
        ("discopop", {"discopop_tau": 0.7}),
    ],
)
def test_trl_options_of_single_losses(name, options):
    tokens = Tokens()
    check(ours(tokens, [name], **options), trl_dpo(tokens, [name], **options))


@pytest.mark.peers
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", [name for name in OF_DPO_TRAINER if name != "sft"])
def test_trl_ld_alpha(name, alpha):
    tokens, options = Tokens(), {"ld_alpha": alpha} | NEEDED.get(name, {})
    check(ours(tokens, [name], **options), trl_dpo(tokens, [name], **options))


UNWEIGHTED = {"aot", "aot_unpaired", "hinge", "sft"}  # TRL refuses, or fails: see the end


@pytest.mark.peers
@pytest.mark.parametrize("name", [n for n in OF_DPO_TRAINER if n not in UNWEIGHTED])
def test_trl_weighting(name):
    tokens, options = Tokens(), {"use_weighting": True} | NEEDED.get(name, {})
    check(ours(tokens, [name], **options), trl_dpo(tokens, [name], **options))
    check(
        ours(tokens, [name], ld_alpha=0.3, **options),
        trl_dpo(tokens, [name], ld_alpha=0.3, **options),
    )


MIXTURES = {
    "MPO": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], {}),
    "RPO, length-desensitised": (["sigmoid", "sft"], [1.0, 0.5], {"ld_alpha": 0.2}),
    "divergence beside sft": (["ipo", "sft"], [1.0, 0.3], {"f_divergence_type": "js_divergence"}),
    "weighted": (["sigmoid", "apo_zero"], [0.3, 2.0], {"use_weighting": True}),
    "smoothed": (["robust", "exo_pair", "aot"], [1.0, 0.1, 0.7], {"label_smoothing": 0.2}),
    "negative weight": (["hinge", "nca_pair"], [1.0, -0.2], {}),
}


@pytest.mark.peers
@pytest.mark.parametrize("case", MIXTURES)
def test_trl_mixtures(case):
    losses, weights, options = MIXTURES[case]
    tokens = Tokens()
    check(ours(tokens, losses, weights, **options), trl_dpo(tokens, losses, weights, **options))


# Of ipo and sigmoid_norm that trainer logs sums though the losses divide by lengths; sft alone has a
# reference there and none here.
OTHER_REWARDS = {"ipo", "sigmoid_norm", "sft"}


@pytest.mark.peers
@pytest.mark.parametrize("name", [name for name in OF_DPO_TRAINER if name not in OTHER_REWARDS])
def test_trl_rewards(name):
    tokens, options = Tokens(), {"beta": 0.3} | NEEDED.get(name, {})
    metrics = trl_dpo(tokens, [name], **options)[2]["train"]
    check_rewards(ours(tokens, [name], **options)[2], metrics)


# KTO's trainer.

GOOD = torch.tensor([True, True, False, True, False, True, False, True])


def trl_kto(tokens: Tokens, loss_type: str, kl: float, good=GOOD, **weights):
    trl = pytest.importorskip("trl.trainer.kto_trainer")
    own = trainer(
        tokens,
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        beta=0.2,
        **({"desirable_weight": 1.0, "undesirable_weight": 1.0} | weights),
    )
    own._compute_kl_logps = lambda model, _: torch.tensor(
        [-5.0 + kl, -7.0 + kl] if model is own.model else [-5.0, -7.0]
    )
    inputs = batch(tokens) | {"label": good}
    loss = trl.KTOTrainer._compute_loss(own, own.model, inputs, return_outputs=False)
    slopes = torch.autograd.grad(loss, tokens.logp)[0][tokens.mask]
    return loss.detach(), slopes, own._metrics["train"]["kl"][0]


@pytest.mark.peers
@pytest.mark.parametrize("good", [GOOD, ~GOOD, GOOD | True, GOOD & False], ids=str)
@pytest.mark.parametrize("weights", [{}, {"desirable_weight": 0.7, "undesirable_weight": 1.5}])
@pytest.mark.parametrize(
    ("name", "kl"), [("kto", 0.0), ("kto", 1.25), ("kto", -2.0), ("apo_zero_unpaired", 0.0)]
)
def test_trl_kto(name, kl, weights, good):
    tokens = Tokens()
    expected = trl_kto(tokens, name, kl, good, **weights)
    assert expected[2] == pytest.approx(max(kl, 0.0))
    statistics = {"kl": torch.tensor(max(kl, 0.0))}
    check(ours(tokens, [name], good=good, statistics=statistics, beta=0.2, **weights), expected)


# CPO's and ORPO's trainers. They have no reference, and an sft term of their own.


def trl_cpo(tokens: Tokens, loss_type: str, average: bool, **attributes):
    """simpo and ipo average over tokens, which that trainer does before it calls the loss."""
    trl = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    defaults = {"label_smoothing": 0.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0, "alpha": 0.0}
    own = trainer(tokens, loss_type=loss_type, **(defaults | attributes))
    own.concatenated_forward = lambda *_: forward(tokens, average)
    own.cpo_loss = lambda *logps: trl.CPOTrainer.cpo_loss(own, *logps)
    loss, metrics = trl.CPOTrainer.get_batch_loss_metrics(own, own.model, {})
    return loss.detach(), tokens.flat(torch.autograd.grad(loss, tokens.logp)[0]), metrics


def forward(tokens: Tokens, average: bool):
    """(chosen, rejected, their logits, mean loss of the chosen tokens), as concatenated_forward."""
    logps = tokens.logp.sum(1) / (tokens.mask.sum(1) if average else 1)
    nll = -tokens.logp[:PAIRS].sum() / tokens.mask[:PAIRS].sum()
    return *logps.split(PAIRS), torch.zeros(1), torch.zeros(1), nll


@pytest.mark.peers
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.3])
def test_trl_cpo(alpha, smoothing):
    tokens = Tokens()
    options = {"beta": 0.4, "cpo_alpha": alpha, "label_smoothing": smoothing}
    check(ours(tokens, ["cpo"], **options), trl_cpo(tokens, "sigmoid", average=False, **options))


@pytest.mark.peers
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_trl_simpo(smoothing):
    tokens = Tokens()
    options = {"beta": 2.5, "simpo_gamma": 1.2, "label_smoothing": smoothing}
    expected = trl_cpo(tokens, "simpo", average=True, **options)
    check(ours(tokens, ["simpo"], **options), expected)
    # Its CPO-SimPO, with an sft term, is a mixture here.
    expected = trl_cpo(tokens, "simpo", average=True, cpo_alpha=0.6, **options)
    check(ours(tokens, ["simpo", "sft"], [1.0, 0.6], **options), expected)


@pytest.mark.peers
@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_trl_cpo_hinge_is_slic(beta):
    """relu(1 - beta gap) + alpha sft = beta (relu(1/beta - gap) + alpha/beta sft)."""
    tokens = Tokens()
    expected = trl_cpo(tokens, "hinge", average=False, beta=beta, cpo_alpha=0.3)
    options = {"slic_delta": 1 / beta, "slic_lambda": 0.3 / beta}
    check(ours(tokens, ["slic"], [beta], **options), expected)


@pytest.mark.peers
def test_trl_cpo_ipo_is_ipo_without_reference():
    tokens = Tokens()
    expected = trl_cpo(tokens, "ipo", average=True, beta=0.3)
    check(ours(tokens, ["ipo"], beta=0.3, reference_free=True), expected)


@pytest.mark.peers
def test_trl_orpo():
    """Given the mean over the chosen tokens, as here. Its trainer counts those of the prompt as well."""
    trl = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    tokens = Tokens()
    own = trainer(tokens, beta=0.3)
    own.concatenated_forward = lambda *_: forward(tokens, average=True)
    own.odds_ratio_loss = lambda *logps: trl.ORPOTrainer.odds_ratio_loss(own, *logps)
    loss, metrics = trl.ORPOTrainer.get_batch_loss_metrics(own, own.model, {})
    slopes = tokens.flat(torch.autograd.grad(loss, tokens.logp)[0])
    got = ours(tokens, ["orpo"], beta=0.3)
    check(got, (loss.detach(), slopes))
    check_rewards(got[2], metrics)


def check_rewards(result, metrics: dict) -> None:
    """Rewards, margins and accuracies: our metrics against those that a trainer of TRL logs."""
    found = means(sequence_metrics(result.logps_S, result.rewards_S))
    for name in ("chosen", "rejected", "margins", "accuracies"):
        expected = metrics[f"rewards/{name}"]
        expected = expected[0] if isinstance(expected, list) else expected
        assert found[f"rewards/{name}"].item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "own", "average"), [("cpo", "sigmoid", False), ("simpo", "simpo", True)]
)
def test_trl_cpo_rewards(name, own, average):
    tokens = Tokens()
    metrics = trl_cpo(tokens, own, average=average, beta=2.5)[2]
    check_rewards(ours(tokens, [name], beta=2.5)[2], metrics)
    mixture = ours(tokens, [name, "sft"], [1.0, 0.3], beta=2.5)[2]
    check_rewards(mixture, metrics)


@pytest.mark.peers
def test_trl_cpo_ipo_rewards():
    tokens = Tokens()
    metrics = trl_cpo(tokens, "ipo", average=True, beta=0.3)[2]
    check_rewards(ours(tokens, ["ipo"], beta=0.3, reference_free=True)[2], metrics)


# Liger's.


def sides(tokens: Tokens, rows: torch.Tensor, average: bool = False):
    return (rows.sum(1) / (tokens.mask.sum(1) if average else 1)).split(PAIRS)


def liger(tokens: Tokens, module: str, function: str, *logps, **options):
    chunked = pytest.importorskip(f"liger_kernel.chunked_loss.{module}")
    target = torch.zeros(2 * PAIRS, LONGEST)  # it reads the number of rows
    loss = getattr(chunked, function).preference_loss_fn(*logps, target, **options)[0]
    (slopes,) = torch.autograd.grad(loss, tokens.logp, retain_graph=True)
    return loss.detach(), tokens.flat(slopes)


OF_LIGER = [
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]


@pytest.mark.parametrize("name", OF_LIGER)
def test_liger_dpo(name):
    tokens, options = Tokens(), {"beta": 0.3} | NEEDED.get(name, {})
    if name == "discopop":
        options["discopop_tau"] = 0.4
    reference = dict(
        zip(("ref_chosen_logps", "ref_rejected_logps"), sides(tokens, tokens.reference))
    )
    expected = liger(
        tokens,
        "dpo_loss",
        "LigerFusedLinearDPOFunction",
        *sides(tokens, tokens.logp),
        loss_type=name,
        **reference,
        **options,
    )
    check(ours(tokens, [name], **options), expected)
    expected = liger(
        tokens,
        "dpo_loss",
        "LigerFusedLinearDPOFunction",
        *sides(tokens, tokens.logp),
        loss_type=name,
        **options,
    )
    check(ours(tokens, [name], reference_free=True, **options), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_liger_without_reference(smoothing):
    tokens, smoothed = Tokens(), {"beta": 0.6, "label_smoothing": smoothing}
    means, sums = sides(tokens, tokens.logp, average=True), sides(tokens, tokens.logp)
    expected = liger(
        tokens, "simpo_loss", "LigerFusedLinearSimPOFunction", *means, gamma=0.9, **smoothed
    )
    check(ours(tokens, ["simpo"], simpo_gamma=0.9, **smoothed), expected)
    expected = liger(tokens, "cpo_loss", "LigerFusedLinearCPOFunction", *sums, **smoothed)
    check(ours(tokens, ["cpo"], cpo_alpha=0.0, **smoothed), expected)
    # Its sft term is added outside of this function, in the base class: a mixture of the parts.
    expected = liger(tokens, "orpo_loss", "LigerFusedLinearORPOFunction", *means, beta=0.6)
    check(ours(tokens, ["orpo", "sft"], [1.0, -1.0], beta=0.6), expected)


@pytest.mark.peers
@pytest.mark.parametrize("kl", [None, 1.25])
def test_liger_kto(kl):
    chunked = pytest.importorskip("liger_kernel.chunked_loss.kto_loss")
    tokens = Tokens()
    kl = None if kl is None else torch.tensor(kl)
    loss = chunked.LigerFusedLinearKTOFunction.preference_loss_fn(
        tokens.logp.sum(1),
        GOOD,
        torch.zeros(2 * PAIRS, LONGEST),
        tokens.reference.sum(1),
        beta=0.3,
        kl=kl,
    )[0]
    expected = loss.detach(), torch.autograd.grad(loss, tokens.logp)[0][tokens.mask]
    statistics = {} if kl is None else {"kl": kl}
    check(ours(tokens, ["kto"], good=GOOD, statistics=statistics, beta=0.3), expected)


# Where we differ by design.


@pytest.mark.peers
def test_label_smoothing_of_sigmoid_is_honoured_here():
    """TRL's sigmoid and sigmoid_norm take no notice of it."""
    tokens = Tokens()
    for name in ("sigmoid", "sigmoid_norm"):
        assert torch.equal(
            trl_dpo(tokens, [name])[0], trl_dpo(tokens, [name], label_smoothing=0.3)[0]
        )
        assert ours(tokens, [name])[0] != ours(tokens, [name], label_smoothing=0.3)[0]


@pytest.mark.peers
def test_discopop_of_a_pair_that_is_far_off_is_finite_here():
    """There exp(-x) overflows, where its factor S(x / tau) is 0."""
    tokens = Tokens(spread=400.0)
    assert trl_dpo(tokens, ["discopop"])[0].isnan()
    loss, slopes, _ = ours(tokens, ["discopop"])
    assert loss.isfinite() and slopes.isfinite().all() and slopes.abs().max() > 0


@pytest.mark.peers
def test_forward_kl_of_a_completion_that_has_become_impossible_is_finite_here():
    tokens = Tokens()
    with torch.no_grad():
        tokens.logp *= 400
    options = {"f_divergence_type": "forward_kl"}
    assert not trl_dpo(tokens, ["sigmoid"], **options)[0].isfinite()
    loss, slopes, _ = ours(tokens, ["sigmoid"], **options)
    assert loss.isfinite() and slopes.isfinite().all()


@pytest.mark.peers
def test_weighting_trains_where_trl_cannot():
    """TRL multiplies in place: on hinge's relu backward fails, on sft's one number the forward."""
    tokens = Tokens()
    with pytest.raises(RuntimeError, match="inplace operation"):
        trl_dpo(tokens, ["hinge"], use_weighting=True)
    with pytest.raises(RuntimeError, match="single memory location"):
        trl_dpo(tokens, ["sft"], use_weighting=True)
    weights = (tokens.logp - tokens.log_sum_p2).sum(1).div(torch.tensor(LENGTHS)).exp()
    weights = weights[:PAIRS] * weights[PAIRS:]
    ratios = (tokens.logp - tokens.reference).sum(1)
    hinge = weights * (1 - 0.1 * (ratios[:PAIRS] - ratios[PAIRS:])).relu()
    loss, slopes, _ = ours(tokens, ["hinge"], use_weighting=True)
    assert loss.item() == pytest.approx(hinge.mean().item()) and slopes.abs().max() > 0
    nll = -(weights * tokens.logp[:PAIRS].sum(1)).sum() / sum(LENGTHS[:PAIRS])
    assert ours(tokens, ["sft"], use_weighting=True)[0].item() == pytest.approx(nll.item())


def test_sft_of_a_global_batch_is_a_mean_over_its_tokens_here():
    """TRL takes the mean of each micro-batch: cut otherwise, it is another loss."""
    lw, lengths = torch.tensor([-4.0, -30.0]), torch.tensor([1.0, 9.0])
    objective, totals = Objective(("sft",)), Totals(pairs=2, chosen_tokens=10)
    rows = [PairLogps(lw[i : i + 1], lw[:1], lengths[i : i + 1], lengths[:1]) for i in range(2)]
    assert sum(objective(row, totals) for row in rows).item() == pytest.approx(34 / 10)
    assert (-lw / lengths).mean().item() == pytest.approx(22 / 6)
