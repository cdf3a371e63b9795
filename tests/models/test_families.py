"""Every family of models that transformers has: its layouts are exact, or refused by name.

DPO_FAST_SLOW=1 tries all of them, which takes minutes; a few of many kinds are tried always.
"""

import pytest
import torch

pytest.importorskip("transformers")

from dpo_fast.data.batch import collate_trees
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel
from dpo_fast.models.architecture import architecture_of, choose_attention, choose_layout
from dpo_fast.models.scoring import forward_arguments
from tests.support.architectures import alone, errors, slopes
from tests.support.families import IMAGES, TEXT, family_on_meta, tiny
from tests.support.faults import SLOW

# Keys of other layers, compressed keys and values, chunks, indices, n-grams, three places for a token;
# attention that no keyword reaches, with places of its own and without.
SAMPLE = (
    *(
        "dots3_note_text",
        "gemma3n_text",
        "gemma4_text",
        "mimo_v2_flash",
        "longcat_flash",
        "llama4_text",
        "laguna",
    ),
    *(
        "kolibri1",
        "step3p7",
        "qwen2_5_vl",
        "deepseek_v4",
        "hy_v4",
        "minimax_m3_vl_text",
        "qwen4_exp_text",
    ),
    *("bloom", "falcon", "stablelm", "inkling2_text"),
)
# Not built here: they want a package that is not there, have no configuration that is whole by itself, or
# are no language models (DiffusionGemma, PP-FormulaNet).
UNBUILT = {
    *("dbrx", "dots3_note", "gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "musicgen"),
    *(
        "musicgen_melody",
        "reformer",
        "chameleon",
        "cosmos3_edge",
        "deepseek_ocr2",
        "ernie4_5_vl_moe",
    ),
    *("evolla", "fast_vlm", "florence2", "glm5_next", "granite4_vision", "inkling2"),
    *("inkling_mm_model", "molmo2", "nemotron_h_omni", "perception_lm", "t5gemma2"),
    *("diffusion_gemma", "pp_formulanet"),
}
# No causal language models by their own configuration: what comes later changes the scores before it, or
# places are counted from elsewhere, or states and the head differ in size.
OTHERWISE = {"cpmant", "kosmos-2.5", "prophetnet", "rembert", "xlm", "xlnet"}
SHARED_BEGINNING = [1, 5, 6, 7, 33, 21, 7, 30, 31, 32, 33, 34]
TREES = [
    (SHARED_BEGINNING, [[8, 9, 3, 11, 15, 16, 21], [8, 9, 10, 3], [3]]),
    ([1, 90], [[11, 3], [12, 13, 14, 15, 44, 3]]),
    ([4, 4, 3], [[3], [9, 9, 9, 9, 9, 3], [9, 9, 5], [50, 51, 3]]),
]
ALL = [pytest.param(name, marks=() if name in SAMPLE else SLOW) for name in (*TEXT, *IMAGES)]


@pytest.mark.parametrize("family", ALL)
def test_a_layout_that_is_allowed_scores_like_every_sequence_alone(family):
    if family in UNBUILT:
        pytest.skip("is not built here")
    architecture = architecture_of(family_on_meta(family))
    assert (choose_layout("auto", architecture).name == "padded") == bool(architecture.obstacle)
    if architecture.obstacle is not None:
        for layout in ("packed", "shared_prefix"):
            with pytest.raises(
                UserError, match=f"train.layout={layout} .* Set train.layout=padded"
            ):
                choose_layout(layout, architecture)
    model = tiny(family)
    if model is None:
        pytest.skip(f"is not small: {architecture.obstacle or 'may share rows'}")
    parameters = [each for each in model.parameters() if each.requires_grad]
    try:
        expected = alone(model, TREES)
    except Exception as error:  # a forward that wants images, or more
        pytest.skip(f"gives no logits for ids alone: {error}")
    try:
        scoring = ScoringModel(model)
    except UserError as error:
        pytest.skip(str(error))
    true, padded = slopes(expected, parameters), None
    for name, layout in LAYOUTS.items():
        if architecture.allows(layout) and family not in OTHERWISE:
            cpu = torch.device("cpu")
            chosen = choose_attention("auto", name, cpu, torch.float32, architecture).name
            model.set_attn_implementation(chosen if layout.shares_rows else "eager")
            scores = scoring(**forward_arguments(collate_trees(TREES, name)))["logp"]
            found = errors(scores, slopes(scores, parameters), expected, true)
            # Beside padded rows, which are transformers' own: deep sums of some families round a lot.
            padded = padded or found
            for error, as_padded in zip(found, padded):
                assert error <= max(3e-4, 3 * min(as_padded, 1e-3)), (name, error, as_padded)


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("idefics", "attend to images"),
        ("diffusion_gemma", "takes decoder_input_ids beside the tokens"),
    ],
)
def test_a_model_that_ids_do_not_run_is_refused_by_name(family, wanted):
    with pytest.raises(UserError, match=f"cannot be scored: .*{wanted}.*; name another model"):
        ScoringModel(family_on_meta(family))
