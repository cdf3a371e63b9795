"""`dpo-fast` commands in one process, one after the other, under conditions that a test sets.

    reference.py '[{"arguments": [...], "kill_after": 2, "scoring": false}, ...]'

Parts have 4 pairs.
kill_after: rank 0 gets SIGKILL when it has written so many parts.
scoring=false: it is an error to load a model that scores a reference, or to score.
refused: the UserError that must end the command, on every rank."""

import json
import os
import signal
import sys

from dpo_fast.cli.app import app
from dpo_fast.errors import UserError
from dpo_fast.references import artefact, blocks
from dpo_fast.training import distributed, precompute, references

blocks.MOST = 4
add, score, load = artefact.Growing.add, precompute.score_part, references.load_model


def refused(*arguments, **options):
    raise AssertionError("what is stored is computed again")


def killed_after(parts: int):
    left = [parts]

    def add_and_die(self, table):
        add(self, table)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return add_and_die


def main() -> None:
    distributed.leave_distributed = lambda: None  # the next command goes on in the same group
    for case in json.loads(sys.argv[1]):
        scoring = case.get("scoring", True)
        artefact.Growing.add = killed_after(case["kill_after"]) if "kill_after" in case else add
        precompute.score_part = score if scoring else refused
        references.load_model = load if scoring else refused
        try:
            app(case["arguments"], standalone_mode=False)
        except UserError as error:
            if case.get("refused", "not at all") not in str(error):
                raise
        else:
            assert "refused" not in case, case


main()
