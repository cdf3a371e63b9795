"""Prompts to ids and back: what is sampled must be trained on as the same tokens, for every template."""

from __future__ import annotations

import pytest

from dpo_fast.data.config import DataConfig
from dpo_fast.data.rows import parse_row
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError
from dpo_fast.generation.channels import without_channels
from dpo_fast.generation.encode import PromptCodec, encode_all
from dpo_fast.generation.prompts import Prompt
from tests.support.templates import FORMS, SMALL, template_tokenizer, trl_templates, user
from tests.support.tokenizers import CHATML, byte_tokenizer, chat_tokenizer, ids_of, word_tokenizer

CONFIG = DataConfig(train="rows", max_length=20_000)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.rstrip() + ' </s>' }}{% endif %}{% endfor %}"
)
# The generation prompt opens thinking, so an answer without any is none that the model would write.
OPENS = ("deepseek_r1_distill", "deepseekv3", "opens, drops", "opens, copies")
# An answer goes on behind what calls and thinking leave open, in words of this template alone.
OF_THEIR_OWN = {("muse_glimmer", "thinking"), ("needs tools", "tools")}


def templates() -> dict[str, str]:
    pytest.importorskip("trl")
    return trl_templates() | SMALL


def cases():
    for name, template in templates().items():
        tokenizer = template_tokenizer(template)
        for form in ("one turn", "many turns", "system", "tools", "thinking"):
            if (name, form) in OF_THEIR_OWN or (name in OPENS and form != "thinking"):
                continue
            row = parse_row("row", dict(FORMS[form]), CONFIG)
            try:
                yield name, form, tokenizer, row, RowTokeniser(tokenizer, CONFIG)(row)
            except (BadRow, Dropped):  # not with this template
                continue


def test_what_the_model_would_write_becomes_the_text_that_trains_it():
    """The prompt is that of training, the end of turn stops, and the text gives the same ids again."""
    met = set()
    for name, form, tokenizer, row, expected in cases():
        codec, prompt = (
            PromptCodec(tokenizer, CONFIG),
            Prompt("row", row.prompt, dict(row.optional)),
        )
        case = f"{name}, {form}"
        ids = codec.encode(prompt)
        assert ids == expected.prompt_ids, case
        *written, end = expected.chosen_ids
        assert end in codec.stop_ids(prompt), case
        assert not set(written) & set(codec.stop_ids(prompt)), case
        found = codec.sequence(prompt, codec.decode(prompt, ids, written))
        assert (found.prompt_ids, found.answer_ids) == (ids, expected.chosen_ids), case
        met.add(name)
    assert len(met) > 30


def test_the_prompt_is_what_transformers_renders_for_generation():
    count = 0
    for name, template in templates().items():
        tokenizer = template_tokenizer(template)
        codec, prompt = (
            PromptCodec(tokenizer, CONFIG),
            Prompt("row", [user("a"), *ANSWERED, user("b")]),
        )
        if codec.rows.chat.takes_parts:
            continue  # such a template writes no text as content
        try:
            expected = tokenizer.apply_chat_template(
                prompt.prompt, add_generation_prompt=True, tokenize=False
            )
        except Exception:
            continue
        assert codec.encode(prompt) == ids_of(tokenizer, expected), name
        count += 1
    assert count > 30


ANSWERED = [{"role": "assistant", "content": "c"}]


def test_a_prompt_that_opens_thinking_is_completed_inside_it():
    tokenizer = template_tokenizer(SMALL["opens, drops"])
    codec, prompt = PromptCodec(tokenizer, CONFIG), Prompt("row", [user()])
    ids = codec.encode(prompt)
    assert tokenizer.decode(ids).endswith("<think>\n")
    written = ids_of(tokenizer, "hmm\n</think>\n\nbecause")
    text = codec.decode(prompt, ids, written)
    assert text == "hmm\n</think>\n\nbecause"
    found = codec.sequence(prompt, text)
    assert found.prompt_ids == ids and found.answer_ids[:-1] == written


def test_thinking_that_is_cut_off_is_no_answer():
    """A prompt that opens thinking may lose its mark in training, with an answer that has none."""
    count = 0
    for name, template in templates().items():
        tokenizer = template_tokenizer(template)
        codec, prompt = PromptCodec(tokenizer, CONFIG), Prompt("row", [user()])
        try:
            ids = codec.encode(prompt)
        except BadRow:
            continue
        text = codec.cut_off(prompt, ids, "hmm")
        opened = tokenizer.decode(ids).endswith(("<think>", "<think>\n"))
        assert text == ("<think>\nhmm" if opened else "hmm"), name
        assert codec.cut_off(prompt, ids, "hmm</think>yes") == "hmm</think>yes"
        if opened or "<think>" in template or name == "gptoss":
            with pytest.raises(Dropped, match="thinking that does not end"):
                codec.sequence(prompt, "<think>\nhmm")
            count += 1
    assert count > 10
    codec = PromptCodec(template_tokenizer(templates()["qwen2_5"]), CONFIG)
    assert codec.sequence(Prompt("row", [user()]), "<think>\nhmm")  # text like any other


@pytest.mark.parametrize(
    "template, prompt, text",
    [(None, "the cat", "sat down"), (LLAMA2, [user("cat?")], "sat down ")],
    ids=["text", "llama 2, which ends with a space"],
)
def test_sentencepiece_loses_no_space_and_gains_none(template, prompt, text):
    """Decoded by itself, the first word of an answer has no space before it."""
    tokenizer = word_tokenizer(template=template)
    codec, prompt = PromptCodec(tokenizer, CONFIG), Prompt("row", prompt)
    ids = codec.encode(prompt)
    written = ids_of(tokenizer, text)
    assert tokenizer.convert_ids_to_tokens(written[:1]) == ["▁"]
    found = codec.sequence(prompt, codec.decode(prompt, ids, written))
    assert found.prompt_ids == ids
    assert found.answer_ids[:-1] == written


@pytest.mark.parametrize("content", ["message['content']", "message['content'].strip()"])
def test_a_prefill_is_gone_on_with(content):
    """Its last space too, which many templates strip."""
    template = CHATML.replace("message['content']", content)
    tokenizer = byte_tokenizer(template=template, eos_token="<|im_end|>")
    prompt = Prompt("row", [user("2 + 2?"), {"role": "assistant", "content": "It is "}])
    codec = PromptCodec(tokenizer, CONFIG)
    ids = codec.encode(prompt)
    assert tokenizer.decode(ids).endswith("assistant\nIt is ")
    found = codec.sequence(prompt, codec.decode(prompt, ids, ids_of(tokenizer, "four")))
    assert found.prompt_ids == ids and tokenizer.decode(found.answer_ids) == "four<|im_end|>"


def test_special_tokens_are_no_part_of_a_text():
    tokenizer = chat_tokenizer()
    codec, prompt = PromptCodec(tokenizer, CONFIG), Prompt("row", [user()])
    written = ids_of(tokenizer, "yes<|im_start|>user</s>no<pad>")
    assert codec.decode(prompt, codec.encode(prompt), written) == "yesuserno"


def test_a_template_ends_turns_with_a_token_that_the_model_does_not_name():
    """A base model with ChatML: its EOS is </s>, and its turns end with <|im_end|>."""
    tokenizer = byte_tokenizer(template=CHATML)
    codec = PromptCodec(tokenizer, CONFIG, [7])
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert codec.stop_ids(Prompt("row", [user()])) == sorted([*ends, 7])
    assert codec.stop_ids(Prompt("row", "text")) == sorted([ends[0], 7])


def test_tools_and_template_arguments_reach_the_prompt():
    template = CHATML + "{{ tools | tojson if tools }}{{ mood }}"
    codec = PromptCodec(byte_tokenizer(template=template), CONFIG)
    optional = {"tools": [{"name": "add"}], "chat_template_kwargs": {"mood": "glad"}}
    text = codec.tokenizer.decode(codec.encode(Prompt("row", [user()], optional)))
    assert text.endswith('[{"name": "add"}]glad')


def test_a_chat_without_a_template_is_told():
    codec = PromptCodec(byte_tokenizer(), CONFIG)
    with pytest.raises(UserError, match="row:3: the prompt is a list .* set data.chat_template"):
        codec.encode(Prompt("row:3", [user()]))


def test_prompts_that_leave_no_room_are_counted_or_refused():
    codec = PromptCodec(byte_tokenizer(), CONFIG)
    prompts = [Prompt("a:1", "x" * 9), Prompt("a:2", "x" * 10), Prompt("a:3", "x" * 11)]
    found = encode_all(codec, prompts, 10, "limits", refuse=False, skip=False)
    assert found.places == [0, 1] and [len(ids) for ids in found.ids] == [9, 10]
    reason = "its prompt has 11 tokens, and limits leave room for 10"
    assert found.dropped == [("a:3", reason)]
    with pytest.raises(UserError, match=f"a:3: {reason}; lower sample.max_new_tokens"):
        encode_all(codec, prompts, 10, "limits", refuse=True, skip=False)
    with pytest.raises(
        UserError, match="none of 3 prompts can be completed; a:1: its prompt has 9"
    ):
        encode_all(codec, prompts, 2, "limits", refuse=False, skip=False)


def test_a_prompt_that_a_template_refuses_is_told_by_its_row():
    template = (
        "{% if messages[0].content == 'no' %}{{ raise_exception('not so') }}{% endif %}" + CHATML
    )
    codec = PromptCodec(byte_tokenizer(template=template), CONFIG)
    prompts = [Prompt("a:1", [user("yes")]), Prompt("a:2", [user("no")])]
    with pytest.raises(UserError, match="a:2: the chat template refuses the messages: not so"):
        encode_all(codec, prompts, 99, "limits", refuse=False, skip=False)
    found = encode_all(codec, prompts, 99, "limits", refuse=False, skip=True)
    assert found.places == [0] and found.dropped[0][0] == "a:2"


def test_a_completion_that_training_would_cut_has_no_sequence():
    codec = PromptCodec(byte_tokenizer(), DataConfig(train="rows", max_length=8))
    assert codec.sequence(Prompt("row", "ab"), "cdefg").answer_ids
    with pytest.raises(Dropped, match="longer than data.max_length"):
        codec.sequence(Prompt("row", "ab"), "cdefgh")


def test_channels_become_thinking():
    text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes"
    assert without_channels(text) == "<think>\nhm\n</think>\n\nyes"
    assert without_channels("<|channel|>final<|message|>yes") == "yes"
    assert without_channels("yes") is None
    cut_off = "<|channel|>analysis<|message|>hm"
    assert without_channels(cut_off) == "<think>\nhm"
    call = "<|channel|>commentary to=functions.add<|message|>{}"
    assert without_channels(call) is None


def test_a_completion_that_was_cut_off_has_the_ids_that_were_written():
    tokenizer = byte_tokenizer(template=CHATML)
    codec, written = PromptCodec(tokenizer, CONFIG), ids_of(tokenizer, "thr")
    for prompt in (Prompt("row", [user()]), Prompt("row", "two")):
        assert codec.sequence(prompt, "thr", unfinished=True).answer_ids == written
        assert codec.sequence(prompt, "thr").answer_ids[:-1] == written
