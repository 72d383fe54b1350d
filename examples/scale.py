"""The arithmetic of docs/scale.md: least times of a decoder's steps on several GPUs, what fits, and what a million tokens cost.

    python examples/scale.py [--price 2.0] [--context 4096]

Everything is computed, nothing measured: weights and caches are read at the full bandwidth of memory, products run at the peak of
the tensor cores, attention's are left out, and all-reduces are a fixed time plus bytes over the link. Real steps take longer.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A decoder with a gated MLP and grouped keys, as its config.json has it."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def linears(self) -> int:
        """Weights of the layers that are swapped."""
        width, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.layers * self.hidden * (2 * width + 2 * kv + 3 * self.intermediate)

    def weight_bytes(self, itemsize: int) -> int:
        """Embedding and head stay in 16 bits; scales are a thousandth."""
        return self.linears * itemsize + 2 * self.vocabulary * self.hidden * 2

    def read_bytes(self, itemsize: int) -> int:
        """Those that a step reads: of the embedding it looks single rows up."""
        return self.weight_bytes(itemsize) - self.vocabulary * self.hidden * 2

    def cache_bytes(self, itemsize: int) -> int:
        """Bytes a token: keys and values, of 8 bits with a float32 scale for each token and head."""
        return 2 * self.layers * self.kv_heads * (self.head_dim * itemsize + (4 if itemsize == 1 else 0))

    @property
    def all_reduces(self) -> int:
        """Those of a forward: of each layer's two row-wise products, and of the embedding."""
        return 2 * self.layers + 1


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: float  #: bytes
    bandwidth: float  #: bytes a second
    flops: float  #: of 16 bits; 8 bits twice
    link: float  #: bytes a second, one way
    latency: float  #: seconds of an all-reduce of few bytes; assumed


MODELS = (Model("8B", 32, 4096, 14336, 32, 8, 128, 128256), Model("70B", 80, 8192, 28672, 64, 8, 128, 128256))
GPUS = (
    Gpu("H100 SXM, NVLink", 80e9, 3352e9, 989.4e12, 450e9, 10e-6),
    Gpu("L40S, PCIe 4", 48e9, 864e9, 366e12, 32e9, 20e-6),
)
PRECISIONS = {"bf16": 2, "int8, fp8": 1}
#: Of memory, for weights and caches.
USABLE = 0.9


def sequences(model: Model, gpu: Gpu, ranks: int, itemsize: int, context: int) -> int:
    """How many of `context` tokens fit beside the weights; caches are as weights are."""
    free = USABLE * gpu.memory * ranks - model.weight_bytes(itemsize)
    return max(0, int(free // (context * model.cache_bytes(itemsize))))


def communication(model: Model, gpu: Gpu, ranks: int, tokens: int) -> float:
    """Seconds of all-reduces of a forward over `tokens`, in a ring, with sums in 16 bits whatever the weights are."""
    sent = 2 * (ranks - 1) / ranks * tokens * model.hidden * 2
    return 0.0 if ranks == 1 else model.all_reduces * (gpu.latency + sent / gpu.link)


def step(model: Model, gpu: Gpu, ranks: int, itemsize: int, batch: int, context: int) -> float:
    """Seconds for a token of each sequence."""
    moved = model.read_bytes(itemsize) + batch * context * model.cache_bytes(itemsize)
    return max(moved / gpu.bandwidth, products(model, gpu, itemsize, batch)) / ranks + communication(
        model, gpu, ranks, batch
    )


def products(model: Model, gpu: Gpu, itemsize: int, tokens: int) -> float:
    """Seconds of one GPU's tensor cores."""
    return 2 * model.linears * tokens / (gpu.flops * (2 if itemsize == 1 else 1))


def even_latency(model: Model, gpu: Gpu, ranks: int, itemsize: int) -> float:
    """Seconds of an all-reduce at which `ranks` GPUs make one token as fast as a single one."""
    return model.read_bytes(itemsize) / gpu.bandwidth * (1 - 1 / ranks) / model.all_reduces


def one_model(gpu: Gpu, context: int) -> list[str]:
    """Lines of a table: one model divided, a step of one sequence, and a prompt of `context` tokens."""
    columns = ["model", "weights", "GPUs", "GB a GPU", "sequences", "step, ms", "of it all-reduces", "even at, us",
               "prompt, ms", "of it all-reduces"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for model in MODELS:
        for precision, itemsize in PRECISIONS.items():
            alone = sequences(model, gpu, 1, itemsize, context)
            for ranks in (1, 2, 4, 8):
                if fit := sequences(model, gpu, ranks, itemsize, context):
                    time, spent = step(model, gpu, ranks, itemsize, 1, context), communication(model, gpu, ranks, 1)
                    even = f"{even_latency(model, gpu, ranks, itemsize) * 1e6:.0f}" if alone and ranks > 1 else "-"
                    exchanged = communication(model, gpu, ranks, context)
                    prompt = products(model, gpu, itemsize, context) / ranks + exchanged
                    size = model.weight_bytes(itemsize) / ranks / 1e9
                    lines.append(f"| {model.name} | {precision} | {ranks} | {size:.1f} | {fit} | {time * 1e3:.2f} | "
                                 f"{spent * 1e3:.2f} | {even} | {prompt * 1e3:.0f} | {exchanged * 1e3:.0f} |")  # fmt: skip
    return lines


def eight_gpus(gpu: Gpu, context: int, price: float) -> list[str]:
    """Lines of a table: eight GPUs as copies of a model that is divided by some of them."""
    lines = [
        "| model | weights | copies x GPUs | sequences | ms a step | tokens/s | a million tokens |",
        "|" + "---|" * 7,
    ]
    for model in MODELS:
        for precision, itemsize in PRECISIONS.items():
            for ranks in (1, 2, 4, 8):
                fit = sequences(model, gpu, ranks, itemsize, context)
                if fit:
                    time = step(model, gpu, ranks, itemsize, fit, context)
                    rate = 8 // ranks * fit / time
                    cost = 8 * price / 3600 / rate * 1e6
                    lines.append(f"| {model.name} | {precision} | {8 // ranks} x {ranks} | {8 // ranks * fit} | {time * 1e3:.1f} | "
                                 f"{rate:.0f} | {cost:.3f} |")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--price", type=float, default=2.0, help="of a GPU and an hour")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each sequence")
    args = parser.parse_args()
    for gpu in GPUS:
        print(f"{gpu.name}\n")
        print("\n".join(one_model(gpu, args.context)) + "\n")
        print("\n".join(eight_gpus(gpu, args.context, args.price)) + "\n")


if __name__ == "__main__":
    main()
