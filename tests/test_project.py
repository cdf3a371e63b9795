"""The shape of the project: floors, packaging, and that the documents tell the truth."""

import ast
import csv
import json
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dpo_fast"
FLOORS = [  # each may import from those below it
    {"api", "cli", "demo", "integrations", "report", "__main__"},
    {"rounds", "migration"},
    {"training"},
    {"health", "generation", "judging"},
    {"data", "models", "references"},
    {"modules"},
    {"losses"},
    {"ops"},
    {"kernels"},
    {"errors", "frames", "durable", "progress", "version", "numbers", "wording", "bounded_yaml"},
]
LEVEL = {room: len(FLOORS) - index for index, rooms in enumerate(FLOORS) for room in rooms}


def sources() -> list[Path]:
    return [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]


def room_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@cache
def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_floors_import_downwards_only():
    for path in sources():
        room = room_of(path)
        if room == "__init__":
            continue
        for name in imports(path):
            if name.startswith("dpo_fast."):
                other = name.split(".")[1]
                if other in LEVEL:
                    assert other == room or LEVEL[other] <= LEVEL[room], f"{path} imports {name}"


def import_graph() -> dict[str, set[str]]:
    """For every module of the library and the benchmarks those of them that it imports.

    Imports inside functions and for type checkers count too.
    """
    files = {}
    for path in [*sources(), *(ROOT / "benchmarks").rglob("*.py")]:
        kernel = path.is_relative_to(ROOT / "kernels")
        parts = (*PACKAGE.parts, "kernels", path.name) if kernel else path.parts
        name = ".".join(parts[len(ROOT.parts) :]).removesuffix(".py")
        files[name.removesuffix(".__init__")] = path
    graph = {}
    for module, path in files.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        found = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):  # each name is a module, or stands in one
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                found |= {name if name in files else node.module for name in names}
        graph[module] = found & set(files)
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, the first again at the end; or nothing."""
    left = dict(graph)
    # A module that imports none of those left is in no circle.
    while free := [name for name, found in left.items() if not found & set(left)]:
        for name in free:
            del left[name]
    path: list[str] = []
    while left and (not path or path[-1] not in path[:-1]):
        path.append(min(left[path[-1]] & set(left)) if path else min(left))
    return path[path.index(path[-1]) :] if path else []


def test_imports_make_no_circle():
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert circle({"a": {"a"}}) == ["a", "a"] and not circle({"a": {"b"}, "b": set()})
    graph = import_graph()
    assert "dpo_fast.kernels.tiles" in graph and "benchmarks.run" in graph
    assert graph["dpo_fast.data.report"] and not circle(graph), " -> ".join(circle(graph))


TESTS = ROOT / "tests"
# Modules of some size that no test imports, and the test, or its process, that runs them through others.
TESTED_THROUGH = {
    "api.process": "api/test_run.py",
    "generation.logps": "judging/test_implicit.py",
    "models.adapters": "training/test_adapters.py",
    "models.adapter_path": "models/test_adapter_kinds.py",
    "models.lora_section": "models/test_lora.py",
    "report.still": "report/test_pictures.py",
    "models.lora_start": "models/test_lora.py",
    "data.forms.conversations": "data/test_forms.py",
    "data.forms.fields": "data/test_forms.py",
    "data.forms.instructions": "data/test_forms.py",
    "data.forms.ratings": "data/test_forms.py",
    "data.images.columns": "data/test_images.py",
    "data.images.expand": "data/test_image_rows.py",
    "data.images.laid": "data/test_image_rows.py",
    "data.images.options": "data/test_image_options.py",
    "data.images.processor": "data/test_image_rows.py",
    "data.images.rows": "data/test_image_rows.py",
    "data.images.store": "data/test_image_rows.py",
    "data.images.tokens": "data/test_image_rows.py",
    "data.entries": "data/test_mixture.py",
    "models.image_places": "models/test_vision.py",
    "data.parts": "data/test_mixture.py",
    "data.several": "data/test_mixture.py",
    "data.boundary": "data/test_tokenise.py",
    "data.build": "data/test_dataset.py",
    "data.arrow_files": "faults/test_files.py",
    "data.csv_files": "data/test_sources.py",
    "data.json_files": "faults/test_files.py",
    "data.json_text": "faults/test_files.py",
    "data.lines": "faults/test_files.py",
    "data.prompts": "data/test_tokenise.py",
    "demo.show": "demo/test_demo.py",
    "integrations.liger_loss": "integrations/test_liger.py",
    "integrations.liger_kto": "integrations/test_liger.py",
    "integrations.liger_grpo": "integrations/test_liger_grpo.py",
    "integrations.liger_distillation": "integrations/test_liger_distillation.py",
    "integrations.trl_losses": "integrations/test_trl.py",
    "kernels.gradient_tile": "ops/test_linear_logp_triton.py",
    "kernels.merge": "ops/test_linear_logp_triton.py",
    "kernels.rows": "ops/test_linear_logp_triton.py",
    "kernels.product": "ops/test_linear_logp_triton.py",
    "kernels.target_product": "ops/test_linear_logp_triton.py",
    "data.chat": "data/test_templates.py",
    "data.template_file": "data/test_templates.py",
    "rounds.sample_folder": "rounds/test_sample.py",
    "losses.pairwise": "losses/test_table.py",
    "losses.unpaired": "losses/test_table.py",
    "modules.metrics": "modules/test_fused.py",
    "ops.linear_logp.torch": "ops/test_linear_logp.py",
    "ops.linear_logp.torch_tiles": "ops/test_linear_logp.py",
    "report.companions": "report/test_report.py",
    "report.data": "report/test_report.py",
    "health.courses": "health/test_findings.py",
    "health.curves": "health/test_findings.py",
    "health.data": "health/test_findings.py",
    "health.findings": "health/test_findings.py",
    "health.history": "health/test_findings.py",
    "health.monitor": "health/test_findings.py",
    "training.generate_section": "training/test_answering.py",
    "training.generating": "support/workers/jobs.py",
    "report.answers": "report/test_report.py",
    "training.health_section": "health/test_findings.py",
    "training.parallel_section": "cli/test_config.py",
    "cli.doctor_traffic": "cli/test_doctor.py",
    "training.opening": "support/workers/jobs.py",
    "report.distributions": "report/test_report.py",
    "report.examples": "report/test_report.py",
    "report.frame": "report/test_report.py",
    "report.panels": "report/test_report.py",
    "report.script": "report/test_browser.py",
    "report.style": "report/test_report.py",
    "cli.iterate": "cli/test_app.py",
    "rounds.records": "support/workers/jobs.py",
    "rounds.stage": "support/workers/jobs.py",
    "rounds.stages": "rounds/test_iterate.py",
    "training.carried": "support/workers/jobs.py",
    "training.export": "support/workers/jobs.py",
    "cli.replay": "cli/test_app.py",
    "migration.arguments": "migration/test_importers.py",
    "migration.arguments_table": "migration/test_importers.py",
    "migration.axolotl_losses": "migration/test_peers.py",
    "migration.llamafactory_data": "migration/test_peers.py",
    "migration.trl_data": "migration/test_trl.py",
    "migration.axolotl": "migration/test_peers.py",
    "migration.axolotl_data": "migration/test_peers.py",
    "migration.axolotl_options": "migration/test_importers.py",
    "migration.axolotl_kernels": "migration/test_importers.py",
    "migration.counted": "migration/test_trl.py",
    "migration.deepspeed": "migration/test_importers.py",
    "migration.launcher": "migration/test_importers.py",
    "migration.llamafactory": "migration/test_peers.py",
    "migration.llamafactory_options": "migration/test_importers.py",
    "migration.openrlhf": "migration/test_peers.py",
    "migration.openrlhf_options": "migration/test_importers.py",
    "migration.reporting": "migration/test_trl.py",
    "migration.script": "migration/test_shell.py",
    "migration.settle": "migration/test_importers.py",
    "migration.trl_grpo_options": "migration/test_trl_grpo.py",
    "migration.sizes": "migration/test_peers.py",
    "training.loggers": "training/test_loop.py",
    "training.log_section": "training/test_loggers.py",
    "training.own_sampler": "api/test_own.py",
    "training.run_log": "support/workers/jobs.py",
}


def modules() -> dict[str, Path]:
    """Every module of the library by its name, `dpo_fast.data.batch` and the like."""
    found = {}
    for path in sources():
        kernel = path.is_relative_to(ROOT / "kernels")
        below = path.relative_to(ROOT / "kernels/ops" if kernel else PACKAGE).with_suffix("")
        parts = ["dpo_fast", *(["kernels"] if kernel else []), *below.parts]
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def reached_from(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that a file imports, by way of others too."""
    found, left = set(), [path]
    while left:
        for name in imports(left.pop()) & known.keys() - found:
            found.add(name)
            left.append(known[name])
    return found


def test_no_constant_is_set_twice():
    """A merge that keeps both sides of a table leaves the older one to win."""
    for path in [*(ROOT / "dpo_fast").rglob("*.py"), *TESTS.rglob("*.py")]:
        names = re.findall(r"^([A-Z][A-Z0-9_]*)(?:: .*)? = ", path.read_text(), re.M)
        assert len(names) == len(set(names)), path


def test_no_test_imports_another():
    for path in TESTS.rglob("*.py"):
        for name in imports(path):
            assert not name.startswith("tests.") or name.startswith("tests.support"), path


def test_every_operation_has_its_test_and_every_module_is_tested():
    for operation in ("linear_logp", "logits_logp"):
        assert (TESTS / f"ops/test_{operation}.py").exists()
    assert (TESTS / "losses/test_fused.py").exists()  # the operation `preference`
    known = modules()
    # Helpers and workers are imported by tests, and are walked like the library.
    known |= {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (TESTS / "support").rglob("*.py")
    }
    direct = {name for path in TESTS.rglob("*.py") for name in imports(path)}
    for package in {n for name in direct for n in (name, name.rpartition(".")[0])} & known.keys():
        if known[package].name == "__init__.py":
            direct |= imports(known[package])
    missing = set()
    for name, path in modules().items():
        room, _, stem = name.removeprefix("dpo_fast.").partition(".")
        room, stem = "ops" if room == "kernels" else room, stem.replace(".", "_")
        small = path.name == "__init__.py" or len(path.read_text().splitlines()) <= 60
        if not small and name not in direct and not (TESTS / room / f"test_{stem}.py").exists():
            missing.add(name.removeprefix("dpo_fast."))
    assert missing <= TESTED_THROUGH.keys(), "no test imports these"
    for name, file in TESTED_THROUGH.items():
        assert f"dpo_fast.{name}" in reached_from(TESTS / file, known), (name, file)


def test_losses_import_torch_alone_and_kernels_know_no_autograd():
    for path in sources():
        outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        if room_of(path) == "losses":
            assert outside <= {"torch", "dpo_fast"}, path
        if room_of(path) == "kernels":
            assert outside <= {"torch", "triton", "dpo_fast"}, path
            assert "autograd" not in path.read_text()
        if room_of(path) == "training":
            assert "triton" not in outside


def identifiers(path: Path) -> set[str]:
    """Names of variables, fields and arguments."""
    kinds = {ast.Name: "id", ast.arg: "arg", ast.Attribute: "attr", ast.keyword: "arg"}
    nodes = ast.walk(ast.parse(path.read_text()))
    return {getattr(node, kinds[type(node)]) or "" for node in nodes if type(node) in kinds}


def test_every_letter_of_a_shape_stands_in_the_legend():
    import dpo_fast.ops

    legend = set(re.findall(r"(?:^|  )([A-Z])  \w", dpo_fast.ops.__doc__, re.M))
    assert {"P", "S", "T", "N", "D", "V"} <= legend
    for path in [*sources(), *(ROOT / "benchmarks").rglob("*.py")]:
        for name in identifiers(path):
            suffix = re.search(r"[a-z0-9]_([A-Z]{1,3})$", name)
            unknown = set(suffix.group(1) if suffix else "") - legend
            assert not unknown, (
                f"{path}: {name} ends in {unknown}, which dpo_fast.ops does not explain"
            )


def test_the_pins_are_what_the_integrations_accept():
    pins = (ROOT / "pyproject.toml").read_text()
    line = re.search(r"^WRITTEN_FOR = (.+)", text_of("integrations/trl.py"), re.M).group(1)
    *first, major, minor = map(int, re.findall(r"(\d+)", line))
    pinned = re.findall(r'"trl>=(\d+)\.(\d+),<(\d+)\.(\d+);', pins)
    assert {tuple(map(int, found)) for found in pinned} == {(*first, major, minor + 1)}
    oldest = re.search(r'^OLDEST = "(.+?)"', text_of("integrations/arguments.py"), re.M).group(1)
    assert f'"transformers>={oldest},' in pins
    liger = re.search(r"liger-kernel (\d\S+)'s", text_of("integrations/liger.py")).group(1)
    assert set(re.findall(r'"liger-kernel>=(.+?)"', pins)) == {liger}


def text_of(name: str) -> str:
    return (PACKAGE / name).read_text()


@pytest.mark.processes
def test_importing_the_drop_in_is_light():
    """No trainer library, no Triton, no CUDA initialisation; nor the compiler and DTensors, which take as
    long as PyTorch itself, for who calls operations and modules without them."""
    code = (
        "import sys, dpo_fast, dpo_fast.modules, torch; "
        "heavy = {'transformers', 'deepspeed', 'datasets', 'pydantic', 'triton'} & set(sys.modules); "
        "assert not heavy, heavy; assert not torch.cuda.is_initialized(); "
        # PyTorch's build for a CPU comes without triton: the drop-in computes all the same.
        "sys.modules['triton'] = None; hidden, head = torch.randn(3, 8), torch.randn(5, 8); "
        "dpo_fast.linear_logp(hidden.requires_grad_(), head, torch.tensor([0, 1, 4])).logp.sum(); "
        "slow = {'torch._dynamo', 'torch.distributed.tensor', 'sympy'} & set(sys.modules); "
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.processes
def test_the_root_is_not_taken_for_hugging_faces_kernels():
    code = (
        "import importlib.util, transformers.integrations; "
        "spec = importlib.util.find_spec('kernels'); "
        "assert spec is None or spec.origin is None or 'site-packages' in spec.origin, spec"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    for name in ("kernels", "tests", "benchmarks"):
        assert not (ROOT / name / "__init__.py").exists()


def documents() -> list[Path]:
    pages = ("README", "CONTRIBUTING", "benchmarks/README", "csrc/README", "kernels/README")
    return [*(ROOT / f"{page}.md" for page in pages), *(ROOT / "docs").glob("*.md")]


# What stands with a slash in documents and is no file: folders of users, hub ids, names of metrics.
NO_PATHS = (
    "runs/",
    "http",
    "my-",
    "org/",
    "rewards/",
    "logps/",
    "perf/",
    "eval_",
    "router/",
    "generate/",
)


def test_paths_in_the_documents_exist():
    for document in documents():
        paths = r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|toml|yaml|txt))`"
        for name in re.findall(paths, document.read_text()):
            if name.startswith(NO_PATHS) or "output_dir" in name:
                continue
            roots = (ROOT, PACKAGE, document.parent, document.parent / "ops")
            assert any((root / name).exists() for root in roots), f"{document.name} names {name}"
        for link in re.findall(r"\]\(([^):#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_make_targets_and_commands_in_the_readme_exist():
    from typer.main import get_command

    from dpo_fast.cli.app import app

    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z]+)", text)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    commands = set(re.findall(r"dpo-fast ([a-z]+)", text))
    assert commands <= set(get_command(app).commands), commands


def test_the_tree_in_the_readme_is_the_repository():
    """Every folder of it exists, and every folder of the repository and of the library is in it."""
    (tree,) = re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = re.findall(r"^( *)(\w+)/ +\S", tree, re.M)
    assert len(lines) == len(tree.splitlines())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = [Path(name) for name in tracked.stdout.splitlines()]
    # Without git, as from an archive, there is nothing to compare.
    assert files or tracked.returncode
    folders = {file.parts[0] for file in files if len(file.parts) > 1} - {".ci"}
    rooms = {file.parts[1] for file in files if file.parts[0] == "dpo_fast" and len(file.parts) > 2}
    assert not files or {name for indent, name in lines if not indent} == folders
    assert not files or {name for indent, name in lines if indent} == rooms


def test_what_the_readme_says_of_losses_and_configuration_is_so():
    import yaml

    from dpo_fast.losses import LOSSES
    from dpo_fast.training.config import build_config

    text = (ROOT / "README.md").read_text()
    assert f"DPO and {len(LOSSES) - 1} other losses" in text
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    build_config(yaml.safe_load(example), "README.md")


def test_python_in_the_readme_runs():
    """The drop-in example, as it stands there."""
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        exec(compile(block, "README.md", "exec"), {})


MEASURED = (ROOT / "benchmarks/README.md", ROOT / "README.md")  # the first has every row
STEPS = {
    "TRL 1.16, default": "trl",
    "TRL 1.16, stored reference": "trl, precomputed",
    "TRL 1.16, stored reference, no checkpointing": "trl, precomputed, no checkpointing",
    "dpo_fast, padded, stored reference": "dpo_fast padded, cached",
    "dpo_fast, packed, stored reference": "dpo_fast packed, cached",
    "dpo_fast, shared_prefix, stored reference": "dpo_fast shared_prefix, cached",
    "dpo_fast, shared_prefix, frozen reference beside": "dpo_fast shared_prefix, frozen",
}
STEP_COLUMNS = {  # title -> column and format
    "pairs/s": ("pairs_per_s", "{:.2f}"),
    "x TRL": ("x_of_trl", "{:.2f}"),
    "x TRL, stored reference": ("x_of_trl_precomputed", "{:.2f}"),
    "positions computed": ("computed_tokens", "{:,.0f}"),
    "memory": ("peak_mib", "{:,.0f} MiB"),
}
HEADS = {
    "bare products": "bare products",
    "dpo_fast": "dpo_fast torch",
    "dpo_fast, with entropy, mean logit, top-1": "dpo_fast torch, extras",
    "dpo_fast, half of the tokens kept": "dpo_fast torch, half budget",
    "dpo_fast, nothing kept": "dpo_fast torch, recompute",
    "logits in full, PyTorch": "materialised",
    "logits in full, torch.compile": "materialised, compiled",
    "TRL 1.16, chunked": "trl",
    "TRL 1.16, with the same extras": "trl, extras",
    "Liger 0.8.5, fused linear DPO": "liger dpo, compiled",
}


def rows_of(name: str) -> list[dict]:
    with (ROOT / "benchmarks/results" / name).open() as stream:
        return list(csv.DictReader(stream))


def tables_with(title: str, document: Path) -> list[tuple[list[str], list[list[str]]]]:
    """Titles and rows of the Markdown tables that have a column of this title."""
    found, lines = [], []
    for line in [*document.read_text().replace("**", "").splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
        elif lines:
            titles, _, *rows = lines
            found += [(titles, rows)] if title in titles else []
            lines = []
    return found


def test_measured_heads_in_the_documents_are_those_of_the_file():
    """Time, ratio and memory of a contender must be those of one of its rows, in this dtype."""
    rows = [row for row in rows_of("kernels_cpu.csv") if row["op"] == "linear_logp" and row["mode"]]
    measured = defaultdict(set)
    for row in rows:
        peak = f"{float(row['peak_mib']):.0f} MiB" if row["peak_mib"] else ""
        time, ratio = f"{float(row['ms_p50']):.0f} ms", f"{float(row['x_of_bare_gemm']):.2f}"
        measured[row["impl"], row["dtype"]].add((time, ratio, peak))
    shown = {document: set() for document in MEASURED}
    for document in MEASURED:
        for titles, lines in tables_with("x bare", document):
            for label, *cells in lines:
                if not any(cells):
                    continue  # the name of a mode
                for start in range(0, len(cells), 3):
                    dtype = titles[1 + start].split()[0]
                    cell = (HEADS[label], dtype), tuple(cells[start : start + 3])
                    assert cell[1] in measured[cell[0]], (document, label, dtype, cells)
                    shown[document].add(cell)
    assert len(shown[MEASURED[0]]) == sum(map(len, measured.values())) > 20


HYBRIDS = {"Qwen3-Next": "hybrid", "Qwen3-MoE": "mixture"}  # first titles of their tables


def test_measured_steps_in_the_documents_are_those_of_the_file():
    rows = {row["impl"]: row for row in rows_of("train_cpu.csv")}
    shown = {document: set() for document in MEASURED}
    for document in MEASURED:
        for titles, lines in tables_with("pairs/s", document):
            if titles[0] in HYBRIDS:
                continue
            for label, *cells in lines:
                for title, cell in zip(titles[1:], cells, strict=True):
                    column, form = STEP_COLUMNS[title]
                    value = form.format(float(rows[STEPS[label]][column]))
                    assert cell == value, (document, label, title, value)
                    shown[document].add((label, title))
    assert len(shown[MEASURED[0]]) == len(STEPS) * len(STEP_COLUMNS)


def test_measured_hybrids_in_the_documents_are_those_of_the_file():
    shown = set()
    for document in MEASURED:
        for titles, lines in tables_with("pairs/s", document):
            for label, *cells in lines * (titles[0] in HYBRIDS):
                kind, impl = HYBRIDS[titles[0]], label.replace("dpo_fast,", "dpo_fast")
                impl = {"TRL 1.16, default": "trl"}.get(impl, impl.replace("TRL 1.16", "trl"))
                impl += ", frozen" if "dpo_fast" in impl else ""
                (row,) = [
                    r for r in rows_of("hybrids_cpu.csv") if (r["kind"], r["impl"]) == (kind, impl)
                ]
                for title, cell in zip(titles[1:], cells, strict=True):
                    column, form = STEP_COLUMNS[title]
                    assert cell == form.format(float(row[column])), (document, label, title)
                shown.add((kind, impl))
    assert len(shown) == 10


ON_A_CARD = {"log-probs": "logps", "frozen head": "frozen", "trainable head": "trainable"}
POINT = ("8192", "4096", "128256")  # of the table in README, which names no sizes


def test_measured_heads_on_a_card_are_those_of_the_file():
    rows = [row for row in rows_of("kernels_h100.csv") if row["op"] == "linear_logp"]
    rows = {(*(row[n] for n in ("T", "D", "V", "mode")), row["impl"]): row for row in rows}
    shown = dict.fromkeys(MEASURED, 0)
    for document in MEASURED:
        for titles, lines in tables_with("bare products", document):
            start = titles.index("bare products")
            for line in lines:
                sizes = tuple(line[0].split(", ")) if start == 2 else POINT
                for title, cell in zip(titles[start:], line[start:], strict=True):
                    impl = "trl" if title == "TRL 1.16" else title
                    row = rows.get((*sizes, ON_A_CARD[line[start - 1]], impl))
                    value = f"{float(row['ms_p50']):.1f} ms" if row else ""
                    if row and impl != "bare products":
                        value += f", {float(row['x_of_bare_gemm']):.2f}"
                    assert cell == value, (document, line, title, value)
                    shown[document] += bool(row)
    assert shown == {MEASURED[0]: 39, MEASURED[1]: 9}


def test_measured_steps_on_a_card_are_those_of_the_file():
    rows = {row["impl"]: row for row in rows_of("train_h100.csv")}
    forms = {
        "pairs a second": lambda row: f"{float(row['pairs_per_s']):.0f}",
        "positions computed": lambda row: f"{float(row['computed_tokens']):,.0f}",
        "MFU": lambda row: f"{100 * float(row['mfu']):.0f} %",
        "memory": lambda row: f"{float(row['peak_mib']):,.0f} MiB",
    }
    ((titles, lines),) = tables_with("pairs a second", MEASURED[0])
    for label, *cells in lines:
        assert cells == [forms[title](rows[STEPS[label]]) for title in titles[1:]], label
    assert len(lines) == len(rows)


def test_the_real_run_in_the_readme_is_that_of_the_file():
    """Where no run is kept, there is no table, and where one is, there are the table and the picture."""
    from dpo_fast.demo.real import TITLES, cells

    file, picture = (ROOT / f"benchmarks/results/real_cpu.{kind}" for kind in ("json", "svg"))
    tables = tables_with("held-out accuracy", ROOT / "README.md")
    assert len(tables) == file.is_file() == picture.is_file()
    for titles, lines in tables:
        result = json.loads(file.read_text())
        assert {TITLES[name] for name in result["runs"]} == {line[0] for line in lines}
        for name in result["runs"]:
            (line,) = (line for line in lines if line[0] == TITLES[name])
            assert dict(zip(titles[1:], line[1:], strict=True)) == cells(result, name)
        assert result["seconds"]["total"] < 20 * 60
        for run in result["runs"].values():
            assert run["accuracy"][-1][1] > run["accuracy"][0][1]
            assert run["margin"][-1][1] > run["margin"][0][1]


def test_every_configuration_is_valid_and_comments_every_key():
    from dpo_fast.training.config import load_config

    files = list((ROOT / "configs").glob("*.yaml"))
    assert files
    for file in files:
        load_config(str(file))
        for line in file.read_text().splitlines():
            if ":" in line and not line.lstrip().startswith("#") and not line.endswith(":"):
                assert "#" in line, f"{file.name}: no comment beside {line.strip()!r}"


def test_the_page_of_the_losses_is_made_of_the_code():
    import yaml

    from dpo_fast.losses.docs import page
    from dpo_fast.training.config import LossSection

    text = (ROOT / "docs/LOSSES.md").read_text()
    assert text == page(), "run make docs"
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    LossSection(**yaml.safe_load(example)["loss"])


def test_the_page_of_the_configuration_is_made_of_the_code():
    from dpo_fast.training.config_docs import page

    assert (ROOT / "docs/CONFIG.md").read_text() == page(), "run make docs"


def test_the_pages_of_other_trainers_are_made_of_the_code():
    from dpo_fast.migration.docs import NAMES, page

    for kind, name in NAMES.items():
        assert (ROOT / f"docs/{name}.md").read_text() == page(kind), "run make docs"


def test_every_environment_variable_is_in_the_table():
    table = (ROOT / "CONTRIBUTING.md").read_text()
    used = {n for path in sources() for n in re.findall(r"DPO_FAST_[A-Z_]+", path.read_text())}
    assert len(used) >= 2
    for name in used:
        assert f"| `{name}` |" in table, name
