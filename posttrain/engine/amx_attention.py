"""The backward pass of attention over packed rows on the tile unit (`posttrain.engine.amx`).

A thread takes one head of a family of documents, a prefix and all that see it, after the other, and of a document some
queries at a time against the keys that these may see. Probabilities and their gradients are rounded to bfloat16 before
they meet values and keys, as in FlashAttention (arXiv 2205.14135); sums are float32. A head's gradients of keys and
values are added up in one order, whichever thread makes them.

Axes as in `posttrain.engine.attention`; F family, N document.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import cfunc, njit

from posttrain.engine import amx, attention, jit
from posttrain.engine.amx import COLUMNS, SUM, TILE_BYTES
from posttrain.engine.jit import array_at, exp2, fill_up, from_bfloat16, next_number, to_bfloat16

QUERIES = 64
LOG2_E = np.float32(attention.LOG2_E)

Tensor = torch.Tensor

JOB = np.dtype(
    [("next", "i8")]
    + [(name, "i8") for name in ("families", "heads", "kv_heads", "tokens", "size", "window", "longest")]
    + [(name, "i8") for name in ("first", "documents", "lse", "overlap", "out", "dq", "dk", "dv")]
    + [(f"{name}{stride}", "i8") for name in ("q", "k", "v", "grad") for stride in ("", "_head", "_row")]
    + [("scale", "f4")]
)
"""What the kernel is given: a counter that its threads share, sizes, addresses, strides in bytes."""


class _Places(NamedTuple):
    """Addresses of a thread's own memory: a document's keys and values, then what belongs to a block of queries."""

    keys: int
    values: int
    turned_keys: int
    """Packed with head size along the sum."""
    turned_values: int
    packed_keys: int
    """Packed with keys along the sum."""
    dk: int
    """Float32, head size first."""
    dv: int
    q: int
    grad: int
    turned: int
    packed: int
    weights: int
    slopes: int
    logits: int
    others: int
    end: int


@njit(cache=True)
def _places(job: Any, start: int) -> _Places:
    matrix, rows, square = 2 * job.size * job.longest, 2 * job.size * QUERIES, 2 * QUERIES * max(job.longest, job.size)
    values = start + matrix
    turned_keys = values + matrix
    turned_values = turned_keys + matrix
    packed_keys = turned_values + matrix
    dk = packed_keys + matrix
    dv = dk + 2 * matrix
    q = dv + 2 * matrix
    grad = q + rows
    turned = grad + rows
    packed = turned + rows
    weights = packed + square
    slopes = weights + square
    logits = slopes + square
    others = logits + 2 * square
    first = start, values, turned_keys, turned_values, packed_keys, dk, dv
    return _Places(*first, q, grad, turned, packed, weights, slopes, logits, others, others + 2 * square)


@njit(cache=True)
def _copy(address: int, stride: int, start: int, stop: int, out: np.ndarray, at: int) -> None:
    source = array_at(address, (stop, stride // 2), np.uint16)
    for row in range(start, stop):
        for column in range(out.shape[1]):
            out[at + row - start, column] = source[row, column]


@njit(cache=True)
def _load_document(job: Any, document: tuple[int, int, int, int], head: int, at: _Places, keys: int) -> None:
    """The keys and values that a document sees, prefix first, in every form that is needed."""
    start, stop, prefix_start, prefix_stop = document
    prefix = prefix_stop - prefix_start
    kv_head = head // (job.heads // job.kv_heads)
    first_k, first_v = job.k + kv_head * job.k_head, job.v + kv_head * job.v_head
    for source, stride, place in ((first_k, job.k_row, at.keys), (first_v, job.v_row, at.values)):
        out = array_at(place, (keys, job.size), np.uint16)
        _copy(source, stride, prefix_start, prefix_stop, out, 0)
        _copy(source, stride, start, stop, out, prefix)
        out[prefix + stop - start :] = 0
    amx.pack_turned(at.keys, 2 * job.size, job.size, keys, at.turned_keys, job.size)
    amx.pack_turned(at.values, 2 * job.size, job.size, keys, at.turned_values, job.size)
    amx.pack(at.keys, 2 * job.size, keys, job.size, at.packed_keys, keys)
    array_at(at.dk, (job.size * keys,), np.float32)[:] = 0
    array_at(at.dv, (job.size * keys,), np.float32)[:] = 0


@njit(cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _overlap(grad: np.ndarray, out: np.ndarray, rows: int, start: int, head: int, found: np.ndarray) -> None:
    """Σ grad · out of every query."""
    for row in range(rows):
        total = np.float32(0.0)
        for column in range(grad.shape[1]):
            total += from_bfloat16(grad[row, column]) * from_bfloat16(out[start + row, head, column])
        found[row] = total


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def _slopes(
    logits: np.ndarray,
    others: np.ndarray,
    rows: int,
    position: int,
    first: int,
    window: int,
    scale: np.float32,
    lse: np.ndarray,
    overlap: np.ndarray,
    weights: np.ndarray,
    slopes: np.ndarray,
) -> None:
    """Probabilities, and gradients of logits without their scale; `scale` includes log2 e, `lse` is to base 2.

    `position` is the first query's and `first` the first key's among the document's keys.
    """
    columns = logits.shape[1]
    for row in range(rows):
        begin = max(0, position + row - window + 1 - first) if window else 0
        end = position + row + 1 - first
        lse_here, overlap_here = lse[row], overlap[row]
        # One result a loop: more at once are not vectorised as well.
        for column in range(begin, end):
            logits[row, column] = exp2(logits[row, column] * scale - lse_here)
        for column in range(begin):
            logits[row, column] = 0
        for column in range(end, columns):
            logits[row, column] = 0
        for column in range(columns):
            weights[row, column] = to_bfloat16(logits[row, column])
        for column in range(columns):
            slopes[row, column] = to_bfloat16(logits[row, column] * (others[row, column] - overlap_here))


@njit(cache=True)
def _add_turned(
    at: _Places, rows: int, matrix: int, size: int, filled: int, columns: int, sums: int, stride: int
) -> None:
    """Adds rowsᵀ [size, filled] · matrix [filled, columns] to float32 sums."""
    amx.pack(rows, 2 * size, filled, size, at.packed, filled)
    tiles = filled // SUM
    amx.turn_packed(at.packed, size // COLUMNS * tiles, at.turned)
    amx.pack(matrix, 2 * columns, filled, columns, at.packed, filled)
    amx.add_product(at.turned, 64, tiles * TILE_BYTES, TILE_BYTES, at.packed, filled, columns, sums, stride, size)


@njit(cache=True, error_model="numpy")
def _add_block(job: Any, head: int, start: int, rows: int, position: int, keys: int, at: _Places) -> None:
    """Some queries' gradients, and what they add to those of the document's keys and values."""
    size, filled, scale = job.size, fill_up(rows, SUM), job.scale * LOG2_E
    first = max(0, position - job.window + 1) // SUM * SUM if job.window else 0
    columns = fill_up(position + rows, SUM) - first
    q, grad = array_at(at.q, (filled, size), np.uint16), array_at(at.grad, (filled, size), np.uint16)
    for source, stride, out in (
        (job.q + head * job.q_head, job.q_row, q),
        (job.grad + head * job.grad_head, job.grad_row, grad),
    ):
        _copy(source, stride, start, start + rows, out, 0)
        out[rows:] = 0
    panel = size // SUM * TILE_BYTES
    seen = first // COLUMNS * panel
    amx.product(at.q, 2 * size, at.turned_keys + seen, size, columns, at.logits, 4 * columns, filled, panel)
    amx.product(at.grad, 2 * size, at.turned_values + seen, size, columns, at.others, 4 * columns, filled, panel)
    overlap = array_at(job.overlap, (job.heads, job.tokens), np.float32)[head, start : start + rows]
    _overlap(grad, array_at(job.out, (job.tokens, job.heads, size), np.uint16), rows, start, head, overlap)
    lse = array_at(job.lse, (job.heads, job.tokens), np.float32)[head, start : start + rows] * LOG2_E
    shape = (filled, columns)
    logits, others = array_at(at.logits, shape, np.float32), array_at(at.others, shape, np.float32)
    weights, slopes = array_at(at.weights, shape, np.uint16), array_at(at.slopes, shape, np.uint16)
    _slopes(logits, others, rows, position, first, job.window, scale, lse, overlap, weights, slopes)
    weights[rows:] = 0
    slopes[rows:] = 0
    _add_turned(at, at.grad, at.weights, size, filled, columns, at.dv + 4 * first, 4 * keys)
    _add_turned(at, at.q, at.slopes, size, filled, columns, at.dk + 4 * first, 4 * keys)
    right, panel = at.packed_keys + first // SUM * TILE_BYTES, keys // SUM * TILE_BYTES
    amx.product(at.slopes, 2 * columns, right, columns, size, at.logits, 4 * size, filled, panel)
    found = array_at(at.logits, (filled, size), np.float32)
    dq = array_at(job.dq, (job.tokens, job.heads, size), np.uint16)
    for row in range(rows):
        for column in range(size):
            dq[start + row, head, column] = to_bfloat16(found[row, column] * job.scale)


@njit(cache=True)
def _add_document(job: Any, document: tuple[int, int, int, int], head: int, at: _Places, keys: int) -> None:
    """A document's gradients of keys and values to those of the row."""
    start, stop, prefix_start, prefix_stop = document
    prefix = prefix_stop - prefix_start
    for place, total in ((at.dk, job.dk), (at.dv, job.dv)):
        found = array_at(place, (job.size, keys), np.float32)
        sums = array_at(total, (job.heads, job.size, job.tokens), np.float32)[head]
        for component in range(job.size):
            for key in range(prefix):
                sums[component, prefix_start + key] += found[component, key]
            for key in range(stop - start):
                sums[component, start + key] += found[component, prefix + key]


@cfunc("void(int64)", cache=True)
def _backward(address: int) -> None:
    job = array_at(address, (1,), JOB)[0]
    memory = np.empty(_places(job, 0).end + 64, np.uint8)
    at = _places(job, fill_up(memory.ctypes.data, 64))
    first = array_at(job.first, (job.families + 1,), np.int64)
    documents = array_at(job.documents, (first[job.families], 4), np.int64)
    before = amx.begin()
    number = next_number(address)
    while number < job.families * job.heads:
        family, head = number // job.heads, number % job.heads
        for index in range(first[family], first[family + 1]):
            document = (documents[index, 0], documents[index, 1], documents[index, 2], documents[index, 3])
            start, stop, prefix = document[0], document[1], document[3] - document[2]
            keys = fill_up(prefix + stop - start, SUM)
            _load_document(job, document, head, at, keys)
            for row in range(start, stop, QUERIES):
                _add_block(job, head, row, min(QUERIES, stop - row), prefix + row - start, keys, at)
            _add_document(job, document, head, at, keys)
        number = next_number(address)
    amx.end(before)
    memory[0] = 0  # numba frees an array after its last use.


@dataclass(frozen=True)
class Families:
    """A row's documents (start, stop, prefix's start and stop), a family's one after another, costly ones first."""

    first_F: np.ndarray
    document_N4: np.ndarray
    longest: int
    """Keys that a document sees at most, whole tiles."""

    @classmethod
    def of(cls, documents: Iterable[attention.Segment]) -> "Families":
        found: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
        for document in documents:
            own, prefix = (document.start, document.stop), document.prefix
            found.setdefault(prefix or own, []).append((*own, *(prefix or (0, 0))))

        def pairs(family: list[tuple[int, int, int, int]]) -> int:
            return sum((stop - start) * (stop - start + 2 * (end - begin)) for start, stop, begin, end in family)

        families = sorted(found.values(), key=pairs, reverse=True)
        document_N4 = np.array([document for family in families for document in family], np.int64)
        longest = int((document_N4[:, 1] - document_N4[:, 0] + document_N4[:, 3] - document_N4[:, 2]).max())
        return cls(np.cumsum([0, *map(len, families)]), document_N4, -(-longest // SUM) * SUM)


def gradients(
    q_1HTD: Tensor,
    k_1KTD: Tensor,
    v_1KTD: Tensor,
    out_1HTD: Tensor,
    lse_HT: Tensor,
    grad_1HTD: Tensor,
    families: Families,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, and Σ grad · out [H, T], of bfloat16 with head sizes of whole tiles.

    The log-sum-exp may have a sink in it, and the output with it.
    """
    _, heads, tokens, size = q_1HTD.shape
    kv_heads = k_1KTD.shape[1]
    out_THD = out_1HTD[0].transpose(0, 1).contiguous()
    dq_THD, overlap_HT = torch.empty_like(out_THD), torch.empty_like(lse_HT)
    dk_HDT, dv_HDT = (torch.zeros(heads, size, tokens) for _ in range(2))
    given: dict[str, Any] = {
        "families": len(families.first_F) - 1,
        "heads": heads,
        "kv_heads": kv_heads,
        "tokens": tokens,
        "size": size,
    }
    given |= {"first": families.first_F, "documents": families.document_N4, "longest": families.longest}
    given |= {"window": window or 0, "scale": scale, "lse": lse_HT.contiguous()}
    given |= {"overlap": overlap_HT, "out": out_THD, "dq": dq_THD, "dk": dk_HDT, "dv": dv_HDT}
    for name, tensor in (("q", q_1HTD), ("k", k_1KTD), ("v", v_1KTD), ("grad", grad_1HTD)):
        tensor = tensor if tensor.stride(3) == 1 else tensor.contiguous()
        given |= {name: tensor, f"{name}_head": 2 * tensor.stride(1), f"{name}_row": 2 * tensor.stride(2)}
    jit.run(_backward, JOB, given)
    dk_KTD, dv_KTD = (x_HDT.unflatten(0, (kv_heads, -1)).sum(1).transpose(1, 2) for x_HDT in (dk_HDT * scale, dv_HDT))
    return dq_THD.transpose(0, 1)[None], dk_KTD.to(k_1KTD.dtype)[None], dv_KTD.to(v_1KTD.dtype)[None], overlap_HT
