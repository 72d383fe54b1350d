"""CUDA sources of the tests, compiled to PTX once for each content."""

import hashlib
import os
import pathlib
import shutil
import subprocess

NVCC = shutil.which(f"{os.environ['CUDA_HOME']}/bin/nvcc" if "CUDA_HOME" in os.environ else "nvcc")
TESTS = pathlib.Path(__file__).parent
CACHE = TESTS.parent / "build/ptx"


def cached_ptx(source, headers, architecture, *flags):
    """The PTX of a source that includes these headers."""
    command = [NVCC, "-ptx", "-lineinfo", "-std=c++17", "-Werror", "all-warnings"]
    command += [f"-arch={architecture}", *flags, str(source)]
    content = b"".join(path.read_bytes() for path in (source, *headers)) + repr(command).encode()
    ptx = CACHE / f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}.ptx"
    if not ptx.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = ptx.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", partial], check=True)
        partial.replace(ptx)
    return ptx.read_text()
