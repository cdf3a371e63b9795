"""Jobs of two ranks: what FSDP2 and DTensors give against the same on whole weights.

Every rank has both ranks' batches, so it can compute by itself what all together must find: gradients are
means over the ranks' own.
"""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from dpo_fast import FusedHead, FusedLinearPreferenceLoss, VocabShard, linear_logp, logits_logp
from dpo_fast.data.batch import collate
from dpo_fast.errors import UserError
from dpo_fast.integrations import liger
from dpo_fast.integrations.forward import add_forward
from dpo_fast.integrations.transformers import _score
from dpo_fast.losses import Objective, Totals, preference
from dpo_fast.models import ScoringModel
from dpo_fast.models.layers import checkpoint_layers, decoder_layers
from dpo_fast.models.scoring import forward_arguments, fuse_head
from dpo_fast.ops.linear_logp.call import EXTRAS

CLOSE = {"rtol": 2e-6, "atol": 2e-7}  # fp32: sums in another order, and no more
S, L, D, V = 4, 6, 16, 37  # V cannot be halved


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(rank: int, step: int = 0):
    """Pairs of unequal lengths; those of each rank and step differ."""
    g = torch.Generator().manual_seed(10 * step + rank)
    ids = lambda n: torch.randint(5, 250, (n,), generator=g).tolist()  # noqa: E731
    rows = [
        {"prompt_ids": ids(3), "chosen_ids": ids(4 + p), "rejected_ids": ids(7 - 2 * p)}
        for p in range(2)
    ]
    return collate(rows, "packed")


def loss_of(scorer, batch) -> torch.Tensor:
    logp_T = scorer(**forward_arguments(batch))["logp"]
    assert logp_T.dtype == torch.float32
    totals = Totals(2, batch.chosen_tokens, 4)
    objective = Objective(("cpo", "sft"), (1.0, 0.5))
    return preference(logp_T, batch.lengths_S, None, objective, totals).loss


def full(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def same_gradients(found: nn.Module, expected: nn.Module, **tolerance) -> None:
    wanted = dict(expected.named_parameters())
    names = {n.replace("_orig_mod.", ""): p for n, p in found.named_parameters()}
    assert names.keys() == wanted.keys()
    for name, parameter in names.items():
        if wanted[name].grad is None:
            assert parameter.grad is None, name
            continue
        assert parameter.grad.placements == parameter.placements, name
        mine, true = full(parameter.grad), wanted[name].grad
        difference = (mine - true).abs().max().item()
        assert torch.allclose(mine, true, **(tolerance or CLOSE)), (name, difference)


def mean_gradients(model: nn.Module, losses) -> None:
    """Gradients of the mean over ranks. losses: of each rank, functions of the model."""
    for loss in losses:
        (loss(model) / dist.get_world_size()).backward()


# A model whose head is fused


def fully_sharded(folder: str) -> None:
    """Every way of cutting a model into units, tied or not, against whole weights."""
    ways = itertools.product((False, True), (True, False), ("root", "head", "norm and head"))
    for tied, reshard, unit in ways:
        if not (tied and unit != "root"):
            _sharded_step(folder, tied, reshard, unit)
    _sharded_step(folder, True, True, "root", steps=2)
    _sharded_step(folder, False, True, "head", steps=2, checkpointing=True)
    _sharded_step(folder, False, True, "root", frozen_head=True)


def scoring_model(folder: str, tied: bool) -> ScoringModel:
    name = "tied" if tied else "untied"
    return ScoringModel(AutoModelForCausalLM.from_pretrained(f"{folder}/{name}"))


def shard(model: nn.Module, reshard: bool = True, unit: str = "root", **options) -> nn.Module:
    """Cut a ScoringModel, or a model of transformers, into units."""
    options = {"reshard_after_forward": reshard} | options
    causal_lm = getattr(model, "causal_lm", model)
    for layer in decoder_layers(causal_lm):
        fully_shard(layer, **options)
    head = causal_lm.get_output_embeddings()
    if unit == "head":
        fully_shard(head, **options)
    elif unit == "norm and head":  # as accelerate and transformers group them
        fully_shard([causal_lm.model.norm, head], **options)
    return fully_shard(model, **options)


def _sharded_step(
    folder, tied, reshard, unit, steps=1, checkpointing=False, frozen_head=False
) -> None:
    model = scoring_model(folder, tied)
    if frozen_head:
        model.causal_lm.lm_head.requires_grad_(False)
    whole = copy.deepcopy(model)
    if checkpointing:
        checkpoint_layers(model.causal_lm)
    shard(model, reshard, unit)
    ranks = range(dist.get_world_size())
    for step in range(steps):
        model.set_requires_gradient_sync(step == steps - 1)
        loss = loss_of(model, batch_of(dist.get_rank(), step))
        loss.backward()
        of_ranks = [functools.partial(loss_of, batch=batch_of(r, step)) for r in ranks]
        torch.testing.assert_close(loss, of_ranks[dist.get_rank()](whole), **CLOSE)
        mean_gradients(whole, of_ranks)
    same_gradients(model, whole)
    logits = lambda m: m.causal_lm.get_output_embeddings()(drawn(1, 2, 32))  # noqa: E731
    torch.testing.assert_close(
        logits(model), logits(whole), **CLOSE
    )  # outside of the root's forward


def mixed_precision(folder: str) -> None:
    """Products in bf16, log-probs in fp32; the gradients of the bf16 model, summed in fp32."""
    model = scoring_model(folder, False)
    whole = copy.deepcopy(model)
    for parameter in whole.parameters():  # not buffers, which FSDP leaves as they are
        parameter.data = parameter.data.bfloat16()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, unit="head", mp_policy=policy)
    batches = [batch_of(rank) for rank in range(dist.get_world_size())]
    loss = loss_of(model, batches[dist.get_rank()])
    loss.backward()
    torch.testing.assert_close(loss, loss_of(whole, batches[dist.get_rank()]), **CLOSE)
    mean_gradients(whole, [functools.partial(loss_of, batch=batch) for batch in batches])
    whole.float()
    for parameter in whole.parameters():
        parameter.grad = parameter.grad.float()
    same_gradients(model, whole, rtol=0.02, atol=2e-3)


def rounded_outputs(folder: str) -> None:
    """A policy that would round log-probs is refused."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    model = shard(scoring_model(folder, False), mp_policy=policy)
    with pytest.raises(ValueError, match="output_dtype=torch.bfloat16 would round"):
        loss_of(model, batch_of(0))
    head = fully_shard(FusedHead(nn.Parameter(drawn(0, V, D))), mp_policy=policy)
    with pytest.raises(ValueError, match="output_dtype=torch.bfloat16 would round"):
        head(drawn(1, 2, D), torch.tensor([0, 1]))


def compiled_head(folder: str) -> None:
    """A compiled head is a custom op, whose weight is gathered and sharded as that of any module."""
    model = scoring_model(folder, False)
    whole = copy.deepcopy(model)
    model.causal_lm.get_output_embeddings().compile(backend="aot_eager", dynamic=True)
    shard(model, unit="head")
    batches = [batch_of(rank) for rank in range(dist.get_world_size())]
    loss_of(model, batches[dist.get_rank()]).backward()
    mean_gradients(whole, [functools.partial(loss_of, batch=batch) for batch in batches])
    same_gradients(model, whole)


def fused_afterwards(folder: str) -> None:
    """A model that is sharded already keeps its units: the head changes in place, or gathers by itself."""
    for tied, unit in ((False, "head"), (False, "norm and head"), (True, "root")):
        whole = scoring_model(folder, tied)
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/{'tied' if tied else 'untied'}")
        shard(model, reshard=False, unit=unit)
        with pytest.raises(UserError, match="make the ScoringModel first"):
            ScoringModel(model)
        head = model.get_output_embeddings()
        fuse_head(model)
        add_forward(model, "scored", _score)
        assert (model.get_output_embeddings() is head) == (not tied)
        assert isinstance(model.get_output_embeddings(), FusedHead)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        batches = [batch_of(rank) for rank in range(dist.get_world_size())]
        loss_of(functools.partial(model, scored=True), batches[dist.get_rank()]).backward()
        mean_gradients(whole, [functools.partial(loss_of, batch=batch) for batch in batches])
        same_gradients(model, whole.model)


# Weights that are passed as DTensors


class Head(nn.Module):
    """A body, and a head whose weight is passed to a loss outside of its forward.

    tied: the body uses it too.
    """

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tied = tied
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, V)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = drawn(seed, *parameter.shape)

    def forward(self, x):
        return self.body(x) + self.head.weight.mean(0) if self.tied else self.body(x)


def data_of(rank: int):
    """Inputs, labels and the reference's states of a rank."""
    target = torch.randint(V, (S, L), generator=torch.Generator().manual_seed(rank))
    target[1, 3:] = -100
    return drawn(50 + rank, S, L, D), target, drawn(60 + rank, S, L, D)


def plain(model: Head, rank: int, scorer=linear_logp) -> torch.Tensor:
    x, target, _ = data_of(rank)
    logp = scorer(model(x).flatten(0, 1)[:5], model.head.weight, target.flatten()[:5])
    return logp.logp.sum()


def fused(model: Head, rank: int) -> torch.Tensor:
    x, target, states = data_of(rank)
    weights = {"reference_weight": model.head.weight.detach(), "reference_hidden": states}
    weight, bias = model.head.weight, model.head.bias
    return FusedLinearPreferenceLoss("sigmoid")(model(x), weight, target, bias, **weights)[0]


def with_head(model: Head, rank: int) -> torch.Tensor:
    x, target, _ = data_of(rank)
    head = FusedHead(model.head.weight, model.head.bias)
    return head(model(x).flatten(0, 1)[:5], target.flatten()[:5])["logp"].sum()


def of_liger(name: str, model: Head, rank: int) -> torch.Tensor:
    x, target, states = data_of(rank)
    both = [model.head.weight, model(x)]
    more = {}
    if name == "KTO":
        both.reverse()
        more["preference_labels"] = torch.tensor([True, False, True, False])
    elif name == "DPO":
        more = {"ref_input": states, "ref_weight": model.head.weight, "ref_bias": model.head.bias}
    loss = getattr(liger, f"LigerFusedLinear{name}Loss")()
    return loss(*both, target, model.head.bias, **more)[0]


def of_liger_grpo(model: Head, rank: int, longer: int = 0, **counts) -> torch.Tensor:
    """longer: tokens that are scored beside those of the batch."""
    x, target, states = data_of(rank)
    target[1, 3 : 3 + longer] = 0
    weight, bias = model.head.weight, model.head.bias
    gains = torch.tensor([1.0, -0.5, 0.3, -0.8]) + rank
    return liger.LigerFusedLinearGRPOLoss()(
        model(x),
        weight,
        target.clamp(min=0),
        target != -100,
        gains,
        bias,
        ref_input=states,
        ref_weight=weight,
        ref_bias=bias,
        **counts,
    )[0]


def counts_of_ranks() -> None:
    """Ranks that score unequal numbers of tokens divide by their mean, however they get to know it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, scored = Head(), (data_of(rank)[1] != -100).sum().item()
    items = ranks * scored + sum(range(ranks))
    told = of_liger_grpo(model, rank, rank, num_items_in_batch=items)
    torch.testing.assert_close(of_liger_grpo(model, rank, rank), told)


def passed_weights() -> None:
    """Each loss takes the DTensors of FSDP2, over one dimension and over two, and gives them gradients."""
    names = ("DPO", "ORPO", "CPO", "SimPO", "KTO")
    losses = [plain, fused, with_head, *(functools.partial(of_liger, name) for name in names)]
    losses.append(of_liger_grpo)
    count = dist.get_world_size()
    meshes = [None, init_device_mesh("cpu", (count, 1), mesh_dim_names=("replicate", "shard"))]
    for loss, mesh in [*itertools.product(losses, meshes[:1]), (fused, meshes[1])]:
        _passed(loss, mesh)
    counts_of_ranks()
    _passed(fused, None, steps=2)
    _passed(fused, None, dtype=torch.bfloat16)
    for reshard in (True, False):
        _passed(fused, None, tied=True, reshard=reshard)
    _passed(functools.partial(plain, scorer=torch.compile(linear_logp, backend="eager")), None)


def _passed(
    loss, mesh, steps: int = 1, dtype=torch.float32, tied: bool = False, reshard: bool = True
) -> None:
    """Parameters and gradients are fp32; the model computes in `dtype`."""
    model, whole = Head(tied), Head(tied).to(dtype)
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype)
    # The loss reads the head's weights as DTensors, unless the unit that has used them keeps them.
    units = [model] if tied else [model.body, model.head]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    assert isinstance(model.head.weight, DTensor)
    rank, ranks = dist.get_rank(), range(dist.get_world_size())
    for _ in range(steps):
        value = loss(model, rank)
        value.backward()
        if dtype == torch.float32:
            torch.testing.assert_close(value, loss(whole, rank), **CLOSE)
            mean_gradients(whole, [functools.partial(loss, rank=each) for each in ranks])
    assert model.head.weight.grad.dtype == torch.float32
    if dtype == torch.float32:
        same_gradients(model, whole, rtol=1e-5, atol=2e-6)


def vocabulary_shards() -> None:
    """A weight that tensor parallelism has cut: each rank scores with its rows, and nothing is gathered."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    hidden, target = drawn(3, S * L, D), data_of(0)[1].flatten().clamp_min(0)
    weight, bias = drawn(4, V, D), drawn(5, V)
    cut = [distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, bias)]
    shard = VocabShard.of(cut[0])
    assert shard == VocabShard.of(cut[0].to_local(), mesh.get_group())
    results = []
    for operands, how in (((weight, bias), {}), (cut, {"shard": shard}), (cut, {})):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, *operands)]
        values = linear_logp(*leaves[:2], target, bias=leaves[2], extras=EXTRAS, **how)
        (values.logp * torch.linspace(-1, 2, len(target))).sum().backward()
        assert [x.grad.__class__ for x in leaves[1:]] == [x.__class__ for x in operands]
        results.append([*values, *(full(x.grad) for x in leaves)])
    for found in results[1:]:
        for mine, true in zip(found, results[0]):
            torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)
    replicated = distribute_tensor(hidden, mesh, [Replicate()])
    torch.testing.assert_close(
        linear_logp(replicated, cut[0], target, shard=shard).logp,
        linear_logp(hidden, weight, target).logp,
        rtol=1e-5,
        atol=1e-5,
    )
    copies = [distribute_tensor(x, mesh, [Replicate()]) for x in (replicated.to_local(), target)]
    plainly = linear_logp(hidden, weight, target).logp
    torch.testing.assert_close(linear_logp(copies[0], weight, copies[1]).logp, plainly)
    logits = distribute_tensor(hidden @ weight.T, mesh, [Replicate()])
    torch.testing.assert_close(logits_logp(logits, copies[1]), plainly, rtol=1e-5, atol=1e-5)
    _refused(mesh, hidden, weight, target, cut, shard)


def _refused(mesh, hidden, weight, target, cut, shard) -> None:
    columns = distribute_tensor(weight, mesh, [Shard(1)])
    whole = linear_logp(hidden, weight, target).logp
    torch.testing.assert_close(
        linear_logp(hidden, columns, target).logp, whole, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"needs Shard\(0\) over one dimension"):
        VocabShard.of(columns)
    row = distribute_tensor(weight[:1], mesh, [Shard(0)])  # too few for all ranks
    for each in (row, row.to_local()):
        with pytest.raises(ValueError, match="ranks have none of the 1 rows"):
            VocabShard.of(each)
    with pytest.raises(ValueError, match="logits is a DTensor with placements"):
        logits_logp(distribute_tensor(hidden @ weight.T, mesh, [Shard(1)]), target)
    with pytest.raises(ValueError, match="labels is a DTensor with placements"):
        labels = distribute_tensor(target.view(2, -1), mesh, [Shard(0)])
        FusedLinearPreferenceLoss("cpo")(hidden.view(2, -1, D), weight, labels)
    with pytest.raises(ValueError, match="leave group out"):
        VocabShard.of(cut[0], dist.new_group())
    with pytest.raises(ValueError, match="both lie alike"):
        whole_bias = distribute_tensor(drawn(5, V), mesh, [Replicate()])
        linear_logp(hidden, cut[0], target, bias=whole_bias, shard=shard)
    with pytest.raises(ValueError, match="terms of a sum"):
        linear_logp(hidden, DTensor.from_local(weight, mesh, [Partial()]), target)
    with pytest.raises(ValueError, match="the rows that this rank scores"):
        linear_logp(distribute_tensor(hidden, mesh, [Shard(0)]), weight, target)
    with pytest.raises(ValueError, match="the rows that this rank scores"):
        rows = distribute_tensor(hidden.view(S, L, D), mesh, [Shard(0)])
        FusedLinearPreferenceLoss("simpo", beta=2.0)(rows, weight, target.view(S, L))


def tensor_parallel_plans(folder: str) -> None:
    """transformers' own plan of a model, with our head in the place of its lm_head."""
    for name in ("untied", "tied"):
        whole = ScoringModel(AutoModelForCausalLM.from_pretrained(f"{folder}/{name}"))
        cut = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", tp_plan="auto")
        model = ScoringModel(cut)
        head = model.causal_lm.get_output_embeddings()
        assert head.tensor_parallel and head.weight.placements == (Shard(0),)
        losses = []
        for each in (model, whole):
            losses.append(loss_of(each, batch_of(0)))
            losses[-1].backward()
        torch.testing.assert_close(*losses, **CLOSE)
        wanted = dict(whole.named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                full(parameter.grad), wanted[name].grad, rtol=1e-5, atol=1e-6
            )


OF_MODELS = {
    "fully_sharded": fully_sharded,
    "mixed_precision": mixed_precision,
    "rounded_outputs": rounded_outputs,
    "compiled_head": compiled_head,
    "fused_afterwards": fused_afterwards,
    "tensor_parallel_plans": tensor_parallel_plans,
}
JOBS = OF_MODELS | {"passed_weights": passed_weights, "vocabulary_shards": vocabulary_shards}
