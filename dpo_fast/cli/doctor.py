"""What this machine can run: versions, devices, and the implementation of each operation, with reasons."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil

import torch
from rich.markup import escape
from rich.table import Table

from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.errors import UserError
from dpo_fast.losses.custom import loaded
from dpo_fast.ops.dispatch import Choice, choose_implementation
from dpo_fast.ops.linear_logp.plan import MIB, default_workspace_bytes
from dpo_fast.training.distributed import capacity, cores

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "datasets",
    "peft",
    "flash-attn",
    "trl",
    "liger-kernel",
    "tensorboard",
    "wandb",
)
OPERATIONS = ("linear_logp", "logits_logp", "preference")
PLUGINS = {
    "loss.type": "dpo_fast.losses",
    "train.callbacks": "dpo_fast.callbacks",
    "train.sampler": "dpo_fast.samplers",
}


def tables() -> dict[str, Table]:
    """Versions, devices and choices, by the names that `--json` has for them."""
    found = {"software": _versions(), "hardware": _devices(), "implementations": _choices()}
    plugins = plugin_table()
    return found | ({"plugins": plugins} if plugins.row_count else {})


def _versions() -> Table:
    table = Table("package", "version", title="Software")
    table.add_row("python", platform.python_version())
    for name in PACKAGES:
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    table.add_row("nvcc", shutil.which("nvcc") or "not found (only csrc needs it)")
    return table


def plugin_table() -> Table:
    """What installed packages bring by their entry points, and whether it can be loaded."""
    table = Table("for", "name", "is", "of", "state", title="Plugins")
    for option, group in PLUGINS.items():
        for point in importlib.metadata.entry_points(group=group):
            package = "-" if point.dist is None else f"{point.dist.name} {point.dist.version}"
            try:
                loaded(f"{option}={point.name}", point.load)
                state = "loads"
            except UserError as error:
                state = str(error)
            cells = (option, point.name, point.value, package, state)
            table.add_row(*map(escape, cells))
    return table


def devices() -> list[torch.device]:
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def _devices() -> Table:
    table = Table("device", "what", "memory", "head workspace by default", title="Hardware")
    for device in devices():
        workspace = f"{default_workspace_bytes(device) // MIB} MiB"
        if device.type == "cpu":
            what = f"{cores()} cores, {torch.get_num_threads()} torch threads"
        else:
            found = torch.cuda.get_device_properties(device)
            what = f"{found.name}, compute capability {found.major}.{found.minor}"
        table.add_row(str(device), what, f"{capacity(device) / (1 << 30):.0f} GiB", workspace)
    return table


def _choices() -> Table:
    table = Table("operation", "device", "dtype", "would use", "why", title="Implementations")
    for device in devices():
        for operation in OPERATIONS:
            for dtype in (torch.bfloat16, torch.float32):
                choice = choose_implementation(operation, device, dtype)
                short = str(dtype).removeprefix("torch.")
                table.add_row(operation, str(device), short, choice.name, choice.reason)
        for layout in LAYOUTS:
            choice = attention(layout, device)
            what, why = f"attention, {layout}", escape(choice.reason)
            table.add_row(what, str(device), "bfloat16", choice.name, why)
    on_gpu = torch.cuda.is_available()
    why = "there is a GPU" if on_gpu else "there is no GPU; DeepSpeed runs with DS_ACCELERATOR=cpu"
    table.add_row("training, all ranks", "-", "any", "nccl" if on_gpu else "gloo", why)
    return table


def attention(layout: str, device: torch.device) -> Choice:
    """What `model.attention=auto` means in bf16 for a model with plain attention, and why."""
    if importlib.util.find_spec("transformers") is None:
        return Choice("-", 'the trainer is not installed: pip install "dpo_fast[train]"')
    from dpo_fast.models.architecture import Architecture, choose_attention

    plain = Architecture("any", obstacle=None, softcap=False, sinks=False)
    return choose_attention("auto", layout, device, torch.bfloat16, plain)
