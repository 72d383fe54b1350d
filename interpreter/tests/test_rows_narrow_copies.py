"""TMA on elements of 4 and 6 bits: close together, or 16 of them in 16 bytes of shared memory; pairs of CTAs that share an
mbarrier."""

import numpy as np
import pytest
import torch
from ptx import MBARRIER, ONE, WAIT, copied, finding, run
from rows import row

import gpuless
from gpuless.memory.tensor_maps import encode

pytestmark = pytest.mark.interpreted

BYTES = "mbarrier::complete_tx::bytes"
DIMENSIONS = "1d|2d|3d|4d|5d"

#: CUtensorMapDataType -> bits of an element, bytes of 16 of them in shared memory
TYPES = {13: (4, 8), 14: (4, 16), 15: (6, 16)}


class NarrowMap(gpuless.TensorMap):
    """Rows of bytes, as so many elements of 4 or 6 bits."""

    def __init__(self, tensor, data_type, box, swizzle):
        self.data_type, self.box, self.swizzle = data_type, box, swizzle
        self.tensor = tensor

    def encode(self, tensor):
        rows, width = tensor.shape
        elements = width * 8 // TYPES[self.data_type][0]
        return encode(tensor.data_ptr(), self.data_type, (rows, elements), (width, 1), self.box, self.swizzle, 0)


def in_shared(rows, data_type, box, swizzle, y, x):
    """The box at row y and element x as shared memory has it."""
    bits, unit = TYPES[data_type]
    out = np.zeros((box[0], box[1] // 16, unit), np.uint8)
    for r in range(box[0]):
        for n in range(box[1] // 16):
            begin = (x // 16 + n) * bits * 2
            if 0 <= y + r < len(rows) and 0 <= begin < rows.shape[1]:
                out[r, n, : bits * 2] = rows[y + r, begin : begin + bits * 2]
    flat = out.reshape(-1)
    if swizzle:  # of 128 bytes
        offset = np.arange(len(flat))
        flat = flat[offset ^ ((offset >> 7 & 7) << 4)]
    return flat


@pytest.mark.parametrize(("data_type", "box", "swizzle", "y", "x"), [
    (13, (8, 64), 0, 2, 32), (13, (8, 256), 3, 0, 0), (13, (4, 32), 0, -2, 224), (14, (8, 128), 0, 1, 0), (14, (8, 128), 3, 3, 128),
    (14, (8, 128), 3, -1, -128), (15, (8, 128), 0, 0, 128), (15, (8, 128), 3, 5, 128),
])  # fmt: skip
def test_loads(data_type, box, swizzle, y, x):
    bits = TYPES[data_type][0]
    rows = np.random.default_rng(0).integers(0, 256, (9, 256 * bits // 8), dtype=np.uint8)
    expected = in_shared(rows, data_type, box, swizzle, y, x)
    sent = box[0] * box[1] * bits // 8  # the padding is not counted
    out = torch.zeros(len(expected), dtype=torch.uint8)
    run(f"""{MBARRIER}
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%s], {sent};
    @%p0 cp.async.bulk.tensor.2d.shared::cta.global.{BYTES} [%s+1024], [%a0, {{{x}, {y}}}], [%s];
    {WAIT.format(0)}
    {copied("%s+1024", "%a1", len(expected) // 4, "out")}""",
        NarrowMap(torch.from_numpy(rows).clone(), data_type, box, swizzle), out, shared=4096 + len(expected))  # fmt: skip
    assert np.array_equal(out.numpy(), expected)


def test_what_is_wrong():
    tensor = torch.zeros((8, 128), dtype=torch.uint8)
    load = MBARRIER + f"@%p0 cp.async.bulk.tensor.2d.shared::cta.global.{BYTES} [%s+1024], [%a0, {{8, 0}}], [%s];"
    assert "multiple of 16" in finding(load, NarrowMap(tensor, 13, (8, 64), 0)).message
    store = ONE + "@%p0 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%a0, {0, 0}], [%s];"
    assert "for loads alone" in finding(store, NarrowMap(tensor, 14, (8, 128), 0)).message


PAIR = """.version 8.7
.target sm_100a
.address_size 64
.shared .align 1024 .b8 memory[4096];
.visible .entry k(.param .align 64 .b8 map[128], .param .u64 out)
.reqntid 32
{{
.reg .b32 %r<16>; .reg .b64 %d<4>; .reg .pred %p0, %p1; .reg .b16 %h1;
mov.b64 %d0, map; cvta.param.u64 %d0, %d0; ld.param.u64 %d1, [out];
mov.u32 %r0, %tid.x; mov.u32 %r1, memory; mov.u32 %r2, %cluster_ctarank;
setp.eq.u32 %p0, %r0, 0; setp.eq.and.u32 %p1, %r2, 0, %p0;
@%p0 mbarrier.init.shared::cta.b64 [%r1], 1; fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 256;
mov.b16 %h1, {mask}; mapa.shared::cluster.u32 %r5, %r1, 0; and.b32 %r8, %r1, -16777217; shl.b32 %r6, %r2, 1; add.u32 %r3, %r1, 1024;
{load}
setp.ne.u32 %p1, %r2, 0; @%p1 bra DONE;
LOOP: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0; @!%p1 bra LOOP;
DONE: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
mad.lo.u32 %r4, %r0, 4, %r3; ld.shared.b32 %r7, [%r4];
mad.lo.u32 %r4, %r2, 32, %r0; mad.wide.u32 %d1, %r4, 4, %d1; st.global.b32 [%d1], %r7;
ret;
}}
"""
LOAD = "cp.async.bulk.tensor.2d.{first}shared::cluster.global." + BYTES + "{multicast}{last}"


@row(f"cp.async.bulk.tensor.{DIMENSIONS}.shared::cluster|shared::cta.global.tile?.{BYTES}.multicast::cluster?"
     ".cta_group::1|cta_group::2.L2::cache_hint?",
     f"cp.async.bulk.tensor.{DIMENSIONS}.cta_group::1|cta_group::2.shared::cluster.global.tile?.{BYTES}.multicast::cluster?"
     ".L2::cache_hint?")  # fmt: skip
@pytest.mark.parametrize("barrier", ["%r8", "%r5"], ids=["masked", "mapped"])
@pytest.mark.parametrize("multicast", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_pair_shares_the_even_one_s_mbarrier(barrier, multicast, first):

    x, out = torch.arange(128, dtype=torch.int32).view(4, 32), torch.zeros((2, 32), dtype=torch.int32)
    op = LOAD.format(first="cta_group::2." * first, last=".cta_group::2" * (not first),
                     multicast=".multicast::cluster" * multicast)  # fmt: skip
    if multicast:  # one thread for both
        load = f"setp.eq.and.u32 %p1, %r2, 0, %p0;\n@%p1 {op} [%r3], [%a, {{0, %r6}}], [{barrier}], %h1;"
    else:
        load = f"@%p0 {op} [%r3], [%a, {{0, %r6}}], [{barrier}];"
    text = PAIR.format(mask=3, load=load.replace("%a,", "%d0,"))
    for seed in range(5):
        with gpuless.gpu("sm_100a", seed=seed) as device:
            gpuless.Module(text)["k"].launch(2, 32, [gpuless.tensor_map(x, (1, 32)), out], cluster=2)
        assert device.findings == []
        assert torch.equal(out, x[[0, 0]] if multicast else x[[0, 2]])
