"""Where the checkout is, and what a process of a test needs to import it."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What is unpacked beside the environment comes last, as in this process.
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("BITSANDBYTES")]))
ENVIRONMENT = dict(os.environ, PYTHONPATH=PYTHONPATH, WANDB_MODE="offline", WANDB_SILENT="true")
