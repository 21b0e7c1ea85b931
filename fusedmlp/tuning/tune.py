"""``tune(shapes)``: measure here what the kernels are faster for, and choose by that from now on."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fusedmlp import functional
from fusedmlp.dispatch import backend_choice, predicate
from fusedmlp.tuning.measure import Tuning
from fusedmlp.tuning.result import Tuned

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tune(
    shapes: Iterable[Sequence[int]],
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 60.0,
    *,
    final_relu: bool = False,
    device: torch.device | str | None = None,
) -> Tuned:
    """Measure stretches of layers on this device, and let ``backend("auto")`` choose by that from now on.

    shapes: ``(rows, in, hidden ..., out)`` each, with a ReLU between the layers and, if ``final_relu``, after
    the last; dtype: bfloat16, float16 or float32 (TF32 where PyTorch's settings allow that); device: the
    current CUDA device if not said. Rows stand for all of about that number, within a factor of 1.4.

    Every product of every layer is computed with each tile there is, checked against float64, and timed
    beside PyTorch's operator; then each stretch as a whole, with a launch a layer and, where layers are
    narrow, with one for all, and each of its layers alone, with what launching costs. What is in the table
    already is not measured again, nor what has not begun after ``seconds``. The table, a JSON file in the
    platform's cache folder, is written after each shape, so an interrupt loses the present shape only.

    In a distributed job call it on every rank, once the process group is there: rank 0 measures, and all
    ranks choose by its table. Without that call they use no table of the user's, for files may differ.

    Raises RuntimeError where the kernels cannot run, during CUDA graph capture or compilation, and for a
    table of a later version; ValueError and TypeError for wrong shapes and dtypes. Then nothing has changed.

    >>> print(fusedmlp.tune([(4096, 784, 256, 128, 10)], torch.bfloat16))
    NVIDIA H100 80GB HBM3, bfloat16 ...
    """
    wanted = _checked(shapes)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    if torch.compiler.is_compiling():
        raise RuntimeError("tune cannot be compiled: call it before the model runs")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune cannot run during CUDA graph capture: call it before")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    probe = torch.ones(1, 1, device=where, dtype=dtype)
    with backend_choice.backend("triton"):
        reason = functional.why_not_fused(probe, probe)
    if reason is not None:
        raise RuntimeError(f"tune measures the kernels, and they cannot run: {reason}")
    table = predicate.kernels().tuning_table
    if not table.in_a_distributed_job():
        return Tuning(where, dtype, final_relu).run(wanted, seconds)
    distributed = torch.distributed
    if not distributed.is_initialized():
        raise RuntimeError("in a distributed job, call tune on every rank after init_process_group")
    message: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            tuning = Tuning(where, dtype, final_relu)
            tuned = tuning.run(wanted, seconds)
            message = [(tuning.here, tuning.path.read_text(encoding="utf-8"), tuned)]
        except BaseException as error:
            message = [f"{type(error).__name__}: {error}"]
            raise
        finally:  # the others are waiting, whatever happened
            distributed.broadcast_object_list(message, src=0)
    else:
        distributed.broadcast_object_list(message, src=0)
        if isinstance(message[0], str):
            raise RuntimeError(f"tune failed on rank 0: {message[0]}")
    (of_rank_0, text, tuned) = message[0]
    index = where.index
    try:
        agreed, _ = table.parse(text, table.where(index), exact=False)
    except table.Unusable as problem:
        raise RuntimeError(f"rank 0's table is of no use here: it {problem}; {of_rank_0}") from None
    table.agree(index, agreed)
    result: Tuned = tuned
    return result


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
    return list(dict.fromkeys(wanted))


def add_parser(subparsers: Any, dtypes: dict[str, torch.dtype]) -> None:
    """``python -m fusedmlp tune``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tune",
        help="measure stretches of layers here, and choose by that from now on",
        description="Measure stretches of layers on this device, each product with every tile and on "
        "PyTorch's operator, and each stretch as a whole; keep the table in the platform's cache folder, "
        "where every later run on this device reads it. What is in it already is not measured again.",
        epilog="example: python -m fusedmlp tune 4096,784,256,128,10 65536,256,256 --dtype bf16",
    )
    parser.add_argument(
        "shapes",
        nargs="+",
        metavar="ROWS,IN,...,OUT",
        help="rows (the batch) and the widths of a stretch of layers, with commas between",
    )
    parser.add_argument(
        "--dtype", choices=dtypes, default="bf16", metavar="DTYPE", help="fp32, bf16 or fp16 (default: bf16)"
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="begin nothing after (default: %(default)s)"
    )
    parser.add_argument("--final-relu", action="store_true", help="with a ReLU after the last layer, too")
    parser.add_argument("--device", help="default: the current CUDA device")

    def run(options: argparse.Namespace) -> int:
        try:
            shapes = [tuple(int(size) for size in shape.split(",")) for shape in options.shapes]
            tuned = tune(
                shapes, dtypes[options.dtype], options.seconds,
                final_relu=options.final_relu, device=options.device,
            )  # fmt: skip
        except (ValueError, RuntimeError) as refusal:
            parser.error(str(refusal).splitlines()[0])
        print(tuned)
        return 0

    parser.set_defaults(run=run)
