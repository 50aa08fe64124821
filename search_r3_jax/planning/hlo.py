"""Parser of compiled programs: FLOPs and exchanged bytes, with the trip counts of loops."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"^(.*?) ({'|'.join(_KINDS)})(?:-start)?\(")
_BETWEEN_SLICES = re.compile(r"^(.*?) send\(.*xla_megascale_runtime")
_COUNT = re.compile(r"([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))"
)
_CONVOLUTION = re.compile(r"^(\S+) (?:convolution|dot)\(%([\w.\-]+), %([\w.\-]+)\)(.*)$")


class Collective(NamedTuple):
    """One collective: its runs, its mesh axes, and the bytes that each chip sends over all runs."""

    kind: str
    runs: int
    axes: tuple[str, ...]
    bytes: float
    shape: str


class Program(NamedTuple):
    """The work of one chip.

    Attributes:
        flops: of matrix products, without kernels.
        product_bytes: of their inputs and outputs.
        attention_flops: of the attention kernels, without skipped tiles taken into account.
        collectives: the exchanges between chips.
    """

    flops: float
    product_bytes: float
    attention_flops: float
    collectives: list[Collective]


class LoopError(ValueError):
    """A loop whose trip count cannot be read."""


def read_program(
    compiled: jax.stages.Compiled, mesh_shape: Mapping[str, int], *, open_rounds: int | None = None
) -> Program:
    """The work of a compiled program on each chip of a mesh; device ids are in the mesh's order.

    An exchange that is split over the products it overlaps with counts once. A loop without a constant trip
    count is assumed to run `open_rounds` times; raises LoopError for such a loop if None is given.
    """
    computations, entry = _computations(compiled.as_text() or "")
    flops, product_bytes, attention_flops = 0.0, 0.0, 0.0
    collectives = list[Collective]()
    for name, runs, inside in _visits(computations, entry, open_rounds):
        lines = computations[name]
        for line in lines:
            product = _product(line, lines)
            flops += runs * product.flops
            product_bytes += runs * product.bytes
            attention_flops += runs * _attention_flops(line)
            collective = _collective(line, runs, inside, mesh_shape)
            if collective is not None:
                collectives.append(collective)
    return Program(flops, product_bytes, attention_flops, collectives)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Instructions of each computation, one unindented line each, and the name of the entry computation."""
    computations = dict[str, list[str]]()
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None:
            if _INSTRUCTION.match(line):
                current.append(line.strip().removeprefix("ROOT ").removeprefix("%"))
            elif current:
                # Attributes of kernels span several lines.
                current[-1] += line
    return computations, entry


def _visits(
    computations: Mapping[str, Sequence[str]], entry: str, open_rounds: int | None
) -> Iterator[tuple[str, int, str]]:
    """`(computation, number of runs, calling instruction)` through loops, calls and branches."""
    waiting = [(entry, 1, "")]
    while waiting:
        name, runs, caller = waiting.pop()
        yield name, runs, caller
        for line in computations[name]:
            loop = _WHILE.search(line)
            if loop is not None:
                waiting.append(
                    (loop.group(2), runs * _rounds(computations[loop.group(1)], open_rounds), line)
                )
                continue
            branches = _BRANCHES.search(line)
            called = (
                _CALLED.findall(line)
                if branches is None
                else re.findall(r"[\w.\-]+", ",".join(filter(None, branches.groups())))
            )
            waiting.extend((each, runs, line) for each in called if each in computations)


def _rounds(condition: Sequence[str], open_rounds: int | None) -> int:
    """Rounds of a loop that counts from 0 while it is below a constant."""
    lines = (_COUNT.match(line) for line in condition)
    constants = {match.group(1): int(match.group(2)) for match in lines if match}
    compared = re.search(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=(LT|GT)", condition[-1])
    limits = [constants[name] for name in (compared.groups()[:2] if compared else ()) if name in constants]
    if len(limits) != 1 and open_rounds is not None:
        return open_rounds
    if len(limits) != 1:
        raise LoopError(f"a loop's number of rounds is no constant: {condition[-1][:200]}")
    return limits[0]


def _collective(line: str, runs: int, caller: str, mesh_shape: Mapping[str, int]) -> Collective | None:
    _, _, right = line.partition(" = ")
    between = _BETWEEN_SLICES.match(right)
    if between is not None:
        # Through the hosts, which sum what the slices send.
        slices, (dtype, dims) = mesh_shape["slice"], _SHAPE.findall(between.group(1))[0]
        share = 2 * (slices - 1) / slices if "_xla_megascale_reduce_operation" in right else 1.0
        return Collective("send", runs, ("slice",), runs * share * _size((dtype, dims)), f"{dtype}[{dims}]")
    match = _COLLECTIVE.match(right)
    if match is None:
        return None
    # A computation that overlaps with an exchange repeats it; count it only where it begins.
    if _carried(caller):
        return None
    kind, shapes = match.group(2), [_size(shape) for shape in _SHAPE.findall(match.group(1))]
    if kind == "collective-permute" and "-start(" in right:
        shapes = shapes[:1]
    axes, group = _groups(right, mesh_shape)
    if "all-reduce-scatter" in caller:
        kind, shapes = "reduce-scatter", [size / group for size in shapes]
    whole = {"reduce-scatter": group}.get(kind, 1) * sum(shapes)
    share = (group - 1) / group
    sent = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share) * whole
    if group == 1:
        return None
    return Collective(
        kind,
        runs,
        axes,
        runs * sent,
        " ".join(f"{dtype}[{dims}]" for dtype, dims in _SHAPE.findall(match.group(1))),
    )


def _carried(caller: str) -> bool:
    """Whether a fusion's computation repeats an exchange that began in another one."""
    begins = caller.startswith("async-collective-start") or "all-reduce-scatter" in caller
    return " fusion(" in caller and not begins


def _size(shape: tuple[str, str]) -> int:
    dtype, dims = shape
    return _BYTES[dtype] * math.prod(int(dim) for dim in dims.split(",") if dim)


def _groups(line: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which the devices of a group differ, and the size of a group."""
    names, sizes = list(mesh_shape), list(mesh_shape.values())
    count = math.prod(sizes)
    group = _first_group(line, count)
    places = np.array(np.unravel_index(np.array(group), sizes))
    return tuple(name for name, row in zip(names, places, strict=True) if len(set(row.tolist())) > 1), len(
        group
    )


def _first_group(line: str, count: int) -> list[int]:
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line) or re.search(
        r"source_target_pairs=\{\{([\d,]*)\}", line
    )
    if listed is not None:
        return [int(each) for each in listed.group(1).split(",")]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota is not None:
        shape = [int(each) for each in iota.group(3).split(",")]
        ids = np.arange(math.prod(shape)).reshape(shape)
        if iota.group(4):
            ids = ids.transpose([int(each) for each in iota.group(4).split(",")])
        return ids.reshape(int(iota.group(1)), int(iota.group(2)))[0].tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*?)\{([^}]*)\}", line)
    if named is not None:
        shape = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", named.group(1))}
        chosen = re.findall(r"'([^']*)'", named.group(2))
        ids = np.arange(math.prod(shape.values())).reshape(list(shape.values()))
        return ids[tuple(slice(None) if name in chosen else 0 for name in shape)].ravel().tolist()
    return list(range(count))


class _Product(NamedTuple):
    flops: float = 0.0
    bytes: float = 0.0


def _product(line: str, lines: Sequence[str]) -> _Product:
    """FLOPs (2 per multiplication) and bytes of a matrix product.

    The TPU compiler writes matrix products as convolutions.
    """
    _, _, right = line.partition(" = ")
    match = _CONVOLUTION.match(right)
    if match is None:
        return _Product()
    shapes = [match.group(1), _operand(match.group(2), lines), _operand(match.group(3), lines)]
    output, lhs, rhs = (_dims(shape) for shape in shapes)
    moved = float(sum(_size(each) for shape in shapes for each in _SHAPE.findall(shape)[:1]))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", match.group(4))
    if labels is None:
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", match.group(4))
        inner = math.prod(lhs[int(i)] for i in (contracted.group(1) if contracted else "").split(",") if i)
        return _Product(2.0 * math.prod(output) * inner, moved)
    left, right_labels, out = labels.groups()
    window = _window(match.group(4))
    flops = 2.0 * rhs[right_labels.index("i")]
    for label, size in zip(out, output, strict=True):
        if not label.isdigit():
            flops *= size
            continue
        of = {name: values[int(label)] for name, values in window.items() if len(values) > int(label)}
        flops *= _pairs(size, lhs[left.index(label)], rhs[right_labels.index(label)], of)
    return _Product(flops, moved)


# Products of the size queries × keys in each kernel: forward 2, backward 3 for queries and 4 for keys and
# values.
_ATTENTION = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def _attention_flops(line: str) -> float:
    if 'custom_call_target="tpu_custom_call"' not in line:
        return 0.0
    products = next((count for name, count in _ATTENTION.items() if name in line), 0)
    if not products:
        return 0.0
    operands = line.partition("operand_layout_constraints={")[2]
    queries, keys = (
        [int(dim) for dim in dims.split(",")]
        for _, dims in re.findall(r"(bf16|f32)\[(\d+,\d+,\d+)\]", operands)[:2]
    )
    return 2.0 * products * math.prod(queries) * keys[1]


def _pairs(outputs: int, inputs: int, kernel: int, window: Mapping[str, int]) -> int:
    """Number of (output, kernel) positions of a dimension that meet an input, not padding or a gap."""
    stride, low = window.get("stride", 1), window.get("pad", 0)
    dilated, gap = window.get("rhs_dilate", 1), window.get("lhs_dilate", 1)
    meets = 0
    for output, at in itertools.product(range(outputs), range(kernel)):
        place = output * stride - low + at * dilated
        meets += 0 <= place < (inputs - 1) * gap + 1 and place % gap == 0
    return meets


def _window(attributes: str) -> dict[str, list[int]]:
    match = re.search(r"window=\{([^}]*)\}", attributes)
    values = {}
    for name, value in re.findall(r"(\w+)=([\w\-]+)", match.group(1) if match else ""):
        # Only the padding before the first input matters.
        values[name] = [int(part.split("_")[0]) for part in value.split("x")]
    return values


def _operand(name: str, lines: Sequence[str]) -> str:
    return next(line.partition(" = ")[2] for line in lines if line.startswith(f"{name} = "))


def _dims(shape: str) -> list[int]:
    match = _SHAPE.match(shape)
    return [int(dim) for dim in match.group(2).split(",") if dim] if match else []
