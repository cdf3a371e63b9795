"""Completions written by vLLM in this process."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dpo_fast.durable import first_line
from dpo_fast.errors import UserError
from dpo_fast.generation.batches import Batch, seed_of
from dpo_fast.generation.config import SampleSection
from dpo_fast.generation.encode import PromptCodec
from dpo_fast.generation.engine import LENGTH, Completion, Request, cut_at_stop
from dpo_fast.models.checkpoint import adapters_under, base_of, is_adapter, read_adapter_config
from dpo_fast.models.config import ModelSection
from dpo_fast.models.hub import split_revision
from dpo_fast.models.load import tokenizer_path

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
ADAPTER = "adapter"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VllmEngine:
    """`vllm.LLM`, asked with the token ids of prompts. Every completion has a seed of its own.

    An adapter is not merged: vLLM adds it to its base.

    Raises:
        UserError: vLLM is not installed, or cannot load the model.
    """

    def __init__(self, model: ModelSection, codec: PromptCodec, section: SampleSection) -> None:
        self.codec, self.section = codec, section
        _check(model)
        self.vllm = _import_vllm()
        name, revision = split_revision(base_of(model.path))
        self.lora = self._lora(model.path)
        options: dict[str, Any] = {
            "model": name,
            "tokenizer": tokenizer_path(model),
            "dtype": DTYPES[model.precision],
            "trust_remote_code": model.trust_remote_code,
            "seed": 0,
            **({"revision": revision} if revision else {}),
            **({"enable_lora": True, "max_lora_rank": _rank_of(model.path)} if self.lora else {}),
        }
        try:
            self.llm = self.vllm.LLM(**(options | section.engine.options))
        except Exception as error:  # an engine of its own, which may raise anything
            raise UserError(
                f"sample.engine.type=vllm: vLLM cannot load model.path={model.path}: "
                f"{first_line(error)}; look at sample.engine.options, or set type=transformers"
            ) from error

    def complete(
        self, batches: Iterable[Batch], requests: Sequence[Request]
    ) -> Iterator[tuple[Batch, list[Completion]]]:
        """As `Engine.complete`. Batches come in their order."""
        for batch in batches:
            asked = [requests[place] for place, _ in batch.members]
            prompts = [{"prompt_token_ids": list(each.ids)} for each in asked]
            parameters = [
                self._parameters(each, seed_of(batch.seed, number))
                for number, each in enumerate(asked)
            ]
            more = {"lora_request": self.lora} if self.lora else {}
            found = self.llm.generate(prompts, parameters, use_tqdm=False, **more)
            yield batch, [self._read(*each) for each in zip(asked, found)]

    def close(self) -> None:
        """vLLM gives its memory back when it is collected."""
        del self.llm

    def _parameters(self, request: Request, seed: int) -> Any:
        section = self.section
        return self.vllm.SamplingParams(
            n=1,
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k or -1,
            min_p=section.min_p,
            repetition_penalty=section.repetition_penalty,
            max_tokens=section.max_new_tokens,
            stop=list(section.stop),
            stop_token_ids=list(request.stop_ids),
            seed=seed % 2**31,
        )

    def _read(self, request: Request, found: Any) -> Completion:
        output = found.outputs[0]
        ids, ends = list(output.token_ids), set(request.stop_ids)
        size = next((place for place, index in enumerate(ids) if index in ends), len(ids))
        text = self.codec.decode(request.prompt, request.ids, ids[:size])
        text, _ = cut_at_stop(text, self.section.stop)
        reason = output.finish_reason or LENGTH
        if reason == LENGTH:
            text = self.codec.cut_off(request.prompt, request.ids, text)
        return Completion(text, reason, ids)

    def _lora(self, path: str) -> Any:
        if not is_adapter(path):
            return None
        request = importlib.import_module("vllm.lora.request").LoRARequest
        return request(ADAPTER, 1, path)


def _check(model: ModelSection) -> None:
    """Raises UserError for a model that would answer as another one here."""
    if model.quantization is not None:
        bits = model.quantization.bits
        raise UserError(
            f"sample.engine.type=vllm does not read model.quantization.load_in_{bits}bit=true: its answers "
            "would be those of the model as it is stored. Set type=transformers, remove "
            "model.quantization, or name a base that is stored quantised"
        )
    under = adapters_under(model.path)
    if under:
        raise UserError(
            f"sample.engine.type=vllm: model.path={model.path} has the adapters {', '.join(under)} under "
            "another one, and vLLM adds one alone to a base. Set type=transformers, or merge them: "
            "dpo-fast export --merge"
        )


def _rank_of(path: str) -> int:
    """The rank that vLLM must make room for: it knows only some."""
    config = read_adapter_config(path, "model.path")
    largest = max([int(config.get("r") or 0), *(config.get("rank_pattern") or {}).values()])
    return next((rank for rank in RANKS if rank >= largest), RANKS[-1])


def _import_vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise UserError(
            f"sample.engine.type=vllm: vLLM is not installed here, or cannot be imported "
            f"({first_line(error)}); install it in an environment of its own and name its server "
            "with type=openai, or set type=transformers"
        ) from None
