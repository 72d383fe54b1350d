"""torch.utils.cpp_extension's `load` and `load_inline` with CUDA sources, for the interpreted GPU.

torch compiles and links such an extension itself. What it lacks for this device comes from here: a toolkit whose nvcc writes
PTX, headers that torch without CUDA or a small toolkit has not, and `extension/c10_cuda.cpp` instead of libc10_cuda and
libtorch_cuda. That file is compiled at its first use, because it needs this torch's headers.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.abc
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

import torch

from .. import core
from ..commands import build
from ..commands.toolkit import home, write_toolkit
from ..device import Device

NAME = "torch.utils.cpp_extension"
FOLDER = pathlib.Path(__file__).parent / "extension"
#: libraries of a torch with CUDA, in whose place c10_cuda.o is linked
REPLACED = ("-lc10_cuda", "-ltorch_cuda")


def cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "gpuless"


@functools.cache
def toolkit() -> pathlib.Path:
    """The folder that is torch's CUDA_HOME. Its name has everything that its files follow from, and ninja compiles an
    extension again when a command's words change."""
    build.installed()
    real = home()
    sources = [FOLDER / "c10_cuda.cpp", core.CUDART, core.LIBRARY]
    stamps = [f"{file} {file.stat().st_mtime_ns}" for file in sources]
    key = hashlib.sha256("\n".join([str(real), sys.executable, torch.__file__, torch.__version__, *stamps]).encode())
    folder = cache() / f"toolkit-{key.hexdigest()[:16]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        making = pathlib.Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            write_toolkit(making, core.CUDART)
            _compile(making / "lib64" / "c10_cuda.o", real)
            making.rename(folder)
        except OSError:
            if not folder.exists():  # another process was faster
                raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return folder


def _compile(target: pathlib.Path, real: pathlib.Path) -> None:
    includes = [pathlib.Path(torch.__file__).parent / "include", real / "include", FOLDER / "include"]
    words = [word for folder in includes for word in ("-isystem", str(folder))]
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", *words]
    done = subprocess.run(
        [*command, "-c", str(FOLDER / "c10_cuda.cpp"), "-o", str(target)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the interpreted GPU's part of an extension does not compile: {done.stderr}")


def _patch(module: types.ModuleType, device: Device) -> None:
    include_paths: Callable[..., list[str]] = module.include_paths
    prepare: Callable[..., list[str]] = module._prepare_ldflags
    load: Callable[..., Any] = module._import_module_from_library

    def join(*paths: str) -> str:
        return os.path.join(toolkit(), *paths)

    def with_headers(*args: Any, **kwargs: Any) -> list[str]:
        paths = include_paths(*args, **kwargs)
        # behind the toolkit's own, which are the real ones where there are any
        return [*paths, str(FOLDER / "include")] if join("include") in paths else paths

    def with_libraries(flags: list[str], with_cuda: bool, *args: Any) -> list[str]:
        flags = prepare(flags, with_cuda, *args)
        if not with_cuda:
            return flags
        return [join("lib64", "c10_cuda.o"), *(flag for flag in flags if flag not in REPLACED)]

    def checked(name: str, path: str, is_python_module: bool) -> Any:
        try:
            loaded = load(name, path, is_python_module)
        except ImportError as error:
            symbol = re.search(r"undefined symbol: (\S+)", str(error))
            if not symbol:
                raise
            raise ImportError(
                f"the extension {name} needs {symbol[1]}, which neither torch for CPUs nor gpuless has: "
                "torch's own CUDA library is not interpreted"
            ) from error
        if isinstance(loaded, types.ModuleType):
            for key, value in vars(loaded).items():
                if isinstance(value, types.BuiltinFunctionType):
                    setattr(loaded, key, _running(device, value))
        return loaded

    for name, value in {
        "_join_cuda_home": join, "include_paths": with_headers, "_prepare_ldflags": with_libraries,
        "_import_module_from_library": checked,
    }.items():  # fmt: skip
        setattr(module, name, value)


def _running(device: Device, function: Callable[..., Any]) -> Callable[..., Any]:
    """The extension's function, whose launches and findings the device counts."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with device.running():
            return function(*args, **kwargs)

    return run


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Patches the module when it is imported, which takes 0.5 s and few programs do."""

    def __init__(self, device: Device):
        self.device = device

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self.loader.exec_module(module)
        _patch(module, self.device)


def install(device: Device) -> None:
    """For the rest of the process."""
    if module := sys.modules.get(NAME):
        _patch(module, device)
    else:
        sys.meta_path.insert(0, _Finder(device))
