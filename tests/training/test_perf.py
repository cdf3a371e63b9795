"""What a step has to do, and how long its parts take."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpo_fast.ops import cpu

pytest.importorskip("transformers")

from dpo_fast.data.batch import collate
from dpo_fast.data.kinds import GROUPS
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.models import ScoringModel
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.perf import Clock, peak_memory_gib, product_rate, watch_head, work_of
from tests.support.architectures import make

CPU = torch.device("cpu")
ROWS = [
    {
        "prompt_ids": [p] * p,
        "completions_ids": [[2] * n for n in sizes],
        "scores": [0.0] * len(sizes),
    }
    for p, sizes in ((4, (3, 1, 5)), (7, (2, 2)), (1, (1, 6)))
]


def scoring(name: str = "llama") -> ScoringModel:
    torch.manual_seed(0)
    return ScoringModel(make(name, vocab_size=50, max_position_embeddings=64))


CASES = [
    ("llama", (), "packed"),
    ("llama", ("lm_head",), "padded"),
    ("llama", ("mlp",), "packed"),
    ("qwen2, tied", (), "padded"),
    ("qwen3", (), "padded"),
    ("gpt2", (), "padded"),
]


@pytest.mark.parametrize(("architecture", "frozen", "layout"), CASES)
def test_operations_are_those_that_torch_counts(architecture, frozen, layout, monkeypatch):
    monkeypatch.setattr(cpu, "by_onednn", lambda: False)  # torch does not count that operation
    model = scoring(architecture)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    even = {"prompt_ids": [1] * 4, "completions_ids": [[2] * 5, [3] * 5], "scores": [0.0, 1.0]}
    rows = ROWS[:1] if layout == "packed" else [even]  # nothing is padded
    batch = collate(rows, layout, kind=GROUPS)
    if layout == "packed":
        model.causal_lm.set_attn_implementation("dpo_fast_packed")
    work = work_of(model)
    with FlopCounterMode(display=False) as counter:
        model(**forward_arguments(batch))["logp"].sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if str(op) in ("aten.mm", "aten.addmm"))
    tokens = batch.input_ids.numel()
    assert batch.padding == 0
    assert products == work.per_token * tokens + work.per_scored * len(batch.targets_U)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attended_pairs_are_those_of_the_mask(layout):
    """Tokens that may see each other, counted once a pair; a token with itself counts half."""
    batch = collate(ROWS, layout, kind=GROUPS)
    if layout == "padded":
        pairs = sum(int(n) ** 2 for n in batch.attention_mask.sum(1)) / 2
    else:
        pairs = sum(prefix + place + 0.5 for own, prefix, _ in batch.spans for place in range(own))
    assert batch.attended_pairs == pytest.approx(pairs, abs=len(batch.lengths_S))
    assert collate([], layout, kind=GROUPS).attended_pairs == 0


def test_experts_are_not_guessed():
    assert work_of(scoring("mixtral, experts")) is None
    work = work_of(scoring())
    assert work.per_token > 0 and work.per_scored == 6 * scoring().causal_lm.lm_head.weight.numel()


def test_the_head_is_timed_forward_and_backward(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    model, clock = scoring(), Clock(CPU)
    head = model.causal_lm.get_output_embeddings()
    forward = head.forward

    def slow(*arguments):
        now[0] += 0.25
        if torch.is_grad_enabled() and len(arguments) > 1:
            arguments[0].register_hook(later)
        return forward(*arguments)

    def later(grad):  # between the gradient of the log-probs and that of the hidden states
        now[0] += 2.0

    head.forward = slow
    watch_head(head, clock)
    batch = collate(ROWS, "padded", kind=GROUPS)
    logp = model(**forward_arguments(batch))["logp"]
    assert clock.read() == {"perf/head_ms": 250.0}

    logp.sum().backward()
    assert clock.read() == {"perf/head_ms": 2000.0}
    with torch.no_grad():
        model(**forward_arguments(batch))
    model.causal_lm(batch.input_ids)  # logits
    assert clock.read() == {}


def test_clock_and_sums(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    sums = MetricSums(CPU)
    sums.clock.end("perf/head_ms")  # nothing began
    for _ in range(2):
        with sums.clock.time("perf/reference_ms"):
            now[0] += 0.003
        sums._add("loss", torch.tensor(1.0), 0)
        sums._count("num_tokens", 5, 0)
        sums._count("examples", 1, 0)
        sums.step()
    found = sums.read()
    assert found["perf/reference_ms"] == pytest.approx(3.0) and found["perf/head_ms"] == 0


def test_a_device_has_a_rate_and_memory():
    assert product_rate(CPU, torch.float32) > 1e8
    assert 0.05 < peak_memory_gib(CPU) < 64
