"""Every logger with its own client, offline; loggers that cannot begin, that fail, and that go on."""

import contextlib
import csv
import importlib.util
import json
import os
import sys
import threading
import time
import zipfile
from types import SimpleNamespace

import pytest

from dpo_fast.errors import UserError
from dpo_fast.training import loggers
from dpo_fast.training.config import build_config
from dpo_fast.training.logger_clients import CLIENTS, FAILED, FINISHED, STEP, Answers, Opening
from dpo_fast.training.logger_clients import TensorBoard as Board
from dpo_fast.training.loggers import Guarded, answers_table, check_loggers, open_loggers
from tests.support import wandb_file
from tests.support.models import run_tree

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"
NAME = "läuft 二"
LABELS = {"project": "project-1", "tags": ["alpha", "bêta"], "group": "sweep", "run_name": NAME}
ANSWERS = Answers(["prompt", "greedy", "score"], [["2 | 3?", "5\nfive", 0.5], ["why", "so", None]])
CURVE = {0: 1.0, 1: 0.5, 2: 0.25}


def config(folder, report_to, **log):
    tree = run_tree(folder)
    tree["log"] |= {"report_to": report_to, **log}
    return build_config(tree, "run")


def record(run, first: int, resumed: bool = False, status: str = FINISHED) -> None:
    """Log the curve from a step on, with a finding at step 1 and answers at step 2."""
    (logger,) = open_loggers(run, first, resumed)
    for step in range(first, 3):
        if step == 1:
            logger.tell(1, "overfit", "the held-out loss rises")
        logger.log(step, {"train/loss": CURVE[step], "eval/rewards/accuracies": 0.5})
    logger.answers(2, ANSWERS)
    logger.close(status)
    assert logger._failure is None


@pytest.fixture(scope="module")
def found():
    """Clients in the folder that LOGGERS names; tests of other files do not see them."""
    folder = os.environ.get("LOGGERS")
    with pytest.MonkeyPatch.context() as patch:
        if folder is not None:
            patch.setattr(sys, "path", [*sys.path, folder])
        yield


@pytest.fixture
def offline(found, request, tmp_path, monkeypatch):
    """The name of a service whose client writes to files of this test."""
    name, package = request.param, CLIENTS[request.param].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed, and LOGGERS names no folder with it")
    for variable, value in (
        ("WANDB_MODE", "offline"),
        ("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri()),
        ("MLFLOW_ALLOW_FILE_STORE", "true"),
        ("COMET_START_ONLINE", "0"),
        ("DO_NOT_TRACK", "true"),
    ):
        monkeypatch.setenv(variable, value)
    for variable in ("COMET_OFFLINE_DIRECTORY", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(variable, raising=False)
    if name == "trackio":
        import trackio.sqlite_storage
        import trackio.utils

        for module in (trackio, trackio.utils, trackio.sqlite_storage):
            if hasattr(module, "TRACKIO_DIR"):
                monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr(loggers, "HURRY", 120.0)  # wandb's process starts slowly on busy cores
    return name


SERVICES = [name for name in CLIENTS if name != "csv"]


@pytest.fixture
def recorded(offline, tmp_path):
    """A run that was stopped behind step 2 and went on behind step 1, in each of the services."""
    run = config(tmp_path, offline, notes=f"first try {SECRET}", **LABELS)
    record(run, 0, status=FAILED)
    record(run, 1, resumed=True)
    return offline, tmp_path


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "run/tensorboard" / NAME))
    reader.Reload()
    texts = {
        name: b"".join(e.tensor_proto.string_val[0] for e in reader.Tensors(name)).decode()
        for name in reader.Tags()["tensors"]
    }
    curve = {event.step: event.value for event in reader.Scalars("train/loss")}
    return curve, json.dumps(texts, ensure_ascii=False)


def read_wandb(folder):
    curve, said, names = {}, [], set()
    files = sorted(folder.glob("run/wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # one run, twice begun
    for file in files:
        for entry in wandb_file.parsed(file):
            kind = entry.WhichOneof("record_type")
            if kind == "history":
                line = {i.key or "/".join(i.nested_key): i.value_json for i in entry.history.item}
                if "train/loss" in line:
                    curve[int(line[STEP])] = float(line["train/loss"])
            elif kind in ("run", "alert", "summary"):
                said.append(str(entry))
            names |= {entry.run.run_id} if kind == "run" else set()
    assert len(names) == 1
    tables = [file.read_text() for file in folder.glob("run/wandb/*/files/media/table/*.json")]
    return curve, "".join([*said, *tables])


def read_mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name(LABELS["project"])
    (found,) = client.search_runs([experiment.experiment_id])  # it went on in the same run
    assert found.info.status == "FINISHED" and found.info.run_name == NAME
    assert found.data.params["loss.beta"] == "0.1"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    curve = {each.step: each.value for each in history}
    artifacts = [file.read_text() for file in folder.rglob("mlruns/*/*/artifacts/**/*.json")]
    return curve, str(found.data.tags) + str(found.data.params) + "".join(artifacts)


def read_trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs(LABELS["project"]) == [NAME]
    lines = SQLiteStorage.get_logs(LABELS["project"], NAME)
    curve = {line[STEP]: line["train/loss"] for line in lines if "train/loss" in line}
    alerts = SQLiteStorage.get_alerts(LABELS["project"])
    options = SQLiteStorage.get_run_config(LABELS["project"], NAME)
    return curve, f"{lines}{alerts}{options}"


def read_comet(folder):
    files = sorted((folder / "run/comet").glob("*.zip"), key=lambda file: len(file.name))
    key = json.loads((folder / "run/loggers.json").read_text())["comet_ml"]
    assert len(files) == 2 and all(file.name.startswith(key) for file in files)
    curve, said = {}, []
    for file in files:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                said.append(archive.read(name).decode(errors="replace"))
            for line in archive.read("messages.json").decode().splitlines():
                payload = json.loads(line)["payload"]
                said.append(json.dumps(payload, ensure_ascii=False))
                metric = payload.get("metric") or {}
                if metric.get("metricName") == "train/loss":
                    curve[metric["step"]] = float(metric["metricValue"])
    return curve, "".join(said)


READERS = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
    "comet_ml": read_comet,
}


@pytest.mark.parametrize("offline", SERVICES, indirect=True)
def test_a_service_has_curves_options_labels_findings_and_answers(recorded):
    name, folder = recorded
    curve, said = READERS[name](folder)
    assert curve == CURVE
    for words in ("alpha", "bêta", "sweep", "first try", "held-out loss rises", "five", "2 "):
        assert words in said, words
    assert "micro_batch_size" in said  # the configuration
    written = (file for file in folder.rglob("*") if file.is_file())
    assert SECRET not in said
    assert not any(SECRET.encode() in file.read_bytes() for file in written)


@pytest.mark.parametrize("offline", ["trackio"], indirect=True)
def test_a_run_goes_on_in_its_own_where_a_later_one_has_its_name(offline, tmp_path):
    first, second = (config(tmp_path / each, "trackio", **LABELS) for each in ("a", "b"))
    for run, steps, resumed in ((first, (0, 1), False), (second, (0,), False), (first, (2,), True)):
        (logger,) = open_loggers(run, steps[0], resumed)
        for step in steps:
            logger.log(step, {"train/loss": CURVE[step]})
        logger.close()
    from trackio.sqlite_storage import SQLiteStorage as Storage

    ids = [
        json.loads((tmp_path / each / "run/loggers.json").read_text())["trackio"].partition("/")[0]
        for each in ("a", "b")
    ]
    lines = [Storage.get_logs(LABELS["project"], NAME, run_id=each) for each in ids]
    assert [[line[STEP] for line in each] for each in lines] == [[0, 1, 2], [0]]


def test_csv_has_a_line_for_each_step_and_goes_on_behind_its_checkpoint(tmp_path):
    run = config(tmp_path, "csv")
    record(run, 0)
    (logger,) = open_loggers(run, 1, resumed=True)
    logger.log(2, {"train/loss": 7.0})
    logger.log(2, {"eval/new": 3.0})  # an evaluation belongs to the line of its step
    logger.log(3, {"train/loss": 8.0})
    logger.close()
    with (tmp_path / "run/metrics.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line[STEP] for line in lines] == ["0", "1", "2", "3"]
    assert [line["train/loss"] for line in lines] == ["1.0", "0.5", "7.0", "8.0"]
    assert [line["eval/new"] for line in lines] == ["", "", "3.0", ""]
    assert lines[1]["health"] == "overfit: the held-out loss rises"


def test_names_of_loggers(tmp_path):
    assert config(tmp_path, "wandb").log.report_to == ["wandb"]
    assert config(tmp_path, "none").log.report_to == []
    assert config(tmp_path, ["comet", "csv", "comet_ml"]).log.report_to == ["comet_ml", "csv"]
    with pytest.raises(UserError, match="report_to.*neptune"):
        config(tmp_path, "neptune")


@pytest.mark.parametrize(
    "option", [{"tags": "one"}, {"project": "p"}, {"notes": "n"}, {"group": "g"}]
)
def test_labels_without_a_logger_are_refused(tmp_path, option):
    (name,) = option
    with pytest.raises(UserError, match=rf"log.{name}=.* is not used: name a logger"):
        config(tmp_path, "none", **option)


def test_answers_of_a_run_without_any_are_refused(tmp_path):
    with pytest.raises(
        UserError, match="log_completions=true, but no answers.*generate.max_prompts"
    ):
        config(tmp_path, "csv", log_completions=True)


def test_a_missing_package_is_named_as_pip_calls_it(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    for name in ("comet_ml", "mlflow", "trackio"):
        with pytest.raises(UserError, match=f"log.report_to={name}: .* pip install {name}"):
            check_loggers(config(tmp_path, name))
    check_loggers(config(tmp_path, "csv"))


def test_wandb_without_a_key_is_told_and_no_traceback(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**options):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.\nmore")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match="log.report_to=wandb: No API key .* WANDB_MODE=offline"):
        open_loggers(config(tmp_path, ["wandb"]), 0)


class Broken:
    """A service that fails when it is asked for what `fails` names."""

    package, install, advice, identity = None, "", " Call somebody", "known"
    fails: str = ""

    running = staticmethod(lambda: None)

    def __init__(self, opening):
        self.calls = []
        if self.fails == "open":
            raise ConnectionError("no route to host")

    def __getattr__(self, name):
        def call(*arguments):
            if name == self.fails:
                raise ConnectionError("the service is away")
            self.calls.append(name)

        return call


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(loggers, "say", lambda text, matters=False: lines.append(text))
    return lines


@pytest.mark.parametrize("fails", ["log", "tell", "answers", "close"])
def test_a_service_that_fails_is_told_once_and_ends_nothing(tmp_path, monkeypatch, said, fails):
    monkeypatch.setitem(CLIENTS, "csv", type("Failing", (Broken,), {"fails": fails}))
    (logger,) = open_loggers(config(tmp_path, ["csv"]), 0)
    for step in range(20):
        logger.tell(step, "finding", "words")
        logger.answers(step, ANSWERS)
        logger.log(step, {"train/loss": 1.0})
    logger.close()
    logger.close()
    (line,) = said
    assert "log.report_to=csv failed (ConnectionError: the service is away)" in line
    # What works before the failure was done; behind it the client is only ended.
    assert ("close" in logger.logger.calls) == (fails != "close")


def test_a_service_that_hangs_holds_nothing_up(tmp_path, monkeypatch, said):
    gate = threading.Event()
    monkeypatch.setattr(Broken, "log", lambda self, *_: gate.wait(60), raising=False)
    monkeypatch.setattr(loggers, "PATIENCE", {FINISHED: 0.2})
    logger = Guarded("csv", lambda: Broken(None))
    for step in range(1000):
        logger.log(step, {})
    logger.close()
    gate.set()
    assert said == [
        "log.report_to=csv does not answer and gets nothing more; the run goes on, and "
        "metrics.jsonl has everything"
    ]


def test_a_service_that_is_away_stops_a_new_run_and_not_one_that_goes_on(
    tmp_path, monkeypatch, said
):
    monkeypatch.setitem(CLIENTS, "csv", type("Away", (Broken,), {"fails": "open"}))
    run = config(tmp_path, ["csv"])
    with pytest.raises(UserError, match="log.report_to=csv: no route to host. Call somebody"):
        open_loggers(run, 0)
    assert open_loggers(run, 5, resumed=True) == []
    assert "the run goes on without it" in said[0]


def test_a_service_that_does_not_begin_is_an_error_in_time(tmp_path, monkeypatch, said):
    gate = threading.Event()

    class Slow(Broken):
        made = []

        def __init__(self, opening):
            gate.wait(60)
            super().__init__(opening)
            Slow.made.append(self)

    monkeypatch.setitem(CLIENTS, "csv", Slow)
    monkeypatch.setattr(loggers, "BEGINNING", 0.2)
    monkeypatch.setattr(loggers, "SILENT", 0.1)
    with pytest.raises(UserError, match="report_to=csv: the service has not answered for 0.2 sec"):
        open_loggers(config(tmp_path, ["csv"]), 0)
    assert said == ["waiting until csv has begun, at most 0.2 seconds"]
    gate.set()
    deadline = time.monotonic() + 60
    while not (Slow.made and Slow.made[0].calls) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert Slow.made[0].calls == ["close"], "one that begins after all is ended"


@pytest.mark.parametrize("offline", ["mlflow", "wandb"], indirect=True)
def test_long_and_odd_values_are_taken_or_refused_with_the_reason(offline, tmp_path):
    given = config(tmp_path, offline, tags=["t" * 300], notes="ñ" * 20000, group="g" * 400)
    if offline == "wandb":
        with pytest.raises(UserError, match="report_to=wandb: .*run_(tags|group)"):
            open_loggers(given, 0)
        return
    tree = given.resolved()
    tree["data"]["train"] = [f"{'long' * 20}{number}.jsonl" for number in range(300)]
    (logger,) = open_loggers(build_config(tree, "run"), 0)
    logger.tell(1, "my (own) finding", "words " * 3000)
    logger.log(1, {"train/" + "x" * 300: 1.0, "train/mühe (odd) %": 2.0})
    logger.close()
    assert logger._failure is None
    found = logger.logger.client.get_run(logger.logger.identity)
    assert found.data.metrics == {("train/" + "x" * 300)[:250]: 1.0, "train/mühe _odd_ _": 2.0}
    assert found.data.tags["health/my _own_ finding"].startswith("step 1: words words")
    assert "299.jsonl" in "".join(file.read_text() for file in tmp_path.rglob("config.yaml"))


def test_a_logger_that_has_begun_is_ended_where_the_next_cannot(tmp_path, monkeypatch):
    begun = []

    class First(Broken):
        def __init__(self, opening):
            super().__init__(opening)
            begun.append(self)

    monkeypatch.setitem(CLIENTS, "csv", First)
    monkeypatch.setitem(CLIENTS, "wandb", type("Away", (Broken,), {"fails": "open"}))
    with pytest.raises(UserError, match="report_to=wandb: no route to host"):
        open_loggers(config(tmp_path, ["csv", "wandb"]), 0)
    assert begun[0].calls == ["close"], "the client would have it as the run of the next call"


def test_an_experiment_of_comets_without_a_connection_is_told(tmp_path):
    """Its client says so on the terminal, and then drops everything."""
    gone = SimpleNamespace(alive=False, get_key=lambda: "known")
    with pytest.raises(ConnectionError, match="no connection to Comet"):
        CLIENTS["comet_ml"](Opening(config(tmp_path, ["comet_ml"]), 0, theirs=gone))


def test_names_that_the_variables_of_wandb_give(tmp_path, monkeypatch):
    given = {}
    run = SimpleNamespace(id="1", define_metric=lambda *_, **__: None)
    wandb = SimpleNamespace(run=None, init=lambda **options: given.update(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_NAME", "theirs")
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    CLIENTS["wandb"](Opening(config(tmp_path, ["wandb"]), 0))
    assert (given["name"], given["dir"]) == ("theirs", "elsewhere")
    CLIENTS["wandb"](Opening(config(tmp_path, ["wandb"], run_name="ours"), 0))
    assert given["name"] == "ours"


def test_a_table_of_answers():
    answers = [
        {"where": "a:1", "prompt": [{"role": "user", "content": "2 + 3?"}], "chosen": "5"}
        | {"greedy": {"text": "five"}, "sampled": {"text": "six"}, "scores": {"greedy": 1.0}},
        {"where": "a:2", "prompt": "why", "chosen": None, "greedy": {"text": "x" * 9000}},
    ]
    table = answers_table(answers)
    assert table.columns == ["where", "prompt", "greedy", "sampled", "score", "chosen"]
    assert table.rows[0] == ["a:1", "user: 2 + 3?", "five", "six", 1.0, "5"]
    assert len(table.rows[1][2]) == loggers.MOST_CHARACTERS
    assert Answers(["a|b"], [["x\x85y"]]).markdown == "| a\\|b |\n| --- |\n| x<br>y |"


def test_a_run_that_begins_again_hides_the_earlier_curve(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = config(tmp_path, ["tensorboard"])
    for steps, first in ((3, 1.0), (2, 5.0)):
        logger = Board(Opening(run, 0))
        for step in range(steps):
            logger.log(step, {"train/loss": first + step})
        logger.close(FINISHED)
    reader = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard" / "run"))
    reader.Reload()
    found = [(event.step, event.value) for event in reader.Scalars("train/loss")]
    assert found == [(0, 5.0), (1, 6.0)]


def test_a_run_name_does_not_lead_out_of_the_folder(tmp_path):
    pytest.importorskip("tensorboard")
    run = config(tmp_path, ["tensorboard"])
    for name in ("../../../elsewhere", "/elsewhere", "team/run"):
        log = run.log.model_copy(update={"run_name": name})
        logger = Board(Opening(run.model_copy(update={"log": log}), 0))
        logger.log(0, {"train/loss": 1.0})
        logger.close(FINISHED)
    found = {each.name for each in (tmp_path / "run" / "tensorboard").iterdir()}
    assert found == {"elsewhere", "team"} and not (tmp_path / "elsewhere").exists()


@contextlib.contextmanager
def of_wandb(folder):
    import wandb

    run = wandb.init(project="theirs", dir=str(folder))
    yield
    assert wandb.run is run, "it is as open as it was"
    run.log({"after": 2.0})
    run.finish()
    lines = wandb_file.history(folder)
    assert {"train/loss": 0.5, STEP: 1} in [
        {name: line[name] for name in ("train/loss", STEP) if name in line} for line in lines
    ]
    assert any("after" in line for line in lines)
    assert json.loads((folder / "run/loggers.json").read_text())["wandb"] == run.id


@contextlib.contextmanager
def of_mlflow(folder):
    import mlflow

    mlflow.set_experiment("theirs")
    with mlflow.start_run(run_name="theirs") as run:
        mlflow.log_param("loss.beta", "0.9")  # a parameter never changes
        yield
        assert mlflow.active_run().info.run_id == run.info.run_id
        mlflow.log_metric("after", 2.0)
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([run.info.experiment_id])
    assert found.info.run_name == "theirs"
    assert found.data.metrics == {"after": 2.0, "train/loss": 0.5}
    assert found.data.params["loss.beta"] == "0.9" and "loss.type" in found.data.params
    assert found.data.tags["health/overfit"] == "step 1: it rises"
    record(config(folder, "mlflow"), 0)  # of our own, in the experiment that they have set
    assert len(client.search_runs([run.info.experiment_id])) == 2


@contextlib.contextmanager
def of_trackio(folder):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage as Storage

    run = trackio.init(project="theirs", name="theirs", config={"seed": 1}, embed=False)
    trackio.log({"before": 1.0})
    deadline = time.monotonic() + 60
    while not Storage.get_logs("theirs", "theirs") and time.monotonic() < deadline:
        time.sleep(0.05)
    yield
    assert trackio.context_vars.current_run.get() is run
    trackio.log({"after": 2.0})
    trackio.finish()
    lines = Storage.get_logs("theirs", "theirs")
    assert [set(line) & {"before", "train/loss", "after"} for line in lines] == [
        {"before"},
        {"train/loss"},
        {"after"},
    ]
    options = Storage.get_run_config("theirs", "theirs")
    assert options["seed"] == 1 and "loss" in options
    assert [alert["text"] for alert in Storage.get_alerts("theirs")] == ["it rises"]
    assert Storage.get_projects() == ["theirs"]


@contextlib.contextmanager
def of_comet_ml(folder):
    import comet_ml

    place = comet_ml.ExperimentConfig(offline_directory=str(folder), log_code=False)
    running = comet_ml.start(project_name="theirs", online=False, experiment_config=place)
    yield
    assert not running.ended
    running.log_metric("after", 2.0)
    running.end()
    (file,) = folder.rglob("*.zip")
    said = zipfile.ZipFile(file).read("messages.json").decode()
    for words in ('"after"', '"train/loss"', "it rises", "micro_batch_size", '"alpha"'):
        assert words in said, words
    assert f'"{FINISHED}"' not in said, "its end is theirs to tell"


THEIRS = {"wandb": of_wandb, "mlflow": of_mlflow, "trackio": of_trackio, "comet_ml": of_comet_ml}


@pytest.mark.parametrize("offline", THEIRS, indirect=True)
def test_a_run_that_the_calling_code_has_begun_gets_everything_and_stays_open(offline, tmp_path):
    with THEIRS[offline](tmp_path):
        (logger,) = open_loggers(config(tmp_path, offline, tags=["alpha"]), 0)
        logger.tell(1, "overfit", "it rises")
        logger.log(1, {"train/loss": 0.5})
        logger.close()
        assert logger._failure is None
