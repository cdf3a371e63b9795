"""Token ids by hand: the prompt's boundary, BOS, the end of turn, truncation."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.data.boundary import PromptBoundary
from dpo_fast.data.config import DataConfig
from dpo_fast.data.rows import PairRow, parse_row
from dpo_fast.data.tokenise import RowTokeniser, fit
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError
from tests.support.tokenizers import (
    BOS,
    CHATML,
    EOS,
    IM_END,
    byte_tokenizer,
    chat_tokenizer,
    ids_of,
    word_tokenizer,
)

A, B, C, D = range(69, 73)
BC = 261  # the first merge


def test_the_vocabulary_is_what_these_tests_think():
    assert ids_of(byte_tokenizer(merges=(("b", "c"),)), "abcd") == [A, BC, D]


def tokenise(tokenizer, raw, eos_ids=(), **options):
    config = DataConfig(train="f", **options)
    return RowTokeniser(tokenizer, config, eos_ids)(parse_row("f.jsonl:7", raw, config))


def ids(pair):
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


def text(chosen, rejected, prompt="a"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat(chosen="b", rejected="c"):
    answers = {"chosen": chosen, "rejected": rejected}
    answers = {k: [{"role": "assistant", "content": v}] for k, v in answers.items()}
    return {"prompt": [{"role": "user", "content": "a"}], **answers}


# The boundary


@pytest.mark.parametrize("split_special_tokens", [False, True])
@pytest.mark.parametrize("make", [byte_tokenizer, word_tokenizer])
def test_ids_are_those_of_the_tokenizers_own_call(make, split_special_tokens):
    """They come from its backend, where its call does no more, with the offsets that most rows need."""
    tokenizer = make(merges=(("b", "c"),))
    tokenizer.split_special_tokens = split_special_tokens
    boundary = PromptBoundary(tokenizer)
    texts = ["a", "ab c", "a<s>b", "a</s>", "a\u00e9\u4f60 bc", "a  \n"]
    found = [boundary.split("a", text, keep=True) for text in texts]
    calls = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [[*each.prompt, *each.answers[0]] for each in found] == calls
    assert (len(ids_of(tokenizer, "<s>")) > 1) is split_special_tokens


def test_a_tokenizer_with_a_call_of_its_own_is_called():
    plain = byte_tokenizer()

    class Upper(type(plain)):
        def _encode_plus(self, text, *arguments, **options):
            texts = text.upper() if isinstance(text, str) else [each.upper() for each in text]
            return super()._encode_plus(texts, *arguments, **options)

    own = Upper(tokenizer_object=plain.backend_tokenizer, eos_token="</s>", bos_token="<s>")
    split = PromptBoundary(own).split("a", "abc")
    assert (split.prompt, split.answers) == (ids_of(plain, "A"), [ids_of(plain, "BC")])


def test_a_row_is_encoded_once():
    """Offsets of texts whose answers join the prompt's last token come from the same encodings."""
    boundary, seen = PromptBoundary(byte_tokenizer(merges=(("b", "c"),))), []

    class Counted:
        def __init__(self, backend):
            self.backend = backend

        def encode_batch(self, texts, **options):
            seen.extend(texts)
            return self.backend.encode_batch(texts, **options)

        def encode(self, text, **options):
            seen.append(text)
            return self.backend.encode(text, **options)

    boundary._plain = Counted(boundary._plain)
    assert boundary.split("ab", "abc", "abca").merged
    assert seen == ["ab", "abc", "abca"]
    assert boundary._encodings.keys() == set(seen)
    # Of long texts one encoding is there at a time: three would take a gigabyte at the bound of a row.
    seen.clear()
    long = "a" * 70_000
    split = boundary.split("ab", f"abc{long}", "abca")
    assert split.merged and len(split.answers[0]) == 70_001 and not boundary._encodings


def test_prompt_is_a_prefix():
    pair = tokenise(byte_tokenizer(), text("b", "cd"))
    assert ids(pair) == ([A], [B, EOS], [C, D, EOS])
    assert pair.merged == 0


def test_straddling_token_belongs_to_both_answers():
    pair = tokenise(byte_tokenizer(merges=(("b", "c"),)), text("c", "ca", prompt="ab"))
    assert ids(pair) == ([A], [BC, EOS], [BC, A, EOS])
    assert pair.merged == 1


def test_straddling_token_in_one_answer_moves_the_boundary_of_both():
    pair = tokenise(byte_tokenizer(merges=(("b", "c"),)), text("c", "d", prompt="ab"))
    assert ids(pair) == ([A], [BC, EOS], [B, D, EOS])
    assert pair.merged == 1


def test_straddle_of_white_space_that_offsets_leave_out():
    # ByteLevel's post-processor trims white space off offsets, so the token " d" claims to start
    # at "d"; the boundary must come from untrimmed ones.
    tokenizer = byte_tokenizer(merges=(("Ġ", "d"),))
    pair = tokenise(tokenizer, text("d", "b", prompt="a "))
    space = ids_of(tokenizer, " ")
    assert ids(pair) == ([A], [BC, EOS], [*space, B, EOS])
    assert pair.merged == 1


def test_prompts_that_tokenise_differently_keep_their_own_ids():
    # "ab|c" joins to [a bc], "ab|d" joins "ab": the difference begins before the straddle.
    tokenizer = byte_tokenizer(merges=(("b", "c"), ("a", "b")))
    pair = tokenise(tokenizer, text("c", "d", prompt="ab"))
    assert ids(pair) == (ids_of(tokenizer, "ab"), [C, EOS], [D, EOS])
    assert pair.merged == 0


def test_white_space_that_splits_by_what_follows_it():
    """GPT-2's rule: a space joins the word after it, and so of two line breaks one stands alone."""
    tokenizer = byte_tokenizer(merges=(("Ċ", "Ċ"), ("Ġ", "b")))
    breaks, word = ids_of(tokenizer, "\n\n"), ids_of(tokenizer, " b")
    assert len(breaks) == len(word) == 1
    assert len(ids_of(tokenizer, "a\n\nc")) == 4
    for answers in ((" b", "c"), ("c", " b")):
        pair = tokenise(tokenizer, text(*answers, prompt="a\n\n"))
        expected = [[*ids_of(tokenizer, answer), EOS] for answer in answers]
        assert ids(pair) == ([A, *breaks], *expected)
    pair = tokenise(tokenizer, text("c", "d", prompt="a\n\n"))
    assert ids(pair) == (ids_of(tokenizer, "a\n\nc")[:3], [C, EOS], [D, EOS])


def test_prompt_of_one_joined_token_is_a_bad_row():
    tokenizer = byte_tokenizer(merges=(("b", "c"),))
    with pytest.raises(BadRow, match="no prompt token"):
        tokenise(tokenizer, text("c", "ca", prompt="b"))
    with_bos = byte_tokenizer(bos=True, merges=(("b", "c"),))
    pair = tokenise(with_bos, text("c", "ca", prompt="b"))
    assert ids(pair) == ([BOS], [BC, EOS], [BC, A, EOS])


class WithoutOffsets:
    """A tokenizer that gives ids but no offsets, as the slow ones do."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *args, **kwargs):
        return self._tokenizer(*args, **kwargs)


def test_without_offsets():
    tokenizer = WithoutOffsets(byte_tokenizer(merges=(("b", "c"),)))
    assert ids(tokenise(tokenizer, text("b", "d"))) == ([A], [B, EOS], [D, EOS])
    pair = tokenise(tokenizer, text("c", "d", prompt="ab"))
    assert ids(pair) == ([A, B], [C, EOS], [D, EOS])
    for same in (("c", "cc"), ("c", "ca")):
        pair = tokenise(tokenizer, text(*same, prompt="ab"))
        assert pair.prompt_ids == [A, B]


# SentencePiece, which puts a space before the first word of any text

VICUNA = (
    "{% for m in messages %}{{ ('U: ' if m.role == 'user' else 'A: ') + m.content }}"
    "{{ ' ' if m.role == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
WORDS_JOINED = (("▁", "b"), ("▁", "A"), ("]", "["), ("c", "c"))
SCHEMES = ("legacy", "first", "always")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "template, answers, scored",
    [
        (VICUNA, ("b", "c"), (["▁b"], ["▁", "c"])),
        # The prompt ends with the space that the answer's first word would take.
        (VICUNA.replace("'A:'", "'A: '"), ("b", "cc"), (["b"], ["cc"])),
        (VICUNA.replace("'A:'", "'A: '"), ("\nb", "|b"), (["<0x0A>", "b"], ["|", "b"])),
        # Mistral without a space: "[/INST]" and "[" have a token in common.
        ("{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}", ("b", "c"), None),
    ],
)
def test_a_chat_of_words_with_marks_begins_from_what_inference_is_fed(
    scheme, template, answers, scored
):
    tokenizer = word_tokenizer(template=template, merges=WORDS_JOINED, scheme=scheme)
    row = chat(*answers)
    pair = tokenise(tokenizer, row)
    fed = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_dict=False
    )
    assert pair.prompt_ids == fed
    for answer_ids, pieces in zip((pair.chosen_ids, pair.rejected_ids), scored or ()):
        assert tokenizer.convert_ids_to_tokens(answer_ids) == [*pieces, "</s>"]
    if scored is None:
        assert tokenizer.convert_ids_to_tokens(pair.chosen_ids) == ["[", "b", "]", "</s>"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_texts_of_words_with_marks(scheme):
    tokenizer = word_tokenizer(merges=(("▁", "b"), ("▁b", "c")), scheme=scheme)

    def split(*answers, prompt):
        parts = ids(tokenise(tokenizer, text(*answers, prompt=prompt)))
        return [tokenizer.convert_ids_to_tokens(part) for part in parts]

    assert split(" b", " c", prompt="a:") == [
        ["<s>", "▁", "a", ":"],
        ["▁b", "</s>"],
        ["▁", "c", "</s>"],
    ]
    # "a b|c" ends with [▁bc], "a b|d" with [▁b d].
    assert split("c", "d", prompt="a b") == [
        ["<s>", "▁", "a"],
        ["▁bc", "</s>"],
        ["▁b", "d", "</s>"],
    ]
    # "ab|c" is [▁ a bc], "ab|d" is [▁ab d].
    tokenizer = word_tokenizer(merges=(("b", "c"), ("a", "b"), ("▁", "ab")), scheme=scheme)
    assert split("c", "d", prompt="ab") == [["<s>", "▁ab"], ["c", "</s>"], ["d", "</s>"]]


MERGES = (("a", "b"), ("b", "c"), ("Ġ", "a"), ("ab", "c"), ("Ċ", "Ċ"), ("Ã", "¼"), ("Ġ", "Ġ"))
WORDS = st.text(alphabet="abc \nü'.1", min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(prompt=WORDS, chosen=WORDS, rejected=WORDS | st.text(min_size=1, max_size=6))
def test_prompt_and_answer_are_the_tokens_of_the_whole_text(prompt, chosen, rejected):
    tokenizer = byte_tokenizer(merges=MERGES)
    row = PairRow("f:1", prompt, chosen, rejected, {})
    config = DataConfig(train="f", add_eos=False)
    try:
        pair = RowTokeniser(tokenizer, config)(row)
    except (BadRow, Dropped):
        return
    own = pair.prompt_ids == ids_of(tokenizer, prompt)
    for answer, answer_ids in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
        whole = pair.prompt_ids + answer_ids
        alone = own and answer_ids == ids_of(tokenizer, answer)
        assert alone or whole == ids_of(tokenizer, prompt + answer)
        assert tokenizer.decode(whole) == prompt + answer
    assert prompt.encode().startswith(tokenizer.decode(pair.prompt_ids).encode())
    if not pair.merged:
        assert tokenizer.decode(pair.prompt_ids) == prompt


# BOS


def test_bos_is_added_once():
    pair = tokenise(byte_tokenizer(bos=True), text("b", "c"))
    assert pair.prompt_ids == [BOS, A]
    assert pair.bos_added == 1
    for prompt in ("<s>a", "<s><s>a"):
        pair = tokenise(byte_tokenizer(bos=True), text("b", "c", prompt=prompt))
        assert ids(pair) == ([BOS, A], [B, EOS], [C, EOS])
        assert pair.bos_added == 0


def test_no_bos_where_the_tokenizer_adds_none():
    pair = tokenise(byte_tokenizer(), text("b", "c"))
    assert (pair.prompt_ids, pair.bos_added) == ([A], 0)


def test_template_with_bos_gets_no_second():
    tokenizer = byte_tokenizer(bos=True, template="{{ bos_token }}" + CHATML)
    pair = tokenise(tokenizer, chat())
    assert pair.prompt_ids.count(BOS) == 1
    assert pair.prompt_ids[0] == BOS
    assert pair.bos_added == 0


def test_a_chat_begins_as_its_template_begins_it():
    """Zephyr: the tokenizer puts BOS before texts, and the template none. Inference feeds none."""
    tokenizer = chat_tokenizer(bos=True)
    pair = tokenise(tokenizer, chat())
    fed = tokenizer.apply_chat_template(
        chat()["prompt"], add_generation_prompt=True, return_dict=False
    )
    assert (pair.prompt_ids, pair.bos_added) == (fed, 0)
    assert BOS not in fed


def test_bos_inside_an_answer_is_a_bad_row():
    with pytest.raises(BadRow, match="BOS inside chosen"):
        tokenise(byte_tokenizer(), text("<s>b", "c"))


# The end of turn


@pytest.mark.parametrize("end", ["", "</s>", "</s></s>", "</s>\n", "</s> </s>"])
def test_text_ends_with_one_eos(end):
    pair = tokenise(byte_tokenizer(), text("b" + end, "c"))
    assert pair.chosen_ids == [B, EOS]
    assert pair.eos_added == 1 + (end == "")


def test_without_add_eos():
    pair = tokenise(byte_tokenizer(), text("b", "c</s></s>"), add_eos=False)
    assert ids(pair) == ([A], [B], [C, EOS])


def test_eos_inside_a_text_stays():
    pair = tokenise(byte_tokenizer(), text("b</s>c", "c"))
    assert pair.chosen_ids == [B, EOS, C, EOS]


def test_eos_that_is_missing_names_the_option():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="data.add_eos=true, but the tokenizer has no EOS"):
        tokenise(tokenizer, text("b", "c"))


@pytest.mark.parametrize(
    "tokenizer, eos_ids",
    [
        (chat_tokenizer(), ()),  # the template's end of turn is EOS
        (byte_tokenizer(template=CHATML), (IM_END,)),  # one of the model's eos ids
        (byte_tokenizer(template=CHATML), ()),  # neither: the last special token of the tail
    ],
)
def test_chat_ends_with_the_end_of_turn(tokenizer, eos_ids):
    pair = tokenise(tokenizer, chat(), eos_ids)
    prompt = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert ids(pair) == (ids_of(tokenizer, prompt), [B, IM_END], [C, IM_END])
    assert pair.eos_added == 0


def test_template_without_end_of_turn_gets_eos():
    template = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    pair = tokenise(byte_tokenizer(template=template), chat())
    newline = ids_of(byte_tokenizer(), "\n")
    assert ids(pair)[1:] == ([B, *newline, EOS], [C, *newline, EOS])
    assert pair.eos_added == 2


# Templates


def test_template_that_loses_the_prompt_is_a_bad_row():
    template = "{{ messages | length }}{{ messages[-1].content }}"
    with pytest.raises(BadRow, match="does not keep the prompt as a prefix.*chosen"):
        tokenise(byte_tokenizer(template=template), chat())


def test_template_that_refuses_is_a_bad_row():
    with pytest.raises(BadRow, match="refuses the messages: no users"):
        tokenise(byte_tokenizer(template="{{ raise_exception('no users') }}"), chat())


def test_missing_template_names_the_remedy():
    with pytest.raises(UserError, match="f.jsonl:7.*no chat template; set data.chat_template"):
        tokenise(byte_tokenizer(), chat())


def test_template_from_a_file(tmp_path):
    path = tmp_path / "chatml.jinja"
    path.write_text(CHATML)
    tokenizer = byte_tokenizer()
    expected = ids(tokenise(byte_tokenizer(template=CHATML), chat()))
    assert ids(tokenise(tokenizer, chat(), chat_template=str(path))) == expected
    assert tokenizer.chat_template is None
    with pytest.raises(UserError, match="data.chat_template='nowhere' cannot be read"):
        tokenise(tokenizer, chat(), chat_template="nowhere")


def test_tools_and_template_arguments_reach_the_template():
    template = "{{ tools[0].name if tools else '' }}{{ mood }}" + CHATML
    raw = chat() | {"tools": [{"name": "calc"}], "chat_template_kwargs": {"mood": "glad"}}
    tokenizer = byte_tokenizer(template=template)
    prompt = tokenizer.decode(tokenise(tokenizer, raw).prompt_ids)
    assert prompt.startswith("calcglad<|im_start|>user")


# Truncation: max_length 8, a prompt may always keep 3

P9, LONG, SHORT = list(range(10, 19)), list(range(30, 37)), [40, 41]


def cut(prompt, chosen, rejected=SHORT, lead=0, **options):
    config = DataConfig(**({"train": "f", "max_length": 8, "max_prompt_length": 3} | options))
    answers = {"chosen": chosen, "rejected": rejected}
    fitted = fit("f.jsonl:7", prompt, answers, config, lead)
    return fitted.prompt, *fitted.answers, fitted.prompt_cut, fitted.answers_cut


def test_what_fits_is_left_alone():
    for policy in ("keep_end", "keep_start", "drop", "error"):
        assert cut(P9[:4], LONG[:4], truncation=policy) == (P9[:4], LONG[:4], SHORT, 0, 0)


def test_keep_end_and_keep_start():
    assert cut(P9, LONG[:4]) == (P9[-4:], LONG[:4], SHORT, 5, 0)
    assert cut(P9, LONG[:4], truncation="keep_start") == (P9[:4], LONG[:4], SHORT, 5, 0)


def test_answers_are_cut_only_past_the_prompts_reserve():
    assert cut(P9, LONG) == (P9[-3:], LONG[:5], SHORT, 6, 1)
    assert cut(P9[:1], LONG + LONG[:2]) == (P9[:1], LONG, SHORT, 0, 1)
    assert cut(P9, LONG, max_prompt_length=None)[:2] == (P9[-4:], LONG[:4])


def test_keep_end_keeps_bos_first():
    assert cut([1, *P9], LONG[:4], lead=1)[0] == [1, *P9[-3:]]
    assert cut([1, 2, *P9], LONG[:4], lead=2)[0] == [1, 2, *P9[-2:]]
    assert cut([1, *P9], LONG, lead=1, max_prompt_length=1)[0] == [1]


def test_drop_and_error():
    with pytest.raises(Dropped, match="longer than max_length: 11 > 8 tokens"):
        cut(P9, LONG[:1], truncation="drop")
    with pytest.raises(UserError, match="f.jsonl:7: 9 prompt, 7 chosen and 2 rejected.*to 16"):
        cut(P9, LONG, truncation="error")


def test_pairs_with_nothing_to_learn_are_dropped():
    with pytest.raises(Dropped, match="an answer has no tokens"):
        cut(P9, [])
    with pytest.raises(Dropped, match="the answers are the same tokens"):
        cut(P9, SHORT)
    with pytest.raises(Dropped, match="same once cut: all keep 5 tokens"):
        cut(P9, LONG, LONG[:6] + [1])
