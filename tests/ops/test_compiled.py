"""The operations inside torch.compile: one graph, any number of tokens, the numbers of eager code."""

import pytest
import torch

from dpo_fast import linear_logp, logits_logp
from dpo_fast.losses import LossOptions, Objective, ScoredGroups, Totals, preference
from dpo_fast.modules import FusedHead
from dpo_fast.ops.linear_logp.call import EXTRAS
from tests.support.device import DEVICE, each_implementation, needs_triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy in the interpreter
D, V = 8, 31
# Two pairs at least: a compiler makes a graph of its own for a size of 1.
OBJECTIVE, TOTALS = Objective(), Totals(9, 30, 18)
LENGTHS = ([3, 1, 2, 5], [4, 5, 1, 2, 7, 3], [2, 2, 2, 1, 1, 1, 9, 3])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)


def leaves(T, needs, dtype=torch.float32):
    g = torch.Generator().manual_seed(T)
    tensors = (torch.randn(n, generator=g) for n in ((T, D), (V, D), (V,)))
    return [x.to(DEVICE, dtype).requires_grad_(need) for x, need in zip(tensors, needs)]


def step_of(objective, implementation, **options):
    """From hidden states to a loss, with everything that is returned on the way."""

    def step(hidden, weight, bias, targets, lengths, reference, columns):
        scores = linear_logp(
            hidden, weight, targets, bias=bias, implementation=implementation, **options
        )
        result = preference(
            scores.logp,
            lengths,
            reference,
            objective,
            TOTALS,
            log_sum_p2_T=scores.log_sum_p2,
            columns=columns,
            implementation="auto",
        )
        return [
            result.loss,
            result.logps_S,
            result.rewards_S,
            *(x for x in scores if x is not None),
        ]

    return step


def assert_same(step, fast, lengths, needs, dtype=torch.float32, columns=()):
    """Bit for bit, values and gradients."""
    T, S = sum(lengths), len(lengths)
    g = torch.Generator().manual_seed(1)
    targets, reference = torch.randint(V, (T,), generator=g), torch.randn(S, generator=g)
    data = {name: torch.rand(S // 2, generator=g).to(DEVICE) for name in columns}
    rest = [x.to(DEVICE) for x in (targets, torch.tensor(lengths), reference)]
    results = []
    for function in (fast, step):
        tensors = leaves(T, needs, dtype)
        values = function(*tensors, *rest, data)
        if any(needs):
            (values[0] * 2).backward()
        assert [x.requires_grad for x in values[:2]] == [any(needs), False]
        assert not any(x.requires_grad for x in values[4:])
        results.append([*values, *(x.grad for x in tensors if x.requires_grad)])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(x, y) for x, y in zip(*results))


@pytest.mark.slow
@pytest.mark.parametrize(
    "needs, implementation",
    [
        ((True, True, True), "torch"),
        pytest.param((True, True, True), "triton", marks=needs_triton),
        ((True, False, False), "torch"),
        ((False, True, False), "torch"),
        ((False, False, False), "torch"),
    ],
    ids=["all", "all, kernels", "frozen head", "weight alone", "nothing"],
)
def test_a_step_is_one_graph_for_any_number_of_tokens(needs, implementation):
    step = step_of(Objective(("sigmoid", "sft"), (1.0, 0.3)), implementation)
    aot_eager, heads = torch._dynamo.lookup_backend("aot_eager"), []

    def count(graph, inputs):
        heads.extend(n for n in graph.graph.nodes if n.target is torch.ops.dpo_fast.linear_logp)
        return aot_eager(graph, inputs)

    fast = torch.compile(step, backend=count, fullgraph=True, dynamic=True)
    assert_same(step, fast, LENGTHS[0], needs)
    assert heads  # it may start over once, where numbers turn out to be constants
    heads.clear()
    for lengths in LENGTHS[1:]:
        assert_same(step, fast, lengths, needs)
    assert not heads  # not compiled again


@pytest.mark.slow
@each_implementation
@pytest.mark.parametrize("budget", [0, 1500, 1 << 30], ids=["recompute", "mixed", "keep"])
def test_every_schedule_and_option_of_the_head(implementation, budget):
    options = {
        "workspace_bytes": budget,
        "softcap": 3.0,
        "logit_scale": 0.7,
        "temperature": 1.3,
        "extras": EXTRAS,
    }
    step = step_of(OBJECTIVE, implementation, **options)
    fast = compiled(step)
    for lengths in LENGTHS[:2]:
        assert_same(step, fast, lengths, (True, True, True))


@pytest.mark.slow
def test_sixteen_bits_and_autocast():
    step = step_of(OBJECTIVE, "torch")
    assert_same(step, compiled(step), LENGTHS[0], (True, True, False), torch.bfloat16)

    def autocast(*inputs):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return step(*inputs)

    assert_same(autocast, compiled(autocast), LENGTHS[0], (True, True, True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective, columns",
    [
        (Objective(("simpo",), (1.0,), LossOptions(beta=2.0, simpo_gamma=0.3)), ("margin",)),
        (Objective(("orpo", "kto"), (1.0, 0.5)), ()),
        (Objective(options=LossOptions(use_weighting=True, weighting_clamp=0.5)), ("weight",)),
        (Objective(("ipo",), (1.0,), LossOptions(ld_alpha=0.3, ld_reference=False)), ()),
        (Objective(("aot",), (1.0,)), ()),
    ],
    ids=["columns", "split pairs", "weighting", "tails", "sorted"],
)
def test_losses_are_traced(objective, columns):
    step = step_of(objective, "torch", extras=("log_sum_p2",))
    assert_same(step, compiled(step), LENGTHS[0], (True, False, False), columns=columns)


@needs_triton
def test_the_kernel_of_the_loss():
    def step(logp, lengths, reference):
        return preference(logp, lengths, reference, OBJECTIVE, TOTALS, implementation="triton")

    fast = compiled(step)
    for lengths in LENGTHS[:2]:
        results = []
        for function in (fast, step):
            g = torch.Generator().manual_seed(0)
            logp = (-torch.rand(sum(lengths), generator=g)).to(DEVICE).requires_grad_()
            reference = torch.randn(len(lengths), generator=g).to(DEVICE)
            result = function(logp, torch.tensor(lengths, device=DEVICE), reference)
            (3 * result.loss).backward()
            results.append([*result[:3], logp.grad])
            assert not (result.logps_S.requires_grad or result.rewards_S.requires_grad)
        assert all(torch.equal(x, y) for x, y in zip(*results))


@pytest.mark.slow
def test_losses_on_groups():
    objective = Objective(("plackett_luce", "grpo"), (1.0, 0.5), LossOptions(grpo_beta=0.1))

    def step(logp, lengths, reference, old, scores, counts):
        groups = ScoredGroups(scores, counts, old)
        sums = torch.stack([part.sum() for part in reference.split(lengths.tolist())])
        return preference(
            logp, lengths, sums.detach(), objective, TOTALS, reference_T=reference, groups=groups
        )

    fast = torch.compile(step, backend="aot_eager", dynamic=True)
    for lengths, counts in (([3, 1, 2, 4, 2], [3, 2]), ([2, 2, 1, 5, 1, 1, 3], [2, 2, 3])):
        results = []
        for function in (fast, step):
            g = torch.Generator().manual_seed(0)
            tensors = [-torch.rand(sum(lengths), generator=g) for _ in range(3)]
            tensors += [torch.randn(len(lengths), generator=g), torch.tensor(counts)]
            logp, reference, old, scores, counts_P = (x.to(DEVICE) for x in tensors)
            lengths_S = torch.tensor(lengths, device=DEVICE)
            logp.requires_grad_()
            result = function(logp, lengths_S, reference, old, scores, counts_P)
            result.loss.backward()
            results.append([*result[:3], *result.watched.values(), logp.grad])
        torch.testing.assert_close(*results)


@each_implementation
def test_logits(implementation):
    def step(logits, targets):
        return logits_logp(logits[:, :-1], targets, temperature=0.7, implementation=implementation)

    fast = compiled(step)
    for rows in (3, 5):
        results = []
        for function in (fast, step):
            g = torch.Generator().manual_seed(0)
            logits = torch.randn(rows, 4, V, generator=g).to(DEVICE).requires_grad_()
            logp = function(logits, torch.randint(V, (rows, 3), generator=g).to(DEVICE))
            (logp * torch.arange(3, device=DEVICE)).sum().backward()
            results.append((logp, logits.grad))
        assert all(torch.equal(x, y) for x, y in zip(*results))


def test_a_fused_head_among_other_layers():
    torch.manual_seed(0)
    layer, head = torch.nn.Linear(D, D), FusedHead(torch.nn.Parameter(torch.randn(V, D)))
    layer, head = layer.to(DEVICE), head.to(DEVICE)

    def model(x, targets):
        return head(torch.tanh(layer(x)), targets, ("entropy",))["logp"].sum()

    targets, gradients = torch.randint(V, (12,)).to(DEVICE), []
    for function in (compiled(model), model):
        x = torch.linspace(-1, 1, 12 * D).view(12, D).to(DEVICE)
        gradients.append(torch.autograd.grad(function(x, targets), [head.weight, layer.weight]))
    assert all(torch.equal(x, y) for x, y in zip(*gradients))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"targets": torch.full((11,), V)}, "targets must be in 0..30"),
        ({"targets": torch.zeros(11)}, "targets are torch.float32"),
        ({"extras": ("entropi",)}, "choose from"),
        ({"temperature": 0.0}, "temperature=0.0 must be"),
        ({"implementation": "blas"}, "implementation='blas': choose"),
    ],
)
def test_mistakes_are_still_named(change, message):
    """On a CPU: a GPU's assertions end a process."""
    hidden, weight = torch.zeros(11, D), torch.zeros(V, D)
    arguments = {"targets": torch.zeros(11, dtype=torch.int64)} | change
    targets = arguments.pop("targets")

    def step(hidden, weight, targets):
        return linear_logp(hidden, weight, targets, **arguments).logp

    with pytest.raises(Exception, match=message):
        compiled(step)(hidden, weight, targets)


def test_lengths_that_do_not_fit_are_still_found():
    """On a CPU, as above."""

    def step(logp, lengths):
        return preference(logp, lengths, torch.zeros(4), OBJECTIVE, TOTALS).loss

    with pytest.raises(RuntimeError, match="lengths must add up"):
        compiled(step)(torch.zeros(9), torch.tensor([1, 2, 3, 4]))


def test_pytorch_agrees_that_they_are_operators():
    """Schemas, fakes, aliases and autograd, as PyTorch checks them, outside the compiler."""
    hidden, weight, bias = leaves(11, (True, True, True))
    targets = torch.arange(11, device=DEVICE)
    rest = (1.0, None, 1.0, "entropy,is_top1", "torch", None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for needs in ([True, True, True], [True, False, False]):
        torch.library.opcheck(
            torch.ops.dpo_fast.linear_logp,
            (
                hidden,
                weight.detach() if not needs[1] else weight,
                targets,
                bias.detach() if not needs[2] else bias,
                *rest,
                needs,
            ),
            test_utils=tests,
        )
    logits = torch.randn(11, V, device=DEVICE, requires_grad=True)
    torch.library.opcheck(
        torch.ops.dpo_fast.logits_logp, (logits, targets, 1.0, "torch"), test_utils=tests
    )
