"""The part of an image-text model that sees images, and the forward of a batch with images.

The model's own multimodal forward runs: it puts features of images in the place of their tokens, and gives
the decoder what else goes with them. Only what it asks its `get_image_features` for is done once for every
distinct image, and repeated for each occurrence.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_fast.data.image_batch import ImageBatch
from dpo_fast.data.tree import Spans
from dpo_fast.errors import UserError
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.decoder import decoder_of
from dpo_fast.models.image_places import GRIDS, ImagePlaces

# Models whose image tokens see all of their image, whatever comes first: the argument that tells them which
# tokens those are, and whether it holds in every layer, or where there is a sliding window.
BOTH_WAYS = {
    "gemma3": ("token_type_ids", "everywhere"),
    "gemma4": ("mm_token_type_ids", "in windows"),
}
TYPES = ("token_type_ids", "mm_token_type_ids")  # arguments for which tokens are of images
# The same with the tokens before and behind an image, which experts of its own read, too (Ernie 4.5 VL).
FRAMED = "moe_mm_token_type_ids"
FRAMES = ("image_start_token_id", "image_end_token_id")
# Parts of a vision tower that lead to the text model, where others have a projector beside the tower.
MERGERS = ("merger", "patch_merger", "deepstack_merger_list")


class Vision:
    """What sees images in a model.

    model: transformers' model without head, with `get_image_features`.
    tower, projector: parameters of what looks at pixels, and of what leads from there to the decoder.
    blank: inputs of some image, in the place of those of a batch that has none. Ranks that share the
        weights of the tower, or its gradients, must all run it. None: it need not run.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        """Raises UserError: the model sees no images, or in a way that is not known here."""
        if (obstacle := why_no_images(causal_lm)) is not None:
            raise UserError(f"{type(causal_lm).__name__} cannot be trained on images: {obstacle}")
        self.model = multimodal_of(causal_lm)
        self.decoder = decoder_of(causal_lm)
        self.tower, self.projector = parameters_of(self.model, self.parts)
        self.blank: dict[str, Tensor] | None = None
        config = causal_lm.config
        self.argument, self.where = BOTH_WAYS.get(config.model_type, (None, ""))
        bidirectional = getattr(config.get_text_config(), "use_bidirectional_attention", None)
        if self.where == "in windows" and bidirectional != "vision":
            self.argument = None

    def hidden(
        self,
        images: ImageBatch,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        spans: Spans | None,
    ) -> Tensor:
        """The decoder's last hidden states, [B, L, D]. The arguments are fields of a `ScoredBatch`."""
        taken = inspect.signature(self.model.forward).parameters
        places = ImagePlaces.of(images, input_ids, attention_mask, spans)
        arguments = {
            name: each for name, each in self._cast(images.inputs).items() if name in taken
        }
        if spans is not None:
            runs = places.runs() if self.argument else ()
            narrow = self.where == "in windows"
            arguments["plan"] = AttentionPlan(
                spans, input_ids.device, runs=runs, runs_in_windows=narrow
            )
        elif self.argument:
            arguments[self.argument] = images.image_tokens_N.view(input_ids.shape).long()
        if FRAMED in taken:
            arguments[FRAMED] = self._framed(images.image_tokens_N.view(input_ids.shape), input_ids)
        if hasattr(self.model, "get_rope_index"):
            position_ids = places.positions(self.model, position_ids)
        with self._seeing(images):
            return self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
                **arguments,
            ).last_hidden_state

    def own(self, images: ImageBatch, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """As `hidden`, of rows of their own, with positions and masks as transformers itself has them."""
        taken = inspect.signature(self.model.forward).parameters
        arguments = {
            name: each for name, each in self._cast(images.inputs).items() if name in taken
        }
        for name in GRIDS & arguments.keys():
            arguments[name] = arguments[name][images.order_I]
        flags = images.image_tokens_N.view(input_ids.shape).long()
        arguments |= {name: flags for name in TYPES if name in taken}
        if FRAMED in taken:
            arguments[FRAMED] = self._framed(flags.bool(), input_ids)
        with self._seeing(images):
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **arguments
            ).last_hidden_state

    def of_generate(
        self,
        causal_lm: PreTrainedModel,
        inputs: dict[str, Tensor],
        image_tokens_BL: Tensor,
        input_ids: Tensor,
    ) -> dict[str, Tensor]:
        """The arguments of transformers' `generate` for prompts with images.

        inputs: of every image, as often as it is there. image_tokens_BL: bool, the tokens that they fill.
        """
        taken, device = inspect.signature(causal_lm.forward).parameters, input_ids.device
        found = {
            name: each.to(device) for name, each in self._cast(inputs).items() if name in taken
        }
        flags = image_tokens_BL.long().to(device)
        found |= {name: flags for name in TYPES if name in taken}
        return found | ({FRAMED: self._framed(flags.bool(), input_ids)} if FRAMED in taken else {})

    def no_images(self, input_ids: Tensor) -> ImageBatch | None:
        """For a batch without images: none of `blank`, where the tower must run all the same."""
        if self.blank is None:
            return None
        nothing = torch.zeros(0, dtype=torch.int64)
        flags = torch.zeros(input_ids.numel(), dtype=torch.bool)
        return ImageBatch(self.blank, nothing, nothing, flags, -1).to(input_ids.device)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules beside the decoder that images go through; peft may have replaced some."""
        return parts_of(self.model, self.decoder)

    def freeze(self, tower: bool, projector: bool) -> None:
        """Freeze parts or train them; what else there is stays as it is."""
        for parameters, frozen in ((self.tower, tower), (self.projector, projector)):
            for parameter in parameters.values():
                if parameter.is_floating_point():
                    parameter.requires_grad_(not frozen)

    @property
    def trained(self) -> bool:
        """Whether anything of the parts that see images is trained, adapters on them included."""
        own = self.model.named_parameters(recurse=False)
        inside = (p for part in self.parts.values() for p in part.parameters())
        return any(p.requires_grad for p in (*(p for _, p in own), *inside))

    def still(self) -> None:
        """Put what is frozen in evaluation: its norms keep no statistics, and it drops nothing."""
        for part in () if self.trained else self.parts.values():
            part.eval()

    def _framed(self, image_tokens_BL: Tensor, input_ids: Tensor) -> Tensor:
        """1 for tokens of images and those that begin and end them, int64 [B, L]."""
        ids = [getattr(self.model.config, name) for name in FRAMES]
        return (image_tokens_BL | torch.isin(input_ids, input_ids.new_tensor(ids))).long()

    def _cast(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        dtype = self.model.dtype
        return {
            name: each.to(dtype) if each.is_floating_point() else each
            for name, each in inputs.items()
        }

    @contextlib.contextmanager
    def _seeing(self, images: ImageBatch) -> Iterator[None]:
        """Features of distinct images, once for each occurrence, from the model's `get_image_features`.

        The model calls it inside its own forward, where ZeRO has gathered parameters of its own.
        """
        own = self.model.get_image_features
        known = inspect.signature(own).parameters
        inputs = {name: each for name, each in self._cast(images.inputs).items() if name in known}

        def get_image_features(*ignored: Any, **too: Any):
            return repeated(own(**inputs, return_dict=True), images)

        self.model.get_image_features = get_image_features
        try:
            yield
        finally:
            del self.model.get_image_features


def repeated(output: Any, images: ImageBatch) -> Any:
    """An output of `get_image_features` of distinct images with the rows of every occurrence.

    Its features are of all image tokens one after the other, [tokens, D], in one tensor or one by one in
    a list, as the model has them. So are those for several layers (`deepstack_features`).
    """
    lengths_I = images.tokens_D[images.order_I]
    total = int(lengths_I.sum())
    starts_I = (images.tokens_D.cumsum(0) - images.tokens_D)[images.order_I]
    shifts_I = starts_I - (lengths_I.cumsum(0) - lengths_I)
    rows = shifts_I.repeat_interleave(lengths_I, output_size=total)
    rows = rows + torch.arange(total, device=rows.device)

    def again(features: Any) -> Any:
        many = isinstance(features, (list, tuple))
        parts = features if many else [features]
        flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        expected = int(images.tokens_D.sum())
        if total and len(flat) != expected:
            raise UserError(
                f"the model makes {len(flat)} features of images that have {expected} tokens: its "
                "processor and its weights do not belong together"
            )
        flat = flat.index_select(0, rows)
        return type(features)([flat]) if many else flat

    output = copy.copy(output)
    output.pooler_output = again(output.pooler_output)
    if getattr(output, "deepstack_features", None) is not None:
        output.deepstack_features = [again(each) for each in output.deepstack_features]
    return output


def multimodal_of(causal_lm: PreTrainedModel) -> PreTrainedModel | None:
    """The model below the head that puts features of images among those of tokens."""
    inner = causal_lm.base_model
    own = inner is not causal_lm and hasattr(inner, "get_image_features")
    return inner if own and inner is not decoder_of(causal_lm) else None


def why_no_images(causal_lm: PreTrainedModel) -> str | None:
    """Why a model cannot be trained on images; None if it can."""
    model, kind = multimodal_of(causal_lm), causal_lm.config.model_type
    if model is None:
        return "it has no vision tower that gives its decoder features in the place of image tokens"
    if causal_lm.config.is_encoder_decoder:
        return "its images and prompts go to an encoder"
    taken = inspect.signature(model.forward).parameters
    if "pixel_values" not in taken or "input_ids" not in taken:
        return "its forward takes no pixel_values beside input_ids"
    types = [name for name in taken if name.endswith("token_type_ids")]
    if unknown := set(types) - {*TYPES, FRAMED}:
        return f"it tells tokens apart by {unknown.pop()}, in a way that is not known here"
    if kind in BOTH_WAYS:
        return None
    if "token_type_ids" in taken:
        return "its attention goes by token_type_ids, in a way that is not known here"
    rope = getattr(model, "get_rope_index", None)
    if rope is None and "mm_token_type_ids" in taken:
        return "its attention goes by mm_token_type_ids, in a way that is not known here"
    if rope is not None and "mm_token_type_ids" not in inspect.signature(rope).parameters:
        return "positions of its image tokens come in a way that is not known here"
    return None


def parts_of(model: PreTrainedModel, decoder: nn.Module) -> dict[str, nn.Module]:
    """The modules beside the decoder that images go through, by name."""
    return {
        name: child
        for name, child in model.named_children()
        if "audio" not in name and not any(module is decoder for module in child.modules())
    }


def parameters_of(
    model: PreTrainedModel, parts: dict[str, nn.Module]
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Parameters, by name, of the vision tower, and of what leads from it to the decoder."""
    tower: dict[str, nn.Parameter] = {}
    projector: dict[str, nn.Parameter] = dict(model.named_parameters(recurse=False))
    for name, part in parts.items():
        for inner, parameter in part.named_parameters(prefix=name):
            leads = not isinstance(part, PreTrainedModel) or set(MERGERS) & set(inner.split("."))
            (projector if leads else tower)[inner] = parameter
    return tower, projector
