"""Labels that are no class, in the two-launch step: the kernels record the first one, this file raises it.

Reading the record waits for the GPU. An epoch waits at its end anyway. After single steps, every 16th starts
a copy of the record to the CPU, which is read once it has arrived.
"""

from typing import Any

import torch
from torch import Tensor

from fusedmlp.dispatch import predicate

_EVERY = 16  # steps between two copies: copy and event take a microsecond or two each, a step takes 20


class Labels:
    """The steps whose labels have not been checked yet."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, list[Tensor]]] = []  # number, and the optimizer's counts of steps
        self._fetched: Any = None  # the record's copy on the CPU
        self._event: Any = None  # recorded after the copy; None while no copy is under way
        self._covered = 0  # how many of the steps the copy covers

    def wait_for(self, number: int, counts: list[Tensor]) -> None:
        """Note a launched step. counts: the optimizer's counts of steps, which it has raised by 1."""
        self._steps.append((number, counts))

    def look(self, record: Tensor, classes: int, wait: bool) -> None:
        """Raise IndexError if a launched step met a label that is not in 0 to classes - 1.

        Before it raises, it lowers the counts by that step and the steps after it, and clears the record.
        Without wait, it raises only once a copy of the record has arrived.
        """
        covered = len(self._steps)
        if covered == 0:
            return
        if wait:
            self._event = None
            found = wrong_label(record)
        elif self._event is None:
            if covered >= _EVERY:
                self._fetch(record)
            return
        elif not self._event.query():
            return
        else:
            self._event, covered = None, self._covered
            found = wrong_label(self._fetched)
        if found is None:
            del self._steps[:covered]
            return
        for number, counts in self._steps:
            if number >= found[0] and counts:
                torch._foreach_sub_(counts, 1.0)
        self._steps.clear()
        forget(record)
        raise IndexError(no_class(found[1], classes, f"step {found[0]} of this TrainStep"))

    def _fetch(self, record: Tensor) -> None:
        with torch.cuda.device(record.device):
            if self._fetched is None:
                self._fetched = torch.empty(1, dtype=record.dtype, pin_memory=True)
            self._fetched.copy_(record, non_blocking=True)
            self._event, self._covered = torch.cuda.Event(), len(self._steps)
            self._event.record()


def wrong_label(record: Tensor) -> tuple[int, int] | None:
    """Number and label of the first step that met a label that is no class; waits for the record's device."""
    return predicate.kernels().step.wrong_label(record)  # type: ignore[no-any-return]


def forget(record: Tensor) -> None:
    """Clear the record, so that steps update again."""
    predicate.kernels().step.forget_wrong_label(record)


def no_class(label: int, classes: int, step: str) -> str:
    """The text of the error."""
    cut = " or more" if label == 2**31 - 1 else " or less" if label == -(2**31) else ""
    return (
        f"label {label}{cut} at {step} is no class; classes are 0 to {classes - 1}, and -100 is left out. "
        "That step and those after it have changed nothing"
    )
