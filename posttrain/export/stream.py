"""Parts computed side by side, and a file written front to back by a thread of its own: arithmetic and the disk work
at the same time."""

import errno
import fcntl
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch

from posttrain.run.folder import fsync_folder

Result = TypeVar("Result")
BUFFER_BYTES = 8 * 1024**2
"""What is handed to the disk at once."""
BUFFERS = 8
"""So many may wait for the disk: it writes on while a part takes long, and a merge took 0.7 s where three took 0.8."""
ALIGNED_BYTES = 4096
"""Direct writes are whole multiples of it."""
SYNC_BYTES = 256 * 1024**2
"""Where a file system has no direct writes: synced in such portions, or the kernel hoards a whole file and the last
sync waits for all of it."""


def in_order(parts: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """What the parts give, in their order; as many are computed at a time as torch has threads, each by one thread.

    An operation that is shared out among threads waits for the slowest of them, which on a busy machine is slower than
    one thread alone.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            begun: deque[Future[Result]] = deque()
            for part in parts:
                begun.append(pool.submit(part))
                if len(begun) > threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
    finally:
        torch.set_num_threads(threads)


class FileStream:
    """`write` appends bytes; at the end of the block the file is synced and renamed to `path`, unless the block or the
    disk failed: then nothing is left of it.

    Bytes go past the page cache where the file system lets them: nothing is copied by the kernel, and other files stay
    cached.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.part")
        self._free: Queue[mmap.mmap] = Queue()
        for _ in range(BUFFERS):
            self._free.put(mmap.mmap(-1, BUFFER_BYTES))
        self._filled: Queue[tuple[mmap.mmap, int] | None] = Queue()
        self._filling, self._used = self._free.get(), 0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._drain, name=f"writes {path.name}", daemon=True)

    def write(self, part: bytes | memoryview) -> None:
        """Raises what the disk answered to an earlier part."""
        left = np.frombuffer(part, np.uint8)
        while left.size:
            if self._failure is not None:
                raise self._failure
            room = np.frombuffer(self._filling, np.uint8)[self._used :]
            count = min(room.size, left.size)
            room[:count] = left[:count]  # NumPy copies while other threads compute.
            self._used, left = self._used + count, left[count:]
            if self._used == BUFFER_BYTES:
                self._filled.put((self._filling, self._used))
                self._filling, self._used = self._free.get(), 0

    def _drain(self) -> None:
        descriptor, is_direct = -1, True
        written = unsynced = 0
        try:
            descriptor, is_direct = _create(self.partial)
            while (filled := self._filled.get()) is not None:
                buffer, used = filled
                # The file's end is cut to its size afterwards.
                size = -(-used // ALIGNED_BYTES) * ALIGNED_BYTES if is_direct else used
                left = memoryview(buffer)[:size]
                while left:
                    left = left[_write(descriptor, left) :]
                self._free.put(buffer)
                written, unsynced = written + used, unsynced + used
                if not is_direct and unsynced >= SYNC_BYTES:
                    os.fdatasync(descriptor)
                    unsynced = 0
            os.ftruncate(descriptor, written)
            os.fsync(descriptor)
        except BaseException as error:
            self._failure = error
            while (filled := self._filled.get()) is not None:
                self._free.put(filled[0])
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def __enter__(self) -> "FileStream":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._filled.put((self._filling, self._used))
        self._filled.put(None)
        self._thread.join()
        if kind is None and self._failure is None:
            os.replace(self.partial, self.path)
            fsync_folder(self.path.parent)
            return
        self.partial.unlink(missing_ok=True)
        if kind is None and self._failure is not None:
            raise self._failure


def _write(descriptor: int, part: memoryview) -> int:
    try:
        return os.write(descriptor, part)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # A disk or a limit that ends between two blocks, or direct writes that are promised and not had.
    fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)
    return os.write(descriptor, part)


def _create(file: Path) -> tuple[int, bool]:
    """A descriptor to write an empty file with, and whether its writes go past the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(file, flags | os.O_DIRECT, 0o666), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(file, flags, 0o666), False
