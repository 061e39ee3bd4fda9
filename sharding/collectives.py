"""The collectives of a compiled program, read from its HLO text: what a layout costs in communication."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(?P<name>[^\s=]+) = (?P<type>.*?)\s(?P<op>[a-z][\w-]*)\((?P<rest>.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(?P<name>[^\s(]+) .*\{$")
_CALLS = re.compile(r"\b(\w*computations?|calls|to_apply|body|condition)=(\{[^}]*\}|%[^\s,]+)")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_NAME = re.compile(r"%([^\s,(){}]+)")
_PART = re.compile(r"(?:^|/)(?:(embed|head|sample|stages)|(layer\d+)(?:/[^/]+)*?/(attention|mlp))(?=/|$)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction. `operand_bytes` is what each device puts in; `part` is "embed", "layer3/mlp",
    "stages", "head", "sample" or, where the program's scopes do not say, "". `in_loop`: inside a while loop, so that it
    may run any number of times a step."""

    kind: str
    operand_bytes: int
    group_size: int
    part: str = ""
    in_loop: bool = False

    @property
    def result_bytes(self) -> int:
        """What each device gets out."""
        if self.kind == "all-gather":
            return self.operand_bytes * self.group_size
        return self.operand_bytes // self.group_size if self.kind == "reduce-scatter" else self.operand_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array on each device: the larger of what goes in and what comes out."""
        return max(self.operand_bytes, self.result_bytes)

    @property
    def sent_bytes(self) -> int:
        """What each device must send at least, by the ring algorithms (Patarasuk & Yuan 2009)."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.num_bytes
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.num_bytes * (self.group_size - 1) // self.group_size


@dataclasses.dataclass(frozen=True)
class Total:
    """Collectives of one kind in one part: how many, and their `num_bytes` and `sent_bytes` per device together."""

    kind: str
    part: str
    in_loop: bool
    group_size: int
    count: int
    num_bytes: int
    sent_bytes: int


def read_collectives(hlo_text: str) -> list[Collective]:
    """Every collective of a compiled program's `as_text()`, in the order of the text.

    An asynchronous one counts once, at its start. Kernels that reach over to peers by themselves are custom calls to
    the compiler and not among these.
    """
    module = _Module.parse(hlo_text)
    return [
        Collective(
            kind=instruction.op.removesuffix("-start"),
            operand_bytes=sum(_type_bytes(types.get(name, "")) for name in instruction.operands),
            group_size=_group_size(instruction.rest, module.num_devices),
            part=part_of(instruction.rest),
            in_loop=computation in module.looped,
        )
        for computation, instructions in module.computations.items()
        for types in ({i.name: i.type for i in instructions},)
        for instruction in instructions
        if instruction.op.removesuffix("-start") in KINDS
    ]


def summarize(found: Iterable[Collective], *, by_part: bool = False) -> list[Total]:
    """Totals by kind, group size and loop, and by part of the program with layers taken together ("layers/mlp")."""
    groups: dict[tuple[str, str, bool, int], list[Collective]] = collections.defaultdict(list)
    for c in found:
        part = re.sub(r"^layer\d+", "layers", c.part) if by_part else ""
        groups[c.kind, part, c.in_loop, c.group_size].append(c)
    return [
        Total(*key, len(members), sum(c.num_bytes for c in members), sum(c.sent_bytes for c in members))
        for key, members in groups.items()
    ]


def part_of(text: str) -> str:
    """The part of the model that an instruction's ``op_name`` lies in: the innermost scope that is one."""
    name = _OP_NAME.search(text)
    found = _PART.findall(name.group(1)) if name else []
    if not found:
        return ""
    alone, layer, block = found[-1]
    return alone or f"{layer}/{block}"


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.rest.partition(")")[0])


@dataclasses.dataclass
class _Module:
    """`looped`: computations that run inside some while loop."""

    num_devices: int
    computations: dict[str, list[_Instruction]]
    looped: set[str]

    @classmethod
    def parse(cls, text: str) -> _Module:
        counts = dict(re.findall(r"\b(replica_count|num_partitions)=(\d+)", text.partition("\n")[0]))
        computations: dict[str, list[_Instruction]] = {}
        callees: dict[str, set[str]] = collections.defaultdict(set)
        bodies: set[str] = set()
        here: list[_Instruction] = []
        caller = ""
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                caller = match["name"]
                here = computations[caller] = []
            elif match := _INSTRUCTION.match(line):
                here.append(_Instruction(match["name"], match["type"], match["op"], match["rest"]))
                for attribute, names in _calls(match["rest"]):
                    callees[caller].update(names)
                    if attribute in ("body", "condition"):
                        bodies.update(names)
        return cls(math.prod(map(int, counts.values())), computations, _reachable(bodies, callees))


def _calls(text: str) -> Iterator[tuple[str, list[str]]]:
    for attribute, names in _CALLS.findall(text):
        yield attribute, _NAME.findall(names)


def _reachable(roots: set[str], callees: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(callees.get(name, ()))
    return found


def _type_bytes(text: str) -> int:
    """Bytes of a shape such as ``f32[64,256]{1,0}``, or of all the shapes in a tuple."""
    bits = 0
    for name, width, sizes in _SHAPE.findall(text):
        count = math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        bits += count * (8 if name == "pred" else int(width))
    return bits // 8


def _group_size(text: str, num_devices: int) -> int:
    """Devices that take part together, in each of the spellings that XLA has used."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return _ring_size(dict(re.findall(r"(\d+),(\d+)", pairs.group(1))))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        # An axis may be there in part: 'x':(2)4 is the factor of 4 that follows one of 2.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2))
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(iota.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    return len(listed.group(1).split(",")) if listed else num_devices


def _ring_size(targets: dict[str, str]) -> int:
    """Devices along the ring or the chain that a permutation sends by."""
    heads = set(targets) - set(targets.values())
    first = at = min(heads or targets, key=int)
    size = 1
    while targets.get(at, first) != first:
        at = targets[at]
        size += 1
    return size
