"""What the last evaluation made of every held-out example, in eval-examples.json for the report.

Numbers of every example, and the texts of those with the least and the greatest margin.
`log.eval_texts: 0` leaves the texts out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.images.tokens import decoded
from dpo_fast.data.kinds import GROUPS
from dpo_fast.durable import write_file
from dpo_fast.losses import Preference, ScoredGroups
from dpo_fast.modules.metrics import sides
from dpo_fast.training import data_ranks, distributed
from dpo_fast.training.checkpoints import saving
from dpo_fast.training.splits import Split

EVAL_EXAMPLES = "eval-examples.json"
MOST_ROWS = 4000  # in the file; of more examples every other one, or every third, ..., by margin
MOST_CHARACTERS = 2000  # of one text
COLUMNS = ("index", "margin", "reward", "other_reward", "tokens", "other_tokens")


class EvalTable:
    """Sums for both sides of every example: rewards, scored tokens, answers. They stay on the device.

    sums: fp64 [2 sides, 3, P], of this rank's examples.
    """

    def __init__(self, examples: int, device: torch.device) -> None:
        self.sums = torch.zeros(2, 3, examples, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, result: Preference, batch: ScoredBatch) -> None:
        """Enter a micro-batch."""
        device, S = self.sums.device, len(batch.lengths_S)
        groups = None if batch.scores_S is None else ScoredGroups(batch.scores_S, batch.counts_P)
        index_S = batch.indices_P.to(device, non_blocking=True)
        if groups is not None:
            index_S = index_S.repeat_interleave(batch.counts_P, output_size=S)
        elif batch.desirable_S is None:
            index_S = index_S.repeat_interleave(2)
        values = torch.stack([result.rewards_S, batch.lengths_S, torch.ones_like(result.rewards_S)])
        for side, mask_S in zip(self.sums, sides(S, device, batch.desirable_S, groups)):
            side.index_add_(1, index_S, torch.where(mask_S, values, 0).double())

    def read(self) -> Tensor:
        """Mean reward and tokens, and answers, of both sides over all ranks, [2, 3, P] on the host.

        The means are nan where an example has no answer on that side. Collective.
        """
        rewards, tokens, answers = data_ranks.sum_once(self.sums.clone()).cpu().unbind(1)
        return torch.stack([rewards / answers, tokens / answers, answers], 1)


def record_examples(
    table: EvalTable,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    step: int,
    texts: int,
) -> None:
    """Write the file of the evaluation at `step`. Collective; rank 0 writes.

    texts: so many examples with the least margin and as many with the greatest have their texts there.

    Raises:
        UserError: it cannot be written.
    """
    (reward, tokens, answers), (other, other_tokens, other_answers) = table.read()
    if not distributed.is_main():
        return
    margin = reward - other
    if split.examples.kind.single:  # each is on one side, as its label says
        margin = torch.where(answers > 0, reward, 0) - torch.where(other_answers > 0, other, 0)
    order = margin.argsort()
    order = order[margin[order].isfinite()]
    kept = order[:: -(-len(order) // MOST_ROWS) or 1]
    columns = torch.stack([margin, reward, other, tokens, other_tokens], 1)[kept].tolist()
    rows = [[index, *map(_plain, row)] for index, row in zip(kept.tolist(), columns)]
    half = len(order) // 2
    least = order[: min(texts, len(order) - half)].tolist()
    greatest = order.flip(0)[: min(texts, half)].tolist()
    content = {
        "step": step,
        "kind": split.examples.kind.name,
        "examples": len(margin),
        "without_margin": len(margin) - len(order),
        "fields": COLUMNS,
        "rows": rows,
        "least": [_texts(split, tokenizer, index) for index in least],
        "greatest": [_texts(split, tokenizer, index) for index in greatest],
    }
    file = folder / EVAL_EXAMPLES
    with saving(file):
        write_file(file, json.dumps(content, allow_nan=False))


def _plain(value: float) -> float | None:
    """Six digits, as JSON holds them."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _texts(split: Split, tokenizer: PreTrainedTokenizerBase, index: int) -> dict:
    """An example's place and texts. Of a group the answers with the highest and the lowest score."""
    example, kind = split.examples[index], split.examples.kind
    answers = [_text(tokenizer, ids) for ids in kind.answer_ids(example)]
    found = {
        "index": index,
        "where": split.examples.where(index),
        "prompt": _text(tokenizer, example["prompt_ids"]),
    }
    if kind.single:
        return found | {"chosen" if example.get("label", True) else "rejected": answers[0]}
    chosen, rejected = 0, 1
    if kind == GROUPS:
        by_score = sorted(range(len(answers)), key=lambda place: -example["scores"][place])
        chosen, rejected = by_score[0], by_score[-1]
    return found | {"chosen": answers[chosen], "rejected": answers[rejected]}


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Decoded; of a long text the beginning and, twice as long, the end."""
    text = decoded(tokenizer, ids)
    if len(text) <= MOST_CHARACTERS:
        return text
    head = MOST_CHARACTERS // 3
    left_out = len(text) - MOST_CHARACTERS
    return f"{text[:head]} [... {left_out:,} characters ...] {text[left_out + head :]}"
