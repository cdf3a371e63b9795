"""Liger's distillation losses, against liger-kernel itself on the same inputs."""

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast.integrations import liger as ours

pytestmark = pytest.mark.peers

theirs = pytest.importorskip("liger_kernel.chunked_loss")
NAMES = ("LigerFusedLinearJSDLoss", "LigerFusedLinearCosineSimilarityLoss")
N, D, V = 11, 8, 29
ORDER = (
    "student_input",
    "student_weight",
    "teacher_input",
    "teacher_weight",
    "true_labels",
    "student_bias",
    "teacher_bias",
)


def make(bias=True, beyond=0, ignored=-100):
    """beyond: how many words more the teacher has."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (N,), generator=g)
    labels[[0, 4, 5]] = ignored
    return {
        "student_input": torch.randn(N, D, generator=g),
        "student_weight": torch.randn(V, D, generator=g) / 2,
        "teacher_input": torch.randn(N, D + 3, generator=g),
        "teacher_weight": torch.randn(V + beyond, D + 3, generator=g) / 2,
        "true_labels": labels,
        "student_bias": torch.randn(V, generator=g) if bias else None,
        "teacher_bias": torch.randn(V + beyond, generator=g) if bias else None,
    }


def run(library, name, inputs, **options):
    leaves = ("student_input", "student_weight", "student_bias")
    inputs = {
        n: x.clone().requires_grad_() if n in leaves and x is not None else x
        for n, x in inputs.items()
    }
    module = getattr(library, name)(compiled=False, **options)
    found = module(*(inputs[n] for n in ORDER))
    found = found if isinstance(found, tuple) else (found,)
    (3 * found[0]).backward()
    grads = [inputs[n].grad for n in leaves if inputs[n] is not None]
    return [x.detach() for x in found] + grads


def agree(name, inputs, **options):
    mine, liger = (run(library, name, inputs, **options) for library in (ours, theirs))
    assert len(mine) == len(liger)
    for x, y in zip(mine, liger):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_interface_is_ligers(name):
    for method in ("__init__", "forward"):
        mine, liger = (
            inspect.signature(getattr(getattr(library, name), method)).parameters.values()
            for library in (ours, theirs)
        )
        assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in liger]
    mine, liger = vars(getattr(ours, name)()), vars(getattr(theirs, name)())
    assert {n: mine[n] for n in liger} == liger


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias, beyond", [(True, 3), (False, 0)])
def test_values_and_gradients(name, beta, bias, beyond):
    options = {"beta": beta, "temperature": 1.7, "chunk_size": 4, "return_soft_hard_loss": bias}
    agree(name, make(bias, beyond), weight_hard_loss=0.3, weight_soft_loss=0.8, **options)


@pytest.mark.parametrize("name", NAMES)
def test_options_and_attributes(name):
    agree(name, make(), weight_hard_loss=0.0)
    agree(name, make(ignored=-7), ignore_index=-7, weight_soft_loss=0.0)
    module, inputs = getattr(ours, name)(), make()
    module.beta, module.temperature, module.weight_hard_loss = 0.9, 0.5, 0.1
    expected = getattr(ours, name)(0.1, beta=0.9, temperature=0.5)
    arguments = [inputs[n] for n in ORDER]
    assert module(*arguments) == expected(*arguments) != getattr(ours, name)()(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_score(name):
    inputs = make()
    inputs["true_labels"] = torch.full((N,), -100)
    values = run(ours, name, inputs)
    assert len(values) == 4 and all(not x.any() for x in values)


def test_no_more_than_a_chunk_of_logits_exists():
    rows = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.shape[1:] == (V,):
                rows.add(len(found))
            return found

    with Watch():
        run(ours, NAMES[0], make(), chunk_size=3)
    assert max(rows - {D, D + 3}) == 3  # weights are transposed too


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "temperature=0.0 must be"),
        ({"chunk_size": 0}, "chunk_size=0 must be"),
        ({"beta": 1.5}, "beta=1.5 must be"),
    ],
)
def test_options_that_cannot_be_honoured(options, message):
    with pytest.raises(ValueError, match=message):
        ours.LigerFusedLinearJSDLoss(**options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"student_input": torch.zeros(2, N, D)}, "expected student_input"),
        ({"true_labels": torch.zeros(3, dtype=torch.int64)}, "expected student_input"),
        ({"teacher_input": torch.zeros(3, D + 3)}, "teacher_input has 3 rows"),
        ({"teacher_weight": torch.zeros(5, D + 3), "teacher_bias": None}, "must not be the larger"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    inputs = make() | change
    with pytest.raises(ValueError, match=message):
        ours.LigerFusedLinearJSDLoss()(*(inputs[n] for n in ORDER))
