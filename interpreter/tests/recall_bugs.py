"""Bugs that others found and confirmed on GPUs, in kernels of our own that have the same mistake: see docs/recall.md.

Each is launched broken and fixed. Triton's kernels stand in recall_triton.py, those of CUDA in recall/*.cu.
`python tests/recall_bugs.py NAME` prints the finding; without a name it measures all, and prints the table's figures.
"""

import dataclasses
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable

import recall_triton
import torch
import triton
from cached_ptx import cached_ptx

import gpuless

FOLDER = pathlib.Path(__file__).parent / "recall"
HEADERS = [FOLDER / "twins.cuh", FOLDER.parent / "hazards/hazard.cuh"]
SEEDS = 10


@dataclasses.dataclass(frozen=True)
class Bug:
    """One bug.

    Attributes:
        name: of its kernels.
        link: where it was reported or mended.
        kinds: of the finding; the schedule decides which of them comes first.
        launch: (kernel, previous) -> (what was written, what it has to be); `previous` is another kernel of the file.
        source: the file with the HAZARD lines.
        explore: how many orders are tried where the orders of seeds do not show it.
        miss: why it is not found; "" where it is.
        mended_by: Triton's version from which on its compiler mends it: the broken kernel is silent then, and right.
    """

    name: str
    link: str
    kinds: tuple[str, ...]
    launch: Callable
    source: pathlib.Path
    explore: int = 0
    miss: str = ""
    mended_by: tuple[int, int] | None = None

    @property
    def is_mended(self):
        return self.mended_by is not None and tuple(map(int, triton.__version__.split(".")[:2])) >= self.mended_by

    @property
    def arch(self):
        return re.search(r"Needs: (\S+)", self.source.read_text())[1]

    @property
    def lines(self):
        return [i for i, line in enumerate(self.source.read_text().splitlines(), 1) if "HAZARD" in line]

    def run(self, broken, seed):
        """Launches one of the two. Raises its finding, or returns what was written and what it has to be."""
        # On two threads the host decides which of two blocks comes first, and not the seed.
        with gpuless.gpu(self.arch, seed=seed, threads=1, explore=self.explore if broken else 0):
            if self.source.suffix == ".py":
                return self.launch(broken)
            module = module_of(self.source)
            (kernel,) = (name for name in module.kernels if f"{self.name}ILb{int(broken)}E" in name)
            return self.launch(module[kernel], module)


def module_of(source):
    arch = re.search(r"Needs: (\S+)", source.read_text())[1]
    return gpuless.Module(cached_ptx(source, HEADERS, arch))


BUGS: dict[str, Bug] = {}
SOURCES = {
    name: path
    for path in [*sorted(FOLDER.glob("*.cu")), FOLDER.parent / "recall_triton.py"]
    for name in re.findall(r"^(?:TWINS\w*\(|def )(\w+)", path.read_text(), re.M)
}


def bug(link, *kinds, **fields):
    """Registers the launch of the kernels that have the function's name."""

    def register(launch):
        name = launch.__name__
        BUGS[name] = Bug(name, f"https://github.com/{link}", kinds, launch, SOURCES[name], **fields)
        return launch

    return register


def integers(*shape, low=0, high=9):
    """Small enough that every sum is exact."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0)).float()


def written(kernel, x, *shape, block=128, grid=1, cluster=1):
    y = torch.full(shape, float("nan"))
    kernel.launch(grid=grid, block=block, args=[x, y], cluster=cluster)
    return y


RACE = ("race", "uninitialised")


@bug("flashinfer-ai/flashinfer/pull/3624", "race")
def flashinfer_3624(kernel, module):
    x = integers(4, 128, high=1000)
    return written(kernel, x, 4), x.amax(1)


@bug("flashinfer-ai/flashinfer/pull/3529", "race")
def flashinfer_3529(kernel, module):
    x = integers(128, high=4096)
    threes = sum(((x.int() >> shift & 15) == 3).sum() for shift in (0, 4, 8))
    return written(kernel, x, 128), torch.full((128,), 1000.0 - threes)


@bug("flashinfer-ai/flashinfer/issues/769", "barrier", "deadlock")
def flashinfer_769(kernel, module):
    x = torch.ones(128)
    return written(kernel, x, 128), torch.full((128,), 21.0)


@bug("ggml-org/llama.cpp/pull/24360", "race")
def llama_cpp_24360(kernel, module):
    x = integers(3, 2, 16)
    sums = (x[:, 0].cumsum(0) * x[:, 1]).sum(1)
    return written(kernel, x, 3, 128), sums[:, None].expand(3, 128)


@bug("ggml-org/llama.cpp/pull/13742", "race", "barrier", "deadlock")
def llama_cpp_13742(kernel, module):
    x = integers(4, 64)
    x[1] = x[3] = 0
    return written(kernel, x, 64, block=64), x.sum(0).flip(0)


@bug("ggml-org/llama.cpp/pull/13469", *RACE, "barrier")
def llama_cpp_13469(kernel, module):
    x = integers(2, 2, 32)
    sums = torch.stack([2 * x[:, 0], x[:, 0] + x[:, 1]], 1)
    return written(kernel, x, 128), sums.flatten().flip(0)


@bug("ggml-org/llama.cpp/pull/28358", "race")
def llama_cpp_28358(kernel, module):
    x = integers(2, 8)
    return written(kernel, x, 18, block=32), torch.cat([x.flatten(), x.sum(1)])


@bug("ikawrakow/ik_llama.cpp/issues/2139", "race")
def ik_llama_cpp_2139(kernel, module):
    selected = torch.tensor([200, 3, 77, 130, 9, 255, 64, 31])
    mask, y = integers(256), torch.full((256,), -1000.0)
    y[selected] = 0
    return written(kernel, torch.cat([mask, selected.float()]), 256, block=256), y + mask


@bug("vllm-project/vllm/pull/13140", *RACE)
def vllm_13140(kernel, module):
    x = integers(128, high=64)
    return written(kernel, x, 64), torch.bincount(x.int(), minlength=64).float()


@bug("sgl-project/sglang/pull/37663", *RACE)
def sglang_37663(kernel, module):
    x = integers(64, high=128).sort().values
    return written(kernel, x, 128), (x[None] <= torch.arange(128)[:, None]).sum(1).float()


@bug("vllm-project/vllm/pull/53167", "in_flight")
def hadacore_53167(kernel, module):
    x = integers(128)
    return written(kernel, x, 128, block=32), x


@bug("vllm-project/vllm/pull/28760", "out_of_bounds")
def vllm_28760(kernel, module):
    x = integers(8)
    return written(kernel, x, 128), torch.cat([x[5:], torch.full((5,), -1.0)]).repeat_interleave(16)


@bug("ashalliants/ninfer-3090/pull/43", "race", "in_flight", "uninitialised")
def ninfer_43(kernel, module):
    x = integers(256)
    return written(kernel, x, 256, block=64), x.flip(0)


@bug("NVIDIA/cuml/pull/6578", "race")
def cuml_6578(kernel, module):
    x = integers(4, 64)
    return written(kernel, x, 4, block=64), x.sum(1)


@bug("NVIDIA/cccl/pull/10627", "race", explore=2000)
def cccl_10627(kernel, module):
    x = integers(4, 128, high=16)
    return written(kernel, x, 16, grid=4), torch.bincount(x.int().flatten(), minlength=16).float()


@bug("pytorch/pytorch/pull/162995", "race")
def pytorch_162995(kernel, module):
    x = integers(4, 32)
    return written(kernel, x, 32), x.sum(0) - x.sum()


@bug("pytorch/pytorch/pull/192300", "out_of_bounds")
def pytorch_192300(kernel, module):
    x = integers(16)
    return written(kernel, x, 16, block=32), (x.cumsum(0) - x).flip(0)


@bug("microsoft/onnxruntime/pull/28108", "overflow", "out_of_bounds")
def onnxruntime_28108(kernel, module):
    """A table of 9.4 GB, of which 512 bytes are touched."""
    x = torch.empty(262144, 8960)
    x[255999, :128] = integers(128)
    return written(kernel, x, 128), x[255999, :128]


@bug("kokkos/kokkos/issues/2681", "race")
def kokkos_2681(kernel, module):
    x = integers(2, 32)
    return written(kernel, x, 2, block=32, grid=2), x.sum(1).cumsum(0)


@bug("JustVugg/colibri/issues/1099", "race")
def colibri_1099(kernel, module):
    return written(kernel, torch.ones(1), 16, 16, block=32), torch.ones(16, 16)


@bug("NVIDIA/cutlass/issues/3597", "race")
def cutlass_3597(kernel, module):
    x = integers(2, 128, high=1000)
    return written(kernel, x, 2), x.amax(1)


@bug("NVIDIA/cutlass/issues/3598", "race")
def cutlass_3598(kernel, module):
    x = integers(2, 32)
    return written(kernel, x, 2, 32, block=32, grid=2, cluster=2), x.flip(0)


@bug("Dao-AILab/flash-attention/issues/1344", *RACE)
def flash_attention_1344(kernel, module):
    x = integers(128)
    return written(kernel, x, 128), x.flip(0)


@bug("Dao-AILab/flash-attention/pull/2481", "race")
def flash_attention_2481(kernel, module):
    x = integers(256)
    between, y = torch.full((256,), float("nan")), torch.full((256,), float("nan"))
    module["upstream"].launch(grid=2, block=128, args=[x, between])
    kernel.launch(grid=2, block=128, args=[between, y], programmatic=True)
    return y, 2 * x + 1


@bug("NVIDIA/TransformerEngine/pull/3417", "race", "in_flight")
def transformer_engine_3417(kernel, module):
    x = integers(4, 128)
    return written(kernel, x, 4, 128), x + 1


@bug("NVIDIA/TensorRT-LLM/pull/15338", "race", "in_flight", "uninitialised")
def tensorrt_llm_15338(kernel, module):
    x = integers(4, 128)
    return written(kernel, x, 128), x.sum(0)


@bug("NVIDIA/TensorRT-LLM/pull/18339", "race")
def tensorrt_llm_18339(kernel, module):
    x = integers(3)
    return written(kernel, x, 128), x.sum().expand(128)


@bug("uccl-project/mKernel/pull/18", "race", "in_flight")
def mkernel_18(kernel, module):
    x = integers(3, 128)
    return written(kernel, x, 3, 128), x + 1


@bug("pytorch/helion/pull/3621", "race", "in_flight", "mbarrier", "deadlock")
def helion_3621(kernel, module):
    x = integers(2, 2, 128)
    return written(kernel, x, 2, 128, block=160), x.sum(1)


@bug("tile-ai/tilelang/issues/2556", *RACE)
def tilelang_2556(kernel, module):
    x = integers(48)
    return written(kernel, x, 48, block=64), x.flip(0)


@bug("tile-ai/tilelang/issues/1026", "barrier", "deadlock")
def tilelang_1026(kernel, module):
    x = integers(16, 2)
    return written(kernel, x, 16, 2, block=32), x[:, :1].expand(16, 2)


@bug("tile-ai/tilelang/issues/2613", "race", "in_flight")
def tilelang_2613(kernel, module):
    return written(kernel, torch.ones(1), 2, 64, 8, block=256), torch.full((2, 64, 8), 32.0)


@bug("NVIDIA/cudnn-frontend/pull/396", "race", "in_flight")
def cudnn_frontend_396(kernel, module):
    return written(kernel, torch.ones(1), 2, 128, 4), torch.full((2, 128, 4), 16.0)


@bug("Dao-AILab/flash-attention/pull/2033", "race", "in_flight", "uninitialised")
def flash_attention_2033(kernel, module):
    return written(kernel, torch.ones(1), 128, 4), torch.full((128, 4), 19.0)


@bug("deepseek-ai/DeepGEMM/pull/343", "in_flight")
def deepgemm_343(kernel, module):
    """The map has to be aligned to 128 bytes in global memory."""
    x = integers(2, 8, 32)
    place, y = torch.zeros(256, dtype=torch.uint8), torch.full((2, 8, 32), float("nan"))
    place = place[-place.data_ptr() % 128 :][:128]
    kernel.launch(grid=1, block=32, args=[gpuless.tensor_map(x[0], box=(8, 32)), x[1], place, y])
    return y, x


@bug("triton-lang/triton/pull/2040", "mbarrier", "race", "uninitialised")
def triton_2040(kernel, module):
    x = integers(128)
    return written(kernel, x, 128), x


# Triton 3.9 puts a barrier in front of an atomic that releases
@bug("ROCm/triton/pull/745", "race", mended_by=(3, 9))
def rocm_triton_745(broken):
    x, y = integers(2, 256), torch.full((256,), float("nan"))
    recall_triton.rocm_triton_745[(2,)](
        x, torch.empty(256), torch.zeros(1, dtype=torch.int32), y, BROKEN=broken, BLOCK=256
    )
    return y, x.sum(0)


@bug("ROCm/aiter/pull/3132", *RACE)
def aiter_3132(broken):
    x, y = integers(256), torch.full((2, 256), float("nan"))
    recall_triton.aiter_3132[(1,)](x, y, BROKEN=broken, BLOCK=256)
    return y[1], x.flip(0)


@bug(
    "NVIDIA/TensorRT-LLM/pull/17539",
    "race",
    miss="loads of Triton kernels with masked stores are not checked within a block",
)
def tensorrt_llm_17539(broken):
    x, y = integers(256), integers(256)
    expected = y.flip(0) + x
    recall_triton.tensorrt_llm_17539[(1,)](x, y, 256, BROKEN=broken, BLOCK=256)
    return y, expected


@bug("fla-org/flash-linear-attention/pull/1082", "overflow")
def fla_1082(broken):
    """A tensor of 4 GB, of which 512 bytes are touched."""
    x, y = torch.empty(4, 2**30, dtype=torch.int8), torch.full((128,), 100, dtype=torch.int8)
    x[3, :128] = torch.arange(128)
    recall_triton.fla_1082[(1,)](x, y, x.shape[1], BROKEN=broken, BLOCK=128)
    return y, x[3, :128]


@bug("Dao-AILab/flash-attention/issues/2789", "out_of_bounds")
def flash_attention_2789(broken):
    x, y = integers(200), torch.full((200,), float("nan"))
    recall_triton.flash_attention_2789[(2,)](x, y, 200, BROKEN=broken, BLOCK=128)
    return y, x


def measure(b):
    """How many seeds find it, as what, the median of a launch's processor seconds, and whether the fix is silent and right."""
    kinds, seconds = [], []
    for seed in range(SEEDS):
        begin = time.process_time()
        try:
            b.run(True, seed)
        except gpuless.Finding as e:
            kinds.append(e.kind)
        seconds.append(time.process_time() - begin)
    right = all(torch.equal(*b.run(False, seed)) for seed in range(SEEDS))
    return len(kinds), sorted(set(kinds)), statistics.median(seconds), right


def show(b):
    """The finding of the broken one, and of the fixed one if there is any."""
    for which in ("broken", "fixed"):
        try:
            b.run(which == "broken", 0)
            print(f"{b.name}, {which}: silent")
        except gpuless.Finding as e:
            print(e)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        show(BUGS[name])
    for name, b in BUGS.items() if not sys.argv[1:] else ():
        n, kinds, seconds, right = measure(b)
        result = f"{n}/{SEEDS} {', '.join(kinds):28} {1e3 * seconds:6.1f} ms"
        print(f"{name:24} {b.arch:8} {result}  fixed: {'silent and right' if right else 'WRONG'}")
