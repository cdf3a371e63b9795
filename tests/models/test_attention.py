"""Rows of trees against every sequence alone, for architectures that attend in different ways."""

import dataclasses
import functools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from dpo_fast.data.batch import collate_trees
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.data.tree import grow
from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel, attention
from dpo_fast.models.attention import BACKENDS, NAMES, varlen
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.models.separation import check_separation
from tests.support.architectures import ARCHITECTURES, TREES, alone, assert_same, make, slopes

PACKED = ("packed", "shared_prefix")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trees_score_like_every_sequence_alone(name):
    """Log-probs and the gradient of every parameter, fp32, to 1e-5."""
    model = make(name)
    parameters = list(model.parameters())
    expected = alone(model)
    true_gradients = slopes(expected, parameters)
    model.set_attn_implementation(NAMES["sdpa"])
    scoring = ScoringModel(model)
    for layout in PACKED:
        scores = scoring(**forward_arguments(collate_trees(TREES, layout)))["logp"]
        assert_same(scores, slopes(scores, parameters), expected, true_gradients)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2, caps and windows", "gpt-oss, sinks"])
def test_under_autocast_it_is_as_near_as_rows_of_their_own(name):
    """Rotary embeddings and norms of an fp32 model give fp32 there, and projections bf16."""
    model = make(name)
    parameters, expected = list(model.parameters()), alone(model)
    true = slopes(expected, parameters)
    errors = []
    for name, layout in (("eager", "padded"), (NAMES["sdpa"], "packed")):
        model.set_attn_implementation(name)
        with torch.autocast("cpu", torch.bfloat16):
            scores = ScoringModel(model)(**forward_arguments(collate_trees(TREES, layout)))["logp"]
        found = slopes(scores, parameters)
        distance = sum((a - b).square().sum() for a, b in zip(found, true) if b is not None)
        errors.append([(scores - expected).norm().item(), distance.sqrt().item()])
    assert all(packed <= 2 * padded for packed, padded in zip(errors[1], errors[0])), errors


LONG = list(range(10, 45))  # more than sequences of different prompts must have in common
REPEATED = [
    ([1, 5, 6, 7], [[8, 9, 2], [8, 9, 10, 2]]),  # pairs of three answers to one prompt
    ([1, 90], [[11, 2], [12, 13, 2]]),
    ([1, 5, 6, 7], [[8, 9, 2], [20, 2]]),
    ([1, 5, 6, 7], [[8, 9, 10, 2], [20, 2]]),
    (LONG + [3], [[4, 2], [4, 5, 2]]),
    (LONG + [3, 4, 5, 6], [[7, 2], [7]]),  # goes on with an answer of the one before
    (LONG + [9], [[4, 2], [4, 2]]),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    ["llama", "qwen2, a window in one layer", "gemma2, caps and windows", "gpt-oss, sinks",
     "qwen3-moe, experts", "deepseek-v3, unequal head sizes"],
)  # fmt: skip
def test_what_comes_again_is_computed_once_and_scores_the_same(name, layout):
    model = make(name)
    parameters = list(model.parameters())
    expected = alone(model, REPEATED)
    true_gradients = slopes(expected, parameters)
    if LAYOUTS[layout].shares_rows:
        model.set_attn_implementation(NAMES["sdpa"])
    batch = collate_trees(REPEATED, layout)
    scores = ScoringModel(model)(**forward_arguments(batch))["logp"]
    assert_same(scores, slopes(scores, parameters), expected, true_gradients)
    sequences = [(*prompt, *answer[:-1]) for prompt, answers in REPEATED for answer in answers]
    predictions = {
        (*prompt, *answer[: place + 1])
        for prompt, answers in REPEATED
        for answer in answers
        for place in range(len(answer))
    }
    computed = {
        "padded": len(set(sequences)),
        "packed": sum(map(len, set(sequences))),
        # The two short prompts are trees of their own, though both begin with a 1.
        "shared_prefix": 1
        + len({sequence[:end] for sequence in sequences for end in range(1, len(sequence) + 1)}),
    }
    found = len(batch.input_ids) if layout == "padded" else batch.input_ids.numel()
    assert found == computed[layout]
    if layout == "shared_prefix":  # here a prediction is what comes after other tokens
        assert len(batch.rows_U) == len(predictions)


@pytest.mark.parametrize("name", ["llama", "gemma2, caps and windows", "qwen3-moe, experts"])
def test_the_same_under_gradient_checkpointing(name):
    model = make(name)
    parameters = list(model.parameters())
    expected = alone(model, REPEATED)
    true_gradients = slopes(expected, parameters)
    model.set_attn_implementation(NAMES["sdpa"])
    scoring = ScoringModel(model).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    scores = scoring(**forward_arguments(collate_trees(REPEATED, "shared_prefix")))["logp"]
    assert_same(scores, slopes(scores, parameters), expected, true_gradients)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_same_with_adapters(checkpointing):
    """LoRA on every linear layer, its second factor not zero; then with the adapters off."""
    from peft import LoraConfig, get_peft_model

    model = make("llama")
    base = alone(model, REPEATED)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    adapters = [p for n, p in peft.named_parameters() if "lora_" in n]
    for parameter in adapters:
        torch.nn.init.normal_(parameter, std=0.3)
    expected = alone(model, REPEATED)
    true_gradients = slopes(expected, adapters)
    assert not torch.allclose(base, expected, atol=0.1)
    model.set_attn_implementation(NAMES["sdpa"])
    scoring = ScoringModel(model)
    scoring.model = peft
    if checkpointing:
        scoring.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = forward_arguments(collate_trees(REPEATED, "shared_prefix"))
    scores = scoring(**batch)["logp"]
    assert_same(scores, slopes(scores, adapters), expected, true_gradients)
    with torch.no_grad(), scoring.as_started():
        torch.testing.assert_close(scoring(**batch)["logp"], base, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if "unequal" not in n])
def test_flex_attention_scores_the_same(name):
    """Its forward alone: FlexAttention has no backward on a CPU, and is refused for training there."""
    model = make(name)
    with torch.no_grad():
        expected = alone(model, REPEATED)
        model.set_attn_implementation(NAMES["flex_attention"])
        for layout in PACKED:
            scores = ScoringModel(model)(**forward_arguments(collate_trees(REPEATED, layout)))
            torch.testing.assert_close(scores["logp"], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def programs():
    """torch.compile with a limit of two programs, and nothing compiled."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("error:flex_attention called without torch.compile")
@pytest.mark.parametrize("limit", [attention.FLEX_PROGRAMS, 2])
def test_every_kind_of_mask_is_compiled_or_it_is_an_error(monkeypatch, programs, limit):
    """What torch does behind its limit writes out all scores, and says so once."""
    compiled = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(attention, "FLEX_PROGRAMS", limit)
    monkeypatch.setattr(torch, "compile", compiled)
    kernel = attention._flex_kernel.__wrapped__()
    monkeypatch.setattr(attention, "_flex", lambda: kernel)
    plan = AttentionPlan(((140, 0, -1), (20, 10, 0)), torch.device("cpu"))
    query, key, value = (torch.randn(1, heads, 160, 16) for heads in (4, 2, 2))
    options = {"scale": 0.2, "sinks": None}

    def compute() -> None:
        for window, cap in ((None, None), (16, None), (None, 5.0), (16, 5.0)):
            options.update(window=window, softcap=cap)
            with torch.no_grad():
                found = attention.flex_attention(plan, query, key, value, **options)
            torch.testing.assert_close(found, BACKENDS["sdpa"](plan, query, key, value, **options))

    if limit == 2:
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            compute()
    else:
        compute()


@pytest.fixture
def backward_there(monkeypatch):
    """FlexAttention refuses gradients on a CPU, though torch writes its backward down for every device."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


def trees_of_three_blocks(sinks: bool) -> tuple[AttentionPlan, list[torch.Tensor]]:
    plan = AttentionPlan(((140, 0, -1), (20, 10, 0), (130, 15, 1)), torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, heads, 290, 16) for heads in (4, 2, 2)] + ([(4,)] if sinks else [])
    return plan, [torch.randn(shape, generator=draw) for shape in shapes]


def test_a_compiled_cap_and_window_have_a_forward_and_a_backward(
    monkeypatch, programs, backward_there
):
    """The program of both as torch derives it, before any kernel is made of it, against SDPA."""
    kernel = torch.compile(attention._flex(), dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(attention, "_flex", lambda: kernel)
    plan, leaves = trees_of_three_blocks(sinks=True)
    rule = {"scale": 0.2, "window": 40, "softcap": 5.0}
    for leaf in leaves:
        leaf.requires_grad_()
    found, true = (
        slopes_of(function(plan, *leaves[:3], **rule, sinks=leaves[3]), leaves)
        for function in (attention.flex_attention, BACKENDS["sdpa"])
    )
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def slopes_of(output: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return output, *torch.autograd.grad(output.sin().sum(), leaves)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_inductors_kernel_of_a_cap_and_a_window_gives_what_sdpa_gives(monkeypatch, programs):
    """Its forward on a CPU, where it gives no log-sum-exp: 10 CPU seconds."""
    kernel = torch.compile(attention._flex(), dynamic=True, fullgraph=True)

    def compute(*tensors, return_aux, **options):
        return kernel(*tensors, **options), None

    monkeypatch.setattr(attention, "_flex", lambda: compute)
    plan, tensors = trees_of_three_blocks(sinks=False)
    rule = {"scale": 0.2, "window": 40, "softcap": 5.0, "sinks": None}
    with torch.no_grad():
        found = attention.flex_attention(plan, *tensors, **rule)
    true = BACKENDS["sdpa"](plan, *tensors, **rule)
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)


def row_of(*sequences: tuple[int, ...]):
    """Distinct sequences as trees along a row. All that begins alike is shared."""
    return grow([np.array(each) for each in sequences], ["kin"] * len(sequences))


def visible(row, window: int | None = None) -> torch.Tensor:
    """Bool [N, N] of who sees whom: the tokens of a sequence see those before them in it."""
    sees = torch.zeros(len(row.ids), len(row.ids), dtype=torch.bool)
    for path in row.paths:
        for place, token in enumerate(path):
            first = 0 if window is None else max(place + 1 - window, 0)
            sees[token, path[first : place + 1]] = True
    return sees


SEQUENCES = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple),
    min_size=1,
    max_size=8,
    unique=True,
)


@settings(deadline=None, max_examples=100)
@given(SEQUENCES, st.sampled_from([1, 2, 3, 5]))
def test_every_form_of_a_chunked_plan_says_the_same(sequences, size):
    """A token sees what it sees in its tree and in its chunk of its sequence."""
    row = row_of(*sequences)
    whole = AttentionPlan(row.spans, torch.device("cpu"))
    plan = whole.chunked(size)
    chunks = whole.positions // size
    expected = visible(row) & (chunks[:, None] == chunks)
    layout, seen = plan.varlen, torch.zeros_like(expected)
    keys = torch.arange(len(expected)) if layout.keys is None else layout.keys
    starts = zip(plan.segments, layout.cu_seq_q.tolist(), layout.cu_seq_k.tolist())
    for segment, q, k in starts:
        rows = torch.arange(q, q + segment.queries)
        seen[rows[:, None], keys[k : k + segment.prefix + segment.queries]] = plan.mask(
            segment, None
        )
    assert torch.equal(seen, expected)
    assert plan.longest == min(size, whole.longest) and plan is whole.chunked(size)
    assert (plan is whole) == (whole.longest <= size)
    mask = plan.block_mask(None).mask_mod
    place = torch.arange(len(expected))
    none = torch.zeros((), dtype=torch.long)
    assert torch.equal(mask(none, none, place[:, None], place), expected)


@given(SEQUENCES, st.sampled_from([None, 1, 2, 3, 7]))
def test_every_form_of_the_plan_says_the_same(sequences, window):
    """Segments with their masks, gathered keys, and ends, against the definition."""
    row = row_of(*sequences)
    plan = AttentionPlan(row.spans, torch.device("cpu"))
    expected = visible(row, window)
    size = len(expected)
    place, position = torch.arange(size), plan.positions
    sees = (place <= place[:, None]) & (place[:, None] < plan.ends)
    if window is not None:
        sees &= position[:, None] - position < window
    assert torch.equal(sees, expected)
    layout = plan.varlen
    keys = torch.arange(size) if layout.keys is None else layout.keys
    seen = torch.zeros(size, size, dtype=torch.bool)
    starts = zip(plan.segments, layout.cu_seq_q.tolist(), layout.cu_seq_k.tolist())
    for segment, q, k in starts:
        rows = torch.arange(q, q + segment.queries)
        columns = keys[k : k + segment.prefix + segment.queries]
        seen[rows[:, None], columns] = plan.mask(segment, window)
    assert torch.equal(seen, expected)
    assert layout.max_q == max(s.queries for s in plan.segments)
    assert layout.max_k == max(s.queries + s.prefix for s in plan.segments)
    assert layout.cu_seq_q[-1] == size and layout.cu_seq_k[-1] == len(keys)
    assert plan.longest == int(position.max()) + 1


@pytest.mark.parametrize("window", [None, 3])
def test_the_varlen_arguments_give_what_sdpa_gives(window):
    """A kernel as flash-attention documents it (causal, aligned at the end, its window to the left), in
    plain PyTorch. The real ones need a GPU; they take these very arguments."""

    def kernel(q, k, v, layout, *, scale, window, softcap, sinks):
        assert softcap is None and sinks is None
        outputs = []
        spans = zip(*(o.tolist() for x in layout[1:3] for o in (x[:-1], x[1:])))
        for q0, q1, k0, k1 in spans:
            i = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None]
            j = torch.arange(k1 - k0)
            mask = (j <= i) & (True if window is None else j > i - window)
            parts = (x[a:b].transpose(0, 1) for x, a, b in ((q, q0, q1), (k, k0, k1), (v, k0, k1)))
            out = torch.nn.functional.scaled_dot_product_attention(
                *parts, attn_mask=mask, scale=scale, enable_gqa=True
            )
            outputs.append(out.transpose(0, 1))
        return torch.cat(outputs)

    torch.manual_seed(0)
    row = row_of((1, 1, 1, 1, 1), (1, 1, 1, 2), (2,), (2, 1, 1, 3), (2, 1, 1, 4), (3, 3, 3))
    rows = len(row.ids)
    query, key, value = (torch.randn(1, heads, rows, 8) for heads in (4, 2, 2))
    value = value[..., :6]
    options = {"scale": 0.3, "window": window, "softcap": None, "sinks": None}
    plan = AttentionPlan(row.spans, torch.device("cpu"))
    assert [segment.prefix for segment in plan.segments] == [0, 3, 0, 1, 3, 0]
    expected = BACKENDS["sdpa"](plan, query, key, value, **options)
    got = varlen(kernel, plan, query, key, value, **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_every_backend_scores_like_sdpa(backend):
    from dpo_fast.models.architecture import Architecture, _refusal

    plain = Architecture("", None, softcap=False, sinks=False)
    device, dtype = torch.device("cuda"), torch.bfloat16
    refusal = _refusal(backend, True, device, dtype, plain)
    if refusal:
        pytest.skip(refusal)
    torch.manual_seed(0)
    spans = ((100, 0, -1), (200, 70, 0), (30, 90, 1), (1, 70, 0), (401, 0, -1), (193, 0, -1))
    plan = AttentionPlan(spans, device)
    rows = sum(own for own, *_ in spans)
    for window in (None, 50):
        options = {"scale": 0.1, "window": window, "softcap": None, "sinks": None}
        leaves = [
            torch.randn(1, heads, rows, 64, device=device, dtype=dtype, requires_grad=True)
            for heads in (4, 2, 2)
        ]
        results = []
        for name in ("sdpa", backend):
            out = BACKENDS[name](plan, *leaves, **options)
            results.append([out, *torch.autograd.grad(out.float().sin().sum(), leaves)])
        for a, b in zip(*results):
            torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2)


def test_sequences_in_a_row_do_not_see_each_other():
    """Other tokens in one branch leave the scores of all others bitwise alone."""
    scoring = ScoringModel(make("llama", NAMES["sdpa"]))
    other = [(prompt, [list(c) for c in completions]) for prompt, completions in TREES]
    other[0][1][0] = [50, 51, 2]
    for layout in PACKED:
        a, b = (
            scoring(**forward_arguments(collate_trees(trees, layout)))["logp"]
            for trees in (TREES, other)
        )
        assert torch.equal(a[3:], b[3:])
        assert not torch.allclose(a[:3], b[:3], atol=1e-3)


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("name", ["llama", "mixtral, experts", "gpt-oss, sinks"])
def test_the_trial_passes_what_keeps_sequences_apart(name, layout):
    scoring = ScoringModel(make(name, NAMES["sdpa"]))
    check_separation(scoring, layout, 97, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("layout", PACKED)
def test_the_trial_finds_a_layer_that_mixes_tokens(layout):
    """A convolution along the row, as a model of one's own may have: no configuration tells of it."""
    model = make("llama", NAMES["sdpa"])
    model.model.layers[0].register_forward_hook(
        lambda module, inputs, output: output + 0.1 * output.roll(1, dims=1)
    )
    with pytest.raises(
        UserError, match=f"train.layout={layout} .* mixes tokens .* train.layout=pad"
    ):
        check_separation(ScoringModel(model), layout, 97, torch.device("cpu"), torch.float32)


def test_a_model_whose_numbers_overflow_is_not_told_as_one_that_mixes_tokens():
    model = make("llama", NAMES["sdpa"])
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    with pytest.raises(UserError, match="tokens of a trial are not finite, .* overflow in float32"):
        check_separation(ScoringModel(model), "packed", 97, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_mask": torch.zeros(1, 1, 2, 2)}, "a mask of its own"),
        ({"dropout": 0.1}, "dropout"),
        ({"position_bias": torch.zeros(1)}, r"not known here \(position_bias\)"),
        ({"indices": torch.zeros(1, dtype=torch.int64)}, r"not known here \(indices\)"),
        ({"sinks": torch.zeros(2)}, r"not known here \(sinks\)"),
        ({"is_causal": False}, "look ahead"),
        ({"plan": None}, "got no plan"),
    ],
)
def test_what_would_change_the_scores_is_refused(changes, reason):
    attention = transformers.AttentionInterface()[NAMES["sdpa"]]
    states = (torch.randn(1, 2, 2, 4) for _ in range(3))
    options = {"plan": AttentionPlan(((2, 0, -1),), torch.device("cpu")), "attention_mask": None}
    with pytest.raises(UserError, match=reason):
        attention(torch.nn.Module(), *states, **(options | changes))


def test_kernels_refuse_what_they_do_not_know():
    from dpo_fast.models.attention import flash_kernel, pytorch_kernel

    plan = AttentionPlan(((2, 0, -1),), torch.device("cpu"))
    q = torch.randn(2, 2, 4)
    options = {"scale": 1.0, "window": None, "softcap": None, "sinks": None}
    with pytest.raises(UserError, match="model.attention=varlen .* soft-capped"):
        pytorch_kernel(q, q, q, plan.varlen, **(options | {"softcap": 30.0}))
    with pytest.raises(UserError, match="model.attention=flash_attention_2 .* sinks"):
        flash_kernel(
            "flash_attention_2", q, q, q, plan.varlen, **(options | {"sinks": torch.zeros(2)})
        )


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("name", ["llama", "gemma2, caps and windows"])
def test_a_forward_reads_nothing_back_from_the_device(name, layout):
    """On a GPU it would wait for all work there. Tensors on the meta device have no values to read."""
    meta = torch.device("meta")
    model = make(name).to(meta)
    model.set_attn_implementation(NAMES["sdpa"])
    batch = collate_trees(TREES, layout).to(meta)
    plan = AttentionPlan(batch.spans, meta)
    places = {"position_ids": batch.position_ids, "plan": plan}
    hidden = model.get_decoder()(input_ids=batch.input_ids, use_cache=False, **places)[0]
    assert hidden.shape[:2] == batch.input_ids.shape


@pytest.mark.parametrize("told", [True, False])
def test_varlen_attention_of_2_11_is_used_for_grouped_heads(told, monkeypatch):
    """torch 2.11 has windows and serves grouped heads, but has no argument that says so."""
    from torch.nn.attention import varlen as module

    from dpo_fast.models.attention import has_varlen, pytorch_kernel

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1),
    ):  # fmt: skip
        calls.append((max_q, max_k, scale, window_size, None))
        return query

    def later(*arguments, scale=None, window_size=(-1, -1), enable_gqa=False):
        calls.append((*arguments[5:], scale, window_size, enable_gqa))
        return arguments[0]

    calls = []
    monkeypatch.setattr(module, "varlen_attn", later if told else varlen_attn)
    assert has_varlen()
    arguments = AttentionPlan(((5, 0, -1), (1, 3, 0)), torch.device("cpu")).varlen
    q, k = torch.randn(6, 4, 8), torch.randn(9, 2, 8)
    for window in (None, 3):
        pytorch_kernel(q, k, k, arguments, scale=0.3, window=window, softcap=None, sinks=None)
    grouped = True if told else None
    assert calls == [(5, 5, 0.3, (-1, 0), grouped), (5, 5, 0.3, (2, 0), grouped)]
    monkeypatch.setattr(module, "varlen_attn", lambda query, is_causal, scale: query)  # 2.10's
    assert not has_varlen()


def test_a_padded_batch_has_no_plan():
    """Padded batches go by the mask; the plan is for rows."""
    batch = collate_trees(TREES, "padded")
    assert batch.spans is None
    assert dataclasses.asdict(batch)["attention_mask"].sum() == batch.tokens - len(batch.lengths_S)
