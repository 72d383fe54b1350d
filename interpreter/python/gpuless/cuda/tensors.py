"""Tensors of torch's `cuda` device that lie in the interpreted GPU's memory, which is the host's.

They are CUDA tensors to torch: device, dispatch key, autograd, autocast and printing are its own. Their memory comes from
the core by DLPack, so that kernels may touch it and it is poisoned. What torch does with them itself (everything but
kernels' launches) runs on the CPU: below autograd, each operation of the CUDA dispatch key is given views of the same bytes
as the CPU's, and what comes out is put on the device. Nothing here is compiled against torch's C++, as one wheel serves
every torch.

A renamed PrivateUse1 device would be named otherwise (torch refuses the names of its own devices), and a function mode does
not reach what C++ creates and what autograd runs in its threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import pathlib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .. import core, current, operators
from ..capture import Capture
from ..memory.storage import on_host
from .benchmark import Benchmark
from .generator import draw
from .watching import watched

aten = torch.ops.aten
_torch_empty, _torch_empty_strided = torch.empty, torch.empty_strided  # projects put functions of theirs in their place
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

#: read or set sizes, strides and storage alone: the CPU's kernels do that for any device
METADATA = {
    "aten::as_strided", "aten::view", "aten::_reshape_alias", "aten::unfold", "aten::set_.source_Storage",
    "aten::set_.source_Tensor", "aten::is_set_to", "aten::view_as_real", "aten::view_as_complex",
}  # fmt: skip
#: what takes CPU tensors beside those of the device
MIXED = {"aten::index", "aten::_index_put_impl_", "aten::index_put", "aten::index_put_", "aten::_copy_from"}

#: of halves and bfloat16s, what CUDA computes in float and rounds once, and the CPU rounds on its way: sums, statistics.
#: Those in place have an underscore more
IN_FLOAT = {
    "aten::_fused_sgd", "aten::prod", "aten::logit", "aten::logit_backward", "aten::glu_backward",
    "aten::native_layer_norm", "aten::native_layer_norm_backward", "aten::native_batch_norm",
    "aten::native_batch_norm_backward", "aten::_native_batch_norm_legit", "aten::nll_loss_forward",
    "aten::nll_loss2d_forward", "aten::embedding_dense_backward", "aten::_embedding_bag", "aten::_embedding_bag_backward",
    "aten::_embedding_bag_forward_only", "aten::index_put", "aten::_index_put_impl", "aten::convolution",
    "aten::convolution_backward", "aten::col2im", "aten::avg_pool2d_backward", "aten::max_pool2d_with_indices_backward",
    "aten::_adaptive_avg_pool3d", "aten::upsample_linear1d", "aten::upsample_bicubic2d", "aten::upsample_trilinear3d",
    "aten::grid_sampler_2d",
}  # fmt: skip
#: the same where a number takes part, which the CPU rounds before it adds it
NUMBERS_IN_FLOAT = {"aten::add", "aten::sub", "aten::_foreach_add", "aten::_foreach_sub"}
#: of these, results but the first stay float, as do the arguments that take them
STATISTICS = {"aten::native_layer_norm", "aten::native_batch_norm", "aten::_native_batch_norm_legit"}
STATISTICS_TAKEN = {"mean", "rstd", "save_mean", "save_invstd"}
HALVES = (torch.float16, torch.bfloat16)
_LACKS_HALVES = re.compile("not implemented for '(Half|BFloat16)'")


def _from_dlpack(managed: int | None, nbytes: int) -> Tensor:
    if not managed:
        free = core.load().gpuless_memory_free()
        raise torch.cuda.OutOfMemoryError(
            f"CUDA out of memory on the interpreted GPU: {nbytes} bytes are asked for, {free} of the GPU's are left"
        )
    return torch.from_dlpack(_capsule(managed, b"dltensor", None))


def _span(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last, both included."""
    return 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride))


def empty_strided(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """On the device, filled with 0xff bytes: NaN, and -1 of integers."""
    nbytes = _span(size, stride) * dtype.itemsize
    row = _from_dlpack(core.load().gpuless_dlpack_allocate(nbytes), nbytes)
    # below autograd, which would take it for a view
    return aten.as_strided.default.redispatch(_CPU, aten.view.dtype.redispatch(_CPU, row, dtype), size, stride, 0)


def _bytes(t: Tensor) -> Tensor:
    """Its storage as a row of the CPU's."""
    storage = t.untyped_storage()
    return _from_dlpack(core.load().gpuless_dlpack_host_view(storage.data_ptr(), storage.nbytes()), storage.nbytes())


def host_view(t: Tensor) -> Tensor:
    """The same elements of the same memory as a CPU tensor."""
    if not t.numel():  # an output that is to be resized, often: memory of DLPack's cannot be
        return _torch_empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cpu")
    view = _torch_empty(0, dtype=t.dtype, device="cpu")
    view = aten.set_.source_Storage_storage_offset(
        view, _bytes(t).untyped_storage(), t.storage_offset(), t.size(), t.stride()
    )
    view = view.conj() if t.is_conj() else view
    return torch._neg_view(view) if t.is_neg() else view


def to_device(t: Tensor) -> Tensor:
    """A copy of a CPU tensor on the device, with its strides."""
    if t.layout != torch.strided:
        raise NotImplementedError(f"the interpreted GPU has strided tensors alone, and this one is {t.layout}")
    if any(s == 0 and n > 1 for n, s in zip(t.size(), t.stride())):
        t = t.contiguous()
    copy = empty_strided(t.size(), t.stride(), t.dtype)
    host_view(copy).copy_(t)
    return copy


class _Operator:
    """What is known of an operator from its schema."""

    def __init__(self, op: torch._ops.OpOverload):
        schema = op._schema
        #: it is launched, and not done by the CPU
        self.launched = operators.known.get(op)
        self.name = schema.name
        qualified = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
        self.metadata = qualified in METADATA or (schema.name in METADATA and not schema.overload_name)
        self.mixed = schema.name in MIXED or self.launched is not None  # in guard mode copies come
        self.in_float = schema.name.rstrip("_") in IN_FLOAT
        self.numbers_in_float = schema.name.rstrip("_") in NUMBERS_IN_FLOAT
        self.statistics = schema.name in STATISTICS
        self.draws = torch.Tag.nondeterministic_seeded in op.tags
        self.parameters = [a.name for a in schema.arguments]
        #: those of running statistics are not marked
        self.written = {a.name for a in schema.arguments if a.is_write or a.name.startswith("running_")}
        #: torch hands a number on as one where the operator takes a tensor
        self.tensors = [isinstance(a.type, torch.TensorType) for a in schema.arguments]


@functools.cache
def _operator(op: torch._ops.OpOverload) -> _Operator:
    return _Operator(op)


def _as_tensor(value: Any) -> Any:
    """A number as torch's functions take it: of no dimension, in the dtype of its kind, on the CPU."""
    if isinstance(value, (bool, int, float, complex)):
        return torch.scalar_tensor(value, dtype=_dtype_of(value))
    return value


def _dtype_of(value: complex) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    default = torch.get_default_dtype()
    return torch.int64 if isinstance(value, int) else default if isinstance(value, float) else default.to_complex()


def _has_number(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    return any(not (t.dim() if isinstance(t, Tensor) else t is None) for t in tree_leaves((args, kwargs)))


@watched
def fallback(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """An operation on the device's tensors, done by the CPU on the same memory."""
    known = _operator(op)
    if known.metadata:
        return op.redispatch(_CPU, *args, **kwargs)
    with torch._C.DisableTorchFunction():
        if Capture.running:
            return _captured(op, args, kwargs, Capture.running)
        if known.launched is not None:
            return current.device().call(known.launched, lambda *args: _Call(op, in_float=False).run(args, {}), args)
        if Benchmark.running:
            with contextlib.suppress(NotImplementedError, RuntimeError):  # shapes that depend on values
                shapes = _Shapes(op, args, kwargs)
                Benchmark.running.operation(op, *shapes.meta)
                return shapes.lift()
        args = tuple(_as_tensor(a) if tensor else a for a, tensor in zip(args, known.tensors))
        try:
            try:
                in_float = known.in_float or (known.numbers_in_float and _has_number(args, kwargs))
                return _Call(op, in_float).run(args, kwargs)
            except NotImplementedError as e:
                if not _LACKS_HALVES.search(str(e)):
                    raise
                return _Call(op, in_float=True).run(args, kwargs)
        except NotImplementedError as e:
            why = str(e).partition(". ")[0]
            raise NotImplementedError(f"the interpreted GPU has no {op}, which torch lacks for CPUs: {why}") from None


class _Shapes:
    """An operation's results by their shapes alone, and its arguments and results as tensors without memory.

    Raises:
        NotImplementedError, RuntimeError: as torch does for a meta tensor, where it needs values; else, what is wrong.
    """

    def __init__(self, op: torch._ops.OpOverload, args: Any, kwargs: Any):
        self._pairs: list[tuple[Tensor, Tensor]] = []
        args, kwargs = tree_map(self._lower, args), tree_map(self._lower, kwargs)
        result = op(*args, **kwargs)
        self.meta = args, kwargs, result

    def lift(self) -> Any:
        """The results, with memory."""
        return tree_map(self._lift, self.meta[2])

    def _lower(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            meta = _torch_empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
            self._pairs.append((value, meta))
            return meta
        return torch.device("meta") if isinstance(value, torch.device) and value.type == "cuda" else value

    def _lift(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for tensor, meta in self._pairs:
            if value is meta:
                return tensor if tensor.size() == meta.size() else resize(tensor, meta.size())
        return empty_strided(value.size(), value.stride(), value.dtype)


def _captured(op: torch._ops.OpOverload, args: Any, kwargs: Any, capture: Capture) -> Any:
    """Outputs of the operation's shapes, which a replay fills."""

    def as_it_is(value: Any) -> Any:
        if isinstance(value, Tensor) and not value.is_cuda:
            if value.dim():
                capture.prohibit(f"{op} copies a tensor from the CPU")
            return value.clone()  # a number, to a kernel
        return value

    args, kwargs = tree_map(as_it_is, (args, kwargs))
    try:
        shapes = _Shapes(op, args, kwargs)
    except (NotImplementedError, RuntimeError) as e:
        capture.prohibit(f"{op} without values: {e}")
    outputs = shapes.lift()

    def replay() -> None:
        for output, result in zip(tree_leaves(outputs), tree_leaves(fallback(op, *args, **kwargs))):
            if output is not result and not Benchmark.running:
                host_view(output).copy_(host_view(result))

    capture.steps.append(replay)
    return outputs


class _Call:
    """One operation on the CPU: its arguments there, and the way back of what it returns."""

    def __init__(self, op: torch._ops.OpOverload, in_float: bool):
        self.op, self.known, self.in_float = op, _operator(op), in_float
        self.half: torch.dtype | None = None  # what is computed in float, and rounded to this
        #: of the device, its host view or a copy of that in float, whether it is written
        self.pairs: list[tuple[Tensor, Tensor, bool]] = []

    def run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        named = [*zip(self.known.parameters, args), *kwargs.items()]
        self.half = self._half(named) if self.in_float else None
        lowered = [self._lower(name, value) for name, value in named]
        op = functools.partial(draw, self.op) if self.known.draws else self.op
        result = op(*lowered[: len(args)], **dict(zip(kwargs, lowered[len(args) :])))
        if self.half:
            result = self._round(result)
        self._finish()
        return self.lift(result)

    def _half(self, named: list[tuple[str, Any]]) -> torch.dtype | None:
        """The dtype of all tensors, if it is one of HALVES: where floats take part torch computes in float already."""
        tensors = [
            t
            for name, value in named
            for t in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(t, Tensor) and t.is_floating_point() and name not in STATISTICS_TAKEN
        ]
        dtypes = {t.dtype for t in tensors if t.dim()} or {t.dtype for t in tensors}
        dtypes |= {value for _, value in named if isinstance(value, torch.dtype)}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        return dtype if dtype in HALVES else None

    def _lower(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_cuda:
                view = host_view(value)
                if view.dtype == self.half:
                    view = view.float()
                self.pairs.append((value, view, name in self.known.written))
                return view
            if value.dim() and not self.known.mixed:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                    f"{value.device}! (when calling {self.op})"
                )
            return value
        if isinstance(value, (list, tuple)):
            return [self._lower(name, v) for v in value]
        if isinstance(value, torch.device):
            check_ordinal(value)
            return torch.device("cpu") if value.type == "cuda" else value
        return torch.float32 if self.half and isinstance(value, torch.dtype) else value

    def _round(self, result: Any) -> Any:
        arguments = [view for _, view, _ in self.pairs]

        def rounded(value: Any) -> Any:
            made_here = isinstance(value, Tensor) and not any(value is a for a in arguments)
            return value.to(self.half) if made_here and value.dtype == torch.float32 else value

        if self.known.statistics:
            return (rounded(result[0]), *result[1:])
        return tree_map(rounded, result)

    def _finish(self) -> None:
        """An output that the operation has resized, or has got a copy of, has memory of its own: the device's gets as much."""
        for tensor, view, written in self.pairs:
            if written and (view.size() != tensor.size() or (view.numel() and view.data_ptr() != tensor.data_ptr())):
                resize(tensor, view.size())
                host_view(tensor).copy_(view)

    def lift(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            for tensor, view, _ in self.pairs:
                if value is view:
                    return tensor
            if not value.numel():
                return to_device(value)
            data = value.untyped_storage().data_ptr()
            for tensor, view, _ in self.pairs:
                if view.untyped_storage().data_ptr() == data and value.dtype == tensor.dtype:
                    return aten.as_strided.default.redispatch(
                        _CPU, tensor, value.size(), value.stride(), value.storage_offset()
                    )
            return to_device(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self.lift(v) for v in value)
        return value


def resize(t: Tensor, size: Sequence[int], memory_format: torch.memory_format | None = None) -> Tensor:
    """aten::resize_"""
    like = _torch_empty(
        tuple(size), dtype=t.dtype, device="meta", memory_format=memory_format or torch.contiguous_format
    )
    return set_storage(t, t.untyped_storage(), int(t.storage_offset()), like.size(), like.stride())


def set_storage(
    t: Tensor, storage: torch.UntypedStorage, offset: int, size: Sequence[int], stride: Sequence[int] = ()
) -> Tensor:
    """aten::set_ of a storage, which grows where it is too small."""
    stride = stride or _torch_empty(tuple(size), device="meta").stride()
    needed = (offset + _span(size, stride)) * t.element_size() if 0 not in size else 0
    if needed > storage.nbytes():
        resize_storage(storage, needed)
    return aten.set_.source_Storage_storage_offset.redispatch(_CPU, t, storage, offset, size, stride)


def resize_storage(storage: torch.UntypedStorage, nbytes: int) -> None:
    """UntypedStorage.resize_, which all tensors of the storage see: it changes memory with a new one.

    torch resizes what one of its own allocators has made, and this device has none.
    """
    other = empty_strided((nbytes,), (1,), torch.uint8).untyped_storage()
    ctypes.memmove(other.data_ptr(), storage.data_ptr(), min(nbytes, storage.nbytes()))
    here, there = ((ctypes.c_uint64 * 5).from_address(s._cdata + _data_offset()) for s in (storage, other))
    here[:], there[:] = list(there), list(here)


@functools.cache
def _data_offset() -> int:
    """Where c10::StorageImpl has its DataPtr of four words, with its number of bytes behind it."""
    nbytes = 12345
    storage = empty_strided((nbytes,), (1,), torch.uint8).untyped_storage()
    words = (ctypes.c_uint64 * 12).from_address(storage._cdata)
    for n in range(8):
        if words[n] == storage.data_ptr() and words[n + 4] == nbytes:
            return 8 * n
    raise NotImplementedError(f"the interpreted GPU cannot resize the storages of torch {torch.__version__}")


# ---- what torch would do by code for CUDA that is not there, or that asks for the device's kind ----


def check_ordinal(device: torch.device | None) -> None:
    if device is not None and device.index not in (None, 0):
        raise RuntimeError(f"CUDA error: invalid device ordinal: the interpreted GPU is cuda:0, not {device}")


def _empty(
    size: Sequence[int], *, dtype: Any = None, device: Any = None, memory_format: Any = None, **_: Any
) -> Tensor:
    check_ordinal(device)
    dtype = dtype or torch.get_default_dtype()
    if memory_format is None:
        memory_format = torch.contiguous_format
    stride = _torch_empty(tuple(size), dtype=dtype, device="meta", memory_format=memory_format).stride()
    return empty_strided(size, stride, dtype)


def _empty_strided(
    size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    check_ordinal(device)
    return empty_strided(size, stride, dtype or torch.get_default_dtype())


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    with torch._C.DisableTorchFunction():
        if capture := Capture.running:
            if not (non_blocking or (to.is_cuda and source.is_cuda)):
                capture.prohibit("a copy between the CPU and the GPU, which waits unless it is non_blocking")
            capture.steps.append(lambda: _copy(to, source))
            return to
        source = _as_tensor(source)
        on_host(to).copy_(on_host(source))
    return to


def _to_copy(t: Tensor, *, non_blocking: bool = False, **kwargs: Any) -> Tensor:
    # a copy that does not block would go to pinned memory, which torch without CUDA does not have
    return aten._to_copy.default.redispatch(_CPU, t, **kwargs)


def _fused_sdp_choice(*_: Any, **__: Any) -> int:
    return 0  # SDPBackend.MATH: the fused ones are CUDA's


def _zero(t: Tensor) -> Tensor:
    """Zeros of a large tensor cost no memory until something else is written there."""
    if Capture.running or Benchmark.running or not t.is_contiguous():
        fallback(aten.zero_.default, t)
    elif core.load().gpuless_fill(t.data_ptr(), 0, t.nbytes):
        raise torch.cuda.OutOfMemoryError(f"the machine that interprets has no memory for {t.nbytes} bytes of zeros")
    return t


def _trace(t: Tensor) -> Tensor:
    """CUDA's takes any dtype, the CPU's neither halves nor booleans."""
    if t.dim() != 2:
        raise RuntimeError(f"trace: expected a matrix, but got a tensor of {t.dim()} dimensions")
    return t.diagonal().sum()


def _on_cpu(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """For those whose kernel chooses by the device: it shall see the CPU's."""
    return lambda *args, **kwargs: fallback(op, *args, **kwargs)


_tensor_str = torch._tensor_str._tensor_str


def _print(t: Tensor, indent: int) -> str:
    """The elements, of the CPU's view: torch looks at each by some operations."""
    return _tensor_str(host_view(t) if t.is_cuda and type(t) in (Tensor, torch.nn.Parameter) else t, indent)


_libraries: list[torch.library.Library] = []


def install() -> None:
    """Gives the CUDA dispatch key to the interpreted GPU, for the rest of the process: torch's operators, and those of
    `gpuless.operators`, whose kernels take the CPU's views of the device's memory."""
    if _libraries:
        return
    _set_device_guard()
    _set_hooks()
    implementations: dict[str, Callable[..., Any]] = {
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "copy_": _copy,
        "_to_copy": _to_copy,
        "resize_": lambda t, size, *, memory_format=None: resize(t, size, memory_format),
        "set_.source_Storage_storage_offset": set_storage,
        "record_stream": lambda t, stream: None,
        "_fused_sdp_choice": _fused_sdp_choice,
        "trace": _trace,
        "zero_": _zero,
        "convolution": _on_cpu(aten.convolution.default),
        "convolution_backward": _on_cpu(aten.convolution_backward.default),
    }
    every = torch.library.Library("_", "IMPL", "CUDA")
    every.fallback(fallback)
    # One by one, as torch with CUDA has kernels of its own there, which go before a fallback, and as none is found while
    # a dispatch mode is on the stack, off or not.
    for qualified in {n for key in ("CPU", "CUDA") for n in torch._C._dispatch_get_registrations_for_dispatch_key(key)}:
        namespace, _, name = qualified.partition("::")
        if namespace == "aten":
            packet, _, overload = name.partition(".")
            implementations.setdefault(name, _on_cpu(getattr(getattr(aten, packet), overload or "default")))
    aten_kernels = torch.library.Library("aten", "IMPL", "CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are overridden
        for name, implementation in implementations.items():
            aten_kernels.impl(name, implementation)
    _libraries.extend((every, aten_kernels))
    operators.when_added(_install_operator)
    torch._tensor_str._tensor_str = _print


def _install_operator(operator: operators.Operator) -> None:
    namespace, _, name = operator.kernel._schema.name.partition("::")  # type: ignore[attr-defined]
    library = torch.library.Library(namespace, "IMPL", "CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is overridden
        library.impl(name, _on_cpu(operator.kernel))  # type: ignore[arg-type]
    _libraries.append(library)


_Answer = ctypes.CFUNCTYPE(ctypes.c_int64)
_no, _yes = _Answer(lambda: 0), _Answer(lambda: 1)


def _keep(*tables: Any) -> None:
    """C++ objects and tables of virtual functions that torch points to from now on, and reads last when it destroys its
    hooks at the process's exit, behind Python's own end: so they are never freed."""
    for table in tables:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(table))


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _set_device_guard() -> None:
    """torch's own guard for a CUDA device that does nothing, which autograd needs.

    torch sets it, for fake tensors, in place of a guard that counts no devices (c10's ensureCUDADeviceGuardSet). torch
    without CUDA has no guard at all: so one is put there first whose every virtual function returns 0.
    """
    registry = (ctypes.c_void_p * 2).in_dll(_library("c10"), "_ZN3c104impl26device_guard_impl_registryE")
    if not registry[1]:  # by DeviceType, and CUDA's is 1
        table = (ctypes.c_void_p * 64)(*[_address(_no)] * 64)
        guard = (ctypes.c_void_p * 1)(ctypes.addressof(table))
        _keep(table, guard)
        registry[1] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()
    _set_native_handle(ctypes.c_void_p.from_address(registry[1] or 0))


def _set_native_handle(table: ctypes.c_void_p) -> None:
    """TileLang launches into the stream whose native handle the guard returns, and torch's guard that does nothing raises
    instead: it gets a copy of its table of virtual functions where this one returns the legacy stream, 0. Which one it is
    follows from what a stream's handle is when one of them returns 1. torch before 2.11 asks no guard.
    """
    if not hasattr(torch.Stream, "native_handle"):
        return
    stream = torch.Stream(stream_id=0, device_index=0, device_type=1)
    first, count, address = 2, 64, table.value or 0
    before = (ctypes.c_void_p * (first + count)).from_address(address - 8 * first)
    for slot in range(2, 40):  # behind the destructors
        copy = (ctypes.c_void_p * (first + count))(*before)
        copy[first + slot] = _address(_yes)
        table.value = ctypes.addressof(copy) + 8 * first
        with contextlib.suppress(RuntimeError):
            if stream.native_handle == 1:  # type: ignore[attr-defined]
                copy[first + slot] = _address(_no)
                _keep(copy)
                return
    table.value = address
    raise RuntimeError(f"torch {torch.__version__} does not let the interpreter's streams have a native handle")


def _set_hooks() -> None:
    """torch shall have CUDA for its accelerator, which autograd asks for the tensors' streams, and one without a context.

    It asks at::getCUDAHooks(). That object gets a copy of its table of virtual functions in which isBuilt returns true.
    Behind it come, in AcceleratorHooksInterface, isAvailable; hasPrimaryContext, which returns false; init, which does
    nothing; six others, and getPinnedMemoryAllocator, which returns the CPU's. Which one is isBuilt follows from what torch
    answers when it returns the opposite.
    """
    hooks = _library("torch_cpu")._ZN2at6detail12getCUDAHooksEv
    hooks.restype = ctypes.POINTER(ctypes.c_void_p)
    table = hooks()
    first, count = 2, 128  # behind the type and the offset; more than there are, which nothing calls
    before = (ctypes.c_void_p * (first + count)).from_address((table[0] or 0) - 8 * first)
    built = torch._C._accelerator_getAccelerator() is not None
    for slot in range(2, 40):  # behind the destructors
        copy = (ctypes.c_void_p * (first + count))(*before)
        copy[first + slot] = _address(_no if built else _yes)
        table[0] = ctypes.addressof(copy) + 8 * first
        if (torch._C._accelerator_getAccelerator() is not None) != built:
            copy[first + slot], copy[first + slot + 2], copy[first + slot + 3] = map(_address, (_yes, _no, _no))
            copy[first + slot + 10] = _address(_library("c10")._ZN3c1015GetCPUAllocatorEv)
            _keep(copy)
            return
    table[0] = ctypes.addressof(before) + 8 * first
    raise RuntimeError(f"torch {torch.__version__} does not let the interpreter stand in for a CUDA device")


def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / f"lib{name}.so"))
