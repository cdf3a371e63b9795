"""The interface of Liger's distillation losses: a student's distributions against a teacher's.

They compare whole rows of logits, so some rows of them exist at a time, forward and backward.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_fast.ops.integers import as_int64
from dpo_fast.ops.linear_logp.dtensor import plain_input, plain_weight


class LigerDistillationLoss(nn.Module):
    """weight_hard_loss times the cross-entropy, plus weight_soft_loss times a distance from the teacher.

    Both are means over the labels that are not `ignore_index`; rows of others are not multiplied. Logits
    are made in the dtype of the inputs, and everything after them is fp32.

    temperature: of both distributions in the distance; the cross-entropy has none.
    chunk_size: rows of logits at a time.
    return_soft_hard_loss: the call returns (loss, distance, cross-entropy), the last two detached.

    `compiled` changes nothing. The arguments are attributes, which may be set; the next call checks them.

    Raises:
        ValueError: an option that cannot be honoured.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.beta, self.temperature, self.ignore_index = beta, temperature, ignore_index
        self.compiled, self.chunk_size = compiled, chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss
        self.check()

    def check(self) -> None:
        """Raises ValueError for attributes that cannot be honoured."""
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be greater than 0")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size} must be at least 1")

    def distance(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        """Of every row, [T], from fp32 logits over the temperature."""
        raise NotImplementedError

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss, [] fp32.

        Args:
            student_input, teacher_input: [N, D]; the teacher's D may differ.
            student_weight, teacher_weight: [V, D]. Where the teacher's vocabulary is larger, by padding,
                the student's logits are 0, as in Liger.
            true_labels: integers [N], shifted already.
            student_bias, teacher_bias: [V] or None.

        Raises:
            ValueError: inputs that do not fit each other.
        """
        self.check()
        hidden, states = (plain_input(x, "input") for x in (student_input, teacher_input))
        student = [plain_weight(x, hidden) for x in (student_weight, student_bias)]
        with torch.no_grad():
            teacher = [plain_weight(x, states) for x in (teacher_weight, teacher_bias)]
        _check_shapes(hidden, states, true_labels, student[0], teacher[0])
        true_labels = as_int64(true_labels, "true_labels")
        rows = (true_labels != self.ignore_index).nonzero().squeeze(1)
        # Connected to the model even if nothing is scored.
        soft = sum(x[:0].sum().float() for x in (hidden, *student) if x is not None)
        hard = soft
        for part in rows.split(self.chunk_size):
            more = checkpoint(
                self._chunk,
                hidden[part],
                *student,
                states[part].detach(),
                *teacher,
                true_labels[part],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            soft, hard = soft + more[0], hard + more[1]
        count = max(len(rows), 1)
        soft, hard = soft / count, hard / count
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss

    def _chunk(
        self, hidden, weight, bias, states, teacher_weight, teacher_bias, labels
    ) -> tuple[Tensor, Tensor]:
        """Sums of distances and of cross-entropies, [] each."""
        logits_TV = F.linear(hidden, weight, bias).float()
        with torch.no_grad():
            teacher_TV = F.linear(states, teacher_weight, teacher_bias).float() / self.temperature
        hard = logits_TV.new_zeros(())
        if self.weight_hard_loss != 0 or self.return_soft_hard_loss:
            hard = F.cross_entropy(logits_TV, labels, reduction="sum")
        beyond = len(teacher_weight) - len(weight)
        student_TV = F.pad(logits_TV / self.temperature, (0, beyond))
        return self.distance(student_TV, teacher_TV).sum(), hard

    def extra_repr(self) -> str:
        return (
            f"weight_hard_loss={self.weight_hard_loss}, weight_soft_loss={self.weight_soft_loss}, "
            f"beta={self.beta}, temperature={self.temperature}, chunk_size={self.chunk_size}"
        )


class LigerFusedLinearJSDLoss(LigerDistillationLoss):
    """The generalised Jensen-Shannon divergence, arXiv 2306.13649 eq 1.

    beta: 0 is KL(teacher | student), 1 is KL(student | teacher).
    """

    def check(self) -> None:
        super().check()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} must be from 0 to 1")

    def distance(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        student, teacher = student_TV.log_softmax(-1), teacher_TV.log_softmax(-1)
        if self.beta == 0:
            return divergence(teacher, student)
        if self.beta == 1:
            return divergence(student, teacher)
        mixed = torch.logaddexp(student + math.log(1 - self.beta), teacher + math.log(self.beta))
        of_teacher, of_student = divergence(teacher, mixed), divergence(student, mixed)
        return self.beta * of_teacher + (1 - self.beta) * of_student


class LigerFusedLinearCosineSimilarityLoss(LigerDistillationLoss):
    """beta times one less the cosine of the two rows of logits."""

    def distance(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        return self.beta * (1 - F.cosine_similarity(student_TV, teacher_TV, dim=-1))


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p | q) of every row, [T]."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _check_shapes(hidden, states, labels, weight, teacher_weight) -> None:
    if hidden.dim() != 2 or states.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"expected student_input [N, D] and true_labels [N]; got {tuple(hidden.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if len(states) != len(hidden):
        raise ValueError(f"teacher_input has {len(states)} rows; expected {len(hidden)}")
    if len(teacher_weight) < len(weight):
        raise ValueError(
            f"teacher_weight has {len(teacher_weight)} rows, student_weight {len(weight)}: the student's "
            "vocabulary must not be the larger one"
        )
