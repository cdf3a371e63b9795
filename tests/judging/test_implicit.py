"""The implicit reward of a model against a reference."""

from __future__ import annotations

import pytest
import torch

from dpo_fast.data.config import DataConfig
from dpo_fast.errors import UserError
from dpo_fast.judging.implicit import ImplicitJudge
from dpo_fast.judging.verdict import FAILED
from dpo_fast.models.config import ModelSection
from tests.support.image_rows import picture
from tests.support.judging import row, section
from tests.support.models import write_model

ROWS = (
    row("it is", "it is not so", "no", prompt="is it? "),
    row("perhaps", "never", prompt="a longer question than that: "),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("implicit")
    return [str(write_model(folder / f"model-{seed}", seed=seed)) for seed in (0, 1)]


def judge(models, policy=None, data=None, **options) -> ImplicitJudge:
    own = section(type="implicit", reference=models[1], dtype="fp32", **options)
    model = ModelSection(path=policy or models[0])
    return ImplicitJudge(own, model, DataConfig(train="x", **(data or {})), "cpu")


def scores(judge, *rows):
    (found,) = judge([list(rows)])
    return [[verdict.score for verdict in each.verdicts] for each in found]


def log_prob(path, prompt, answer) -> float:
    """By transformers alone, with the EOS that training adds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    start = tokenizer(prompt)["input_ids"]
    end = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(path)(torch.tensor([start + end])).logits[0]
    logp = logits.double().log_softmax(-1)[len(start) - 1 : -1]
    return logp.gather(1, torch.tensor(end)[:, None]).sum().item()


def test_it_is_beta_times_the_difference_of_log_probs(models):
    found = scores(judge(models, beta=0.3, batch_size=2), *ROWS)
    for own, each in zip(found, ROWS):
        expected = [
            0.3 * (log_prob(models[0], each.prompt, text) - log_prob(models[1], each.prompt, text))
            for text in each.completions
        ]
        assert own == pytest.approx(expected, abs=1e-4)
    (short,) = scores(judge(models, beta=0.3, per_token=True), row("no", prompt="is it? "))
    assert short[0] == pytest.approx(found[0][2] / 3, abs=1e-5)


def test_a_model_against_itself_says_nothing(models):
    assert scores(judge(models, policy=models[1]), *ROWS) == [[0.0] * 3, [0.0] * 2]


def test_a_row_that_train_would_drop_fails_alone(models):
    options = {"max_length": 12, "truncation": "drop"}
    (found,) = judge(models, data=options)([[row("no", "n" * 20, prompt="is ")]])
    good, bad = found[0].verdicts
    assert good.score is not None and bad.word == FAILED
    assert "longer than max_length" in bad.why


def test_a_reference_with_a_smaller_vocabulary_is_refused(models, tmp_path):
    small = write_model(tmp_path / "small", vocab=100)
    with pytest.raises(UserError, match=r"judge\.reference=.* do not share a tokenizer"):
        scores(judge([models[0], str(small)]), *ROWS)


def test_a_model_that_sees_no_images_says_so(models, tmp_path):
    (found,) = judge(models)([[row("no", prompt="is ", images=["a.png"]), row("no", prompt="is ")]])
    assert [each.verdicts[0].word == FAILED for each in found] == [True, False]
    assert "is not there" in found[0].verdicts[0].why
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"the data has images, and model\.path=.* takes none"):
        scores(judge(models), row("no", prompt="is ", images=[str(tmp_path / "a.png")]))
