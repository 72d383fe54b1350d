"""Mutants of PTX: each is one edit of one statement. Which statements, and which edits."""

import dataclasses
import hashlib
import pathlib
import re

REPOSITORY = pathlib.Path(__file__).parents[2]
STATEMENT = re.compile(r"^\s*(?P<guard>@!?%?\w+\s+)?(?P<opcode>[a-z][\w:.]*)(?P<operands>\s[^;]*)?;\s*(//.*)?$")
LOCATION = re.compile(r"^\s*\.loc\s+(\d+) (\d+) \d+(?:, function_name [^,]+, inlined_at (\d+) (\d+) \d+)?")
FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"(?:\s+"([^"]+)")?', re.M)
ADDRESS = re.compile(r"\[\s*(?P<base>[%\w$]+)\s*(?:\+\s*(?P<offset>-?\d+)\s*)?\]")


@dataclasses.dataclass(frozen=True)
class Mutant:
    kernel: str
    arch: str
    line: int  # of the PTX, from 1
    kind: str
    before: str  # the statement
    after: str  # what takes its place
    file: str  # of the repository
    source: int  # its line
    source_text: str
    arithmetic: bool

    @property
    def id(self):
        return f"{self.kernel}-{self.arch}-{self.line}-{self.kind}"

    @property
    def digest(self):
        return int(hashlib.sha256(f"{self.id} {self.before}".encode()).hexdigest()[:8], 16)

    @property
    def key(self):
        """By which its reason is found: no line number, so that it survives edits."""
        return f"{self.file}: {self.source_text}", self.kind


def split(operands):
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(operands):
        depth += (c in "[{(") - (c in "]})")
        if c == "," and not depth:
            parts.append(operands[start:i].strip())
            start = i + 1
    return [*parts, operands[start:].strip()]


def width(opcode):
    """Bytes that a lane's access moves, 16 where the opcode does not say."""
    found = re.findall(r"\.[bfus](8|16|32|64|128)\b", opcode)
    lanes = re.search(r"\.v(\d)\b", opcode)
    return int(found[-1]) // 8 * int(lanes[1] if lanes else 1) if found and "matrix" not in opcode else 16


# An edit takes (opcode, operands) and yields what takes the statement's place; nothing: it has no such mutant.


def removed(opcode, operands):
    yield ""


def weakened(opcode, operands):
    """One more group may be in flight."""
    yield f"{opcode} {int(operands[0]) + 1};"


def succeeded(opcode, operands):
    yield f"setp.eq.u32 {operands[0]}, 0, 0;"


def flipped(opcode, operands):
    """The other phase."""
    *rest, parity = operands
    if parity.isdecimal():
        yield f"{opcode} {', '.join([*rest, str(1 - int(parity))])};"
    else:
        yield f"{{ .reg .b32 flipped; xor.b32 flipped, {parity}, 1; {opcode} {', '.join([*rest, 'flipped'])}; }}"


def counted(opcode, operands):
    """Arrivals or bytes, by one of either and 16 of the others, more and fewer."""
    step = 1 if "init" in opcode else 16
    *rest, count = operands
    for change in (step, -step):
        if not count[0].isdigit():
            changed = f"{opcode} {', '.join([*rest, 'changed'])};"
            yield f"{{ .reg .b32 changed; add.s32 changed, {count}, {change}; {changed} }}"
        elif int(count, 0) + change > 0:
            yield f"{opcode} {', '.join([*rest, str(int(count, 0) + change)])};"


def displaced(opcode, operands):
    """The first address of the statement, by one access."""
    text = ", ".join(operands)
    if a := ADDRESS.search(text):
        offset = int(a["offset"] or 0) + width(opcode)
        yield f"{opcode} {text[: a.start()]}[{a['base']}+{offset}]{text[a.end() :]};"


def unfilled(opcode, operands):
    """cp.async without the operand that says how many bytes there are to copy."""
    if len(operands) == 4:
        yield f"{opcode} {', '.join(operands[:3])};"


def swapped(first, second):
    def edit(opcode, operands):
        made = list(operands)
        made[first], made[second] = made[second], made[first]
        if made != operands:
            yield f"{opcode} {', '.join(made)};"

    return edit


def shuffled(opcode, operands):
    """The first two registers of mma's A, the descriptors of wgmma's operands."""
    made = list(operands)
    a = split(made[1].strip("{} "))
    if len(a) > 1:
        made[1] = "{" + ", ".join([a[1], a[0], *a[2:]]) + "}"
    else:
        made[1], made[2] = made[2], made[1]
    yield f"{opcode} {', '.join(made)};"


#: opcode, kind, edit; those of `ARITHMETIC` only once of all the copies that unrolling made
SYNCHRONISATION = (
    (r"(bar|barrier)\.(cta\.|warp\.|cluster\.)?(sync|arrive|wait).*", "barrier removed", removed),
    (r"cp\.async\.wait_all|griddepcontrol\.wait", "wait removed", removed),
    (r"cp\.async(\.bulk)?\.wait_group.*|wgmma\.wait_group.*", "wait weakened", weakened),
    (r"mbarrier\.(try|test)_wait.*", "mbarrier wait removed", succeeded),
    (r"mbarrier\.(try|test)_wait\.parity.*", "phase flipped", flipped),
    (r"mbarrier\.arrive\.expect_tx.*|mbarrier\.expect_tx.*", "expect_tx changed", counted),
    (r"mbarrier\.arrive.*|cp\.async\.mbarrier\.arrive.*", "arrival dropped", removed),
    (r"mbarrier\.init.*", "arrivals changed", counted),
    (r"mbarrier\.init.*", "init dropped", removed),
    (r"fence\..*|membar\..*|wgmma\.fence.*", "fence dropped", removed),
    (r"cp\.async(\.bulk)?\.commit_group|wgmma\.commit_group.*", "commit dropped", removed),
)
ARITHMETIC = (
    (r"(ld|st|red|atom)\.(global|shared|const|local|[vbfus]\d).*|(ld|st)matrix.*|cp\.async\.c[ag].*",
     "offset changed", displaced),
    (r"cp\.async\.c[ag].*", "zero-fill dropped", unfilled),
    (r"sub\..*", "operands swapped", swapped(1, 2)),
    (r"setp\.(lt|le|gt|ge|ltu|leu|gtu|geu)\..*", "operands swapped", swapped(1, 2)),
    (r"selp\..*", "operands swapped", swapped(1, 2)),
    (r"(fma|mad\.lo|mad\.hi)\..*", "operands swapped", swapped(2, 3)),
    (r"(mma\.sync|wgmma\.mma_async).*", "operands swapped", shuffled),
)  # fmt: skip


def only(text, kernel):
    """The module with one kernel of those that it has: what is not parsed costs no time."""
    end = r"^\}\n(?=\s*(?:\.(?:visible|func|file|section)|//|\Z))"  # lines of inline assembly are braces too
    entries = list(re.finditer(rf"^\s*(?:// \.globl.*\n)?\.visible \.entry (\w+)\([\s\S]*?{end}", text, re.M))
    for entry in reversed(entries):
        if entry[1] != kernel:
            text = text[: entry.start()] + text[entry.end() :]
    return text


class Sources:
    """Which line of the repository each line of the PTX comes from."""

    def __init__(self, text):
        self.files = {}
        for number, first, second in FILE.findall(text):
            path = pathlib.Path(first, second) if second else pathlib.Path(first)
            parts = path.parts
            # the package's Triton kernels are those of a wheel, where one is installed
            for top, ours in (
                ("csrc", "csrc"),
                ("interpreter", "interpreter"),
                ("python", "python"),
                ("site-packages", "python"),
            ):
                if (
                    top in parts
                    and (REPOSITORY / (name := pathlib.Path(ours, *parts[parts.index(top) + 1 :]))).exists()
                ):
                    self.files[int(number)] = str(name)
        self.lines = {
            name: [" ".join(line.split()) for line in (REPOSITORY / name).read_text().splitlines()]
            for name in set(self.files.values())
        }
        self.outer = {}  # location -> where that was inlined
        self.at, self.directive = ("", 0), ""

    def read(self, location):
        """Of .loc: the innermost place that is a line of ours, as intrinsics and Triton's library are not."""
        file, line, outer_file, outer_line = (int(n) if n else 0 for n in location.groups())
        place, outer = (file, line), (outer_file, outer_line)
        if line == 0:
            return
        self.directive = location[0]  # apart for each call that was inlined
        if outer_file:
            self.outer[place] = outer
        seen = set()
        while place not in seen and place[0] not in self.files and place in self.outer:
            seen.add(place)
            place = self.outer[place]
        if place[0] in self.files:
            self.at = self.files[place[0]], place[1]

    def text(self):
        file, line = self.at
        return self.lines[file][line - 1] if file else ""


def statements(text):
    """(index of the line, match of STATEMENT, (file, line, text) of the source, .loc) of each statement of the kernel."""
    sources, depth, assembly = Sources(text), 0, False
    for i, line in enumerate(text.splitlines()):
        depth += line.count("{") - line.count("}")
        if line.strip() in ("// begin inline asm", "// end inline asm"):
            assembly = "begin" in line
        if not depth:
            continue
        if location := LOCATION.match(line):
            if not assembly:  # there Triton 3.9 counts the lines of the assembly
                sources.read(location)
        elif s := STATEMENT.match(line):
            yield i, s, (*sources.at, sources.text()), sources.directive


def edits(s):
    """(kind, what takes the statement's place) of each mutant, arithmetic or not."""
    guard, opcode = s["guard"] or "", s["opcode"]
    operands = split(s["operands"].strip()) if s["operands"] else []
    for rows, arithmetic in ((SYNCHRONISATION, False), (ARITHMETIC, True)):
        for pattern, kind, edit in rows:
            if re.fullmatch(pattern, opcode):
                for n, made in enumerate(edit(opcode, operands)):
                    yield kind + (" again" if n else ""), guard + made if made else "", arithmetic
    if guard:
        name = guard.strip().lstrip("@!")
        rest = f"{opcode} {', '.join(operands)};"
        yield "predicate dropped", rest, True
        yield "predicate negated", f"@{'' if '!' in guard else '!'}{name} {rest}", True


def mutants(text, kernel, arch):
    """Every one of the synchronisation's; of arithmetic that unrolling repeats, one that a hash chooses."""
    made, copies = [], {}
    for i, s, (file, source, source_text), directive in statements(text):
        for kind, after, arithmetic in edits(s):
            m = Mutant(kernel, arch, i + 1, kind, s[0].strip(), after, file, source, source_text, arithmetic)
            if arithmetic:
                copies.setdefault((directive, s["opcode"], kind), []).append(m)
            else:
                made.append(m)
    made += [min(group, key=lambda m: m.digest) for group in copies.values()]
    return sorted(made, key=lambda m: (m.line, m.kind))


def apply(text, mutant):
    lines = text.split("\n")
    lines[mutant.line - 1] = mutant.after
    return "\n".join(lines)
