"""What images take: the count beside what the towers of families make in truth."""

import inspect

import pytest

pytest.importorskip("deepspeed")

from dpo_fast.cli.doctor_run import look
from dpo_fast.models import ScoringModel
from dpo_fast.models.config import ModelSection
from dpo_fast.models.parts import settle_parts
from dpo_fast.training.activations import _Watch
from dpo_fast.training.config import build_config
from dpo_fast.training.image_memory import image_lines, patches_of, tower_bytes
from dpo_fast.training.memory_plan import Machine
from tests.support.image_models import FAMILIES, joined
from tests.support.image_runs import write_image_model
from tests.support.models import run_tree


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["qwen3-vl", "gemma3", "llava", "smolvlm"])
def test_a_tower_takes_what_is_counted(name, frozen):
    """To a factor of two: tiny towers have little beside their ends."""
    family = FAMILIES[name]
    pictures = [family.picture(number) for number in (4, 10, 16, 22)]
    inputs, tokens = joined(pictures), sum(each.tokens for each in pictures)
    scoring = ScoringModel(family.make())
    options = {"freeze_vision_tower": frozen, "freeze_multi_modal_projector": frozen}
    settle_parts(scoring, ModelSection(path="model", images=True, **options))
    see = scoring.vision.model.get_image_features
    known = inspect.signature(see).parameters
    with _Watch(scoring) as watch:
        made = see(**{n: v for n, v in inputs.items() if n in known}, return_dict=True)
    patches = patches_of(scoring.vision, inputs)
    kept, layer = tower_bytes(scoring.vision, patches, tokens, 4, recomputed=False)
    assert (kept == 0) == frozen and made is not None
    assert watch.peaks["layer"] / 2 < max(kept, layer) < watch.peaks["layer"] * 2
    if not frozen:
        assert tower_bytes(scoring.vision, patches, tokens, 4, recomputed=True)[0] < kept


def test_the_doctor_counts_images_where_they_are_asked_for(tmp_path):
    write_image_model(tmp_path / "model", "qwen3-vl")
    tree = run_tree(tmp_path, micro_batch_size=2)
    config = build_config(tree, "case")
    assert image_lines(config, look(config).policy, False) == []
    tree["model"]["images"] = True
    found = {}
    for size in (512, 2048):
        kwargs = {"max_pixels": size, "min_pixels": 64}
        tree["data"]["images_kwargs"] = kwargs
        config = build_config(tree, "case")
        outlook = look(config)
        pixels, tower = image_lines(config, outlook.policy, False)
        found[size] = pixels.device
        assert pixels.how.startswith("2 of 1920x1080, one with each example")
        assert tower.device > 0 and "frozen, it keeps none" in tower.how
        memory = {line.what: line.device for line in outlook.memory(Machine.here(config))[0]}
        assert memory["pixel values"] == pixels.device and memory["vision tower"] == tower.device
    assert found[2048] > 3 * found[512]
