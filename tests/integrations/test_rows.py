"""`PreferenceTrainer` on texts and messages: the tokens of `dpo-fast train`, and TRL's loss."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import load_examples
from dpo_fast.errors import UserError
from dpo_fast.integrations.arguments import objective_of
from dpo_fast.integrations.collator import PreferenceCollator
from dpo_fast.integrations.rows import TokenRows, token_rows, token_sets
from dpo_fast.integrations.transformers import PreferenceTrainer
from dpo_fast.losses import LossOptions, Objective
from tests.support.models import LIKE_SGD, write_model, write_pairs
from tests.support.tokenizers import byte_tokenizer

# Ends a turn with the EOS token alone. Of a template that writes a newline behind it, TRL scores the
# newline as well, which the model never writes.
TEMPLATE = (
    "{% for each in messages %}{{ each['role'] + ': ' + each['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_model(folder / "model")
    byte_tokenizer(bos=True, template=TEMPLATE).save_pretrained(folder / "model")
    write_pairs(folder / "pairs.jsonl", count=8)
    return folder


@pytest.fixture(scope="module")
def tokenizer(place):
    return AutoTokenizer.from_pretrained(place / "model")


@pytest.fixture(scope="module")
def texts(place) -> list[dict]:
    return [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def chats(texts) -> list[dict]:
    """Messages, with the prompt in a column of its own."""
    return [
        {name: (user if name == "prompt" else assistant)(text) for name, text in row.items()}
        for row in texts
    ]


def without_prompt(texts) -> list[dict]:
    """Whole conversations, from which the prompt is found."""
    return [
        {side: user(row["prompt"]) + assistant(row[side]) for side in ("chosen", "rejected")}
        for row in texts
    ]


def several_turns(texts) -> list[dict]:
    """Answers of two turns, between which the user speaks: those tokens are not scored."""
    return [
        {
            "prompt": user(row["prompt"]),
            **{
                side: assistant(row[side]) + user("sure? ") + assistant(row[side] + "!")
                for side in ("chosen", "rejected")
            },
        }
        for row in texts
    ]


FORMS = {
    "texts": lambda texts: texts,
    "chats": chats,
    "no prompt": without_prompt,
    "several turns": several_turns,
    "other names": lambda texts: [
        {"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in texts
    ],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("container", [list, Dataset.from_list])
def test_the_tokens_are_those_of_dpo_fast_train(form, container, texts, tokenizer, tmp_path):
    rows = FORMS[form](texts)
    options = {"columns": {"prompt": "question"}} if form == "other names" else {}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(
        train=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), **options
    )
    expected = load_examples(config, tokenizer, split="train")
    found = token_rows(container(rows), "train_dataset", tokenizer, options, [])
    assert len(found) == len(expected) == len(rows)
    for mine, theirs in zip(found, expected):
        assert mine == {name: theirs[name] for name in mine}
        assert ("chosen_scored" in mine) == (form == "several turns")


def trainer(place, rows, output, **options):
    args = TrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        max_steps=1,
        save_strategy="no",
        per_device_train_batch_size=8,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        **LIKE_SGD,
    )
    options = {"processing_class": AutoTokenizer.from_pretrained(place / "model")} | options
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    return PreferenceTrainer(model, args, train_dataset=rows, **options)


def first_loss(trainer) -> float:
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def test_a_name_is_an_objective(place, texts, tmp_path):
    assert objective_of(["sigmoid", "sft"]) == Objective(("sigmoid", "sft"), (1.0, 1.0))
    named = first_loss(trainer(place, texts, tmp_path, objective="simpo"))
    built = first_loss(trainer(place, texts, tmp_path, objective=Objective(("simpo",), (1.0,))))
    assert named == built
    beta = Objective(("simpo",), (1.0,), LossOptions(beta=2.0))
    assert named != first_loss(trainer(place, texts, tmp_path, objective=beta))


@pytest.mark.parametrize("container", [list, Dataset.from_list])
def test_tokens_that_are_not_scored_stay_so(container, place, texts, tokenizer, tmp_path):
    """Trainer removes columns that it does not know."""
    rows = token_rows(several_turns(texts), "train_dataset", tokenizer, {}, [])
    without = [{k: v for k, v in row.items() if not k.endswith("_scored")} for row in rows]
    losses = [
        first_loss(trainer(place, container(list(each)), tmp_path, objective="simpo"))
        for each in (rows, without)
    ]
    assert losses[0] == first_loss(
        trainer(place, several_turns(texts), tmp_path, objective="simpo")
    )
    assert losses[0] != losses[1]


@pytest.mark.peers
@pytest.mark.parametrize("form", ["texts", "chats", "no prompt"])
def test_the_loss_of_trl_on_the_same_rows(form, place, texts, tmp_path):
    trl = pytest.importorskip("trl")
    reference = AutoModelForCausalLM.from_pretrained(place / "model")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rows = Dataset.from_list(FORMS[form](texts))
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        max_steps=1,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=8,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        **LIKE_SGD,
    )
    theirs = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(place / "model"),
        ref_model=copy.deepcopy(reference),
        args=args,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(place / "model"),
    )
    expected = first_loss(theirs)
    found = first_loss(trainer(place, rows, tmp_path / "ours", reference=reference))
    assert abs(expected - 0.6931) > 1e-3 and found == pytest.approx(expected, rel=1e-4)


ROWS = {  # one row: what is said of it
    "no columns that fit": (
        {"question": "a", "good": "b", "bad": "c"},
        r"train_dataset\[0\]: .*Its columns are question, good, bad\. This trainer takes rows with prompt",
    ),
    "one sequence": (
        {"input_ids": [1, 2], "labels": [-100, 2]},
        "has the columns input_ids, labels: one sequence and its labels",
    ),
    "token ids of other names": (
        {"prompt_input_ids": [1], "chosen_input_ids": [2], "rejected_input_ids": [3]},
        r"rename_columns\(\{'prompt_input_ids': 'prompt_ids'",
    ),
    "half of it": (
        {"prompt_ids": [1], "chosen_ids": [2]},
        "has prompt_ids, chosen_ids and no rejected",
    ),
    "a completion": (
        {"prompt": "a", "completion": "b", "label": True},
        "is a completion with a label; this trainer takes pairs",
    ),
    "equal answers": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "train_dataset"),
    "no row": ("a text", r"train_dataset\[0\] is a str; expected a mapping"),
}


@pytest.mark.parametrize("name", ROWS)
def test_other_rows_are_told_what_would_fit(name, tokenizer):
    row, message = ROWS[name]
    with pytest.raises(UserError, match=message):
        token_rows([row], "train_dataset", tokenizer, {}, [])


def test_a_bad_row_is_named_or_left_out(texts, tokenizer, caplog):
    rows = [*texts[:3], {"prompt": "a", "chosen": "b", "rejected": None}]
    with pytest.raises(UserError, match=r"train_dataset\[3\]: .*on_bad_row"):
        token_rows(rows, "train_dataset", tokenizer, {}, [])
    with caplog.at_level("WARNING", "dpo_fast"):
        assert len(token_rows(rows, "train_dataset", tokenizer, {"on_bad_row": "skip"}, [])) == 3
    assert "train_dataset: 1 of 4 rows left out" in caplog.text


def test_what_is_no_data_set_is_told(texts, tokenizer):
    def check(data, message, options=None, tokenizer=tokenizer):
        with pytest.raises(UserError, match=message):
            token_rows(data, "train_dataset", tokenizer, options, [])

    check(iter(texts), "is a list_iterator; expected a list of rows or a map-style")
    check({"train": texts}, "is the splits train; expected one data set")
    check([], "has no rows")
    check(texts, "there is no tokenizer: pass processing_class=tokenizer", tokenizer=None)
    check(texts, "choose from format, columns", {"max_len": 3})
    check(texts, "max_length", {"max_length": 0})
    ids = token_rows(texts, "train_dataset", tokenizer, {}, [])
    assert token_rows(ids, "train_dataset", None, {}, []) is ids
    check(ids, "are token ids; leave it out", {"max_length": 3})
    assert isinstance(ids, TokenRows) and ids[-1] == ids[len(ids) - 1]


@pytest.mark.parametrize("kind", ["pandas", "arrow", "torch"])
def test_a_format_of_the_data_set_changes_nothing(kind, texts, tokenizer):
    plain, formatted = (
        list(token_rows(each, "train_dataset", tokenizer, {}, []))
        for each in (texts, Dataset.from_list(texts).with_format(kind))
    )
    assert plain == formatted


def test_answers_of_ids_that_repeat_the_prompt_are_told(texts, tokenizer):
    ids = list(token_rows(texts, "train_dataset", tokenizer, {}, []))
    whole = [
        {k: v if k == "prompt_ids" else row["prompt_ids"] + v for k, v in row.items()}
        for row in ids
    ]
    for rows in (whole, Dataset.from_list(whole), Dataset.from_list(whole).with_format("torch")):
        with pytest.raises(UserError, match="begin with prompt_ids, in the first 8 rows"):
            token_rows(rows, "train_dataset", None, {}, [])
    some = [*whole[:7], ids[7]]  # an answer may begin with the words of its question
    assert token_rows(some, "train_dataset", None, {}, []) is some


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([-100, 5], "chosen_ids has the id -100, and the model those from 0 to 9"),
        ([5, 10], "chosen_ids has the id 10, and the model those from 0 to 9"),
        ([[5, 6]], "chosen_ids is no list of int"),
        ([[5], [6, 7]], "chosen_ids is no list of int"),
        ([5.0], "chosen_ids is no list of int"),
        ("text", "chosen_ids is no list of int"),
        ([], "empty chosen_ids"),
    ],
)
def test_ids_that_are_none_are_told(wrong, message):
    collate = PreferenceCollator("packed", 0, vocabulary=10)
    row = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
    collate([row])
    with pytest.raises(ValueError, match=message):
        collate([row, row | {"chosen_ids": wrong}])


def test_evaluation_has_one_data_set_or_several():
    def tokenise(data, name):
        return f"{name}: {data}"

    assert token_sets("a", None, tokenise) == ("train_dataset: a", None)
    assert token_sets(None, "b", tokenise) == (None, "eval_dataset: b")
    named = token_sets("a", {"x": "c"}, tokenise)[1]
    assert named == {"x": "eval_dataset['x']: c"}


def test_arguments_of_others_are_told(place, texts, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    with pytest.raises(UserError, match="expected a model: AutoModelForCausalLM"):
        PreferenceTrainer(str(place / "model"), args, train_dataset=texts)
    with pytest.raises(UserError, match="expected transformers.TrainingArguments"):
        PreferenceTrainer(model, {}, train_dataset=texts)
    with pytest.raises(UserError, match=r"objective='dpo_2': loss \['dpo_2'\] is not known"):
        PreferenceTrainer(model, args, objective="dpo_2", train_dataset=texts)
    with pytest.raises(UserError, match="objective=3: "):
        PreferenceTrainer(model, args, objective=3, train_dataset=texts)
    for given in ("ref_model", "beta", "tokenizer", "peft_config", "max_length"):
        with pytest.raises(UserError, match=f"{given}= is an argument of TRL's DPOTrainer; here"):
            PreferenceTrainer(model, args, train_dataset=texts, **{given: None})
    simpo = {"objective": "simpo", "train_dataset": texts}
    with pytest.raises(UserError, match=r"processing_class='m': expected a tokenizer"):
        PreferenceTrainer(model, args, processing_class="m", **simpo)
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    with pytest.raises(UserError, match=r"reference='m': expected a model"):
        PreferenceTrainer(model, args, reference="m", processing_class=tokenizer, **simpo)

    class DPOConfig(TrainingArguments):
        beta = 0.3

    with pytest.raises(
        UserError, match="args is a DPOConfig, whose beta this trainer would not read"
    ):
        PreferenceTrainer(
            model, DPOConfig(output_dir=str(tmp_path), use_cpu=True), train_dataset=texts
        )


def test_rows_with_images_are_refused_by_name(tokenizer):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "images": ["a.png"]}
    with pytest.raises(UserError, match=r"train_dataset\[0\] has images: .*dpo-fast train"):
        token_rows([row], "train_dataset", tokenizer, {}, [])
    assert len(token_rows([row | {"images": []}], "train_dataset", tokenizer, {}, [])) == 1
