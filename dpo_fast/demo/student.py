"""The student: a small tokenizer and Llama from scratch, and SFT that teaches it to answer.

SFT takes right and wrong answers alike, so the student does not learn which answer is right.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_scheduler,
)

from dpo_fast.data.batch import collate
from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import PairDataset, load_examples
from dpo_fast.data.sampler import Sampler
from dpo_fast.models import ScoringModel, architecture_of, choose_attention
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training import distributed
from dpo_fast.training.console import console, progress_bar, say

LAYOUT = "packed"  # of SFT and DPO
PAD, BOS, EOS = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = ("<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class StudentSize:
    """The shape of the model."""

    hidden: int = 256
    layers: int = 4
    heads: int = 8
    key_value_heads: int = 4


def build_tokenizer(texts: Iterable[str], vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with BOS, EOS, PAD and a chat template, trained on `texts`.

    It has at most `vocabulary` tokens. The 256 bytes are among them, so it encodes any text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, size: StudentSize, seed: int
) -> LlamaForCausalLM:
    """A Llama with random fp32 weights and tied embeddings, for up to 1024 tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


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
    """Train on both answers of each pair of `data.train`; returns the last step's loss per token.

    `model` changes in place and gets its own head and attention back.
    """
    pairs = load_examples(data, tokenizer, split="train")
    sampler = Sampler(len(pairs), examples_per_step, examples_per_step, 1, seed, shuffle=True)
    head, attention = model.get_output_embeddings(), model.config._attn_implementation
    chosen = choose_attention(
        "auto", LAYOUT, distributed.device(), model.dtype, architecture_of(model)
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
    batch = collate([pairs[row] for row in rows], LAYOUT).to(distributed.device())
    loss = -scoring(**forward_arguments(batch))["logp"].mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(scoring.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
