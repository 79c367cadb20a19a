"""Keys and values of a decode batch: one slot per sequence, all slots on one clock.

Every decode step writes one column, the same for all slots, so that a step needs no index and no mask of its own: what
a slot may see is written into the keys when the slot is filled. A layer holds as many columns as its window, or as the
longest sequence, and they are used in turn; what falls out of a window is overwritten when it does.

A key has two more components than a head. The first is added to every logit (a query has 1 there): 0 where the slot
may look, `HIDDEN` elsewhere. The second is 1 in column 0 alone, whose value is zero: a query has its head's sink there.

Axes: B slot, K key-value head, D head size, E = D + 2, S column, T position of a sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.engine.attention import AttentionPlan, Blocks, Segment
from posttrain.engine.forward import device_of

HIDDEN = -1e30
"""A logit that no softmax sees; finite, as it is multiplied."""
Tensor = torch.Tensor


@dataclass(frozen=True)
class Past:
    """Keys [K, T, D] and values of one sequence, per layer; where a layer has a window, its last positions alone."""

    length: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Prefill:
    """New tokens of several sequences in one packed row, each behind what is cached of it.

    The forward pass leaves its keys and values here.
    """

    def __init__(self, segments: Sequence[tuple[int, int]], pasts: Sequence[Past | None]) -> None:
        self.segments, self.pasts = segments, pasts
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        fresh = not any(pasts)
        self.plan = AttentionPlan(tuple(Segment(*span) for span in segments)) if fresh else None
        """How the row attends, where nothing of it is cached."""
        self._blocks: dict[tuple[tuple[int, ...], int | None], Blocks] = {}

    def note(self, key_1KTD: Tensor, value_1KTD: Tensor) -> None:
        """Keep what a layer hands over; layers come in their order."""
        self.keys.append(key_1KTD)
        self.values.append(value_1KTD)

    def behind_cached(
        self, layer: int, key_1KTD: Tensor, value_1KTD: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Blocks]:
        """Keys and values with the cached ones in front, and the blocks of the row's queries over them."""
        lengths = tuple(0 if past is None else past.keys[layer].shape[1] for past in self.pasts)
        asked = lengths, window
        if asked not in self._blocks:
            self._blocks[asked] = self._cut(*asked)
        known = [past for past in self.pasts if past is not None]
        keys = torch.cat([*(past.keys[layer][None] for past in known), key_1KTD], 2)
        values = torch.cat([*(past.values[layer][None] for past in known), value_1KTD], 2)
        return keys, values, self._blocks[asked]

    def _cut(self, lengths: tuple[int, ...], window: int | None) -> Blocks:
        total, at, segments = sum(lengths), 0, []
        for (start, stop), length in zip(self.segments, lengths, strict=True):
            segments.append(Segment(total + start, total + stop, (at, at + length) if length else None))
            at += length
        blocks = AttentionPlan(tuple(segments)).blocks(window)
        return Blocks(replace(block, queries=(block.queries[0] - total, block.queries[1] - total)) for block in blocks)

    def after(self, number: int) -> Past:
        """What is cached of a sequence when the forward pass is over."""
        (start, stop), past = self.segments[number], self.pasts[number]
        keys = [row[0, :, start:stop] for row in self.keys]
        values = [row[0, :, start:stop] for row in self.values]
        if past is not None:
            keys = [torch.cat(pair, 1) for pair in zip(past.keys, keys, strict=True)]
            values = [torch.cat(pair, 1) for pair in zip(past.values, values, strict=True)]
        return Past((past.length if past else 0) + stop - start, tuple(keys), tuple(values))


class SlotCache:
    """keys: per layer [B · K, E, 1 + S]; values: per layer [B · K, 1 + S, D]. `lengths_B` counts each slot's positions.

    `order` is how a key's components are arranged here, where that is not the model's way.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        shape: tuple[int, int],
        slots: int,
        positions: int,
        like: Tensor,
        clock: int = 0,
        order: Tensor | None = None,
    ) -> None:
        self.windows, self.slots, self.positions, self.clock, self.order = windows, slots, positions, clock, order
        self.lengths_B = torch.zeros(slots, dtype=torch.long, device=like.device)
        self.kv_heads, self.size = shape
        self._back = None if order is None else torch.argsort(order)
        self._all_columns = False
        self.furthest = 0
        """No slot has a position beyond this one."""
        self.keys = [self._new_keys(like, self.span(layer)) for layer in range(len(windows))]
        self.values = [
            like.new_zeros(slots * self.kv_heads, 1 + self.span(layer), self.size) for layer in range(len(windows))
        ]

    def _new_keys(self, like: Tensor, span: int) -> Tensor:
        keys = like.new_zeros(self.slots * self.kv_heads, self.size + 2, 1 + span)
        keys[:, self.size, 1:] = HIDDEN
        keys[:, self.size + 1, 0] = 1
        return keys

    def span(self, layer: int) -> int:
        """Columns of a layer, without the sink's."""
        return min(self.windows[layer] or self.positions, self.positions)

    def column(self, layer: int) -> int:
        """Where this step writes."""
        return 1 + self.clock % self.span(layer)

    def width(self, layer: int) -> int:
        """Columns that this step reads, from the first."""
        span = self.span(layer)
        return 1 + (span if self._all_columns else min(span, self.clock + 1))

    def store(self, layer: int, key_NE: Tensor, value_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Write this step's column; returns the keys [B · K, E, S] and values [B · K, S, D] to read."""
        keys, values, column, width = self.keys[layer], self.values[layer], self.column(layer), self.width(layer)
        keys.select(2, column).copy_(key_NE)
        values.select(1, column).copy_(value_ND)
        return keys.narrow(2, 0, width), values.narrow(1, 0, width)

    def attend(
        self,
        layer: int,
        query_BH1D: Tensor,
        key_BK1D: Tensor,
        value_BK1D: Tensor,
        sinks_H: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """One new position per slot against what it sees; returns [B, H, 1, D]."""
        slots, heads, _, size = query_BH1D.shape
        query_BH1D = query_BH1D.to(self.keys[layer].dtype)
        key_NE = nn.functional.pad(key_BK1D.reshape(-1, size), (0, 2))
        keys_NES, values_NSD = self.store(layer, key_NE, value_BK1D.reshape(-1, size))
        query_NGD = (query_BH1D * scale).reshape(len(keys_NES), -1, size)
        if softcap is None:
            sink_H = query_BH1D.new_full((heads,), HIDDEN) if sinks_H is None else sinks_H.to(query_BH1D.dtype)
            more_NG2 = torch.stack((torch.ones_like(sink_H), sink_H), -1).expand(slots, -1, -1)
            query_NGE = torch.cat((query_NGD, more_NG2.reshape(len(keys_NES), -1, 2)), -1)
            logits_NGS = (query_NGE @ keys_NES).float()
        else:
            assert sinks_H is None
            logits_NGS = torch.tanh((query_NGD @ keys_NES[:, :size]).float() / softcap) * softcap
            logits_NGS += keys_NES[:, size : size + 1] + keys_NES[:, size + 1 :] * HIDDEN
        weights_NGS = torch.softmax(logits_NGS, -1).to(values_NSD.dtype)
        return (weights_NGS @ values_NSD).view(slots, heads, 1, size)

    def advance(self) -> None:
        """After the last layer of a step."""
        self.clock += 1
        self.furthest += 1
        self.lengths_B = self.lengths_B + 1

    def _columns(self, span: int, count: int) -> Tensor:
        """The columns of the last `count` steps."""
        return 1 + torch.arange(self.clock - count, self.clock, device=self.lengths_B.device) % span

    def place(self, placed: Mapping[int, Past]) -> None:
        """Let slots go on from here; what they held is forgotten."""
        for slot, past in placed.items():
            self._all_columns |= past.length > self.clock
            self.furthest = max(self.furthest, past.length)
            self.lengths_B[slot] = past.length
        for layer in range(len(self.keys)):
            span, (keys_BKES, values_BKSD) = self.span(layer), self._by_slot(layer)
            keys_BKES[list(placed), :, self.size, 1:] = HIDDEN
            counts = {slot: min(span, past.keys[layer].shape[1]) for slot, past in placed.items()}
            columns = {count: self._columns(span, count) for count in set(counts.values())}
            for slot, count in counts.items():
                at, past = columns[count], placed[slot]
                keys_KDT = past.keys[layer][:, -count:].transpose(1, 2).to(keys_BKES.dtype)
                if self.order is not None:
                    keys_KDT = keys_KDT.index_select(1, self.order)
                keys_BKES[slot, :, : self.size].index_copy_(2, at, keys_KDT)
                keys_BKES[slot, :, self.size].index_fill_(1, at, 0)
                values_BKSD[slot].index_copy_(1, at, past.values[layer][:, -count:].to(values_BKSD.dtype))

    def _by_slot(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [B, K, E, S] and values [B, K, S, D]."""
        split = self.slots, self.kv_heads
        return self.keys[layer].unflatten(0, split), self.values[layer].unflatten(0, split)

    def take(self, slot: int, length: int) -> Past:
        """A slot's sequence, to go on later or elsewhere."""
        keys, values = [], []
        for layer in range(len(self.keys)):
            span, (keys_BKES, values_BKSD) = self.span(layer), self._by_slot(layer)
            columns = self._columns(span, min(span, length))
            keys_KTD = keys_BKES[slot, :, : self.size].index_select(2, columns).transpose(1, 2)
            keys.append(keys_KTD if self._back is None else keys_KTD[:, :, self._back])
            values.append(values_BKSD[slot].index_select(1, columns))
        return Past(length, tuple(keys), tuple(values))

    def keep(self, slots: Sequence[int]) -> None:
        """Drop every slot but these."""
        kept = torch.tensor(slots, device=self.lengths_B.device)
        pairs = [self._by_slot(layer) for layer in range(len(self.keys))]
        self.slots = len(slots)
        self.lengths_B = self.lengths_B[kept]
        self.keys = [keys_BKES[kept].flatten(0, 1) for keys_BKES, _ in pairs]
        self.values = [values_BKSD[kept].flatten(0, 1) for _, values_BKSD in pairs]

    def grow(self, positions: int) -> None:
        """Make room for longer sequences."""
        before = [self.span(layer) for layer in range(len(self.keys))]
        self.positions = positions
        for layer, span in enumerate(before):
            wider = self.span(layer)
            if wider == span:
                continue
            source = torch.cat((torch.zeros(1, dtype=torch.long), self._columns(span, span).cpu()))
            target = torch.cat((torch.zeros(1, dtype=torch.long), self._columns(wider, span).cpu()))
            keys, values = self.keys[layer], self.values[layer]
            source, target = source.to(keys.device), target.to(keys.device)
            self.keys[layer] = self._new_keys(keys, wider).index_copy_(2, target, keys.index_select(2, source))
            self.values[layer] = values.new_zeros(len(values), 1 + wider, self.size).index_copy_(
                1, target, values.index_select(1, source)
            )


def empty_cache(
    model: PreTrainedModel, slots: int, positions: int, order: Tensor | None = None, clock: int = 0
) -> SlotCache:
    """A cache of a model's shape, in the type that its products have."""
    config, layers = model.config, model.get_decoder().layers
    # Mixtral's attention reads its window from the configuration.
    windows = [getattr(layer.self_attn, "sliding_window", getattr(config, "sliding_window", None)) for layer in layers]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    device = device_of(model)
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.dtype
    like = torch.empty(0, dtype=dtype, device=device)
    return SlotCache(windows, (config.num_key_value_heads, size), slots, positions, like, clock, order)
