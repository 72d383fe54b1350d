"""Every spelling of the asynchronous rows: taken here, and by ptxas; what they do is in the other test_rows files."""

import re
import shutil
import subprocess

import pytest
from rows import covered, spellings

import gpuless

pytestmark = pytest.mark.interpreted

DIMENSIONS = "1d|2d|3d|4d|5d"
BYTES = "mbarrier::complete_tx::bytes"
SCOPES = "cta|cluster|gpu|sys"
SHARED = "shared|shared::cta|shared::cluster?.b64"
OF_CTA = "shared|shared::cta?.b64"
RELEASE = "release|relaxed?.cta|cluster?"
ACQUIRE = "acquire|relaxed?.cta|cluster?"

# pattern -> operands. {a}: an address of shared memory, generic without a state space; {at}: as many coordinates as
# dimensions; {policy}: of .L2::cache_hint.
OPERANDS = {
    "cp.async.ca|cg.shared|shared::cta.global.L2::cache_hint?.L2::64B|L2::128B|L2::256B?": "[%r1], [%rd1], 16{policy}",
    "cp.async.commit_group": "",
    "cp.async.wait_group": "1",
    "cp.async.wait_all": "",
    f"cp.async.mbarrier.arrive.noinc.{OF_CTA}": "{a}",
    f"cp.async.mbarrier.arrive.{OF_CTA}": "{a}",
    f"cp.async.bulk.shared::cluster|shared::cta.global.{BYTES}.L2::cache_hint?": "[%r1], [%rd1], %r2, [%r3]{policy}",
    "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint?": "[%rd1], [%r1], %r2{policy}",
    "cp.async.bulk.prefetch.L2.global.L2::cache_hint?": "[%rd1], %r2{policy}",
    f"cp.async.bulk.tensor.{DIMENSIONS}.shared::cluster|shared::cta.global.tile?.{BYTES}.L2::cache_hint?":
        "[%r1], [%rd1, {at}], [%r3]{policy}",
    f"cp.async.bulk.tensor.{DIMENSIONS}.global.shared::cta.tile?.bulk_group.L2::cache_hint?": "[%rd1, {at}], [%r1]{policy}",
    f"cp.async.bulk.prefetch.tensor.{DIMENSIONS}.L2.global.tile?.L2::cache_hint?": "[%rd1, {at}]{policy}",
    "cp.async.bulk.commit_group": "",
    "cp.async.bulk.wait_group": "0",
    "cp.async.bulk.wait_group.read": "0",
    f"mbarrier.init.{OF_CTA}": "{a}, 1",
    f"mbarrier.inval.{OF_CTA}": "{a}",
    f"mbarrier.expect_tx.relaxed?.cta|cluster?.{SHARED}": "{a}, 16",
    f"mbarrier.complete_tx.relaxed?.cta|cluster?.{SHARED}": "{a}, 16",
    "mbarrier.complete_tx.shared::cta|shared::cluster.relaxed.cta|cluster.b64": "{a}, 16",
    f"mbarrier.arrive.expect_tx.{RELEASE}.{SHARED}": "{state}, {a}, 16",
    f"mbarrier.arrive.noComplete.release?.cta?.{OF_CTA}": "{state}, {a}, 1",
    f"mbarrier.arrive.{RELEASE}.{SHARED}": "{state}, {a}",
    f"mbarrier.arrive_drop.expect_tx.{RELEASE}.{SHARED}": "{state}, {a}, 16",
    f"mbarrier.arrive_drop.noComplete.release?.cta?.{OF_CTA}": "{state}, {a}, 1",
    f"mbarrier.arrive_drop.{RELEASE}.{SHARED}": "{state}, {a}",
    f"mbarrier.test_wait.parity?.{ACQUIRE}.{OF_CTA}": "%p1, {a}, {phase}",
    f"mbarrier.try_wait.parity?.{ACQUIRE}.{OF_CTA}": "%p1, {a}, {phase}",
    "mbarrier.pending_count.b64": "%r2, %rd2",
    f"fence.sc|acq_rel|acquire|release?.{SCOPES}": "",
    "membar.cta|gl|sys": "",
    "fence.acquire.sync_restrict::shared::cluster.cluster": "",
    "fence.release.sync_restrict::shared::cta.cluster": "",
    "fence.mbarrier_init.release.cluster": "",
    "fence.proxy.async": "",
    "fence.proxy.async.shared::cta|shared::cluster": "",
    "fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster": "",
    "fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster": "",
    "fence.proxy.async.global": "",
    "fence|membar.proxy.alias": "",
    f"fence.proxy.tensormap::generic.release.{SCOPES}": "",
    f"fence.proxy.tensormap::generic.acquire.{SCOPES}": "[%rd1], 128",
    "barrier.cluster.arrive.relaxed.aligned?": "",
    "barrier.cluster.arrive.release?.aligned?": "",
    "barrier.cluster.wait.acquire?.aligned?": "",
    "griddepcontrol.launch_dependents": "",
    "griddepcontrol.wait": "",
    "setmaxnreg.inc|dec.sync.aligned.u32": "64",
    "tensormap.replace.tile.global_address|rank|box_dim|global_dim|global_stride|element_stride|elemtype|interleave_layout|"
    "swizzle_mode|fill_mode.global|shared::cta?.b1024.b32|b64": "{field}",
    f"tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.{SCOPES}.sync.aligned": "[%rd1], [%r1], 128",
}  # fmt: skip

for pattern in OPERANDS:
    covered.setdefault(pattern, []).append("test_spellings")


def statement(op, operands):
    dimensions = re.search(r"\.([1-5])d\.", op)
    field = re.search(r"tile\.(\w+)", op)
    wide = bool(field) and field[1] in ("global_address", "global_stride")
    ordinal = "0, " * bool(field and field[1] in ("box_dim", "global_dim", "global_stride", "element_stride"))
    immediate = field and field[1] in ("elemtype", "interleave_layout", "swizzle_mode", "fill_mode")
    address = "[%r1]" if "shared" in op else "[%rd1]"
    value = "1" if immediate else "%rd2" if wide else "%r2"
    return f"{op} " + operands.format(
        a=address,
        at="{" + ", ".join(["%r2"] * int(dimensions[1] if dimensions else 0)) + "}",
        policy=", %rd9" if "cache_hint" in op else "",
        state="_" if "shared::cluster" in op else "%rd2",
        phase="%r2" if "parity" in op else "%rd2",
        field=f"{address}, {ordinal}{value}",
    ) + ";"  # fmt: skip


def is_wrong(op):
    """Semantics without a scope and the other way round, and a type that does not fit the field."""
    parts = op.split(".")
    if parts[0] == "mbarrier":
        return bool({"acquire", "release", "relaxed"} & set(parts)) != bool({"cta", "cluster"} & set(parts))
    if parts[:2] == ["tensormap", "replace"]:
        return (parts[3] in ("global_address", "global_stride")) != (parts[-1] == "b64")
    return False


def module(statements, runs=False):
    text = ".version 9.0\n.target sm_90a\n.address_size 64\n"
    for i, s in enumerate(statements):
        text += f".visible .entry k{i}() .reqntid 128 .maxnreg 64 {{\n"
        text += ".reg .b32 %r<10>; .reg .b64 %rd<10>; .reg .pred %p<4>;\n"
        text += f"{'' if runs else 'ret;'}\n{s}\nret;\n}}\n"
    return text


def take(statements, runs=False):
    """Decodes them; nothing is executed but the ret before each, unless it runs."""
    made = gpuless.Module(module(statements, runs), arch="sm_90a")
    for i in range(len(statements)):
        made[f"k{i}"].launch(1, 128, [])


def test_spellings(tmp_path):
    statements = [(op, statement(op, operands)) for pattern, operands in OPERANDS.items() for op in spellings(pattern)]
    right = [s for op, s in statements if not is_wrong(op)]
    take(right)
    for op, s in statements:
        if is_wrong(op):
            with pytest.raises(gpuless.Finding, match="unsupported"):
                take([s], runs=True)
    if not shutil.which("ptxas"):
        pytest.skip("taken here; there is no ptxas to ask")
    (tmp_path / "all.ptx").write_text(module(right))
    made = subprocess.run(
        ["ptxas", "-O0", "-arch=sm_90a", "-o", "/dev/null", tmp_path / "all.ptx"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-3000:]
