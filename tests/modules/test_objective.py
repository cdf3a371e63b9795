"""Names and options of losses as attributes of modules."""

import copy
import pickle
from dataclasses import fields

import pytest
import torch

from dpo_fast.losses import LossOptions
from dpo_fast.modules import FusedLinearPreferenceLoss, PreferenceLoss, UnpairedPreferenceLoss
from dpo_fast.modules.objective import ObjectiveModule

LOGPS = tuple(torch.tensor(x) for x in ([-3.0, -5.0], [-4.0, -4.5], [-3.5, -5.0], [-3.0, -5.5]))


def test_every_option_is_an_attribute():
    module = PreferenceLoss("sigmoid", beta=0.3)
    assert {f.name: getattr(module, f.name) for f in fields(LossOptions)} == vars(
        LossOptions(beta=0.3)
    )
    assert (module.loss_type, module.loss_weights) == ("sigmoid", None)
    for field in fields(LossOptions):
        assert isinstance(getattr(ObjectiveModule, field.name), property)


def test_what_is_set_counts_from_the_next_call_on():
    module = PreferenceLoss()
    before = module(*LOGPS)[0]
    module.beta, module.label_smoothing = 0.5, 0.2
    expected = PreferenceLoss(beta=0.5, label_smoothing=0.2)(*LOGPS)[0]
    assert module(*LOGPS)[0] == expected != before
    module.loss_type, module.loss_weights = ["sigmoid", "robust"], [1.0, 0.5]
    both = PreferenceLoss(["sigmoid", "robust"], [1.0, 0.5], beta=0.5, label_smoothing=0.2)
    assert module(*LOGPS)[0] == both(*LOGPS)[0]
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        copied.beta = 2.0
        assert module.beta == 0.5 != copied.beta and copied(*LOGPS)[0] != module(*LOGPS)[0]


def test_attributes_that_go_together_are_set_in_any_order():
    """exo_pair wants smoothing, and hinge knows none: one of the two comes first."""
    module = PreferenceLoss("hinge")
    module.loss_type = "exo_pair"
    with pytest.raises(ValueError, match="label_smoothing=0.0 cannot be used by exo_pair"):
        module(*LOGPS)
    module.label_smoothing = 1e-3
    assert module(*LOGPS)[0] == PreferenceLoss("exo_pair", label_smoothing=1e-3)(*LOGPS)[0]


@pytest.mark.parametrize(
    "kind, name, value, message",
    [
        (PreferenceLoss, "loss_type", "grpo", "take groups of scored completions"),
        (PreferenceLoss, "token_clamp", 1.0, "token_clamp=1.0 acts on tokens"),
        (PreferenceLoss, "beta", 0.0, "beta=0.0 must be greater than 0"),
        (PreferenceLoss, "simpo_gamma", 1.0, "simpo_gamma=1.0 is not used by sigmoid"),
        (PreferenceLoss, "loss_weights", [1.0, 2.0], "expected one for each"),
        (PreferenceLoss, "loss_type", "nothing", "is not known"),
        (PreferenceLoss, "loss_type", None, "loss_type=None: expected one for each loss"),
        (PreferenceLoss, "loss_weights", 0.5, "loss_weights=0.5: expected one for each loss"),
        (PreferenceLoss, "beta", "0.1", "beta='0.1' must be a number"),
        (PreferenceLoss, "beta", None, "beta=None must be a number"),
        (PreferenceLoss, "reference_free", "no", "reference_free='no' must be True or False"),
        (UnpairedPreferenceLoss, "loss_type", "sigmoid", "these are not pairs"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_of_the_next_call(kind, name, value, message):
    module = kind()
    setattr(module, name, value)
    assert f"{name}={value!r}" in repr(module) or value is None
    given = LOGPS if kind is PreferenceLoss else (LOGPS[0], torch.tensor([True, False]), LOGPS[1])
    with pytest.raises(ValueError, match=message):
        module(*given)


def test_a_fused_module_takes_options_of_the_head_and_of_the_loss():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 5, 8, generator=g), torch.randn(11, 8, generator=g)
    labels = torch.randint(11, (4, 5), generator=g)
    module = FusedLinearPreferenceLoss("simpo")
    module.beta, module.simpo_gamma = 2.0, 1.0
    module.temperature, module.softcap, module.logit_scale = 0.7, 5.0, 0.5
    head = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5}
    expected = FusedLinearPreferenceLoss("simpo", beta=2.0, simpo_gamma=1.0, **head)
    assert module(hidden, weight, labels)[0] == expected(hidden, weight, labels)[0]
    for name, value in (("temperature", 0.0), ("batch_order", "interleave")):
        changed = copy.deepcopy(module)
        setattr(changed, name, value)
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            changed(hidden, weight, labels)


def test_a_compiled_module_follows_what_is_set():
    module = PreferenceLoss()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for beta in (0.1, 0.5):
        module.beta = beta
        torch.testing.assert_close(compiled(*LOGPS)[0], PreferenceLoss(beta=beta)(*LOGPS)[0])
