"""How often each instruction of a loop is issued per iteration.

Every block counts once: both sides of an if, predicated-off instructions. Inner loops count with their trip count:
derived where counter, bound and step are numbers, else from the source, where these comments are read (line numbers
come from nvcc -lineinfo):

    // cubins: main: the loop around it runs once                       on the line of a main loop that is an inner one
    // cubins: trips 2: 64 copies of 16 bytes at 50 %, by 32 lanes      on the line of the inner loop
    // cubins: times 0: only tiles at the edge                          on a statement whose blocks run less often
    // cubins: begin times 0.1: reason … // cubins: end                 around several lines

A loop with a comment must stay one loop (#pragma unroll 1): trips are iterations of the compiled one.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sass import Function, Instruction, Loop, pipe

NOTE = re.compile(
    r"//\s*cubins:\s*(?:(?P<begin>begin\s+)?(?P<kind>main|(?:trips|times)\s+(?P<value>[0-9.]+))\s*:\s*(?P<reason>\S.*)|end)\s*$"
)


@dataclass(frozen=True)
class Note:
    """A `// cubins:` comment."""

    kind: str
    value: float
    reason: str


class Notes:
    """The comments of the sources that a cubin was compiled from, read as they are asked for."""

    def __init__(self) -> None:
        self._files: dict[str, dict[int, Note]] = {}

    def _at(self, place: tuple[str, int], kind: str) -> Note | None:
        file, line = place
        if file not in self._files:
            self._files[file] = read_notes(Path(file)) if Path(file).is_file() else {}
        note = self._files[file].get(line)
        return note if note and note.kind == kind else None

    def of_loop(self, branch: Instruction, kind: str) -> Note | None:
        """The note at the innermost place that a branch back comes from."""
        return next((note for place in branch.where if (note := self._at(place, kind))), None)

    def times(self, block: Sequence[Instruction]) -> Note | None:
        """The note that all instructions of a block stand under, branches aside."""
        under = [
            {note for place in instruction.where if (note := self._at(place, "times"))}
            for instruction in block
            if pipe(instruction.opcode) != "control"
        ]
        shared = set.intersection(*under) if under else set()
        return min(shared, key=lambda note: note.value) if shared else None


def read_notes(file: Path) -> dict[int, Note]:
    """The notes of a source by line."""
    notes, region = {}, None
    for number, line in enumerate(file.read_text().splitlines(), 1):
        found = NOTE.search(line)
        if found and found["kind"] is None:
            region = None
        elif found:
            note = Note(found["kind"].split()[0], float(found["value"] or 1), found["reason"])
            if found["begin"]:
                region = note
            else:
                notes[number] = note
        elif re.search(r"//\s*cubins:", line):
            form = "// cubins: main: reason, // cubins: trips NUMBER: reason or // cubins: times NUMBER: reason"
            raise ValueError(f"{file.name}:{number}: want {form}, got {line.strip()}")
        if region and number not in notes:
            notes[number] = region
    return notes


@dataclass
class Rates:
    """(times per iteration, instruction); what was taken from the source; what nobody knows and is counted once."""

    issued: list[tuple[float, Instruction]] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def noted_main(function: Function, loops: Sequence[Loop], notes: Notes) -> dict[Loop, str]:
    """Loops that the source calls main, and why."""
    branches = ((loop, function.blocks[loop.latches[0]].instructions[-1]) for loop in loops)
    return {loop: note.reason for loop, branch in branches if (note := notes.of_loop(branch, "main"))}


def rates(function: Function, loop: Loop | None, notes: Notes) -> Rates:
    """Of one iteration of a loop, or of the whole kernel without one."""
    found = Rates(unknown=list(function.problems))
    inner = function.inside(loop) if loop else function.loops
    trips = _trips(function, inner, notes, found)
    for node in sorted(loop.blocks if loop else function.dominators):
        block, rate = function.blocks[node].instructions, 1.0
        for one in inner:
            rate *= trips[one.header] if node in one.blocks else 1
        if note := notes.times(block):
            found.assumed.append(f"block at {block[0].address:#x} {note.value:g} times: {note.reason}")
            rate *= note.value
        found.issued += [(rate, instruction) for instruction in block]
        call = block[-1]
        if rate and call.opcode.startswith("CALL") and not (call.target or "").startswith(".L"):
            found.unknown.append(f"what the function called at {call.address:#x} issues")
    if function.slow_paths:
        found.assumed.append(f"{function.slow_paths} paths for diverged warps left out")
    return found


def _trips(function: Function, inner: Sequence[Loop], notes: Notes, found: Rates) -> dict[int, float]:
    trips, used = {}, set()
    for one in inner:
        branch = function.blocks[one.latches[0]].instructions[-1]
        count, note = derive(function, one), notes.of_loop(branch, "trips")
        place = f"{Path(branch.where[0][0]).name}:{branch.where[0][1]}" if branch.where else "line unknown"
        if count is not None:
            trips[one.header] = count
        elif note is None:
            trips[one.header] = 1
            found.unknown.append(f"trips of the loop at {branch.address:#x} ({place}), counted once")
        else:
            trips[one.header] = note.value
            found.assumed.append(f"{note.value:g} trips of the loop at {branch.address:#x} ({place}): {note.reason}")
            if note.value and (note, branch.where) in used:
                found.unknown.append(f"several loops came of the one at {place}: #pragma unroll 1 is missing")
            used.add((note, branch.where))
    return trips


def derive(function: Function, loop: Loop) -> int | None:
    """Trip count of a loop whose counter starts, steps and ends by numbers in the code; None if it is not such."""
    if len(loop.latches) != 1:
        return None
    listing = function.blocks[loop.latches[0]].instructions
    branch = listing[-1]
    guard = branch.guard or next((o for o in branch.operands if re.match(r"!?U?P\d", o)), "")
    test = _definition(listing[:-1], guard.lstrip("!"))
    if test and test.opcode.startswith("PLOP3") and "0x80" in test.operands:  # copies a uniform predicate
        source = next((o for o in test.operands[2:] if re.fullmatch(r"UP\d", o)), "")
        test = _definition(listing[: listing.index(test)], source)
    if not test or not (how := re.match(r"U?ISETP\.(LT|LE|GT|GE|NE|EQ)(\.U32)?\.AND$", test.opcode)):
        return None
    counter, bound, also = test.operands[2], number(test.operands[3]), test.operands[4]
    steps = [
        (node, instruction)
        for node in loop.blocks
        for instruction in function.blocks[node].instructions
        if counter in written(instruction)
    ]
    start = _start(function, loop, counter)
    if bound is None or start is None or also not in ("PT", "UPT") or len(steps) != 1:
        return None
    node, instruction = steps[0]
    step = _step(instruction, counter)
    if step is None or node not in function.dominators[loop.latches[0]]:
        return None
    jumps_back = branch.target == function.blocks[loop.header].label
    goes_on = (guard[0] != "!") == jumps_back
    early = node != loop.latches[0] or instruction.address < test.address
    value = start
    for count in range(1, 1 << 16):
        value += step
        if _compare(value if early else value - step, how[1], bound) != goes_on:
            return count
    return None


def _start(function: Function, loop: Loop, register: str) -> int | None:
    """The number in a register where a loop is entered."""
    entries = [node for node in function.before[loop.header] if node not in loop.blocks]
    while len(entries) == 1:
        if definition := _definition(function.blocks[entries[0]].instructions, register):
            return constant(definition)
        entries = [node for node in function.before[entries[0]] if node != entries[0]]
    return None


def registers(first: str, count: int) -> list[str]:
    """R4, R5, … from R4 on; the name itself if it has no number."""
    numbered = re.fullmatch(r"(U?R)(\d+)", first)
    return [f"{numbered[1]}{int(numbered[2]) + i}" for i in range(count)] if numbered else [first]


def written(instruction: Instruction) -> frozenset[str]:
    """Registers that an instruction writes, predicates among them."""
    return _written(instruction.text)


@functools.lru_cache(maxsize=1 << 16)
def _written(text: str) -> frozenset[str]:
    instruction = Instruction(0, "", text)
    opcode, operands = instruction.opcode, instruction.operands
    if pipe(opcode) == "control" or not operands:
        return frozenset()
    if wide := re.match(r"HGMMA\.64x(\d+)x", opcode):
        return frozenset(registers(operands[0], int(wide[1]) // 2))
    size = 4 if re.search(r"128|MMA|M88\.4", opcode) else 2 if re.search("64|WIDE|^CS2R$|M88.2", opcode) else 1
    first = operands[: 2 if any(re.fullmatch(r"U?P\w", o) for o in operands[:2]) else 1]
    return frozenset(register for operand in first for register in registers(operand, size))


Place = tuple[int, int]  # block, and instruction in it


def origins(function: Function, loop: Loop, at: Place, registers: Iterable[str]) -> set[int]:
    """Addresses of the loads inside a loop that registers at a place of it are made from, on any path."""
    todo, seen, found = [(at, register) for register in registers], set(), set()
    while todo:
        where, register = todo.pop()
        for node, place in _reaching(function, loop, where, register):
            one = function.blocks[node].instructions[place]
            if pipe(one.opcode) == "lsu" and not one.opcode.startswith(("LDC", "S2R", "SHFL")):
                found.add(one.address)
            elif (node, place) not in seen:
                seen.add((node, place))
                sources = re.findall(r"\bU?R\d+\b", " ".join(one.operands[1:]))
                todo += [((node, place), source) for source in sources]
    return found


def _reaching(function: Function, loop: Loop, at: Place, register: str) -> Iterator[Place]:
    """Instructions of a loop that may have written a register last, seen from a place of it."""
    stack, entered = [at], set()
    while stack:
        node, end = stack.pop()
        for place in range(end - 1, -1, -1):
            one = function.blocks[node].instructions[place]
            if register in written(one):
                yield node, place
                if not one.guard:
                    break
        else:
            for before in loop.blocks.intersection(function.before[node]) - entered:
                entered.add(before)
                stack.append((before, len(function.blocks[before].instructions)))


def _definition(listing: Sequence[Instruction], register: str) -> Instruction | None:
    return next((i for i in reversed(listing) if register in written(i)), None)


def number(operand: str) -> int | None:
    """A signed 32-bit immediate."""
    if operand in ("RZ", "URZ", "SRZ", "-RZ"):
        return 0
    if not re.fullmatch(r"-?0x[0-9a-f]+", operand):
        return None
    return (int(operand, 16) + (1 << 31)) % (1 << 32) - (1 << 31)


def constant(instruction: Instruction) -> int | None:
    """What MOV and its disguises put into their register."""
    opcode, operands = instruction.opcode, instruction.operands
    if instruction.guard:
        return None
    if opcode.startswith("HFMA2") and all(o in ("RZ", "-RZ", "0") for o in operands[1:]):
        return 0
    if opcode in ("MOV", "UMOV") or opcode.startswith(("IMAD.MOV", "CS2R")):
        return number(operands[-1])
    return None


def _step(instruction: Instruction, register: str) -> int | None:
    """What is added to a register, if nothing else happens to it."""
    added = [number(o) for o in instruction.operands[1:] if o != register]
    plain = instruction.opcode in ("IADD3", "UIADD3", "VIADD") and not instruction.guard
    if not plain or instruction.operands[1:].count(register) != 1 or None in added:
        return None
    return sum(added)


def _compare(a: int, how: str, b: int) -> bool:
    return {"LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b, "NE": a != b, "EQ": a == b}[how]
