"""How many launches a call of `linear_logp` makes: small ones cost as much as products of small heads."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast.ops import linear_logp
from tests.support.device import needs_interpreter

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = [
    needs_interpreter,  # through which launches are counted
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
# What moves no data on a GPU: views, memory that is not written.
FREE = {"slice", "view", "t", "as_strided", "expand", "unsqueeze", "alias", "transpose", "detach"}
FREE |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# `check_targets` of every call, whatever the implementation: 0 <= targets < V. The last is an assertion
# on a GPU, which does not wait.
CHECK = {"ge": 1, "lt": 1, "bitwise_and": 1, "all": 1, "_local_scalar_dense": 1}


class _Launches(TorchDispatchMode):
    """Counts PyTorch's operations and Triton's kernels, but nothing of the interpreter's own."""

    def __init__(self, patch):
        super().__init__()
        self.found = collections.Counter()
        run = interpreter.GridExecutor.__call__

        def counted(executor, *arguments, **options):
            self.found[executor.fn.__name__] += 1
            with torch._C._DisableTorchDispatch():
                return run(executor, *arguments, **options)

        patch.setattr(interpreter.GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.__name__.split(".")[0]
        if name not in FREE:
            self.found[name] += 1
        return function(*arguments, **(options or {}))


def run(patch, hidden_grad, weight_grad, **options):
    """The launches of a forward and of a backward."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=g).requires_grad_(hidden_grad)
    weight = torch.randn(96, 64, generator=g).requires_grad_(weight_grad)
    targets, slopes = torch.arange(40), torch.ones(40)
    with patch.context() as inner, _Launches(inner) as forward:
        logp = linear_logp(hidden, weight, targets, implementation="triton", **options).logp
    with patch.context() as inner, _Launches(inner) as backward:
        if hidden_grad:
            logp.backward(slopes)
    forward.found.subtract(CHECK)
    assert min(forward.found.values()) >= 0
    return +forward.found, backward.found


def test_log_probs_alone():
    """The target, the product, and the join of its tiles, which makes the log-probs."""
    forward, backward = run(pytest.MonkeyPatch, False, False)
    assert forward == {"target_product_kernel": 1, "rows_kernel": 1, "merge_kernel": 1}
    assert not backward


def test_a_frozen_head():
    """Two of the nine return at once where no row left its range."""
    forward, backward = run(pytest.MonkeyPatch, True, False)
    assert forward == {
        "mm": 2,  # the sample of the vocabulary, and E W
        "target_product_kernel": 1,
        "new_zeros": 1,
        "rows_kernel": 2,
        "merge_kernel": 2,
        "scale_rows_kernel": 1,
    }
    assert backward == {"mul": 1}
    assert forward.total() + backward.total() <= 10


def test_a_trainable_head():
    forward, backward = run(pytest.MonkeyPatch, True, True)
    assert forward.total() == 7 and backward == {"mm": 2, "scale_rows_kernel": 2}
