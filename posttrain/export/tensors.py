"""Safetensors folders, read part by part and written in a stream, without ever holding a model.

Files are read with plain reads into memory that torch allocated: mapped pages would count as the process's memory, and
a product's last bit depends on the alignment of its operands.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from posttrain.errors import ModelError
from posttrain.export.stream import FileStream
from posttrain.run.folder import write_json_atomic

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100 * 1024**2
"""Longer headers are no headers: the format's own limit."""


@dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    file: BinaryIO
    offset: int


class TensorFolder:
    """The tensors of all `*.safetensors` in a folder (or of one file), by name.

    Raises ModelError for a missing or truncated file, an index that names what is not there, and unknown types.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs: dict[str, TensorSpec] = {}
        self._places: dict[str, Place] = {}
        index = read_index(path)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if index:
            missing = [name for name in sorted(set(index.values())) if not (path / name).is_file()]
            if missing:
                raise ModelError(f"{path} lacks {missing[0]}, which {INDEX} names: fetch or write the model again")
            files = [path / name for name in sorted(set(index.values()))]
        if not files:
            raise ModelError(f"{path} holds no *.safetensors: the weights are missing")
        for file in files:
            self._add(file)
        lost = sorted(index.keys() - self.specs.keys())
        if lost:
            raise ModelError(f"{path}: {INDEX} says that {index[lost[0]]} holds tensor {lost[0]}, but it does not")

    def _add(self, path: Path) -> None:
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 (read from as long as the folder is in use)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        header, start = read_header(path, file)
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ModelError(f"{path}: tensor {name} has type {entry['dtype']}, known are {sorted(DTYPES)}")
            if name in self.specs:
                raise ModelError(f"{path}: tensor {name} is also in another file of the folder")
            spec = TensorSpec(name, tuple(entry["shape"]), DTYPES[entry["dtype"]])
            begin, end = entry["data_offsets"]
            if end - begin != spec.bytes:
                raise ModelError(f"{path}: tensor {name} {list(spec.shape)} has {end - begin} bytes, not {spec.bytes}")
            self.specs[name] = spec
            self._places[name] = Place(file, start + begin)

    def read(self, name: str) -> torch.Tensor:
        spec, place = self.specs[name], self._places[name]
        return _read(place.file, place.offset, spec.shape, spec.dtype)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries `start` up to `stop` along the first dimension, without reading the others."""
        spec, place = self.specs[name], self._places[name]
        inner = spec.shape[1:]
        row_bytes = prod(inner) * spec.dtype.itemsize
        return _read(place.file, place.offset + start * row_bytes, (stop - start, *inner), spec.dtype)

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.specs.values())


def read_index(folder: Path) -> dict[str, str]:
    """Which file of a sharded folder holds which tensor; empty where there is no index."""
    try:
        index = json.loads((folder / INDEX).read_text())["weight_map"]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder / INDEX} cannot be read: {error!r}") from error
    return dict(index)


def read_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The tensors' entries and where the data begins; ModelError where the file is no whole safetensors file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    try:
        if not 2 <= length <= min(size - 8, HEADER_LIMIT):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        promised = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no readable safetensors file: {error}") from error
    if size != promised:
        raise ModelError(
            f"{path} is no readable safetensors file: it has {size} bytes, its header promises {promised}. "
            f"Was it cut short? Fetch or write it again"
        )
    return header, 8 + length


def _read(file: BinaryIO, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        left = as_bytes(tensor)
        while left:
            count = os.preadv(file.fileno(), [left], offset)
            if count == 0:
                raise ModelError(f"{file.name} ended while it was read: was it changed meanwhile?")
            left, offset = left[count:], offset + count
    return tensor


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


class ShardWriter:
    """One safetensors file written front to back: every tensor is announced, then its bytes follow in that order.

    The file gets its name when all of it is on the disk.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in specs:
            end = offset + spec.bytes
            header[spec.name] = {
                "dtype": NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._bytes_left = offset
        self._header = len(text).to_bytes(8, "little") + text
        self._stream = FileStream(path)

    def write(self, tensor: torch.Tensor) -> None:
        """Append the next tensor, or the next part of it."""
        self._bytes_left -= tensor.nbytes
        if tensor.numel():
            self._stream.write(as_bytes(tensor.contiguous()))

    def __enter__(self) -> "ShardWriter":
        self._stream.__enter__()
        self._stream.write(self._header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert kind is not None or self._bytes_left == 0, f"{self._bytes_left} announced bytes were not written"
        self._stream.__exit__(kind, value, trace)


def write_index(folder: Path, shards: list[list[TensorSpec]], names: list[str]) -> None:
    """`model.safetensors.index.json`, as transformers reads it."""
    weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
    total = sum(spec.bytes for shard in shards for spec in shard)
    write_json_atomic(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
