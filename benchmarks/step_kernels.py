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
import datetime
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

KINDS = ("ieee", "tf32", "float16", "bfloat16")
# How far a loss may be from float64's, relatively, after an epoch of at most LEAST_STEPS.
TOLERANCE = {"ieee": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}
CHECKED_STEPS = 20
LEARNING_RATE, MOMENTUM = 0.05, 0.9


class Epoch:
    """The data, the parameters and the memory of one epoch, which every form runs alike."""

    def __init__(self, widths: tuple[int, ...], rows: int, batch: int, kind: str, device: str) -> None:
        from fusedmlp.kernels import step

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
        from fusedmlp.kernels import step

        step.refresh_copies(self.parameters)
        for i, first, rows in self.batches():
            step.train_step(
                self.images, self.order, first, rows, self.labels, self.parameters, self.network,
                self.numbers, self.losses, i, self.workspace, 1 / 255, overlap,
            )  # fmt: skip

    def by_one_launch(self) -> None:
        from fusedmlp.kernels import step

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
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def forms_of(epoch: Epoch, wanted: tuple[str, ...]) -> dict[str, Callable[[], Callable[[], None]]]:
    """What makes each form, ready to run."""
    from fusedmlp.kernels.step import why_not_persistent

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
    results: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], None]] = {}
    for name, make in forms_of(epoch, wanted).items():
        result = results[name] = {"what": what, "form": name, "arithmetic": epoch.kind, "batch": epoch.batch}
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
    for i in range(repeats + 3):
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
        results[name] |= {"epoch_us": us, "step_us": us / epoch.steps, "least_epoch_us": min(samples)}
    yield from results.values()


def step_ladder(dry: bool = False, repeats: int = 20) -> Iterator[dict[str, Any]]:
    """Every form at several batch sizes, in every arithmetic, on 50 steps."""
    forms = (
        "torch",
        "torch, graph",
        "two launches",
        "two launches, graph",
        "overlapping, graph",
        "persistent",
    )
    for kind, batch in [
        (kind, batch) for kind in KINDS for batch in ((24,) if dry else (128, 512, 1024, 4096))
    ]:
        yield from measure("step ladder", small_or_mnist(dry, 50 * batch, batch, kind), forms, repeats, dry)


def epochs(dry: bool = False, repeats: int = 20) -> Iterator[dict[str, Any]]:
    """60,000 rows in graphs, at batch 512 and 4096, with a short last batch."""
    forms = ("torch, graph", "two launches, graph") + (("two launches",) if dry else ())
    for kind, batch in [(kind, batch) for kind in KINDS for batch in ((24,) if dry else (512, 4096))]:
        yield from measure("epoch", small_or_mnist(dry, 60_000, batch, kind), forms, repeats, dry)


def persistent_against_replay(dry: bool = False, repeats: int = 20) -> Iterator[dict[str, Any]]:
    """Whether one cooperative launch is more than 20 % faster than a graph's replay."""
    forms = ("two launches, graph", "overlapping, graph", "persistent")
    for kind, batch in [(kind, batch) for kind in KINDS for batch in ((24,) if dry else (128, 512, 2048))]:
        yield from measure("persistent", small_or_mnist(dry, 60_000, batch, kind), forms, repeats, dry)


def small_or_mnist(dry: bool, rows: int, batch: int, kind: str) -> Epoch:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Epoch((32, 32, 16, 10) if dry else (784, 256, 128, 10), 60 if dry else rows, batch, kind, device)


PARTS = {"ladder": step_ladder, "epoch": epochs, "persistent": persistent_against_replay}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, once, without times")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: there are the parts {', '.join(PARTS)}")
    dry = arguments.dry_run
    if not torch.cuda.is_available():
        if not dry:
            sys.exit("this times kernels on a CUDA device, and there is none; --dry-run needs none")
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels
    import triton

    results = []
    for part in arguments.parts or PARTS:
        for result in PARTS[part](dry):
            results.append(result)
            outcome = result.get("problem") or (
                "right" if dry else f"{result['step_us']:8.2f} us a step, {result['epoch_us'] / 1e3:8.3f} ms"
            )
            heading = f"{result['what']}, {result['arithmetic']}, batch {result['batch']}"
            print(f"{heading:35} {result['form']:20} {outcome}", flush=True)
    if arguments.output is not None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter"
        about = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "dry_run": dry}
        about["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        arguments.output.write_text(
            json.dumps(about | {"results": results}, indent=1) + "\n", encoding="utf-8"
        )
    if any("problem" in result for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
