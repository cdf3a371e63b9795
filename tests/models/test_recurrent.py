"""Layers that carry a state along the tokens, in rows of trees: every sequence as if it were alone."""

import copy
import itertools
import json
import sys
import types

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
from dpo_fast.models import ScoringModel, architecture_of, choose_layout, recurrent
from dpo_fast.models.attention import NAMES
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.config import LoraSection
from dpo_fast.models.layers import checkpoint_layers, compile_layers
from dpo_fast.models.lora import add_lora
from dpo_fast.models.recurrent.convolution import convolve
from dpo_fast.models.recurrent.lightning import LAYER
from dpo_fast.models.recurrent.segments import by_flat_levels, by_levels, cut
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.models.separation import check_separation
from dpo_fast.training.fit import check_sequence_parallel
from tests.support import ranks
from tests.support.architectures import alone, slopes
from tests.support.faults import SLOW
from tests.support.hybrids import CPU, HYBRIDS, SPARSE, TOLD, TREES, in_double, make, states
from tests.support.metrics import lines_of
from tests.support.models import run_tree, write_pairs
from tests.support.plain_torch import assert_same_step
from tests.support.tokenizers import byte_tokenizer

SHARED = ("packed", "shared_prefix")
# One of each kind of layer, for what does not depend on the family.
KINDS = ("qwen3-next", "kimi-linear", "lfm2")
SHARDED = (*KINDS, "granite-hybrid", "jamba")


def attending(model, layout: str):
    """The model with the attention that a layout needs."""
    model.set_attn_implementation(NAMES["sdpa"] if LAYOUTS[layout].shares_rows else "eager")
    return model


def scores(scoring: ScoringModel, layout: str, trees=TREES) -> torch.Tensor:
    attending(scoring.causal_lm, layout)
    return scoring(**forward_arguments(collate_trees(trees, layout)))["logp"]


def assert_near(found, expected, tolerance: float) -> None:
    """Tensors by name, each against the largest of itself or a hundredth of the largest of all."""
    assert found.keys() == expected.keys()
    largest = max(each.abs().max() for each in expected.values())
    for name, true in expected.items():
        size = torch.maximum(true.abs().max(), largest * 1e-2)
        assert (found[name] - true).abs().max() <= tolerance * size, name


def gradients(values: torch.Tensor, model) -> dict[str, torch.Tensor]:
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    found = zip([name for name, _ in named], slopes(values, [each for _, each in named]))
    return {name: each for name, each in found if each is not None}


@pytest.fixture(scope="module", params=HYBRIDS)
def family(request):
    """(a ScoringModel, log-probs of every sequence alone, their gradients)."""
    model = make(request.param)
    expected = alone(model, TREES)
    return ScoringModel(model), expected.detach(), gradients(expected, model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_of_a_batch_score_as_alone(family, layout):
    """Log-probs and the gradient of every parameter, fp32. 1e-5 is rounding in fp32 recurrences."""
    scoring, expected, slopes_alone = family
    found = scores(scoring, layout)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-5)
    assert_near(gradients(found, scoring.causal_lm), slopes_alone, 5e-5)


@pytest.mark.parametrize("name", HYBRIDS)
def test_in_double_precision_nothing_but_rounding_is_left(name):
    """The models' own code in fp64: states of every scored row and every gradient, to 1e-11."""
    model = in_double(make(name))
    recurrent.serve(model)
    expected = states(model, None)
    slopes_alone = gradients(expected, model)
    for layout in LAYOUTS:
        found = states(attending(model, layout), layout)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
        assert_near(gradients(found, model), slopes_alone, 1e-10)


@pytest.mark.parametrize("layout", SHARED)
def test_a_changed_sequence_moves_no_other(family, layout):
    """Each completion in turn gets other tokens; the log-probs of all others stay."""
    scoring = family[0]
    sizes = [len(each) for _, completions in TREES for each in completions]
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    with torch.no_grad():
        before = scores(scoring, layout)
        for changed in (1, 3, 5, 8):
            trees, place = copy.deepcopy(TREES), 0
            for _, completions in trees:
                for completion in completions:
                    if place == changed:
                        completion[:-1] = [(token + 41) % 97 for token in completion[:-1]]
                        completion[0] = 96  # forks at its first token, from all others
                    place += 1
            after = scores(scoring, layout, trees)
            moved = (after - before).abs()
            assert moved[owner != changed].max() < 3e-5
            if len(before[owner == changed]) > 1:
                assert moved[owner == changed].max() > 1e-2


@pytest.mark.parametrize("layout", SHARED)
def test_the_trial_of_the_loaded_model_passes(family, layout):
    attending(family[0].causal_lm, layout)
    check_separation(family[0], layout, 97, CPU, torch.float32)


@pytest.mark.parametrize("name", KINDS)
def test_the_trial_finds_states_that_leak_and_states_that_are_lost(name, monkeypatch):
    scoring = ScoringModel(make(name, NAMES["sdpa"]))
    functions = vars(recurrent.module_of(type(scoring.causal_lm.model.layers[0])))
    if not hasattr(functions["causal_conv1d_fn"], "original"):
        pytest.skip("this version of transformers hands these layers no keywords")
    for each in recurrent.FUNCTIONS.keys() & functions.keys():
        with monkeypatch.context() as patch:
            whole = functions[each].original
            patch.setitem(functions, each, lambda *a, plan, w=whole, **k: w(*a, **k))
            with pytest.raises(UserError, match="train.layout=shared_prefix .* mixes tokens"):
                check_separation(scoring, "shared_prefix", 97, CPU, torch.float32)

    def forgetful(plan, *arguments, **keywords):
        spans = tuple((own, 0, -1) for own, *_ in plan.spans)  # every branch begins anew
        return served(AttentionPlan(spans, CPU), *arguments, **keywords)

    for each in recurrent.FUNCTIONS.keys() & functions.keys():
        served = recurrent.FUNCTIONS[each]
        with monkeypatch.context() as patch:
            patch.setitem(functions, each, recurrent.put_round(forgetful, functions[each].original))
            check_separation(scoring, "packed", 97, CPU, torch.float32)
            with pytest.raises(UserError, match="train.layout=shared_prefix .* carries its state"):
                check_separation(scoring, "shared_prefix", 97, CPU, torch.float32)


@pytest.mark.parametrize("name", KINDS)
def test_without_a_plan_a_model_computes_the_same_bits(name):
    ids = torch.tensor([[1, 5, 6, 7, 33, 21], [4, 4, 3, 0, 0, 0]])
    mask = (ids > 0).long()
    model = make(name)
    module = recurrent.module_of(type(model.model.layers[0]))
    for each in recurrent.FUNCTIONS.keys() & vars(module).keys():
        setattr(module, each, getattr(vars(module)[each], "original", vars(module)[each]))
    before = model(ids, attention_mask=mask).logits
    ScoringModel(copy.deepcopy(model))
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


@pytest.mark.parametrize("name", KINDS)
def test_layers_are_recomputed_and_adapted(name):
    """Checkpointing, with inputs on the CPU too, and LoRA give the gradients that they have without."""
    for adapted in (False, True):
        scoring = ScoringModel(make(name))
        if adapted:
            add_lora(scoring, LoraSection(r=4, target_modules="all-linear"))
            for title, parameter in scoring.named_parameters():
                if "lora_B" in title:
                    torch.nn.init.normal_(parameter, std=0.1)
        scoring.train()
        expected = scores(scoring, "padded")
        true = gradients(expected, scoring)
        for offload in (False, True):
            checkpoint_layers(scoring.causal_lm, offload=offload)
            found = scores(scoring, "shared_prefix")
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-5)
            assert_near(gradients(found, scoring), true, 5e-5)


@pytest.mark.slow
def test_compiled_layers_break_their_graph_there_and_compute_the_same():
    scoring = ScoringModel(make("qwen3-next"))
    expected = scores(scoring, "shared_prefix")
    true = gradients(expected, scoring)
    compile_layers(scoring.causal_lm, backend="eager")
    found = scores(scoring, "shared_prefix")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_near(gradients(found, scoring), true, 1e-5)


def test_what_is_not_served_is_refused_by_name():
    with torch.device("meta"):
        model = make("qwen3-next")
        assert architecture_of(model).obstacle is None
        assert choose_layout("auto", architecture_of(model)).name == "shared_prefix"
        model.model.layers[1].linear_attn = torch.nn.Identity()  # a layer that nobody knows
    obstacle = architecture_of(model).obstacle
    assert "linear_attention" in obstacle
    with pytest.raises(UserError, match="train.layout=packed cannot .*linear_attention.*padded"):
        choose_layout("packed", architecture_of(model))


# The pure functions, on trees of any shape.

SEQUENCES = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8, unique_by=tuple
)


def row_of(sequences):
    """Sequences grown into a row of trees: those that begin alike share it."""
    row = grow([np.array(each) for each in sequences], [0] * len(sequences))
    return row, AttentionPlan(row.spans, CPU)


@settings(max_examples=60, deadline=None)
@given(SEQUENCES)
def test_segments_continue_their_parents(sequences):
    row, _ = row_of(sequences)
    segments, starts = cut(row.spans), {}
    whole = []  # by segment, the tokens up to its end
    for segment in segments:
        own = row.ids[segment.start : segment.start + segment.tokens].tolist()
        whole.append((whole[segment.parent] if segment.parent >= 0 else []) + own)
        starts[segment.start] = segment
    assert sum(each.tokens for each in segments) == len(row.ids)
    for sequence in sequences:
        assert sequence in whole or any(each[: len(sequence)] == sequence for each in whole)


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.integers(1, 5))
def test_recurrences_and_convolutions_of_trees_are_those_of_each_sequence(sequences, width):
    row, plan = row_of(sequences)
    torch.manual_seed(len(row.ids))
    table, decays = torch.randn(3, 2).double(), torch.randn(3).double()
    weight = torch.randn(2, width).double()
    x_ND, g_N = table[row.ids].requires_grad_(), -decays[row.ids].abs()

    def scan(rows, state, final):
        x, g = rows
        state = x.new_zeros(len(x), 2) if state is None else state
        steps = []
        for step in range(x.shape[1]):
            state = state * g[:, step, None].exp() + x[:, step]
            steps.append(state * state.sum(-1, keepdim=True).tanh())
        return torch.stack(steps, 1), state if final else None

    def flat(rows, offsets, state, final):
        parts = [[each[:, a:b] for each in rows] for a, b in zip(offsets, offsets[1:])]
        found = [scan(p, None if state is None else state[[i]], final) for i, p in enumerate(parts)]
        outputs, ends = zip(*found)
        return torch.cat(outputs, 1), torch.cat(ends) if final else None

    def convolution(x, kernel):
        padded = torch.nn.functional.pad(x, (kernel.shape[1] - 1, 0))
        return torch.nn.functional.conv1d(padded, kernel[:, None], groups=2)

    ways = {
        "levels": lambda p, x, g: by_levels(p, scan, x[None], g[None])[0],
        "flat": lambda p, x, g: by_flat_levels(p, flat, x[None], g[None])[0],
        "convolution": lambda p, x, g: convolve(p, convolution, x.T[None], weight)[0].T,
    }
    for name, way in ways.items():
        together, loss, truth = way(plan, x_ND, g_N), 0, 0
        for number, path in enumerate(row.paths):
            path = torch.from_numpy(path)
            single = AttentionPlan(((len(path), 0, -1),), CPU)
            own = way(single, x_ND[path], g_N[path])
            torch.testing.assert_close(together[path], own, msg=name)
            loss = loss + (together[path].sin() * (number + 1)).sum()
            truth = truth + (own.sin() * (number + 1)).sum()
        for a, b in zip(*(torch.autograd.grad(each, x_ND) for each in (loss, truth))):
            torch.testing.assert_close(a, b, msg=name)


def test_layers_whose_functions_get_no_keywords_are_not_served():
    """As LFM2's until transformers 5.22: the plan would not reach the convolution."""
    with torch.device("meta"):
        layer = make("qwen3-next").model.layers[0].linear_attn
    assert recurrent.served(layer)
    code = "class {0}:\n def forward(self, x{1}): torch_chunk_gated_delta_rule(causal_conv1d_fn(x))"
    names = dict(vars(recurrent.module_of(type(layer))))
    for name, keywords in (("Told", ", **kwargs"), ("Silent", "")):
        exec(code.format(f"{name}(nn.Module)", keywords), names)
        assert recurrent.served(names[name]()) == bool(keywords)


def test_ranks_do_not_share_rows_of_such_a_model():
    with torch.device("meta"):
        model = make("qwen3-next")
    config = types.SimpleNamespace(
        parallel=types.SimpleNamespace(sequence_parallel=2),
        model=types.SimpleNamespace(attention="auto"),
    )
    architectures = {None: architecture_of(model)}
    with pytest.raises(UserError, match="sequence_parallel=2 .*linear_attention.*parallel=1"):
        check_sequence_parallel(config, {None: model}, architectures)
    scoring = ScoringModel(make("qwen3-next", NAMES["sdpa"]))
    plan = AttentionPlan(((2, 0, -1),), CPU, types.SimpleNamespace(size=2))
    with pytest.raises(UserError, match="sequence_parallel=2 cannot be honoured"):
        scoring.causal_lm.model(input_ids=torch.tensor([[1, 2]]), plan=plan, use_cache=False)


def test_nor_does_lightning_attention():
    scoring = ScoringModel(make("minimax", NAMES["sdpa"]))
    layer = next(m for m in scoring.causal_lm.modules() if type(m).__name__ == LAYER)
    plan = AttentionPlan(((2, 0, -1),), CPU, types.SimpleNamespace(size=2))
    with pytest.raises(UserError, match="sequence_parallel=2 cannot be honoured"):
        layer(torch.zeros(1, 2, 32), plan=plan)


def test_a_kernel_gets_segments_side_by_side(monkeypatch):
    """A kernel in the place of transformers' function, as flash-linear-attention's: it takes cu_seqlens."""
    from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

    scoring = ScoringModel(make("qwen3-next"))
    expected = scores(scoring, "shared_prefix")
    true, calls = gradients(expected, scoring), []
    functions = vars(recurrent.module_of(type(scoring.causal_lm.model.layers[0])))
    ours = functions["torch_chunk_gated_delta_rule"]
    whole = ours.original

    def kernel(
        q, k, v, g, beta, initial_state=None, output_final_state=False, cu_seqlens=None,
        use_qk_l2norm_in_kernel=False,
    ):  # fmt: skip
        assert q.shape[0] == 1 and cu_seqlens.dtype == torch.int64
        calls.append(len(cu_seqlens) - 1)
        parts = [
            whole(
                *(x[:, a:b] for x in (q, k, v)),
                g=g[:, a:b],
                beta=beta[:, a:b],
                initial_state=None if initial_state is None else initial_state[[i]],
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )
            for i, (a, b) in enumerate(itertools.pairwise(cu_seqlens.tolist()))
        ]
        outputs, ends = zip(*parts)
        return torch.cat(outputs, 1), torch.cat(ends) if output_final_state else None

    package = types.ModuleType("a_package_with_a_kernel")
    package.chunk_gated_delta_rule = kernel
    monkeypatch.setitem(sys.modules, package.__name__, package)
    within = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", package.__name__, "")
    monkeypatch.setitem(
        functions,
        "torch_chunk_gated_delta_rule",
        recurrent.put_round(
            recurrent.FUNCTIONS["torch_chunk_gated_delta_rule"], within(whole.__wrapped__)
        ),
    )
    found = scores(scoring, "shared_prefix")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-5)
    assert_near(gradients(found, scoring), true, 5e-5)
    assert len(calls) == 2 * 4 and max(calls) > 4  # layers, levels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of `SHARDED` with a tokenizer, and pairs."""
    folder = tmp_path_factory.mktemp("hybrids")
    for name in SHARDED:
        write_model(folder, name)
    write_pairs(folder / "pairs.jsonl", 8)
    write_pairs(folder / "held-out.jsonl", 6, seed=1)
    return folder


def write_model(folder, name: str) -> None:
    tokenizer = byte_tokenizer(bos=True)
    make(name, vocab_size=len(tokenizer) + 8).save_pretrained(folder / name)  # Qwen's adds a token
    tokenizer.save_pretrained(folder / name)


def case(folder, model: str, stage: int, micro: int, layout: str, **options) -> dict:
    tree = run_tree(folder, micro_batch_size=micro, max_steps=1, layout=layout)
    tree["model"] |= {"path": str(folder / model), **options}
    return tree | {"parallel": {"zero_stage": stage}, "loss": {"type": "simpo"}}


def assert_same_step_when_sharded(folder, names, tolerance: float) -> None:
    one = ranks.first_steps({name: case(folder, name, 0, 4, "padded") for name in names})
    recomputed = {"gradient_checkpointing": True}
    sharded = {name: case(folder, name, 3, 2, "auto", **recomputed) for name in names}
    for name, result in ranks.first_steps(sharded, 2).items():
        assert_same_step(result, one[name], tolerance, name)


@pytest.mark.slow
@pytest.mark.processes
def test_two_ranks_with_sharded_weights(folder):
    """ZeRO-3 with recomputed layers, in rows of trees, against one rank with a row for every sequence.

    A mixer reads the weight of its convolution without calling it, which ZeRO-3 has to gather.
    """
    assert_same_step_when_sharded(folder, SHARDED, 5e-5)


@SLOW
@pytest.mark.processes
def test_two_ranks_with_sharded_weights_of_every_other_family(folder):
    """As above; what is smallest beside a sum that it cancels in may be off by a little more."""
    names = [name for name in (HYBRIDS | TOLD | SPARSE) if name not in SHARDED]
    for name in names:
        write_model(folder, name)
    assert_same_step_when_sharded(folder, names, 1e-4)


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_answers_and_evaluates_as_one_of_padded_batches(folder):
    """Layout auto, a stored reference, held-out prompts answered, and an evaluation of the run."""

    def run(layout: str) -> dict:
        output = str(folder / layout)
        tree = run_tree(folder, output_dir=output, max_steps=2, save_steps=2, layout=layout)
        tree["model"]["path"] = str(folder / KINDS[0])
        tree["data"]["eval"] = str(folder / "held-out.jsonl")
        tree["generate"] = {"max_prompts": 3, "steps": 2, "max_new_tokens": 6, "batch_size": 2}
        return tree

    ranks.train([run("auto"), run("padded")])
    losses, answers = [], []
    for name in ("auto", "padded"):
        found = lines_of(folder / name)
        losses.append([each[k] for each in found for k in ("loss", "eval_loss") if k in each])
        lines = (folder / name / "generations.jsonl").read_text().splitlines()
        answers.append([json.loads(line)["answers"] for line in lines])
    assert len(losses[0]) >= 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert answers[0] == answers[1] and len(answers[0]) == 2
    saving = [each.get("perf/shared_prefix_saving", 0) for each in lines_of(folder / "auto")]
    assert max(saving) > 0.1
    found = ranks.evaluate({"run": {"model": str(folder / "auto"), "data": None}})["run"]
    assert found["metrics"]["eval_loss"] == pytest.approx(losses[0][-1], rel=1e-4)
