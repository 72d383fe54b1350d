"""A wgmma that is under way, as text, and what a launch of it reports."""

import numpy as np
import pytest
import tensor_cores as tc
from wgmma_kernels import Operand, a_to_registers, d_from_registers, d_to_registers, instruction, launch
from wgmma_rows import HEAD

import gpuless

OP = f"{HEAD}m64n8k16.f32.f16.f16"


RNG = np.random.default_rng(0)


A, B, C = (
    tc.encode(tc.random_matrix(RNG, s, t, True), t) for s, t in (((64, 16), "f16"), ((16, 8), "f16"), ((64, 8), "f32"))
)


LEFT, RIGHT = Operand(A, 32), Operand(np.ascontiguousarray(B.T), 32, pattern=4096)


IMAGE = np.zeros(8192, np.uint8)


def run(body, seed=0, **how):
    how = {"a_desc": LEFT.descriptor(), "b_desc": RIGHT.descriptor(), **how}
    got = launch(
        OP, body, IMAGE, d_registers=d_to_registers(C, "f32"), a_registers=a_to_registers(A, "f16"), seed=seed, **how
    )
    return tc.decode(d_from_registers(got, 8, "f32"), "f32")


def finding(body, seed=0, **how):
    with pytest.raises(gpuless.Finding) as found:
        run(body, seed, **how)
    return found.value


ONE = instruction(OP)


ONE_REGISTERS = instruction(OP, register_a=True)
