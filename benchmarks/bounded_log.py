"""A log that stays small enough to be brought back, however much the programs that write to it say."""

import os
import pathlib
import threading
from types import TracebackType

CUT = "\n[... {:,} bytes were cut out here, so that this file does not become too large ...]\n"


class BoundedLog:
    """A file that is appended to in sections. Of a section that grows too long the middle is cut out.

    What was written is on disk at once. Several threads may write.
    """

    def __init__(self, path: pathlib.Path, most: int) -> None:
        self._file = path.open("a+b")
        self._most = most
        self._lock = threading.Lock()
        self.begin_section(1)

    def begin_section(self, to_come: int) -> None:
        """From here on something else is told of; to_come: how many sections will be, this one included."""
        self._start = self._file.seek(0, os.SEEK_END)
        # Where earlier commands have filled the file, a section may still say a little.
        self._room = max(2**14, (self._most - self._start) // to_come)
        self._cut = 0

    def write(self, text: str) -> None:
        data = text.encode("utf-8", errors="replace")
        with self._lock:
            self._file.write(data)
            self._file.flush()
            if self._file.tell() - self._start > self._room:
                self._cut_the_middle()

    def _cut_the_middle(self) -> None:
        """Keep the first quarter of the room and as much of the end; the rest is for what comes."""
        quarter = self._room // 4
        head = self._start + quarter
        end = self._file.seek(0, os.SEEK_END)
        note = CUT.format(self._cut).encode() if self._cut else b""
        self._cut += end - head - len(note) - quarter
        self._file.seek(end - quarter)
        last = self._file.read()
        self._file.truncate(head)
        self._file.seek(head)
        self._file.write(CUT.format(self._cut).encode() + last)
        self._file.flush()

    def __enter__(self) -> "BoundedLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
