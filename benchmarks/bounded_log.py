"""A log file that stays below a given size, however much is written to it."""

import contextlib
import os
import pathlib
import threading

CUT = "\n[... {:,} bytes were cut out here, so that this file does not become too large ...]\n"


class BoundedLog(contextlib.AbstractContextManager["BoundedLog"]):
    """A file written in sections. The middle of a section that grows too long is cut out.

    Every write reaches the disk at once. Several threads may write.
    """

    def __init__(self, path: pathlib.Path, most: int) -> None:
        self._file = path.open("a+b")
        self._most = most
        self._lock = threading.Lock()
        self.begin_section(1)

    def begin_section(self, to_come: int) -> None:
        """Begin a section; to_come: how many sections are still to come, including this one."""
        self._start = self._file.seek(0, os.SEEK_END)
        # A section may write a little even if earlier commands have filled the file.
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
        """Keep the first and the last quarter of the section's room, so half of it is free again."""
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

    def __exit__(self, *error: object) -> None:
        self._file.close()
