"""What a CPU user could run a model with, ours and its peers: built once from one fp32 model, for any number of threads."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import importlib
import importlib.metadata
import logging
import os
import pathlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

import forwardpass as fp
from forwardpass.cli import comparison, embedding
from forwardpass.cli.embedding import Batch
from forwardpass.common import environment
from forwardpass.common.timing import Track, untracked

Run = Callable[[Batch], Tensor]  #: batch -> last hidden states

INPUTS = ("input_ids", "attention_mask")


class Missing(Exception):
    """A peer that cannot be built here, in words."""


@dataclass(frozen=True)
class Subject:
    """What candidates are built from. What several of them share is made once.

    example: a batch to trace with. lowered: the tier that this process is held to, None where that is the machine's own.
    highest: the machine's own tier.
    """

    model: nn.Module
    example: Batch
    calibration: list[Batch]
    lowered: str | None = None
    highest: str | None = None

    @cached_property
    def int8(self) -> nn.Module:
        return swapped(self, precision="int8", calibrate=self.calibration)

    @cached_property
    def openvino(self) -> Any:
        ov = need("openvino", "openvino")
        return ov.convert_model(Hidden(self.model), example_input=tuple(self.example[n] for n in INPUTS))

    @cached_property
    def openvino_int8(self) -> Any:
        """Weights in 8 bits; nncf changes the model that it is handed."""
        nncf = need("nncf", "nncf")
        nncf.set_log_level(logging.ERROR)
        return nncf.compress_weights(self.openvino.clone())  # its default, INT8_ASYM


@dataclass(frozen=True)
class Candidate:
    """with_threads: number of threads -> run, torch's number being set by the caller. instructions: those that it multiplies
    with, as far as its library tells.
    """

    with_threads: Callable[[int], Run]
    instructions: str


@dataclass(frozen=True)
class Peer:
    """How a candidate is built, and what is said of it.

    packages: whose versions count, beside torch. lowering: what holds it to a tier below the machine's.
    recompiled: why it is left out where the number of threads changes.
    """

    build: Callable[[Subject], Candidate]
    packages: tuple[str, ...] = ()
    lowering: str = "ATEN_CPU_CAPABILITY, MKL_ENABLE_INSTRUCTIONS"
    recompiled: str | None = None

    def versions(self) -> dict[str, str]:
        return {p: importlib.metadata.version(p) for p in self.packages}


class Hidden(nn.Module):
    """Positional tensors in, last hidden states out: what exporters take."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise Missing(f"not installed ({e}): pip install {package}") from e


def swapped(subject: Subject, **choices: Any) -> nn.Module:
    model = copy.deepcopy(subject.model)
    fp.swap(model, keep=False, unpad=True, **choices)  # embeddings leave padding out
    return model


def of_torch(model: nn.Module, instructions: str) -> Candidate:
    run = embedding.hidden_states(model)
    return Candidate(lambda threads: run, instructions)


def eager(subject: Subject) -> Candidate:
    mkl = os.environ.get("MKL_ENABLE_INSTRUCTIONS", "as MKL chooses")
    return of_torch(subject.model, f"{torch.backends.cpu.get_cpu_capability()}, products {mkl}")


def compiled_fp32(subject: Subject) -> Candidate:
    isa = importlib.import_module("torch._inductor.cpu_vec_isa").pick_vec_isa()
    return of_torch(torch.compile(copy.deepcopy(subject.model), dynamic=True), f"{isa} (inductor), products MKL's")


def forwardpass_int8(subject: Subject, compiled: bool = False) -> Candidate:
    model = torch.compile(subject.int8, dynamic=True) if compiled else subject.int8
    return of_torch(model, str(environment.device()["int8"]))


def forwardpass_w8a16(subject: Subject) -> Candidate:
    return of_torch(swapped(subject, precision="w8a16"), eager(subject).instructions)


def torch_dynamic_int8(subject: Subject) -> Candidate:
    quantized, reason = comparison.torch_dynamic_int8(subject.model)
    if quantized is None:
        raise Missing(str(reason))
    return of_torch(quantized, f"{fbgemm_instructions()} (FBGEMM)")


def fbgemm_instructions() -> str:
    """FBGEMM has no Python interface: this is its fbgemmInstructionSet()."""
    library = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    names = ("any", "AVX2", "AVX-512", "AVX-512 of 256 bits", "AVX-512 VNNI", "AVX-512 VNNI of 256 bits")
    try:
        return names[library["_ZN6fbgemm20fbgemmInstructionSetEv"]()]
    except (AttributeError, IndexError):
        return "not known"


def torchao(subject: Subject) -> Candidate:
    """W8A8, dynamic per token, compiled: its documentation's way on CPUs. For any shape, as each by itself takes half a minute;
    torch compiles twice all the same, with padding and without.
    """
    quantization = need("torchao.quantization", "torchao")
    quantized = copy.deepcopy(subject.model)
    quantization.quantize_(quantized, quantization.Int8DynamicActivationInt8WeightConfig())
    onednn_isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "as it chooses")
    isa = importlib.import_module("torch._inductor.cpu_vec_isa").pick_vec_isa()
    return of_torch(torch.compile(quantized, dynamic=True), f"{isa} (inductor), {onednn_isa} (oneDNN)")


def onnxruntime(subject: Subject) -> Candidate:
    """Dynamic quantisation of a torch.onnx export; of its settings those that moved MiniLM's embeddings least."""
    ort, quantization = need("onnxruntime", "onnxruntime"), need("onnxruntime.quantization", "onnx onnxruntime")
    need("onnxscript", "onnxscript")
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with tempfile.TemporaryDirectory() as folder:
        exported, quantized = pathlib.Path(folder, "exported.onnx"), pathlib.Path(folder, "quantized.onnx")
        torch.onnx.export(
            Hidden(subject.model), tuple(subject.example[n] for n in INPUTS), exported, input_names=INPUTS,
            output_names=["hidden"], dynamic_shapes={n: shape for n in INPUTS}, external_data=False, verbose=False,
        )  # fmt: skip
        quantization.quantize_dynamic(exported, quantized, op_types_to_quantize=["MatMul"], per_channel=True)
        serialized = quantized.read_bytes()

    def with_threads(threads: int) -> Run:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # by default its threads spin after a run, for 37 ms of CPU time that the next candidate would pay
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        return lambda batch: torch.from_numpy(session.run(None, {n: batch[n].numpy() for n in INPUTS})[0])

    return Candidate(with_threads, f"{subject.highest or 'not known'}, by the CPU's flags (MLAS)")


def openvino(subject: Subject, int8: bool = True, **settings: Any) -> Candidate:
    """With int8, 8-bit weights by nncf, whose inputs the CPU plugin quantises dynamically, in groups of 32 by default; what else
    there is in the precision that the plugin chooses: bfloat16 where the CPU has that.

    Its oneDNN obeys ONEDNN_MAX_CPU_ISA. The plugin does not ask it: it goes on to choose bfloat16 and dynamic quantisation by the
    CPU's own flags, and oneDNN then refuses both. So a lower tier is told what such a CPU would have: float32, and on AVX2 no
    dynamic quantisation, which takes VNNI.
    """
    ov = need("openvino", "openvino")
    model = subject.openvino_int8 if int8 else subject.openvino
    if subject.lowered:
        settings = {"INFERENCE_PRECISION_HINT": "f32", **settings}
    if subject.lowered == "avx2" and int8:
        settings = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, **settings}

    def compiled(threads: int) -> Any:
        latency = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        return ov.compile_model(model, "CPU", latency | settings)

    def with_threads(threads: int) -> Run:
        call = compiled(threads)
        return lambda batch: torch.from_numpy(call([batch[n].numpy() for n in INPUTS])[0])

    call = compiled(torch.get_num_threads())
    call([subject.example[n].numpy() for n in INPUTS])  # it chooses kernels for the shapes that it gets
    return Candidate(with_threads, openvino_instructions(call))


def openvino_f32(subject: Subject) -> Candidate:
    """Nothing in bfloat16, which the other two may have chosen."""
    precision = need("openvino", "openvino").Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
    if subject.lowered or precision.to_string() == "f32":
        raise Missing("the same as openvino, whose own precision here is f32")
    return openvino(subject, INFERENCE_PRECISION_HINT="f32")


def openvino_instructions(compiled: Any) -> str:
    """The instructions of the layers' products, then of what else was compiled, with the precision outside them."""
    kernels: dict[bool, set[str]] = {True: set(), False: set()}
    for op in compiled.get_runtime_model().get_ops():
        info = {k: v.value for k, v in op.get_rt_info().items() if k in ("layerType", "primitiveType")}
        if "avx" in info["primitiveType"] or info["layerType"] == "FullyConnected":
            kernels[info["layerType"] == "FullyConnected"].add(info["primitiveType"].rpartition("_")[0])
    products, others = (", ".join(sorted(kernels[of_layers])) for of_layers in (True, False))
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return f"{products}; elsewhere {others} in {precision}"


ONEDNN = "ONEDNN_MAX_CPU_ISA"
OPENVINO_LOWERING = (
    f"products of 8-bit weights: {ONEDNN}, dynamic quantisation and bfloat16 switched off; MLAS and norms: not lowered"
)
COMPILED = "compiled for one number of threads, and again for another, half a minute each time"
PEERS = {
    "eager": Peer(eager),
    "fp32 compiled": Peer(compiled_fp32, recompiled=COMPILED),
    "forwardpass int8": Peer(forwardpass_int8, lowering="FORWARDPASS_CPU"),
    "forwardpass int8 compiled": Peer(
        partial(forwardpass_int8, compiled=True), lowering="FORWARDPASS_CPU", recompiled=COMPILED
    ),
    "forwardpass w8a16": Peer(forwardpass_w8a16),
    "torch_dynamic_int8": Peer(torch_dynamic_int8, lowering="FBGEMM_ENABLE_INSTRUCTIONS"),
    "torchao": Peer(torchao, ("torchao",), f"ATEN_CPU_CAPABILITY, {ONEDNN}", COMPILED),
    "onnxruntime": Peer(onnxruntime, ("onnxruntime", "onnx"), "not lowered: MLAS asks the CPU, and has no setting"),
    "openvino": Peer(openvino, ("openvino", "nncf"), OPENVINO_LOWERING),
    "openvino f32": Peer(openvino_f32, ("openvino", "nncf"), OPENVINO_LOWERING),
    "openvino without int8": Peer(partial(openvino, int8=False), ("openvino",), OPENVINO_LOWERING),
}


@dataclass(frozen=True)
class Built:
    candidate: Candidate
    seconds: float


def build(names: Iterable[str], subject: Subject, track: Track = untracked) -> tuple[dict[str, Built], dict[str, str]]:
    """(peer -> what was built and ran the example, peer -> why there is none)."""
    built, missing = {}, {}
    for name in names:
        track(f"building {name}", None)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # nncf draws bars
                warnings.simplefilter("ignore")
                candidate = PEERS[name].build(subject)
                candidate.with_threads(torch.get_num_threads())(subject.example)
            built[name] = Built(candidate, time.perf_counter() - start)
        except Missing as e:
            missing[name] = str(e)
        except Exception as e:  # whatever a peer raises is its result; it is shown and the others go on
            missing[name] = f"failed: {type(e).__name__}: {' '.join(str(e).split())[:300]}"
    return built, missing
