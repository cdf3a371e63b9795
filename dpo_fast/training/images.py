"""Runs on images: whether a run's models see them, and what their ranks do together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dpo_fast.data.config import IMAGES
from dpo_fast.data.images.model import images_of
from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel, load_tokenizer
from dpo_fast.models.architecture import architecture_of, choose_attention
from dpo_fast.models.attention import NAMES
from dpo_fast.models.config import ModelSection
from dpo_fast.models.decoder import attention_of_parts, kept_attention
from dpo_fast.models.load import load_skeleton
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.models.separation import TOLERANCE
from dpo_fast.models.vision import why_no_images
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.splits import Split, StreamSplit


def with_images(config: RunConfig, splits: Iterable[Split]) -> RunConfig:
    """The configuration with `model.images` as the data decide it, if nobody else has.

    Raises:
        UserError: data with images, and an option or a model that cannot have them.
    """
    seen = [split.name for split in splits if split.examples.images is not None]
    images = bool(seen) if config.model.images is None else config.model.images
    if seen:
        _check_options(config, seen)
    config = config.model_copy(update={"model": config.model.model_copy(update={"images": images})})
    if images:
        check_sees(config.model, "model.path", seen)
        for other in config.second_models:
            check_sees(other.section(config.model), other.named_by, seen)
    return config


def _check_options(config: RunConfig, seen: list[str]) -> None:
    """Raises UserError for an option that rows with images cannot go with."""
    where = f"data.{seen[0]} has rows with images"
    if config.model.images is False:
        raise UserError(
            f"model.images=false cannot be honoured: {where}; leave the option out, or the column of images"
        )
    if (size := config.parallel.sequence_parallel) > 1:
        raise UserError(
            f"parallel.sequence_parallel={size} cannot be honoured: {where}, and ranks that share a row "
            "cannot share what sees them. Set parallel.sequence_parallel=1"
        )


def check_sees(section: ModelSection, option: str, seen: list[str]) -> None:
    """Raises UserError for a model that sees no images, before its weights are read. option: names it."""
    obstacle = why_no_images(load_skeleton(section, option))
    if obstacle is not None:
        asked = f"data.{seen[0]} has rows with images" if seen else "model.images=true"
        raise UserError(
            f"{option}={section.path} cannot be honoured: {asked}, and this model cannot take them: "
            f"{obstacle}. Name a model that sees images, or leave the images out"
        )


@torch.no_grad()
def check_images(scorer, splits: Iterable[Split]) -> None:
    """Score the first example with images as the run does, and as transformers does by itself. Collective.

    What no configuration tells shows in it: positions, masks or features that go by other rules.

    scorer: a `ScoringModel`, or an engine round one.

    Raises:
        UserError: the two differ.
    """
    model = getattr(scorer, "module", scorer)
    seen = () if getattr(model, "vision", None) is None else map(_first_with_images, splits)
    found = next(filter(None, seen), None)
    if found is None:
        return
    split, index = found
    device, dtype = model.causal_lm.device, model.causal_lm.dtype
    ours = scorer(**forward_arguments(split.collate([split.examples[index]], [index]).to(device)))
    alone = replace(split, layout="padded").collate([split.examples[index]], [index]).to(device)
    with own_attention(model, device, dtype):
        theirs = scorer(**forward_arguments(alone), own=True)
    # A mean: where experts are chosen, rounding may choose another one for some token.
    moved = (ours["logp"] - theirs["logp"]).abs().mean().item()
    if not moved <= TOLERANCE[dtype]:
        raise UserError(
            f"{split.examples.where(index)}: the log-probs of its answers after its images differ by "
            f"{moved:.2g} a token from those that transformers gives for {type(model.causal_lm).__name__} "
            "alone: this model treats images by rules that are not known here, and cannot be trained on "
            "them. Name another model, or leave the images out"
        )


def _first_with_images(split: Split | StreamSplit) -> tuple[Split, int] | None:
    split = split.part if isinstance(split, StreamSplit) else split
    if split.examples.images is None:
        return None
    numbers = range(len(split.examples))
    return next(((split, n) for n in numbers if split.examples[n].get(IMAGES)), None)


@contextlib.contextmanager
def own_attention(model: ScoringModel, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """A context in which the text model has attention for rows of their own, as transformers has it."""
    causal_lm = model.causal_lm
    name = causal_lm.config.get_text_config()._attn_implementation
    if name in NAMES.values():
        architecture = architecture_of(causal_lm)
        name = choose_attention("auto", "padded", device, dtype, architecture).name
    with kept_attention(causal_lm):
        causal_lm.set_attn_implementation(attention_of_parts(causal_lm.config, name))
        yield


def share_tower(config: RunConfig, model: ScoringModel) -> None:
    """Have every rank run the vision tower in every forward, if one that did not would wait for ever.

    So it is at ZeRO-3, whose ranks gather weights together, and where they add up the tower's gradients.
    """
    vision = model.vision
    if vision is None or distributed.world_size() == 1:
        return
    if config.zero_stage == 3 or vision.trained:
        vision.blank = blank_inputs(config)


def blank_inputs(config: RunConfig) -> dict[str, Tensor]:
    """What the policy's processor makes of a grey image."""
    from PIL import Image

    images = images_of(load_tokenizer(config.model), config.data.images_kwargs)
    return images.inputs([Image.new("RGB", (64, 64), (128, 128, 128))])
