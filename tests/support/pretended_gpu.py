"""A GPU that is not there: tensors that say they are on cuda:0, and have their numbers on the CPU.

    with PretendedGpu() as gpu:
        model = gpu.send(model)
        loss = model(**batch.to("cuda")).sum()
        loss.backward()
    assert not gpu.waits

What a card would refuse is refused: an operation on tensors of two devices, and `numpy`. `waits` has what
makes the host wait for all the work that a card has been given: numbers that are read, shapes that follow
from numbers, and copies that are not `non_blocking`. Values are those of a CPU.

To the autograd engine these tensors lie on a device that has no streams; Python sees `cuda`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.machine import ROOT

GPU = torch.device("cuda:0")
UNDER = torch.device("lazy:0")  # what C++ sees
HERE = torch.device("cpu")
H100 = SimpleNamespace(
    name="pretended", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
)
# Their results have as many elements as a number on the device says.
SHAPED_BY_NUMBERS = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive",
    "aten::unique_dim", "aten::bincount",
}  # fmt: skip
READS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
COPIES = {"aten::copy_", "aten::_to_copy"}
# They take a tensor of another device for its sizes alone, or are asked for one by name.
BOTH = COPIES | {"aten::set_", "aten::_has_compatible_shallow_copy_type"}


class OnGpu(Tensor):
    """A tensor that says that it is on the GPU. here: its numbers, on the CPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor, requires_grad: bool = False) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=UNDER,
            requires_grad=requires_grad,
        )
        made.here = here
        return made

    def __repr__(self, **ignored) -> str:
        return f"OnGpu({self.here})"

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)
        self.here = value.here

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), options=None):
        if operation is torch.ops.aten._has_compatible_shallow_copy_type.default:
            return True
        raise RuntimeError(f"{operation} outside of PretendedGpu")


class PretendedGpu(TorchDispatchMode):
    """waits: how often each (file:line, operation) made the host wait. Lines are the innermost ones outside
    of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.instead: dict[str, Callable] = {"aten::histc": _histc}  # where a CPU has no kernel
        self._on_the_way: list[tuple[Tensor, Tensor]] = []  # where to, and what
        self._stack = ExitStack()

    def __enter__(self) -> PretendedGpu:
        for name, value in _functions(self.arrive).items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, value))
        self._stack.enter_context(_Places())
        super().__enter__()
        return self

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.arrive()
        self._stack.close()

    def arrive(self, *ignored) -> None:
        """The host has waited: what was on its way to it is there."""
        for to, what in self._on_the_way:
            to.copy_(what)
        self._on_the_way.clear()

    @property
    def own_waits(self) -> dict[tuple[str, str], int]:
        """Those in lines of dpo_fast."""
        return {key: n for key, n in self.waits.items() if key[0].startswith("dpo_fast/")}

    def send(self, module: nn.Module) -> nn.Module:
        """Move a module in place, as `module.to("cuda")` does on a card: every tensor once."""
        sent: dict[int, Tensor] = {}
        for each in module.modules():
            for name, parameter in each._parameters.items():
                if parameter is not None:
                    if id(parameter) not in sent:
                        sent[id(parameter)] = nn.Parameter(
                            OnGpu(parameter.detach()), parameter.requires_grad
                        )
                    each._parameters[name] = sent[id(parameter)]
            for name, buffer in each._buffers.items():
                if buffer is not None:
                    each._buffers[name] = OnGpu(buffer)
        return module

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = options or {}
        name = operation._schema.name if hasattr(operation, "_schema") else str(operation)
        tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
        wrapped = {id(x.here): x for x in tensors if isinstance(x, OnGpu)}
        there = bool(wrapped)
        if wrapped:
            self._check(operation, name, tensors)
        if (device := options.get("device")) is not None:
            there = device.type in (GPU.type, UNDER.type)
            options = options | {"device": HERE if there else device}
        self._watch(name, arguments, options, there)
        if name in COPIES and (to := self._leave(name, arguments, options, there)) is not None:
            return to
        compute = self.instead.get(name, operation)
        found = compute(*tree_map(_here, arguments), **tree_map(_here, options))

        if (
            wrapped and torch.Tag.inplace_view in operation.tags
        ):  # what is round it has a shape, too
            Tensor.data.__set__(arguments[0], OnGpu(arguments[0].here))

        def there_again(value):
            if not isinstance(value, Tensor):
                return value
            if id(value) in wrapped:  # what is computed in place stays the object that it is
                return wrapped[id(value)]
            return OnGpu(value.resolve_conj().resolve_neg()) if there else value

        if name in COPIES and name.endswith("copy_"):
            return arguments[0]
        return tree_map(there_again, found)

    def _leave(self, name: str, arguments, options: dict, there: bool) -> Tensor | None:
        """A copy to the host that nobody waits for: what it has until somebody does is no number."""
        onto = name == "aten::copy_"
        value = arguments[1 if onto else 0]
        asked = arguments[2] if len(arguments) > 2 else options.get("non_blocking", False)
        leaves = isinstance(value, OnGpu) and asked
        leaves = leaves and (not isinstance(arguments[0], OnGpu) if onto else not there)
        if not leaves:
            for to, what in self._on_the_way:  # the one queue brings it back after it has left
                if value is to:
                    return self._again(name, arguments, options, what)
            return None
        to = arguments[0] if onto else torch.empty_like(value.here, dtype=options.get("dtype"))
        self._on_the_way.append((to, value.here.clone()))
        return to.fill_(torch.nan if to.is_floating_point() else 1)

    def _again(self, name: str, arguments, options: dict, what: Tensor) -> Tensor:
        if name == "aten::copy_":
            arguments[0].here.copy_(what)
            return arguments[0]
        return OnGpu(what.to(options.get("dtype") or what.dtype, copy=True))

    def _check(self, operation, name: str, tensors: list[Tensor]) -> None:
        """Raises RuntimeError as a card does."""
        if name in BOTH:
            return
        scalars = torch.Tag.pointwise in operation.tags
        for x in tensors if name not in INDEXED else tensors[:1]:
            if not isinstance(x, OnGpu) and not (scalars and x.dim() == 0 and x.device == HERE):
                raise RuntimeError(
                    f"{name} expected all tensors to be on the same device, but found at least two "
                    f"devices, cuda:0 and {x.device}! ({_place()})"
                )

    def _watch(self, name: str, arguments, options: dict, there: bool) -> None:
        given = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
        remote = [isinstance(x, OnGpu) for x in given]
        waits = any(remote) and name in SHAPED_BY_NUMBERS | READS
        if name == "aten::repeat_interleave":
            waits = any(remote) and options.get("output_size") is None
        if name in INDEXED and remote[0]:
            indices = [x for x in arguments[1] if x is not None]
            values = arguments[2] if len(arguments) > 2 else None
            filled = isinstance(values, Tensor) and values.numel() == 1  # that is a masked_fill
            masks = any(x.dtype in (torch.bool, torch.uint8) for x in indices) and not filled
            waits = masks or not all(isinstance(x, OnGpu) for x in indices)
        if name == "aten::_to_copy":
            waits = remote[0] != there and not options.get("non_blocking")
        if name == "aten::copy_":
            asked = arguments[2] if len(arguments) > 2 else options.get("non_blocking", False)
            waits = remote[0] != remote[1] and not asked
        if waits:
            self.arrive()
            self.waits[_place(), name.removeprefix("aten::")] += 1


class _Places(TorchFunctionMode):
    """Calls that name the GPU name what C++ sees instead."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        options.pop("pin_memory", None)
        if "device" in options:
            options["device"] = _under(options["device"])
        if function is Tensor.to:
            arguments = tuple(map(_under, arguments))
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            arguments = (arguments[0], _without_lists(arguments[1]), *arguments[2:])
        if function is Tensor.cuda:
            return arguments[0].to(UNDER, **options)
        if function is Tensor.pin_memory:
            return arguments[0]
        if function in (torch.tensor, torch.as_tensor) and options.get("device") == UNDER:
            made = function(*arguments, **options | {"device": HERE})
            requires_grad = options.pop("requires_grad", False)
            return made.detach().to(UNDER).requires_grad_(requires_grad)
        return function(*arguments, **options)


def _without_lists(index):
    """Lists are tensors of the host, as they are on a card before they get there."""
    parts = [
        torch.tensor(x, device=HERE) if isinstance(x, list) else x
        for x in (index if isinstance(index, tuple) else (index,))
    ]
    return tuple(parts) if isinstance(index, tuple) else parts[0]


def _histc(values: Tensor, *arguments, **options) -> Tensor:
    return torch.histc(values.double(), *arguments, **options).to(values.dtype)


def _under(place):
    if isinstance(place, str) and place.split(":")[0] == GPU.type:
        return UNDER
    return UNDER if isinstance(place, torch.device) and place.type == GPU.type else place


def _here(value):
    return value.here if isinstance(value, OnGpu) else value


def _place() -> str:
    """The innermost line that is at work and is not PyTorch's."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and file != __file__:
            short = file.split("/site-packages/")[-1].removeprefix(f"{ROOT}/")
            return f"{short}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _event(arrive: Callable[[], None]) -> type:
    """The class of places in the one queue of work, where everything is done at once."""

    class Event:
        def __init__(self, **ignored) -> None:
            pass

        def record(self, *ignored) -> None:
            pass

        def synchronize(self) -> None:
            arrive()

        def elapsed_time(self, other) -> float:
            return 0.0

    return Event


def _functions(arrive: Callable[[], None]) -> dict[str, object]:
    """What stands for the functions of torch.cuda."""
    return {
        "_lazy_init": lambda: (
            None
        ),  # what runs inside of torch's own functions is not seen by `_Places`
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *device: (9, 0),
        "get_device_properties": lambda *device: H100,
        "mem_get_info": lambda *device: (H100.total_memory, H100.total_memory),
        "synchronize": arrive,
        "Event": _event(arrive),
        "max_memory_allocated": lambda *device: 0,
    }
