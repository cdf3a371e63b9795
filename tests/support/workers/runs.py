"""Whole runs in one process, one after the other: a list of configuration trees in, folders out."""

import json
import sys
from pathlib import Path

from dpo_fast.training import distributed
from dpo_fast.training.config import build_config
from dpo_fast.training.console import quiet


def main() -> None:
    quiet()
    distributed.init_distributed()
    from dpo_fast.training.loop import train

    for tree in json.loads(Path(sys.argv[1]).read_text()):
        train(build_config(tree, "case"))


main()
