"""Registers that products of a warpgroup may still read, and what writes them all the same, from the machine code.

A product is begun, and reads its operand a and its metadata from registers until the warp has waited for it. ptxas does
not see that: it may give a register that it takes for free to something that comes before the wait.
"""

import re
from collections.abc import Iterator

from sass import Function, Instruction, Loop

PRODUCT = re.compile(r"HGMMA\S*\s+R(\d+), (R(\d+)|gdesc\S*), gdesc\S*, R\d+(?:, R(\d+))?")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)")
OPERANDS = 4  # registers of operand a: 16-bit values


def written(instruction: Instruction) -> set[int]:
    """Numbers of the registers that an instruction writes; of a product, whose sums are its own, none."""
    found = re.fullmatch(r"R(\d+)", instruction.operands[0]) if instruction.operands else None
    opcode = instruction.opcode
    if not found or opcode.startswith(("ST", "RED", "HGMMA", "BRA", "BAR")):
        return set()
    width = 4 if ".128" in opcode else 2 if ".64" in opcode or ".WIDE" in opcode or opcode == "CS2R" else 1
    return set(range(int(found[1]), int(found[1]) + width))


def hazards(function: Function) -> Iterator[str]:
    """Each instruction of a loop with products that writes what a product in flight reads, in words."""
    loops = [loop for loop in function.loops if any(PRODUCT.match(i.text) for i in function.body(loop))]
    for loop in loops:
        if not any(inner in loops for inner in function.inside(loop)):
            yield from _of(function, loop)


def _of(function: Function, loop: Loop) -> Iterator[str]:
    body = list(function.body(loop))
    groups: list[set[int]] = [set()]  # what those committed, and, last, those that are not yet, read
    for instruction in [*body, *body]:
        if found := PRODUCT.match(instruction.text):
            if found[3]:
                groups[-1] |= set(range(int(found[3]), int(found[3]) + OPERANDS))
            if found[4]:
                groups[-1].add(int(found[4]))
            if "gsb0" in instruction.text:
                groups.append(set())
        elif found := WAIT.match(instruction.text):
            groups = groups[-1 - int(found[1]) :]
        elif clash := written(instruction) & set().union(*groups):
            yield f"{instruction.address:#x} {instruction.text}: R{min(clash)} belongs to a product in flight"
