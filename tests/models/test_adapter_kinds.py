"""Trained adapters of every kind that peft has: trained as by peft itself, or refused by name."""

import json

import pytest
import torch

peft = pytest.importorskip("peft")

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from dpo_fast.data.batch import collate_trees
from dpo_fast.errors import UserError
from dpo_fast.models import load_model
from dpo_fast.models.attention import NAMES
from dpo_fast.models.config import ModelSection
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.models.skeleton import scoring_skeleton
from tests.support.architectures import TREES, alone, slopes
from tests.support.faults import SLOW
from tests.support.models import write_model

SIZES = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4, "boft_dropout": 0.2},
    "C3A": {"block_size": 16},
    "LOHA": {"module_dropout": 0.5, "rank_dropout": 0.5},
    "LOKR": {"rank_dropout": 0.5},
    "LORA": {"lora_dropout": 0.2},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 4, "module_dropout": 0.5},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2},
    "VERA": {"vera_dropout": 0.2},
    "WAVEFT": {"n_frequency": 20},
}
REFUSED = {
    *("ADALORA", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING"),
    *("PROMPT_TUNING", "PVERA", "P_TUNING", "SHADOW"),
}
# peft cannot make these of a tiny Llama: scikit-learn is missing, or they want a cache or adapters.
NOT_MADE = {"ADAMSS", "ADAPTION_PROMPT", "XLORA"}
ALL = sorted(getattr(kind, "value", kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
SAMPLE = ["BOFT", "IA3", "LILY", "LOHA", "LORA", "OFT", "PREFIX_TUNING", "TRAINABLE_TOKENS", "VERA"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("kinds") / "model")


def plain(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def write(base, folder, kind: str, **options) -> None:
    known = {getattr(k, "value", k): cls for k, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}[kind]
    wanted = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    wanted |= {"num_virtual_tokens": 3, "token_indices": [7, 8]}
    fields = known.__dataclass_fields__
    options = {n: v for n, v in wanted.items() if n in fields} | SIZES.get(kind, {}) | options
    torch.manual_seed(0)
    model = peft.get_peft_model(plain(base), known(task_type="CAUSAL_LM", **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def logps(scoring, layout):
    return scoring(**forward_arguments(collate_trees(TREES, layout)))["logp"]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in SAMPLE else SLOW) for k in ALL])
def test_a_trained_adapter_goes_on_or_is_refused(base, tmp_path, kind):
    if kind in NOT_MADE:
        pytest.skip("peft does not make one of this model")
    write(base, tmp_path / "adapter", kind)
    section = ModelSection(path=str(tmp_path / "adapter"), dtype="fp32")
    if kind in REFUSED:
        with pytest.raises(UserError, match=f"cannot be used: peft_type={kind}"):
            load_model(section, attention=NAMES["sdpa"], keep_start=True)
        return
    alike(base, tmp_path / "adapter", load_model(section, attention="sdpa", keep_start=True))


def alike(base, adapter, scoring) -> None:
    """As peft has it: log-probs and gradients, and those of the start after some steps."""
    theirs = peft.PeftModel.from_pretrained(plain(base), adapter, is_trainable=True).eval()
    expected = alone(theirs)
    wanted = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    scoring.causal_lm.set_attn_implementation(NAMES["sdpa"])
    scoring.train()  # no dropout: a preference loss compares two passes
    own = {n: p for n, p in scoring.named_parameters() if p.requires_grad}
    assert {name.removeprefix("model.") for name in own} == wanted.keys()
    gradients = dict(zip(wanted, slopes(expected, wanted.values())))
    for layout in ("packed", "shared_prefix"):
        found = logps(scoring, layout)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        for name, gradient in zip(own, slopes(found, own.values())):
            other = gradients[name.removeprefix("model.")]
            torch.testing.assert_close(gradient, other, rtol=1e-3, atol=5e-5, msg=name)
    with torch.no_grad():
        for parameter in own.values():
            parameter.add_(0.03)
        assert (logps(scoring, "packed") - expected).abs().max() > 1e-3
        with scoring.as_started():
            torch.testing.assert_close(logps(scoring, "packed"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_peft_has_taken_from_its_base(base, tmp_path, start):
    """Its copy must not take from the base once more."""
    write(base, tmp_path / "adapter", "LORA", init_lora_weights=start)
    section = ModelSection(path=str(tmp_path / "adapter"), dtype="fp32")
    scoring_skeleton(section)  # nothing to take from, on the meta device
    alike(base, tmp_path / "adapter", load_model(section, attention="sdpa", keep_start=True))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication repeats layers"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens turn it on"),
    ],
)
def test_options_of_lora_that_act_outside_layers_are_refused(base, tmp_path, options, told):
    write(base, tmp_path / "adapter", "LORA", **options)
    section = ModelSection(path=str(tmp_path / "adapter"), dtype="fp32")
    with pytest.raises(UserError, match=told):
        load_model(section, attention="sdpa")


def test_an_adapter_on_another_copy_of_its_base(base, tmp_path, monkeypatch):
    """`adapter_path` on `path`; what they stand for is one folder, and a second start finds it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    write(base, tmp_path / "sft", "LORA")
    expected = alone(peft.PeftModel.from_pretrained(plain(base), tmp_path / "sft").eval())
    moved = tmp_path / "moved"
    moved.symlink_to(base)
    lost = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    lost["base_model_name_or_path"] = "/nowhere/at/all"
    (tmp_path / "sft" / "adapter_config.json").write_text(json.dumps(lost))
    section = ModelSection(path=str(moved), adapter_path=str(tmp_path / "sft"), dtype="fp32")
    assert section.has_adapters and section.adapter_path is None
    assert section == ModelSection.model_validate(section.model_dump())
    again = ModelSection(path=str(moved), adapter_path=str(tmp_path / "sft"), dtype="fp32")
    assert again.path == section.path
    scoring = load_model(section, attention="sdpa", keep_start=True)
    torch.testing.assert_close(logps(scoring, "padded"), expected, rtol=0, atol=1e-5)

    def told(**options) -> str:
        with pytest.raises(ValidationError) as error:
            ModelSection(**{"path": str(base), "adapter_path": str(tmp_path / "sft")} | options)
        return str(error.value)

    assert "holds no adapter_config.json" in told(adapter_path=str(base))
    assert "is an adapter itself" in told(path=section.path)
    assert "makes new ones" in told(lora={"r": 2})
    merged = ModelSection(
        path=str(base), adapter_path=str(tmp_path / "sft"), adapter="merge", lora={"r": 2}
    )
    assert merged.adapter == "merge"
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file" / "cache"))
    assert "set HF_HOME to a folder that can be written" in told()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{r: 2}")
    assert "adapter_config.json is no JSON" in told(adapter_path=str(tmp_path / "broken"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "model.adapter_path=org/sft: " in told(adapter_path="org/sft")
