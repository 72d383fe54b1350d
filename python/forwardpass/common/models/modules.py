"""What several parts of the package ask of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

K = TypeVar("K")


def plain_module(caller: str, model: nn.Module) -> nn.Module:
    """The module that is worked on: what `torch.compile` wrapped. TypeError, in one sentence, where there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} takes a torch.nn.Module, not {type(model).__name__}: pass the model itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{caller} cannot look into a TorchScript module: pass the eager model it was made from")
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


@torch.no_grad()
def local_tensor(t: Tensor) -> Tensor:
    """What this process has of a DTensor; any other tensor as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


def tensor_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the storages of parameters and buffers in this process, each counted once."""
    sizes: dict[Any, int] = {}
    for module in modules:
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is None or is_lazy(t):
                continue
            local = local_tensor(t)
            if type(local) in (Tensor, nn.Parameter):
                sizes[local.untyped_storage()._cdata] = local.untyped_storage().nbytes()
            else:  # a wrapper has no storage of its own
                sizes[id(t)] = t.numel() * t.element_size()
    return sum(sizes.values())


def head_of(m: nn.Module) -> nn.Module | None:
    """The output layer of a model of transformers; None of another module, and of a model without one."""
    get = getattr(m, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except Exception:  # a model class may leave it unimplemented, each with its own exception
        return None
    return head if isinstance(head, nn.Module) else None


def has_hooks(m: nn.Module) -> bool:
    """Around its forward or its backward."""
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def is_watched(m: nn.Module) -> bool:
    """Whether something is around its forward."""
    return has_hooks(m) or "forward" in vars(m)


def are_watched_by_others(*modules: nn.Module) -> bool:
    """Whether something is around the forward of one of them that is neither ours (parity and profile look at layers) nor
    accelerate's."""
    for m in modules:  # all members of a unit in one call: it is asked before each of the unit's
        attributes = m.__dict__
        if "forward" in attributes and forward_replaced(m):
            return True
        if (
            attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
        ):
            tables = m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks
            if not all(_is_ours(hook) for table in tables for hook in table.values()):
                return True
    return False


def _is_ours(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # of a functools.partial
    return str(getattr(function, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


def is_compressed(m: nn.Module) -> bool:
    """Whether compressed-tensors holds its weight as a file does, until the model's first call. Its forward is that library's."""
    return getattr(vars(m).get("quantization_status"), "value", None) == "compressed"


#: Where accelerate keeps its hook of a module, and the forward that it calls, which may be an attribute of the module too.
HOOK, OLD_FORWARD = "_hf_hook", "_old_forward"


def forward_replaced(m: nn.Module) -> bool:
    """Whether its own forward is another one than its class's, below a hook of accelerate if there is one. Ours calls that."""
    forward = vars(m).get(OLD_FORWARD, vars(m).get("forward"))
    is_of_class = forward is None or getattr(forward, "__func__", None) is type(m).forward
    return not (is_of_class or _is_ours(forward))


def accelerate_hooks(m: nn.Module) -> tuple[Any, ...]:
    """The hooks of accelerate that are on a module, one after another."""
    hook = vars(m).get(HOOK)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))  # a SequentialHook has several


def moves_nothing_but_inputs(hook: Any) -> bool:
    """Whether a hook of accelerate leaves the module that it is on as it is (an AlignDevicesHook that does not offload)."""
    return (
        f"{type(hook).__module__}.{type(hook).__qualname__}" == "accelerate.hooks.AlignDevicesHook" and not hook.offload
    )


def hook_alike(new: nn.Module, module: nn.Module) -> None:
    """Puts the hook of accelerate that is on a module, if any, on the one that takes its place, too."""
    if HOOK in vars(module):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, vars(module)[HOOK])


@contextmanager
def hooked(
    modules: Iterable[tuple[K, nn.Module]],
    before: Callable[[K, nn.Module, Any], object] | None = None,
    after: Callable[[K, nn.Module, Any, Any], object] | None = None,
    always: bool = False,
    every: bool = False,
) -> Iterator[None]:
    """Within the block each call of these modules also calls before(key, module, input) and after(key, module, input, output).

    The input is the first argument, positional or not, None where there is none; every: a tuple of all. always: `after` is called
    where the module raises, too.
    """
    inputs = _all if every else _first
    with ExitStack() as stack:
        for key, module in modules:
            if before is not None:
                handle = module.register_forward_pre_hook(partial(_before, before, key, inputs), with_kwargs=True)
                stack.callback(handle.remove)
            if after is not None:
                handle = module.register_forward_hook(
                    partial(_after, after, key, inputs), with_kwargs=True, always_call=always
                )
                stack.callback(handle.remove)
        yield


def _before(hook: Callable[..., object], key: Any, inputs: _Inputs, module: nn.Module, args: Any, kwargs: Any) -> None:
    hook(key, module, inputs(args, kwargs))


def _after(
    hook: Callable[..., object], key: Any, inputs: _Inputs, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    hook(key, module, inputs(args, kwargs), output)


_Inputs = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def _all(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return (*args, *kwargs.values())


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)
