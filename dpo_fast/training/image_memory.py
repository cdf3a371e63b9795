"""What images take on a device: their pixel values, and activations of the vision tower.

A tower runs by sizes of images, which the meta device does not know, so its activations are counted from
its products. What goes into those of a layer of a vision transformer, and comes out, is 8 h + 2 i numbers
for each patch (h: its width, i: its inner width), and autograd keeps about as much.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable

from torch import Tensor, nn

from dpo_fast.data.images.model import images_of
from dpo_fast.data.verdicts import BadRow
from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel, load_tokenizer
from dpo_fast.models.config import ModelSection
from dpo_fast.models.vision import Vision
from dpo_fast.training.config import RunConfig
from dpo_fast.training.memory import Line, in_units

COUNTED = (1920, 1080)  # pixels of the image that is counted with every example


def image_lines(config: RunConfig, policy: ScoringModel, recomputed: bool) -> list[Line]:
    """Memory of the images of a micro-batch; nothing for a model that is loaded for texts alone.

    recomputed: the layers are.
    """
    if policy.vision is None:
        return []
    count = config.train.micro_batch_size or 1
    found = _processed(config.model.model_dump_json(), json.dumps(config.data.images_kwargs))
    if found is None:
        return []  # the doctor's line about images says why
    tokens, inputs = count * found[0], found[1]
    size = config.model.torch_dtype.itemsize
    pixels = count * sum(each.numel() * (each.itemsize + size) for each in inputs.values())
    patches = count * patches_of(policy.vision, inputs)
    kept, layer = tower_bytes(policy.vision, patches, tokens, size, recomputed)
    named = f"{count} of {COUNTED[0]}x{COUNTED[1]}, one with each example: {tokens:,} tokens"
    how = "kept" if kept else "frozen, it keeps none"
    how = f"{patches:,} patches: {how}; a layer takes {in_units(layer)}"
    return [
        Line("pixel values", pixels, 0.0, named),
        Line("vision tower", max(kept, layer), 0.0, how),
    ]


@functools.lru_cache(maxsize=8)
def _processed(section: str, kwargs: str) -> tuple[int, dict[str, Tensor]] | None:
    """Tokens and pixel values of the image that is counted; None where the processor makes none.

    section, kwargs: JSON of the model's section and of data.images_kwargs.
    """
    tokenizer = load_tokenizer(ModelSection.model_validate_json(section))
    images = images_of(tokenizer, json.loads(kwargs))
    try:
        return images.tokens_of(*COUNTED), images.inputs([_picture()])
    except (UserError, BadRow):
        return None


def patches_of(vision: Vision, inputs: dict[str, Tensor]) -> int:
    """Patches of some images, by the first product that the tower computes with their pixels."""
    first = next(each for each in _products(vision.parts.values()))
    return -(-inputs["pixel_values"].numel() // _width(first))


def tower_bytes(
    vision: Vision, patches: int, tokens: int, size: int, recomputed: bool
) -> tuple[int, int]:
    """What is kept from the forward to the backward pass, and what a layer takes while it is computed.

    What is no layer of the tower, as the projector, sees as many rows as images have tokens.

    size: bytes of a number.
    """
    lists = [each for part in vision.parts.values() for each in part.modules() if _is_list(each)]
    deepest = max(lists, key=len)
    inside = {id(each) for each in _products([deepest])}
    rows = {True: patches, False: tokens}

    def taken(products: Iterable[nn.Module]) -> int:
        return size * sum(rows[id(each) in inside] * _around(each) for each in products)

    products = _products(vision.parts.values())
    layer = taken(_products([deepest])) // len(deepest)
    trained = [each for each in products if each.weight.requires_grad]
    if recomputed and any(id(each) in inside for each in trained):
        widest = max(_width(each) for each in _products([deepest[0]])[:1])
        others = [each for each in trained if id(each) not in inside]
        return size * patches * widest * len(deepest) + taken(others), layer
    return taken(trained), layer


def _around(product: nn.Module) -> int:
    """Numbers that go into a product and come out of it, for a patch."""
    return _width(product) + product.weight.shape[0]


def _width(product: nn.Module) -> int:
    return product.weight[:1].numel()


def _products(modules: Iterable[nn.Module]) -> list[nn.Module]:
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return [each for part in modules for each in part.modules() if isinstance(each, kinds)]


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and bool(_products([module]))


def _picture():
    from PIL import Image

    return Image.new("RGB", COUNTED, (127, 127, 127))
