"""``python -m benchmarks.step_kernels``: our kernels for a whole training step against PyTorch, on a GPU.

The network is MNIST's, 784-256-128-10, with SGD and momentum, on random pixels in GPU memory. FORMS lists the
ways to train it. "overlapping" uses programmatic dependent launch, which needs compute capability 9.0;
"persistent" is a whole epoch in one cooperative launch. The losses of each form are first compared with
float64's, and a form with wrong losses is not timed.
"""

import argparse
import copy
import itertools
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks import results
from benchmarks.cases import MNIST, network
from benchmarks.statuses import TIME_OVER
from fusedmlp.torch_tools import cuda_graph

KINDS = ("ieee", "tf32", "float16", "bfloat16")
# The largest relative difference of a loss from float64's in the first CHECKED_STEPS.
TOLERANCE = {"ieee": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}
CHECKED_STEPS = 20
LEARNING_RATE, MOMENTUM = 0.05, 0.9
FORMS = {  # each form, and its heading in the table
    "torch": "torch",  # gather, forward, loss, backward and SGD, launched one by one from Python
    "torch, graph": "+graph",  # a whole epoch of that in one CUDA graph
    "two launches": "two",  # our two kernels of a step, rows.py and weights.py, launched from Python
    "two launches, graph": "+graph",
    "overlapping, graph": "overlap",
    "persistent": "persist",
}
PARTS = {  # name of the rows, forms and batch sizes; the most useful part is first, as the time may be over
    "epoch": ("epoch", ("torch, graph", "two launches, graph"), (512, 4096)),
    "ladder": ("step ladder", tuple(FORMS), (128, 512, 1024, 4096)),
    "persistent": (
        "persistent", ("two launches, graph", "overlapping, graph", "persistent"), (128, 512, 2048)
    ),
}  # fmt: skip


class Epoch:
    """The data, parameters and memory of one epoch, and the ways to run it."""

    def __init__(self, widths: tuple[int, ...], rows: int, batch: int, kind: str, device: str) -> None:
        from fusedmlp.kernels.train_step import optimizers, step

        generator = torch.Generator().manual_seed(0)
        self.batch, self.kind, self.steps = batch, kind, -(-rows // batch)
        images = torch.randint(0, 256, (rows, widths[0]), dtype=torch.uint8, generator=generator)
        self.images = images.to(device)
        self.labels = torch.randint(0, widths[-1], (rows,), generator=generator).to(device)
        self.order = torch.randperm(rows, generator=generator).to(device)
        torch.manual_seed(0)
        self.model = network(widths).to(device)
        self.start = copy.deepcopy(self.model.state_dict())
        self.dtype = getattr(torch, kind, torch.float32)
        data = [p.detach() for p in self.model.parameters()]
        moments = [torch.zeros_like(p) for p in data]
        none = (None,) * (len(widths) - 1)
        workspace = step.workspace_for(widths, min(batch, rows), self.dtype, torch.device(device))
        parameters = step.Parameters(
            tuple(data[::2]), tuple(data[1::2]), workspace.low_precision,
            tuple(moments[::2]), tuple(moments[1::2]), none, none,
        )  # fmt: skip
        self.moments = moments
        self.widths = widths
        row = optimizers.sgd_coefficients(LEARNING_RATE, MOMENTUM, 0.0, 0.0)
        coefficients = torch.tensor([[row] * len(data)] * self.steps, dtype=torch.float32, device=device)
        self.losses = torch.full((self.steps,), float("nan"), device=device)
        self.job = step.Job(
            self.images, self.order, self.labels, parameters, step.Network(widths, "cross_entropy", "sgd"),
            coefficients, self.losses, workspace, 1 / 255,
        )  # fmt: skip
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, fused=device == "cuda"
        )

    def rewind(self) -> None:
        """Reset the parameters and the optimizer in place."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.start[name])
            for moment in self.moments:
                moment.zero_()
            for state in self.optimizer.state.values():
                if state.get("momentum_buffer") is not None:
                    state["momentum_buffer"].zero_()
            self.losses.fill_(float("nan"))

    def batches(self) -> Iterator[tuple[int, int, int]]:
        for i in range(self.steps):
            yield i, i * self.batch, min(self.batch, len(self.order) - i * self.batch)

    def by_torch(self) -> None:
        for i, first, rows in self.batches():
            index = self.order[first : first + rows]
            x = self.images.index_select(0, index).float().mul_(1 / 255)
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = torch.nn.functional.cross_entropy(self.model(x), self.labels.index_select(0, index))
            loss.backward()
            self.optimizer.step()
            self.losses[i] = loss.detach()

    def by_two_launches(self, overlap: bool = False) -> None:
        from fusedmlp.kernels.train_step import step

        step.refresh_low_precision(self.job.parameters)
        for i, first, rows in self.batches():
            step.train_step(self.job, first, rows, i, overlap)

    def by_one_launch(self) -> None:
        from fusedmlp.kernels.train_step import persistent, step

        step.refresh_low_precision(self.job.parameters)
        persistent.train_steps(self.job, 0, len(self.order), self.batch)

    def exact(self) -> torch.Tensor:
        """The losses of the first steps in float64."""
        model = copy.deepcopy(self.model).double()
        model.load_state_dict(self.start)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        losses = []
        for _, first, rows in list(self.batches())[:CHECKED_STEPS]:
            index = self.order[first : first + rows]
            loss = torch.nn.functional.cross_entropy(
                model(self.images[index].double() / 255), self.labels[index]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)


def graph_of(run: Callable[[], None]) -> Callable[[], None]:
    """Capture ``run`` in a CUDA graph. It runs once before, to compile kernels and make optimizer state."""
    stream = torch.cuda.Stream()
    with cuda_graph.beside(stream):
        run()
    graph, _ = cuda_graph.capture(run, stream.device)
    return graph.replay


def forms_of(epoch: Epoch, wanted: tuple[str, ...]) -> dict[str, Callable[[], Callable[[], None]]]:
    """For each form that can run here, a function that prepares it."""
    from fusedmlp.kernels.train_step.persistent import why_not_persistent

    all_forms: dict[str, Callable[[], Callable[[], None]]] = {
        "torch": lambda: epoch.by_torch,
        "two launches": lambda: epoch.by_two_launches,
    }
    if why_not_persistent(epoch.widths, epoch.dtype) is None:
        all_forms["persistent"] = lambda: epoch.by_one_launch
    if epoch.images.is_cuda:
        all_forms["torch, graph"] = lambda: graph_of(epoch.by_torch)
        all_forms["two launches, graph"] = lambda: graph_of(epoch.by_two_launches)
        if torch.cuda.get_device_capability() >= (9, 0):
            all_forms["overlapping, graph"] = lambda: graph_of(lambda: epoch.by_two_launches(True))
    return {name: make for name, make in all_forms.items() if name in wanted}


def measure(
    what: str, epoch: Epoch, wanted: tuple[str, ...], repeats: int, dry: bool
) -> Iterator[dict[str, Any]]:
    """Check each form, and time their epochs in turns; yields a row for each form."""
    right = epoch.exact()
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], None]] = {}
    for name, make in forms_of(epoch, wanted).items():
        result = found[name] = {"what": what, "form": name, "arithmetic": epoch.kind, "batch": epoch.batch}
        result |= {"rows": len(epoch.order), "steps": epoch.steps}
        try:
            run = make()
            epoch.rewind()
            run()
            error = ((epoch.losses[: len(right)].double() - right).abs() / right).max().item()
        except Exception as problem:  # is reported, and the other forms go on
            result["problem"] = f"{type(problem).__name__}: {problem}"[:500]
            continue
        result["loss_error"] = error
        if not error <= TOLERANCE[epoch.kind]:
            result["problem"] = f"the losses are off by {error:.2g}, relatively"
        elif not dry:
            runs[name] = run
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 3):  # three rounds warm up
        for name, run in runs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if i >= 3:
                times[name].append(1e3 * begin.elapsed_time(end))
    for name, samples in times.items():
        us = statistics.median(samples)
        found[name] |= {"epoch_us": us, "step_us": us / epoch.steps, "least_epoch_us": min(samples)}
    yield from found.values()


class Setting(NamedTuple):
    """Where several forms are timed in turns; rows: the number of rows in an epoch."""

    what: str
    kind: str
    batch: int
    rows: int
    forms: tuple[str, ...]

    def epoch(self, dry: bool) -> Epoch:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if self.kind == "tf32" else "ieee"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        widths = (32, 32, 16, 10) if dry else MNIST
        return Epoch(widths, self.rows, self.batch, self.kind, device)

    def has(self, row: dict[str, Any]) -> bool:
        return (row["what"], row["arithmetic"], row["batch"]) == (self.what, self.kind, self.batch)


def settings(parts: list[str], dry: bool) -> list[Setting]:
    """The settings of these parts: an epoch of 60,000 rows, or 50 steps in the part "ladder"."""
    found = []
    for part in parts:
        what, forms, batches = PARTS[part]
        if dry and part == "epoch":  # the others of its forms need a GPU
            forms = (*forms, "two launches")
        for kind, batch in itertools.product(KINDS, (24,) if dry else batches):
            rows = 60 if dry else 50 * batch if part == "ladder" else 60_000
            found.append(Setting(what, kind, batch, rows, forms))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, run once and not timed")
    output = (
        "a JSON file for the results; what it holds already, of this device, commit and versions, is kept"
    )
    parser.add_argument("--output", type=pathlib.Path, help=output)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: there are the parts {', '.join(PARTS)}")
    dry = arguments.dry_run
    if not torch.cuda.is_available():
        if not dry:
            sys.exit("there is no CUDA device to time kernels on; --dry-run needs none")
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels
    chosen = settings(arguments.parts or list(PARTS), dry)
    found = about(dry)
    rows = found["results"] = kept(arguments.output, found)
    without_a_form = 0  # settings of which no form can run on this device
    try:
        for setting in chosen:
            if done(setting, rows):
                continue
            fresh = list(measure(setting.what, setting.epoch(dry), setting.forms, 0 if dry else 20, dry))
            rows[:] = [row for row in rows if not setting.has(row)] + fresh
            without_a_form += not fresh
            if fresh and arguments.output is not None:
                results.write(found, arguments.output)
            for row in fresh:
                heading = f"{row['what']}, {row['arithmetic']}, batch {row['batch']}"
                print(f"{heading:35} {row['form']:20} {outcome(row)}", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
        if rows and arguments.output is not None:
            results.write(
                found, arguments.output
            )  # again, because the interrupt may have stopped the last write
    # Settings are counted by their rows, so that the count agrees with the file after an interrupt.
    count = sum(any(setting.has(row) for row in rows) for setting in chosen) + without_a_form
    print("\n" + "\n".join(table(rows)))
    problems = [row for row in rows if "problem" in row]
    print(f"{len(rows)} rows, {len(problems)} with a problem")
    for row in problems[:5]:
        print(f"{row['what']}, {row['arithmetic']}, batch {row['batch']}, {row['form']}: {row['problem']}")
    print(f"{count} of {len(chosen)} settings done")
    if problems:
        return 1
    return TIME_OVER if count < len(chosen) else 0


def about(dry: bool) -> dict[str, Any]:
    """The head of the file: device, versions and commit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    everything = results.about(device, dry)
    names = ("format", "date", "commit", "dry_run", "device", "versions")
    return {name: everything[name] for name in names} | {"results": []}


def kept(file: pathlib.Path | None, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier command on the same device and commit; then ``found`` gets its date."""
    if file is None or not file.exists():
        return []
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        results.same_or_unreadable(before, found, file)
        rows: list[dict[str, Any]] = before["results"]
    except (ValueError, KeyError, AttributeError) as problem:
        print(f"measured again, because {problem}")
        return []
    print(f"{file} has {len(rows)} rows already, measured from {before['date']} on")
    found["date"] = before["date"]
    return rows


def done(setting: Setting, rows: list[dict[str, Any]]) -> bool:
    """Whether this was measured without a problem."""
    mine = [row for row in rows if setting.has(row)]
    return bool(mine) and not any("problem" in row for row in mine)


def outcome(row: dict[str, Any]) -> str:
    if "problem" in row:
        return str(row["problem"])
    if "step_us" not in row:
        return "right"
    return f"{row['step_us']:8.2f} us a step, {row['epoch_us'] / 1e3:8.3f} ms"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Microseconds per step, with a line for each setting and a column for each form."""
    lines = [f"{'us a step':<27}" + "".join(f"{heading:>9}" for heading in FORMS.values())]
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        name = f"{row['what'].removeprefix('step ')} {row['arithmetic']} {row['batch']}"
        cell = f"{row['step_us']:.2f}" if "step_us" in row else "right"
        cells.setdefault(name, {})[row["form"]] = "problem" if "problem" in row else cell
    for name, by_form in cells.items():
        lines.append(f"{name:<27}" + "".join(f"{by_form.get(form, '-'):>9}" for form in FORMS))
    return lines


if __name__ == "__main__":
    sys.exit(main())
