"""Measure every product of a layer with every tile, and each chain of layers as a whole.

For one shape ``(rows, in, hidden ..., out)`` :class:`Tuning` does this, in this order:

1. Each product of each layer, "forward", "grad_input" and "grad_weight", is computed with every tile that the
   device can run (``kernels.tiles.candidates``). Each result is checked against float64; tiles with a wrong
   or inaccurate result are left out. The others are timed on the device alone, beside PyTorch's operator,
   and the fastest goes into the table (``_product``).
2. The whole chain, and each of its layers alone, is timed with launching, forward ("inference") and forward
   with backward ("training"): on eager PyTorch, on the kernels with one launch per layer and, where a kernel
   for narrow layers exists and is accurate, with one launch for all layers (``_chain``).
3. The table is written (``_save``).

``kernels/tuning_table.py`` reads the table. From then on a product runs with the tile measured for it; where
nothing was measured, the rule ``select_tile`` in ``kernels/tiles.py`` chooses.
"""

import contextlib
import datetime
import functools
import itertools
import math
import os
import pathlib
import subprocess
import time
from collections.abc import Iterable
from typing import Any

import torch

from fusedmlp._version import __version__
from fusedmlp.dispatch import backend_choice, predicate
from fusedmlp.torch_tools import cuda_graph
from fusedmlp.tuning import timing
from fusedmlp.tuning.result import Product, Stretch, Tuned
from fusedmlp.tuning.subjects import Chain, LayerProduct, why_not_accurate


class Tuning:
    """One call of ``tune``: its device and dtype, its results, and the table to which they are added."""

    def __init__(self, device: torch.device, dtype: torch.dtype, final_relu: bool) -> None:
        self.kernels = predicate.kernels()
        self.tuning_table = self.kernels.tuning_table
        self.device, self.dtype, self.final_relu = device, dtype, final_relu
        self.index = device.index if device.type == "cuda" else None
        self.here = self.tuning_table.where(self.index)
        self.kind = self.kernels.arithmetic(dtype)
        self.path: pathlib.Path = self.tuning_table.users_file(self.here)
        self.found = self._on_disk()  # the entries of the file, and this call's results
        self.results: list[Product | Stretch] = []
        self.left_out: list[str] = []  # names what was not measured, and says why

    def run(self, shapes: Iterable[tuple[int, ...]], seconds: float) -> Tuned:
        """Measure the shapes that are not in the table yet. No new measurement begins after ``seconds``."""
        end = time.monotonic() + seconds
        with contextlib.suppress(ImportError):  # show a progress bar if tqdm is installed
            from tqdm import tqdm

            shapes = tqdm(shapes, desc="tuning", unit="shape")
        try:
            for shape in shapes:
                what = f"{shape[0]} x {'-'.join(map(str, shape[1:]))}"
                try:
                    if not self._measure(shape[0], shape[1:], end):
                        over = f"the {seconds:g} seconds were over before all of it was measured"
                        self.left_out.append(f"{what}: {over}")
                except torch.OutOfMemoryError:
                    self.left_out.append(f"{what}: not enough memory")
                    torch.cuda.empty_cache()
                self._save()
        finally:
            self.tuning_table.disagree(self.index)
        products = tuple(result for result in self.results if isinstance(result, Product))
        chains = tuple(result for result in self.results if isinstance(result, Stretch))
        dtype = str(self.dtype).removeprefix("torch.")
        return Tuned(self.here.device, dtype, products, chains, tuple(self.left_out), str(self.path))

    def _measure(self, rows: int, widths: tuple[int, ...], end: float) -> bool:
        """Add the missing measurements of this shape to the table; return False if time ran out before."""
        layers = list(itertools.pairwise(widths))
        tasks: list[Any] = [
            (self.found.products, f"{K} -> {N}", operation, (N, K), self._product)
            for (K, N), operation in itertools.product(dict.fromkeys(layers), self.kernels.tiles.OPERATIONS)
        ]
        parts = [(layer, self.final_relu or i < len(layers) - 1) for i, layer in enumerate(layers)]
        chains = dict.fromkeys([(widths, self.final_relu), *parts])
        tasks += [
            (self.found.stretches, "-".join(map(str, part)), mode, (part, relu), self._chain)
            for (part, relu), mode in itertools.product(chains, self.tuning_table.MODES)
        ]
        for table, what, name, sizes, measure in tasks:
            key = name, self.kind, self.tuning_table.bucket(rows), *sizes
            if key in table:
                continue
            if time.monotonic() > end:
                return False
            try:
                result, entry = measure(name, rows, *sizes)
            except (self.kernels.KernelFailed, cuda_graph.CaptureFailed) as failure:
                self.left_out.append(f"{name} of {rows} x {what}: {failure}")
                continue
            self.results.append(result)
            if entry is not None:
                table[key] = entry
        return True

    def _product(self, operation: str, M: int, N: int, K: int) -> tuple[Product, Any]:
        """Check and time one product with every tile.

        Returns the result, and the entry for the table or None if no tile is accurate.
        """
        one = LayerProduct(operation, M, N, K, device=self.device, dtype=self.dtype)
        torchs, exact = one.by_torch(), one.by_torch(in_float64=True)
        samples = {
            None: timing.on_device(one.by_torch, self.device)
        }  # the key is a tile, or None for PyTorch
        problems = []
        for tile in self.kernels.tiles.candidates(self.kind, one.aligned):
            run = functools.partial(one.by_kernel, tile)
            try:
                problem = why_not_accurate(run, torchs, exact)
                if problem is None:
                    samples[tile] = timing.on_device(run, self.device)
            except cuda_graph.CaptureFailed as failure:
                problem = f"not timed: {failure}"
            if problem is not None:
                problems.append(f"{_words(tile)}: {problem}")
        times = timing.medians(samples, self.device)
        torch_us = times.pop(None)
        problem = "; ".join(problems) or None
        if not times:
            return Product(operation, M, N, K, None, None, torch_us, problem), None
        tile = min(times, key=lambda tile: times[tile])
        result = Product(operation, M, N, K, _words(tile), times[tile], torch_us, problem)
        return result, self.tuning_table.Product(tile, times[tile], torch_us)

    def _chain(self, mode: str, M: int, widths: tuple[int, ...], relu: bool) -> tuple[Stretch, Any]:
        """Time a chain on eager PyTorch and on the kernels, with one launch per layer and with one for all.

        Returns the result and the entry for the table.
        """
        chain = Chain(M, widths, relu, mode == "training", device=self.device, dtype=self.dtype)
        ours = functools.partial(chain.call, backend_choice.measuring)
        torchs = functools.partial(chain.call, lambda: backend_choice.backend("torch"))
        key = mode, self.kind, self.tuning_table.bucket(M), widths, relu
        found = []
        problem = None
        for in_one in (False, True) if self._fits_in_one(M, widths) else (False,):
            # The kernels follow this table: the products measured so far, and whether to use one launch.
            entry = self.tuning_table.Stretch(math.inf, math.inf, in_one, "")
            self.tuning_table.agree(self.index, self.found.joined(self.tuning_table.Table({}, {key: entry})))
            if in_one:
                problem = chain.why_not_accurate()
                if problem is not None:
                    break
            times = timing.wall_times({"ours": ours, "torch": torchs}, self.device)
            found.append((times["ours"], times["torch"], in_one))
        us, torch_us, in_one = min(found, key=lambda times: times[0] / times[1])
        entry = self.tuning_table.Stretch(us, torch_us, in_one, "")
        return Stretch(mode, M, widths, relu, in_one, us, torch_us, problem), entry

    def _fits_in_one(self, M: int, widths: tuple[int, ...]) -> bool:
        """Whether there is a kernel that computes all of these layers in one launch."""
        launch, select_form = self.kernels.launch, self.kernels.narrow.forward.select_form
        aligned = all(map(launch.is_aligned, widths))
        num_sms = launch.device_limits(self.index).num_sms
        return len(widths) > 2 and select_form(M, widths, self.kind, aligned, True, num_sms) is not None

    def _on_disk(self) -> Any:
        """The table in the file, empty if there is none. Raises RuntimeError if a later version wrote it."""
        try:
            text = self.path.read_text(encoding="utf-8")
            return self.tuning_table.parse(text, self.here, exact=True)[0]
        except self.tuning_table.NewerFormat as problem:
            what_to_do = "update fusedmlp, or delete the file"
            raise RuntimeError(f"the table {self.path} {problem}: {what_to_do}") from None
        except (OSError, UnicodeDecodeError, self.tuning_table.Unusable):
            return self.tuning_table.Table()

    def _save(self) -> None:
        """Add the results to the file. Other processes may do so too, and no reader sees half a file."""
        from filelock import FileLock  # torch requires it

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            self.found = self._on_disk().joined(self.found)
            if self.tuning_table.read(self.path, self.here, exact=True) is None and self.path.exists():
                os.replace(self.path, self.path.with_suffix(".bad"))  # read() has warned and said why
            unfinished = self.path.with_suffix(".tmp")
            text = self.tuning_table.to_text(self.here, _about(), self.found)
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, self.path)


def _about() -> dict[str, str]:
    """The versions and the date that the file records."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = "unknown"
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"torch": torch.__version__, "driver": driver, "fusedmlp": __version__, "date": today}


def _words(tile: Any) -> str:
    return f"{tile.BLOCK_R}x{tile.BLOCK_C}x{tile.BLOCK_K}, {tile.num_warps} warps"
