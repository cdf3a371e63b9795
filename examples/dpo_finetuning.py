"""DPO from the first line to the last: load, format, train twice, evaluate, save, generate.

    python examples/dpo_finetuning.py

A small chat model and 2,000 pairs are made on the spot. It takes a minute on a CPU, and nothing is
downloaded. With a model and data of your own:

    python examples/dpo_finetuning.py --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --data my-pairs.jsonl --held-out my-other-pairs.jsonl --learning-rate 5e-6 --max-length 1024

It trains with TRL's DPOTrainer on our head, and then the same in our trainer. It needs dpo_fast[train]
and trl.
"""

import argparse
from pathlib import Path

import torch
import yaml
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from dpo_fast.demo.student import StudentSize, build_model, build_tokenizer, fine_tune
from dpo_fast.demo.task import QUICK, make_questions, write_pairs

BETA, PAIRS_PER_STEP, NEW_TOKENS, SHOWN = 0.3, 32, 16, 4
# DPO alone lowers the log-probs of both answers. The second term keeps the chosen ones likely.
LOSSES, WEIGHTS = ["sigmoid", "sft"], [1.0, 1.0]
QUESTIONS, SFT_STEPS, LEARNING_RATE, MAX_LENGTH = 2000, 100, 2e-3, 64  # of the toy


def make_model_and_pairs(folder: Path) -> None:
    """The toy: questions like "Which is larger, 12 or 47?", and a Llama that answers without knowing which.

    SFT on right and wrong answers alike teaches it to answer. Which answer is right is left to DPO.
    """
    from dpo_fast.data.config import DataConfig

    train, held_out = make_questions(QUESTIONS, QUICK.held_out_questions, QUICK.numbers, 0)
    write_pairs(train, folder / "train.jsonl")
    write_pairs(held_out, folder / "held-out.jsonl")
    tokenizer = build_tokenizer(text for q in train for text in (q.text, q.right, q.wrong))
    model = build_model(tokenizer, StudentSize(128, 3, 4, 4), seed=0)
    data = DataConfig(
        train=str(folder / "train.jsonl"), max_length=MAX_LENGTH, cache_dir=str(folder / "cache")
    )
    fine_tune(
        model,
        tokenizer,
        data,
        steps=SFT_STEPS,
        examples_per_step=PAIRS_PER_STEP,
        learning_rate=QUICK.sft_learning_rate,
        seed=0,
    )
    model.save_pretrained(folder / "sft")
    tokenizer.save_pretrained(folder / "sft")


def train_with_trl(arguments: argparse.Namespace, folder: Path) -> Path:
    """TRL's DPOTrainer. Only its import is another: log-probs come from `linear_logp`, without logits."""
    from dpo_fast.integrations.trl import DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    args = DPOConfig(
        output_dir=str(folder / "trl"),
        loss_type=LOSSES,
        loss_weights=WEIGHTS,
        beta=BETA,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=PAIRS_PER_STEP,
        num_train_epochs=1,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_length=arguments.max_length,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=model,  # its copy before the first step is the reference
        args=args,
        train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder / "trl" / "final"))
    return folder / "trl" / "final"


def train_with_dpo_fast(arguments: argparse.Namespace, folder: Path) -> Path:
    """The same run in our trainer: prompts once, no padding, the reference stored.

    The file serves the command line as well: dpo-fast train dpo.yaml
    """
    from dpo_fast.training.config import load_config
    from dpo_fast.training.loop import train

    config = {
        "model": {"path": arguments.model, "dtype": "fp32"},
        "data": {
            "train": arguments.data,
            "eval": arguments.held_out,
            "max_length": arguments.max_length,
            "cache_dir": str(folder / "cache"),
        },
        "loss": {"type": LOSSES, "weights": WEIGHTS, "beta": BETA},
        "train": {
            "output_dir": str(folder / "dpo_fast"),
            "overwrite_output_dir": True,
            "learning_rate": arguments.learning_rate,
            "global_batch_size": PAIRS_PER_STEP,
            "micro_batch_size": PAIRS_PER_STEP,
            "num_train_epochs": 1,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
        },
        "log": {"logging_steps": 5},
    }
    file = folder / "dpo.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return train(load_config(str(file)))


def evaluate(model: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Metrics on held-out pairs against the model before DPO, as `dpo-fast evaluate` has them."""
    from dpo_fast.training.evaluate_model import evaluate_model
    from dpo_fast.training.evaluate_options import evaluation_of

    options = [f"data.max_length={arguments.max_length}", f"loss.beta={BETA}", "model.dtype=fp32"]
    asked = evaluation_of(str(model), arguments.held_out, arguments.model, overrides=options)
    return evaluate_model(asked)["metrics"]


@torch.no_grad()
def answers(model: str | Path, prompts: list[list[dict[str, str]]]) -> list[str]:
    """Greedy answers, by transformers alone: what was saved is a plain Hugging Face folder."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    ids = causal_lm.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a chat model; default: a tiny one, made here")
    parser.add_argument(
        "--data", help="JSON Lines of prompt, chosen and rejected, lists of messages"
    )
    parser.add_argument("--held-out", help="the same, for evaluation")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH, help="tokens of a sequence")
    parser.add_argument("--output", type=Path, default=Path("runs/dpo_finetuning"))
    arguments = parser.parse_args()
    given = [arguments.model, arguments.data, arguments.held_out]
    if any(given) and not all(given):
        parser.error("--model, --data and --held-out go together; give all three, or none")
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    print("1. Load a model and pairs")
    if arguments.model is None:
        make_model_and_pairs(folder)
        arguments.model = str(folder / "sft")
        arguments.data = str(folder / "train.jsonl")
        arguments.held_out = str(folder / "held-out.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    held_out = load_dataset("json", data_files=arguments.held_out, split="train")

    print("2. Format: a pair as the chat template writes it")
    pair = held_out[0]
    for side in ("chosen", "rejected"):
        text = tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
        print(f"   {side:8}  {text}")

    print("3. Train with TRL's DPOTrainer on our head")
    models = {"before": arguments.model, "TRL": train_with_trl(arguments, folder)}
    print("4. The same in our trainer")
    models["dpo_fast"] = train_with_dpo_fast(arguments, folder)

    print("5. Evaluate on held-out pairs")
    for name in ("TRL", "dpo_fast"):
        found = evaluate(models[name], arguments)
        accuracy, margin = (found[f"eval_rewards/{x}"] for x in ("accuracies", "margins"))
        print(f"   {name:8}  reward accuracy {accuracy:.3f}  margin {margin:.3f}")

    print("6. Saved, as from_pretrained loads them")
    for name, model in models.items():
        print(f"   {name:8}  {model}")

    print("7. Generate: greedy answers on the held-out prompts")
    texts = {name: answers(model, list(held_out["prompt"])) for name, model in models.items()}
    for pair, *told in list(zip(held_out, *texts.values()))[:SHOWN]:
        print(f"   {pair['prompt'][-1]['content']}")
        for name, text in zip(models, told):
            print(f"   {name:>10}: {text}")
    for name, told in texts.items():
        right = sum(x == pair["chosen"][-1]["content"] for x, pair in zip(told, held_out))
        print(f"   {name:>10}: {right / len(told):.1%} of the answers are the chosen ones")


if __name__ == "__main__":
    main()
