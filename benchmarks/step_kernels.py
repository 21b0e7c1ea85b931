"""Microseconds of a training step in two launches, of an epoch, and of the persistent form, on a GPU.

    python -m benchmarks.step_kernels --output results.json
    python -m benchmarks.step_kernels --dry-run

An MNIST network, 784-256-128-10 with SGD and momentum, on random pixels that lie on the device. The forms:

- torch: gather, forward, loss, backward, SGD, from Python, launch by launch
- torch, graph: a whole epoch of that in one CUDA graph
- two launches: rows and weights, from Python
- two launches, graph: a whole epoch of them in one CUDA graph
- overlapping, graph: with programmatic dependent launch, which needs compute capability 9.0
- persistent: a whole epoch in one cooperative launch

Before a form is timed its losses are compared with PyTorch's in float64; one that is wrong is not timed.
--dry-run runs tiny sizes once, on a CPU in Triton's interpreter, and times nothing.
"""

import argparse
import copy
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks import results
from benchmarks.statuses import TIME_OVER
from fusedmlp.torch_tools import cuda_graph

KINDS = ("ieee", "tf32", "float16", "bfloat16")
# How far a loss may be from float64's, relatively, after an epoch of at most LEAST_STEPS.
TOLERANCE = {"ieee": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}
CHECKED_STEPS = 20
LEARNING_RATE, MOMENTUM = 0.05, 0.9


class Epoch:
    """The data, the parameters and the memory of one epoch, which every form runs alike."""

    def __init__(self, widths: tuple[int, ...], rows: int, batch: int, kind: str, device: str) -> None:
        from fusedmlp.kernels.train_step import step

        generator = torch.Generator().manual_seed(0)
        self.batch, self.kind, self.steps = batch, kind, -(-rows // batch)
        self.images = torch.randint(0, 256, (rows, widths[0]), dtype=torch.uint8, generator=generator).to(
            device
        )
        self.labels = torch.randint(0, widths[-1], (rows,), generator=generator).to(device)
        self.order = torch.randperm(rows, generator=generator).to(device)
        torch.manual_seed(0)
        layers: list[torch.nn.Module] = []
        for i in range(len(widths) - 1):
            layers += [torch.nn.Linear(widths[i], widths[i + 1]), torch.nn.ReLU()]
        self.model = torch.nn.Sequential(*layers[:-1]).to(device)
        self.start = copy.deepcopy(self.model.state_dict())
        self.dtype = getattr(torch, kind, torch.float32)
        data = [p.detach() for p in self.model.parameters()]
        moments = [torch.zeros_like(p) for p in data]
        none = (None,) * (len(widths) - 1)
        self.workspace = step.workspace_for(widths, min(batch, rows), self.dtype, torch.device(device))
        self.parameters = step.Parameters(
            tuple(data[::2]), tuple(data[1::2]), self.workspace.copies,
            tuple(moments[::2]), tuple(moments[1::2]), none, none,
        )  # fmt: skip
        self.moments = moments
        self.network = step.Network(widths, "cross_entropy", "sgd")
        row = step.sgd_numbers(LEARNING_RATE, MOMENTUM, 0.0, 0.0)
        self.numbers = torch.tensor([[row] * len(data)] * self.steps, dtype=torch.float32, device=device)
        self.losses = torch.full((self.steps,), float("nan"), device=device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, fused=device == "cuda"
        )

    def rewind(self) -> None:
        """Back to the parameters of the beginning, as they lie in memory."""
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

        step.refresh_copies(self.parameters)
        for i, first, rows in self.batches():
            step.train_step(
                self.images, self.order, first, rows, self.labels, self.parameters, self.network,
                self.numbers, self.losses, i, self.workspace, 1 / 255, overlap,
            )  # fmt: skip

    def by_one_launch(self) -> None:
        from fusedmlp.kernels.train_step import step

        step.refresh_copies(self.parameters)
        step.train_steps(
            self.images, self.order, 0, len(self.order), self.batch, self.labels, self.parameters,
            self.network, self.numbers, self.losses, self.workspace, 1 / 255,
        )  # fmt: skip

    def exact(self) -> torch.Tensor:
        """The losses of the first steps, in float64."""
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
    """``run`` captured, after once as it is, which compiles kernels and makes the optimizer's state."""
    stream = torch.cuda.Stream()
    with cuda_graph.beside(stream):
        run()
    graph, _ = cuda_graph.capture(run, stream.device)
    return graph.replay


def forms_of(epoch: Epoch, wanted: tuple[str, ...]) -> dict[str, Callable[[], Callable[[], None]]]:
    """What makes each form, ready to run."""
    from fusedmlp.kernels.train_step.step import why_not_persistent

    all_forms: dict[str, Callable[[], Callable[[], None]]] = {
        "torch": lambda: epoch.by_torch,
        "two launches": lambda: epoch.by_two_launches,
    }
    if why_not_persistent(epoch.network.widths, epoch.dtype) is None:
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
    """A result for each form, all timed in turns, of an epoch and so of its steps."""
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
        except Exception as problem:  # the other forms are still worth knowing
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


ALL_FORMS = (
    "torch",
    "torch, graph",
    "two launches",
    "two launches, graph",
    "overlapping, graph",
    "persistent",
)


class Setting(NamedTuple):
    """What several forms are timed at, in turns; rows: of the data, so of an epoch."""

    what: str
    kind: str
    batch: int
    rows: int
    forms: tuple[str, ...]

    def epoch(self, dry: bool) -> Epoch:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if self.kind == "tf32" else "ieee"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        widths = (32, 32, 16, 10) if dry else (784, 256, 128, 10)
        return Epoch(widths, self.rows, self.batch, self.kind, device)

    def has(self, row: dict[str, Any]) -> bool:
        return (row["what"], row["arithmetic"], row["batch"]) == (self.what, self.kind, self.batch)


def step_ladder(batch: int, kind: str) -> Setting:
    """Every form at several batch sizes, in every arithmetic, on 50 steps."""
    return Setting("step ladder", kind, batch, 50 * batch, ALL_FORMS)


def epochs(batch: int, kind: str) -> Setting:
    """60,000 rows in graphs, at batch 512 and 4096, with a short last batch."""
    return Setting("epoch", kind, batch, 60_000, ("torch, graph", "two launches, graph"))


def persistent_against_replay(batch: int, kind: str) -> Setting:
    """Whether one cooperative launch is more than 20 % faster than a graph's replay."""
    return Setting(
        "persistent", kind, batch, 60_000, ("two launches, graph", "overlapping, graph", "persistent")
    )


PARTS = {  # what is worth most comes first, for the time may be over before the end
    "epoch": (epochs, (512, 4096)),
    "ladder": (step_ladder, (128, 512, 1024, 4096)),
    "persistent": (persistent_against_replay, (128, 512, 2048)),
}


def settings(parts: list[str], dry: bool) -> list[Setting]:
    found = [
        make(batch, kind)
        for make, batches in (PARTS[part] for part in parts)
        for kind in KINDS
        for batch in ((24,) if dry else batches)
    ]
    if dry:  # graphs want a GPU, so that of an epoch's forms none would be left
        found = [
            s._replace(rows=60, forms=(*s.forms, *(("two launches",) * (s.what == "epoch")))) for s in found
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, once, without times")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        help="a JSON file for the results, written as they come; what it holds of this device, these "
        "versions and this commit is not measured again",
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: there are the parts {', '.join(PARTS)}")
    dry = arguments.dry_run
    if not torch.cuda.is_available():
        if not dry:
            sys.exit("this times kernels on a CUDA device, and there is none; --dry-run needs none")
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels
    chosen = settings(arguments.parts or list(PARTS), dry)
    found = about(dry)
    rows = found["results"] = kept(arguments.output, found)
    without_a_form = 0  # on this device
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
            results.write(found, arguments.output)  # again, for the interrupt may have stopped the last write
    # Settings are counted by their rows, so that the count agrees with the file wherever an interrupt came.
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
    """What is measured on, and with."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    everything = results.about(device, dry)
    names = ("format", "date", "commit", "dry_run", "device", "versions")
    return {name: everything[name] for name in names} | {"results": []}


def kept(file: pathlib.Path | None, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that an earlier command has measured on the same; found then has the date of that."""
    if file is None or not file.exists():
        return []
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        results.same_or_unreadable(before, found, file)
        rows: list[dict[str, Any]] = before["results"]
    except (ValueError, KeyError, AttributeError) as problem:
        print(f"measured anew, because {problem}")
        return []
    print(f"{file} has {len(rows)} rows already, measured from {before['date']} on")
    found["date"] = before["date"]
    return rows


def done(setting: Setting, rows: list[dict[str, Any]]) -> bool:
    """Whether this was measured; what had a problem is tried again."""
    mine = [row for row in rows if setting.has(row)]
    return bool(mine) and not any("problem" in row for row in mine)


def outcome(row: dict[str, Any]) -> str:
    if "problem" in row:
        return str(row["problem"])
    if "step_us" not in row:
        return "right"
    return f"{row['step_us']:8.2f} us a step, {row['epoch_us'] / 1e3:8.3f} ms"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Microseconds a step: a line for each setting, a column for each form."""
    columns = {
        "torch": "torch",
        "torch, graph": "+graph",
        "two launches": "two",
        "two launches, graph": "+graph",
    }
    columns |= {"overlapping, graph": "overlap", "persistent": "persist"}
    lines = [f"{'us a step':<27}" + "".join(f"{short:>9}" for short in columns.values())]
    for what, kind, batch in dict.fromkeys((row["what"], row["arithmetic"], row["batch"]) for row in rows):
        cells = dict.fromkeys(columns, "-")
        for row in rows:
            if (row["what"], row["arithmetic"], row["batch"]) == (what, kind, batch):
                cells[row["form"]] = (
                    "problem"
                    if "problem" in row
                    else f"{row['step_us']:.2f}"
                    if "step_us" in row
                    else "right"
                )
        name = f"{what.removeprefix('step ')} {kind} {batch}"
        lines.append(f"{name:<27}" + "".join(f"{cell:>9}" for cell in cells.values()))
    return lines


if __name__ == "__main__":
    sys.exit(main())
