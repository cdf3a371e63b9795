"""What a user meets at the command line, above all when something is wrong: one paragraph, exit
code 2, no traceback, nothing half-written."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers")

from dpo_fast.cli import app
from dpo_fast.errors import UserError
from tests.support import run_folder
from tests.support.models import run_tree, write_model, write_pairs
from tests.support.paths import ENVIRONMENT, ROOT

GOOD = {"prompt": "1 or 2? ", "chosen": "2", "rejected": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl")
    return folder


def run(capsys, monkeypatch, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and error of `dpo-fast *arguments`, in this process."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(app, "_leave", leave)
    monkeypatch.setattr(sys, "argv", ["dpo-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def config(folder: Path, tree: dict, name: str = "bad.yaml") -> Path:
    (folder / name).write_text(yaml.safe_dump(tree))
    return folder / name


OPTIONS = {  # what is wrong: key=value, and what the message must say
    "unknown key": (
        "train.learning_rat=1e-6",
        "unknown key train.learning_rat; did you mean learning",
    ),
    "unknown section": ("modle.path=x", "unknown key modle; did you mean model?"),
    "unknown nested key": ("model.lora.rank=4", "unknown key model.lora.rank; "),
    "unknown loss": ("loss.type=sigmod", "loss.type=sigmod: did you mean sigmoid?"),
    "the best known loss": ("loss.type=DPO", "loss.type=DPO: the loss of DPO is called sigmoid"),
    "no section": (
        "model.lora=true",
        "model.lora=True: expected a section, with any of the keys r,",
    ),
    "an earlier name": ("train.global_pairs=8", "did you mean global_batch_size?"),
    "another earlier name": ("train.micro_pairs=8", "did you mean micro_batch_size?"),
    "unused option": ("loss={type: hinge, label_smoothing: 0.1}", "is not used by hinge"),
    "label smoothing": ("loss.label_smoothing=0.5", "label_smoothing=0.5 must be"),
    "negative beta": ("loss.beta=-1", "beta=-1"),
    "weights": ("loss={type: [sigmoid, sft], weights: [1]}", "2 losses"),
    "no reference": ("reference.provider=none", "compares with a reference"),
    "no adapters": ("reference.provider=adapter_off", "set model.lora"),
    "impossible sizes": ("data.max_prompt_length=4096", "leaves no room for a completion"),
    "batch": (
        "train.global_batch_size=7",
        "train.global_batch_size=7 must be a multiple of micro_batch_size",
    ),
    "two sizes": ("train.tokens_per_batch=512", "train.micro_batch_size=4 both say how large"),
    "endless stream": ("data.streaming=true", "set train.max_steps"),
    "unused buffer": ("data.stream_buffer=64", "data.stream_buffer=64 is not used"),
    "no steps": ("train.max_steps=0", "train.max_steps=0"),
    "dtype of nothing merged": (
        "train.merge_dtype=bf16",
        "train.merge_dtype=bf16 is not used: set train.merge_lora=true",
    ),
    "overwrites what it goes on from": (
        "train={output_dir: never, overwrite_output_dir: true, resume_from_checkpoint: true}",
        "overwrite_output_dir=true removes what",
    ),
    "stage": ("parallel.zero_stage=4", "parallel.zero_stage=4"),
    "offload": (
        "parallel={zero_stage: 1, offload_optimizer: true}",
        "parallel.zero_stage=2 or more",
    ),
    "nothing to evaluate": ("train.eval_steps=5", "set data.eval or data.eval_rows"),
    "scheduler": ("train.lr_scheduler_type=cosin", "did you mean cosine?"),
    "type": ("train.global_batch_size=many", "train.global_batch_size='many'"),
    "model folder": ("model.path=/no/such/model", "no such folder"),
    "layout": ("train.layout=packd", "train.layout='packd'"),
    "not key=value": ("train.max_steps", "expected section.key=value"),
    "monitor": ("log.report_to=[wandb]", "pip install wandb"),
    "tokenizer folder": ("model.tokenizer=./no-such", "model.tokenizer=./no-such: no such folder"),
    "tokens of no cache": (
        "reference={provider: frozen, per_token: true}",
        "per_token=true is not used",
    ),
    "layers": ("model.checkpoint_layers=3", "checkpoint_layers=3: the model has 2 decoder layers"),
    "compiled shards": ("model.torch_compile=true", "set parallel.zero_stage=2 or less"),
    "nothing to offload": ("reference.offload=true", "no second model to offload; choose frozen"),
    "endless epochs": (
        "train.num_train_epochs=.inf",
        "train.num_train_epochs=inf: input should be",
    ),
    "weight of nothing": ("loss={type: [sigmoid, sft], weights: [1, .nan]}", "loss.weights.1=nan"),
    "seed": (
        "train.seed=1208925819614629174706176",
        "train.seed=1208925819614629174706176 is out of range; the largest",
    ),
    "data seed": ("data.seed=-1", "data.seed=-1 must be at least 0"),
    "blank folder": ("train.output_dir=' '", "train.output_dir=' ' names no folder"),
    "a key twice": ("loss={beta: 0.1, beta: 0.2}", "the key 'beta' stands twice"),
    "no folder": (
        "train.output_dir=/dev/null/run",
        "train.output_dir=/dev/null/run cannot be written",
    ),
    "attention": (
        "model.attention=spda",
        "model.attention=spda is no implementation of attention; did you mean sdpa?",
    ),
    "attention of a mask": ("model.attention=eager", "model.attention=eager cannot keep sequences"),
    "flash on a CPU": ("model.attention=flash_attention_2", "does not train on a CPU"),
}


ALONE = """
import sys
sys.modules["typer"] = {typer}
sys.argv = ["dpo-fast", *{arguments!r}]
from dpo_fast.cli import app, main
app._leave = sys.exit
try:
    main()
finally:
    print(sorted({{"torch", "transformers", "deepspeed"}} & sys.modules.keys()))
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, ["train"], "no such configuration file"),
        (None, ["data"], "no such configuration file"),
        (None, ["doctor"], "no such configuration file"),
        (None, ["config", "show"], "no such configuration file"),
        ("a: [", ["reference"], "is not YAML"),
        ("3", ["train"], "expected sections (model, data"),
        ("train: {}", ["train", "train.seed"], "expected section.key=value"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_before_anything_large_is_imported(
    tmp_path, text, arguments, message
):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    at = 2 if arguments[0] == "config" else 1
    arguments = [*arguments[:at], str(file), *arguments[at:]]
    code = ALONE.format(typer="__import__('typer')", arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.processes
def test_without_the_extra_the_command_says_what_to_install():
    code = ALONE.format(typer=None, arguments=["train", "run.yaml"]).replace(
        "from dpo_fast.cli import app, main\napp._leave = sys.exit", "from dpo_fast.cli import main"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "dpo-fast: the package typer is missing, which the command line needs: pip install "
        '"dpo_fast[train]"'
    ]


def test_version(capsys, monkeypatch):
    import dpo_fast

    assert run(capsys, monkeypatch, "--version")[:2] == (0, f"dpo_fast {dpo_fast.__version__}\n")


def test_sections_of_a_file_are_those_of_a_run():
    from dpo_fast.training.config import RunConfig
    from dpo_fast.training.config_file import SECTIONS

    assert tuple(RunConfig.model_fields) == SECTIONS


@pytest.mark.parametrize("what", OPTIONS)
def test_bad_option(folder, capsys, monkeypatch, what):
    from dpo_fast.training import distributed

    # These must fail before a process group is made: a launcher's other ranks would wait in it.
    monkeypatch.setattr(
        distributed, "init_distributed", lambda *_: pytest.fail("a process group was made")
    )
    override, message = OPTIONS[what]
    if what == "monitor":  # as if it were not installed
        find_spec = importlib.util.find_spec
        others = lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", others)
    tree = run_tree(folder)
    output = folder / "never"
    tree["train"]["output_dir"] = str(output)
    if what == "compiled shards":
        tree["parallel"] = {"zero_stage": 3}
    code, _, err = run(capsys, monkeypatch, "train", config(folder, tree), override)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert not output.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train: {output_dir: other}", "the key 'train' stands twice"),
        ("1: 2", "unknown key 1"),
        ("? [a]\n: 2", "is not YAML"),
    ],
)
def test_bad_keys(folder, capsys, monkeypatch, line, message):
    file = config(folder, run_tree(folder))
    file.write_text(file.read_text() + line + "\n")
    code, _, err = run(capsys, monkeypatch, "train", file)
    assert code == 2 and message in err
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reference.provider=frozen", "reference.provider=frozen stores nothing"),
        ("loss.type=sft", "loss.type=sft compares with no reference"),
        ("reference.path=./no-such", "reference.path=./no-such: no such folder"),
        ("data={streaming: true, train: x}", "data.streaming=true"),
    ],
)
def test_a_reference_that_cannot_be_stored(folder, capsys, monkeypatch, override, message):
    tree = run_tree(folder)
    tree["train"]["output_dir"] = str(folder / "never")
    code, _, err = run(capsys, monkeypatch, "reference", config(folder, tree), override)
    assert code == 2 and message in err
    assert len(err.strip().splitlines()) == 1, err
    assert not (folder / "never").exists()


BAD_DATA = {
    "broken JSON": ([json.dumps(GOOD), '{"prompt": "x"'], ":2"),
    "missing field": ([json.dumps({"prompt": "x", "chosen": "y"})], "rejected"),
    "empty answer": ([json.dumps(GOOD | {"chosen": "  "})], "chosen"),
    "equal answers": ([json.dumps(GOOD | {"chosen": "1"})], ":1"),
    "wrong role": ([json.dumps(GOOD | {"prompt": [{"role": "robot", "content": "hi"}]})], "robot"),
    "not an object": (["[1, 2]"], ":1"),
    "empty file": ([], "there are no rows in it"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data(folder, capsys, monkeypatch, what):
    lines, message = BAD_DATA[what]
    file = folder / "bad.jsonl"
    file.write_text("\n".join(lines))
    tree = run_tree(folder)
    code, _, err = run(capsys, monkeypatch, "data", config(folder, tree), f"data.train={file}")
    assert code == 2
    assert "bad.jsonl" in err and message in err
    assert len(err.strip().splitlines()) == 1, err


def test_missing_files_are_named(folder, capsys, monkeypatch):
    code, _, err = run(capsys, monkeypatch, "train", folder / "absent.yaml")
    assert code == 2 and "absent.yaml: no such configuration file" in err
    tree = run_tree(folder)
    code, _, err = run(
        capsys, monkeypatch, "data", config(folder, tree), f"data.train={folder}/pair.jsonl"
    )
    assert code == 2 and "pair.jsonl" in err and "pairs.jsonl" in err  # names the near miss
    (folder / "broken.yaml").write_text("model: [1,")
    code, _, err = run(capsys, monkeypatch, "data", folder / "broken.yaml")
    assert code == 2 and "is not YAML" in err


@pytest.mark.parametrize("command", ["export", "replay"])
def test_a_name_that_is_too_long_is_told_and_not_in_full(command, capsys, monkeypatch):
    code, _, err = run(capsys, monkeypatch, command, "x" * 5000)
    assert code == 2 and "File name too long" in err and len(err) < 400


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"config.json": "{"}, "is not JSON"),
        ({"config.json": "{}"}, "no weights"),
    ],
)
def test_a_folder_that_is_no_model(folder, tmp_path, capsys, monkeypatch, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, _, err = run(
        capsys, monkeypatch, "data", config(folder, run_tree(folder)), f"model.path={tmp_path}"
    )
    assert code == 2 and message in err


def test_data_shows_counts_lengths_and_scored_tokens(folder, capsys, monkeypatch):
    code, out, _ = run(
        capsys, monkeypatch, "data", config(folder, run_tree(folder)), "--examples", "1"
    )
    assert code == 0
    assert "24 pairs" in out and "p95" in out
    assert (out.count("⟦"), out.count("·</s>⟧")) == (2, 2)  # one pair of brackets for each answer


def test_data_needs_no_section_train(folder, capsys, monkeypatch):
    tree = run_tree(folder)
    del tree["train"]
    code, out, _ = run(capsys, monkeypatch, "data", config(folder, tree))
    assert code == 0 and "24 pairs" in out
    code, _, err = run(capsys, monkeypatch, "train", config(folder, tree))
    assert code == 2 and "train is missing" in err
    code, _, err = run(capsys, monkeypatch, "data", config(folder, tree | {"train": 3}))
    assert code == 2 and "train=3" in err


def test_answers_alike_or_empty_are_left_out_and_counted(folder, capsys, monkeypatch):
    rows = [GOOD, GOOD | {"chosen": "1"}, GOOD | {"rejected": " "}]
    (folder / "ties.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = config(folder, run_tree(folder))
    code, out, _ = run(capsys, monkeypatch, "data", file, f"data.train={folder}/ties.jsonl")
    assert code == 0 and "1 pairs kept" in out and "2 dropped" in out
    assert "chosen equals rejected" in out and "empty rejected" in out


@pytest.mark.parametrize("word", ["--local_rank=0", "--local-rank=0"])
def test_launchers_put_a_word_first(word, capsys, monkeypatch):
    """DeepSpeed's, and torch.distributed.launch."""
    code, out, _ = run(capsys, monkeypatch, word, "config", "schema")
    assert code == 0 and "properties" in out


def test_a_signal_while_the_reason_is_told_changes_nothing(capsys, monkeypatch):
    """A launcher passes on the Ctrl-C that its ranks had already."""

    def leave(code):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        raise SystemExit(code)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(app, "_leave", leave)
    with pytest.raises(SystemExit) as ended:
        app._end("interrupted", 130)
    assert ended.value.code == 130 and capsys.readouterr().err == "dpo-fast: interrupted\n"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


INTERRUPTED = """
import atexit, signal, sys, types
app = types.ModuleType("dpo_fast.cli.app")
def main():
    raise KeyboardInterrupt
app.main = main
sys.modules["dpo_fast.cli.app"] = app
atexit.register(signal.raise_signal, signal.SIGINT)
from dpo_fast.cli import main
main()
"""


@pytest.mark.processes
def test_ctrl_c_while_it_imports_has_no_traceback_and_neither_has_the_second_that_a_launcher_passes_on():
    """An orderly end of an interpreter with PyTorch takes seconds, and the second would come into it."""
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "dpo-fast: interrupted\n")


@pytest.mark.processes
def test_train_fails_cleanly_in_a_process_of_its_own_and_on_two_ranks(folder):
    """The real thing: exit code 2 and no traceback, alone and with --nproc 2."""
    file = folder / "bad.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"rejected": 3}))
    tree = run_tree(folder)
    tree["train"]["output_dir"] = str(folder / "never")
    tree["data"]["train"] = str(file)
    path = config(folder, tree, "real.yaml")
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    for extra in ([], ["--nproc", "2"]):
        result = subprocess.run(
            [sys.executable, "-m", "dpo_fast", "train", str(path), *extra],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 2, result.stderr
        assert "bad.jsonl:2" in result.stderr and "rejected" in result.stderr
        assert "Traceback" not in result.stderr
        assert not (folder / "never").exists()


class Peers:
    """The watch over other ranks, as the command line uses it."""

    def __init__(self, first: bool) -> None:
        self.first, self.told = first, []

    def first_to_tell(self, reason: str) -> bool:
        return self.first

    def fail(self, reason: str, code: int) -> None:
        self.told.append((reason, code))

    def await_verdict(self, seconds: float) -> None:
        self.told.append("waited")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "error, code, words, waited",
    [
        (UserError("no\n such file"), 2, "dpo-fast (rank 1): no such file\n", False),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero\n", False),
        (OSError(28, "No space left"), 2, "(rank 1): cannot write to standard output", False),
        (RuntimeError("gloo: Connection closed by peer"), 3, "another rank is gone", True),
    ],
)
def test_a_rank_tells_its_reason_unless_another_has(
    capsys, monkeypatch, error, code, words, waited, first
):
    from dpo_fast.cli import app
    from dpo_fast.training import distributed

    def fail(*_, **__):
        raise error

    peers = Peers(first)
    monkeypatch.setattr(distributed, "peers", lambda: peers)
    monkeypatch.setattr(app, "app", fail)
    monkeypatch.setattr(app, "_leave", sys.exit)
    monkeypatch.setattr(sys, "argv", ["dpo-fast", "train", "x.yaml"])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as end:
        app.main()
    assert end.value.code == code
    told = capsys.readouterr().err
    assert words in told if first else told == ""
    assert ("waited" in peers.told) is waited
    assert peers.told[-1][1] == code and "\n " not in peers.told[-1][0]


def test_flags_of_train_reach_the_run_and_its_ranks(folder, capsys, monkeypatch):
    from dpo_fast import progress
    from dpo_fast.cli import launch
    from dpo_fast.training import loop

    file, seen = config(folder, run_tree(folder), "flags.yaml"), []
    monkeypatch.setattr(
        loop, "train", lambda tree, dry_run: seen.append((dry_run, progress.hushed()))
    )
    monkeypatch.setattr(launch, "launch", lambda count, arguments: seen.append(arguments) or 0)
    try:
        assert run(capsys, monkeypatch, "train", file, "--dry-run", "--quiet") == (0, "", "")
        assert run(capsys, monkeypatch, "train", file, "--dry-run")[0] == 0
        two = ("--nproc", 2, "train.seed=1", "--dry-run", "--quiet")
        assert run(capsys, monkeypatch, "train", file, *two)[0] == 0
    finally:
        progress.hush(False)
    assert seen[:2] == [(True, True), (True, False)]
    assert seen[2] == ["train", str(file), "train.seed=1", "--dry-run", "--quiet"]


@pytest.mark.processes
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(shell):
    asked = ENVIRONMENT | {"_DPO_FAST_COMPLETE": f"source_{shell}"}
    command = [
        sys.executable,
        "-c",
        "import sys; sys.argv[0] = 'dpo-fast'; from dpo_fast.cli import main; main()",
    ]
    script = subprocess.run(command, env=asked, capture_output=True, text=True, timeout=60)
    assert f"_DPO_FAST_COMPLETE=complete_{shell}" in script.stdout, script.stderr
    words = {
        "COMP_WORDS": "dpo-fast tra",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "dpo-fast tra",
    }
    words |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_DPO_FAST_COMPLETE": f"complete_{shell}"}
    found = subprocess.run(
        command, env=ENVIRONMENT | words, capture_output=True, text=True, timeout=60
    )
    assert "train" in found.stdout and "report" not in found.stdout, found.stderr


def test_a_report_of_one_run_and_of_several(capsys, monkeypatch, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run_folder.make(tmp_path / name, run_folder.usual(), log={"run_name": name})
    folders = [tmp_path / "a", tmp_path / "b"]
    assert run(capsys, monkeypatch, "report", folders[0])[1].strip() == str(
        tmp_path / "a/report.html"
    )
    for given in (folders, sorted(tmp_path.iterdir())):  # the second time as `runs/*` has them
        code, out, _ = run(capsys, monkeypatch, "report", *given)
        assert code == 0 and out.strip() == str(tmp_path / "comparison.html")
    page = (tmp_path / "comparison.html").read_text()
    assert "<h1>2 runs</h1>" in page
    before = (tmp_path / "a/metrics.jsonl").read_text()
    mistakes = {
        "does not end in .html": [folders[0], "--out", tmp_path / "a/metrics.jsonl"],
        "does not exist. Name the folder of a run": [folders[0], tmp_path / "c"],
        "is named 2 times": [folders[0], folders[0]],
    }
    for message, arguments in mistakes.items():
        code, _, err = run(capsys, monkeypatch, "report", *arguments)
        assert code == 2 and message in err and "Traceback" not in err
    assert (tmp_path / "a/metrics.jsonl").read_text() == before
