"""Every tensor of a checkpoint comes out again, of every architecture that transformers makes tiny."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dpo_fast.errors import UserError
from dpo_fast.models import load_model
from dpo_fast.models.config import ModelSection
from dpo_fast.models.save import write_model
from dpo_fast.training.export import gather_trained
from tests.support import tiny
from tests.support.checkpoints import tensors_of
from tests.support.faults import SLOW

# What no model loads: heads that predict further tokens, in the names that families give them, and buffers
# of older versions.
UNUSED = {
    "mtp.layers.0.weight": torch.ones(3),
    "model.layers.99.eh_proj.weight": torch.ones(2),
    "model.layers.99.mlp.experts.0.gate_proj.weight": torch.ones(2, 2),
    "model.layers.99.mlp.experts.0.up_proj.weight": torch.ones(2, 2, dtype=torch.bfloat16),
    "lm_head.rotary_emb.inv_freq": torch.ones(2),
}
# Text classes that drop the first part of a name, experts that are stored apart, towers, tied heads.
SAMPLE = (
    *("llama4", "mllama", "qwen3_5_moe", "deepseek_v3", "gemma4", "qwen2_5_vl"),
    *("nemotron_h", "internvl"),
)
# The whole class wants pixels as well, or the small numbers do not fit each other.
WITHOUT_FORWARD = (
    *("blip-2", "blt", "dbrx", "deepseek_v2", "idefics", "instructblip", "instructblipvideo"),
    *(
        "kosmos-2",
        "mistral4",
        "pix2struct",
        "step3p7",
        "t5gemma2",
        "udop",
        "vision-encoder-decoder",
    ),
)
IDS = torch.arange(5, 25)[None]


def whole(model: torch.nn.Module, folder: Path, **options):
    """Load a folder with the class that wrote it."""
    options |= {"dtype": torch.float32, "attn_implementation": "eager"}
    return type(model).from_pretrained(folder, **options)


@torch.no_grad()
def come_back(name: str, folder: Path) -> None:
    """Train all that is trained of an architecture, write it, and compare with what came in."""
    before = tiny.write_tiny(folder / "in", name, UNUSED)
    scoring = load_model(
        ModelSection(path=str(folder / "in"), dtype="fp32"), attention="eager"
    ).eval()
    trained = [each for each in scoring.causal_lm.parameters() if each.requires_grad]
    for parameter in trained:
        parameter.mul_(1.1).add_(0.01)
    write_model(scoring.causal_lm, gather_trained(scoring.model), folder / "in", folder / "out")
    old, new = tensors_of(folder / "in"), tensors_of(folder / "out")
    assert new.keys() == old.keys()
    assert all((new[key].dtype, new[key].shape) == (old[key].dtype, old[key].shape) for key in old)
    assert all(torch.equal(new[key], tensor) for key, tensor in UNUSED.items())
    configs = [json.loads((folder / each / "config.json").read_text()) for each in ("in", "out")]
    assert configs[0] == configs[1]
    after, found = whole(before, folder / "out", output_loading_info=True)
    assert not found["missing_keys"]
    kept = dict(before.named_parameters())
    changed = [key for key, value in after.named_parameters() if not torch.equal(value, kept[key])]
    assert len(changed) == len(trained)
    if name not in WITHOUT_FORWARD:
        expected = scoring.model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(
            after.eval()(input_ids=IDS, use_cache=False).logits, expected, rtol=0, atol=0
        )


@pytest.mark.parametrize("name", SAMPLE)
def test_every_tensor_comes_out_again(name, tmp_path):
    come_back(name, tmp_path)


@SLOW
def test_every_tensor_of_every_architecture_comes_out_again(tmp_path):
    wrong, counts = {}, Counter()
    for name in tiny.ARCHITECTURES:
        try:
            come_back(name, tmp_path / name)
            counts["come back"] += 1
        except tiny.NotTiny:
            counts["not made tiny"] += 1
        except UserError:
            counts["not trained"] += 1
        except Exception as error:
            wrong[name] = error
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    print(dict(counts))
    assert not wrong and counts["come back"] > 200


@torch.no_grad()
def test_tied_names_that_are_stored_twice_are_both_trained(tmp_path):
    tiny.write_tiny(tmp_path / "in", "gemma3", {})
    tensors = tensors_of(tmp_path / "in")
    head = tensors["language_model.model.embed_tokens.weight"]
    assert "language_model.lm_head.weight" not in tensors
    save_file(
        tensors | {"language_model.lm_head.weight": head.clone()},
        tmp_path / "in" / "model.safetensors",
        {"format": "pt"},
    )
    scoring = load_model(ModelSection(path=str(tmp_path / "in"), dtype="fp32"), attention="eager")
    for parameter in scoring.causal_lm.parameters():
        parameter.add_(0.01)
    write_model(scoring.causal_lm, gather_trained(scoring.model), tmp_path / "in", tmp_path / "out")
    out = tensors_of(tmp_path / "out")
    assert torch.equal(out["language_model.lm_head.weight"], head + 0.01)
    assert torch.equal(out["language_model.model.embed_tokens.weight"], head + 0.01)
