"""After a run: the report and the push, and a run that is complete although they fail."""

import json

import pytest

from dpo_fast.api.ending import Ending, finish
from dpo_fast.training.config import build_config
from tests.support.fake_hub import fake_hub
from tests.support.models import run_tree


@pytest.fixture
def server(monkeypatch):
    with fake_hub(monkeypatch) as server:
        yield server


def test_a_run_gets_its_report_and_goes_to_the_hub_and_what_fails_is_told(server, tmp_path):
    tree = run_tree(tmp_path, output_dir=str(tmp_path / "mine"))
    tree["train"]["push_to_hub"] = True
    run, folder = build_config(tree, "run"), tmp_path / "mine"
    (folder / "final").mkdir(parents=True)
    (folder / "final/config.json").write_text("{}")
    told, failed = [], []
    address = f"{server.address}/me/mine"
    # Without metrics there is nothing to report; the model is pushed all the same.
    assert finish(run, folder / "final", told.append, failed.append) == Ending(None, address)
    assert told == [f"pushed: {address}"] and len(failed) == 1
    assert failed[0].startswith("the run is complete, its report is not: ")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
    (folder / "config.yaml").write_text(json.dumps(run.resolved()))
    server.fails, told[:], failed[:] = "/commit/", [], []
    ending = finish(run, folder / "final", told.append, failed.append)
    assert ending == Ending(folder / "report.html", None) and ending.report.is_file()
    assert told == [f"report: {ending.report}"]
    assert len(failed) == 1 and "its model is not pushed: " in failed[0]
