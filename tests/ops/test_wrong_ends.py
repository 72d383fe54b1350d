"""Ends and counts of the grouped GEMMs that are no rows': on every backend the rows that they concern are NaN, of int8 -127, and
all others are right. Nobody waits for the device to see that; FORWARDPASS_DEBUG=1 does, and refuses the call."""

import pytest
import torch
from every_backend import EVERY_BACKEND, in_turn_of_triton, interpreted
from processes import fork, two_threads

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.fp8_grouped_gemm import cases as fp8
from forwardpass.ops.int8_grouped_gemm import cases as int8
from forwardpass.ops.w8a16_grouped_gemm import cases as w8a16
from forwardpass.testing import assert_equal, poisoned_outputs

pytestmark = pytest.mark.usefixtures("poisoned")

S, ROOM, MOST, LEAST = 40, 10, 2**31 - 1, -(2**31)
#: (room, what is given, ends or counts of which the product of the other rows is, rows that are unknown)
WRONG = [
    (None, (5, 3, 9, 40), (3, 3, 3, 3), range(3, S)),
    (None, (5, 9, 8, 40), (5, 8, 8, 8), range(8, S)),
    (None, (5, 9, 41, 40), (5, 9, 9, 9), range(9, S)),
    (None, (5, 9, 20, MOST), (5, 9, 20, 20), range(20, S)),
    (None, (5, 9, 20, LEAST), (0, 0, 0, 0), range(S)),
    (None, (-1, 7, 8, 9), (0, 0, 0, 0), range(S)),
    (None, (MOST, 0, LEAST, 3), (0, 0, 0, 0), range(S)),
    (None, (5, 6, 7, 6), (5, 6, 6, 6), range(6, S)),
    (None, (40, 40, 40, 39), (39, 39, 39, 39), range(39, S)),
    (None, (5, 9, 9, 30), (5, 9, 9, 30), range(0)),
    (ROOM, (11, 3, 10, 0), (0, 3, 10, 0), range(ROOM)),
    (ROOM, (4, 3, -1, 10), (4, 3, 0, 10), range(20, 30)),
    (ROOM, (4, MOST, 0, LEAST), (4, 0, 0, 0), (*range(10, 20), *range(30, 40))),
    (ROOM, (0, 3, 10, 7), (0, 3, 10, 7), range(0)),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
BACKENDS = (*EVERY_BACKEND, ("cuda", "sm_89"))  # the first with e4m3


def product(op, args, backend, arch, seed):
    operation = dispatch.operations[op]
    if arch is not None:
        return interpreted(operation, args, backend, arch, seed)
    with fp.use_backend(backend), poisoned_outputs():
        return operation(*args)


def with_ends(args, ends, at):
    return (*args[:at], torch.tensor(ends, dtype=torch.int32), *args[at + 1 :])


@pytest.mark.every(2)
@pytest.mark.parametrize("op", ["int8_grouped_gemm", "fp8_grouped_gemm", "w8a16_grouped_gemm"])
@pytest.mark.parametrize(("backend", "arch"), in_turn_of_triton(BACKENDS))
def test_rows_that_they_concern_are_nan(op, backend, arch, seed):
    if op == "fp8_grouped_gemm" and (backend == "cpu" or arch == "sm_80"):
        pytest.skip("it has no e4m3")
    at = 3 if op == "w8a16_grouped_gemm" else 4
    for i, (room, given, meant, unknown) in enumerate(WRONG):
        beyond, counts, n = (S - 36 if room is None else 0), (9,) * 4, (33, 48)[i % 2]
        if op == "w8a16_grouped_gemm":
            case = w8a16.Case(counts, n, 70, DTYPES[1 + i % 2], room=room, beyond=beyond)
        else:
            case_type = int8.Case if op == "int8_grouped_gemm" else fp8.Case
            activation = "silu_mul" if n % 16 == 0 and backend != "reference" else None
            case = case_type(
                counts, n, 70, EpilogueCase(activation=activation, out_dtype=DTYPES[i % 5]), room=room, beyond=beyond
            )
        args = case.arguments(seed=seed)
        got, expected = (product(op, with_ends(args, ends, at), backend, arch, seed) for ends in (given, meant))
        rows, others = got.flatten(0, -2), torch.ones(S, dtype=torch.bool)
        others[list(unknown)] = False
        assert_equal(rows[others], expected.flatten(0, -2)[others], f"{given} of {room}")
        values = rows[~others].float()
        assert (values == -127 if got.dtype == torch.int8 else values.isnan()).all(), f"{given} of {room}"


@pytest.mark.every(2)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("experts", [31, 33, 300, 512])
def test_of_many_experts(experts, arch):
    """The first wrong end is any lane's, its experts' first, last or another one; a lane has up to sixteen."""
    rows = 2 * experts
    case = int8.Case((2,) * experts, 16, 16, EpilogueCase(out_dtype=torch.bfloat16), beyond=0)
    args = case.arguments()
    for wrong in sorted({0, 1, 15, 16, 17, experts // 2, experts - 1}):
        if wrong >= experts:
            continue
        ends = args[4].clone()
        ends[wrong], ends[-1] = -5 if wrong % 2 else rows + 1, rows + 7 if wrong == experts - 1 else ends[-1]
        known = 0 if ends[wrong] < 0 else 2 * wrong
        bad = (*args[:4], ends, *args[5:])
        got = interpreted(dispatch.operations["int8_grouped_gemm"], bad, "cuda", arch, 0)
        assert got[known:].isnan().all() and not got[:known].isnan().any()
        int8.assert_matches(got, bad)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_large_tiles(arch):
    """Rows before a wrong end in several tiles, the last of which ends there; and of experts with room."""
    for room, ends in ((None, (300, 700, 650, 900)), (None, (300, 700, 1100, 1000)), (300, (300, 301, 129, -1))):
        case = int8.Case((250,) * 4, 130, 64, EpilogueCase(out_dtype=torch.bfloat16), room=room, beyond=0)
        args = with_ends(case.arguments(), ends, 4)
        got = interpreted(dispatch.operations["int8_grouped_gemm"], args, "cuda", arch, 0)
        int8.assert_matches(got, args)


_DEBUG = """
import pytest, torch
import forwardpass as fp

def ints(*values):
    return torch.tensor(values, dtype=torch.int32)

A, B, SCALE = torch.ones(4, 32, dtype=torch.int8), torch.ones(3, 16, 32, dtype=torch.int8), torch.ones(3, 16)
ROOM = torch.ones(3, 2, 32, dtype=torch.int8)
for a, offs, words in (
    (A, ints(1, 0, 4), "ends that never fall, from 0 to 4, the rows of a, and of expert 1 is 0"),
    (A, ints(-1, 1, 4), "of expert 0 is -1"),
    (A, ints(1, 2, 5), "of expert 2 is 5"),
    (ROOM, ints(0, 3, 1), "from 0 to 2, the rows that a has for each, and of expert 1 is 3"),
    (ROOM, ints(0, 2, -1), "of expert 2 is -1"),
):
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            fp.ops.int8_grouped_gemm(a, B, torch.ones(1), SCALE, offs, out_dtype=torch.float32)
        with pytest.raises(ValueError, match=words.replace("rows of a", "rows of x").replace("that a has", "that x has")):
            fp.ops.w8a16_grouped_gemm(a.float(), B, SCALE, offs)
"""


def test_debug_refuses_them():
    done = fork.run(_DEBUG, env=two_threads({"FORWARDPASS_DEBUG": "1"}))
    assert done.returncode == 0, done.stderr
