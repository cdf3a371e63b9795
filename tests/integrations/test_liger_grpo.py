"""Liger's GRPO loss with our head behind it, against liger-kernel itself and TRL on the same inputs."""

import inspect

import pytest
import torch

from dpo_fast.integrations.grpo_losses import CLIPPED, LOSS_TYPES, READERS, GrpoOptions
from dpo_fast.integrations.liger import LigerFusedLinearGRPOLoss

pytestmark = pytest.mark.peers

theirs = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
S, L, D, V = 5, 6, 8, 29
LENGTHS = (6, 1, 4, 0, 3)  # one is full, one has nothing that is scored


def make(bias=True, seed=0, full=False):
    """Leaves by name, and the other arguments."""
    g = torch.Generator().manual_seed(seed)
    leaves = {
        "_input": torch.randn(S, L, D, generator=g),
        "lin_weight": torch.randn(V, D, generator=g) / 2,
        "bias": torch.randn(V, generator=g) if bias else None,
    }
    mask = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
    mask[2, 1] = False  # of a tool
    others = {
        "selected_token_ids": torch.randint(V, (S, L), generator=g),
        "attention_mask": torch.ones(S, L) if full else mask.long(),
        "advantages": torch.tensor([1.5, -0.7, 0.3, 0.9, -1.1]),
    }
    return leaves, others


def logps_of(leaves, others, noise, seed=1):
    """Log-probs of the tokens under another model, near the policy's or far from them."""
    logits = leaves["_input"] @ leaves["lin_weight"].t()
    if leaves["bias"] is not None:
        logits = logits + leaves["bias"]
    ids = others["selected_token_ids"][..., None]
    logp = logits.log_softmax(-1).gather(2, ids)[..., 0]
    return logp + noise * torch.randn(S, L, generator=torch.Generator().manual_seed(seed))


def reference_head(seed=3):
    g = torch.Generator().manual_seed(seed)
    return {
        "ref_input": torch.randn(S, L, D + 3, generator=g),
        "ref_weight": torch.randn(V, D + 3, generator=g) / 2,
        "ref_bias": torch.randn(V, generator=g),
    }


def run(module, leaves, others):
    leaves = {n: None if x is None else x.clone().requires_grad_() for n, x in leaves.items()}
    loss, metrics = module(**leaves, **others)
    assert isinstance(metrics, tuple) and all(not x.requires_grad for x in metrics)
    (3 * loss).backward()
    return [loss.detach(), *metrics, *(x.grad for x in leaves.values() if x is not None)]


def agree(leaves, others, **options):
    mine = run(LigerFusedLinearGRPOLoss(compiled=False, **options), leaves, others)
    liger = run(theirs(compiled=False, **options), leaves, others)
    assert len(mine) == len(liger)
    for index, (x, y) in enumerate(zip(mine, liger)):
        assert x.shape == y.shape and x.dtype == y.dtype, index
        slack = 1e-5 * max(1.0, y.abs().max().item())  # exp of a far reference is in the hundreds
        torch.testing.assert_close(x, y, rtol=1e-5, atol=slack, msg=f"value {index}: {x}, {y}")
    return mine


def test_the_interface_is_ligers():
    for method in ("__init__", "forward"):
        mine, liger = (
            inspect.signature(getattr(kind, method)) for kind in (LigerFusedLinearGRPOLoss, theirs)
        )
        positional = [p for p in mine.parameters.values() if p.kind is not p.KEYWORD_ONLY]
        expected = list(liger.parameters.values())
        assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in expected]
    mine, liger = vars(LigerFusedLinearGRPOLoss()), vars(theirs())
    assert {n: mine[n] for n in liger if not n.startswith("_")} == {
        n: x for n, x in liger.items() if not n.startswith("_")
    }


REFERENCES = ("logps", "head", "none", "beta 0")
LIMIT = {"dr_grpo": {"max_completion_length": 7}, "cispo": {"epsilon_high": 1.1}}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("old", [0.3, None], ids=["off policy", "on policy"])
def test_values_and_gradients(loss_type, reference, old):
    """luspo with no masked token, where Liger's has its mean over all positions."""
    leaves, others = make(bias=reference != "head", full=loss_type == "luspo")
    if old is not None:
        others["old_per_token_logps"] = logps_of(leaves, others, old)
    options = {"loss_type": loss_type, **LIMIT.get(loss_type, {})}
    if reference == "logps":
        others["ref_per_token_logps"] = logps_of(leaves, others, 0.5, seed=2)
    elif reference == "head":
        others |= reference_head()
        options |= {"beta": 0.3, "temperature": 0.7}
    else:
        options |= {"use_ref_model": False} | ({"beta": 0.0} if reference == "beta 0" else {})
    agree(leaves, others, **options)


@pytest.mark.parametrize("loss_type", CLIPPED)
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_ratios_of_whole_completions(loss_type, beta):
    full = loss_type == "luspo" and beta != 0
    leaves, others = make(full=full)
    others["old_per_token_logps"] = logps_of(leaves, others, 0.5)
    others["ref_per_token_logps"] = logps_of(leaves, others, 0.5, seed=2)
    options = {"loss_type": loss_type, "max_completion_length": 9, "beta": beta}
    values = agree(leaves, others, importance_sampling_level="sequence", **options)
    assert 0 < values[1 if beta == 0 else 2] < 1  # some are clipped


@pytest.mark.parametrize(
    "options",
    [
        {"delta": 1.15},
        {"delta": 1.05, "importance_sampling_level": "sequence"},
        {"use_bias_correction_kl": True, "beta": 0.5},
        {"use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
        {"epsilon_low": 0.05, "epsilon_high": 0.1, "loss_type": "grpo"},
        {"loss_type": "sapo", "sapo_temperature_pos": 0.6, "sapo_temperature_neg": 2.0},
        {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0},
        {"loss_type": "vespo", "vespo_k_neg": 1.0, "vespo_lambda_neg": 0.0},
        {"temperature": 1.7, "chunk_size": 2},
    ],
    ids=str,
)
def test_options(options):
    leaves, others = make()
    others["old_per_token_logps"] = logps_of(leaves, others, 0.4)
    others["ref_per_token_logps"] = logps_of(leaves, others, 0.5, seed=2)
    agree(leaves, others, **options)


@pytest.mark.parametrize("loss_type", ["dapo", "vespo", "cispo", "grpo"])
@pytest.mark.parametrize("shape", [(S,), (S, 1), (S, L)], ids=str)
def test_ratios_of_another_sampler(loss_type, shape):
    leaves, others = make()
    others["old_per_token_logps"] = logps_of(leaves, others, 0.4)
    others["vllm_is_ratio"] = torch.rand(shape, generator=torch.Generator().manual_seed(5)) + 0.5
    agree(leaves, others, loss_type=loss_type, beta=0.0, use_ref_model=False)


@pytest.mark.parametrize("items", [40, torch.tensor(40), torch.tensor(40.0), 0])
def test_items_of_the_global_batch(items):
    leaves, others = make()
    agree(leaves, others | {"num_items_in_batch": items}, beta=0.0, use_ref_model=False)


def test_the_arguments_that_trl_gives():
    """TRL up to 1.12 passes options of its configuration whether or not the loss reads them."""
    leaves, others = make()
    options = {"use_bias_correction_kl": True, "max_completion_length": 256, "delta": None}
    options |= {"beta": 0.0, "use_ref_model": False, "loss_type": "dapo"}
    others |= {"old_per_token_logps": None, "ref_per_token_logps": None, "vllm_is_ratio": None}
    agree(leaves, others | {"num_items_in_batch": torch.tensor(31)}, **options)


def test_a_frozen_head_gets_no_gradient():
    leaves, others = make()
    hidden = leaves.pop("_input").requires_grad_()
    loss, _ = LigerFusedLinearGRPOLoss(beta=0.0)(hidden, **leaves, **others)
    loss.backward()
    assert hidden.grad.abs().sum() > 0 and leaves["lin_weight"].grad is None


def test_what_masked_positions_hold_is_not_looked_at():
    leaves, others = make()
    others["old_per_token_logps"] = logps_of(leaves, others, 0.4)
    others["ref_per_token_logps"] = logps_of(leaves, others, 0.4, seed=2)
    expected = run(LigerFusedLinearGRPOLoss(), leaves, others)
    masked = others["attention_mask"] == 0
    for name, worst in (
        ("old_per_token_logps", -torch.inf),
        ("ref_per_token_logps", torch.nan),
        ("selected_token_ids", -100),
    ):
        others[name] = others[name].masked_fill(masked, worst)
    for mine, wanted in zip(run(LigerFusedLinearGRPOLoss(), leaves, others), expected):
        assert torch.equal(mine, wanted)


def trls_luspo(logps, old, mask, advantages, level):
    """As `GRPOTrainer._compute_loss` of TRL 1.16 has it."""
    log = logps - old
    if level == "sequence":
        log = ((log * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    ratio = log.exp()
    clipped = ratio.clamp(0.8, 1.2)
    loss = -torch.min(ratio * advantages[:, None], clipped * advantages[:, None])
    return (loss * mask).sum(-1).mean()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_luspo_is_trls(level):
    leaves, others = make(bias=False)
    old = others["old_per_token_logps"] = logps_of(leaves, others, 0.4)
    module = LigerFusedLinearGRPOLoss(0.0, loss_type="luspo", importance_sampling_level=level)
    mine = run(module, leaves, others)
    leaves = {n: x.requires_grad_() for n, x in leaves.items() if x is not None}
    logps = logps_of(leaves | {"bias": None}, others, 0.0)
    loss = trls_luspo(logps, old, others["attention_mask"], others["advantages"], level)
    (3 * loss).backward()
    for x, y in zip((mine[0], *mine[2:]), (loss, *(x.grad for x in leaves.values()))):
        torch.testing.assert_close(x, y)


def test_16_bit_inputs_are_as_near_as_their_rounding():
    leaves, others = make()
    others["old_per_token_logps"] = logps_of(leaves, others, 0.4)
    exact = run(LigerFusedLinearGRPOLoss(beta=0.0), leaves, others)
    leaves = {n: x.bfloat16() for n, x in leaves.items()}
    rounded = run(LigerFusedLinearGRPOLoss(beta=0.0), leaves, others)
    assert [x.dtype for x in rounded] == [torch.float32] * 2 + [torch.bfloat16] * 3
    for x, y in zip(rounded, exact):
        torch.testing.assert_close(x.float(), y, rtol=0.05, atol=0.05)


def test_a_head_of_another_dtype():
    """Liger casts it to the dtype of the hidden states; here the narrower is widened."""
    leaves, others = make()
    for name in leaves:
        mixed = leaves | {name: leaves[name].bfloat16()}
        values = run(LigerFusedLinearGRPOLoss(beta=0.0), mixed, others)
        exact = run(
            LigerFusedLinearGRPOLoss(beta=0.0), {n: x.float() for n, x in mixed.items()}, others
        )
        assert [x.dtype for x in values[2:]] == [x.dtype for x in mixed.values()]
        for x, y in zip(values, exact):
            torch.testing.assert_close(x, y.to(x.dtype))


def test_attributes_can_be_set():
    leaves, others = make()
    others["old_per_token_logps"] = logps_of(leaves, others, 0.4)
    module = LigerFusedLinearGRPOLoss()
    module.loss_type, module.beta, module.use_ref_model = "dr_grpo", 0.0, False
    with pytest.raises(ValueError, match="max_completion_length=None: dr_grpo"):
        module(**leaves, **others)
    module.max_completion_length, module.temperature, module.epsilon_low = 5, 0.8, 0.1
    expected = LigerFusedLinearGRPOLoss(
        0.0, use_ref_model=False, loss_type="dr_grpo", max_completion_length=5, temperature=0.8
    )
    expected.epsilon_low = 0.1
    assert module(**leaves, **others)[0] == expected(**leaves, **others)[0]


def test_compiled():
    leaves, others = make()
    others["old_per_token_logps"] = logps_of(leaves, others, 0.4)
    others["ref_per_token_logps"] = logps_of(leaves, others, 0.4, seed=2)
    module = LigerFusedLinearGRPOLoss()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(module, backend="eager")
        values = run(compiled, leaves, others)
    for mine, expected in zip(values, run(module, leaves, others)):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "ppo"}, "loss_type='ppo': choose from"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word': choose"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "cannot be used by"),
        ({"loss_type": "dr_grpo"}, "max_completion_length=None"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg=0.0 must be"),
        ({"delta": -1.0}, "delta=-1.0 must be"),
        ({"delta": float("nan")}, "delta=nan must be finite"),
        ({"epsilon_low": None}, "epsilon_low=None must be a number"),
        ({"temperature": 0.0}, "temperature=0.0 must be"),
        ({"beta": 0.1, "use_ref_model": False}, "beta=0.1 weighs the divergence"),
    ],
)
def test_options_that_cannot_be_honoured(options, message):
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**options)


@pytest.mark.parametrize("name", READERS)
def test_an_option_that_the_loss_does_not_read_is_refused(name):
    other = next(kind for kind in LOSS_TYPES if kind not in READERS[name])
    value = (getattr(GrpoOptions, name) or 1.0) + 0.5
    with pytest.raises(ValueError, match=f"{name}={value} is not used by loss_type='{other}'"):
        LigerFusedLinearGRPOLoss(loss_type=other, **{name: value})


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({}, {}, "use_ref_model=True, ref_input is None"),
        ({"ref_input": torch.zeros(S, L, D)}, {}, "ref_weight is None"),
        ({"ref_per_token_logps": torch.zeros(S, L)} | reference_head(), {}, "not both"),
        ({"ref_per_token_logps": torch.zeros(S, L)}, {"use_ref_model": False}, "leave it out"),
        (reference_head(), {"use_ref_model": False}, "use_ref_model=False, ref_input is given"),
        ({"ref_per_token_logps": torch.zeros(S, 2)}, {}, "ref_per_token_logps is"),
        ({"old_per_token_logps": torch.zeros(S)}, {"beta": 0.0}, "old_per_token_logps is"),
        ({"attention_mask": torch.ones(S)}, {"beta": 0.0}, "attention_mask is"),
        ({"advantages": torch.zeros(S, L)}, {"beta": 0.0}, "advantages are"),
        ({"vllm_is_ratio": torch.zeros(S, 2)}, {"beta": 0.0}, "vllm_is_ratio is"),
        ({"_input": torch.zeros(S * L, D)}, {"beta": 0.0}, "expected _input"),
    ],
)
def test_inputs_that_do_not_fit(change, options, message):
    leaves, others = make()
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**options)(**leaves | others | change)
