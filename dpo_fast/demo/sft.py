"""Supervised fine-tuning in a plain loop: the model learns to answer, and no idea which answer is right."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import PairDataset, load_examples
from dpo_fast.data.layouts import collate
from dpo_fast.data.sampler import Sampler
from dpo_fast.models import ScoringModel, architecture_of, choose_attention
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training import distributed
from dpo_fast.training.progress import console, progress_bar, say


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    steps: int,
    examples_per_step: int,
    learning_rate: float,
    seed: int,
) -> float:
    """Train on both answers of each pair of `data.train`, right and wrong alike; returns the last
    step's loss per token. `model` changes in place and keeps its own head."""
    pairs = load_examples(data, tokenizer, split="train")
    sampler = Sampler(len(pairs), examples_per_step, examples_per_step, 1, seed, shuffle=True)
    head, attention = model.get_output_embeddings(), model.config._attn_implementation
    chosen = choose_attention(
        "auto", "packed", distributed.device(), model.dtype, architecture_of(model)
    )
    model.set_attn_implementation(chosen.name)
    scoring = ScoringModel(model.to(distributed.device()))
    optimizer = torch.optim.AdamW(
        scoring.parameters(), learning_rate, (0.9, 0.95), weight_decay=0.0
    )
    schedule = get_scheduler("cosine", optimizer, steps // 10, steps)
    with progress_bar("fine-tuning", steps) as advance:
        for step in range(steps):
            loss = _step(scoring, pairs, sampler.global_batch(step), optimizer)
            schedule.step()
            advance(f"loss {loss:.3f}")
            if not console.is_terminal and (step + 1) % 50 == 0:
                say(f"fine-tuning step {step + 1} of {steps}  loss {loss:.3f}")
    model.set_output_embeddings(head)
    model.set_attn_implementation(attention)
    return loss


def _step(
    scoring: ScoringModel, pairs: PairDataset, rows: list[int], optimizer: torch.optim.Optimizer
) -> float:
    """One update on the mean negative log-probability of the answers' tokens."""
    batch = collate([pairs[row] for row in rows], "packed").to(distributed.device())
    loss = -scoring(**forward_arguments(batch))["logp"].mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(scoring.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """A Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
