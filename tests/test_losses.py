"""Losses against their formulas, by gradcheck, at extreme margins, and whether options do something."""

import math

import pytest
import torch

from dpo_fast.losses import LOSSES, LossOptions, Objective, PairLogps, Totals


def pairs(lw, ll, rw, rl, nw=None, nl=None, dtype=torch.float64) -> PairLogps:
    make = lambda x: torch.as_tensor(x, dtype=dtype)  # noqa: E731
    ones = torch.ones(len(lw), dtype=dtype)
    return PairLogps(
        make(lw), make(ll), ones if nw is None else make(nw), ones if nl is None else make(nl),
        make(rw), make(rl),
    )  # fmt: skip


def values(name: str, inputs: PairLogps, **options) -> torch.Tensor:
    return LOSSES[name].function(inputs, LossOptions(**options))


def test_published_sigmoid_values():
    """Policy and reference of a known check: margins 0, 10 and 20, beta 0.1."""
    inputs = pairs(
        [-0.5, -10, -1], [-0.1, -30, -21], [-0.5, -10.1, -0.1], [-0.1, -20.1, -0.1]
    )  # fmt: skip
    expected = [-math.log(1 / (1 + math.exp(-x))) for x in (0, 1, 2)]
    assert values("sigmoid", inputs).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [("sigmoid", 0.437488, -0.035434), ("hinge", 0.4, -0.1), ("ipo", 1.0, 2.0)],
)
def test_values_at_margin_6(name, value, slope):
    chosen = torch.tensor([6.0], dtype=torch.float64, requires_grad=True)
    inputs = pairs([0], [0], [0], [0])
    inputs = PairLogps(chosen, *list(vars(inputs).values())[1:])
    result = values(name, inputs)
    result.sum().backward()
    assert result.item() == pytest.approx(value, abs=1e-6)
    assert chosen.grad.item() == pytest.approx(slope, abs=1e-6)


def test_robust_and_norm_and_sft_by_hand():
    inputs = pairs([-2.0], [-8.0], [-3.0], [-5.0], [2], [4])  # a = 1, b = -3, d = 4
    ls = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
    robust = (-0.8 * ls(2.0) + 0.2 * ls(-2.0)) / 0.6
    got = values("robust", inputs, beta=0.5, label_smoothing=0.2).item()
    assert got == pytest.approx(robust, abs=1e-12)
    norm = 2.0 * (1 / 2 + 3 / 4)
    got = values("sigmoid_norm", inputs, beta=2.0, label_smoothing=0.1).item()
    assert got == pytest.approx(-0.9 * ls(norm) - 0.1 * ls(-norm), abs=1e-12)
    assert values("sft", inputs).item() == 2.0
    assert values("ipo", inputs, beta=0.1, length_average=False).item() == pytest.approx(1.0)
    assert values("ipo", inputs, beta=0.1).item() == pytest.approx((1.25 - 5) ** 2)


def test_step_0_is_ln_2():
    inputs = pairs([-12.5, -3], [-40, -7], [-12.5, -3], [-40, -7], dtype=torch.float32)
    for name in ("sigmoid", "sigmoid_norm"):
        for eps in (0.0, 0.3):
            got = values(name, inputs, label_smoothing=eps)
            assert got.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("eps", [0.0, 0.25])
def test_gradcheck(name, eps):
    generator = torch.Generator().manual_seed(0)
    logps = [torch.randn(5, generator=generator).double().requires_grad_() for _ in range(4)]
    lengths = torch.arange(1, 6).double(), torch.arange(6, 1, -1).double()

    def loss(chosen, rejected, reference_chosen, reference_rejected):
        inputs = PairLogps(chosen, rejected, *lengths, reference_chosen, reference_rejected)
        return values(name, inputs, beta=0.3, label_smoothing=eps)

    torch.autograd.gradcheck(loss, logps)


LIMITS = {  # at margins +1e4 and -1e4, one token, beta 0.1, eps 0
    "sigmoid": (0.0, 1000.0),
    "hinge": (0.0, 1001.0),
    "robust": (0.0, 1000.0),
    "sigmoid_norm": (0.0, 1000.0),
    "ipo": ((1e4 - 5) ** 2, (1e4 + 5) ** 2),
    "sft": (-1e4, 1e4),
}


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_margins(name):
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    zero = torch.zeros(2)
    result = values(name, PairLogps(chosen, zero, zero + 1, zero + 1, zero, zero))
    result.sum().backward()
    assert result.tolist() == pytest.approx(LIMITS[name], rel=1e-6)
    assert torch.isfinite(chosen.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_every_option_that_a_loss_claims_changes_it(name):
    inputs = pairs([-2.0], [-8.0], [-3.0], [-5.0], [2], [4])
    changed = {"beta": 0.7, "label_smoothing": 0.3, "length_average": False}
    default = values(name, inputs)
    for option, value in changed.items():
        differs = not torch.equal(values(name, inputs, **{option: value}), default)
        assert differs == (option in LOSSES[name].options), option


def test_objective_shares_add_up_to_the_global_loss():
    """Two micro-batches of different sizes give what one gives; sft counts tokens, not pairs."""
    whole = pairs(
        [-1.0, -2, -9], [-4.0, -1, -3], [-1.5, -2, -8], [-3, -2, -1], [1, 2, 7], [2, 1, 3]
    )
    part = lambda rows: PairLogps(*(x[rows] for x in vars(whole).values()))  # noqa: E731
    objective = Objective(("sigmoid", "sft"), (1.0, 0.5), LossOptions(beta=0.2))
    totals = Totals(pairs=3, chosen_tokens=10)
    expected = values("sigmoid", whole, beta=0.2).mean() + 0.5 * 12 / 10
    assert objective(whole, totals).item() == pytest.approx(expected.item())
    shares = objective(part([0]), totals) + objective(part([1, 2]), totals)
    assert shares.item() == pytest.approx(expected.item())


def test_rewards_are_beta_times_the_log_ratio():
    inputs = pairs([-1.0], [-4.0], [-2.0], [-3.0])
    chosen, rejected = Objective(options=LossOptions(beta=0.5)).rewards(inputs)
    assert (chosen.item(), rejected.item()) == (0.5, -0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(("sigmod",)), "sigmod"),
        (lambda: Objective(("sigmoid", "sft"), (1.0,)), "2 losses"),
        (lambda: LossOptions(beta=0), "beta=0"),
        (lambda: LossOptions(label_smoothing=0.5), "label_smoothing=0.5"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
