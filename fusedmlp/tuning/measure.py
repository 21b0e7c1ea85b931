"""Measure products and stretches of layers on this device, and keep what was found."""

import datetime
import functools
import itertools
import math
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fusedmlp import functional
from fusedmlp._version import __version__
from fusedmlp.dispatch import backend_choice, predicate, reference
from fusedmlp.torch_tools import cuda_graph
from fusedmlp.torch_tools.accuracy import compare
from fusedmlp.torch_tools.warn import first_line
from fusedmlp.tuning.result import Product, Stretch, Tuned

_ROUNDS = 5  # of which the median counts


class Tuning:
    """One call of tune: where, in what arithmetic, and what was found."""

    def __init__(self, device: torch.device, dtype: torch.dtype, final_relu: bool) -> None:
        self.kernels = predicate.kernels()
        self.table = self.kernels.tuning_table
        self.device, self.dtype, self.final_relu = device, dtype, final_relu
        self.index = device.index if device.type == "cuda" else None
        self.here = self.table.where(self.index)
        self.kind = self.kernels.arithmetic(dtype)
        self.path: pathlib.Path = self.table.users_file(self.here)
        self.found = self.table.Table()
        self._known = self._on_disk()
        self.products: list[Product] = []
        self.stretches: list[Stretch] = []
        self.left_out: list[str] = []  # what was not measured, and why

    def run(self, shapes: list[tuple[int, ...]], seconds: float) -> Tuned:
        end = time.monotonic() + seconds
        progress = _progress(shapes)
        try:
            for shape in progress:
                what = f"{shape[0]} x {'-'.join(map(str, shape[1:]))}"
                if time.monotonic() > end:
                    self.left_out.append(f"{what}: the {seconds:g} seconds were over")
                    continue
                try:
                    whole = self._measure(shape, end)
                except torch.OutOfMemoryError:
                    self.left_out.append(f"{what}: not enough memory")
                    torch.cuda.empty_cache()
                else:
                    if not whole:
                        self.left_out.append(f"part of {what}: the {seconds:g} seconds were over")
                self._save()
        finally:
            self.table.disagree(self.index)
        return Tuned(
            self.here.device, str(self.dtype).removeprefix("torch."), tuple(self.products),
            tuple(self.stretches), tuple(self.left_out), str(self.path),
        )  # fmt: skip

    def _measure(self, shape: tuple[int, ...], end: float) -> bool:
        """Measure what is not known of this shape; False if there was no time for all of it."""
        rows, widths = shape[0], shape[1:]
        layers = list(itertools.pairwise(widths))
        for K, N in dict.fromkeys(layers):
            for operation in self.kernels.tiles.OPERATIONS:
                key = operation, self.kind, self.table.bucket(rows), N, K
                if key in self._known.products or key in self.found.products:
                    continue
                if time.monotonic() > end:
                    return False
                try:
                    found = self._product(operation, rows, N, K)
                except (self.kernels.KernelFailed, cuda_graph.CaptureFailed) as failure:
                    self.left_out.append(f"{operation} of {rows} x {K} -> {N}: {failure}")
                    continue
                self.products.append(found[0])
                if found[1] is not None:
                    self.found.products[key] = found[1]
        last = len(layers) - 1
        parts = [(widths[i : i + 2], self.final_relu or i < last) for i in range(last + 1)]
        for part, relu in dict.fromkeys([(widths, self.final_relu), *parts]):
            for mode in self.table.MODES:
                which = mode, self.kind, self.table.bucket(rows), part, relu
                if which in self._known.stretches or which in self.found.stretches:
                    continue
                if time.monotonic() > end:
                    return False
                try:
                    s = self._stretch(mode, rows, part, relu)
                except self.kernels.KernelFailed as failure:
                    layers_of = "-".join(map(str, part))
                    self.left_out.append(f"{mode} of {rows} x {layers_of}: {failure}")
                    continue
                self.stretches.append(s)
                self.found.stretches[which] = self.table.Stretch(s.us, s.torch_us, s.in_one, "")
        return True

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def _product(self, operation: str, M: int, N: int, K: int) -> tuple[Product, Any]:
        """One product with every tile, each checked before it is timed."""
        kernels = self.kernels
        setting = kernels.launch.setting_of(self._random(1, 1), True)
        aligned = kernels.launch.is_aligned(N) and kernels.launch.is_aligned(K)
        x, weight, bias, grad_z = self._random(M, K), self._random(N, K), self._random(N), self._random(M, N)
        y = self._random(M, K).relu_()
        # A fraction of 1, as layers have: the products stay finite in float16.
        weight, grad_z = weight / K**0.5, grad_z / max(M, N) ** 0.5

        def by_kernel(tile: Any) -> tuple[torch.Tensor, ...]:
            sums: list[Any] = []
            if operation == "forward":
                return (kernels.layer.forward.linear_forward(x, weight, bias, True, aligned, setting, tile),)
            if operation == "grad_input":
                result = kernels.layer.grad_input.grad_input(
                    grad_z, weight, y, True, aligned, setting, sums, tile
                )
            else:
                result = (x.new_empty(N, K),)
                layer = kernels.layer.grad_weight.Layer(grad_z, x, aligned, result[0])
                kernels.layer.grad_weight.grad_weights([layer], None, setting, sums, tile)
            kernels.partial_sums.add_up(sums)
            return tuple(result)

        def by_torch() -> tuple[torch.Tensor, ...]:
            if operation == "forward":
                return (torch.nn.functional.linear(x, weight, bias).relu_(),)
            if operation == "grad_weight":
                return (torch.mm(grad_z.t(), x),)
            sums: list[Any] = []
            product = torch.mm(grad_z, weight)
            result = kernels.layer.relu_backward.relu_backward(product, y, True, setting, sums, True)
            kernels.partial_sums.add_up(sums)
            return tuple(result)

        exact = _exact(operation, x, weight, bias, grad_z, y)
        torchs = by_torch()
        runs: dict[Any, Callable[[], Any]] = {None: by_torch}
        problems = []
        descriptors = self.device.type == "cpu" or torch.cuda.get_device_capability(self.index) >= (9, 0)
        memory = setting.device.shared_memory
        for tile in kernels.tiles.candidates(operation, self.kind, aligned, memory, descriptors):
            problem = _why_not_right(lambda tile=tile: by_kernel(tile), torchs, exact)  # type: ignore[misc]
            if problem is None:
                runs[tile] = lambda tile=tile: by_kernel(tile)  # type: ignore[misc]
            else:
                problems.append(f"{_words(tile)}: {problem}")
        times, failures = _device_times(runs, self.device)
        problems += [f"{_words(tile)}: {failure}" for tile, failure in failures.items()]
        torch_us = times.pop(None)
        wrong = "; ".join(problems) or None
        if not times:
            return Product(operation, M, N, K, None, None, torch_us, wrong), None
        tile = min(times, key=lambda tile: times[tile])
        shown = Product(operation, M, N, K, _words(tile), times[tile], torch_us, wrong)
        return shown, self.table.Product(tile, times[tile], torch_us)

    def _stretch(self, mode: str, M: int, widths: tuple[int, ...], relu: bool) -> Stretch:
        """A stretch on eager PyTorch, and on the kernels' path with a launch a layer and with one for all."""
        training = mode == "training"
        x = self._random(M, widths[0])
        layers = list(itertools.pairwise(widths))
        weights = [self._random(N, K) / K**0.5 for K, N in layers]
        biases = [self._random(N) for _, N in layers]
        grad_output = self._random(M, widths[-1]) / M**0.5
        inputs = [x, *weights, *biases]

        def call() -> None:
            y = functional.mlp(x, weights, biases, final_relu=relu)
            if training:
                torch.autograd.grad(y, inputs, grad_output)

        def ours() -> None:
            with backend_choice.measuring():
                call()

        def torchs() -> None:
            with backend_choice.backend("torch"):
                call()

        found = []
        problem = None
        for in_one in (False, True) if self._fits_in_one(M, widths) else (False,):
            # What runs is what a table says: the products that were just chosen, and this to be tried.
            key = mode, self.kind, self.table.bucket(M), widths, relu
            tried = self.table.Table({}, {key: self.table.Stretch(math.inf, math.inf, in_one, "")})
            self.table.agree(self.index, self._known.joined(self.found).joined(tried))
            if in_one:
                problem = self._why_chain_not_right(training, grad_output, x, weights, biases, relu)
                if problem is not None:
                    break
            for tensor in inputs:
                tensor.requires_grad_(training)
            times = _wall_times({"ours": ours, "torch": torchs}, self.device)
            for tensor in inputs:
                tensor.requires_grad_(False)
            found.append((times["ours"], times["torch"], in_one))
        us, torch_us, in_one = min(found, key=lambda times: times[0] / times[1])
        return Stretch(mode, M, widths, relu, in_one, us, torch_us, problem)

    def _fits_in_one(self, M: int, widths: tuple[int, ...]) -> bool:
        """Whether there is a kernel for all of these layers."""
        narrow = self.kernels.narrow.forward
        regular = all(map(self.kernels.launch.is_aligned, widths))
        num_sms = self.kernels.launch.device_limits(self.index).num_sms
        return (
            len(widths) > 2 and narrow.select_form(M, widths, self.kind, regular, True, num_sms) is not None
        )

    def _why_chain_not_right(
        self,
        training: bool,
        grad_output: torch.Tensor,
        x: torch.Tensor,
        weights: list[torch.Tensor],
        biases: list[torch.Tensor],
        relu: bool,
    ) -> str | None:
        """The chain as the table has it now against float64: its forward, and the backward of PyTorch's."""
        keep = 0 if training else len(weights) - 1

        def forward(room: Any, *inputs: Any) -> tuple[torch.Tensor, ...]:
            return tuple(room.mlp_forward(*inputs, relu, keep))

        def backward(
            room: Any, grad: torch.Tensor, activations: Any, weights: Any
        ) -> tuple[torch.Tensor, ...]:
            needs = [True] * len(weights)
            grad_x, *others = room.mlp_backward(grad, activations, weights, relu, 0, True, needs, needs)
            return (grad_x, *others[0], *others[1])

        steps: list[tuple[Any, ...]] = [(forward, x, weights, biases)]
        if training:
            activations = [x, *reference.mlp_forward(x, weights, biases, relu, 0)]
            steps.append((backward, grad_output, activations, weights))
        for run, *inputs in steps:
            wide = [[t.double() for t in one] if isinstance(one, list) else one.double() for one in inputs]
            torchs, exact = run(reference, *inputs), run(reference, *wide)
            problem = _why_not_right(functools.partial(run, self.kernels, *inputs), torchs, exact)
            if problem is not None:
                return f"{run.__name__}: {problem}"
        return None

    def _on_disk(self) -> Any:
        """What is known; raises if a later version wrote it."""
        try:
            text = self.path.read_text(encoding="utf-8")
            return self.table.parse(text, self.here, exact=True)[0]
        except FileNotFoundError:
            return self.table.Table()
        except self.table.NewerFormat as problem:
            raise RuntimeError(f"the table {self.path} {problem}: update fusedmlp, or delete it") from None
        except (OSError, UnicodeDecodeError, self.table.Unusable):
            return self.table.Table()

    def _save(self) -> None:
        """Add what was found to the file, whole or not at all, whoever else does so at the same time."""
        from filelock import FileLock  # which torch itself requires

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            self._known = self._on_disk()
            if self.table.read(self.path, self.here, exact=True) is None and self.path.exists():
                os.replace(self.path, self.path.with_suffix(".bad"))  # a warning has said why
            text = self.table.to_text(self.here, _about(self.device), self._known.joined(self.found))
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=self.path.parent, suffix=".tmp", delete=False
            ) as file:
                file.write(text)
            os.replace(file.name, self.path)


def _about(device: torch.device) -> dict[str, str]:
    driver = "none"
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            driver = "unknown"
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"torch": torch.__version__, "driver": driver, "fusedmlp": __version__, "date": today}


def _exact(
    operation: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    grad_z: torch.Tensor,
    y: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    if operation == "forward":
        return (torch.nn.functional.linear(x.double(), weight.double(), bias.double()).relu_(),)
    if operation == "grad_weight":
        return (grad_z.double().t() @ x.double(),)
    masked = (grad_z.double() @ weight.double()).masked_fill_(y <= 0, 0)
    return masked, masked.sum(0)


def _why_not_right(
    run: Callable[[], tuple[torch.Tensor, ...]],
    torchs: tuple[torch.Tensor, ...],
    exact: tuple[torch.Tensor, ...],
) -> str | None:
    try:
        results = run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the kernel, or of PyTorch or Triton on the way to it
        return first_line(error)
    for ours, its, true in zip(results, torchs, exact, strict=True):
        problem = compare(ours, its, true).problem
        if problem is not None:
            return problem
    return None


def _words(tile: Any) -> str:
    how = " descriptors" if tile.descriptors else ""
    return f"{tile.BLOCK_R}x{tile.BLOCK_C}x{tile.BLOCK_K}, {tile.num_warps} warps{how}"


def _device_times(
    runs: dict[Any, Callable[[], Any]], device: torch.device
) -> tuple[dict[Any, float], dict[Any, str]]:
    """Microseconds of each on the device alone, in turns, the median of the rounds; why some have none."""
    if device.type == "cpu":  # the interpreter, whose times mean nothing
        return {name: _seconds_of(run, 1) * 1e6 for name, run in runs.items()}, {}
    import triton

    graphs: dict[Any, tuple[torch.cuda.CUDAGraph, int]] = {}
    failures: dict[Any, str] = {}
    for name, run in runs.items():
        calls = max(1, min(200, int(1e-3 / _seconds_of(run, 3))))  # about a millisecond together
        try:
            graph, _ = cuda_graph.capture(functools.partial(_repeat, run, calls), device)
        except cuda_graph.CaptureFailed as failure:
            if name is None:
                raise
            failures[name] = f"not timed: {failure}"
        else:
            graphs[name] = graph, calls
    times: dict[Any, list[float]] = {name: [] for name in graphs}
    for turn in range(_ROUNDS):
        for name in [*times]:
            graph, calls = graphs[name]
            ms = triton.testing.do_bench(graph.replay, warmup=2, rep=6, return_mode="median")
            times[name].append(1e3 * ms / calls)
        if turn == 0:  # the slowest need no second look
            quick = sorted((name for name in times if name is not None), key=lambda name: times[name][0])[:3]
            times = {name: times[name] for name in [None, *quick] if name in times}
    return {name: statistics.median(several) for name, several in times.items()}, failures


def _repeat(run: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        run()


def _wall_times(runs: dict[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """Microseconds of each, called back to back as layers are, in turns, the median of the rounds."""
    interpreted = device.type == "cpu"
    times: dict[str, list[float]] = {name: [] for name in runs}
    calls = {}
    for name, run in runs.items():
        if not interpreted:
            _seconds_of(run, 3)  # compiles, and fills the caches
        calls[name] = 1 if interpreted else max(3, min(1000, int(0.01 / _seconds_of(run, 3))))
    for _ in range(1 if interpreted else _ROUNDS):
        for name, run in runs.items():
            times[name].append(1e6 * _seconds_of(run, calls[name]))
    return {name: statistics.median(several) for name, several in times.items()}


def _seconds_of(run: Callable[[], Any], calls: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    _repeat(run, calls)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls


def _progress(shapes: list[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(shapes)
    return iter(tqdm(shapes, desc="tuning", unit="shape"))
