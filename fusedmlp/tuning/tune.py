"""``tune(shapes)`` and ``python -m fusedmlp tune``: measure on this device and choose by the results."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fusedmlp import functional
from fusedmlp.dispatch import autocast, backend_choice, predicate
from fusedmlp.tuning.measure import Tuning
from fusedmlp.tuning.result import Tuned


def tune(
    shapes: Iterable[Sequence[int]],
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 60.0,
    *,
    final_relu: bool = False,
    device: torch.device | str | None = None,
) -> Tuned:
    """Measure chains of layers on this device; from now on ``backend("auto")`` chooses by the results.

    shapes: a list of ``(rows, in, hidden ..., out)``, with a ReLU between the layers and, if ``final_relu``,
    after the last. Rows are the batch size; a result holds for all batch sizes within a factor of 1.4.
    dtype: bfloat16, float16 or float32 (TF32 where PyTorch's settings allow it). seconds: nothing new begins
    after this time. device: the current CUDA device by default.

    Every product of a layer is computed with every tile, checked against float64, and timed beside PyTorch;
    then the chain as a whole, and each of its layers. ``fusedmlp/tuning/measure.py`` lists the steps. The
    results are kept in a JSON file in the platform's cache folder, which is written after each shape. What is
    in this file already is not measured again.

    In a distributed job, call it on every rank after ``init_process_group``: rank 0 measures, and all ranks
    use its table. Without this call no rank uses the user's table, because the ranks' files may differ.

    Raises RuntimeError where the kernels cannot run, during CUDA graph capture or compilation, and for a
    table written by a later version; ValueError and TypeError for wrong shapes and dtypes.

    >>> print(fusedmlp.tune([(4096, 784, 256, 128, 10)], torch.bfloat16))
    NVIDIA H100 80GB HBM3, bfloat16 ...
    """
    wanted = _checked(shapes)
    if dtype not in autocast.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, autocast.DTYPES))}, got {dtype}")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    if torch.compiler.is_compiling():
        raise RuntimeError("tune cannot be compiled: call it before the model runs")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune cannot run during CUDA graph capture: call it before")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    probe = torch.ones(1, 1, device=where, dtype=dtype)
    with backend_choice.backend("triton"):
        reason = functional.why_not_fused(probe, probe)
    if reason is not None:
        raise RuntimeError(f"tune cannot run here. {reason}")
    if predicate.kernels().tuning_table.in_a_distributed_job():
        return _on_rank_0(probe.device, dtype, final_relu, wanted, seconds)
    return Tuning(probe.device, dtype, final_relu).run(wanted, seconds)


def _on_rank_0(
    where: torch.device, dtype: torch.dtype, final_relu: bool, wanted: list[tuple[int, ...]], seconds: float
) -> Tuned:
    """Measure on rank 0, and use its table on every rank."""
    distributed, table = torch.distributed, predicate.kernels().tuning_table
    if not distributed.is_initialized():
        raise RuntimeError("in a distributed job, call tune on every rank after init_process_group")
    message: list[Any] = [None]
    try:
        if distributed.get_rank() == 0:
            tuning = Tuning(where, dtype, final_relu)
            tuned = tuning.run(wanted, seconds)
            message = [(tuning.here, tuning.path.read_text(encoding="utf-8"), tuned)]
    except BaseException as error:
        message = [f"{type(error).__name__}: {error}"]
        raise
    finally:  # also after an error, because the other ranks wait for this message
        distributed.broadcast_object_list(message, src=0)
    if isinstance(message[0], str):
        raise RuntimeError(f"tune failed on rank 0: {message[0]}")
    rank_0, text, result = message[0]
    try:
        agreed, _ = table.parse(text, table.where(where.index), exact=False)
    except table.Unusable as problem:
        raise RuntimeError(f"rank 0's table cannot be used here: it {problem}; rank 0: {rank_0}") from None
    table.agree(where.index, agreed)
    return result  # type: ignore[no-any-return]


def _checked(shapes: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
    wanted = []
    for shape in shapes:
        if isinstance(shape, int):
            raise TypeError("shapes is a list of shapes: [(rows, in, out)]")
        sizes = tuple(shape)
        if not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
            raise TypeError(f"a shape is (rows, in, hidden ..., out) in whole numbers, got {sizes}")
        if len(sizes) < 3 or min(sizes) < 1:
            raise ValueError(f"a shape is (rows, in, hidden ..., out), each at least 1, got {sizes}")
        wanted.append(sizes)
    if not wanted:
        raise ValueError("shapes is empty: give at least one (rows, in, hidden ..., out)")
    return wanted


def add_parser(subparsers: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Add ``python -m fusedmlp tune``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tune",
        help="measure chains of layers on this device, and choose by the results",
        description="Measure chains of layers on this device: each product with every tile and with "
        "PyTorch's operator, and each chain as a whole. The results are kept in the platform's cache folder, "
        "and every later run on this device uses them. What was measured before is not measured again.",
        epilog="example: python -m fusedmlp tune 4096,784,256,128,10 65536,256,256 --dtype bf16",
    )
    shapes_help = "the batch size and the widths of a chain of layers, separated by commas"
    parser.add_argument("shapes", nargs="+", metavar="ROWS,IN,...,OUT", help=shapes_help)
    dtype_help = "fp32, bf16 or fp16 (default: bf16)"
    parser.add_argument("--dtype", choices=dtypes, default="bf16", metavar="DTYPE", help=dtype_help)
    seconds_help = "begin nothing after this time (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=60.0, help=seconds_help)
    parser.add_argument("--final-relu", action="store_true", help="put a ReLU after the last layer, too")
    parser.add_argument("--device", help="default: the current CUDA device")

    def run(options: argparse.Namespace) -> int:
        try:
            shapes = [tuple(int(size) for size in shape.split(",")) for shape in options.shapes]
            named = {"final_relu": options.final_relu, "device": options.device}
            print(tune(shapes, dtypes[options.dtype], options.seconds, **named))
        except (ValueError, RuntimeError) as refusal:
            parser.error(str(refusal).splitlines()[0])
        return 0

    parser.set_defaults(run=run)
