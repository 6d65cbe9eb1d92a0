"""Instructions, pipes, basic blocks and loops of the kernels in a cubin, from nvdisasm.

A loop is what control flow makes one: blocks that the compiler moved out of line belong to it. Only paths for warps
whose lanes have diverged (BRA.DIV, BRA.CONV) are left out: all lanes of a warp run these kernels together.
"""

import functools
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Which pipe an opcode is issued to, after the list of pipelines in the documentation of Nsight Compute. First match
# wins. popc is XU, 16 lanes per clock and SM, whatever it computes; CS2R (two registers zeroed at once) takes the
# dispatch port of the ALU for two cycles and counts as one ALU instruction; LDC counts as a load although it
# has a path of its own.
PIPES = (
    ("hmma", r"[HIDQB]MMA|HGMMA|IGMMA|QGMMA"),
    ("popc", r"POPC|FLO|BREV|MUFU|I2F|F2I|F2F|I2I|FRND"),
    (
        "lsu",
        r"LD|LDS|LDG|LDL|LDC|LDSM|LDGSTS|LDTM|ST|STS|STG|STL|STSM|ATOM|ATOMS|ATOMG|RED|SHFL|MATCH|S2R|SYNCS|UBLKCP|"
        r"UTMALDG|CCTL|MEMBAR|ERRBAR|FENCE",
    ),
    ("uniform", r"U[A-Z].*|R2UR|S2UR|VOTEU|REDUX"),
    ("fma", r"IMAD|IMUL|IDP|IDP4A|FFMA|FMUL|FADD|FFMA32I|HFMA2|HMUL2|HADD2|FSWZADD"),
    (
        "control",
        r"BRA|BRX|BRXU|JMP|JMX|BSSY|BSYNC|BREAK|BMOV|BPT|CALL|RET|EXIT|KILL|NOP|NANOSLEEP|YIELD|WARPSYNC|WARPGROUP|BAR|"
        r"DEPBAR|LDGDEPBAR|ARRIVES|ELECT|PREEXIT|ACQBULK|CGAERRBAR|RPCMOV",
    ),
    ("alu", r".*"),
)
_PIPES = tuple((name, re.compile(pattern)) for name, pattern in PIPES)


@functools.cache
def pipe(opcode: str) -> str:
    """alu, fma, popc, lsu, hmma, uniform or control, of the first word of an opcode as in IMAD.MOV.U32."""
    base = opcode.split(".")[0]
    if base == "HFMA2" and "MMA" in opcode:
        return "fma"
    return next(name for name, pattern in _PIPES if pattern.fullmatch(base))


@dataclass(frozen=True)
class Instruction:
    """guard: its predicate without @, or nothing; where: (file, line), innermost of the inlined calls first."""

    address: int
    guard: str
    text: str
    where: tuple[tuple[str, int], ...] = ()

    @property
    def opcode(self) -> str:
        return self.text.split(maxsplit=1)[0]

    @property
    def operands(self) -> list[str]:
        rest = self.text.split(maxsplit=1)[1:]
        return [part.strip().removesuffix(".reuse") for part in rest[0].split(",")] if rest else []

    @property
    def target(self) -> str | None:
        found = re.search(r"`\(([^)]+)\)", self.text)
        return found[1] if found else None


@dataclass
class Block:
    """Instructions with one entry and one exit; next: blocks that may follow, by index."""

    label: str | None = None
    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """A natural loop: its header, all its blocks, and those that jump back."""

    header: int
    blocks: frozenset[int]
    latches: tuple[int, ...]


def disassemble(cubin: Path, nvdisasm: str) -> dict[str, "Function"]:
    """The kernels of a cubin by symbol."""
    done = subprocess.run([nvdisasm, "-c", "-gi", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"nvdisasm cannot read {cubin.name}: {done.stderr.strip()}")
    return {name: Function(name, lines) for name, lines in _sections(done.stdout.splitlines())}


def _sections(lines: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    name, body = None, []
    for line in lines:
        if found := re.match(r"^\.text\.(\S+):", line):
            if name:
                yield name, body
            name, body = found[1], []
        elif re.match(r"^\s*\.section\s", line):
            if name:
                yield name, body
            name = None
        else:
            body.append(line)
    if name:
        yield name, body


def instructions(lines: Iterable[str]) -> Iterator[str | Instruction]:
    """Labels as text and instructions, in the order of a listing."""
    where: list[tuple[str, int]] = []
    fresh = False
    for line in lines:
        if found := re.match(r'^\s*//## File "([^"]*)", line (\d+)', line):
            where = [*where, (found[1], int(found[2]))] if fresh else [(found[1], int(found[2]))]
            fresh = True
        elif found := re.match(r"^([.$\w]+):", line):
            yield found[1]
        elif found := re.match(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(\S+)\s+)?(.*?)\s*;", line):
            fresh = False
            yield Instruction(int(found[1], 16), found[2] or "", found[3].strip("{} "), tuple(where))


class Function:
    """Control flow of one kernel from its listing."""

    def __init__(self, name: str, lines: Iterable[str]) -> None:
        self.name = name
        self.problems: list[str] = []
        self.slow_paths = 0
        self.blocks = _cut(instructions(lines))
        self._connect()
        self.dominators = self._dominate()
        self.loops = self._find_loops()

    def _connect(self) -> None:
        labels = {block.label: i for i, block in enumerate(self.blocks) if block.label}
        barriers: dict[str, int] = {}  # where lanes that wait at BSYNC Bn go on: the target of the latest BSSY Bn
        for i, block in enumerate(self.blocks):
            for instruction in block.instructions:
                if instruction.opcode.startswith("BSSY") and instruction.target in labels:
                    barriers[instruction.operands[0]] = labels[instruction.target]
            last, after = block.instructions[-1], [i + 1] if i + 1 < len(self.blocks) else []
            opcode, target = last.opcode, labels.get(last.target)
            sure = not last.guard or last.guard in ("PT", "UPT")
            if opcode in ("BRA.DIV", "BRA.CONV"):
                self.slow_paths += 1
                block.next = after if opcode == "BRA.DIV" else [target]
            elif opcode.startswith(("BRX", "JMX")):
                self.problems.append(f"{opcode} at {last.address:#x} jumps to a place that only a register knows")
            elif opcode.startswith(("BRA", "JMP")) or (opcode.startswith("CALL") and target is not None):
                sure = sure and not re.match(r"U?!?U?P\d", last.operands[0])
                block.next = [target] if sure else [target, *after]
            elif opcode.startswith(("EXIT", "RET", "KILL")):
                block.next = [] if sure else after
            elif opcode.startswith("BSYNC"):
                target = barriers.get(last.operands[0], i + 1)
                block.next = [target] if sure else [target, *after]
            else:
                block.next = after
            if None in block.next:
                self.problems.append(f"{opcode} at {last.address:#x} jumps out of the listing")
                block.next = [following for following in block.next if following is not None]

    def _dominate(self) -> dict[int, set[int]]:
        """Blocks that every path to a block passes; unreachable blocks are missing."""
        order, seen, stack = [], {0}, [(0, iter(self.blocks[0].next))]
        while stack:
            node, rest = stack[-1]
            following = next((n for n in rest if n not in seen), None)
            if following is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.blocks[following].next)))
        before: dict[int, list[int]] = {node: [] for node in order}
        for node in order:
            for following in self.blocks[node].next:
                before[following].append(node)
        self.before = before
        found = {node: set(order) for node in order}
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for node in reversed(order):
                if node and (new := {node} | set.intersection(*(found[p] for p in before[node]))) != found[node]:
                    found[node], changed = new, True
        return found

    def _find_loops(self) -> list[Loop]:
        latches: dict[int, list[int]] = {}
        for node, dominators in self.dominators.items():
            for following in self.blocks[node].next:
                if following in dominators:
                    latches.setdefault(following, []).append(node)
        return [Loop(header, self._body(header, ends), tuple(ends)) for header, ends in latches.items()]

    def _body(self, header: int, latches: Sequence[int]) -> frozenset[int]:
        body, stack = {header}, list(latches)
        while stack:
            node = stack.pop()
            if node not in body:
                body.add(node)
                stack += self.before[node]
        return frozenset(body)

    def outermost(self, chosen: Sequence[Loop]) -> list[Loop]:
        """Those that stand in no other of them."""
        return [loop for loop in chosen if not any(loop.blocks < other.blocks for other in chosen)]

    def inside(self, loop: Loop) -> list[Loop]:
        """Loops within a loop."""
        return [inner for inner in self.loops if inner.blocks < loop.blocks]

    def body(self, loop: Loop | None) -> Iterator[Instruction]:
        """Instructions of a loop, or of the whole kernel, each once."""
        for node in sorted(loop.blocks if loop else self.dominators):
            yield from self.blocks[node].instructions


def _cut(stream: Iterable[str | Instruction]) -> list[Block]:
    """Basic blocks, in the order of their addresses; a label that several share names the first."""
    blocks, again = [Block()], {}
    for item in stream:
        block = blocks[-1]
        if isinstance(item, str):
            if block.instructions:
                blocks.append(Block(item))
            elif block.label is None:
                block.label = item
            else:
                again[item] = block.label
            continue
        if block.instructions and _leaves(block.instructions[-1]):
            block = Block()
            blocks.append(block)
        block.instructions.append(item)
    blocks = [block for block in blocks if block.instructions]
    if again:
        for block in blocks:
            block.instructions = [_renamed(i, again) for i in block.instructions]
    return blocks


def _renamed(instruction: Instruction, names: dict[str, str]) -> Instruction:
    target = instruction.target
    if target not in names:
        return instruction
    text = instruction.text.replace(f"`({target})", f"`({names[target]})")
    return Instruction(instruction.address, instruction.guard, text, instruction.where)


def _leaves(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "KILL", "BSYNC", "CALL"))
