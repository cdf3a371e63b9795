"""What begins and ends a sequence: one BOS or what stands for it, and one end of turn, the template's."""

import pytest
from tokenizers import AddedToken, processors

from dpo_fast.data.config import DataConfig
from dpo_fast.data.rows import parse_row
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.data.verdicts import BadRow
from tests.support.templates import CALLS, answers, template_tokenizer, user
from tests.support.tokenizers import CHATML, IM_END, IM_START, byte_tokenizer, ids_of

CHAT = {"prompt": [user("a")], **answers("b", "c")}
TEXT = {"prompt": "a", "chosen": "b", "rejected": "c"}
SPECIAL = ("<end>", "<user>", "<assistant>", "<tool>", "<stop>")
TURN = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"


def tokenise(tokenizer, row, stops=(), **options):
    config = DataConfig(train="f", **options)
    ends = tokenizer.convert_tokens_to_ids(list(stops))
    return RowTokeniser(tokenizer, config, ends)(parse_row("f:1", row, config))


def decoded(tokenizer, row, stops=(), **options):
    pair = tokenise(tokenizer, row, stops, **options)
    return tuple(map(tokenizer.decode, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)))


# The beginning


def begins_with(*tokens, **options):
    """A tokenizer that puts these before every text."""
    tokenizer = byte_tokenizer(**options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens]
    begin = " ".join(tokens)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=known
    )
    return tokenizer


@pytest.mark.parametrize("begin", [("[gMASK]", "<sop>"), ("<s>",), ("<s>", "<sop>")])
def test_a_text_begins_as_the_tokenizer_begins_it(begin):
    tokenizer = begins_with(*begin)
    whole = tokenizer("ab")["input_ids"]
    for prompt, added in (("ab", 1), ("".join(begin) + "ab", 0)):
        pair = tokenise(tokenizer, TEXT | {"prompt": prompt})
        assert (pair.prompt_ids, pair.bos_added) == (whole, added)
    pair = tokenise(tokenizer, TEXT | {"prompt": begin[-1] + "ab"})
    assert pair.prompt_ids == whole, "a part of it is completed"


def test_a_template_that_begins_the_text_gets_no_second_beginning():
    tokenizer = begins_with("[gMASK]", "<sop>", template="[gMASK]<sop>" + CHATML)
    prompt = decoded(tokenizer, CHAT)[0]
    assert prompt == "[gMASK]<sop><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_the_beginning_stays_when_the_prompt_is_cut():
    tokenizer = begins_with("[gMASK]", "<sop>")
    pair = tokenise(tokenizer, TEXT | {"prompt": "abcdefgh"}, max_length=6)
    assert tokenizer.decode(pair.prompt_ids) == "[gMASK]<sop>gh"
    assert pair.prompt_cut == 6


def test_bos_that_begins_turns_may_stand_inside_an_answer():
    """SmolLM2: <|im_start|> is BOS. An agent's answer has more than one turn."""
    tokenizer = byte_tokenizer(template=CHATML, eos_token="<|im_end|>")
    tokenizer.bos_token = "<|im_start|>"
    turns = answers("b", "c")["chosen"] + answers("d", "c")["chosen"]
    pair = tokenise(tokenizer, CHAT | {"chosen": turns})
    assert tokenizer.decode(pair.chosen_ids) == "b<|im_end|>\n<|im_start|>assistant\nd<|im_end|>"
    assert tokenise(tokenizer, TEXT | {"chosen": "b<|im_start|>c"}).chosen_ids[1] == IM_START
    for row in (
        TEXT | {"chosen": "<|im_start|>b"},
        TEXT | {"chosen": " <|im_start|>b"},
        CHAT | answers("<|im_start|>b", "c"),
    ):
        with pytest.raises(BadRow, match="BOS inside chosen: it begins a text"):
            tokenise(tokenizer, row)


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML, None])
def test_bos_that_only_begins_texts_may_not(template):
    with pytest.raises(BadRow, match="BOS inside chosen"):
        tokenise(byte_tokenizer(template=template), TEXT | {"chosen": "b<s>c"})


# The end


def with_end(special):
    """ChatML whose end of turn is an added token that is special, or is not."""
    tokenizer = byte_tokenizer(template=CHATML.replace("<|im_end|>", "<end>"))
    tokenizer.add_tokens([AddedToken("<end>", special=special, normalized=False)])
    return tokenizer


def padded_with_end():
    tokenizer = byte_tokenizer(template=CHATML)
    tokenizer.pad_token = "<|im_end|>"
    return tokenizer


def turns(template):
    """A tokenizer for a template of the SPECIAL tokens, none of which is EOS."""
    tokenizer = byte_tokenizer(template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer


BEGIN = "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
LAST = "{% if loop.last and m.role == 'assistant' %}<stop>{% else %}<end>{% endif %}"
PHI = "{% endfor %}{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}"


@pytest.mark.parametrize(
    "tokenizer, stops, end",
    [
        (padded_with_end(), (), "<|im_end|>"),
        (with_end(special=True), (), "<end>"),
        (with_end(special=False), (), "<end>"),
        (with_end(special=False), ("<end>",), "<end>"),
        (byte_tokenizer(template=CHATML), ("<|im_end|>",), "<|im_end|>"),
        (byte_tokenizer(template=CHATML, eos_token="<|im_end|>"), (), "<|im_end|>"),
        # gpt-oss: the last turn ends in another way than the ones before it.
        (turns(TURN + LAST + BEGIN), (), "<stop>"),
        # Phi 3: EOS follows the end of turn where the text ends.
        (turns(TURN + "<end>\n" + PHI), (), "<end>"),
        (turns(TURN + "<end>\n" + PHI), ("<end>", "<assistant>"), "<end>"),
        # Cohere: the answer itself is closed first.
        (turns(TURN + "<stop><end>" + BEGIN), (), "<stop><end>"),
        # Command A: what closes the conversation begins as a turn does.
        (turns(TURN + "<stop><end><assistant>" + BEGIN), (), "<stop><end>"),
        # GLM: the next turn's beginning is what generation stops at.
        (turns(TURN + BEGIN), ("<user>", "<tool>"), "<user>"),
        # A template without any.
        (turns(TURN + BEGIN), (), "</s>"),
        (turns(TURN + "\n" + BEGIN), (), "\n</s>"),
    ],
)
def test_a_turn_ends_once_as_the_template_ends_it(tokenizer, stops, end):
    assert decoded(tokenizer, CHAT, stops)[1:] == (f"b{end}", f"c{end}")
    written = CHAT | answers("b" + end, "c")
    assert decoded(tokenizer, written, stops)[1:] == (f"b{end}", f"c{end}"), "it was there already"


@pytest.mark.parametrize("brought", ["</s>", "</s>\n", " </s>", "</s></s>", "<|im_end|></s>"])
def test_an_eos_that_the_content_brings_gives_way_to_the_templates_end(brought):
    """Sampled answers often keep it: Qwen's <|endoftext|> before <|im_end|>."""
    tokenizer = byte_tokenizer(template=CHATML)
    row = CHAT | answers(f"b{brought}", "c")
    space = " " * brought.startswith(" ") + "\n" * brought.endswith("\n")
    for stops in ((), ("<|im_end|>",)):
        assert decoded(tokenizer, row, stops)[1:] == (f"b{space}<|im_end|>", "c<|im_end|>")
    plain = turns(TURN + BEGIN)  # whose template writes no end
    assert decoded(plain, CHAT | answers("b</s>", "c"), ("<user>",))[1:] == ("b</s>", "c<user>")


def test_a_call_of_a_tool_ends_where_the_tool_begins():
    """GLM stops at <|observation|> after a call, and at <|user|> after words."""
    call = "{% for call in m.tool_calls %}{{ call.function.name }}41{% endfor %}"
    tokenizer = turns(TURN + call + BEGIN)
    row = {"prompt": [user("a")], "chosen": [CALLS], "rejected": CHAT["rejected"]}
    assert decoded(tokenizer, row, ("<user>", "<tool>"))[1:] == ("add41<tool>", "c<user>")


def test_without_add_eos_nothing_is_added():
    tokenizer = turns(TURN + BEGIN)
    assert decoded(tokenizer, CHAT, ("<user>",), add_eos=False)[1:] == ("b", "c")


def test_special_tokens_of_the_content_are_no_end():
    tokenizer = with_end(special=False)
    tokenizer.add_tokens([AddedToken("</tool_call>", special=False, normalized=False)])
    row = CHAT | answers("b</tool_call>", "c<|im_end|>")
    assert decoded(tokenizer, row)[1:] == ("b</tool_call><end>", "c<|im_end|><end>")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == IM_END


# The prompt of a chat is what inference is fed


def test_a_chat_keeps_the_prompts_own_tokens():
    """Qwen 3.5: the prompt ends with a line break, the answer begins with one, and two are one token."""
    tokenizer = byte_tokenizer(template=CHATML, eos_token="<|im_end|>", merges=(("Ċ", "Ċ"),))
    pair = tokenise(tokenizer, CHAT | answers("\nb", "c"))
    messages = CHAT["prompt"]
    fed = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert pair.prompt_ids == fed
    assert pair.chosen_ids == [*ids_of(tokenizer, "\nb"), IM_END]
    assert pair.merged == 0


def test_templates_without_special_tokens_keep_the_prompt_too():
    template = TURN.replace("'>'", "'>: '") + "{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>: {% endif %}"
    tokenizer = template_tokenizer(template)
    assert decoded(tokenizer, CHAT)[0] == "<user>: a<assistant>: "
