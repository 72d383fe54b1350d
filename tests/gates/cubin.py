"""What a compiled library says of its kernels: resources, launch bounds, machine code. The tools are those of Triton's wheel.

Registers and memory are what the assembler reports (`cuobjdump --dump-resource-usage`). The rest is read from the cubin
itself: the launch bounds are attributes in .nv.info. The PTX beside it names the dynamic shared memory.
"""

import dataclasses
import functools
import pathlib
import re
import struct
import subprocess
import tempfile

import sass
import triton
from kernel_names import demangle

TOOLS = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclasses.dataclass
class Limits:
    """CUDA programming guide, "Compute capabilities": technical specifications per compute capability."""

    block_shared: int  # bytes a block may have, static and dynamic
    sm_shared: int
    threads: int
    blocks: int
    reserved_is_counted: bool  # the assembler's figure includes RESERVED

    RESERVED = 1024  # the system's, in every block, from 8.0 on
    REGISTERS = 65536  # of an SM, in four partitions, given out in units of 256 a warp
    PARTITIONS = 4

    def blocks_per_sm(self, threads: int, registers: int, shared: int) -> int:
        warps = -(-threads // 32)
        a_warp = -(-registers * 32 // 256) * 256
        warps_by_registers = self.REGISTERS // self.PARTITIONS // a_warp * self.PARTITIONS
        block_shared = -(-(shared + self.RESERVED) // 128) * 128
        return min(
            self.blocks, self.threads // 32 // warps, warps_by_registers // warps, self.sm_shared // block_shared
        )


LIMITS = {
    80: Limits(163 * 1024, 164 * 1024, 2048, 32, False),
    89: Limits(99 * 1024, 100 * 1024, 1536, 24, False),
    90: Limits(227 * 1024, 228 * 1024, 2048, 32, True),
    120: Limits(99 * 1024, 100 * 1024, 1536, 24, True),
}


def limits(arch: str) -> Limits:
    number = int(re.sub(r"\D", "", arch))
    if number not in LIMITS:
        raise ValueError(
            f"{arch}: the limits are known of sm_{', sm_'.join(map(str, LIMITS))}; add its own to cubin.py"
        )
    return LIMITS[number]


@dataclasses.dataclass(frozen=True)
class Disassembly:
    """Of a cubin, made when it is first asked for: of all cubins it takes nearly a minute."""

    image: bytes = dataclasses.field(repr=False)

    @functools.cached_property
    def functions(self) -> dict[str, sass.Function]:
        """By mangled name."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.image)
            file.flush()
            return sass.functions(tool("nvdisasm", "-c", file.name))


@dataclasses.dataclass
class Kernel:
    name: str  # readable: kernel_names.py
    source: str
    arch: str
    registers: int
    local: int  # bytes a thread
    static_shared: int  # bytes, without the system's
    dynamic_shared: int | None  # bytes: what the kernel's SharedBytes says; None where it has none
    uses_dynamic_shared: bool
    threads: int | None  # of its launch bounds
    mangled: str
    disassembly: Disassembly

    @property
    def code(self) -> sass.Function:
        return self.disassembly.functions[self.mangled]

    @property
    def limits(self) -> Limits:
        return limits(self.arch)

    @property
    def shared(self) -> int:
        return self.static_shared + (self.dynamic_shared or 0)

    @property
    def blocks_per_sm(self) -> int | None:
        return None if self.threads is None else self.limits.blocks_per_sm(self.threads, self.registers, self.shared)


def tool(name: str, *args, **how) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True, **how).stdout


def sections(image: bytes) -> dict[str, bytes]:
    """The contents of an ELF file's sections (64-bit, little-endian, as every cubin is)."""
    table, entry_size, count, names = struct.unpack_from("<40xQ10xHHH", image)
    headers = [struct.unpack_from("<IIQQQQ", image, table + i * entry_size) for i in range(count)]
    name_table = headers[names][4]
    contents = {}
    for name, kind, _, _, offset, size in headers:
        name = image[name_table + name : image.index(b"\0", name_table + name)].decode()
        contents[name] = b"" if kind == 8 else image[offset : offset + size]  # 8: NOBITS, nothing in the file
    return contents


MAX_THREADS, REQUIRED_THREADS = 0x05, 0x10  # EIATTR_MAX_THREADS, EIATTR_REQNTID: three 32-bit numbers


def launch_threads(attributes: bytes) -> int | None:
    """From a kernel's .nv.info: entries of a format, an attribute, and 16 bits that are the value or, in format 4, its size."""
    offset = 0
    while offset < len(attributes):
        kind, attribute, value = struct.unpack_from("<BBH", attributes, offset)
        if kind == 4 and attribute in (MAX_THREADS, REQUIRED_THREADS):
            x, y, z = struct.unpack_from("<III", attributes, offset + 4)
            return x * y * z
        offset += 4 + (value if kind == 4 else 0)
    return None


def entries(ptx: str) -> set[str]:
    """Mangled names of the kernels that a module has."""
    return set(re.findall(r"^(?:\.visible |\.weak )?\.entry ([\w$]+)", ptx, re.M))


def users_of_dynamic_shared(text: str) -> set[str]:
    """Those of a module's kernels whose PTX names an `extern __shared__` array; functions beside them count for all."""
    declaration = r"\.extern \.shared [^;]*?([\w$]+)(?:\[\d*\])?;"
    names = "|".join(map(re.escape, re.findall(declaration, text)))
    if not names:
        return set()
    pieces = re.split(r"\n(?=(?:\.visible |\.weak )?\.(?:entry|func)\b)", re.sub(declaration, "", text))
    mentions = [bool(re.search(rf"(?<![\w$])(?:{names})(?![\w$])", piece)) for piece in pieces]
    entries = [re.match(r"(?:\.visible |\.weak )?\.entry ([\w$]+)", piece) for piece in pieces]
    everyone = any(mention for mention, entry in zip(mentions, entries) if not entry)
    return {entry[1] for mention, entry in zip(mentions, entries) if entry and (mention or everyone)}


def kernels(library: pathlib.Path) -> list[Kernel]:
    """Every kernel in a shared library or object that nvcc made, once for each architecture."""
    with tempfile.TemporaryDirectory() as folder:
        tool("cuobjdump", "-xptx", "all", library.resolve(), cwd=folder)
        modules = [path.read_text() for path in pathlib.Path(folder).glob("*.ptx")]
        known = set().union(*map(entries, modules))
        dynamic = set().union(*map(users_of_dynamic_shared, modules))
        listed = tool("cuobjdump", "-xelf", "all", library.resolve(), cwd=folder)
        cubins = [pathlib.Path(folder, name) for name in re.findall(r"^Extracting ELF file +\d+: (.*)$", listed, re.M)]
        # in the order of the listing; only here is the "a" of sm_90a, which a cubin's header lacks
        usages = re.split(r"^Fatbin elf code:$", tool("cuobjdump", "--dump-resource-usage", library), flags=re.M)[1:]
        if len(cubins) != len(usages):
            raise ValueError(f"{library}: cuobjdump lists {len(usages)} cubins and extracts {len(cubins)}")
        found = [kernel for cubin, usage in zip(cubins, usages) for kernel in kernels_of_cubin(cubin, usage, dynamic)]
    if unknown := {k.mangled for k in found} - known:
        raise ValueError(
            f"{library}: dynamic shared memory is looked for in PTX, and it has none of {sorted(unknown)[0]}"
        )
    return found


def kernels_of_cubin(cubin: pathlib.Path, usage: str, dynamic: set[str]) -> list[Kernel]:
    """dynamic: mangled names of the kernels that use dynamic shared memory."""
    head, _, body = usage.partition("Resource usage:")
    fields = dict(re.findall(r"^(\w+) = (.*)$", head, re.M))
    resources = {
        name: {resource: int(n) for resource, n in re.findall(r"(\w+):(\d+)", numbers)}
        for name, numbers in re.findall(r"^ Function (\S+):\n(.*)$", body, re.M)
    }
    if not resources:
        return []
    image = cubin.read_bytes()
    elf, disassembly = sections(image), Disassembly(image)
    kernels = []
    for mangled, name in zip(resources, demangle(list(resources))):
        use = resources[mangled]
        declared = re.search(r"\bSharedBytes<(\d+)", name)
        reserved = Limits.RESERVED if limits(fields["arch"]).reserved_is_counted and use["SHARED"] else 0
        kernels.append(
            Kernel(
                name=name,
                source=fields.get("identifier", ""),
                arch=fields["arch"],
                registers=use["REG"],
                local=use["STACK"] + use["LOCAL"],
                static_shared=use["SHARED"] - reserved,
                dynamic_shared=int(declared[1]) if declared else None,
                uses_dynamic_shared=mangled in dynamic,
                threads=launch_threads(elf[f".nv.info.{mangled}"]),
                mangled=mangled,
                disassembly=disassembly,
            )
        )
    return kernels
