"""Machine code as nvdisasm prints it: functions, their loops, and of those the main one.

A loop is the natural loop of a back edge, an edge to a block that dominates its own. A backward branch alone is none: the
slow path of a wait stands behind the kernel and branches back into the middle of the main loop.
"""

import collections
import dataclasses
import functools
import re

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^([.$\w]+):$")
MMA = re.compile(r"(?:UTC)?[A-Z]G?MMA(?=\.|$)")
GLOBAL_LOAD = re.compile(r"(?:LDG|LD|LDGSTS|UBLKCP|UTMALDG)(?=\.|$)")
LOCAL = re.compile(r"(?:LDL|STL)(?=\.|$)")
JUMPS = {"BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU"}
ENDS = {"EXIT", "RET", "KILL"}


@dataclasses.dataclass
class Instruction:
    guard: str | None  # the predicate it is under
    opcode: str  # with its modifiers
    operands: str

    @functools.cached_property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def is_nop(self) -> bool:
        """By name, or under a predicate that is never true: ptxas puts `@!UPT UIADD3 URZ, ...` between the QMMAs of sm_89."""
        return self.name == "NOP" or self.guard in ("!PT", "!UPT")

    @property
    def labels(self) -> list[str]:
        """What a branch names: `(.L_x_1), or a list of them beside an indirect branch."""
        return re.findall(r"\.L\w+", self.operands)

    @property
    def is_jump(self) -> bool:
        """A call of a label in the function is one: ptxas leaves some loops by it, and what it leads to does not return."""
        return self.name in JUMPS or (self.name == "CALL" and bool(self.labels))

    @property
    def ends_block(self) -> bool:
        return self.is_jump or self.name in ENDS or self.name == "BSYNC"

    @property
    def may_fall_through(self) -> bool:
        if not self.ends_block or self.name == "CALL":
            return True
        if self.name in ("BRA", "JMP"):  # a second predicate may be an operand: @P0 BRA P1, `(.L_x_1)
            return self.guard is not None or not re.fullmatch(r"`\(\S+\)", self.operands)
        return self.guard is not None

    @property
    def registers(self) -> int:
        """One more than the number of the highest that it names; 0: none."""
        wide = 3 if ".128" in self.opcode else 1 if re.search(r"\.(?:64|WIDE)(?=\.|$)", self.opcode) else 0
        named = re.findall(r"(?<![A-Z])R(\d+)(\.64)?", self.operands)
        return max((int(n) + 1 + (1 if pair else wide) for n, pair in named), default=0)

    @property
    def loaded_bytes(self) -> int:
        """Of a global load; those whose size is in a register or descriptor count as one vector."""
        if not GLOBAL_LOAD.match(self.opcode):
            return 0
        width = re.search(r"\.(?:[US](8|16)|(64|128))(?=\.|$)", self.opcode)
        if width:
            return int(width[1] or width[2]) // 8
        return 16 if self.name in ("UBLKCP", "UTMALDG") else 4


@dataclasses.dataclass
class Loop:
    blocks: frozenset[int]
    instructions: list[Instruction]
    nops: int = 0
    edge: tuple[int, int] = (0, 0)  # the back edge: its target and where it begins

    @functools.cached_property
    def mma(self) -> collections.Counter:
        """Tensor-core instructions by opcode and modifiers."""
        return collections.Counter(i.opcode for i in self.instructions if MMA.match(i.opcode))

    @property
    def loads(self) -> collections.Counter:
        return collections.Counter(i.opcode for i in self.instructions if GLOBAL_LOAD.match(i.opcode))

    @functools.cached_property
    def loaded_bytes(self) -> int:
        return sum(i.loaded_bytes for i in self.instructions)

    @property
    def local(self) -> collections.Counter:
        return collections.Counter(i.opcode for i in self.instructions if LOCAL.match(i.opcode))

    @property
    def calls(self) -> int:
        """What is called is elsewhere, and not in the count."""
        return sum(i.name == "CALL" and not i.is_jump for i in self.instructions)


class Function:
    def __init__(self, instructions: list[Instruction], labels: dict[str, int]):
        self.instructions = instructions
        starts = {0, *(i for i in labels.values() if i < len(instructions))}
        starts |= {i + 1 for i, x in enumerate(instructions[:-1]) if x.ends_block}
        self.starts = sorted(starts)
        self.ends = [*self.starts[1:], len(instructions)]
        block_by_start = {start: block for block, start in enumerate(self.starts)}
        self.block_of = {name: block_by_start[i] for name, i in labels.items() if i < len(instructions)}
        self.successors = self.reachable_edges()

    def body(self, block: int) -> list[Instruction]:
        return self.instructions[self.starts[block] : self.ends[block]]

    def reachable_edges(self) -> dict[int, list[int]]:
        """Of each block that is reached from the entry. BSYNC continues where the last BSSY of its register says."""
        successors: dict[int, list[int]] = {}
        todo: list[tuple[int, dict[str, str]]] = [(0, {})]
        while todo:
            block, converge = todo.pop()
            if block in successors:
                continue
            converge = dict(converge)
            for i in self.body(block):
                if i.name == "BSSY":
                    converge[i.operands.split(",")[0]] = i.labels[0]
            last = self.body(block)[-1]
            targets, falls = [], last.may_fall_through
            if last.name == "BSYNC":
                where = converge.get(last.operands)
                targets, falls = ([where] if where else []), falls or where is None
            elif last.is_jump:
                targets = last.labels
                if not targets:
                    raise ValueError(f"{last.opcode} {last.operands}: no label says where this branch leads")
            reached = [self.block_of[t] for t in targets]
            if falls and block + 1 < len(self.starts):
                reached.append(block + 1)
            successors[block] = reached
            todo += [(b, converge) for b in reached]
        return successors

    def dominators(self) -> dict[int, int]:
        """Immediate dominators (Cooper, Harvey, Kennedy: A Simple, Fast Dominance Algorithm)."""
        order, visited = [], {0}
        stack = [(0, iter(self.successors[0]))]
        while stack:
            block, successors = stack[-1]
            after = next((b for b in successors if b not in visited), None)
            if after is None:
                order.append(block)
                stack.pop()
            else:
                visited.add(after)
                stack.append((after, iter(self.successors[after])))
        number = {block: i for i, block in enumerate(order)}
        predecessors = self.predecessors()
        above = {0: 0}

        def common(a, b):
            while a != b:
                if number[a] < number[b]:
                    a = above[a]
                else:
                    b = above[b]
            return a

        changed = True
        while changed:
            changed = False
            for block in reversed(order[:-1]):
                new = functools.reduce(common, (p for p in predecessors[block] if p in above))
                changed |= above.get(block) != new
                above[block] = new
        return above

    def predecessors(self) -> dict[int, list[int]]:
        predecessors = collections.defaultdict(list)
        for block, after in self.successors.items():
            for b in after:
                predecessors[b].append(block)
        return predecessors

    @functools.cached_property
    def loops(self) -> list[Loop]:
        above, predecessors = self.dominators(), self.predecessors()

        def dominates(a, b):
            while b > 0 and b != a:
                b = above[b]
            return a == b

        edges = sorted(
            (head, tail) for tail, heads in self.successors.items() for head in heads if dominates(head, tail)
        )
        return [self.loop(head, tail, predecessors) for head, tail in edges]

    def loop(self, head: int, tail: int, predecessors: dict[int, list[int]]) -> Loop:
        """Its instructions are those from the target to the back edge, so without what was put out of line; NOPs apart.

        One for each back edge: loops that begin together, and the branches of one that each end in a jump to its head,
        are different loops.
        """
        blocks, todo = {head}, [tail]
        while todo:
            block = todo.pop()
            if block not in blocks:
                blocks.add(block)
                todo += predecessors[block]
        inline = [b for b in sorted(blocks) if head <= b <= tail or tail < head]  # tail < head: a rotated loop
        body = [i for b in inline for i in self.body(b)]
        instructions = [i for i in body if not i.is_nop]
        return Loop(frozenset(blocks), instructions, len(body) - len(instructions), (head, tail))

    def shortest_trip(self, loop: Loop) -> list[Instruction]:
        """Of the ways around with the most tensor-core instructions the one with the fewest instructions, NOPs apart: what else may
        be skipped is."""
        head, tail = loop.edge
        ways: dict[
            int, tuple[int, int, int | None] | None
        ] = {}  # to the tail: MMAs left out, instructions, the next block

        def way(block: int) -> tuple[int, int, int | None] | None:
            if block not in ways:
                ways[block] = None  # of an inner loop's back edge
                issued = [i for i in self.body(block) if not i.is_nop]
                on = [
                    (*found[:2], b)
                    for b in self.successors[block]
                    if b in loop.blocks and b != head and (found := way(b))
                ]
                missing, more, following = (0, 0, None) if block == tail else min(on, default=(0, -1, None))
                if more >= 0:
                    mma = sum(bool(MMA.match(i.opcode)) for i in issued)
                    ways[block] = missing - mma, more + len(issued), following
            return ways[block]

        trip: list[Instruction] = []
        block: int | None = head
        while block is not None and (found := way(block)):
            trip += [i for i in self.body(block) if not i.is_nop]
            block = found[2]
        return trip

    def registers_behind_release(self) -> list[tuple[int, int]]:
        """Of each setmaxnreg.dec the registers that it leaves a thread, and how many are used from there on."""
        figures = []
        for block in self.successors:
            for i, released in enumerate(self.body(block)):
                if not released.opcode.startswith("USETMAXREG.DEALLOC"):
                    continue
                seen, todo = set(), list(self.successors[block])
                while todo:
                    b = todo.pop()
                    if b not in seen:
                        seen.add(b)
                        todo += self.successors[b]
                behind = [*self.body(block)[i + 1 :], *(x for b in seen for x in self.body(b))]
                figures.append((int(released.operands, 0), max((x.registers for x in behind), default=0)))
        return figures

    @functools.cached_property
    def main_loop(self) -> Loop | None:
        """The steady state: of the innermost loops with tensor-core instructions the one with the most of them, and of
        several (a masked one beside an unmasked one) the shortest; where none has any, the same by bytes of global loads."""
        for weight in (lambda loop: loop.mma.total(), lambda loop: loop.loaded_bytes):
            with_work = [loop for loop in self.loops if weight(loop)]
            innermost = [loop for loop in with_work if not any(other.blocks < loop.blocks for other in with_work)]
            if innermost:
                return max(innermost, key=lambda loop: (weight(loop), -len(loop.instructions)))
        return None


def functions(text: str) -> dict[str, Function]:
    """From `nvdisasm -c`: a function for each section of code, by its mangled name."""
    by_name = {}
    for section in re.split(r"^\.text\.", text, flags=re.M)[1:]:
        name, _, code = section.partition(":\n")
        instructions, labels = [], {}
        for line in code.splitlines():
            if i := INSTRUCTION.match(line):
                instructions.append(Instruction(*i.groups()))
            elif label := LABEL.match(line):
                labels[label[1]] = len(instructions)
            elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
                raise ValueError(f"not understood as an instruction: {line.strip()}")
        if not instructions:
            raise ValueError(f"{name}: no instructions in what nvdisasm printed")
        by_name[name] = Function(instructions, labels)
    return by_name
