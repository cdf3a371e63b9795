"""DPO in a plain PyTorch loop: any module that makes hidden states, `linear_logp`, and a loss.

    python examples/bare_loop.py

A random model of a few thousand parameters, random pairs, a CPU, a few seconds, nothing downloaded.
"""

import copy

import torch
from torch import Tensor, nn

from dpo_fast import linear_logp
from dpo_fast.losses import LossOptions, Objective, Totals, preference
from dpo_fast.ops.segments import sum_sequences

PAIRS, PROMPT, VOCABULARY, WIDTH, STEPS = 16, 4, 100, 32, 30


class Policy(nn.Module):
    """Hidden states of a recurrent language model, and the weight of its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.backbone = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def score(self, ids_SL: Tensor, scored_SL: Tensor) -> Tensor:
        """Log-probability of every scored token, [T]: position l - 1 predicts token l."""
        hidden_SLD, _ = self.backbone(self.embedding(ids_SL))
        rows_SL = scored_SL[:, 1:]
        hidden_TD = hidden_SLD[:, :-1][rows_SL]  # prompt and padding never reach the head
        return linear_logp(hidden_TD, self.lm_head.weight, ids_SL[:, 1:][rows_SL]).logp


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [S, L], a mask of the scored ones [S, L], and their number in each sequence [S].

    Row 2p is the chosen completion of pair p, row 2p + 1 the rejected one; they share a prompt.
    """
    ids_SL = torch.randint(VOCABULARY, (2 * PAIRS, PROMPT + 8))
    ids_SL[1::2, :PROMPT] = ids_SL[0::2, :PROMPT]
    lengths_S = torch.randint(2, 9, (2 * PAIRS,))
    place_L = torch.arange(ids_SL.shape[1])
    scored_SL = (place_L >= PROMPT) & (place_L < PROMPT + lengths_S[:, None])
    return ids_SL, scored_SL, lengths_S


def main() -> None:
    torch.manual_seed(0)
    policy = Policy()
    reference = copy.deepcopy(policy).requires_grad_(False)
    ids_SL, scored_SL, lengths_S = pairs()
    objective = Objective(("sigmoid", "sft"), (1.0, 0.1), LossOptions(beta=0.1))
    # The loss is divided by the counts of the whole batch, even if the batch is split.
    totals = Totals(pairs=PAIRS, chosen_tokens=int(lengths_S[0::2].sum()))
    with torch.no_grad():
        reference_S = sum_sequences(reference.score(ids_SL, scored_SL), lengths_S)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for step in range(STEPS):
        logp_T = policy.score(ids_SL, scored_SL)
        result = preference(logp_T, lengths_S, reference_S, objective, totals)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        chosen, rejected = result.rewards_S.view(-1, 2).unbind(1)
        accuracy = (chosen > rejected).float().mean()
        print(f"step {step:2}  loss {result.loss:.4f}  reward accuracy {accuracy:.2f}")


if __name__ == "__main__":
    main()
