"""What the PTX cannot show, read from machine code as nvdisasm prints it: registers that a wgmma still reads while something
else is written there, and local memory.

wgmma takes A from registers, and reads them until a wait covers it. In PTX each value has a register of its own; ptxas gives
several values one, and it does not hold a register back for a wgmma that is under way when the value comes from another
iteration of the loop.
"""

from __future__ import annotations

import dataclasses
import re

_LINE = re.compile(r'\s*//## File "([^"]*)", line (\d+)')
_LABEL = re.compile(r"^(\.L\w+):")
_FUNCTION = re.compile(r"^\.text\.(\S+):")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_REGISTER = re.compile(r"R(\d+)(?:\.\w+)*$")
_PREDICATE = re.compile(r"!?U?P(?:\d|T)$")
#: whose first registers are sources: stores, reductions, what sets predicates alone, control
_NO_RESULT = re.compile(
    r"(?:ST|STG|STS|STL|STSM|STAS|RED|REDG|REDAS|REDUX|UBLKCP|UTMA\w+|BAR|BRA|BRX|JMP|JMX|CALL|RET|EXIT|WARPSYNC|NANOSLEEP|"
    r"[A-Z]+SETP\d?|FCHK|R2P|SYNCS|CCTL\w*|ERRBAR|MEMBAR|DEPBAR|WARPGROUP|YIELD|BSYNC|BREAK|BPT|KILL|VOTEU|R2UR|PLOP3)(?=\.|$)"
)
#: which write a predicate before their register
_PREDICATE_FIRST = re.compile(r"(?:LOP3|SHFL|ATOM\w*|MATCH|LDG|LD|LDS)(?=\.|$)")
_WGMMA = re.compile(r"[A-Z]GMMA(?=\.|$)")
#: registers of a thread: 64 rows of 32 bytes of K over 128 threads
_A_REGISTERS = 4
_MOST_GROUPS = 16


@dataclasses.dataclass(frozen=True)
class Place:
    function: str
    file: str
    line: int
    text: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else "no line information (-lineinfo)"
        return f"{where}: {self.text}"


@dataclasses.dataclass
class Instruction:
    place: Place
    guard: str | None
    opcode: str
    operands: list[str]

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def results(self) -> range:
        """The registers that it writes."""
        if _NO_RESULT.match(self.opcode):
            return range(0)
        operands = list(self.operands)
        while operands and _PREDICATE.match(operands[0]):
            if not _PREDICATE_FIRST.match(self.opcode):
                return range(0)
            operands.pop(0)
        named = _REGISTER.fullmatch(operands[0]) if operands else None
        if not named:
            return range(0)
        first = int(named[1])
        return range(first, first + self._width())

    def _width(self) -> int:
        if shape := re.match(r"[A-Z]GMMA\.64x(\d+)x\d+\.(F16(?!\.F16)|\w+)", self.opcode):
            columns = int(shape[1])
            half = ".F16." in f"{self.opcode}." and ".F32" not in self.opcode
            return columns // 4 if half else columns // 2
        if re.match(r"[A-Z]MMA", self.opcode):
            return 4
        if self.name == "LDSM":
            return int(match[1]) if (match := re.search(r"\.(?:M\w+\.)?([124])$", self.opcode)) else 1
        if ".128" in self.opcode:
            return 4
        wide = re.search(r"\.(?:64|WIDE|F64)(?=\.|$)", self.opcode) or self.name in ("DADD", "DMUL", "DFMA")
        return 2 if wide or (self.name == "CS2R" and ".32" not in self.opcode) else 1

    @property
    def a_registers(self) -> range:
        """Those of A, of a wgmma that takes it from registers."""
        if not _WGMMA.match(self.opcode) or len(self.operands) < 2:
            return range(0)
        named = _REGISTER.fullmatch(self.operands[1])
        return range(int(named[1]), int(named[1]) + _A_REGISTERS) if named else range(0)

    @property
    def waits_for(self) -> int | None:
        """How many groups may still be under way behind a wait; None: it is no wait."""
        if not self.opcode.startswith("WARPGROUP.DEPBAR"):
            return None
        return int(self.operands[-1], 16)

    @property
    def labels(self) -> list[str]:
        return (
            re.findall(r"\.L\w+", " ".join(self.operands)) if self.name in ("BRA", "BRX", "JMP", "CALL", "BSSY") else []
        )


@dataclasses.dataclass
class Function:
    name: str
    instructions: list[Instruction]
    labels: dict[str, int]

    def successors(self, index: int) -> list[int]:
        i = self.instructions[index]
        next_one = [index + 1] if index + 1 < len(self.instructions) else []
        if i.name in ("EXIT", "RET", "KILL"):
            return next_one if i.guard else []
        targets = [self.labels[label] for label in i.labels if label in self.labels]
        if i.name in ("BRA", "JMP", "BRX") and not i.guard and len(i.operands) == 1:
            return targets
        # BSSY names where its BSYNC goes on: both are told by the edge from here
        return [*targets, *next_one]


def parse(text: str) -> list[Function]:
    """What `nvdisasm -c -g` prints."""
    functions: list[Function] = []
    file, line = "", 0
    for row in text.splitlines():
        if match := _FUNCTION.match(row):
            functions.append(Function(match[1], [], {}))
            file, line = "", 0
        elif not functions:
            continue
        elif match := _LINE.match(row):
            file, line = match[1], int(match[2])
        elif match := _LABEL.match(row):
            functions[-1].labels[match[1]] = len(functions[-1].instructions)
        elif match := _INSTRUCTION.match(row):
            _, guard, opcode, operands = match.groups()
            place = Place(functions[-1].name, file, line, f"{opcode} {operands}".strip())
            split = [o.strip() for o in re.split(r",(?![^\[]*\])", operands)] if operands else []
            functions[-1].instructions.append(Instruction(place, guard, opcode, split))
    return functions


@dataclasses.dataclass(frozen=True)
class Overwritten:
    """Registers of A that something writes while the wgmma may still read them."""

    registers: tuple[int, ...]
    writer: Place
    reader: Place

    def __str__(self) -> str:
        return (
            f"in_flight: {', '.join(f'R{r}' for r in self.registers)}: written while a wgmma may still read A there, as no wait "
            "comes between\n"
            f"  kernel {self.writer.function}\n  written at {self.writer}\n  read by {self.reader}"
        )


def overwritten(function: Function) -> list[Overwritten]:
    """By a forward analysis of every path: which wgmmas are under way, and how many groups have been committed since each."""
    code = function.instructions
    if not any(i.a_registers for i in code):
        return []
    # of a wgmma under way: groups committed since its own; -1: its own is still open
    before: list[dict[int, int] | None] = [None] * len(code)
    before[0] = {}
    todo = [0]
    conflicts: dict[tuple[int, int], Overwritten] = {}
    while todo:
        index = todo.pop()
        i = code[index]
        state = dict(before[index] or {})
        for wgmma in state:
            if registers := set(i.results) & set(code[wgmma].a_registers):
                conflicts[index, wgmma] = Overwritten(tuple(sorted(registers)), i.place, code[wgmma].place)
        if i.a_registers:
            state[index] = -1
        if _WGMMA.match(i.opcode) and any("gsb" in o for o in i.operands):
            state = {wgmma: min(age + 1, _MOST_GROUPS) for wgmma, age in state.items()}
        if (left := i.waits_for) is not None:
            state = {wgmma: age for wgmma, age in state.items() if age < left}
        for target in function.successors(index):
            known = before[target]
            merged = dict(known or {})
            for wgmma, age in state.items():
                merged[wgmma] = min(age, merged.get(wgmma, age))
            if known is None or merged != known:
                before[target] = merged
                todo.append(target)
    return [conflicts[key] for key in sorted(conflicts)]


def local_accesses(function: Function) -> list[Place]:
    return [i.place for i in function.instructions if i.name in ("LDL", "STL")]
