"""`python fuzz.py SEED COUNT FILE.ptx...`: damages PTX and gives it to the interpreter, in a process whose memory is limited.

Whatever is in the text, it is refused, or it runs to an end that is said. Prints how many ended how.
"""

import collections
import ctypes
import pathlib
import random
import re
import resource
import sys

from gpuless import core

MEMORY = 4 << 30  # bytes of address space
BLOCK = 128
#: what numbers become
NUMBERS = (
    "0",
    "1",
    "-1",
    "3",
    "15",
    "16",
    "31",
    "1024",
    "65536",
    "1048576",
    "2147483647",
    "4294967295",
    "9223372036854775807",
)
PIECE = re.compile(r"%?[\w$]+|\.[\w:]+|[^\w\s]")
MARKS = "{}[]()<>,;:|!+-@~ \n\"'"


def damaged(text, chance):
    lines = text.split("\n")
    for _ in range(chance.choice((1, 1, 2, 4))):
        i = chance.randrange(len(lines))
        pieces = list(PIECE.finditer(lines[i]))
        numbers = [p for p in pieces if p[0].isdecimal()]
        edit = chance.randrange(7)
        if edit == 0:
            del lines[i]
            lines = lines or [""]
        elif edit == 1:
            lines.insert(i, lines[chance.randrange(len(lines))])
        elif edit == 2 and numbers:
            p = chance.choice(numbers)
            lines[i] = lines[i][: p.start()] + chance.choice(NUMBERS) + lines[i][p.end() :]
        elif edit == 3 and pieces:  # a piece of another line
            p, other = chance.choice(pieces), PIECE.findall(lines[chance.randrange(len(lines))])
            lines[i] = lines[i][: p.start()] + (chance.choice(other) if other else "") + lines[i][p.end() :]
        elif edit == 4 and pieces:
            p = chance.choice(pieces)
            lines[i] = lines[i][: p.start()] + lines[i][p.end() :]
        elif edit == 5:
            at = chance.randrange(len(lines[i]) + 1)
            lines[i] = lines[i][:at] + chance.choice(MARKS) * chance.choice((1, 1, 2, 100_000)) + lines[i][at:]
        elif edit == 6 and pieces:
            p, q = chance.choice(pieces), chance.choice(pieces)
            if p.end() <= q.start():
                lines[i] = lines[i][: p.start()] + q[0] + lines[i][p.end() : q.start()] + p[0] + lines[i][q.end() :]
    return "\n".join(lines)


def run(api, text, memory):
    """How it ended: the kind of the finding, "ran", or the CUDA error."""
    api.gpuless_finding_clear()
    module = api.gpuless_module_load(text.encode(errors="replace"))
    if not module:
        return core.finding().kind + ", not loaded"
    try:
        address = ctypes.addressof(memory).to_bytes(8, "little")
        one = core.Dim3(1, 1, 1)
        arguments = address * 16  # pointers, and whatever their bits are as numbers
        error = api.gpuless_module_launch(
            module, None, one, core.Dim3(BLOCK, 1, 1), one, 16384, arguments, len(arguments), 0
        )
        finding = core.finding()
        behind = ", ".join(sorted({f.kind for f in core.findings()}))
        return finding.kind if finding else f"CUDA error {error}" if error else behind or "ran"
    finally:
        api.gpuless_module_unload(module)


def main(seed, count, *files):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    api, chance = core.load(), random.Random(int(seed))
    texts = [pathlib.Path(f).read_text() for f in files]
    api.gpuless_set_device(b"sm_90a")
    memory = (ctypes.c_uint8 * (1 << 16))()
    api.gpuless_storage_enter()
    api.gpuless_storage_add(ctypes.addressof(memory), len(memory), b"memory", 0)
    ends = collections.Counter()
    last = pathlib.Path(files[0]).with_name("last.ptx")
    for n in range(int(count)):
        text = damaged(texts[n % len(texts)], chance)
        last.write_text(text)
        options = core.Options(
            checks=1, approximate=1, threads=2, step_limit=20_000, findings=n % 2
        )  # raised, or gone on behind
        api.gpuless_set_options(ctypes.byref(options))
        ends[run(api, text, memory)] += 1
    print(dict(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
