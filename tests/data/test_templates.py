"""Chat templates of all families, met with all forms of rows: the scored text, or why there is none.

What is expected of the templates in TRL is written out below, by hand, as the text that the model would
have to write after the generation prompt.
"""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.data.config import DataConfig
from dpo_fast.data.continuation import CLOSED as ENDS_THINKING
from dpo_fast.data.rows import parse_row
from dpo_fast.data.template_file import with_template
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError
from tests.support.templates import (
    CALLS,
    FORMS,
    RESULT,
    SMALL,
    TOOLS,
    answers,
    message,
    template_tokenizer,
    trl_templates,
    user,
)
from tests.support.tokenizers import EOS, byte_tokenizer

pytest.importorskip("trl")

NO_CALLS = "does not write the tool calls of prompt"
NO_TOOLS = "does not write the column 'tools'"
NO_REASONING = "does not write the reasoning_content of chosen"
NO_TOOL_ROLE = "refuses the messages: (Conversation roles must alternate|Only user and assistant)"
CLOSED = "generation prompt ends thinking: chosen .*chat_template_kwargs={enable_thinking: true}"
WRITTEN = "<think>\nhmm\n</think>\n\n"  # as the row has it
OPENED = "hmm\n</think>\n\n"  # the generation prompt has the rest

HERMES = '<tool_call>\n{"name": "add", "arguments": {"number": 41}}\n</tool_call>'
XML = "<tool_call>\n<function=add>\n<parameter=number>\n41\n</parameter>\n</function>\n</tool_call>"
LFM = "<|tool_call_start|>[add(number=41)]<|tool_call_end|>"
GEMMA = "<|tool_call>call:add{number:41}<tool_call|>"
GLM = "<tool_call>add\n<arg_key>number</arg_key>\n<arg_value>41</arg_value>\n</tool_call>"
ATEM = (
    ' to=add<|message|><atem:function_calls>\n<atem:invoke name="add">\n'
    '<atem:parameter name="number">41</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
)


class Refused(str):
    """A pattern of the reason."""


def family(end, before="", tools="", call="", thinking=WRITTEN, reasoning=NO_REASONING, system=""):
    """The scored text of every form: what comes before the answer's words, or why it is refused.

    end: the end of turn. call: all of a tool call.
    """

    def scored(start):
        return Refused(start) if start in REASONS else f"{start}because{end}"

    return {
        "one turn": scored(before),
        "many turns": scored(before),
        "system": scored(system or before),
        "tools": scored(tools or before),
        "tool call": Refused(call) if call in REASONS else call,
        "thinking": scored(thinking),
        "reasoning": scored(reasoning),
    }


NO_SYSTEM = "System role not supported"
NO_CALL = "does not write the tool calls of chosen"
REASONS = (*(NO_CALLS, NO_TOOLS, NO_REASONING, NO_TOOL_ROLE, NO_SYSTEM, NO_CALL, CLOSED),)
TOOLLESS = {"tools": NO_CALLS, "call": NO_TOOLS}
STRICT = {"tools": NO_TOOL_ROLE, "call": NO_TOOLS}
DEEPSEEK = "<｜end▁of▁sentence｜>"
ANALYSIS = "<|channel|>analysis<|message|>hmm<|end|><|start|>assistant<|channel|>final<|message|>"
SELF = " to=self<|message|>hmm<|eom|><|start|>assistant to=user<|message|>"
CHANNEL = "<|channel>thought\nhmm\n<channel|>"
GLM_EMPTY, GLM_THOUGHT = "\n<think></think>\n", "\n<think>hmm</think>\n"
IM = "<|im_end|>"

QWEN = family(IM, call=f"{HERMES}{IM}")
QWEN_THINK = family(
    IM, "\n</think>\n\n", call=f"\n</think>\n\n{XML}{IM}", thinking=OPENED, reasoning=OPENED
)
NEMOTRON = {"before": "</think>", "call": f"</think>\n{XML}\n{IM}", "thinking": OPENED}
GEMMA_4 = family("<turn|>", call=f"{GEMMA}<|tool_response>")
GEMMA_5 = family("<turn|>", call=f"{GEMMA}<|tool_response>", thinking=CHANNEL, reasoning=CHANNEL)
LFM_25 = family(IM, call=f"{LFM}{IM}", reasoning="<think>hmm</think>")
VISION = family("<end_of_utterance>", " ", **TOOLLESS, thinking=f" {WRITTEN}")
MATRIX = {
    "cohere": family("<|END_OF_TURN_TOKEN|>", **STRICT),
    "cohere2": family("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", **TOOLLESS),
    "deepseek_r1_distill": family(DEEPSEEK, **TOOLLESS, thinking=OPENED, reasoning=OPENED),
    "deepseekv3": family(
        DEEPSEEK, tools=NO_TOOLS, call=NO_TOOLS, thinking=OPENED, reasoning=OPENED
    ),
    "diffusion_gemma": GEMMA_5,
    "gemma": family("<end_of_turn>", **STRICT, system=NO_SYSTEM),
    "gemma3": family("<end_of_turn>", **STRICT),
    "gemma4": GEMMA_4,
    "gemma4_v2": family("<turn|>", call=f"{GEMMA}<turn|>"),
    "gemma4_v3": GEMMA_4,
    "gemma4_v4": GEMMA_4,
    "gemma4_v5": GEMMA_5,
    "glm4moe": family(
        "<|user|>",
        GLM_EMPTY,
        call=f"{GLM_EMPTY}{GLM}<|observation|>",
        thinking=GLM_THOUGHT,
        reasoning=GLM_THOUGHT,
    ),
    "gptoss": family(
        "<|return|>",
        "<|channel|>final<|message|>",
        call=' to=functions.add<|channel|>commentary json<|message|>{"number": 41}<|call|>',
        thinking=ANALYSIS,
        reasoning=ANALYSIS,
    ),
    "idefics3": VISION,
    "lfm2": family(IM, tools=NO_CALLS, call=NO_CALL),
    "lfm2_2_5": LFM_25,
    "lfm2_2_5_v2": LFM_25,
    "lfm2_2_5_vl": LFM_25,
    "lfm2_v2": family(IM, call=f"{LFM}{IM}"),
    "llama3": family("<|eot_id|>", **TOOLLESS),
    "llama3_1": family(
        "<|eot_id|>", call='{"name": "add", "parameters": {"number": 41}}<|eot_id|>'
    ),
    "llama3_2": family(
        "<|eot_id|>", call='{"name": "add", "parameters": {"number": 41}}<|eot_id|>'
    ),
    "llava_next": family("</s>", " ", **STRICT, thinking=f" {WRITTEN}"),
    "muse_glimmer": family(
        "<|eot|>", " to=user<|message|>", call=f"{ATEM}<|eot|>", thinking=SELF, reasoning=SELF
    ),
    "nemotron_3_5_lightning": family(IM, **NEMOTRON, reasoning="hmm</think>"),
    "nemotron_3_nano": family(IM, **NEMOTRON, reasoning="hmm\n</think>\n"),
    "nemotron_3_super": family(IM, **NEMOTRON, reasoning="hmm\n</think>\n"),
    "nemotron_3_ultra": family(IM, **NEMOTRON, reasoning="hmm</think>"),
    "phi3": family("<|end|>", **TOOLLESS),
    "phi3_5": family("<|end|>", **TOOLLESS),
    "qwen2_5": QWEN,
    "qwen2_5_vl": family(IM, **TOOLLESS),
    "qwen3": family(
        IM,
        "<think>\n\n</think>\n\n",
        call=f"<think>\n\n</think>\n\n{HERMES}{IM}",
        reasoning=WRITTEN,
    ),
    "qwen3_5_nothink": family(IM, call=f"{XML}{IM}", thinking=CLOSED, reasoning=CLOSED),
    "qwen3_5_think": QWEN_THINK,
    "qwen3_6": QWEN_THINK,
    "qwen3_8": QWEN_THINK,
    "qwen3_instruct_2507": QWEN,
    "qwen3_vl": QWEN,
    "smolvlm": VISION,
}
# What generation_config.json of the family names beside the tokenizer's EOS.
STOPS = {"glm4moe": ("<|user|>", "<|observation|>")}

TEMPLATES = trl_templates(training=True)
CELLS = [
    pytest.param(name, form, id=f"{name}-{form.replace(' ', '-')}")
    for name in TEMPLATES
    for form in FORMS
]


def tokenise(tokenizer, row, stops=(), **options):
    config = DataConfig(train="f", max_length=100_000, **options)
    ends = [tokenizer.convert_tokens_to_ids(stop) for stop in stops]
    return RowTokeniser(tokenizer, config, ends)(parse_row("f:1", row, config))


def texts(tokenizer, row, stops=(), **options):
    pair = tokenise(tokenizer, row, stops, **options)
    return tuple(map(tokenizer.decode, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)))


def generation_prompts(tokenizer, row):
    """What inference is fed, for content as text and as parts, and for arguments as JSON text."""
    parts = [
        each | {"content": [{"type": "text", "text": each["content"]}]} for each in row["prompt"]
    ]
    for messages in (row["prompt"], parts):
        try:
            yield tokenizer.apply_chat_template(
                messages, tools=row.get("tools"), tokenize=False, add_generation_prompt=True
            )
        except Exception:
            continue


@pytest.mark.parametrize("name, form", CELLS)
def test_matrix(name, form):
    """TRL's templates for training write the same as those that they were made from."""
    base = name.removesuffix("_training")
    tokenizer, row = template_tokenizer(TEMPLATES[name]), FORMS[form]
    expected = MATRIX[base][form] if base in MATRIX else None
    try:
        prompt, chosen, rejected = texts(tokenizer, row, stops=STOPS.get(base, ()))
    except BadRow as refusal:
        assert isinstance(expected, Refused | None), (refusal, expected)
        assert re.search(expected or "", str(refusal))
        assert "chat template of the tokenizer" in str(refusal)
        return
    fed = list(generation_prompts(tokenizer, row))
    thinks = form in ("thinking", "reasoning")
    assert prompt in fed or (not thinks and f"{prompt}<think>\n" in fed)
    assert "no idea" in rejected
    if expected is not None:
        assert chosen == expected


def test_the_matrix_names_every_template_of_trl():
    assert set(MATRIX) >= set(trl_templates()), "look at the new ones, and write them down"


def test_exact_cells_outnumber_the_refused():
    cells = [cell for forms in MATRIX.values() for cell in forms.values()]
    refused = sum(isinstance(cell, Refused) for cell in cells)
    one_turn = [forms["one turn"] for forms in MATRIX.values()]
    assert not any(isinstance(cell, Refused) for cell in one_turn)
    assert refused < len(cells) / 4


THINKS = answers("<think>\nhmm\n</think>\n\nyes", "<think>\nwell\n</think>\n\nno")
PLAIN = answers("yes", "no")
MIXED = answers("<think>\nhmm\n</think>\n\nyes", "no")
SAMPLED = answers("hmm\n</think>\n\nyes", "well\n</think>\n\nno")  # after an opened thought
FIELD = answers("yes", "no", reasoning_content="hmm")
Q = "<BOS><U>why so?"
UNTHINKING = ("opens, drops", "opens, copies")  # finished turns close no thinking


@pytest.mark.parametrize(
    "habit, rows, prompt, chosen, rejected",
    [
        ("opens, drops", PLAIN, "<A>", "yes", "no"),
        ("opens, drops", THINKS, "<A><think>\n", "hmm\n</think>\n\nyes", "well\n</think>\n\nno"),
        ("opens, drops", SAMPLED, "<A><think>\n", "hmm\n</think>\n\nyes", "well\n</think>\n\nno"),
        ("opens, drops", FIELD, "<A><think>\n", "hmm\n</think>\n\nyes", "hmm\n</think>\n\nno"),
        ("opens, drops", MIXED, "<A>", "<think>\nhmm\n</think>\n\nyes", "no"),
        ("drops", PLAIN, "<A>", "yes", "no"),
        ("drops", MIXED, "<A>", "<think>\nhmm\n</think>\n\nyes", "no"),
        ("closes", PLAIN, "<A></think>", "yes", "no"),
        ("opens, empty", PLAIN, "<A><think>\n", "</think>yes", "</think>no"),
        ("opens, empty", THINKS, "<A><think>\n", "hmm\n</think>yes", "well\n</think>no"),
        ("opens, empty", MIXED, "<A><think>\n", "hmm\n</think>yes", "</think>no"),
        ("opens, empty", FIELD, "<A><think>\n", "hmm\n</think>yes", "hmm\n</think>no"),
        ("opens, copies", PLAIN, "<A>", "yes", "no"),
        ("opens, copies", THINKS, "<A><think>\n", "hmm\n</think>\n\nyes", "well\n</think>\n\nno"),
        ("opens, copies", SAMPLED, "<A><think>\n", "hmm\n</think>\n\nyes", "well\n</think>\n\nno"),
        ("opens, copies", FIELD, "<A><think>\n", "hmm\n</think>\n\nyes", "hmm\n</think>\n\nno"),
        ("opens, copies", MIXED, "<A>", "<think>\nhmm\n</think>\n\nyes", "no"),
        ("always empty", PLAIN, "<A>", "<think></think>yes", "<think></think>no"),
        ("always empty", FIELD, "<A>", "<think>hmm</think>yes", "<think>hmm</think>no"),
        ("always empty", MIXED, "<A>", "<think>\nhmm\n</think>\n\nyes", "<think></think>no"),
        ("white space", PLAIN, "<A> ", "yes", "no"),
        ("white space", answers(" yes", "no "), "<A> ", "yes", "no"),
        ("switch", PLAIN, "<A>", "yes", "no"),
        ("switch", MIXED, "<A>", "<think>\nhmm\n</think>\n\nyes", "no"),
    ],
)
def test_habits(habit, rows, prompt, chosen, rejected):
    """The scored text begins where the generation prompt ends, and thinking is kept as written."""
    row = {"prompt": [user()], **rows}
    expected = (Q + prompt, f"{chosen}<EOS>", f"{rejected}<EOS>")
    assert texts(template_tokenizer(SMALL[habit]), row) == expected


@pytest.mark.parametrize("habit", sorted({*SMALL} - {"needs tools"}))
def test_the_prompt_of_plain_answers_is_what_inference_is_fed(habit):
    tokenizer = template_tokenizer(SMALL[habit])
    row = {"prompt": [user("hello"), message("assistant", "hi there"), user()], **PLAIN}
    fed = next(generation_prompts(tokenizer, row))
    prompt = texts(tokenizer, row)[0]
    assert prompt == (fed.removesuffix("<think>\n") if habit in UNTHINKING else fed)


def test_a_template_that_cannot_do_without_tools():
    tokenizer = template_tokenizer(SMALL["needs tools"].replace("<END>", "<|im_end|>"))
    row = {"prompt": [user()], **PLAIN, "chosen": [CALLS], "tools": TOOLS}
    prompt, chosen, rejected = texts(tokenizer, row)
    assert prompt == f"add. {Q}<A>"
    assert (chosen, rejected) == ("add41<|im_end|>", "no<|im_end|>"), "its end of turn is found"
    with pytest.raises(
        BadRow, match="refuses the messages: TypeError: 'NoneType' object is not iterable"
    ):
        texts(tokenizer, row | {"tools": None})


def test_earlier_turns_that_change_once_an_answer_follows():
    """At inference the last question still shows what the model thought; the finished text does not."""
    calls = message("assistant", "let me add", reasoning_content="use add")
    row = {"prompt": [user(), calls, RESULT], **MIXED}
    tokenizer = template_tokenizer(SMALL["forgets"])
    prompt, chosen, rejected = texts(tokenizer, row)
    assert prompt == next(generation_prompts(tokenizer, row))
    assert "use add" in prompt
    assert (chosen, rejected) == ("<think>hmm</think>yes<EOS>", "no<EOS>")


def test_a_system_message_that_moves_once_an_answer_follows():
    system, first = message("system", "be brief"), [user("hello"), message("assistant", "hi there")]
    tokenizer = template_tokenizer(SMALL["system last"])
    for before, expected in (([], "<BOS>"), (first, "<BOS><U>hello</U> hi there<EOS>")):
        row = {"prompt": [system, *before, user()], **PLAIN}
        prompt, chosen, rejected = texts(tokenizer, row)
        assert prompt == f"{expected}<U>be brief. why so?</U>"
        assert prompt == next(generation_prompts(tokenizer, row))
        assert (chosen, rejected) == (" yes<EOS>", " no<EOS>")


def test_a_conversation_that_is_all_new_once_an_answer_follows():
    with pytest.raises(BadRow, match="does not keep the prompt as a prefix: rendered with chosen"):
        counted = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        texts(template_tokenizer(counted), {"prompt": [user()], **PLAIN})


def test_agents_of_trl_templates_are_fed_what_inference_is_fed():
    """Thinking before an earlier tool call: kept in the prompt or not, as the generation prompt has it."""
    calls = CALLS | {"reasoning_content": "use add"}
    row = {"prompt": [user(), calls, RESULT], **answers(reasoning_content="hmm"), "tools": TOOLS}
    exact = []
    for name, template in trl_templates().items():
        tokenizer = template_tokenizer(template)
        try:
            prompt, chosen, _ = texts(tokenizer, row)
        except BadRow:
            continue
        assert prompt in generation_prompts(tokenizer, row), name
        assert chosen.index("hmm") < chosen.index("because"), name
        exact.append(name)
    assert {"gptoss", "qwen3", "glm4moe", "nemotron_3_nano", "gemma4_v5"} <= set(exact)


# Thinking that the generation prompt ends, and arguments of the template


def test_thinking_after_a_prompt_that_ends_it_needs_the_switch():
    for habit, options in (("closes", {}), ("switch", {"enable_thinking": False})):
        row = {"prompt": [user()], **THINKS, "chat_template_kwargs": options}
        with pytest.raises(BadRow, match=f"{ENDS_THINKING}: chosen .*{{enable_thinking: true}}"):
            texts(template_tokenizer(SMALL[habit]), row)


def test_a_switch_is_named_by_its_whole_name():
    tokenizer = template_tokenizer(SMALL["closes"].replace("enable_thinking", "thinking_mode"))
    with pytest.raises(
        BadRow, match=rf"{ENDS_THINKING}: chosen \([^;]*\); or leave the thinking out"
    ):
        texts(tokenizer, {"prompt": [user()], **THINKS})


def test_arguments_for_the_whole_run():
    tokenizer, row = template_tokenizer(SMALL["closes"]), {"prompt": [user()], **THINKS}
    on = {"chat_template_kwargs": {"enable_thinking": True}}
    expected = (f"{Q}<A><think>", "\nhmm\n</think>\n\nyes<EOS>", "\nwell\n</think>\n\nno<EOS>")
    assert texts(tokenizer, row, **on) == expected
    assert texts(tokenizer, row | on) == expected
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert texts(tokenizer, row | on, **off) == expected, "a row's own come first"
    tokenizer = template_tokenizer(SMALL["switch"])
    expected = (f"{Q}<A><think>\n\n</think>\n\n", "yes<EOS>", "no<EOS>")
    assert texts(tokenizer, {"prompt": [user()], **PLAIN}, **off) == expected


def test_arguments_that_the_template_does_not_use():
    row = {"prompt": [user()], **PLAIN}
    with pytest.raises(UserError, match="kwargs.enable_thinkin=False is not used by the chat temp"):
        texts(
            template_tokenizer(SMALL["switch"]), row, chat_template_kwargs={"enable_thinkin": False}
        )
    with pytest.raises(ValueError, match="data.chat_template_kwargs.tokenize=True is set by"):
        DataConfig(train="f", chat_template_kwargs={"tokenize": True})


# What a template leaves out


@pytest.mark.parametrize(
    "row, missing",
    [
        ({"prompt": [message("system", "be brief"), user()], **PLAIN}, r"prompt\[0\] \(system\)"),
        ({"prompt": [user(), CALLS, RESULT], **PLAIN}, r"the tool calls of prompt\[1\]"),
        ({"prompt": [user()], **PLAIN, "tools": TOOLS}, "the column 'tools'"),
        ({"prompt": [user()], **PLAIN, "chosen": [CALLS]}, r"the tool calls of chosen\[0\]"),
        (
            {"prompt": [user()], **FIELD},
            "the reasoning_content of chosen.*write it into the content",
        ),
    ],
)
def test_what_a_template_leaves_out_is_named(row, missing, tmp_path):
    """SMALL's "white space" knows questions, answers and results of tools, and nothing else."""
    path = tmp_path / "mine.jinja"
    path.write_text(SMALL["white space"])
    tokenizer = template_tokenizer(SMALL["white space"])
    reason = f"leaves something out: it does not write {missing}"
    with pytest.raises(BadRow, match=reason) as refusal:
        texts(tokenizer, row, chat_template=str(path))
    assert f"data.chat_template={path}" in str(refusal.value)


def test_arguments_of_tool_calls_as_text_and_as_an_object():
    """OpenAI's format has JSON text there; templates want one or the other."""
    as_text = message("assistant", "", tool_calls=[_call('{"number": 41}')])
    for name in ("qwen2_5", "glm4moe", "llama3_1", "nemotron_3_nano", "gptoss"):
        tokenizer = template_tokenizer(TEMPLATES[name])
        stops = STOPS.get(name, ())
        row = {**FORMS["tool call"], "chosen": [as_text]}
        assert texts(tokenizer, row, stops=stops)[1] == MATRIX[name]["tool call"]
    row = {"prompt": [user()], **PLAIN, "chosen": [CALLS]}
    chosen = texts(template_tokenizer(TEMPLATES["deepseekv3"]), row)[1]
    call = 'function<｜tool▁sep｜>add\n```json\n{"number": 41}\n```'
    assert f"<｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>" in chosen


def _call(arguments):
    return {
        "id": "add123456",
        "type": "function",
        "function": {"name": "add", "arguments": arguments},
    }


def test_the_exported_tokenizer_has_the_template_of_the_run(tmp_path):
    tokenizer = template_tokenizer(SMALL["drops"])
    assert with_template(tokenizer, DataConfig(train="f")) is tokenizer
    (tmp_path / "mine.jinja").write_text(SMALL["switch"])
    config = DataConfig(train="f", chat_template=str(tmp_path / "mine.jinja"))
    exported = with_template(tokenizer, config)
    exported.save_pretrained(tmp_path)
    assert type(tokenizer).from_pretrained(tmp_path).chat_template == SMALL["switch"]
    assert tokenizer.chat_template == SMALL["drops"]


MERGES = (("Ċ", "Ċ"), ("Ġ", "Ġ"), ("a", "b"), (">", "a"), (">", "Ċ"), ("Ġ", "a"), ("k", ">"))
CONTENT = st.text(alphabet="ab \n.ü", min_size=1, max_size=8).filter(str.strip)


@pytest.mark.parametrize("habit", ["opens, empty", "switch", "white space", "system last"])
@settings(max_examples=60, deadline=None)
@given(question=CONTENT, chosen=CONTENT, rejected=CONTENT)
def test_the_prompts_ids_are_those_of_inference(habit, question, chosen, rejected):
    """Whatever tokens the tokenizer would make across the boundary."""
    tokenizer = byte_tokenizer(template=SMALL[habit], merges=MERGES)
    row = {"prompt": [user(question)], **answers(chosen, rejected)}
    config = DataConfig(train="f")
    try:
        pair = RowTokeniser(tokenizer, config)(parse_row("f:1", row, config))
    except (BadRow, Dropped):
        assert chosen.strip() == rejected.strip()
        return
    fed = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_dict=False
    )
    assert pair.prompt_ids == fed
    for ids, content in ((pair.chosen_ids, chosen), (pair.rejected_ids, rejected)):
        assert ids.count(EOS) == 1 and ids[-1] == EOS
        assert content.strip() in tokenizer.decode(ids)


ENDS_TWICE = ("phi3", "phi3_5")  # TRL scores EOS after the end of turn, too
STOPS_LATER = ("diffusion_gemma",)  # and not the token at which a call of a tool stops


@pytest.mark.parametrize("form", ["one turn", "many turns", "system", "tools", "tool call"])
def test_trl_scores_the_same_in_its_templates_for_training(form):
    """TRL's marks ({% generation %}) take in what the generation prompt has: a header, opened thinking."""
    compared = 0
    for name, template in trl_templates(training=True).items():
        base, tokenizer = name.removesuffix("_training"), template_tokenizer(template)
        parts = base in ("idefics3", "smolvlm", "llava_next")
        if name == base or parts or isinstance(MATRIX[base][form], Refused):
            continue
        if base in ENDS_TWICE or (base in STOPS_LATER and form == "tool call"):
            continue
        row = FORMS[form]
        marked = tokenizer.apply_chat_template(
            row["prompt"] + row["chosen"],
            tools=row.get("tools"),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        last = len(marked["input_ids"]) - marked["assistant_masks"][::-1].index(1)
        scored = tokenizer.decode(marked["input_ids"][:last])
        assert scored.rstrip("\n").endswith(texts(tokenizer, row)[1]), name
        compared += 1
    assert compared >= 16
