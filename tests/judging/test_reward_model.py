"""A sequence classifier as judge: its texts, batches, labels, and what is no reward model."""

from __future__ import annotations

import pytest
import torch

from dpo_fast.errors import UserError
from dpo_fast.judging.classifier import adapter_labels
from dpo_fast.judging.reward_model import RewardModelJudge
from dpo_fast.judging.verdict import FAILED
from tests.support.judging import row, section
from tests.support.tokenizers import CHATML, byte_tokenizer

CHAT = [{"role": "user", "content": "why?"}]


def write(folder, *, labels=1, template=None, pad=0, names=None, **options):
    """A Llama classifier of some thousand parameters."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = byte_tokenizer(bos=True, template=template)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        num_labels=labels,
        pad_token_id=pad,
        max_position_embeddings=64,
        **options,
    )
    if names:
        config.id2label = dict(enumerate(names))
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("reward"), template=CHATML)


def judge(path, **options):
    return RewardModelJudge(
        section(type="reward_model", path=str(path), dtype="fp32", **options), "cpu"
    )


def scores(judge, *rows):
    (found,) = judge([list(rows)])
    return [[verdict.score for verdict in each.verdicts] for each in found]


def alone(path, text, special=False) -> torch.Tensor:
    """The logits of one text, by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(path)(input_ids=ids).logits[0]


def test_scores_are_those_of_each_text_alone(path):
    rows = [row("a", "bcd" * 5, "e f", prompt=CHAT), row("g" * 20, prompt=CHAT, system="be kind")]
    found = scores(judge(path, batch_size=3), *rows)
    texts = [
        [
            f"{system}<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"
            for text in each.completions
        ]
        for each, system in zip(rows, ("", "<|im_start|>system\nbe kind<|im_end|>\n"))
    ]
    texts[1] = [text[-64:] for text in texts[1]]  # the model's positions; a byte is a token, mostly
    for got, own in zip(found[0], texts[0]):
        assert got == pytest.approx(alone(path, own).item(), abs=1e-5)
    assert len(set(found[0])) == 3


def test_a_decoder_without_a_padding_token_scores_the_last_token(tmp_path):
    path = write(tmp_path, pad=None)
    one = row("ab", "cdef gh", "\x00", prompt="x y ")
    found = scores(judge(path), one)
    expected = [alone(path, f"x y {text}", special=True).item() for text in one.completions]
    assert found == [pytest.approx(expected, abs=1e-5)]


def test_text_goes_through_the_template_unless_it_is_not_wanted(path):
    text = row("ab", prompt="why?")
    chat = row("ab", prompt=CHAT)
    assert scores(judge(path), text) == scores(judge(path), chat)
    bare = judge(path, apply_chat_template=False)
    assert scores(bare, text)[0][0] == pytest.approx(
        alone(path, "why?ab", special=True).item(), abs=1e-5
    )
    assert scores(bare, chat) == scores(judge(path), chat)


def test_a_prefill_is_continued(path):
    whole = row("so it is", prompt=CHAT)
    begun = row("it is", prompt=[*CHAT, {"role": "assistant", "content": "so "}])
    assert scores(judge(path), begun) == scores(judge(path), whole)


def test_too_long_texts_keep_their_end_and_are_counted(path):
    (long,) = judge(path, max_length=20)([[row("a" * 50, "b", prompt=CHAT)]])
    assert long[0].facts == {"texts cut to judge.max_length": 2}
    (short,) = judge(path)([[row("b", prompt=CHAT)]])
    assert not short[0].facts
    with pytest.raises(UserError, match=r"judge\.max_length=65 is more than .* takes: 64"):
        judge(path, max_length=65)


def test_a_classifier_of_the_answer_alone(path):
    own = scores(judge(path, input="completion"), row("fine", prompt=CHAT))
    assert own[0][0] == pytest.approx(alone(path, "fine", special=True).item(), abs=1e-5)


def test_one_of_several_labels(tmp_path):
    path = write(tmp_path, labels=3, names=["bad", "so", "good"])
    with pytest.raises(UserError, match="has 3 labels: bad, so, good; name one with judge.label"):
        judge(path)
    with pytest.raises(UserError, match="judge.label='goood': expected one of bad, so, good"):
        judge(path, label="goood")
    with pytest.raises(UserError, match="judge.label=3: expected"):
        judge(path, label=3)
    one = row("ab", prompt="x")
    logits = alone(path, "xab", special=True)
    for label, place in (("good", 2), (0, 0)):
        (((score,)),) = scores(judge(path, label=label), one)
        assert score == pytest.approx(logits[place].item(), abs=1e-5)


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    from tests.support.models import write_model

    path = write_model(tmp_path / "chat")
    with pytest.raises(
        UserError, match=r"is no reward model: it is of LlamaForCausalLM.*score\.weight"
    ):
        judge(path)
    with pytest.raises(UserError, match=r"judge\.path=.*is not a model folder"):
        judge(tmp_path)


def test_an_adapter_brings_its_head(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from tests.support.models import write_model

    base = write_model(
        tmp_path / "chat"
    )  # a model without such a head, and with two labels by default
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    lora = LoraConfig(
        r=2, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False
    )
    adapted = get_peft_model(model, lora)
    torch.nn.init.normal_(adapted.base_model.model.score.modules_to_save["default"].weight)
    adapted.save_pretrained(tmp_path)
    byte_tokenizer(bos=True).save_pretrained(tmp_path)
    ids = byte_tokenizer(bos=True)("xab", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits.item()
    found = scores(judge(tmp_path, apply_chat_template=False), row("ab", prompt="x"))
    assert found[0][0] == pytest.approx(expected, abs=1e-4)
    assert adapter_labels(tmp_path) == 1


def test_messages_that_the_template_refuses_fail_alone(tmp_path):
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + CHATML
    )
    path = write(tmp_path, template=refusing)
    (found,) = judge(path)([[row("a", prompt=CHAT), row("b", prompt=CHAT, system="s")]])
    good, bad = (each.verdicts[0] for each in found)
    assert good.score is not None
    assert bad.word == FAILED and "the chat template refuses the messages: no system" in bad.why


def test_an_encoder_reads_pairs(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"sep_token": "</s>", "cls_token": "<s>"})
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        initializer_range=0.3,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pair = judge(tmp_path).encoded(row("answer", prompt="question"), "answer")
    assert pair["input_ids"] == tokenizer("question", "answer")["input_ids"]
    found = scores(judge(tmp_path), row("answer", "other words", prompt="question"))
    assert len(set(found[0])) == 2


@pytest.mark.filterwarnings("ignore")
def test_padding_that_the_model_does_not_have(tmp_path):
    path = write(tmp_path / "model", pad=-1)
    (found,) = scores(judge(path), row("a", "much longer", prompt="b "))
    each = [alone(path, f"b {text}", special=True).item() for text in ("a", "much longer")]
    assert found == pytest.approx(each, abs=1e-5)


def test_positions_that_begin_behind_the_padding(tmp_path):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    tokenizer = byte_tokenizer(bos=True)
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = RobertaConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=34, **sizes
    )
    config.num_labels = 1
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    found = judge(tmp_path)
    assert found.limit == 32 and scores(found, row("x" * 99, "y")) is not None


def test_a_model_that_cannot_take_the_texts_is_named(path, monkeypatch):
    found = judge(path)
    monkeypatch.setattr(found.model, "forward", lambda **_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(UserError, match="cannot score texts of up to .* tokens: inconsistent"):
        scores(found, row("a"))
