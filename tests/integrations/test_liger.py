"""Liger's interface with ours behind it, against liger-kernel itself on the same inputs."""

import inspect

import pytest
import torch

from dpo_fast.integrations import liger as ours
from dpo_fast.losses import LOSSES

pytestmark = pytest.mark.peers

theirs = pytest.importorskip("liger_kernel.chunked_loss")
NAMES = ("DPO", "ORPO", "CPO", "SimPO", "KTO")
IGNORED = -100
B, L, D, V = 6, 7, 8, 29  # three pairs: a chunk of Liger's holds one


def make(bias=True, seed=0, ignore_index=IGNORED):
    """Leaves by name, and a reference with another hidden size. Lengths are very unequal."""
    g = torch.Generator().manual_seed(seed)
    leaves = {
        "input": torch.randn(B, L, D, generator=g),
        "weight": torch.randn(V, D, generator=g) / 2,
        "bias": torch.randn(V, generator=g) if bias else None,
    }
    reference = (
        torch.randn(B, L, D + 3, generator=g),
        torch.randn(V, D + 3, generator=g) / 2,
        torch.randn(V, generator=g) if bias else None,
    )
    target = torch.randint(V, (B, L), generator=g)
    for row, length in enumerate((1, 5, 7, 3, 6, 2)):
        target[row, length:] = ignore_index
    target[2, 1] = ignore_index  # a hole
    return leaves, target, reference


def run(module, leaves, target, order, **inputs):
    """Loss, returned tensors and gradients. order: names of the first two arguments."""
    leaves = {n: None if x is None else x.clone().requires_grad_() for n, x in leaves.items()}
    loss, outputs = module(
        leaves[order[0]], leaves[order[1]], target, bias=leaves["bias"], **inputs
    )
    (3 * loss).backward()
    return [loss.detach(), *outputs, *(x.grad for x in leaves.values() if x is not None)], outputs


def agree(name, leaves, target, inputs=None, **arguments):
    order = ("input", "weight") if name == "KTO" else ("weight", "input")
    results = []
    for library in (ours, theirs):
        module = getattr(library, f"LigerFusedLinear{name}Loss")(compiled=False, **arguments)
        values, outputs = run(module, leaves, target, order, **(inputs or {}))
        assert all(not x.requires_grad for x in outputs)
        results.append(values)
    assert len(results[0]) == len(results[1])
    for index, (mine, liger) in enumerate(zip(*results)):
        assert mine.shape == liger.shape and mine.dtype == liger.dtype, index
        torch.testing.assert_close(
            mine, liger, rtol=1e-5, atol=1e-5, msg=f"value {index}: {mine}, {liger}"
        )


ATTRIBUTES = {
    "DPO": {"loss_type": "robust", "label_smoothing": 0.2, "beta": 0.3, "alpha": 0.7}
    | {"compute_nll_loss": True, "average_log_prob": True},
    "ORPO": {"beta": 0.4, "compute_nll_loss": False},
    "CPO": {"beta": 0.4, "alpha": 0.7, "label_smoothing": 0.2, "average_log_prob": True},
    "SimPO": {"beta": 2.0, "gamma": 1.5, "alpha": 0.7, "label_smoothing": 0.2},
    "KTO": {"beta": 0.4, "average_log_prob": True, "use_ref_model": True},
}


@pytest.mark.parametrize("name", NAMES)
def test_attributes_are_ligers_and_can_be_set(name):
    """In every order: what does not go together in between is no error until it is called."""
    leaves, target, reference = make(ignore_index=-7)
    inputs = {} if name in ("ORPO", "CPO", "SimPO") else referring(reference)
    if name == "KTO":
        inputs["preference_labels"] = torch.arange(B) % 3 == 0
    order = ("input", "weight") if name == "KTO" else ("weight", "input")
    values = []
    for library in (ours, theirs):
        module = getattr(library, f"LigerFusedLinear{name}Loss")()
        values.append({n: x for n, x in vars(module).items() if not n.startswith("_")})
        changed = ATTRIBUTES[name] | {"ignore_index": -7, "chunk_size": 2, "compiled": False}
        for attribute, value in reversed(changed.items()):
            setattr(module, attribute, value)
        if library is ours:
            assert {n: getattr(module, n) for n in changed} == changed
        values.append(run(module, leaves, target, order, **inputs)[0])
    fresh = getattr(ours, f"LigerFusedLinear{name}Loss")()
    assert {n: getattr(fresh, n) for n in values[2] if n != "training"} == {
        n: x for n, x in values[2].items() if n != "training"
    }
    for mine, liger in zip(values[1], values[3], strict=True):
        torch.testing.assert_close(mine, liger, rtol=1e-5, atol=1e-5)


def test_attributes_that_cannot_be_honoured():
    inputs = make()
    module = ours.LigerFusedLinearDPOLoss()
    arguments = inputs[0]["weight"], inputs[0]["input"], inputs[1], inputs[0]["bias"], *inputs[2]
    module.beta = -1.0
    with pytest.raises(ValueError, match="beta=-1.0 must be greater than 0"):
        module(*arguments)
    module.beta, module.loss_type = 0.1, "kto"
    with pytest.raises(ValueError, match="loss_type='kto': choose from"):
        module(*arguments)
    module.loss_type, module.label_smoothing = "hinge", 0.1
    with pytest.raises(ValueError, match="label_smoothing=0.1 is not used by hinge"):
        module(*arguments)
    module.loss_type = "sigmoid"
    assert module(*arguments)[0] == dpo(*inputs, label_smoothing=0.1)[0]


def referring(reference):
    return dict(zip(("ref_input", "ref_weight", "ref_bias"), reference))


@pytest.mark.parametrize("name", NAMES)
def test_the_interface_is_ligers(name):
    for method in ("__init__", "forward"):
        mine, liger = (
            inspect.signature(getattr(getattr(library, f"LigerFusedLinear{name}Loss"), method))
            for library in (ours, theirs)
        )
        positional = [p for p in mine.parameters.values() if p.kind is not p.KEYWORD_ONLY]
        expected = list(liger.parameters.values())
        assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in expected]


@pytest.mark.parametrize("loss_type", sorted(theirs.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_dpo(loss_type, bias):
    leaves, target, reference = make(bias)
    smoothing = {"exo_pair": 1e-3, "robust": 0.2}.get(loss_type, 0.0)
    options = {"loss_type": loss_type, "beta": 0.3, "label_smoothing": smoothing}
    agree("DPO", leaves, target, referring(reference), **options)


@pytest.mark.parametrize("average", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("nll", [True, False], ids=["nll", "no nll"])
@pytest.mark.parametrize("refer", [True, False], ids=["reference", "none"])
def test_dpo_options(average, nll, refer):
    leaves, target, reference = make(ignore_index=-7)
    options = {"average_log_prob": average, "compute_nll_loss": nll, "alpha": 0.7, "chunk_size": 2}
    inputs = referring(reference) if refer else None
    agree("DPO", leaves, target, inputs, use_ref_model=refer, ignore_index=-7, **options)


@pytest.mark.parametrize("nll", [True, False], ids=["nll", "no nll"])
def test_orpo(nll):
    leaves, target, _ = make()
    agree("ORPO", leaves, target, beta=0.4, compute_nll_loss=nll)


def test_orpo_with_labels_of_its_own_for_the_nll():
    """More rows, fewer rows and other tokens than those of the preference."""
    leaves, target, _ = make()
    g = torch.Generator().manual_seed(1)
    nll_target = torch.where(target == IGNORED, torch.randint(V, (B, L), generator=g), target)
    nll_target[1, :2], nll_target[2, 3], nll_target[0, 6] = IGNORED, 5, IGNORED
    agree("ORPO", leaves, target, {"nll_target": nll_target})


@pytest.mark.parametrize("average", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("nll", [True, False], ids=["nll", "no nll"])
def test_cpo(average, nll):
    leaves, target, _ = make(bias=nll)
    options = {"alpha": 0.3, "label_smoothing": 0.1, "compute_nll_loss": nll}
    agree("CPO", leaves, target, average_log_prob=average, **options)


@pytest.mark.parametrize("nll", [True, False], ids=["nll", "no nll"])
def test_simpo(nll):
    leaves, target, _ = make(bias=nll)
    options = {"alpha": 0.3, "label_smoothing": 0.1, "compute_nll_loss": nll}
    agree("SimPO", leaves, target, beta=2.0, gamma=0.8, **options)


@pytest.mark.parametrize("average", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("refer", [True, False], ids=["reference", "none"])
@pytest.mark.parametrize("kl", [None, 0.4])
def test_kto(average, refer, kl):
    leaves, target, reference = make(bias=refer)
    good = torch.tensor([True, False, False, True, True, True])
    inputs = referring(reference) if refer else {}
    inputs |= {"preference_labels": good, "kl": None if kl is None else torch.tensor(kl)}
    agree("KTO", leaves, target, inputs, use_ref_model=refer, average_log_prob=average, beta=0.3)


def test_a_kl_for_each_row():
    leaves, target, _ = make()
    good, kl = torch.arange(B) % 3 == 0, torch.rand(B)
    loss, _ = ours.LigerFusedLinearKTOLoss()(
        leaves["input"], leaves["weight"], target, preference_labels=good, kl=kl
    )
    rows = [
        ours.LigerFusedLinearKTOLoss()(
            leaves["input"][i : i + 1],
            leaves["weight"],
            target[i : i + 1],
            preference_labels=good[i : i + 1],
            kl=kl[i],
        )[0]
        for i in range(B)
    ]
    torch.testing.assert_close(loss, torch.stack(rows).mean())


def dpo(leaves, target, reference, **options):
    module = ours.LigerFusedLinearDPOLoss(**options)
    return module(leaves["weight"], leaves["input"], target, leaves["bias"], *reference)


def test_label_smoothing_which_liger_drops_is_cdpo():
    inputs = make()
    loss, (*_, chosen, rejected) = dpo(*inputs, label_smoothing=0.2)
    x = chosen - rejected
    expected = -0.8 * torch.nn.functional.logsigmoid(x) - 0.2 * torch.nn.functional.logsigmoid(-x)
    torch.testing.assert_close(loss, expected.mean())
    assert loss != dpo(*inputs)[0]


def test_losses_that_liger_has_not():
    inputs = make()
    for name in ours.DPO_LOSSES:
        options = {"label_smoothing": 0.1} if "label_smoothing" in LOSSES[name].options else {}
        assert dpo(*inputs, loss_type=name, **options)[0].isfinite()
    assert {"ipo", "aot", "sigmoid_norm"} <= set(ours.DPO_LOSSES)
    # The mean of a completion is not divided by its length again.
    means = dpo(*inputs, loss_type="sigmoid_norm")[0]
    torch.testing.assert_close(means, dpo(*inputs, average_log_prob=True)[0])
    again = dpo(*inputs, loss_type="sigmoid_norm", average_log_prob=True)[0]
    torch.testing.assert_close(means, again)


def test_without_gradients():
    leaves, target, reference = make()
    with torch.no_grad():
        loss, _ = dpo(leaves, target, reference)
    assert not loss.requires_grad


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "kto"}, "loss_type='kto': choose from"),
        (
            {"loss_type": "hinge", "label_smoothing": 0.1},
            "label_smoothing=0.1 is not used by hinge",
        ),
        ({"discopop_tau": 0.2}, "discopop_tau=0.2 is not used by sigmoid"),
        ({"loss_type": "exo_pair"}, "label_smoothing=0.0 cannot be used by exo_pair"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 must be"),
        ({"beta": 0.0}, "beta=0.0 must be greater than 0"),
    ],
)
def test_options_that_cannot_be_honoured(options, message):
    with pytest.raises(ValueError, match=message):
        ours.LigerFusedLinearDPOLoss(**options)


def test_inputs_that_do_not_fit():
    leaves, target, reference = make()
    weight, hidden = leaves["weight"], leaves["input"]
    with pytest.raises(ValueError, match="use_ref_model=True, ref_input is None"):
        dpo(leaves, target, ())
    with pytest.raises(ValueError, match="use_ref_model=False, ref_input is given"):
        dpo(leaves, target, reference, use_ref_model=False)
    for alone in ((None, reference[1], None), (None, None, reference[2]), (reference[0],)):
        with pytest.raises(ValueError, match="use_ref_model=False, ref_input is"):
            dpo(leaves, target, alone, use_ref_model=False)
    with pytest.raises(ValueError, match="5 sequences are no pairs"):
        ours.LigerFusedLinearCPOLoss()(weight, hidden[:5], target[:5])
    with pytest.raises(ValueError, match="expected input"):
        ours.LigerFusedLinearCPOLoss()(weight, hidden.flatten(0, 1), target.flatten())
    orpo = ours.LigerFusedLinearORPOLoss(compute_nll_loss=False)
    with pytest.raises(ValueError, match="compute_nll_loss=False uses no nll_target"):
        orpo(weight, hidden, target, nll_target=target)
    with pytest.raises(ValueError, match="nll_target is"):
        ours.LigerFusedLinearORPOLoss()(weight, hidden, target, nll_target=target[:3])
    kto = ours.LigerFusedLinearKTOLoss()
    with pytest.raises(ValueError, match="preference_labels=None"):
        kto(hidden, weight, target)
    good = torch.ones(B, dtype=torch.bool)
    with pytest.raises(ValueError, match="kl is"):
        kto(hidden, weight, target, preference_labels=good, kl=torch.zeros(2))
    with pytest.raises(ValueError, match="targets must be in"):
        kto(hidden, weight, target.clamp(min=0) + V, preference_labels=good)


def test_metrics_are_fp32_under_autocast():
    leaves, target, _ = make()
    inputs = leaves["weight"], leaves["input"], target
    with torch.autocast("cpu", torch.bfloat16):
        _, outputs = ours.LigerFusedLinearCPOLoss()(*inputs)
    _, expected = ours.LigerFusedLinearCPOLoss()(*inputs)
    assert all(x.dtype == torch.float32 for x in outputs)
    torch.testing.assert_close(outputs[2:4], expected[2:4], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*NAMES, "GRPO", "JSD", "CosineSimilarity"])
def test_ids_of_any_integer_dtype(name):
    """Liger takes int64 alone in most of its classes."""
    leaves, target, reference = make()
    module = getattr(ours, f"LigerFusedLinear{name}Loss")()
    values = []
    for dtype in (torch.int64, torch.int32, torch.int16):
        ids = target.to(dtype)
        if name == "GRPO":
            mask, gains = (target != IGNORED).to(dtype), torch.arange(B) - 2.0
            inputs = leaves["input"], leaves["weight"], ids, mask, gains, leaves["bias"]
            found = module(*inputs, old_per_token_logps=torch.full((B, L), -3.0), ref_input=reference[0],
                           ref_weight=reference[1])[0]  # fmt: skip
        elif name in ("JSD", "CosineSimilarity"):
            student = leaves["input"].flatten(0, 1), leaves["weight"]
            found = module(*student, reference[0].flatten(0, 1), reference[1], ids.flatten())
        elif name == "KTO":
            good = torch.arange(B) % 2 == 0
            found = module(leaves["input"], leaves["weight"], ids, preference_labels=good)[0]
        else:
            more = (leaves["bias"], *reference) if name == "DPO" else ()
            more = (None, ids) if name == "ORPO" else more
            found = module(leaves["weight"], leaves["input"], ids, *more)[0]
        values.append(found)
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("name", NAMES)
def test_no_sequences_are_a_loss_of_0(name):
    """Of the model still, as the share of a rank that has none; Liger has nan."""
    leaves, target, reference = make()
    leaves |= {"input": leaves["input"][:0]}
    inputs = referring((reference[0][:0], *reference[1:])) if name == "DPO" else {}
    if name == "KTO":
        inputs["preference_labels"] = torch.zeros(0, dtype=torch.bool)
    order = ("input", "weight") if name == "KTO" else ("weight", "input")
    module = getattr(ours, f"LigerFusedLinear{name}Loss")()
    values, outputs = run(module, leaves, target[:0], order, **inputs)
    assert values[0] == 0
    assert all((gradient == 0).all() for gradient in values[1 + len(outputs) :])


def test_sequences_without_scored_tokens():
    """Their sum is 0, and there is no mean of theirs: Liger has nan then, and its gradients too."""
    leaves, target, reference = make()
    target[:3] = IGNORED
    loss, (*_, nll, _, _) = dpo(leaves, target, reference, compute_nll_loss=True)
    assert nll == 0 and loss == dpo(leaves, target, reference)[0]
    weight, hidden = leaves["weight"], leaves["input"]
    with pytest.raises(ValueError, match=r"\['orpo'\] divide by lengths, and a sequence has no"):
        ours.LigerFusedLinearORPOLoss()(weight, hidden, target)
    with pytest.raises(
        ValueError, match="average_log_prob=True divides by lengths, and sequence 0"
    ):
        dpo(leaves, target, reference, average_log_prob=True)
    with pytest.raises(ValueError, match="average_log_prob=True divides by lengths"):
        ours.LigerFusedLinearKTOLoss(average_log_prob=True)(
            hidden, weight, target, preference_labels=torch.arange(B) > 2
        )
