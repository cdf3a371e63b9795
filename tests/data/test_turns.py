"""Answers of several turns: which characters the assistant wrote, under the templates of all families.

⟦ ⟧ stand round what is scored.
"""

import json
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.rows import parse_row
from dpo_fast.data.tokenise import RowTokeniser
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError
from tests.support.templates import (
    CALLS,
    RESULT,
    SMALL,
    TOOLS,
    message,
    template_tokenizer,
    trl_templates,
    user,
)
from tests.support.tokenizers import CHATML, byte_tokenizer, chat_tokenizer, word_tokenizer

pytest.importorskip("trl")

TEMPLATES = trl_templates(training=True)
STOPS = {"glm4moe": ("<|user|>", "<|observation|>")}
THOUGHT = "<think>\nhmm\n</think>\n\n"


def says(content, **more):
    return message("assistant", content, **more)


def row(*chosen, rejected=(), prompt=(), **more):
    rejected = list(rejected) or [says("no idea")]
    return {"prompt": [*prompt, user()], "chosen": list(chosen), "rejected": rejected, **more}


CHAT = row(says("because"), user("and then?"), says("well"))
TOOL = row(CALLS, RESULT, says("because"), tools=TOOLS)
REASONS = row(
    says("because", reasoning_content="hmm"),
    user("and then?"),
    says("well", reasoning_content="my my"),
    rejected=[says("no idea", reasoning_content="oh")],
)
AGENT = row(
    CALLS | {"reasoning_content": "hmm"},
    RESULT,
    says("well", reasoning_content="my my"),
    rejected=[says("no idea", reasoning_content="oh")],
    tools=TOOLS,
)
LONG = row(CALLS, RESULT, says("because"), user("and then?"), says("well"), tools=TOOLS)
FORMS = {"chat": CHAT, "tool": TOOL, "reasons": REASONS, "agent": AGENT, "long": LONG}


def tokenise(tokenizer, raw, stops=(), **options):
    config = DataConfig(train="f", **{"max_length": 100_000} | options)
    ends = [tokenizer.convert_tokens_to_ids(stop) for stop in stops]
    return RowTokeniser(tokenizer, config, ends)(parse_row("f:1", raw, config))


def marked(tokenizer, ids, flags):
    pieces = groupby(zip(flags or [True] * len(ids), ids), key=lambda pair: pair[0])
    texts = [(scored, tokenizer.decode([index for _, index in run])) for scored, run in pieces]
    return "".join(f"⟦{text}⟧" if scored else text for scored, text in texts)


def chosen(tokenizer, raw, stops=(), **options):
    pair = tokenise(tokenizer, raw, stops, **options)
    return marked(tokenizer, pair.chosen_ids, pair.chosen_scored)


def of_template(name, form, **options):
    stops = STOPS.get(name, ())
    return chosen(template_tokenizer(TEMPLATES[name]), FORMS[form], stops, **options)


IM = "<|im_end|>"
ASK = "\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"
GOT = "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
HERMES = '<tool_call>\n{"name": "add", "arguments": {"number": 41}}\n</tool_call>'
XML = "<tool_call>\n<function=add>\n<parameter=number>\n41\n</parameter>\n</function>\n</tool_call>"
GLM = "<tool_call>add\n<arg_key>number</arg_key>\n<arg_value>41</arg_value>\n</tool_call>"
EOT, HEAD = "<|eot_id|>", "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA = f"{HEAD.format('user')}and then?{EOT}{HEAD.format('assistant')}"
LLAMA_TOOL = f'{HEAD.format("ipython")}"42"{EOT}{HEAD.format("assistant")}'
DEEPSEEK = "<｜end▁of▁sentence｜>"
COMMENTARY = ' to=functions.add<|channel|>commentary json<|message|>{"number": 41}<|call|>'
FUNCTION = "<|start|>functions.add to=assistant<|channel|>commentary<|message|>"
HARMONY = "<|start|>user<|message|>and then?<|end|><|start|>assistant"
ANALYSIS = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
RESPONSE = 'response:add{value:<|"|>42<|"|>}<tool_response|>'
EXPECTED = {
    ("qwen2_5", "chat"): f"⟦because{IM}⟧{ASK}⟦well{IM}⟧",
    ("qwen2_5", "tool"): f"⟦{HERMES}{IM}⟧{GOT}⟦because{IM}⟧",
    # A finished turn has empty thinking, an earlier one has not.
    ("qwen3", "chat"): f"⟦because{IM}⟧{ASK}⟦<think>\n\n</think>\n\nwell{IM}⟧",
    ("qwen3", "reasons"): f"because{IM}{ASK}⟦<think>\nmy my\n</think>\n\nwell{IM}⟧",
    ("qwen3", "agent"): f"⟦{THOUGHT}{HERMES}{IM}⟧{GOT}⟦<think>\nmy my\n</think>\n\nwell{IM}⟧",
    # The generation prompt opens thinking.
    ("qwen3_5_think", "chat"): f"⟦because{IM}⟧{ASK}<think>\n⟦\n</think>\n\nwell{IM}⟧",
    (
        "qwen3_5_think",
        "agent",
    ): f"⟦hmm\n</think>\n\n{XML}{IM}⟧{GOT}<think>\n⟦my my\n</think>\n\nwell{IM}⟧",
    (
        "qwen3_5_think",
        "long",
    ): f"⟦{XML}{IM}⟧{GOT}⟦because{IM}⟧{ASK}<think>\n⟦\n</think>\n\nwell{IM}⟧",
    # It ends thinking.
    ("qwen3_5_nothink", "chat"): f"⟦because{IM}⟧{ASK}<think>\n\n</think>\n\n⟦well{IM}⟧",
    (
        "qwen3_5_nothink",
        "long",
    ): f"⟦{XML}{IM}⟧{GOT}⟦because{IM}⟧{ASK}<think>\n\n</think>\n\n⟦well{IM}⟧",
    ("nemotron_3_nano", "chat"): f"⟦</think>because{IM}⟧{ASK}<think>\n⟦</think>well{IM}⟧",
    ("llama3_1", "chat"): f"⟦because{EOT}⟧{LLAMA}⟦well{EOT}⟧",
    ("llama3_1", "tool"): '⟦{"name": "add", "parameters": {"number": 41}}'
    + f"{EOT}⟧{LLAMA_TOOL}⟦because{EOT}⟧",
    ("deepseek_r1_distill", "chat"): f"⟦because{DEEPSEEK}⟧<｜User｜>and then?<｜Assistant｜>"
    + f"⟦well{DEEPSEEK}⟧",
    (
        "deepseek_r1_distill",
        "reasons",
    ): f"because{DEEPSEEK}<｜User｜>and then?<｜Assistant｜><think>\n"
    + f"⟦my my\n</think>\n\nwell{DEEPSEEK}⟧",
    # Earlier turns end with <|end|>, which no model that ends with <|return|> writes there.
    ("gptoss", "chat"): f"⟦{FINAL}because⟧<|end|>{HARMONY}⟦{FINAL}well<|return|>⟧",
    ("gptoss", "reasons"): f"{FINAL}because<|end|>{HARMONY}"
    + f"⟦{ANALYSIS.format('my my')}{FINAL}well<|return|>⟧",
    ("gptoss", "agent"): f'⟦{ANALYSIS.format("hmm")}{COMMENTARY}⟧{FUNCTION}"42"<|end|>'
    + f"<|start|>assistant⟦{ANALYSIS.format('my my')}{FINAL}well<|return|>⟧",
    # Generation stops at the beginning of the next turn.
    ("glm4moe", "tool"): f"⟦\n<think></think>\n{GLM}<|observation|>⟧\n<tool_response>\n42\n"
    + "</tool_response><|assistant|>⟦\n<think></think>\nbecause<|user|>⟧",
    # The same turn goes on after the tool's result.
    ("gemma4", "tool"): "⟦<|tool_call>call:add{number:41}<tool_call|><|tool_response>⟧"
    + f"{RESPONSE}⟦because<turn|>⟧",
    ("phi3", "chat"): "⟦because<|end|>⟧\n<|user|>\nand then?<|end|>\n<|assistant|>\n⟦well<|end|>⟧",
    ("llava_next", "chat"): "⟦ because</s>⟧ [INST] and then? [/INST]⟦ well</s>⟧",
}


@pytest.mark.parametrize("name, form", EXPECTED)
def test_families(name, form):
    assert of_template(name, form) == EXPECTED[name, form]


HABITS = {
    "opens, drops": "⟦because<EOS>⟧<U>and then?<A>⟦well<EOS>⟧",
    "drops": "⟦because<EOS>⟧<U>and then?<A>⟦well<EOS>⟧",
    "closes": "⟦because<EOS>⟧<U>and then?<A></think>⟦well<EOS>⟧",
    "opens, empty": "⟦</think>because<EOS>⟧<U>and then?<A><think>\n⟦</think>well<EOS>⟧",
    "opens, copies": "⟦because<EOS>⟧<U>and then?<A>⟦well<EOS>⟧",
    "always empty": "⟦<think></think>because<EOS>⟧<U>and then?<A>⟦<think></think>well<EOS>⟧",
    "forgets": "⟦because<EOS>⟧<U>and then?<A>⟦well<EOS>⟧",
    "system last": "⟦ because<EOS>⟧<U>and then?</U>⟦ well<EOS>⟧",
    "white space": "⟦because<EOS>⟧<U>and then?<A> ⟦well<EOS>⟧",
    "switch": "⟦because<EOS>⟧<U>and then?<A>⟦well<EOS>⟧",
}


@pytest.mark.parametrize("habit", HABITS)
def test_habits(habit):
    assert chosen(template_tokenizer(SMALL[habit]), CHAT) == HABITS[habit]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_takes_two_questions(name):
    text = of_template(name.removesuffix("_training"), "chat")
    first, *others = (part.partition("⟧")[0] for part in text.split("⟦")[1:])
    assert "because" in first
    assert "well" in others[0]
    assert len(others) == 1


def by_trl(tokenizer, raw):
    """The texts that {% generation %} marks, in order."""
    found = tokenizer.apply_chat_template(
        raw["prompt"] + raw["chosen"],
        tools=raw.get("tools"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    runs = groupby(zip(found["assistant_masks"], found["input_ids"]), key=lambda pair: pair[0])
    return [tokenizer.decode([index for _, index in run]) for scored, run in runs if scored]


OTHERWISE = {
    *(("phi3", "chat"), ("phi3_5", "chat")),  # scores EOS after the last end of turn, too
    *(("diffusion_gemma", form) for form in ("tool", "agent", "long")),  # not where a call stops
    ("gptoss", "agent"),  # without the thinking before the call, which generation has
}


@pytest.mark.parametrize("form", ["chat", "tool", "agent", "long"])
def test_trl_scores_the_same_turns(form):
    """TRL's marks take in what the generation prompt has: a header, thinking that it opens.

    Those of gpt-oss take in <|end|>, which stands where generation ends with <|return|>.
    """
    compared = set()
    for name, template in TEMPLATES.items():
        base, tokenizer = name.removesuffix("_training"), template_tokenizer(template)
        if (
            name == base
            or base in ("idefics3", "smolvlm", "llava_next")
            or (base, form) in OTHERWISE
        ):
            continue
        try:
            text = chosen(tokenizer, FORMS[form], STOPS.get(base, ()))
        except BadRow:
            continue
        ours = [part.partition("⟧")[0] for part in text.split("⟦")[1:]]
        marks = by_trl(tokenizer, FORMS[form])
        assert len(ours) == len(marks), (name, ours, marks)
        for mine, trl in zip(ours, marks):
            assert trl.rstrip("\n").removesuffix("<|end|>").endswith(mine), name
        compared.add(base)
    assert len(compared) >= {"chat": 18, "tool": 9, "agent": 6, "long": 9}[form], compared


# What the row and the options ask for


ANSWER = [says("b"), user("c"), says("d"), message("tool", "e"), says("f")]
TURN = "\n<|im_start|>{}\n{}<|im_end|>\n<|im_start|>assistant\n"
C, E = TURN.format("user", "c"), TURN.format("tool", "e")


def with_weights(*weights):
    """The answer with a weight for each message of the assistant; None: it has none."""
    told = iter(weights)
    return [
        m | {"weight": weight}
        if m["role"] == "assistant" and (weight := next(told)) is not None
        else m
        for m in ANSWER
    ]


@pytest.mark.parametrize(
    "scored, weights, expected",
    [
        ("assistant", (None, 1, 1), f"⟦b{IM}⟧{C}⟦d{IM}⟧{E}⟦f{IM}⟧"),
        ("assistant", (0, 1, 1.0), f"b{IM}{C}⟦d{IM}⟧{E}⟦f{IM}⟧"),
        ("assistant", (True, False, None), f"⟦b{IM}⟧{C}d{IM}{E}⟦f{IM}⟧"),
        ("assistant", (1, 0, 0), f"⟦b{IM}⟧"),  # nothing is laid out after the last scored token
        ("last", (None, 0, None), f"b{IM}{C}d{IM}{E}⟦f{IM}⟧"),
        ("all", (1, 1, 1), f"⟦b{IM}{C}d{IM}{E}f{IM}⟧"),
        ("all", (1, 0, 1), f"⟦b{IM}{C}⟧d{IM}⟦{E}f{IM}⟧"),
        ("all", (0, 1, 0), f"b{IM}⟦{C}d{IM}{E}⟧"),
    ],
)
def test_options_and_weights(scored, weights, expected):
    assert chosen(chat_tokenizer(), row(*with_weights(*weights)), scored=scored) == expected


@pytest.mark.parametrize(
    "answer, scored, message",
    [
        (
            with_weights(0, 0, 0),
            "assistant",
            "nothing of chosen is scored: every assistant message",
        ),
        (with_weights(1, 1, 0), "last", "nothing of chosen is scored: the last assistant message"),
        ([says("a", weight=0)], "all", "nothing of chosen is scored"),
        (
            [says("a"), user("b") | {"weight": 1}, says("c")],
            "assistant",
            r"chosen\[1\].weight is 1, but",
        ),
        ([says("a"), user("b") | {"weight": 0}, says("c")], "all", r"chosen\[1\].weight is 0, but"),
        (
            [says("a", weight=0.5)],
            "assistant",
            r"chosen\[0\].weight is 0.5: a message is scored or",
        ),
    ],
)
def test_refused_rows(answer, scored, message):
    with pytest.raises(BadRow, match=message):
        chosen(chat_tokenizer(), row(*answer), scored=scored)


def test_the_weight_by_another_name():
    answer = [says("a", loss=False), user("b"), says("c", loss=True)]
    assert chosen(chat_tokenizer(), row(*answer)) == f"a{IM}{TURN.format('user', 'b')}⟦c{IM}⟧"
    with pytest.raises(BadRow, match=r"loss of a message is not 0 or 1: chosen\[0\].loss is 'no'"):
        chosen(chat_tokenizer(), row(says("a", loss="no")))


def test_a_call_by_ms_swift_keeps_its_weight():
    call = {"role": "tool_call", "content": '{"name": "add", "arguments": {"number": 41}}'}
    answer = [call | {"loss": False}, {"role": "tool_response", "content": "42"}, says("because")]
    text = chosen(template_tokenizer(TEMPLATES["qwen2_5"]), row(*answer, tools=TOOLS))
    assert text == f"{HERMES}{IM}{GOT}⟦because{IM}⟧"


def test_a_prefill_before_several_turns():
    raw = row(says("b"), user("c"), says("d"), prompt=[user("q"), says("a"), user("q")])
    raw["prompt"] = [*raw["prompt"], says("It is ")]
    pair = tokenise(chat_tokenizer(), raw)
    assert chat_tokenizer().decode(pair.prompt_ids).endswith("assistant\nIt is ")
    assert marked(chat_tokenizer(), pair.chosen_ids, pair.chosen_scored) == f"⟦b{IM}⟧{C}⟦d{IM}⟧"


def test_weights_of_other_messages_that_say_what_holds_anyway():
    answer = [says("a"), user("b") | {"weight": 0}, says("c")]
    raw = row(*answer, prompt=[message("system", "s", weight=0)])
    assert chosen(chat_tokenizer(), raw) == f"⟦a{IM}⟧{TURN.format('user', 'b')}⟦c{IM}⟧"


def test_an_answer_of_one_message_is_scored_whole():
    for scored in ("assistant", "last", "all"):
        pair = tokenise(chat_tokenizer(), row(says("b")), scored=scored)
        assert (pair.chosen_scored, pair.rejected_scored) == (None, None)


def test_messages_after_the_last_of_the_assistant_are_left_off():
    raw = row(says("b"), message("tool", "e"), user("c"))
    for scored in ("assistant", "all"):
        pair, plain = (
            tokenise(chat_tokenizer(), each, scored=scored) for each in (raw, row(says("b")))
        )
        assert (pair.trailing, plain.trailing) == (1, 0)
        assert vars(pair) | {"trailing": 0} == vars(plain)


def test_turns_without_their_thinking_are_counted():
    tokenizer = template_tokenizer(TEMPLATES["qwen3"])
    assert tokenise(tokenizer, REASONS).left_out == 1
    assert tokenise(tokenizer, AGENT).left_out == 0
    raw = row(says("because", reasoning_content="hmm"), user("c"), says("well", weight=0))
    with pytest.raises(BadRow, match="nothing of chosen is scored: .* thinking"):
        tokenise(tokenizer, raw)


FORGETFUL = (
    *("deepseek_r1_distill", "deepseekv3", "diffusion_gemma", "gemma4_v5", "glm4moe", "gptoss"),
    *("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "nemotron_3_5_lightning", "nemotron_3_nano"),
    *("nemotron_3_super", "nemotron_3_ultra", "qwen3", "qwen3_5_think", "qwen3_6"),
)


def test_which_templates_leave_thinking_out_of_turns_before_the_last_question():
    """And none of them out of turns that only results of tools follow."""
    found = []
    for name, template in trl_templates().items():
        tokenizer = template_tokenizer(template)
        try:
            found += [name] * tokenise(tokenizer, REASONS, STOPS.get(name, ())).left_out
            assert tokenise(tokenizer, AGENT, STOPS.get(name, ())).left_out == 0
        except BadRow:
            continue
    assert set(found) == set(FORGETFUL)


def test_thinking_in_the_content_and_in_a_field_are_the_same():
    tokenizer = template_tokenizer(TEMPLATES["qwen3"])
    inside = row(
        CALLS | {"content": THOUGHT},
        RESULT,
        says("<think>\nmy my\n</think>\n\nwell"),
        rejected=[says("<think>\noh\n</think>\n\nno idea")],
        tools=TOOLS,
    )
    assert tokenise(tokenizer, inside) == tokenise(tokenizer, AGENT)


def test_a_tools_words_are_not_taken_for_thinking():
    result = RESULT | {"content": "a</think>b"}
    text = chosen(
        template_tokenizer(TEMPLATES["qwen3"]), row(CALLS, result, says("no"), tools=TOOLS)
    )
    assert "a</think>b" in text


SAID = says('<tool_call>\n{"name": "add"}\n</tool_call>')  # a call as text, as in Hermes' rows
PARIS = message("tool", "Paris", name="add", tool_call_id="add123456")
DROPPING = [
    (name, SAID, r"\(tool\)")
    for name in ("phi3", "phi3_5", "gemma4", "gemma4_v5", "diffusion_gemma")
] + [("lfm2", CALLS, "the tool calls of")]


@pytest.mark.parametrize("name, call, what", DROPPING)
@pytest.mark.parametrize("place", ["prompt", "chosen"])
def test_a_result_that_is_left_out_though_the_answer_repeats_it(name, call, what, place):
    """And a call whose tool and arguments are named elsewhere in the prompt."""
    tools = {"tools": TOOLS} if call is CALLS else {}
    asked = user("add 41, and which town is it?")
    says_it = says("Paris it is: add 41")
    raw = {"prompt": [asked], "chosen": [call, PARIS, says_it], "rejected": [says("no")], **tools}
    if place == "prompt":
        raw |= {"prompt": [asked, call, PARIS], "chosen": [says_it]}
    with pytest.raises(BadRow, match=rf"leaves something out: it does not write .*{what}"):
        tokenise(template_tokenizer(TEMPLATES[name]), raw)
    name = "qwen2_5"  # which writes them
    assert "Paris" in chosen(template_tokenizer(TEMPLATES[name]), raw)


@pytest.mark.parametrize("white", [" ", "\n\n"])
def test_white_space_before_an_answer(white):
    """Qwen 3 strips it off the last turn, after its empty thinking, and leaves it in earlier ones."""
    raw = row(says(f"{white}because"), user("and then?"), says("well"))
    expected = f"⟦{white}because{IM}⟧{ASK}⟦<think>\n\n</think>\n\nwell{IM}⟧"
    assert chosen(template_tokenizer(TEMPLATES["qwen3"]), raw) == expected


def test_a_template_that_moves_words_of_an_earlier_turn():
    """Mistral: the system message is in the last question. Gemma 4: an agent's words after the result."""
    system = message("system", "be brief")
    moved = "renders an earlier turn in another way once later ones follow"
    raw = row(*CHAT["chosen"], prompt=[system])
    with pytest.raises(BadRow, match=rf"{moved}: chosen\[0\].*weight 0"):
        chosen(template_tokenizer(SMALL["system last"]), raw)
    calls = CALLS | {"content": "let me add"}
    raw = row(calls, RESULT, says("because"), tools=TOOLS)
    tokenizer = template_tokenizer(TEMPLATES["gemma4"])
    with pytest.raises(BadRow, match=moved):
        chosen(tokenizer, raw)
    assert "let me add" in chosen(tokenizer, raw, scored="all")
    assert chosen(tokenizer, raw, scored="last").endswith("⟦because<turn|>⟧")


def test_conversations_that_part_at_an_earlier_turn():
    shared = [user("q"), says("a"), user("r")]
    raw = {
        "chosen": [*shared, says("b"), user("s"), says("c")],
        "rejected": [*shared, says("d"), message("tool", "t"), says("e")],
    }
    pair = tokenise(chat_tokenizer(), raw)
    assert chat_tokenizer().decode(pair.prompt_ids).endswith(f"a{IM}{TURN.format('user', 'r')}")
    again = tokenise(chat_tokenizer(), raw | {"prompt": shared[:1]})
    assert again == pair, "whole conversations beside a prompt: what they share is the prompt"
    parted = {"chosen": [user("q"), says("a"), user("r"), says("b")]}
    parted["rejected"] = [user("q"), says("a"), user("s"), says("c")]
    assert chosen(chat_tokenizer(), parted) == f"⟦a{IM}⟧{TURN.format('user', 'r')}⟦b{IM}⟧"


def test_sources_with_and_without_turns_are_one_data_set(tmp_path):
    """The flags of rows from a source without any are missing, and all is scored."""
    rows = {"a": row(says("b"), user("c"), says("d")), "b": row(says("b"))}
    for name, raw in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(raw))
    for names in ("ab", "ba"):
        sources = [str(tmp_path / f"{name}.jsonl") for name in names]
        for train in (sources, [{"path": path, "weight": 1.0} for path in sources]):
            config = DataConfig(train=train, cache_dir=str(tmp_path / "cache"))
            data = load_examples(config, chat_tokenizer(), split="train")
            scored = {"a": 4, "b": 2}
            assert data.lengths.scored_S[0::2].tolist() == [scored[name] for name in names]
            for index, name in enumerate(names):
                flags = data[index]["chosen_scored"]
                assert (flags is None) == (name == "b")


def test_texts_have_no_turns(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    config = {"train": str(path), "cache_dir": str(tmp_path / "cache")}
    load_examples(DataConfig(**config, scored="all"), chat_tokenizer(), split="train")
    with pytest.raises(UserError, match="data.scored=last is not used: all rows are text"):
        load_examples(DataConfig(**config, scored="last"), chat_tokenizer(), split="train")


# Tokens


def test_a_cut_that_leaves_nothing_scored():
    raw = row(*with_weights(0, 1, 1))
    whole = len(tokenise(chat_tokenizer(), raw).prompt_ids)
    options = {"max_prompt_length": whole, "truncation": "keep_end"}
    with pytest.raises(Dropped, match="nothing is scored once cut: 2 tokens of an answer fit"):
        tokenise(chat_tokenizer(), raw, max_length=whole + 2, **options)


def test_a_prompt_is_not_cut_for_tokens_that_go():
    """What follows the last scored token that fits is not kept, and the prompt has its room."""
    tokenizer = chat_tokenizer()
    raw = row(says("because"), user("and then?"), says("well"))
    whole = tokenise(tokenizer, raw)
    kept = len("because") + 1
    size = len(whole.prompt_ids) + kept
    found = tokenise(tokenizer, raw, max_length=size, max_prompt_length=4)
    assert (found.prompt_ids, found.prompt_cut) == (whole.prompt_ids, 0)
    assert (found.chosen_ids, found.answers_cut) == (whole.chosen_ids[:kept], 1)
    found = tokenise(tokenizer, raw, max_length=size - 3, max_prompt_length=4)
    assert (found.prompt_ids, found.prompt_cut) == (whole.prompt_ids[3:], 3)


def test_a_cut_ends_with_a_scored_token():
    tokenizer, raw = chat_tokenizer(), row(*ANSWER)
    size = len(tokenise(tokenizer, raw).prompt_ids)
    for room in range(3, 12):
        pair = tokenise(tokenizer, raw, max_length=size + room, max_prompt_length=size)
        assert marked(tokenizer, pair.chosen_ids, pair.chosen_scored) == f"⟦b{IM}⟧"
        assert pair.chosen_scored is None
    alike = row(says("b"), user("c"), says("d"), rejected=[says("b"), user("e"), says("f")])
    with pytest.raises(Dropped, match="the answers are the same once cut"):
        tokenise(tokenizer, alike, max_length=size + 6, max_prompt_length=size)


MERGES = (("Ċ", "Ċ"), ("Ġ", "Ġ"), ("a", "b"), ("Ġ", "a"), ("t", "Ċ"), ("Ċ", "a"), ("b", "Ċ"))
CONTENT = st.text(alphabet="ab \n.ü", min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(CONTENT, min_size=5, max_size=5))
def test_turns_begin_where_generation_begins(contents):
    """Whatever tokens the tokenizer would make across the header's end."""
    one, ask, two, got, three = contents
    answer = [says(one), user(ask), says(two), message("tool", got), says(three)]
    tokenizer = byte_tokenizer(template=CHATML, merges=MERGES, eos_token=IM)
    try:
        pair = tokenise(tokenizer, row(*answer, rejected=[says("no idea")]))
    except Dropped:
        return
    ids = pair.prompt_ids + pair.chosen_ids
    scored = [False] * len(pair.prompt_ids) + pair.chosen_scored
    begins = [i for i in range(1, len(ids)) if scored[i] and not scored[i - 1]]
    for begin, place in zip(begins, (0, 2, 4)):
        fed = tokenizer.apply_chat_template(
            [user(), *answer[:place]], tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(ids[:begin]) == fed
    assert len(begins) == 3
    text = marked(tokenizer, pair.chosen_ids, pair.chosen_scored)
    assert [part.partition("⟧")[0] for part in text.split("⟦")[1:]] == [
        f"{content}{IM}" for content in (one, two, three)
    ]


VICUNA = (
    "{% for m in messages %}{{ ('U: ' if m.role == 'user' else 'A: ') + m.content }}"
    "{{ ' ' if m.role == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ HEADER }}{% endif %}"
)


@pytest.mark.parametrize("scheme", ["legacy", "first", "always"])
@pytest.mark.parametrize("header", ["A:", "A: "])
def test_turns_of_words_with_marks_begin_from_what_inference_is_fed(scheme, header):
    """SentencePiece: the header may end with the space that the answer's first word would take."""
    merges = (("▁", "b"), ("▁", "A"), ("c", "c"), (":", "▁b"))
    template = VICUNA.replace("HEADER", repr(header))
    tokenizer = word_tokenizer(template=template, merges=merges, scheme=scheme)
    answer = [says("b c"), user("b"), says("cc b"), user("c"), says("bb")]
    pair = tokenise(tokenizer, row(*answer))
    ids = pair.prompt_ids + pair.chosen_ids
    scored = [False] * len(pair.prompt_ids) + pair.chosen_scored
    begins = [i for i in range(1, len(ids)) if scored[i] and not scored[i - 1]]
    ends = [i for i in range(1, len(ids)) if scored[i - 1] and not scored[i]]
    assert len(begins) == 3
    assert all(ids[end - 1] == tokenizer.eos_token_id for end in [*ends, len(ids)])
    for begin, end, place in zip(begins, [*ends, len(ids)], (0, 2, 4)):
        written = tokenizer.decode(ids[begin:end])
        assert written.strip() == f"{answer[place]['content']}</s>"
        fed = tokenizer.apply_chat_template(
            [user(), *answer[:place]], tokenize=False, add_generation_prompt=True
        )
        if not place:
            assert ids[:begin] == tokenizer(fed, add_special_tokens=False)["input_ids"]
        # Later on inference may join a header with the words after it, and the decoder adds spaces.
        assert tokenizer.decode(ids[:begin]).replace(" ", "") == fed.replace(" ", "")


def test_completions_and_groups():
    tokenizer = chat_tokenizer()
    one = tokenise(tokenizer, {"prompt": [user()], "completion": ANSWER, "label": True})
    pair = tokenise(tokenizer, row(*ANSWER, rejected=[says("b")]))
    assert (one.completion_ids, one.completion_scored) == (pair.chosen_ids, pair.chosen_scored)
    group = {"prompt": [user()], "completions": [ANSWER, [says("b")]], "scores": [1, 0]}
    many = tokenise(tokenizer, group)
    assert many.completions_ids == [pair.chosen_ids, pair.rejected_ids]
    assert many.completions_scored == [pair.chosen_scored, [True, True]]
    plain = tokenise(tokenizer, group | {"completions": [[says("a")], [says("b")]]})
    assert plain.completions_scored is None
