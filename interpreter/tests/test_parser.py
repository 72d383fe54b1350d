"""PTX's syntax: what kernels compute from each form, and the line and text of what is refused."""

import ast
import pathlib
import resource
import subprocess
import sys

import pytest
import torch

import gpuless
from gpuless import core

pytestmark = pytest.mark.interpreted

HEAD = ".version 8.7\n.target sm_90a, debug // no texture mode\n.address_size 64\n"
KERNEL = """
.visible .entry k(.param .u64 .ptr .global .align 16 out)
{{
  .reg .pred %p<4>;
  .reg .b32 %r<40>;
  .reg .b64 %rd<20>;
  .reg .f32 f;
  .reg .b64 wide;
  ld.param.u64 %rd0, [out];
  mov.u32 %r20, %tid.x;
  mad.wide.u32 %rd0, %r20, 8, %rd0;
  mov.b64 wide, 0;
{body}
  st.global.u64 [%rd0], wide;
}}
"""


def run(body, head="", threads=1):
    """What `body` leaves in `wide`, of each thread."""
    out = torch.full((threads,), -1)
    with gpuless.gpu("sm_90a"):
        gpuless.Module(HEAD + head + KERNEL.format(body=body))["k"].launch(1, threads, [out])
    return out.tolist() if threads > 1 else out.item()


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("42", 42), ("-42", -42), ("42U", 42), ("0x2A", 42), ("0X2aU", 42), ("052", 42), ("0b101010", 42), ("-0x10", -16),
        ("0", 0), ("WARP_SZ", 32), ("WARP_SZ*2-1", 63), ("(4+4)*2", 16), ("2+3*4", 14), ("1<<4|2", 18), ("~0", -1),
        ("0xff&~0x0f", 0xF0), ("7/2", 3), ("7%4", 3), ("-(3-5)", 2), ("1 << 62 >> 60", 4), ("6^3", 5), ("10-4-3", 3),
        ("18446744073709551615", -1), ("9223372036854775808", -(2**63)),
    ],
)  # fmt: skip
def test_integers(literal, value):
    assert run(f"mov.b64 wide, {literal};") == value


@pytest.mark.parametrize(
    ("literal", "bits"),
    [
        ("0f3F800000", 0x3F800000), ("0F3f800000", 0x3F800000), ("-0f3F800000", 0xBF800000), ("1.5", 0x3FC00000),
        ("-1.5", 0xBFC00000), ("1e2", 0x42C80000), ("0d3FF8000000000000", 0x3FC00000), ("0.1", 0x3DCCCCCD),
    ],
)  # fmt: skip
def test_floats(literal, bits):
    assert run(f"mov.f32 f, {literal}; mov.b32 %r0, f; cvt.u64.u32 wide, %r0;") == bits


def test_scopes():
    """Registers and labels of inner blocks hide those outside, and two blocks may have the same."""
    body = """
      mov.b32 %r1, 1;
      {
        .reg .b32 %r<2>, t;
        mov.b32 %r1, 10;
        { .reg .b32 t; mov.b32 t, 5; bra L; mov.b32 t, 6; L: add.u32 %r1, %r1, t; }
        { .reg .b32 t; mov.b32 t, 7; bra L; mov.b32 t, 8; L: add.u32 %r1, %r1, t; }
        cvt.u64.u32 wide, %r1;   // 22
        bra OUT;
      }
      mov.b64 wide, 1000;
    OUT:
      cvt.u64.u32 %rd1, %r1;
      mad.lo.u64 wide, wide, 100, %rd1;
    """
    assert run(body) == 2201


def test_branches():
    """Forwards and backwards, guards of both signs, a table of labels."""
    body = """
      setp.lt.u32 %p1, %r20, 4;
      @!%p1 bra $done;
      targets: .branchtargets $a, $b, $c, $b;
      brx.idx %r20, targets;
      $a: mov.b64 wide, 1; bra.uni $done;
      $b: add.u64 wide, wide, 10;
      setp.lt.u64 %p2, wide, 30;
      @%p2 bra $b;
      bra $done;
      $c: mov.b64 wide, 3;
    $done:
    """
    assert run(body, threads=6) == [1, 30, 3, 30, 0, 0]


def test_addresses():
    head = """
      .global .align 8 .u64 x[4] = {1, 2, 3, 4};
    """
    body = """
      mov.u64 %rd1, x;
      mov.u64 %rd2, x+8;
      ld.global.u64 %rd3, [x];
      ld.global.u64 %rd4, [%rd1+8];
      ld.global.u64 %rd5, [ %rd2 + -8 ];
      ld.global.u64 %rd6, [x+8*3];
      ld.global.v2.u64 {%rd7, _}, [%rd2+8];
      mad.lo.u64 wide, %rd3, 10, %rd4;
      mad.lo.u64 wide, wide, 10, %rd5;
      mad.lo.u64 wide, wide, 10, %rd6;
      mad.lo.u64 wide, wide, 10, %rd7;
    """
    assert run(body, head) == 12143


@pytest.mark.parametrize(
    ("declaration", "size", "content"),
    [
        (".global .u32 v = 7;", 4, "07000000"),
        (".global .align 4 .b8 v[4] = {1, 2};", 4, "01020000"),
        (".global .u16 v[] = {1, 0x203};", 4, "01000302"),
        (".global .u8 v[2][3] = {{1}, {4, 5, 6}};", 6, "010000040506"),
        (".global .u8 v[2][3] = {1, 2, 3, 4};", 6, "010203040000"),
        (".global .f32 v[2] = {0f3F800000, 1.5};", 8, "0000803f0000c03f"),
        (".global .v4 .f32 v = {1.0, 2.0, 0f40400000, 0};", 16, "0000803f000000400000404000000000"),
        (".global .f64 v = 1.5;", 8, "000000000000f83f"),
        (".global .b32 v = 0f3F800000;", 4, "0000803f"),
        (".global .s16 v[2] = {-1, -2};", 4, "fffffeff"),
        (".global .attribute(.managed) .align 8 .b64 v = -2;", 8, "feffffffffffffff"),
        (".weak .const .u32 a = 1; .global .u32 u, v;", 4, "00000000"),
    ],
)
def test_initialisers(declaration, size, content):
    body = "".join(f"ld.global.u8 %r0, [v+{i}]; st.global.u8 [%rd0+{8 + i}], %r0;\n" for i in range(size))
    out = torch.full((3,), -1)
    with gpuless.gpu("sm_90a"):
        gpuless.Module(HEAD + declaration + KERNEL.format(body=body))["k"].launch(1, 1, [out])
    assert out.numpy().tobytes()[8 : 8 + size].hex() == content


def test_addresses_in_initialisers():
    head = """
      .global .u32 x[2] = {5, 6};
      .global .u64 pointers[3] = {generic(x), x+4, 0};
    """
    body = """
      ld.global.u64 %rd1, [pointers];
      ld.u32 %r1, [%rd1];
      ld.global.u64 %rd2, [pointers+8];
      ld.u32 %r2, [%rd2];
      mad.lo.u32 %r3, %r1, 10, %r2;
      cvt.u64.u32 wide, %r3;
    """
    assert run(body, head) == 56


def test_calls():
    """With and without results and arguments, through a pointer with its prototype; a name twice in call scopes."""
    head = """
      .func nothing() ;
      .func (.param .b32 result) twice(.param .b32 x)
      { .reg .b32 r; ld.param.b32 r, [x]; add.u32 r, r, r; st.param.b32 [result], r; ret; }
      .func nothing() .noinline { ret; }
    """
    body = """
      call nothing;
      call.uni nothing, ();
      mov.b32 %r1, 3;
      { .param .b32 a; .param .b32 b; st.param.b32 [a], %r1; call.uni (b), twice, (a); ld.param.b32 %r1, [b+0]; }
      mov.u64 %rd1, twice;
      {
        .param .b32 a; .param .b32 b;
        st.param.b32 [a+0], %r1;
        prototype: .callprototype (.param .b32 _) _ (.param .b32 _);
        call (b), %rd1, (a), prototype;
        ld.param.b32 %r1, [b];
      }
      cvt.u64.u32 wide, %r1;
    """
    assert run(body, head) == 12


def test_what_compilers_write_around_the_code():
    head = """
      .file 1 "folder" "source.cu", 1234, 5678 /* two
      lines */
      .pragma "nounroll";
      .extern .func (.param .b32 status) vprintf (.param .b64 f, .param .b64 a);
    """
    body = """
      .pragma "used_bytes_mask 4095", "nounroll";
      .loc 1 7 3 // source.cu:7:3
      // begin inline asm
      { mov.b64 wide, 5; }
      // end inline asm
      .loc 1 8 0, function_name $name+4, inlined_at 1 7 3
      ;
    """
    tail = "\n.section .debug_str { $name: .b8 95,90,0 // }\n }\n.section .debug_loc { }"
    out = torch.full((1,), -1)
    with gpuless.gpu("sm_90a"):
        gpuless.Module(HEAD + head + KERNEL.format(body=body) + tail + "\0\0")["k"].launch(1, 1, [out])
    assert out.item() == 5


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (".reg .v2 .b32 v; mov.b32 v.x, 7; mov.b32 v.y, v.x; mov.b64 wide, v;", 7 << 32 | 7),
        (".reg .v2 .b32 v; mov.b64 v, 0x500000003; mov.b64 wide, {v.g, v.r};", 3 << 32 | 5),
        (".reg .v4 .u16 v<3>; mov.b64 v2, 0x4000300020001; mov.b64 v1, 0; mov.b64 wide, {v2.w, v2.b, v2.y, v1.a};",
         2 << 32 | 3 << 16 | 4),
        (".reg .v2 .f32 v; { .reg .f32 v; mov.f32 v, 1.5; } mov.f32 v.x, 1.5; mov.f32 v.y, 0.0; mov.b64 wide, v;", 0x3FC00000),
        (".reg .v2 .b64 v; mov.b64 v.x, 5; mov.b64 v.y, 6; st.global.v2.b64 [%rd0], v; ld.global.v2.b64 v, [%rd0];"
         "mad.lo.u64 wide, v.y, 10, v.x;", 65),
    ],
)  # fmt: skip
def test_vector_registers(body, value):
    """A vector is the list of its elements in braces."""
    text = HEAD + KERNEL.format(body=body)
    out = torch.full((2,), -1)
    with gpuless.gpu("sm_90a"):
        gpuless.Module(text)["k"].launch(1, 1, [out])
    assert out[0].item() == value


def refusal(text):
    with pytest.raises(gpuless.Finding) as caught:
        gpuless.Module(text)
    assert caught.value.kind == "unsupported"
    return caught.value


BODY_LINE = (HEAD + KERNEL.split("{body}")[0]).count("\n") + 1


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("mov.b32 %r1, nowhere;", "nowhere"),
        ("bra NOWHERE;", "NOWHERE"),
        ("ld.global.b32 %r1, [nowhere+4];", "nowhere"),
        ("mov.b32 {%r1, nowhere}, %rd1;", "nowhere"),
        ("@%r99 mov.b32 %r1, 0;", "guard"),
        ("mov.b32 %r1, 0 # 1;", "expected ';'"),
        ("mov.b32 %r1, 0f3F8;", "8 hexadecimal digits"),
        ("mov.b32 %r1, 09;", "not a number"),
        ("mov.b64 %rd1, 18446744073709551616;", "64 bits"),
        ("mov.b32 %r1, 1/0;", "constant expression"),
        ("mov.b32 %r1, 1 << 64;", "shifted"),
        (".frobnicate 3;", "unknown directive"),
        (".reg .b33 x;", "type of a register"),
        (".reg .b32 x; .reg .b32 x;", "declared twice"),
        (".shared .b32 x; .shared .b32 x;", "declared twice"),
        (".local .pred x;", ".pred"),
        (".local .align 3 .b8 x[4];", "power of two"),
        (".local .b8 x[4][];", "first dimension"),
        (".local .b32 x[2] = {1, 2, 3};", "more initialisers"),
        (".reg .v4 .b64 x;", "up to 128 bits"),
        (".reg .v2 .pred x;", "no predicates"),
        (".reg .v2 .b32 x; mov.b32 x.z, 0;", "vector of 2 has no element .z"),
        (".reg .v4 .b32 x; mov.b32 x.q, 0;", "vector of 4 has no element .q"),
        ("mov.b32 %r1.x, 0;", "no vector"),
        ("L: L: ret;", "label twice"),
        ("@%p1 L: ret;", "label with a guard"),
        ("@%r1 mov.b32 %r1, 0;", "no predicate"),
        ("mov.b32 %r1, !%r2 /* ;", "comment without end"),
        (".reg .b32 %big<2147483647>;", "may have 262144 registers"),
        (".reg .b128 %big<200000>, %more<62100>;", "may have 262144 registers"),
        (".shared .b8 x[16777217];", "shared memory: there may be"),
        (".shared .b8 x[16777216]; .shared .b8 y;", "shared memory: there may be"),
        (".local .b8 x[524289];", "local memory: there may be 524288 bytes"),
        ("{ .param .b8 x[1048000]; } { .param .b8 x[1000]; }", "parameters of a function and of its calls"),
        (".local .align 131072 .b8 x[4];", "an alignment of more than 65536"),
        (".local .b8 x[65536][65536];", "more than 1073741824 bytes"),
        ("{" * 300, "nested more than 256"),
        ("mov.b32 %r1, " + "(" * 300, "nested more than 256"),
        ("mov.b32 %r1, " + "-" * 1_000_000, "nested more than 256"),
        ("mov.b32 " + "{" * 300, "nested more than 256"),
        ("ld.b32 %r1, " + "[" * 300, "nested more than 256"),
        (".loc 7 1 1", "no .file has the number 7"),
    ],
)  # fmt: skip
def test_refusals(line, why):
    f = refusal(HEAD + KERNEL.format(body=line))
    assert why in f.message, f
    if "without end" not in why:
        assert f.ptx_line == BODY_LINE, f


@pytest.mark.parametrize(
    ("declaration", "why"),
    [
        (".global .texref t;", ".texref"),
        (".global .f32 v = 1;", "float variable"),
        (".global .b16 v = 1.5;", "another size"),
        (".global .u64 v = later; .global .u32 later;", "later"),
        (".global .b64 v = 0xFF(x);", "mask()"),
        (".global .b8 v[];", "without a size"),
        (".func f() { ret; } .func f() { ret; }", "defined twice"),
        (".func (.reg .b32 r) f () { ret; }", ""),
        (".address_size 32", "64-bit"),
        (".alias a, b;", "unknown directive"),
        (".func f() .frobnicate { ret; }", "unknown directive"),
        (".global .b8 v[1073741824]; .const .b8 w;", "a module's variables: there may be"),
        (".global .b8 v[][1073741824] = {{1}, {2}};", "more than 1073741824 bytes"),
        (".global .b8 v" + "[1]" * 300 + " = " + "{" * 300, "nested more than 256"),
        (".entry e(.param .b8 x[32765]) { ret; }", "parameters of 32764 bytes"),
        (".entry e() .maxntid 65536, 65536 { ret; }", "dimensions whose product is not 1 to 1024"),
        (".entry e() .reqntid 0 { ret; }", "dimensions whose product is not 1 to 1024"),
        (".entry e() .reqnctapercluster 2147483647, 2 { ret; }", "dimensions whose product is not 1 to 16"),
    ],
)
def test_refused_declarations(declaration, why):
    f = refusal(HEAD + declaration + KERNEL.format(body=""))
    assert why in f.message and f.ptx_line == HEAD.count("\n") + 1, f


def test_lines_of_inline_assembly():
    """Triton 3.9 says the source line plus one for each line of the assembly; what stands before it is right."""
    body = """
      .loc 1 10 3
      // begin inline asm
      .loc 1 10 3
      mov.u32 %r1, 0x0;
      .loc 1 11 3
      ld.shared.b32 { %r1 }, [ %r1 + 0 ];
      // end inline asm
    """
    for more, line in (("", 10), (".loc 1 20 3\n ld.shared.b32 %r1, [0];", 20)):
        ptx = HEAD + '.file 1 "a.py"' + KERNEL.format(body=(body.replace("ld.s", "//") if more else body) + more)
        with gpuless.gpu("sm_90a"), pytest.raises(gpuless.Finding) as caught:
            gpuless.Module(ptx)["k"].launch(1, 1, [torch.zeros(1)])
        assert (caught.value.file, caught.value.line) == ("a.py", line)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("mov.b32 %r1;", "it takes 2 operands"),
        ("bra;", "it takes more operands than 0"),
        ("st.global.b128 [%rd0], 5;", "a 128-bit operand must be a register"),
        ("call k, (x);", "a kernel cannot be called"),
        ("call (x), malloc, (x, x, x, x, x, x, x, x, x);", "called with other parameters than it has"),
        ("call (big), malloc, (x);", "called with other parameters than it has"),
    ],
)
def test_refused_when_decoded(line, why):
    head = ".extern .func (.param .b64 r) malloc(.param .b64 n);"
    with pytest.raises(gpuless.Finding) as caught:
        run(".param .b64 x; .param .b8 big[4096];\n" + line, head)
    assert why in caught.value.message and caught.value.ptx_line == BODY_LINE + 1, caught.value


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("{ .param .b64 x; st.param.b64 [x], 64; call free, (x); }", "free of what malloc has not returned"),
        ("{ .param .b64 x; st.param.b64 [x], 64; call (x), vprintf, (x, x); }", "read of 1 bytes at 0x40"),
        ("call deep;", "local memory exceeds 524288 bytes a thread"),
        ("call broad;", "registers and parameters exceed 67108864 bytes"),
    ],
)
def test_calls_that_go_too_far(body, why):
    head = """
      .extern .func free(.param .b64 p);
      .extern .func (.param .b32 r) vprintf(.param .b64 format, .param .b64 arguments);
      .func deep() { .local .b8 x[100000]; call deep; ret; }
      .func broad() { { .param .b8 x[500000]; } call broad; ret; }
    """
    with pytest.raises(gpuless.Finding) as caught:
        run(body, head)
    assert why in caught.value.message and caught.value.ptx_line, caught.value


def test_what_nobody_touches_costs_nothing():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run("mov.b64 wide, 7;", ".global .b8 v[1000000000]; .global .b8 w[10000000] = {1};") == 7
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


def test_no_exception_leaves_the_library():
    """Memory that runs out is an error with a text: bytes of parameters that no vector can have."""
    api = core.load()
    module = gpuless.Module(HEAD + KERNEL.format(body=""))
    one = core.Dim3(1, 1, 1)
    with gpuless.gpu("sm_90a") as device, device.running():
        api.gpuless_finding_clear()
        assert api.gpuless_module_launch(module.handle, None, one, one, one, 0, b"", -1, 0) != 0
    assert core.finding().kind == "unsupported"


def test_damaged_text_is_refused_or_runs(tmp_path):
    """In a process of its own, with 4 GB: nothing aborts, hangs or takes all memory."""
    pytest.importorskip("triton")
    import witness_kernels

    ints = [100, 80, 208, 208, 80, 1, 80]
    a, c = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    with gpuless.gpu("sm_90a"):
        compiled = witness_kernels.matmul.warmup(
            a, a, c, *ints, witness_kernels.tl.float32, BM=64, BN=64, BK=32, grid=(1,)
        )
    (tmp_path / "matmul.ptx").write_text(compiled.asm["ptx"])
    (tmp_path / "small.ptx").write_text(
        HEAD + KERNEL.format(body="mov.b32 %r1, 0; t: .branchtargets A; brx.idx %r1, t; A:")
    )
    command = [
        sys.executable,
        pathlib.Path(__file__).with_name("fuzz.py"),
        "0",
        "1000",
        *sorted(tmp_path.glob("*.ptx")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.stderr, (tmp_path / "last.ptx").read_text())
    ends = ast.literal_eval(done.stdout)
    assert ends["ran"] > 50 and ends["unsupported, not loaded"] > 200, ends


def test_speed():
    """Parsing is linear and does not show beside a compiler: 100,000 statements in far less than a second."""
    import time

    text = HEAD + KERNEL.format(body="\n".join(f"add.u32 %r{i % 20}, %r{i % 7}, {i};" for i in range(100_000)))
    start = time.process_time()
    gpuless.Module(text)
    assert time.process_time() - start < 2
