"""Labels that are no class, of which the kernels of the two-launch step keep a record: an error for them.

To read the record waits for the GPU. An epoch waits at its end all the same; of single steps the record is
fetched now and then, and looked at when it has come.
"""

from typing import Any

import torch

from fusedmlp.dispatch import predicate

_EVERY = 16  # steps between two looks: a copy and an event cost a microsecond or two each, a step is 20


class Labels:
    """The steps whose labels nobody has looked at yet."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, list[torch.Tensor]]] = []  # number, and what it has counted itself in
        self._fetched: torch.Tensor | None = None
        self._event: Any = None  # when the record has come
        self._covered = 0  # steps whose labels are in it

    def wait_for(self, number: int, counts: list[torch.Tensor]) -> None:
        """A step was launched. counts: the optimizer's counts of steps, each 1 more by this one."""
        self._steps.append((number, counts))

    def look(self, record: torch.Tensor, classes: int, wait: bool) -> None:
        """Raise IndexError if a step that was launched met a label that is no class: of 0 to classes - 1.

        Then what that step and those after it have counted is taken back, and the record is empty again.
        Without wait, this is only so once the record is here.
        """
        covered = len(self._steps)
        if covered == 0:
            return
        if wait:
            self._event = None
            found = wrong_label(record)
        else:
            if self._event is None:
                if covered >= _EVERY:
                    self._fetch(record)
                return
            if not self._event.query():
                return
            self._event, covered = None, self._covered
            assert self._fetched is not None
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

    def _fetch(self, record: torch.Tensor) -> None:
        with torch.cuda.device(record.device):
            if self._fetched is None:
                self._fetched = torch.empty(1, dtype=record.dtype, pin_memory=True)
            self._fetched.copy_(record, non_blocking=True)
            self._event, self._covered = torch.cuda.Event(), len(self._steps)
            self._event.record()


def wrong_label(record: torch.Tensor) -> tuple[int, int] | None:
    """Number and label of the first step that met a label that is no class; waits for the record's device."""
    found: tuple[int, int] | None = predicate.kernels().step.wrong_label(record)
    return found


def forget(record: torch.Tensor) -> None:
    """Let steps update again."""
    predicate.kernels().step.forget_wrong_label(record)


def no_class(label: int, classes: int, step: str) -> str:
    """The error's text."""
    cut = " or more" if label == 2**31 - 1 else " or less" if label == -(2**31) else ""
    return (
        f"label {label}{cut} at {step} is no class; classes are 0 to {classes - 1}, and -100 is left out. "
        "That step and those after it have changed nothing"
    )
