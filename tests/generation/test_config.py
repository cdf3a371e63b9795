"""The section `sample`: what does not go together is refused with the option, its value and the remedy."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from dpo_fast.generation.config import OPTIONS, EngineSection, SampleSection

SERVER = {"type": "openai", "url": "http://localhost:8000/v1"}


def test_null_takes_an_option_of_the_file_away():
    """`sample.engine.type=transformers sample.engine.url=null` of a file with a server."""
    assert EngineSection(type="transformers", url=None).url is None


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"temperature": 0},
            "sample.temperature=0 .* sample.num_generations=4 times; set num_generat",
        ),
        (
            {"temperature": 0, "num_generations": 1, "top_p": 0.9},
            "sample.top_p=0.9 is not used with",
        ),
        ({"temperature": 0, "num_generations": 1, "top_k": 9}, "sample.top_k=9 is not used with"),
        ({"temperature": 1e-5}, "sample.temperature=1e-05 is below 0.01"),
        (
            {"engine": SERVER | {"api": "chat", "send": "text"}},
            "send=text is not used by .*api=chat",
        ),
        ({"stop": ["a", ""]}, "sample.stop has an empty text"),
        ({"prompts": []}, r"sample.prompts=\[\] names no data"),
        ({"prompts": "  "}, "sample.prompts='  ' names no data"),
        ({"system_prompt": " "}, "sample.system_prompt=' ' is blank"),
        (
            {"engine": {"url": "http://a"}},
            "sample.engine.url is not used by .*type=transformers.*openai",
        ),
        (
            {"engine": SERVER | {"batch_size": 4}},
            "batch_size is not used by sample.engine.type=openai",
        ),
        (
            {"engine": {"type": "openai"}},
            "sample.engine.url=None: .* needs the address of a server",
        ),
        ({"engine": SERVER | {"url": "localhost:8000"}}, "sample.engine.url=localhost:8000: "),
    ],
)
def test_what_does_not_go_together(options, words):
    with pytest.raises(ValidationError, match=words):
        SampleSection(**{"prompts": "rows", **options})


def test_every_option_of_an_engine_knows_its_engines():
    assert OPTIONS.keys() | {"type"} == EngineSection.model_fields.keys()


def test_defaults_follow_the_engine():
    assert SampleSection(prompts="rows").scores
    assert SampleSection(prompts="rows", engine={"type": "vllm"}).scores
    assert not SampleSection(prompts="rows", engine=SERVER).scores
    assert SampleSection(prompts="rows", engine=SERVER, logps=True).scores
    assert not SampleSection(prompts="rows", logps=False).scores
