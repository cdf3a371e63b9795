"""A step by transformers and torch alone, and how near a run must come to it."""

import torch
import torch.nn.functional as F


def token_logps(model, prompt: list[int], completion: list[int]) -> tuple[torch.Tensor, ...]:
    """Materialised logits of one sequence alone: log-probs of its completion, and log sum p^2."""
    ids = torch.tensor([prompt + completion])
    logp = F.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], dim=-1)
    chosen = logp.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
    return chosen, logp.exp().square().sum(-1).log()


def assert_same_step(result, truth, tolerance: float, what: str) -> None:
    """Loss relative to its size; each gradient relative to the largest element of its truth."""
    loss, gradients = result
    true_loss, true_gradients = truth
    assert abs(loss - true_loss) <= tolerance * max(abs(true_loss), 1), (what, loss, true_loss)
    assert gradients.keys() == true_gradients.keys(), what
    for name, true in true_gradients.items():
        size = true.abs().max().clamp_min(1e-12)  # an adapter's first factor has none at first
        error = (gradients[name].double() - true.double()).abs().max() / size
        assert error <= tolerance, (
            f"{what}: gradient of {name} is off by {error:.2e} of its maximum"
        )
