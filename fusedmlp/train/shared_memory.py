"""Find tensors that share memory, because updating one of them would change the other in mid-step."""

import operator
from bisect import bisect_right
from typing import NamedTuple

from torch import Tensor

# map calls these for every tensor of a step, which is faster than a loop.
_data_ptr, _nbytes = Tensor.data_ptr, operator.attrgetter("nbytes")
_LAST = 2**64  # no address is as large


class Spans(NamedTuple):
    """Pieces of memory that do not overlap: (address, size in bytes), sorted by address."""

    pieces: list[tuple[int, int]]

    def touch(self, tensor: Tensor) -> bool:
        """True if the strided tensor, gaps between its rows included, overlaps one of the pieces."""
        if tensor.is_contiguous():
            size = tensor.nbytes
        else:
            steps = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            size = (sum(steps) + 1) * tensor.itemsize if tensor.numel() > 0 else 0
        start = tensor.data_ptr()
        after = bisect_right(self.pieces, (start, _LAST))  # the first piece that begins after start
        return size > 0 and (
            (after > 0 and sum(self.pieces[after - 1]) > start)
            or (after < len(self.pieces) and self.pieces[after][0] < start + size)
        )


def memory_of(tensors: list[Tensor]) -> Spans | None:
    """The memory of these contiguous tensors, or None if two of them share memory."""
    # The address of a tensor without elements is 0, whatever it is a view of.
    pieces = sorted(zip(map(_data_ptr, tensors), map(_nbytes, tensors), strict=True))
    end = 0
    for start, size in pieces:
        if start < end:
            return None
        end = start + size
    return Spans(pieces)
