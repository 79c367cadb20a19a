"""Safetensors folders, read tensor by tensor and written in a stream, without ever holding a model."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from posttrain.errors import ModelError
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


@dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class TensorFolder:
    """The tensors of all `*.safetensors` in a folder (or of one file), by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{path} holds no *.safetensors: the weights are missing")
        self.specs: dict[str, TensorSpec] = {}
        self._handles: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} is no readable safetensors file: {error}") from error
            for name in handle.keys():  # noqa: SIM118 (the handle is not a mapping)
                part = handle.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise ModelError(f"{file}: tensor {name} has type {part.get_dtype()}, known are {sorted(DTYPES)}")
                if name in self._handles:
                    raise ModelError(f"{file}: tensor {name} is also in another file of the folder")
                self.specs[name] = TensorSpec(name, tuple(part.get_shape()), DTYPES[part.get_dtype()])
                self._handles[name] = handle

    def read(self, name: str) -> torch.Tensor:
        return self._handles[name].get_tensor(name)

    def read_slice(self, name: str, index: int) -> torch.Tensor:
        """The `index`-th slice along the first dimension, without reading the others."""
        return self._handles[name].get_slice(name)[index]

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.specs.values())


class ShardWriter:
    """One safetensors file written front to back: every tensor is announced, then its bytes follow in that order."""

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
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: torch.Tensor) -> None:
        """Append the next tensor, or the next slice of it."""
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._bytes_left -= raw.nbytes
        self._file.write(raw.data)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._file.close()
        assert kind is not None or self._bytes_left == 0, f"{self._bytes_left} announced bytes were not written"


def write_index(folder: Path, shards: list[list[TensorSpec]], names: list[str]) -> None:
    """`model.safetensors.index.json`, as transformers reads it."""
    weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
    total = sum(spec.bytes for shard in shards for spec in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json_atomic(folder / "model.safetensors.index.json", index)
