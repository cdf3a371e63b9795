"""vLLM in this process: what it is asked. The package is not here, and a stand-in has its interface."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dpo_fast.data.config import DataConfig
from dpo_fast.errors import UserError
from dpo_fast.generation.batches import batches_of
from dpo_fast.generation.config import SampleSection
from dpo_fast.generation.encode import PromptCodec
from dpo_fast.generation.engine import Request
from dpo_fast.generation.prompts import Prompt
from dpo_fast.generation.with_vllm import VllmEngine
from dpo_fast.models.config import ModelSection
from dpo_fast.models.load import load_model
from tests.support.models import write_model
from tests.support.tokenizers import byte_tokenizer, ids_of


@dataclass(kw_only=True)
class SamplingParams:
    """The fields of vLLM 0.15's that are used."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_tokens: int
    stop: list[str]
    stop_token_ids: list[int]
    seed: int


@dataclass
class LLM:
    options: dict[str, Any]
    asked: list = field(default_factory=list)

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request=None):
        self.asked.append((prompts, sampling_params, lora_request))
        ids = [*ids_of(byte_tokenizer(), "yes. no"), 2]
        output = SimpleNamespace(token_ids=tuple(ids), finish_reason="stop", text="not used")
        return [SimpleNamespace(outputs=[output]) for _ in prompts]


@pytest.fixture
def vllm(monkeypatch):
    module, lora = ModuleType("vllm"), ModuleType("vllm.lora.request")
    module.SamplingParams, module.LLM = SamplingParams, lambda **options: LLM(options)
    lora.LoRARequest = lambda name, number, path: (name, number, path)
    names = {"vllm": module, "vllm.lora": ModuleType("vllm.lora"), "vllm.lora.request": lora}
    for name, each in names.items():
        monkeypatch.setitem(sys.modules, name, each)
    return module


def engine(model: ModelSection, **options) -> VllmEngine:
    codec = PromptCodec(byte_tokenizer(), DataConfig(train="rows"))
    section = {"prompts": "rows", "max_new_tokens": 6, "engine": {"type": "vllm"}} | options
    return VllmEngine(model, codec, SampleSection(**section))


def complete(made: VllmEngine):
    prompts = [Prompt("row:0", "one"), Prompt("row:1", "three")]
    asked = [Request(each, made.codec.encode(each), made.codec.stop_ids(each)) for each in prompts]
    return list(made.complete(batches_of([3, 5], 2, 3, 0), asked))


def test_it_is_asked_with_ids_and_a_seed_for_each_completion(vllm):
    model = ModelSection(path="org/name@v1", dtype="bf16")
    made = engine(
        model, engine={"type": "vllm", "options": {"gpu_memory_utilization": 0.5}}, stop=["."]
    )
    found = complete(made)
    assert [each.text for _, all_ in found for each in all_] == ["yes"] * 4
    wanted = {
        "model": "org/name",
        "revision": "v1",
        "dtype": "bfloat16",
        "gpu_memory_utilization": 0.5,
    }
    assert wanted.items() <= made.llm.options.items() and "enable_lora" not in made.llm.options
    (prompts, parameters, lora), _ = made.llm.asked
    assert prompts[0] == {"prompt_token_ids": ids_of(byte_tokenizer(), "three")} and lora is None
    assert len({each.seed for each in parameters}) == 3
    assert parameters[0].stop_token_ids == [2] and parameters[0].top_k == -1


def test_an_adapter_is_added_to_its_base(vllm, tmp_path):
    write_model(tmp_path / "model")
    section = ModelSection(path=str(tmp_path / "model"), dtype="fp32", lora={"r": 12})
    load_model(section, attention="sdpa").model.save_pretrained(tmp_path / "adapter")
    made = engine(ModelSection(path=str(tmp_path / "adapter"), dtype="fp32"))
    complete(made)
    options = made.llm.options
    assert (options["model"], options["tokenizer"]) == (str(tmp_path / "model"),) * 2
    assert options["enable_lora"] and options["max_lora_rank"] == 16
    assert made.llm.asked[0][2][2] == str(tmp_path / "adapter")


def test_models_that_would_answer_as_others_are_refused(vllm, tmp_path):
    four = ModelSection(path="org/name", lora={}, quantization={"load_in_4bit": True}, dtype="fp32")
    with pytest.raises(UserError, match="does not read model.quantization.load_in_4bit=true"):
        engine(four)
    (tmp_path / "adapters.json").write_text('{"adapters": {"sft": "sft"}, "base": "org/name"}')
    with pytest.raises(UserError, match="has the adapters sft under another one"):
        engine(ModelSection(path=str(tmp_path), dtype="fp32"))


def test_what_vllm_says_is_told(vllm):
    def refuse(**_):
        raise RuntimeError("no GPU here\nat all")

    vllm.LLM = refuse
    with pytest.raises(
        UserError, match="vLLM cannot load model.path=org/name: no GPU here; look at"
    ):
        engine(ModelSection(path="org/name", dtype="fp32"))


def test_without_the_package_the_alternatives_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        UserError, match="vLLM is not installed here.*type=openai, or set type=transf"
    ):
        engine(ModelSection(path="org/name", dtype="fp32"))
