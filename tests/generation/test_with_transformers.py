"""transformers' `generate`: batches change nothing, seeds decide, and the model's own defaults do not."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM

from dpo_fast.data.config import DataConfig
from dpo_fast.errors import UserError
from dpo_fast.generation.batches import Batch, batches_of, seed_of
from dpo_fast.generation.config import SampleSection
from dpo_fast.generation.encode import PromptCodec
from dpo_fast.generation.engine import Request, cut_at_stop
from dpo_fast.generation.prompts import Prompt
from dpo_fast.generation.with_transformers import TransformersEngine
from dpo_fast.models import ScoringModel
from dpo_fast.models.layer_kinds import carried_state
from tests.support.architectures import ARCHITECTURES, make
from tests.support.tokenizers import EOS, IM_START, PAD, byte_tokenizer

TEXTS = ["a", "who is it? ", "two", "one or three", "why so?", "four or five of them"]


def engine(model, **options) -> TransformersEngine:
    codec = PromptCodec(byte_tokenizer(), DataConfig(train="rows"))
    section = SampleSection(prompts="rows", **{"max_new_tokens": 6, **options})
    return TransformersEngine(ScoringModel(model), codec, section)


def requests(made: TransformersEngine, texts=TEXTS) -> list[Request]:
    prompts = [Prompt(f"row:{i}", text) for i, text in enumerate(texts)]
    return [Request(each, made.codec.encode(each), made.codec.stop_ids(each)) for each in prompts]


def llama(vocabulary: int = 261, **sizes):
    return make("llama", "sdpa", vocab_size=vocabulary, **sizes)


def ids_of(made: TransformersEngine, size: int, texts=TEXTS, generations=1, seed=0) -> dict:
    asked = requests(made, texts)
    batches = batches_of([len(each.ids) for each in asked], generations, size, seed)
    found = made.complete(batches, asked)
    return {m: list(c.ids) for batch, all_ in found for m, c in zip(batch.members, all_)}


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "gpt2"])
def test_greedy_completions_are_those_of_each_prompt_alone(name):
    """By the model's own logits, without a cache, a mask or padding."""
    model = make(name, vocab_size=261, max_position_embeddings=64)
    alone = {}
    for place, request in enumerate(requests(engine(model))):
        ids = list(request.ids)
        while len(ids) < len(request.ids) + 6 and (len(ids) == len(request.ids) or ids[-1] != EOS):
            with torch.no_grad():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
        alone[place, 0] = ids[len(request.ids) :]
    assert ids_of(engine(model, temperature=0, num_generations=1), 4) == alone


def test_state_that_padding_would_change_is_seen_and_lengths_are_kept_alike():
    config = MambaConfig(vocab_size=261, hidden_size=32, num_hidden_layers=2, state_size=4)
    assert carried_state(MambaForCausalLM(config)) and not carried_state(llama())
    batches = batches_of([3, 5, 3, 3, 5], 2, 6, 0, alike=True)
    assert [[place for place, _ in each.members] for each in batches] == [
        [1, 1, 4, 4],
        [0, 0, 2, 2, 3, 3],
    ]


def test_batches_hold_every_completion_once_from_the_longest_on():
    batches = batches_of([3, 9, 5], 3, 4, 7)
    members = [member for batch in batches for member in batch.members]
    assert members == [(place, number) for place in (1, 2, 0) for number in range(3)]
    assert [len(batch.members) for batch in batches] == [4, 4, 1]
    assert len({batch.seed for batch in batches}) == 3
    assert batches == batches_of([3, 9, 5], 3, 4, 7) != batches_of([3, 9, 5], 3, 4, 8)
    assert all(0 <= seed_of(7, n) < 2**63 for n in range(99))


def test_a_batch_draws_the_same_whatever_came_before_it():
    made = engine(llama())
    asked = requests(made)
    batches = batches_of([len(each.ids) for each in asked], 4, 6, 3)
    whole = list(made.complete(batches, asked))
    state = torch.random.get_rng_state()
    assert list(made.complete(batches[2:], asked)) == whole[2:]
    assert torch.equal(torch.random.get_rng_state(), state)  # a run's own draws go on as they would
    texts = [each.text for _, found in whole for each in found]
    assert len(set(texts)) > 20


def test_draws_follow_the_models_distribution_at_a_temperature():
    model = llama(initializer_range=0.3)
    made = engine(model, max_new_tokens=1, temperature=1.5)
    (request,) = requests(made, ["a"])
    with torch.no_grad():
        logits = model(torch.tensor([request.ids])).logits[0, -1]
    expected = (logits / 1.5).softmax(-1)
    count = 4000
    batch = Batch(0, 5, tuple((0, n) for n in range(count)))
    ((_, found),) = made.complete([batch], [request])
    seen = Counter(each.ids[0] for each in found)
    for index in expected.topk(8).indices.tolist():
        p = expected[index].item()
        assert abs(seen[index] / count - p) < 4 * (p * (1 - p) / count) ** 0.5


@pytest.mark.parametrize(
    "options, most", [({"top_k": 2}, 2), ({"top_p": 1e-6}, 1), ({"min_p": 0.999}, 1), ({}, 200)]
)
def test_what_may_be_drawn_is_limited(options, most):
    made = engine(llama(), max_new_tokens=1, **options)
    batch = Batch(0, 5, tuple((0, n) for n in range(200)))
    ((_, found),) = made.complete([batch], requests(made, ["a"]))
    drawn = {each.ids[0] for each in found}
    assert len(drawn) <= most and (most < 200 or len(drawn) > 50)


def test_the_models_own_generation_config_changes_nothing():
    """Qwen's has a repetition penalty, a top-k and a top-p, others suppress tokens."""
    model = llama()
    plain = ids_of(engine(model), 4)
    own = GenerationConfig(
        repetition_penalty=9.0,
        top_k=1,
        top_p=0.1,
        temperature=0.1,
        suppress_tokens=list(range(100, 261)),
        min_new_tokens=6,
    )
    model.generation_config = own
    assert ids_of(engine(model), 4) == plain
    assert model.generation_config is own  # as it was


def test_a_stopping_text_ends_a_completion_and_is_no_part_of_it():
    made = engine(llama(), max_new_tokens=40, stop=["e", "xyz"])
    found = made.complete(batches_of([5] * 6, 6, 12, 0), requests(made))
    found = [each for _, all_ in found for each in all_]
    stopped = [each for each in found if len(each.ids) < 40 and each.ids[-1] != EOS]
    assert stopped and not any("e" in each.text for each in found)
    assert all(each.finish_reason == "stop" for each in stopped)
    decode = made.codec.tokenizer.decode
    assert all("e" in decode(each.ids) for each in stopped)
    assert cut_at_stop("one, two. three", [".", ", "]) == ("one", True)
    assert cut_at_stop("one", ["two"]) == ("one", False)


def test_a_stopping_text_that_begins_in_the_prompt_stops_nothing():
    made = engine(llama(), max_new_tokens=12, stop=[f"?{chr(n)}" for n in range(32, 127)])
    asked = requests(made, ["why?"])
    found = [each for _, all_ in made.complete(batches_of([4], 32, 32, 0), asked) for each in all_]
    assert any(" " <= each.text[:1] <= "~" for each in found)  # what would complete one
    assert not any(list(each.ids[-2:]) == [0, 0] for each in found)  # padding after a stop


def test_a_stopping_text_in_the_name_of_a_special_token():
    made = engine(llama(), max_new_tokens=24, stop=["im_s"])
    asked = requests(made, ["why?"])
    found = [each for _, all_ in made.complete(batches_of([4], 64, 64, 0), asked) for each in all_]
    early = [each for each in found if len(each.ids) < 24]
    assert IM_START in {each.ids[-1] for each in early}
    assert all(each.finish_reason == "stop" and PAD not in each.ids[-1:] for each in early)


def test_reasons_tell_what_ended_by_itself():
    model = llama()
    made = engine(model, max_new_tokens=30)
    found = [
        c for _, all_ in made.complete(batches_of([5] * 6, 8, 16, 0), requests(made)) for c in all_
    ]
    for each in found:
        assert (each.finish_reason == "stop") == (each.ids[-1] == EOS)
        assert EOS not in each.ids[:-1] and "</s>" not in each.text
        assert each.finish_reason == "stop" or len(each.ids) == 30
    assert {each.finish_reason for each in found} == {"stop", "length"}


def test_a_model_without_probabilities_is_told():
    model = llama()
    model.model.norm.weight.data.fill_(float("inf"))
    made = engine(model)
    with pytest.raises(
        UserError, match="nan or inf, for a batch with row:0; look at the model and"
    ):
        list(made.complete(batches_of([5], 2, 2, 0), requests(made, ["a"])))


def test_a_model_in_training_goes_on_in_training():
    made = engine(llama())
    made.scoring.train()
    list(made.complete(batches_of([5] * 6, 1, 6, 0), requests(made)))
    assert made.scoring.training
