"""Prompts that end with the beginning of an answer, prompts without a user, and no prompt at all."""

import pytest

from dpo_fast.data.config import DataConfig
from dpo_fast.data.rows import parse_row
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.data.verdicts import BadRow
from tests.support.templates import template_tokenizer, trl_templates
from tests.support.tokenizers import BOS, EOS, IM_END, byte_tokenizer, chat_tokenizer, ids_of

pytest.importorskip("trl")


def say(role, content, **more):
    return {"role": role, "content": content, **more}


U = say("user", "why?")
BEGUN = say("assistant", "The answer is")
YES, NO = say("assistant", " yes"), say("assistant", " no")
PREFILL = {"prompt": [U, BEGUN], "chosen": [YES], "rejected": [NO]}
# transformers does not render these with continue_final_message: they take content as parts.
PARTS = ("idefics3", "llava_next", "smolvlm")


def tokenised(tokenizer, raw, **options):
    config = DataConfig(train="f", max_length=8192, **options)
    return RowTokeniser(tokenizer, config)(parse_row("f:1", raw, config))


@pytest.mark.parametrize("name", trl_templates())
def test_the_prompt_ends_open(name):
    """As transformers renders it for inference, where a server continues the message."""
    tokenizer = template_tokenizer(trl_templates()[name])
    pair = tokenised(tokenizer, PREFILL)
    prompt, (chosen, rejected) = (
        tokenizer.decode(pair.prompt_ids),
        map(tokenizer.decode, (pair.chosen_ids, pair.rejected_ids)),
    )
    assert chosen.startswith(" yes") and rejected.startswith(" no")
    assert chosen[4:] == rejected[3:] != ""
    if name in PARTS:
        assert prompt.endswith(" The answer is")
        return
    expected = tokenizer.apply_chat_template(
        PREFILL["prompt"], continue_final_message=True, tokenize=False
    )
    assert prompt.removeprefix("<BOS>") == expected.removeprefix("<BOS>")
    white = {
        "prompt": [U, say("assistant", "The answer is ")],
        "chosen": [say("assistant", "yes")],
        "rejected": [say("assistant", "no")],
    }
    white = tokenised(tokenizer, white)
    assert tokenizer.decode(white.prompt_ids) == prompt + " "
    assert tokenizer.decode(white.chosen_ids) == chosen[1:]


@pytest.mark.parametrize("begun", ["n", "in", "a", "fi", "m"])
@pytest.mark.parametrize("name", sorted(set(trl_templates()) - set(PARTS)))
def test_a_beginning_whose_letters_are_in_the_header(name, begun):
    """<think>, <|channel|>final<|message|>: the prefill is what the message says, and not those."""
    tokenizer = template_tokenizer(trl_templates()[name])
    prompt = [U, say("assistant", begun)]
    pair = tokenised(tokenizer, {"prompt": prompt, "chosen": "1 yes", "rejected": "1 no"})
    assert tokenizer.decode(pair.chosen_ids).startswith("1 yes")
    expected = tokenizer.apply_chat_template(prompt, continue_final_message=True, tokenize=False)
    found = tokenizer.decode(pair.prompt_ids)
    assert found.removeprefix("<BOS>") == expected.removeprefix("<BOS>")


def test_all_kinds_of_rows():
    tokenizer = chat_tokenizer()
    prompt = ids_of(
        tokenizer, "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\nThe answer is"
    )
    yes, no = ([*ids_of(tokenizer, text), IM_END] for text in (" yes", " no"))
    pair = tokenised(tokenizer, PREFILL)
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == (prompt, yes, no)
    assert tokenised(tokenizer, {**PREFILL, "chosen": " yes", "rejected": " no"}) == pair
    single = {"prompt": [U, BEGUN], "completion": [YES], "label": True}
    assert tokenised(tokenizer, single).completion_ids == yes
    group = {"prompt": [U, BEGUN], "completions": [[YES], [NO]], "scores": [1, 0]}
    assert tokenised(tokenizer, group).prompt_ids == prompt
    assert tokenised(tokenizer, group).completions_ids == [yes, no]


def test_a_template_that_does_not_write_it_is_named():
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content|replace('The ', '') }}</s>"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(BadRow, match=r"assistant message that ends the prompt \(the chat template"):
        tokenised(byte_tokenizer(template=template), PREFILL)


def test_a_chat_without_a_user():
    tokenizer = chat_tokenizer()
    start = ids_of(tokenizer, "<|im_start|>assistant\n")
    system = ids_of(tokenizer, "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>assistant\n")
    rest = {"chosen": [YES], "rejected": [NO]}
    for raw in (rest, {"prompt": [], **rest}, {"prompt": "", **rest}, {"prompt": None, **rest}):
        assert tokenised(tokenizer, raw).prompt_ids == start
    assert (
        tokenised(tokenizer, {"prompt": [say("system", "be brief")], **rest}).prompt_ids == system
    )
    assert tokenised(tokenizer, {"system": "be brief", **rest}).prompt_ids == system
    needs_user = "{% if not messages %}{{ raise_exception('no user') }}{% endif %}" + (
        tokenizer.chat_template
    )
    with pytest.raises(BadRow, match="refuses the messages: no user"):
        tokenised(byte_tokenizer(template=needs_user), rest)


def test_no_prompt_at_all():
    """Texts alone begin with BOS, from which the first token is predicted."""
    raw = {"chosen": "Ahoy!", "rejected": "Good day."}
    for tokenizer in (byte_tokenizer(bos=True), byte_tokenizer()):  # put there by it, or only known
        for each in (raw, {"prompt": "", **raw}, {"prompt": None, **raw}):
            pair = tokenised(tokenizer, each)
            assert pair.prompt_ids == [BOS]
            assert pair.chosen_ids == [*ids_of(tokenizer, "Ahoy!"), EOS]
    kept = tokenised(tokenizer, {"prompt": "", "completion": "Ahoy!", "label": True})
    assert kept.prompt_ids == [BOS]
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(BadRow, match="no prompt token: the prompt is empty, and .* no BOS"):
        tokenised(tokenizer, raw)


@pytest.mark.parametrize(
    "template, role", [("", "system"), ("{# knows the developer #}", "developer")]
)
def test_a_developer_is_the_system_unless_the_template_knows_it(template, role):
    tokenizer = byte_tokenizer(template=template + chat_tokenizer().chat_template)
    prompt = [say("developer", "be brief"), U]
    pair = tokenised(tokenizer, {**PREFILL, "prompt": prompt})
    assert tokenizer.decode(pair.prompt_ids).startswith(f"<|im_start|>{role}\nbe brief<|im_end|>")
