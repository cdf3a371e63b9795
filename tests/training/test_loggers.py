"""Loggers that cannot begin, and one that begins again in the same folder."""

import pytest

from dpo_fast.errors import UserError
from dpo_fast.training.config import build_config
from dpo_fast.training.loggers import TensorBoard, open_loggers
from tests.support.models import run_tree


def config(folder, report_to):
    tree = run_tree(folder)
    tree["log"] |= {"report_to": report_to}
    return build_config(tree, "run")


def test_one_name_is_a_list_of_it(tmp_path):
    assert config(tmp_path, "wandb").log.report_to == ["wandb"]
    assert config(tmp_path, "none").log.report_to == []
    with pytest.raises(UserError, match="report_to.*mlflow"):
        config(tmp_path, "mlflow")


def test_wandb_without_a_key_is_told_and_no_traceback(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**options):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.\nmore")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match="log.report_to=wandb: No API key .* WANDB_MODE=offline"):
        open_loggers(config(tmp_path, ["wandb"]), 0)


def test_a_run_that_begins_again_hides_the_earlier_curve(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = config(tmp_path, ["tensorboard"])
    for steps, first in ((3, 1.0), (2, 5.0)):
        logger = TensorBoard(run, 0)
        for step in range(steps):
            logger.log(step, {"train/loss": first + step})
        logger.close()
    reader = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard" / "run"))
    reader.Reload()
    found = [(event.step, event.value) for event in reader.Scalars("train/loss")]
    assert found == [(0, 5.0), (1, 6.0)]


def test_a_run_name_does_not_lead_out_of_the_folder(tmp_path):
    pytest.importorskip("tensorboard")
    run = config(tmp_path, ["tensorboard"])
    for name in ("../../../elsewhere", "/elsewhere", "team/run"):
        logger = TensorBoard(
            run.model_copy(update={"log": run.log.model_copy(update={"run_name": name})}), 0
        )
        logger.log(0, {"train/loss": 1.0})
        logger.close()
    found = {each.name for each in (tmp_path / "run" / "tensorboard").iterdir()}
    assert found == {"elsewhere", "team"} and not (tmp_path / "elsewhere").exists()
