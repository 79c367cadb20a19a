"""Parts computed side by side, and a file written front to back by a thread of its own: arithmetic and the disk work
at the same time."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from types import TracebackType
from typing import TypeVar

import torch

from posttrain.run.folder import fsync_folder

Result = TypeVar("Result")
QUEUED_PARTS = 3
"""Parts that may wait for the disk; more would only take memory."""
SYNC_BYTES = 64 * 1024**2
"""Sent to the disk in such portions, or the kernel hoards a whole file and the last sync waits for all of it."""


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
    """`write` queues bytes that must not change any more; at the end of the block the file is synced and renamed to
    `path`, unless the block or the disk failed: then nothing is left of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.part")
        self._parts: Queue[bytes | memoryview | None] = Queue(QUEUED_PARTS)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._drain, name=f"writes {path.name}", daemon=True)

    def write(self, part: bytes | memoryview) -> None:
        """Raises what the disk answered to an earlier part."""
        if self._failure is not None:
            raise self._failure
        self._parts.put(part)

    def _drain(self) -> None:
        unsynced = 0
        try:
            with open(self.partial, "wb", buffering=0) as file:
                while (part := self._parts.get()) is not None:
                    left = memoryview(part)
                    while left:
                        left = left[file.write(left) :]
                    unsynced += len(part)
                    if unsynced >= SYNC_BYTES:
                        os.fdatasync(file.fileno())
                        unsynced = 0
                os.fsync(file.fileno())
        except BaseException as error:
            self._failure = error
            while self._parts.get() is not None:
                pass

    def __enter__(self) -> "FileStream":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parts.put(None)
        self._thread.join()
        if kind is None and self._failure is None:
            os.replace(self.partial, self.path)
            fsync_folder(self.path.parent)
            return
        self.partial.unlink(missing_ok=True)
        if kind is None and self._failure is not None:
            raise self._failure
