"""A trial of the head: its scores must be those of the model's own logits.

A model may scale, cap or cut its logits, or scale the states before its head. `head_options_of` knows
the ways of transformers' models by their configuration; the trial finds those that it does not know, of
code that comes with a model above all. No layer runs: random states stand for the decoder's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from dpo_fast.errors import UserError
from dpo_fast.models.decoder import decoder_of
from dpo_fast.ops.linear_logp.call import HeadOptions
from dpo_fast.ops.linear_logp.dtensor import plain_weight

STATES = 4
SPREAD = 20.0  # of the logits before scale and cap, so that either shows
# Of the largest log-prob. bf16 keeps eight bits; a scale or cap that is left out moves far more.
TOLERANCE = 0.03
# Their logits are of states that the decoder gives beside those of `last_hidden_state`.
OTHER_STATES = frozenset(("ProphetNetForCausalLM",))


class _States(BaseModelOutputWithPast):
    """An output of a decoder that has states and nothing else."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return


@torch.no_grad()
def check_own_logits(model: PreTrainedModel, options: HeadOptions) -> None:
    """Compare log-probs of the model's own forward with those of its head and these options.

    It is collective where weights are sharded. A forward that wants more than ids, and a model without
    weights, are not tried.

    Raises:
        UserError: they differ, so that the model does something between its head and its logits.
    """
    if type(model).__name__ in OTHER_STATES:
        raise UserError(
            f"{type(model).__name__} cannot be scored: its logits are of other states than its decoder's "
            "last ones; name another model in model.path"
        )
    head = model.get_output_embeddings()
    if head.weight.is_meta:
        return
    with _gathered(head, model.get_input_embeddings()):
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(STATES, head.weight.shape[1], generator=generator)
        states_TD = drawn.to(head.weight.device, head.weight.dtype)
        weight, bias = (plain_weight(x, states_TD) for x in (head.weight, head.bias))
        spread = nn.functional.linear(states_TD, weight).float().std()
        states_TD = states_TD * (SPREAD / spread.clamp_min(1e-6)).to(weight.dtype)
        own = _own_logits(model, states_TD)
        logits = nn.functional.linear(states_TD, weight, bias).float() * options.logit_scale
    if own is None:
        return
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if own.shape == logits.shape:
        expected, scored = own.float().log_softmax(-1), logits.log_softmax(-1)
        largest = torch.maximum(expected.abs().max(), scored.abs().max())
        if not (expected - scored).abs().max() > TOLERANCE * largest:
            return
    raise UserError(
        f"{type(model).__name__} does something to its logits that is not known here (a scale, a soft "
        "cap, or a cut of the vocabulary), so that its log-probs would be scored wrongly. Known are "
        "logit_scale, lm_head_multiplier, output_multiplier, logits_mup_width_multiplier, logits_scaling, "
        "final_logit_softcapping, logits_soft_cap and output_logit_soft_cap of a configuration, where the "
        "model's own code names them; fold another scale into the weight of the head"
    )


def _own_logits(model: PreTrainedModel, states_TD: Tensor) -> Tensor | None:
    """The logits of the model's own forward where its decoder gives these states, [T, V].

    None if the forward cannot be tried like that.
    """
    decoder = decoder_of(model)
    ids = torch.zeros(1, len(states_TD), dtype=torch.long, device=states_TD.device)
    training, patched = model.training, "forward" in vars(decoder)
    before = decoder.forward
    decoder.forward = lambda *args, **kwargs: _States(last_hidden_state=states_TD[None])
    model.eval()
    try:
        return model(input_ids=ids, use_cache=False).logits[0]
    except Exception:  # code of any model, that may want anything
        return None
    finally:
        model.train(training)
        if patched:
            decoder.forward = before
        else:
            del decoder.forward
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # or an optimiser would be given weights that FSDP gathered for the trial


@contextlib.contextmanager
def _gathered(*modules: nn.Module) -> Iterator[None]:
    """Inside, the weights of these modules are whole where ZeRO-3 has sharded them."""
    found = {id(p): p for module in modules for p in module.parameters()}
    sharded = [parameter for parameter in found.values() if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield
