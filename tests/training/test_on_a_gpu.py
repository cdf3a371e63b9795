"""The code of a step on tensors that say they are on a GPU: one device, the same numbers, nothing waits."""

from types import SimpleNamespace

import pyarrow
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from dpo_fast.data.batch import collate, collate_trees
from dpo_fast.data.kinds import COMPLETIONS, DEMONSTRATIONS, GROUPS, PAIRS
from dpo_fast.losses import LossOptions, Objective, Totals
from dpo_fast.models import ScoringModel, attention
from dpo_fast.models.attention import NAMES
from dpo_fast.models.decoder import attention_of_parts
from dpo_fast.models.layers import checkpoint_layers
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.models.vision import Vision
from dpo_fast.references import CachedReference
from dpo_fast.training.balance import Routing
from dpo_fast.training.finite import Flag
from dpo_fast.training.loss_pass import LossPass, Statistics
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.step import coupled_step, evaluate, train_step
from tests.support import image_models
from tests.support.architectures import TREES, make
from tests.support.families import tiny
from tests.support.pretended_gpu import GPU, PretendedGpu

HEAD = "dpo_fast/ops/linear_logp/torch_tiles.py"  # on a GPU Triton's head is used, which waits for nothing


def waits(gpu: PretendedGpu) -> dict:
    """What of ours waits."""
    return {key: n for key, n in gpu.own_waits.items() if not key[0].startswith(HEAD)}


def test_what_a_card_refuses_is_refused_and_what_waits_is_seen():
    with PretendedGpu() as gpu:
        x = torch.arange(6.0, device="cuda")
        here = torch.ones(6)
        assert (x.device, x.is_cuda, x.cpu().tolist()) == (GPU, True, [0, 1, 2, 3, 4, 5])
        for wrong in (lambda: x + here, lambda: x.add_(here), lambda: torch.cat([x, here])):
            with pytest.raises(
                RuntimeError, match=r"cuda:0 and cpu! \(tests/training/test_on_a_gpu"
            ):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert (x + torch.tensor(1.0)).cpu().sum() == 21  # a single number may be of the host
        gpu.waits.clear()
        free = (
            lambda: here.to("cuda", non_blocking=True),
            lambda: x.masked_fill_(x > 3, 0),
            lambda: x.repeat_interleave((x > 1).long(), output_size=2),
        )
        for call in free:
            call()
        assert not gpu.waits
        waiting = (
            lambda: x.sum().item(),
            lambda: x[x > 1],
            lambda: x.nonzero(),
            lambda: x[[0, 1]],
            lambda: torch.tensor([1], device="cuda"),
            lambda: here.to("cuda"),
            lambda: bool(x.any()),
            lambda: x.tolist(),
            lambda: x.repeat_interleave((x > 1).long()),
        )
        for number, call in enumerate(waiting, 1):
            call()
            assert sum(gpu.waits.values()) >= number
        assert all(place.startswith("tests/training/test_on_a_gpu.py:") for place, _ in gpu.waits)


def test_a_copy_that_nobody_has_waited_for_has_no_numbers():
    with PretendedGpu():
        x = torch.arange(3.0, device="cuda")
        on_its_way = x.to("cpu", non_blocking=True)
        assert on_its_way.isnan().all()
        assert on_its_way.to("cuda", non_blocking=True).sum().item() == 3  # in the queue behind it
        assert on_its_way.tolist() == [0, 1, 2]
        assert not Flag(x.sum() > 5) and Flag(x.sum() > 2)  # they wait for what they need


def plain_varlen(
    q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What PyTorch's kernel computes. It waits; a kernel does not."""
    outputs, edges = [], zip(*(each.cpu().tolist() for each in (cu_q, cu_k)))
    edges = list(edges)
    for (a, c), (b, d) in zip(edges, edges[1:]):
        queries, keys = q[a:b].transpose(0, 1), k[c:d].transpose(0, 1)
        keys, values = (
            x.repeat_interleave(len(queries) // len(x), 0) for x in (keys, v[c:d].transpose(0, 1))
        )
        behind = torch.arange(d - c - (b - a), d - c, device=q.device)[:, None]
        behind = behind - torch.arange(d - c, device=q.device)
        left, right = window_size
        unseen = (behind < -right) if right >= 0 else torch.zeros_like(behind, dtype=torch.bool)
        unseen = unseen | (behind > left) if left >= 0 else unseen
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(unseen, -torch.inf)
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


def plain_flex(q, k, v, *, score_mod, block_mask, scale, enable_gqa, return_aux):
    """What FlexAttention's kernel computes."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores, places = q @ k.transpose(2, 3) * scale, torch.arange(q.shape[2], device=q.device)
    if score_mod is not None:
        scores = score_mod(scores, None, None, None, None)
    sees = block_mask.mask_mod(None, None, places[:, None], places)
    scores = scores.masked_fill(~sees, -torch.inf)
    return scores.softmax(-1) @ v, SimpleNamespace(lse=scores.logsumexp(-1))


@pytest.fixture
def kernels(monkeypatch):
    """Plain code in the place of kernels that a CPU has not got."""
    monkeypatch.setattr(attention, "_flex_kernel", lambda: plain_flex)
    monkeypatch.setattr(attention, "_flex", lambda: plain_flex)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen, raising=False)


def scored(build, batch, gpu: PretendedGpu | None = None) -> list[Tensor]:
    """Log-probs and all gradients, on the host."""
    scoring = build()
    if gpu is not None:
        gpu.send(scoring)
    if batch.images is not None:
        scoring.vision = Vision(scoring.causal_lm)
    batch = batch.to(GPU) if gpu else batch
    if gpu is not None:
        gpu.waits.clear()
    logp_T = scoring(**forward_arguments(batch))["logp"]
    logp_T.sin().sum().backward()
    found = [logp_T, *(p.grad for p in scoring.parameters() if p.grad is not None)]
    if gpu is not None:
        gpu.seen = waits(gpu)
    return [x.detach().cpu() for x in found]


def assert_same_there(build, batch, may_wait=()) -> None:
    """The same numbers on either device, and no line of ours but these waits for the GPU."""
    here = scored(build, batch)
    with PretendedGpu() as gpu:
        there = scored(build, batch, gpu)
    assert len(here) == len(there)
    largest = max(x.abs().max() for x in here)
    for a, b in zip(here, there):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * largest.item())
    assert not {key: n for key, n in gpu.seen.items() if not key[0].startswith(may_wait or "-")}


def of_architecture(name: str, backend: str, checkpointing=None):
    def build() -> ScoringModel:
        model = make(name, backend)
        scoring = ScoringModel(model, implementation="torch")
        if checkpointing:
            checkpoint_layers(scoring.train().causal_lm, offload=checkpointing == "offloaded")
        return scoring

    return build


@pytest.mark.parametrize(
    "name, backend, layout",
    [
        ("llama", "sdpa", "padded"),
        ("gpt-oss, sinks", "eager", "padded"),
        *(("llama", NAMES[each], "packed") for each in ("sdpa", "flex_attention", "varlen")),
        *(("qwen2, tied", NAMES[each], "shared_prefix") for each in ("flex_attention", "varlen")),
        ("qwen2, a window in one layer", NAMES["varlen"], "shared_prefix"),
        ("gemma2, caps and windows", NAMES["flex_attention"], "shared_prefix"),
        ("gpt-oss, sinks", NAMES["sdpa"], "shared_prefix"),
        ("gpt-oss, sinks", NAMES["flex_attention"], "shared_prefix"),
        ("deepseek-v3, unequal head sizes", NAMES["varlen"], "shared_prefix"),
        ("llama4, chunks, temperatures, experts", NAMES["sdpa"], "shared_prefix"),
        ("llama4, chunks, temperatures, experts", NAMES["flex_attention"], "shared_prefix"),
        ("llama4, chunks, temperatures, experts", NAMES["varlen"], "shared_prefix"),
    ],
)  # fmt: skip
def test_every_attention_computes_on_one_device_and_waits_for_nothing(
    kernels, name, backend, layout
):
    assert_same_there(of_architecture(name, backend), collate_trees(TREES, layout))


@pytest.mark.parametrize("checkpointing", ["recomputed", "offloaded"])
def test_layers_that_are_recomputed(kernels, checkpointing):
    build = of_architecture("qwen3", NAMES["varlen"], checkpointing)
    assert_same_there(build, collate_trees(TREES, "shared_prefix"))


# Attention of older code, that goes by an index, states, convolutions, n-grams.
@pytest.mark.parametrize(
    "family", ["bloom", "gpt_neo", "mpt", "deepseek_v4", "qwen3_next", "mamba", "zamba2"]
)
def test_layers_that_are_served_in_their_own_way(family):
    def build() -> ScoringModel:
        model = tiny(family)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        if family not in ("bloom", "gpt_neo", "mpt"):
            model.set_attn_implementation(NAMES["sdpa"])
        return ScoringModel(model, implementation="torch")

    assert_same_there(build, collate_trees(TREES, "shared_prefix"))


class Engine:
    """What a step asks of DeepSpeed's engine, round a model on one device."""

    world_size, training = 1, True

    def __init__(self, module: ScoringModel, device: torch.device) -> None:
        self.module, self.device = module, device

    def __call__(self, **arguments) -> dict:
        return self.module(**arguments)

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        pass

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def eval(self) -> None:
        self.module.eval()


PROMPTS = ([1, 5, 6, 7], [1, 90], [4, 4, 3], [1, 5, 6, 8])
ANSWERS = (
    [8, 9, 2],
    [10, 2],
    [11, 2],
    [12, 13, 14, 15, 44, 2],
    [9, 9, 5, 2],
    [50, 51, 2],
    [3, 2],
    [7, 2],
)


def examples_of(kind) -> list[dict]:
    if kind == PAIRS:
        pairs = zip(PROMPTS, ANSWERS[::2], ANSWERS[1::2])
        return [
            {
                "prompt_ids": p,
                "chosen_ids": w,
                "rejected_ids": r,
                "weight": 0.5 + i,
                "margin": 0.1 * i,
            }
            for i, (p, w, r) in enumerate(pairs)
        ]
    if kind == GROUPS:
        return [
            {
                "prompt_ids": p,
                "completions_ids": list(ANSWERS[i : i + 3]),
                "scores": [1.0, 0.0, 0.5 * i],
            }
            for i, p in enumerate(PROMPTS)
        ]
    labels = ("label",) if kind == COMPLETIONS else ()
    return [
        {"prompt_ids": p, "completion_ids": ANSWERS[i]} | dict.fromkeys(labels, i % 2 == 0)
        for i, p in enumerate(PROMPTS)
    ]


def stored(examples: list[dict], kind, device) -> CachedReference:
    """A reference with sums and tokens, as they are read from files."""
    lengths = [[len(ids) for ids in kind.answer_ids(each)] for each in examples]
    counts = torch.tensor([len(each) for each in lengths])
    draw = torch.Generator().manual_seed(0)
    tokens = [[(-torch.rand(n, generator=draw)).tolist() for n in each] for each in lengths]
    sums = torch.tensor([sum(values) for each in tokens for values in each])
    columns = [tokens] if kind.many else list(zip(*tokens))
    arrow = tuple(
        pyarrow.chunked_array([pyarrow.array(list(column), type=pyarrow.list_(
            pyarrow.list_(pyarrow.float32()) if kind.many else pyarrow.float32()
        ))])
        for column in columns
    )  # fmt: skip
    return CachedReference(sums.to(device), counts.to(device), arrow, range(len(examples)))


def whole_step(objective: Objective, kind, gpu: PretendedGpu | None, columns=(), name="llama"):
    """Numbers of a step of two micro-batches and of an evaluation; gradients."""
    device = torch.device("cpu") if gpu is None else GPU
    experts = "moe" in name or "mixtral" in name
    module = of_architecture(name, NAMES["sdpa"])()
    if gpu is not None:
        gpu.send(module)
    engine, examples = Engine(module, device), examples_of(kind)
    reference = stored(examples, kind, device)
    loss_pass = LossPass(
        objective,
        extras=("entropy", "is_top1"),
        implementation="torch",
        old=reference if objective.needs_old_tokens else None,
        routing=Routing(0.01) if experts else None,
    )
    batches = [
        collate(
            examples[i : i + 2],
            "shared_prefix",
            indices=range(i, i + 2),
            columns=columns,
            kind=kind,
        )
        for i in (0, 2)
    ]
    lengths = torch.cat([batch.lengths_S for batch in batches])
    chosen = int(lengths[::2].sum()) if kind != GROUPS else 0
    totals = Totals(len(examples), chosen, len(lengths), int(lengths.sum()))
    sums, statistics = MetricSums(device), Statistics(objective.statistics, device)
    if gpu is not None:
        gpu.waits.clear()
    statistics.begin_step(engine, batches[:1], loss_pass, reference)
    arguments = (engine, batches, loss_pass, reference, totals, sums, statistics)
    step = coupled_step if objective.coupled else train_step
    share = step(*arguments, *([[0, 1, 2, 3]] if objective.coupled else []))
    statistics.end_step()
    sums.note(statistics.values)
    skipped = share.isfinite().logical_not()
    sums.step(skipped)
    if gpu is not None:
        gpu.seen = waits(gpu)
    found = sums.read() | evaluate(engine, batches, loss_pass, reference, totals, statistics.values)
    numbers = {n: x for n, x in found.items() if not n.startswith("perf/") and "_ms" not in n}
    return share.cpu(), numbers, [p.grad.cpu() for p in module.parameters()]


@pytest.mark.parametrize(
    "names, kind, options",
    [
        (("sigmoid", "sft"), PAIRS, {}),
        (("ipo",), PAIRS, {"use_weighting": True}),
        (("sigmoid",), PAIRS, {"ld_alpha": 0.3}),
        (("sigmoid",), PAIRS, {"token_clamp": 0.5}),
        (("aot",), PAIRS, {}),
        (("kto",), COMPLETIONS, {}),
        (("bco",), COMPLETIONS, {}),
        (("sft",), DEMONSTRATIONS, {}),
        (("plackett_luce",), GROUPS, {}),
        (("grpo",), GROUPS, {"grpo_beta": 0.1}),
    ],
)
def test_a_step_with_every_kind_of_example_waits_for_nothing(names, kind, options):
    objective = Objective(names, (1.0,) * len(names), LossOptions(**options))
    assert_same_step(objective, kind)


def test_a_step_with_columns_and_one_with_a_balancing_loss():
    weighted = Objective(("sigmoid",), options=LossOptions())
    assert_same_step(weighted, PAIRS, columns=("weight", "margin"))
    assert_same_step(weighted, PAIRS, name="mixtral, experts")


def assert_same_step(objective: Objective, kind, **options) -> None:
    share, numbers, gradients = whole_step(objective, kind, None, **options)
    with PretendedGpu() as gpu:
        there = whole_step(objective, kind, gpu, **options)
    torch.testing.assert_close(there[0], share, rtol=1e-5, atol=1e-6)
    assert there[1] == pytest.approx(numbers, rel=1e-4, abs=1e-5, nan_ok=True)
    for a, b in zip(gradients, there[2], strict=True):
        torch.testing.assert_close(
            b, a, rtol=1e-3, atol=1e-4 * max(x.abs().max().item() for x in gradients)
        )
    assert not gpu.seen


@pytest.mark.parametrize("family", ["qwen2.5-vl", "gemma3"])
def test_images(family):
    known = image_models.FAMILIES[family]

    def build() -> ScoringModel:
        model = known.make()
        model.set_attn_implementation(attention_of_parts(model.config, NAMES["sdpa"]))
        return ScoringModel(model, implementation="torch")

    # Places of images are found on the host, as those of the towers are in transformers.
    looking = ("dpo_fast/models/image_places.py", "dpo_fast/models/vision.py")
    assert_same_there(build, image_models.batch_of(known, "shared_prefix"), looking)
