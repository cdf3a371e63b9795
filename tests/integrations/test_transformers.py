"""`PreferenceTrainer`: the loss of our own step, however it is split, and plain folders out."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from dpo_fast.errors import UserError
from dpo_fast.integrations.transformers import PreferenceCollator, PreferenceTrainer
from dpo_fast.losses import LossOptions, Objective, PairLogps, Totals, preference
from dpo_fast.models import ScoringModel
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.ops.segments import sum_sequences
from tests.support import hybrids, ranks
from tests.support.adapters import write_adapter
from tests.support.families import tiny
from tests.support.models import LIKE_SGD, write_model, write_pairs

SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", count=10)
    return folder


@pytest.fixture(scope="module")
def rows(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    result = []
    for line in (place / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = {f"{side}_ids": tokenizer.encode(row[side])[1:] + [2] for side in SIDES}
        result.append({"prompt_ids": tokenizer.encode(row["prompt"])} | ids)
    return result


@torch.no_grad()
def score(scoring, batch):
    return sum_sequences(scoring(**forward_arguments(batch))["logp"], batch.lengths_S)


def model_of(place):
    return AutoModelForCausalLM.from_pretrained(place / "model")


def build(place, rows, output, *, model=None, **options):
    """Eight pairs a step, one step unless told otherwise."""
    ours = ("objective", "reference", "layout", "eval_dataset", "compute_metrics", "callbacks")
    given = {name: options.pop(name) for name in ours if name in options}
    options = {"per_device_train_batch_size": 8, "max_steps": 1, "save_strategy": "no"} | options
    args = TrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        lr_scheduler_type="constant",
        **LIKE_SGD,
        **{"train_sampling_strategy": "sequential"} | options,
    )
    return PreferenceTrainer(model or model_of(place), args, train_dataset=rows, **given)


def train(*arguments, **options):
    trainer = build(*arguments, **options)
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


def expected_loss(place, rows, objective, reference=None, weight=None):
    """From full logits, one sequence at a time."""
    policy, logps, lengths = model_of(place), [], []
    models = [policy] if reference is None else [policy, reference]
    for model in models:
        for row in rows:
            for side in SIDES:
                ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
                logp_L = model(ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None])
                logps.append(logp_L.flatten()[len(row["prompt_ids"]) - 1 :].sum().item())
                lengths.append(len(row[f"{side}_ids"]))
    table = torch.tensor(logps).view(len(models), -1, 2)
    sizes = torch.tensor(lengths).view(len(models), -1, 2)[0]
    sides = [] if reference is None else [table[1, :, 0], table[1, :, 1]]
    pairs = PairLogps(table[0, :, 0], table[0, :, 1], sizes[:, 0], sizes[:, 1], *sides)
    totals = Totals(len(rows), int(sizes[:, 0].sum()), 2 * len(rows))
    return objective(pairs, totals, weight).item()


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model, so that policy and reference differ from the start."""
    return write_model(tmp_path_factory.mktemp("other"), seed=1)


OBJECTIVE = Objective(("sigmoid", "sft"), (1.0, 0.5), LossOptions(beta=0.3))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
@pytest.mark.parametrize("micro", [8, 2])
def test_the_loss_of_plain_logits_however_it_is_split(layout, micro, place, rows, other, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(other)
    expected = expected_loss(place, rows[:8], OBJECTIVE, reference)
    trainer, log = train(
        place,
        rows,
        tmp_path,
        reference=reference,
        objective=OBJECTIVE,
        layout=layout,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=8 // micro,
    )
    assert trainer.layout == layout
    assert log[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert log[0]["examples"] == 8


@pytest.mark.parametrize("family", ["qwen3-next", "lfm2", "mamba2", "jamba", "falcon", "stablelm"])
def test_layers_with_a_state_share_rows(family, tmp_path):
    """The step in a row of trees is the one in padded rows."""
    ids = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 2]}
    rows, slopes = [ids, {name: each[::-1] for name, each in ids.items()}], []
    for layout in ("padded", "shared_prefix"):
        model = tiny(family) if family in ("falcon", "stablelm") else hybrids.make(family)
        options = {"layout": layout, "objective": "simpo", "per_device_train_batch_size": 2}
        before = [parameter.detach().clone() for parameter in model.parameters()]
        build(None, rows, tmp_path / layout, model=model, **options).train()
        slopes.append([b - a.detach() for a, b in zip(model.parameters(), before)])
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_same_steps_as_an_engine_of_our_own(place, rows, tmp_path):
    """Three steps against AdamW round `ScoringModel`, uneven micro-batches against whole ones."""
    reference = model_of(place)
    options = {"max_steps": 3, "objective": OBJECTIVE, "max_grad_norm": 0.0, "num_train_epochs": 3}
    trainer, log = train(
        place,
        rows[:8],
        tmp_path,
        reference=reference,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
        **options,
    )
    scoring, frozen = ScoringModel(model_of(place)), ScoringModel(model_of(place))
    optimiser = torch.optim.AdamW(
        scoring.parameters(),
        lr=LIKE_SGD["learning_rate"],
        eps=LIKE_SGD["adam_epsilon"],
        weight_decay=0.0,
    )
    batch = PreferenceCollator()(rows[:8])["batch"]
    totals = Totals(8, batch.chosen_tokens, 16)
    for entry in log:
        scores = scoring(**forward_arguments(batch))
        result = preference(
            scores["logp"], batch.lengths_S, score(frozen, batch), OBJECTIVE, totals
        )
        assert entry["loss"] == pytest.approx(result.loss.item(), abs=1e-5)
        result.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert log[0]["loss"] != log[2]["loss"]
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, scoring.model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_stored_reference_is_that_reference(place, rows, other, tmp_path):
    frozen = ScoringModel(AutoModelForCausalLM.from_pretrained(other))
    sums = score(frozen, PreferenceCollator()(rows)["batch"]).view(-1, 2).tolist()
    names = [f"reference_{side}_logps" for side in SIDES]
    stored = [row | dict(zip(names, pair)) for row, pair in zip(rows, sums)]
    reference = AutoModelForCausalLM.from_pretrained(other)
    _, live = train(place, rows, tmp_path / "live", reference=reference)
    _, kept = train(place, stored, tmp_path / "stored")
    for name in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected", "entropy"):
        assert kept[0][name] == pytest.approx(live[0][name], abs=1e-5), name
    with pytest.raises(UserError, match="two references"):
        build(place, stored, tmp_path, reference=frozen.model)
    half = [row if index else rows[0] for index, row in enumerate(stored)]
    with pytest.raises(ValueError, match="1 of 10 rows have no reference_chosen_logps"):
        PreferenceCollator()(half)


def test_columns_of_the_data_change_the_loss(place, rows, tmp_path):
    objective = Objective(("simpo",), options=LossOptions(beta=2.0))
    weights = [0.0, 2.0, 0.5, 1.0, 1.0, 1.0, 3.0, 0.1, 1.0, 1.0]
    weighted = [row | {"weight": w} for row, w in zip(rows, weights)]
    _, log = train(place, weighted, tmp_path, objective=objective)
    expected = expected_loss(place, rows[:8], objective, weight=torch.tensor(weights[:8]))
    assert log[0]["loss"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="soft_label, which losses"):
        build(place, [row | {"soft_label": 1.0} for row in rows], tmp_path, objective=objective)
    with pytest.raises(UserError, match="need the columns soft_label"):
        build(place, rows, tmp_path, objective=Objective(("soft",)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"ld_alpha": 0.3}, {"token_clamp": 0.2}, {"use_weighting": True}]
)
def test_options_that_look_at_tokens(options, place, rows, other, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(other)
    _, plain = train(place, rows, tmp_path / "plain", reference=reference)
    objective = Objective(options=LossOptions(**options))
    reference = AutoModelForCausalLM.from_pretrained(other)
    _, changed = train(place, rows, tmp_path / "it", reference=reference, objective=objective)
    assert abs(changed[0]["loss"] - plain[0]["loss"]) > 1e-3


def test_lora_saves_an_adapter_and_needs_no_reference(place, rows, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer, log = train(
        place,
        rows,
        tmp_path,
        model=get_peft_model(model_of(place), config),
        max_steps=3,
        num_train_epochs=3,
    )
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert log[-1]["rewards/margins"] != 0
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(model_of(place), tmp_path / "adapter")
    ids = torch.arange(5, 15)[None]
    trainer.model.eval()
    torch.testing.assert_close(
        loaded(ids).logits, trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    )


ADAPTERS = {
    "lora": ({}, False),
    "lora and norms": ({"modules_to_save": ["norm"]}, False),
    "lora and head": ({"modules_to_save": ["lm_head"]}, False),
    "lora, embeddings and head": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "lora and tied embeddings": (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "dora": ({"use_dora": True}, False),
}


@pytest.fixture(scope="module", params=ADAPTERS)
def sft(request, tmp_path_factory):
    """A trained adapter, and what loads it on its base."""
    from peft import PeftModel

    options, tied = ADAPTERS[request.param]
    folder = tmp_path_factory.mktemp("sft")
    write_model(folder / "model", tied=tied)
    write_adapter(folder / "sft", folder / "model", **options)

    def load(path=folder / "sft", **more):
        return PeftModel.from_pretrained(model_of(folder), path, **more)

    return load


def test_the_reference_of_an_adapter_is_that_adapter_frozen(sft, rows, tmp_path):
    options = {"max_steps": 3, "num_train_epochs": 3}

    # No dropout: the reference beside it has none.
    def policy():
        model = sft(is_trainable=True)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    trainer, log = train(None, rows[:8], tmp_path / "a", model=policy(), **options)
    _, beside = train(
        None, rows[:8], tmp_path / "b", model=policy(), reference=sft().eval(), **options
    )
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert log[2]["loss"] < 0.69
    for ours, theirs in zip(log, beside):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    trainer.save_model(tmp_path / "adapter")
    ids = torch.arange(5, 15)[None]
    model = trainer.model.eval()
    with torch.no_grad():
        saved = sft(tmp_path / "adapter").eval()(ids).logits
        torch.testing.assert_close(saved, model(input_ids=ids).logits)
        assert (saved - sft().eval()(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["w", "model", "q_proj"])
def test_an_adapter_may_be_called_as_a_part_of_the_model_is(name, place, rows, tmp_path):
    from peft import PeftModel

    write_adapter(tmp_path / "sft", place / "model", lora_dropout=0.0)
    model = PeftModel.from_pretrained(
        model_of(place), tmp_path / "sft", adapter_name=name, is_trainable=True
    )
    _, log = train(place, rows, tmp_path, model=model)
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_a_resumed_adapter_has_the_reference_that_it_began_with(place, rows, tmp_path):
    from peft import PeftModel

    write_adapter(tmp_path / "sft", place / "model", lora_dropout=0.0)
    options = {"max_steps": 4, "num_train_epochs": 4, "save_strategy": "steps", "save_steps": 2}

    def policy():
        return PeftModel.from_pretrained(model_of(place), tmp_path / "sft", is_trainable=True)

    whole, log = train(place, rows[:8], tmp_path / "run", model=policy(), **options)
    resumed = build(place, rows[:8], tmp_path / "run", model=policy(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    again = [entry for entry in resumed.state.log_history if "loss" in entry]
    assert [e["loss"] for e in again] == [e["loss"] for e in log]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_an_adapter_that_a_user_calls_ref_is_the_reference(place, rows, other, tmp_path):
    from peft import PeftModel

    for name, seed in (("policy", 0), ("start", 1)):
        write_adapter(tmp_path / name, place / "model", seed=seed, lora_dropout=0.0)
    model = PeftModel.from_pretrained(model_of(place), tmp_path / "policy", is_trainable=True)
    model.load_adapter(tmp_path / "start", "ref")
    _, log = train(place, rows, tmp_path, model=model)
    reference = PeftModel.from_pretrained(model_of(place), tmp_path / "start").merge_and_unload()
    policy = PeftModel.from_pretrained(model_of(place), tmp_path / "policy", is_trainable=True)
    _, beside = train(place, rows, tmp_path, model=policy, reference=reference)
    assert log[0]["loss"] == pytest.approx(beside[0]["loss"], abs=1e-5)
    assert abs(log[0]["loss"] - 0.693147) > 1e-2


def test_adapters_that_act_outside_the_layers_are_refused(place, rows, tmp_path):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    common = {"task_type": "CAUSAL_LM"}
    for config, message in (
        (PromptTuningConfig(num_virtual_tokens=2, **common), "PROMPT_TUNING adds virtual tokens"),
        (LoraConfig(target_modules=["q_proj", "lm_head"], **common), "target_modules has the head"),
        (LoraConfig(target_modules=["q_proj"], bias="all", **common), "bias=all"),
    ):
        with pytest.raises(UserError, match=message):
            build(place, rows, tmp_path, model=get_peft_model(model_of(place), config))


def test_a_checkpoint_is_a_plain_folder_and_resumes(place, rows, tmp_path):
    options = {"max_steps": 4, "num_train_epochs": 4, "layout": "shared_prefix"}
    whole, log = train(place, rows, tmp_path / "whole", reference=model_of(place), **options)
    options |= {"save_strategy": "steps", "save_steps": 2, "reference": model_of(place)}
    train(place, rows, tmp_path / "half", **options)
    plain, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "half" / "checkpoint-4", output_loading_info=True
    )
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    options["reference"] = model_of(place)
    resumed = build(place, rows, tmp_path / "half", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
        assert torch.equal(value, plain.state_dict()[name]), name


def test_evaluation_is_the_mean_over_pairs(place, rows, other, tmp_path):
    """Batches of 4, 4 and 2 pairs."""
    reference = AutoModelForCausalLM.from_pretrained(other)
    objective = Objective(options=LossOptions(beta=0.3))
    trainer = build(
        place,
        rows,
        tmp_path,
        reference=reference,
        objective=objective,
        eval_dataset=rows,
        per_device_eval_batch_size=4,
    )
    metrics = trainer.evaluate()
    expected = expected_loss(place, rows, objective, AutoModelForCausalLM.from_pretrained(other))
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    entry = trainer.state.log_history[-1]
    assert entry["eval_examples"] == 10 and "eval_rewards/accuracies" in entry


def on_ranks(case: dict, count: int, folder) -> list[float]:
    """The losses of two steps."""
    file = folder / "losses.json"
    ranks.group(count).do("preference_losses", {"case": case}, str(file))
    return json.loads(file.read_text())["case"]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("count, stage", [(2, None), (2, 3)])
@pytest.mark.parametrize("whole", [["norm"], ["lm_head", "embed_tokens"]])
def test_ranks_and_shards_do_not_change_what_an_adapter_is_compared_with(
    whole, count, stage, place, rows, tmp_path
):
    from peft import PeftModel

    sft = write_adapter(tmp_path / "sft", place / "model", lora_dropout=0.0, modules_to_save=whole)
    case = {"model": str(place / "model"), "adapter": str(sft), "rows": rows, "stage": stage}
    losses = on_ranks(case, count, tmp_path)
    model = PeftModel.from_pretrained(model_of(place), sft, is_trainable=True)
    options = {"max_steps": 2, "num_train_epochs": 2, "objective": OBJECTIVE}
    _, log = train(place, rows[:8], tmp_path, model=model, **options)
    assert losses == pytest.approx([e["loss"] for e in log], abs=1e-5)


@pytest.mark.processes
@pytest.mark.parametrize("count, stage", [(2, None), (1, 3)])
def test_ranks_and_shards_do_not_change_the_loss(count, stage, place, rows, other, tmp_path):
    """Two ranks by DDP; one whose policy and reference ZeRO-3 has sharded."""
    whole = expected_loss(place, rows[:8], OBJECTIVE, AutoModelForCausalLM.from_pretrained(other))
    case = {"model": str(place / "model"), "reference": str(other), "rows": rows, "stage": stage}
    losses = on_ranks(case, count, tmp_path)
    assert losses[0] == pytest.approx(whole, abs=1e-5)
    reference = AutoModelForCausalLM.from_pretrained(other)
    _, log = train(
        place,
        rows[:8],
        tmp_path,
        reference=reference,
        objective=OBJECTIVE,
        max_steps=2,
        num_train_epochs=2,
    )
    assert losses == pytest.approx([e["loss"] for e in log], abs=1e-5)


def test_mixed_precision_stays_near(place, rows, tmp_path):
    _, log = train(place, rows, tmp_path, reference=model_of(place), bf16=True)
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-3)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_others_call_the_model_between_steps(layout, place, rows, other, tmp_path):
    """In the attention that it came with, which a callback may set as well: the steps have theirs."""
    ids, texts = torch.arange(5, 15)[None], []

    class Sampling(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            if state.global_step == 2:
                model.set_attn_implementation("eager")
            model.eval()
            texts.append(model.generate(ids, max_new_tokens=4)[0].tolist())
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()
            model.train()

    logs = []
    for callbacks in ([], [Sampling()]):
        torch.manual_seed(0)
        options = {"layout": layout, "callbacks": callbacks, "max_steps": 3, "num_train_epochs": 3}
        reference = AutoModelForCausalLM.from_pretrained(other)
        trainer, log = train(place, rows[:8], tmp_path, reference=reference, **options)
        logs.append([[entry["loss"], entry["grad_norm"]] for entry in log])
    assert logs[0] == logs[1] and len(texts) == 3
    trainer.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert texts[-1] == saved.generate(ids, max_new_tokens=4)[0].tolist()


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_samplers_that_go_by_length_count_the_tokens_of_pairs(strategy, place, rows, tmp_path):
    options = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 2}
    trainer, log = train(
        place,
        rows,
        tmp_path,
        objective="simpo",
        max_steps=-1,
        num_train_epochs=1,
        eval_dataset=rows[:4],
        eval_strategy="epoch",
        **options,
    )
    assert len(log) == 5 and "eval_loss" in trainer.state.log_history[-2]
    sampler = trainer._get_train_sampler()
    assert list(sampler.lengths) == [sum(map(len, row.values())) for row in rows]
    assert sorted(i for each in sampler for i in (each if isinstance(each, list) else [each])) == [
        *range(len(rows))
    ]


def test_a_model_goes_on_with_more_tokens_after_training(place, rows, other, tmp_path):
    """As one that was resized before it was trained."""
    from peft import LoraConfig, get_peft_model

    def resized(model):
        torch.manual_seed(0)
        model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
        return model

    reference = AutoModelForCausalLM.from_pretrained(other)
    losses = []
    for before in (True, False):
        model = model_of(place)
        options = {"model": resized(model) if before else model, "reference": reference}
        trainer = build(place, rows, tmp_path, **options)
        assert before or resized(model)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and losses[0][0] > 0
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    ids = torch.arange(5, 15)[None]
    adapted(input_ids=ids, labels=ids).loss.backward()


def test_what_cannot_be_honoured_is_refused_by_name(place, rows, tmp_path):
    cases = {
        "reference=model": {},
        "aot": {"objective": Objective(("aot",))},
        "bco_pair": {"objective": Objective(("bco_pair",))},
        "take groups of scored completions": {"objective": Objective(("grpo",))},
        "compute_metrics": {"compute_metrics": len},
        "label_smoothing_factor=0.1": {"label_smoothing_factor": 0.1},
        "choose from auto": {"layout": "diagonal"},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            build(place, rows, tmp_path, **options)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with pytest.raises(UserError, match="^layout=shared_prefix cannot be .* Set layout=padded"):
        build(
            place,
            rows,
            tmp_path,
            model=FalconForCausalLM(FalconConfig(alibi=True, vocab_size=97, **sizes)),
            layout="shared_prefix",
            reference=model_of(place),
        )


def test_data_sets_that_do_not_fit_are_refused_before_the_run(place, rows, tmp_path):
    stored = [
        row | {"reference_chosen_logps": -9.0, "reference_rejected_logps": -8.0} for row in rows
    ]
    soft = {"reference": model_of(place), "eval_dataset": [rows[0] | {"soft_label": 0.9}]}
    cases = [
        (stored, {"eval_dataset": rows}, "train_dataset has the column reference_chosen_logps"),
        (stored, {"eval_dataset": {"a": stored, "b": rows}}, r"and eval_dataset\['b'\] does not"),
        (
            rows,
            {"reference": model_of(place), "eval_dataset": stored},
            "and train_dataset does not",
        ),
        (rows, soft, "the columns soft_label, which losses"),
        ([], {"reference": model_of(place)}, "has no rows"),
    ]
    for data, options, message in cases:
        with pytest.raises(UserError, match=message):
            build(place, data, tmp_path, **options)
    model = model_of(place)
    with pytest.raises(UserError, match="reference is the model that is trained"):
        build(place, rows, tmp_path, model=model, reference=model)
