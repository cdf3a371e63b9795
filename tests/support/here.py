"""A run in the test's own process, which is left as it was: in no group, without a rank's variables."""

from pathlib import Path

from dpo_fast.api.process import as_found
from dpo_fast.training import loop
from dpo_fast.training.config import RunConfig


def train(config: RunConfig) -> Path | None:
    with as_found():
        return loop.train(config)
