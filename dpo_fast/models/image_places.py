"""Where images lie in the sequences of a batch: positions of several axes, and runs of image tokens.

All of it is worked out on the host, sequence by sequence, as transformers has it for each alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dpo_fast.data.image_batch import ImageBatch
from dpo_fast.data.tree import Spans
from dpo_fast.errors import UserError

# Inputs that are of each image, whatever the size of its pixels: positions go by them.
GRIDS = {"image_grid_thw", "grid_thw"}


class Path(NamedTuple):
    """A sequence of a row, or up to the end of a branch of a row of trees.

    places: of its tokens among all of the batch, int64.
    own: how many of them, the last ones, no earlier path has.
    parent: the number of the path that it continues; -1 for none.
    """

    places: Tensor
    own: int
    parent: int = -1


@dataclass(frozen=True)
class ImagePlaces:
    """The images of a batch, its tokens and its sequences, on the host.

    images: with the inputs of `GRIDS` alone. ids: int64 [B * L].
    """

    images: ImageBatch
    ids: Tensor
    paths: list[Path]

    @classmethod
    def of(
        cls,
        images: ImageBatch,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        spans: Spans | None,
    ) -> ImagePlaces:
        """The arguments are fields of a `ScoredBatch`, on any device."""
        if spans is None:
            paths = _paths_of_rows(input_ids, attention_mask)
        else:
            paths = _paths_of_branches(spans)
        few = {name: each for name, each in images.inputs.items() if name in GRIDS}
        # Pixels stay where they are.
        return cls(replace(images, inputs=few).to("cpu"), input_ids.flatten().cpu(), paths)

    @cached_property
    def first_N(self) -> Tensor:
        """For the first token of every occurrence of an image its number, -1 for other tokens, [B * L]."""
        images = self.images
        first_N = torch.full_like(self.ids, -1)
        lengths_I = images.tokens_D[images.order_I]
        places = images.image_tokens_N.nonzero().flatten()
        first_N[places[lengths_I.cumsum(0) - lengths_I]] = torch.arange(len(lengths_I))
        return first_N

    def positions(self, model: nn.Module, position_ids: Tensor) -> Tensor:
        """Positions on all axes of a model's rotary embedding, int64 [axes, B, L].

        Every branch goes on where the model's own `get_rope_index` has it in its sequence.

        model: has `get_rope_index`. position_ids: those of text alone, [B, L].
        """
        axes = _axes(model)
        rows = position_ids.flatten().cpu().expand(axes, -1).clone()
        for path, own, _ in self.paths:
            first = self.first_N[path]
            seen = first[first >= 0]
            if not len(seen):
                continue
            which = self.images.order_I[seen]
            grids = {
                name: value[which] for name, value in self.images.inputs.items() if name in GRIDS
            }
            found, _ = model.get_rope_index(
                self.ids[path][None],
                mm_token_type_ids=self.images.image_tokens_N[path][None].int(),
                **grids,
            )
            rows[:, path[-own:]] = found[:, 0, -own:]
        return rows.view(axes, *position_ids.shape).to(position_ids.device, non_blocking=True)

    def runs(self) -> tuple[tuple[int, int], ...]:
        """(first, end) places of neighbouring image tokens of one branch of a row, in order.

        Raises:
            UserError: a run goes on over a fork, so that its tokens would see those of two branches.
        """
        found: list[tuple[int, int]] = []
        for path, own, parent in self.paths:
            flags, start = self.images.image_tokens_N[path], len(path) - own
            if start:
                before = self.images.image_tokens_N[self.paths[parent].places]
                if flags[start - 1] and (flags[start] or before[start : start + 1].any()):
                    raise UserError(
                        "train.layout=shared_prefix cannot be honoured: two prompts go different ways "
                        "between two images with nothing between them, and this model's image tokens see "
                        "each other. Set train.layout=packed"
                    )
            found += _runs(flags[start:], int(path[start]))
        return tuple(found)


def _axes(model: nn.Module) -> int:
    """Axes of a model's positions: time, height and width, and in some models more."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return max(3, len(rope.get("mrope_section") or ()))


def _runs(flags: Tensor, offset: int) -> list[tuple[int, int]]:
    """First places and ends of what is true, counted from `offset`."""
    edges = pad(flags.int(), (1, 1)).diff()
    firsts, ends = ((edges == sign).nonzero()[:, 0] + offset for sign in (1, -1))
    return list(zip(firsts.tolist(), ends.tolist()))


def _paths_of_rows(input_ids: Tensor, attention_mask: Tensor | None) -> list[Path]:
    rows, width = input_ids.shape
    lengths = [width] * rows if attention_mask is None else attention_mask.sum(1).tolist()
    return [
        Path(torch.arange(row * width, row * width + length), length)
        for row, length in enumerate(lengths)
    ]


def _paths_of_branches(spans: Spans) -> list[Path]:
    starts = accumulate((own for own, _, _ in spans), initial=0)
    paths: list[Tensor] = []
    for (own, prefix, parent), start in zip(spans, starts):
        behind = torch.arange(start, start + own)
        paths.append(torch.cat([paths[parent][:prefix], behind]) if prefix else behind)
    return [Path(path, own, parent) for path, (own, _, parent) in zip(paths, spans)]
