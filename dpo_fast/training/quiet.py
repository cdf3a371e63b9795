"""Libraries that talk too much, told once to keep to warnings that matter to the user."""

from __future__ import annotations

import logging
import os
import warnings

from dpo_fast.training import distributed


def quiet() -> None:
    """Call before DeepSpeed is imported. Set DPO_FAST_VERBOSE=1 to hear everything."""
    if os.environ.get("DPO_FAST_VERBOSE", "0") == "1":
        return
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("DeepSpeed", "torch.distributed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not distributed.is_main():
        logging.disable(logging.WARNING)
