"""Whether a model's attention can keep sequences of one row apart: a trial without numbers.

The decoder runs over two tokens, on the meta device or another one. A first run hears what attention is
called with; a second one, which masks the layers get whose call does not tell of a window. A run ends
where a model needs numbers, as some experts do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from dpo_fast.models.attention import obstacles
from dpo_fast.models.attention_untold import Local, local_of
from dpo_fast.models.decoder import kept_attention

CALLS = "dpo_fast_trial"
MASKS = "dpo_fast_trial_of_masks"
TOLD = ("scaling", "dropout", "sliding_window", "softcap", "s_aux")


class Heard:
    """What a trial has heard of attention. It stands in the place of the plan of a row.

    apart: modules whose attention needs no plan.
    reasons: why sequences cannot share a row.
    found: attention has been called. untold: it has been called without a window.
    """

    def __init__(self, apart: Iterable[nn.Module] = ()) -> None:
        self.apart = {id(module) for module in apart}
        self.reasons: list[str] = []
        self.found = self.untold = False


def try_attention(
    model: PreTrainedModel,
    decoder: nn.Module,
    unseen: str | None = None,
    apart: Iterable[nn.Module] = (),
) -> str | None:
    """Why the attention of a decoder cannot serve sequences that share a row; None if it can.

    A model on the meta device will do.

    unseen: what to say of a model whose attention is not found by its forward.
    apart: layers that keep sequences apart whatever their attention is called with.
    """
    heard = Heard(apart)
    tokens = torch.ones(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    with kept_attention(model), _attention(model, CALLS):
        _run(decoder, heard, tokens, attention_mask=None)
    if heard.untold and not heard.reasons:
        with kept_attention(model), _attention(model, MASKS):
            _run(decoder, heard, tokens, attention_mask=tokens)
    if heard.reasons:
        return heard.reasons[0]
    return None if heard.found else unseen


def _run(decoder: nn.Module, heard: Heard, ids: Tensor, attention_mask: Tensor | None) -> None:
    places = {"position_ids": torch.arange(2, device=ids.device)[None], "plan": heard}
    try:
        with torch.no_grad():
            decoder(input_ids=ids, attention_mask=attention_mask, use_cache=False, **places)
    except _Lost as lost:
        heard.reasons.append(f"{lost} does not get the keywords of the model's forward")
    except Exception:  # code of any model, and meta tensors
        return


class _Lost(Exception):
    """Attention got no keywords of the model's forward. Its text is the type of the layer."""


@contextlib.contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within `kept_attention`: another attention, and experts that need no numbers, if there can be."""
    experts = getattr(model.config, "_experts_implementation", None)
    with contextlib.suppress(Exception):
        model.set_attn_implementation(name)
        if experts is not None:
            model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        if experts is not None:
            with contextlib.suppress(ValueError):
                model.set_experts_implementation(experts)


def _hear_call(module, query, key, value, attention_mask=None, *, plan=None, **others):
    if plan is None:
        raise _Lost(type(module).__name__)
    if id(module) in plan.apart:
        plan.found = True
        return _nothing(query, value), None
    rest = {name: each for name, each in others.items() if name not in TOLD}
    if reasons := obstacles(module, attention_mask, rest):
        plan.reasons.append(f"{type(module).__name__} has {' and '.join(reasons)}")
    plan.found = True
    plan.untold |= "sliding_window" not in others
    return _nothing(query, value), None


def _hear_mask(module, query, key, value, attention_mask=None, *, plan=None, **others):
    made, ruled = getattr(attention_mask, "dpo_fast_local", None), local_of(module)
    told = "sliding_window" in others or id(module) in plan.apart
    if not told and made is not None and made != ruled:
        plan.reasons.append(
            f"the mask of {type(module).__name__} has {made}, and neither its call nor the "
            f"configuration tells of it ({ruled})"
        )
    return _nothing(query, value), None


def _nothing(query: Tensor, value: Tensor) -> Tensor:
    """What attention gives, without its numbers."""
    batch, heads, tokens, _ = query.shape
    return value.new_zeros(batch, tokens, heads, value.shape[-1])


def _make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable,
    local_size: int | None = None,
    device: torch.device | str = "meta",
    **others,
) -> Tensor:
    """A mask for the trial alone, with a note of what it would have had."""
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
    chunked = "chunked_overlay" in _parts_of(mask_function)
    mask.dpo_fast_local = Local(chunk=local_size) if chunked else Local(window=local_size)
    return mask


def _parts_of(function: Callable) -> set[str]:
    """Names of the functions that a mask function is made of: transformers joins them in closures."""
    found, waiting = set(), [function]
    while waiting:
        each = waiting.pop()
        if isinstance(each, tuple | list):
            waiting += each
        elif callable(each):
            found.add(getattr(each, "__qualname__", "").split(".")[0])
            waiting += [cell.cell_contents for cell in getattr(each, "__closure__", None) or ()]
    return found


AttentionInterface.register(CALLS, _hear_call)
AttentionInterface.register(MASKS, _hear_mask)
AttentionMaskInterface.register(MASKS, _make_mask)
