"""A dataset's files, appended to block by block, and where to go on after a kill."""

import io
import json
import os
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from posttrain.data.encode import Block
from posttrain.data.shard import FILES
from posttrain.run import faults
from posttrain.run.folder import write_json_atomic
from posttrain.run.journal import as_line

PART_BYTES = 32 * 2**20
"""A kill loses at most the last so many bytes."""
TYPES = {"tokens.npy": np.int32, "targets.npy": np.bool_, "offsets.npy": np.int64, "prefix.npy": np.int32}
IDS, FAULTY, PROGRESS = "ids.bin", "faulty_rows.jsonl", "progress.json"
HEADER_BYTES = 128


def npy_header(name: str, length: int) -> bytes:
    """The header of a flat array: as long for any length, so that it can be written when the length is known."""
    made = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(TYPES[name]))
    np.lib.format.write_array_header_1_0(made, {"descr": descr, "fortran_order": False, "shape": (length,)})
    assert len(made.getvalue()) == HEADER_BYTES
    return made.getvalue()


class ShardWriter:
    """Continues in `folder` where its progress says, or begins. The dataset's own files are in `data` below it."""

    def __init__(self, folder: Path, content: str) -> None:
        self.folder, self.data = folder, folder / "data"
        self.source, self.source_read = 0, 0
        """Where reading goes on: so many rows of this source were read."""
        self.rows_read = 0
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        """Faulty rows by reason."""
        self.parts: defaultdict[int, Counter[str]] = defaultdict(Counter)
        """Rows and samples by source."""
        self.num_tokens = 0
        self._names = (*FILES[content], IDS, FAULTY)
        sizes = self._continue() if (folder / PROGRESS).exists() else self._begin()
        self._files: dict[str, BinaryIO] = {name: self._path(name).open("r+b") for name in self._names}
        for name, file in self._files.items():
            file.truncate(sizes[name])
            file.seek(sizes[name])
        self._saved_bytes = self._bytes

    def _path(self, name: str) -> Path:
        return (self.folder if name == IDS else self.data) / name

    def _begin(self) -> dict[str, int]:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.data.mkdir(parents=True)
        first = {name: npy_header(name, 0) if name in TYPES else b"" for name in self._names}
        if "offsets.npy" in first:
            first["offsets.npy"] += bytes(8)
        for name, content in first.items():
            self._path(name).write_bytes(content)
        return {name: len(content) for name, content in first.items()}

    def _continue(self) -> dict[str, int]:
        told: dict[str, Any] = json.loads((self.folder / PROGRESS).read_text())
        self.source, self.source_read = told["source"], told["source_read"]
        self.rows_read, self.num_tokens = told["rows_read"], told["tokens"]
        self.counts, self.reasons = Counter(told["counts"]), Counter(told["reasons"])
        self.parts.update({int(number): Counter(part) for number, part in told["parts"].items()})
        sizes: dict[str, int] = told["sizes"]
        return sizes

    @property
    def num_rows(self) -> int:
        return sum(part["rows"] for part in self.parts.values())

    @property
    def num_samples(self) -> int:
        return sum(part["samples"] for part in self.parts.values())

    @property
    def _bytes(self) -> int:
        return sum(file.tell() for file in self._files.values())

    def append(self, block: Block, source: int, rows_read: int) -> None:
        """The block that was made of the next so many rows of `source`."""
        self._files["rows.jsonl"].write(b"".join(block.rows))
        self._files[IDS].write(np.array(block.ids, dtype=np.uint64).tobytes())
        if "tokens.npy" in self._files:
            ends = self.num_tokens + np.cumsum(block.lengths, dtype=np.int64)
            self._files["tokens.npy"].write(block.tokens.tobytes())
            self._files["targets.npy"].write(block.targets)
            self._files["offsets.npy"].write(ends.tobytes())
        if "prefix.npy" in self._files:
            self._files["prefix.npy"].write(np.array(block.prefixes, dtype=np.int32).tobytes())
        for place, fault in block.faults:
            self._files[FAULTY].write(as_line({"place": place, "field": fault.field, "reason": fault.reason}))
        self.num_tokens += len(block.tokens)
        self.counts.update(block.counts)
        self.parts[source].update(rows=len(block.rows), samples=len(block.lengths))
        self.source_read = rows_read + (self.source_read if source == self.source else 0)
        self.source = source
        self.rows_read += rows_read
        if self._bytes - self._saved_bytes >= PART_BYTES:
            self.save()

    def save(self) -> None:
        """From now on a kill comes back to here."""
        self._sync()
        told = {
            "source": self.source,
            "source_read": self.source_read,
            "rows_read": self.rows_read,
            "tokens": self.num_tokens,
            "counts": self.counts,
            "reasons": self.reasons,
            "parts": self.parts,
            "sizes": {name: file.tell() for name, file in self._files.items()},
        }
        write_json_atomic(self.folder / PROGRESS, told)
        self._saved_bytes = self._bytes
        faults.reach("prepare.part_saved")

    def _sync(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Headers with the lengths, and everything on disk; what is in `data` is whole."""
        self.save()
        lengths = {
            "tokens.npy": self.num_tokens,
            "targets.npy": self.num_tokens,
            "offsets.npy": self.num_samples + 1,
            "prefix.npy": self.num_samples // 2,
        }
        for name, length in lengths.items():
            if name in self._files:
                self._files[name].seek(0)
                self._files[name].write(npy_header(name, length))
        self._sync()
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def repeated_ids(self) -> set[int]:
        """Digests of row ids that come more than once."""
        self._files[IDS].flush()
        digests = np.sort(np.fromfile(self._path(IDS), dtype=np.uint64))
        return set(digests[1:][digests[1:] == digests[:-1]].tolist())
