"""Whole items into padding-free micro-batches under a token budget.

An item is what must not be split: a sample, a pair, or an episode group. Its sequences may share a prefix, which
stands in the row once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from posttrain.engine.attention import AttentionPlan, Segment

LARGEST_MULTIPLE = 64
"""Rows are filled up to at most this multiple: oneDNN compiles a kernel for every new shape it meets."""


@dataclass(frozen=True)
class Item:
    """Sequences with a common prefix (empty for a plain sample).

    `tokens[i]` continues the prefix; `targets[i]` says which of its tokens are predicted and trained. The prefix
    holds no targets.
    """

    prefix: np.ndarray
    tokens: tuple[np.ndarray, ...]
    targets: tuple[np.ndarray, ...]

    @property
    def size(self) -> int:
        return len(self.prefix) + sum(map(len, self.tokens))

    @property
    def num_targets(self) -> int:
        return int(sum(int(mask.sum()) for mask in self.targets))


@dataclass(frozen=True)
class MicroBatch:
    """One packed row. N targets: `source_N` is the row position that predicts token `target_N`."""

    input_ids_1T: torch.Tensor
    position_ids_1T: torch.Tensor
    plan: AttentionPlan
    source_N: torch.Tensor
    target_N: torch.Tensor
    sequence_N: torch.Tensor
    """Number of the target's sequence, counted over the items of the whole step."""
    sequences: range
    """The sequences of this row, in that count."""


def plan_micro_batches(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Group item numbers in order so that no group exceeds `budget` tokens; a larger item goes alone."""
    groups: list[list[int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = budget
        groups[-1].append(number)
        room -= size
    return groups


def pack(items: Sequence[Item], first_sequence: int) -> MicroBatch:
    """Lay items one after another in a row; every sequence sees its own prefix and itself only."""
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    sources: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    segments: list[Segment] = []
    at, sequence = 0, first_sequence
    for item in items:
        prefix = None
        if len(item.prefix):
            prefix = (at, at + len(item.prefix))
            segments.append(Segment(*prefix))
            tokens.append(item.prefix)
            positions.append(np.arange(len(item.prefix)))
            at = prefix[1]
        for ids, mask in zip(item.tokens, item.targets, strict=True):
            # An episode that its sampler lost has no tokens.
            if len(ids):
                segments.append(Segment(at, at + len(ids), prefix))
            tokens.append(ids)
            positions.append(np.arange(len(item.prefix), len(item.prefix) + len(ids)))
            chosen = np.flatnonzero(mask)
            source = at + chosen - 1
            if prefix is None:
                chosen, source = chosen[chosen > 0], source[chosen > 0]
            else:
                source = np.where(chosen == 0, prefix[1] - 1, source)
            sources.append(source)
            targets.append(ids[chosen])
            owners.append(np.full(len(chosen), sequence))
            at += len(ids)
            sequence += 1
    return MicroBatch(
        input_ids_1T=_row(tokens)[None],
        position_ids_1T=_row(positions)[None],
        plan=AttentionPlan(tuple(segments)),
        source_N=_row(sources),
        target_N=_row(targets),
        sequence_N=_row(owners),
        sequences=range(first_sequence, sequence),
    )


def row_multiple(rows: int, parts: int) -> int:
    """The power of two that rows are filled up to: at most a quarter of a part's mean share of them."""
    share = rows // (4 * parts)
    return 1 if share < 2 else min(LARGEST_MULTIPLE, 1 << (share.bit_length() - 1))


def filled_up(batch: MicroBatch) -> MicroBatch:
    """The row with at most a sixteenth of it once more at its end, as a document of its own that nobody looks at.

    Its length is then one of few.
    """
    length = batch.input_ids_1T.shape[1]
    missing = -length % row_multiple(length, 4)
    if not missing:
        return batch
    return replace(
        batch,
        input_ids_1T=torch.cat((batch.input_ids_1T, batch.input_ids_1T[:, :missing]), 1),
        position_ids_1T=torch.cat((batch.position_ids_1T, torch.arange(missing)[None]), 1),
        plan=AttentionPlan((*batch.plan.segments, Segment(length, length + missing))),
    )


def _row(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
