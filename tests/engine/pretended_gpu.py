"""A GPU that is none: tensors in the host's memory, of which some are said to be on a device that is behind the host.

What only a GPU would show is found: tensors of both sides in one operation, whatever makes the host wait, numbers that
are read before they have come, and numbers that are overwritten before they have gone.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_model_runner import CPUModelRunner, _set_torch_accelerator_to_noop
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_lvspec.engine import cpu
from vllm_lvspec.engine.cpu import LVSpecCPUModelRunner
from vllm_lvspec.kernels import acceptance, advance_decode, attention_mass, copy_slots, relevance, silu_and_mul

DEVICE = torch.device("cuda:0")
MEMORY = 2**34  # bytes
MIXED, WAITED, UNREAD, OVERWRITTEN = "mixes devices", "waits", "is no host's", "is overwritten before it has gone"

# What reads the device's numbers on the host, and so waits.
READING = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
COPYING_OPS = {"item", "_local_scalar_dense", "is_nonzero"}
READING_OPS = COPYING_OPS | {
    "nonzero", "nonzero_numpy", "argwhere", "masked_select", "unique_dim", "_unique2",
    "unique_consecutive", "bincount", "equal", "allclose",
}  # fmt: skip
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}
ON_THEIR_OWN = ("_C", "vllm", "_rocm_C", "_moe_C")  # namespaces of operations of CPUs that take what they are given
COPIED_FIRST = "vllm:utils.py:copy_to_gpu"  # by vLLM, where there is a GPU: what goes is memory of its own
OURS, THEIRS = "/vllm_lvspec/", "/site-packages/vllm/"


@dataclass(frozen=True)
class Finding:
    """`where`: the file and function in which it is, of this package or of vLLM."""

    kind: str
    what: str
    where: str

    @property
    def is_ours(self) -> bool:
        return not self.where.startswith("vllm:")


def is_there(tensor: torch.Tensor) -> bool:
    """Whether it is on the device."""
    return getattr(tensor.untyped_storage(), "lvspec_there", False)


def put(tensor: torch.Tensor, there: bool = True) -> torch.Tensor:
    """Say that its memory, and all that views it, is on the device, or is not."""
    tensor.untyped_storage().lvspec_there = there  # type: ignore[attr-defined]
    return tensor


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().lvspec_pinned = True  # type: ignore[attr-defined]
    return tensor


def _is_pinned(tensor: torch.Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "lvspec_pinned", False)


@dataclass
class _Copy:
    """Under way: launched behind `launched` other operations. `to` and `numbers`, or `source` and what it held."""

    launched: int
    to: torch.Tensor | None
    source: torch.Tensor | None
    numbers: torch.Tensor
    where: str


class PretendedGPU:
    """While it is entered, tensors made for a CUDA device are on this one; `findings` are counted."""

    def __init__(self) -> None:
        self.findings: Counter[Finding] = Counter()
        self.launched = self.done = 0  # operations
        self._copies: list[_Copy] = []
        self._stack: ExitStack | None = None

    def __enter__(self) -> PretendedGPU:
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for module in (torch, torch.cuda):
                patch.setattr(module, "Event", type("Event", (_Event,), {"gpu": self}))
            patch.setattr(torch.cuda, "synchronize", lambda device=None: self.wait("synchronize"))
            patch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: _pin(tensor.clone()))
            patch.setattr(torch, "Generator", _Generator)
            properties = SimpleNamespace(total_memory=MEMORY)
            patch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
            patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (MEMORY, MEMORY))
            stack.enter_context(_Operations(self))
            stack.enter_context(_Functions(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._stack is not None
        self._stack.__exit__(*error)

    def found(self, kind: str, what: str) -> None:
        self.findings[Finding(kind, what, _where())] += 1

    def wait(self, what: str, until: int | None = None) -> None:
        """The host waits, unless all that it waits for is done."""
        until = self.launched if until is None else until
        if until > self.done:
            self.found(WAITED, what)
            self.done = until
        due = [copy for copy in self._copies if copy.launched <= until]
        self._copies = [copy for copy in self._copies if copy.launched > until]
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            for copy in due:
                if copy.to is not None:
                    copy.to.copy_(copy.numbers)
                elif copy.source is not None and not torch.equal(copy.source, copy.numbers):
                    self.findings[Finding(OVERWRITTEN, "copy", copy.where)] += 1

    def transfer(self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
        """Copy from one side to the other."""
        self.launched += 1
        where = _where()
        # vLLM's own buffers are pinned where there is a GPU, and not here.
        ahead = non_blocking and (_is_pinned(to if is_there(source) else source) or where.startswith("vllm:"))
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            to.copy_(source)
            if ahead and is_there(source):
                self._copies.append(_Copy(self.launched, to, None, to.clone(), where))
                to.fill_(_nothing_like(to.dtype))
            elif ahead and where != COPIED_FIRST:
                self._copies.append(_Copy(self.launched, None, source, source.clone(), where))
        if not ahead:
            self.wait("copy to the host" if is_there(source) else "copy from memory that is not pinned")

    def kernel(self, reference: Callable[..., Any]) -> Callable[..., Any]:
        """A Triton kernel's reference as if it were the kernel: all of its tensors must be there."""

        @functools.wraps(reference)
        def launch(*args: Any, **kwargs: Any) -> Any:
            self.launched += 1
            if not all(map(is_there, _tensors((args, kwargs)))):
                self.found(MIXED, reference.__name__)
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                result = reference(*args, **kwargs)
            for tensor in _tensors(result):
                put(tensor)
            return result

        return launch


def _nothing_like(dtype: torch.dtype) -> float:
    """What stands where a number has not come yet."""
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max - 3


class _Event:
    """Of CUDA: what was launched before it was recorded is done once somebody has waited for it."""

    gpu: PretendedGPU

    def __init__(self, *args: Any, **kwargs: Any):
        self._launched = 0

    def record(self, *args: Any) -> None:
        self._launched = self.gpu.launched

    def synchronize(self) -> None:
        self.gpu.wait("Event.synchronize", self._launched)

    def query(self) -> bool:
        return self._launched <= self.gpu.done

    def elapsed_time(self, end: _Event) -> float:
        assert end.query(), "CUDA refuses to say when something was that is not done"
        return float(end._launched - self._launched)


class _Generator(torch.Generator):
    """Of random numbers of the device."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls, "cpu")


class _Functions(TorchFunctionMode):
    """What Python's torch does before operations are known: devices, and reading."""

    def __init__(self, gpu: PretendedGPU):
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE if is_there(args[0]) else func(*args)
        if name == "is_pinned":
            return _is_pinned(args[0])
        if name in ("to", "cpu", "cuda", "type_as") and first is not None:
            return self._to(name, func, first, args, kwargs)
        if name in ("numpy", "__array__") and first is not None and is_there(first):
            self._gpu.found(UNREAD, name)
        if name in READING and first is not None and is_there(first):
            self._gpu.wait(name)
        is_pinned = kwargs.pop("pin_memory", None)
        wanted = kwargs.get("device")
        there = None
        if wanted is not None:
            there = torch.device(wanted).type == "cuda"
            if there:
                kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            if is_pinned:
                _pin(result)
            if there is not None and result is not first:
                if there and name in ("tensor", "as_tensor", "from_numpy"):
                    self._gpu.wait(f"torch.{name} on the device")
                put(result, there)
        return result

    def _to(self, name: str, func: Any, tensor: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """As `Tensor.to`, across sides."""
        wanted, non_blocking = None, bool(kwargs.get("non_blocking", False))
        if name in ("cpu", "cuda"):
            wanted = name
        elif len(args) > 1 and isinstance(args[1], torch.Tensor):
            wanted = "cuda" if is_there(args[1]) else "cpu"
        else:
            device = kwargs.get("device")
            for value in args[1:2]:
                device = value if isinstance(value, (str, torch.device, int)) else device
            if device is not None:
                wanted = torch.device(device).type
        bools = [value for value in args[1:] if isinstance(value, bool)]
        non_blocking = non_blocking or bool(bools and bools[0])
        clean = ["cpu" if isinstance(v, (str, torch.device)) and torch.device(v).type == "cuda" else v for v in args]
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        if name == "cuda":
            func, clean = torch.Tensor.cpu, clean[:1]
        there = is_there(tensor)
        if wanted is None or (wanted == "cuda") == there:
            result = func(*clean, **kwargs)
            if result.untyped_storage()._cdata != tensor.untyped_storage()._cdata:
                put(result, there)
            return result
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            converted = func(*clean, **kwargs)
            result = _pin(torch.empty_like(converted))  # of the host's, torch pins what it need not wait for
            source = converted if converted.dtype != tensor.dtype else tensor
        put(result, not there)
        if source is not tensor:
            put(source, there)
        self._gpu.transfer(result, source, non_blocking)
        return result


class _Operations(TorchDispatchMode):
    """Operations, of which each is on one side."""

    def __init__(self, gpu: PretendedGPU):
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, name = func.namespace, func.overloadpacket.__name__
        tensors = _flat((*args, *kwargs.values()))
        sides = [is_there(tensor) for tensor in tensors]
        if name == "copy_" and len(set(sides)) == 2:
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            if args[1].dim() == 0 and sides[0]:  # its number goes along with the launch
                return func(*args, **kwargs)
            if args[1].dtype != args[0].dtype or args[0].shape != args[1].shape:
                source = args[1].to(args[0].dtype).expand(args[0].shape)
                put(source, sides[1])
            else:
                source = args[1]
            self._gpu.transfer(args[0], source, non_blocking)
            return args[0]
        there = any(sides)
        if there:
            self._gpu.launched += name in READING_OPS - COPYING_OPS
            self._check(space, name, tensors, sides, args, kwargs)
        result = func(*args, **kwargs)
        if space in ON_THEIR_OWN and there:  # they are given new memory to write to, of the host's
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in _tensors(value):
                        put(tensor)
        known = [tensor.untyped_storage()._cdata for tensor in tensors]
        new = [tensor for tensor in _flat((result,)) if tensor.untyped_storage()._cdata not in known]
        for tensor in new:
            put(tensor, there)
        if there and (new or func._schema.is_mutable):  # nothing is launched for a view
            self._gpu.launched += 1
        return result

    def _check(self, space: str, name: str, tensors: Any, sides: Any, args: Any, kwargs: Any) -> None:
        if name in READING_OPS:
            self._gpu.wait(name)
        if name == "repeat_interleave" and kwargs.get("output_size") is None and isinstance(args[-1], torch.Tensor):
            self._gpu.wait(name)
        if name == "where" and len(args) == 1:
            self._gpu.wait(name)
        if space in ON_THEIR_OWN or name.startswith(("resize", "set_")):
            return
        if name in INDEXING:
            indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
            if is_there(args[0]) and any(not is_there(index) for index in indices):
                self._gpu.wait(f"{name} by the host's numbers")
            if any(index.dtype == torch.bool and is_there(index) for index in indices):
                self._gpu.wait(f"{name} by a mask")
            others = [tensor for tensor in tensors if not any(tensor is index for index in indices)]
            if any(map(is_there, indices)) and not is_there(args[0]):
                self._gpu.found(MIXED, name)
            tensors, sides = others, [is_there(tensor) for tensor in others]
        if any(not side and tensor.dim() for tensor, side in zip(tensors, sides, strict=True)) and any(sides):
            self._gpu.found(MIXED, f"{space}.{name}")


def _flat(values: Sequence[Any]) -> list[torch.Tensor]:
    """Of what an operation takes or gives: tensors, sequences of them, and others."""
    tensors = []
    for value in values:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += [item for item in value if isinstance(item, torch.Tensor)]
    return tensors


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _where() -> str:
    """Of the innermost frame that is this package's or vLLM's."""
    frame = sys._getframe(1)
    while frame is not None:
        name, function = frame.f_code.co_filename, frame.f_code.co_name
        if THEIRS in name:
            return f"vllm:{Path(name).name}:{function}"
        if OURS in name or "/kernels/" in name:
            return f"{Path(name).name}:{function}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


@contextmanager
def engines_on(gpu: PretendedGPU) -> Iterator[None]:
    """Engines that are started here have their models, caches and batches on it, and the runner of GPUs."""
    load = BaseModelLoader.load_model

    class Runner(LVSpecCPUModelRunner):
        _to_list = GPUModelRunner._to_list

        def _sync_device(self) -> None:
            gpu.wait("synchronize")

        def __init__(self, vllm_config: VllmConfig, device: torch.device):
            super().__init__(vllm_config, DEVICE)

    def init(self: CPUModelRunner, vllm_config: VllmConfig, device: torch.device) -> None:
        _set_torch_accelerator_to_noop()
        GPUModelRunner.__init__(self, vllm_config, device)  # and no buffer on the device is one of the host's
        self.use_cuda_graph = False

    def load_there(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model = load(*args, **kwargs)
        for tensor in (*model.parameters(), *model.buffers()):
            put(tensor)
        return model

    with pytest.MonkeyPatch.context() as patch, gpu, kernels_of(gpu):
        # Attention is called, and not an operation in which nobody would see what is done.
        patch.setattr(type(current_platform), "opaque_attention_op", classmethod(lambda cls: False))
        patch.setattr(BaseModelLoader, "load_model", load_there)
        patch.setattr(CPUModelRunner, "__init__", init)
        patch.setattr(cpu, "LVSpecCPUModelRunner", Runner)
        yield


@contextmanager
def kernels_of(gpu: PretendedGPU) -> Iterator[None]:
    """References as kernels of this device."""
    names = {
        acceptance: ["accept_reference"],
        advance_decode: ["advance_decode_reference"],
        attention_mass: ["attention_mass_reference"],
        copy_slots: ["copy_slots_reference"],
        relevance: ["top_cosines_reference", "mean_of_top_reference"],
        silu_and_mul: ["silu_and_mul_reference"],
    }
    with pytest.MonkeyPatch.context() as patch:
        for module, functions in names.items():
            for name in functions:
                patch.setattr(module, name, gpu.kernel(getattr(module, name)))
        yield
