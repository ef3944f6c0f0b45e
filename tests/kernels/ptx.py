"""Enough of PTX to say on a CPU what a few lines of it compute in a warp."""

from __future__ import annotations

import re

import numpy as np

LANES = 32


def run(asm: str, num_outputs: int, inputs: list[np.ndarray], memory: np.ndarray) -> list[np.ndarray]:
    """What inline assembly of these `inputs` (`$num_outputs` and on, integers `[32]` each) leaves in `$0` and on, as
    float32. Addresses are bytes of `memory`, int32, of which the first must not be asked for."""
    registers = {f"${num_outputs + i}": value for i, value in enumerate(inputs)}
    registers = {name: value.view(np.uint32) if value.itemsize == 4 else value for name, value in registers.items()}

    def value(name: str) -> np.ndarray:
        if name in registers:
            return registers[name]
        bits = int("0x" + name[2:], 0) if name.startswith("0f") else int(name, 0)
        return np.full(LANES, bits, np.uint32)

    for line in asm.strip().removeprefix("{").removesuffix("}").splitlines():
        if not line.strip() or line.startswith(".reg"):
            continue
        predicate, operation, rest = re.fullmatch(r"(?:@(\w+) )?(\S+) (.*);", line.strip()).groups()
        names = re.findall(r"[^\s,{}\[\]]+", rest)
        if operation.startswith("mma.sync.aligned.m16n8k16"):
            assert operation.endswith(".row.col.f32.f16.f16.f32")
            found = _multiplied([value(name) for name in names[4:]])
            registers |= dict(zip(names[:4], found, strict=True))
        elif operation == "ld.global.b32":
            address, _, offset = names[1].partition("+")
            place = np.where(registers[predicate], value(address) + int(offset), 0) // 4
            assert (place[registers[predicate]] > 0).all()
            loaded = memory[place].view(np.uint32)
            registers[names[0]] = np.where(registers[predicate], loaded, registers[names[0]])
        else:
            assert predicate is None
            registers[names[0]] = _OPERATIONS[operation](*map(value, names[1:]))
    return [registers[f"${i}"].view(np.float32) for i in range(num_outputs)]


def _halves(pairs: np.ndarray) -> np.ndarray:
    """`[32, 2]` of what `[32]` registers hold, the lower one first."""
    return pairs[:, None].view(np.float16).astype(np.float32)


def _multiplied(operands: list[np.ndarray]) -> list[np.ndarray]:
    """By the figures of the instruction's fragments in the PTX ISA: registers of `a` 4, `b` 2, `c` 4."""
    lane = np.arange(LANES)
    row, pair = lane // 4, lane % 4 * 2
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for i, register in enumerate(operands[:4]):
        for half in range(2):
            a[row + 8 * (i % 2), pair + half + 8 * (i // 2)] = _halves(register)[:, half]
    for i, register in enumerate(operands[4:6]):
        for half in range(2):
            b[pair + half + 8 * i, row] = _halves(register)[:, half]
    for i, register in enumerate(operands[6:]):
        c[row + 8 * (i // 2), pair + i % 2] = register.view(np.float32)
    found = a @ b + c
    return [found[row + 8 * (i // 2), pair + i % 2].astype(np.float32).view(np.uint32) for i in range(4)]


def _floats(operation):
    return lambda *operands: operation(*[each.view(np.float32) for each in operands]).astype(np.float32).view(np.uint32)


def _lookup(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    assert (table == 0xEA).all()
    return (a & b) | c


def _two_halves(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    both = np.stack([lower.view(np.float32), upper.view(np.float32)], axis=1).clip(-65504, 65504)
    return both.astype(np.float16).view(np.uint32)[:, 0]


def _permuted(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    """Of the eight bytes of `a` and `b`, by four bits each."""
    either = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros_like(either)
    for place in range(4):
        which = selectors.astype(np.uint64) >> np.uint64(4 * place) & np.uint64(15)
        assert (which < 8).all()  # of more, signs are taken
        found |= (either >> (which * np.uint64(8)) & np.uint64(255)) << np.uint64(8 * place)
    return found.astype(np.uint32)


_OPERATIONS = {
    "prmt.b32": _permuted,
    "setp.ne.s64": lambda a, b: a != b,
    "mov.b32": lambda a: a,
    "mov.f32": lambda a: a,
    "shl.b32": lambda a, by: a << by,
    "shr.u32": lambda a, by: a >> by,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": _lookup,
    "mul.f32": _floats(np.multiply),
    "cvt.rn.satfinite.f16x2.f32": _two_halves,
}
