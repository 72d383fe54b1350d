"""Golden vectors: what each instruction gives on a real GPU, recorded into a file that the interpreter is held to.

python tests/golden.py record FILE [--interpret sm_90a]   on a GPU; --interpret: a trial without one
python tests/golden.py replay FILE...                     exits non-zero where the interpreter differs
python tests/golden.py models FILE                        which accumulators give the tensor cores' bits

A file (.npz) has each kernel's PTX, arguments and results, so that it outlives changes to golden_cases.py. Kept in
tests/golden/, it is replayed by the tests.
"""

import argparse
import ctypes
import hashlib
import itertools
import json
import pathlib
import sys

import numpy as np
import tensor_cores as tc
import torch
from golden_cases import CAPABILITIES, cases

import gpuless

SCHEMA = "gpuless.golden/1"
FOLDER = pathlib.Path(__file__).parent / "golden"


class Interpreted:
    """Runs kernels in the interpreter."""

    def __init__(self, arch):
        self.arch, self.about = arch, {"device": f"the interpreter's {arch}", "arch": arch, "interpreted": True}

    def run(self, text, arguments, results, grid, block, shared, options):
        """The arrays of `results` after the launch; the arguments themselves stay as they are."""
        arrays = {i: a.copy() for i, a in enumerate(arguments) if isinstance(a, np.ndarray)}
        given = [torch.from_numpy(arrays[i].view(np.uint8)) if i in arrays else int(a) for i, a in enumerate(arguments)]
        with gpuless.gpu(self.arch, **options):
            gpuless.Module(text)["k"].launch(grid, block, given, shared=shared)
        return [arrays[i] for i in results]


class Card:
    """Runs kernels on this machine's GPU, through the CUDA driver's API.

    library and device are its own; a test gives others.
    """

    MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute

    def __init__(self, library=None, device="cuda", capability=None, about=None):
        torch.zeros(1, device=device)  # torch makes the primary context and leaves it current
        self.library, self.device = library or ctypes.CDLL("libcuda.so.1"), device
        capability = capability or torch.cuda.get_device_capability()
        self.arch = {c: a for a, c in CAPABILITIES.items()}.get(10 * capability[0] + capability[1])
        if self.arch is None:
            sys.exit(f"the interpreter knows GPUs of compute capability 8.0, 8.9 and 9.0, and this one has "
                     f"{capability[0]}.{capability[1]}: record on one that it knows")  # fmt: skip
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        self.about = about or {"device": torch.cuda.get_device_name(), "arch": self.arch, "interpreted": False}
        self.about["driver"] = version.value

    def call(self, name, *arguments):
        if error := getattr(self.library, name)(*arguments):
            words = ctypes.c_char_p()
            self.library.cuGetErrorString(error, ctypes.byref(words))
            raise RuntimeError(f"{name}: CUDA error {error}, {(words.value or b'unknown').decode()}")

    def run(self, text, arguments, results, grid, block, shared, options):
        """As above; options are the interpreter's alone."""
        module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), text.encode())
        self.call("cuModuleGetFunction", ctypes.byref(kernel), module, b"k")
        if shared:
            self.call("cuFuncSetAttribute", kernel, self.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        tensors, values = {}, []
        for i, a in enumerate(arguments):
            if isinstance(a, np.ndarray):
                tensors[i] = torch.from_numpy(a.copy().view(np.uint8)).to(self.device)
                values.append(ctypes.c_uint64(tensors[i].data_ptr()))
            else:
                values.append({4: ctypes.c_uint32, 8: ctypes.c_uint64}[a.itemsize](int(a)))
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        # stream 0 is the legacy stream, which waits for torch's copies, as they for it
        self.call("cuLaunchKernel", kernel, grid, 1, 1, block, 1, 1, shared, None, addresses, None)
        self.call("cuCtxSynchronize")
        made = [tensors[i].cpu().numpy().view(arguments[i].dtype).reshape(arguments[i].shape) for i in results]
        self.call("cuModuleUnload", module)
        return made


def record(runner, file):
    """Every case of the runner's architecture, into two arrays: a JSON text, and the contents of all arrays, each once."""
    contents, index, entries = bytearray(), {}, {}

    def kept(a):
        if not isinstance(a, np.ndarray):
            return {"number": int(a), "bytes": a.itemsize}
        name = hashlib.sha256(f"{a.dtype}{a.shape}".encode() + a.tobytes()).hexdigest()[:12]
        if name not in index:
            index[name] = [a.dtype.str, a.shape, len(contents)]
            contents.extend(a.tobytes())
        return name

    for case in cases(runner.arch):
        assert case.name not in entries
        launch = {"grid": case.grid, "block": case.block, "shared": case.shared}
        made = runner.run(case.text, case.arguments, case.results, options=case.options, **launch)
        entries[case.name] = {"text": case.text, "arguments": [kept(a) for a in case.arguments],
                              "results": case.results, "made": [kept(a) for a in made], **launch}  # fmt: skip
    about = {"schema": SCHEMA, **runner.about, "torch": torch.__version__, "cases": entries, "arrays": index}
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, about=text, contents=np.frombuffer(contents, np.uint8))
    return about


class File:
    """A recorded file."""

    def __init__(self, path):
        with np.load(path) as f:
            self.about, self.contents = json.loads(f["about"].tobytes()), f["contents"]
        if self.about["schema"] != SCHEMA:
            raise ValueError(f"{path} has schema {self.about['schema']}, not {SCHEMA}: record it again")
        self.arch, self.entries = self.about["arch"], self.about["cases"]

    def value(self, kept):
        if isinstance(kept, str):
            dtype, shape, offset = self.about["arrays"][kept]
            return np.frombuffer(self.contents, dtype, int(np.prod(shape)), offset).reshape(shape)
        return (np.uint32 if kept["bytes"] == 4 else np.uint64)(kept["number"])

    def arguments(self, name):
        return [self.value(a) for a in self.entries[name]["arguments"]]

    def made(self, name):
        return [self.value(a) for a in self.entries[name]["made"]]


def replay(file):
    """name of a case -> what is wrong with it, of those that are wrong."""
    wrong = {}
    known = {case.name: case for case in cases(file.arch)}
    runner = Interpreted(file.arch)
    for name, entry in file.entries.items():
        if name not in known:
            wrong[name] = "golden_cases.py has no such case any more, so nothing says how to compare it"
            continue
        launch = {k: entry[k] for k in ("grid", "block", "shared")}
        arguments = file.arguments(name)
        try:
            ours = runner.run(entry["text"], arguments, entry["results"], options=known[name].options, **launch)
            known[name].compare(arguments, file.made(name), ours)
        except (AssertionError, gpuless.Finding) as e:
            wrong[name] = str(e)
    return wrong


GROUPS, FRACTIONS, MANTISSAS = (4, 8, 16, 32), range(10, 30), (10, 13, 23)


def fits(case, arguments, made):
    """(group of K, fraction bits, mantissa bits) of the truncating sums that give every recorded bit of an mma or wgmma."""
    a_type, b_type, d_type = case.types
    a, b, c, d = ([*x] for x in case.matrices(arguments, made))
    k = a[0].shape[1]
    with np.errstate(all="ignore"):
        decoded = [
            (tc.decode(x, a_type), tc.decode(y, b_type), tc.decode(z, d_type), w) for x, y, z, w in zip(a, b, c, d)
        ]

        def gives(x, y, z, w, model):
            # a row at a time: most models fail on the first
            for i in range(len(x)):
                row = tc.truncating_product(x[i : i + 1], y, z[i : i + 1], case.types, *model)
                if not tc.same_bits(tc.encode(row, d_type), w[i : i + 1], d_type):
                    return False
            return True

        # f16 sums are rounded to f16: of their mantissa nothing shows
        mantissas = MANTISSAS if d_type == "f32" else (10,)
        models = itertools.product(sorted({min(g, k) for g in GROUPS}), FRACTIONS, mantissas)
        return [m for m in models if all(gives(*matrices, m) for matrices in decoded)]


def models(file):
    """Prints them, a line for each instruction."""
    for case in cases(file.arch):
        if case.types and case.types[2] in ("f16", "f32") and case.name in file.entries:
            found = fits(case, file.arguments(case.name), file.made(case.name))
            found = [f"group {g}, fraction {f}, mantissa {m}" for g, f, m in found]
            print(f"{case.name}: {'; '.join(found) or 'none'}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("record", "replay", "models"))
    p.add_argument("files", nargs="+", metavar="FILE")
    p.add_argument("--interpret", choices=CAPABILITIES, help="record in the interpreter: a trial where there is no GPU")
    args = p.parse_args()
    if args.what == "record":
        if args.interpret is None and not torch.cuda.is_available():
            sys.exit("recording needs a GPU, and torch finds none: run it on one, or try it with --interpret sm_90a")
        about = record(Interpreted(args.interpret) if args.interpret else Card(), args.files[0])
        print(f"{len(about['cases'])} cases on {about['device']}: {pathlib.Path(args.files[0]).stat().st_size} bytes")
        return
    differ = 0
    for file in map(File, args.files):
        print(f"{file.about['device']}, {len(file.entries)} cases")
        if args.what == "models":
            models(file)
            continue
        wrong = replay(file)
        differ += len(wrong)
        for name, why in wrong.items():
            print(f"  {name}: {why}")
    sys.exit(f"{differ} cases differ" if differ else None)


if __name__ == "__main__":
    main()
