"""The calls of launch_path.py: every launcher of fusedmlp.kernels, in every specialisation of its kernels.

Tensors are on the CPU, whose addresses pass for the device's. Nothing computes, so sizes cost nothing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fusedmlp.kernels import mlp_backward, mlp_forward
from fusedmlp.kernels.train_step import persistent, step

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
MNIST = (784, 256, 128, 10)
SHALLOW = (784, 128, 10)
ONE_LAYER = (784, 10)
EVERY = (80, 86, 89, 90, 100, 120)


class Case(NamedTuple):
    """One call. Each build takes a second or two: variants of a kernel are built for a chip or two only."""

    name: str
    call: Callable[[], None]
    chips: tuple[int, ...] = EVERY


def later(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Make calls of the function into functions without arguments that make the call."""
    return functools.wraps(function)(lambda *args, **kwargs: functools.partial(function, *args, **kwargs))


@later
def chain(
    dtype: torch.dtype,
    rows: int,
    widths: Sequence[int],
    final_relu: bool = False,
    need_x: bool = False,
    bias: bool = True,
    transposed: bool = False,
    gradient: str = "dense",
    inference: bool = False,
) -> None:
    """Layers of these widths, forward and backward.

    transposed: x is; gradient: of the output, "dense", "one number" as sum().backward() makes it, or
    "transposed".
    """
    x = torch.zeros(rows, widths[0], dtype=dtype)
    if transposed:
        x = torch.zeros(widths[0], rows, dtype=dtype).t()
    count = len(widths) - 1
    weights = [torch.zeros(widths[i + 1], widths[i], dtype=dtype) for i in range(count)]
    biases = [torch.zeros(width, dtype=dtype) if bias else None for width in widths[1:]]
    ys = mlp_forward(x, weights, biases, final_relu, count - 1 if inference else 0)
    if inference:
        return
    grad_output = {
        "dense": torch.zeros(rows, widths[-1], dtype=dtype),
        "one number": torch.zeros(1, 1, dtype=dtype).expand(rows, widths[-1]),
        "transposed": torch.zeros(widths[-1], rows, dtype=dtype).t(),
    }[gradient]
    needs = need_x, [True] * count, [bias] * count
    mlp_backward(grad_output, [x, *ys], weights, final_relu, 0, *needs)


@later
def in_tf32(call: Callable[[], None]) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        call()
    finally:
        matmul.fp32_precision = before


@later
def training(
    dtype: torch.dtype,
    rows: int,
    widths: tuple[int, ...],
    loss: str,
    optimizer: str,
    pixels: bool = False,
    how: str = "step",
) -> None:
    """A training step of a network, in one of its forms.

    pixels: x is uint8, and an index chooses its rows. how: "step", "built and step", "overlap" or "steps".
    """
    layers = range(len(widths) - 1)

    def of_parameters() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        return (
            tuple(torch.zeros(widths[i + 1], widths[i]) for i in layers),
            tuple(torch.zeros(widths[i + 1]) for i in layers),
        )

    none: tuple[tuple[None, ...], tuple[None, ...]] = ((None,) * len(layers), (None,) * len(layers))
    workspace = step.workspace_for(widths, rows, dtype, torch.device("cpu"))
    squares = none if optimizer == "sgd" else of_parameters()
    parameters = step.Parameters(*of_parameters(), workspace.low_precision, *of_parameters(), *squares)
    network = step.Network(widths, loss, optimizer, nesterov=optimizer == "sgd")
    examples = 2 * rows
    x = torch.zeros(examples, widths[0], dtype=torch.uint8 if pixels else FLOAT)
    index = torch.arange(examples) if pixels else None
    target = torch.zeros(examples, widths[-1])
    if loss == "cross_entropy":
        target = torch.zeros(examples, dtype=torch.int64)
    coefficients, losses = torch.zeros(4, 2 * len(layers), 8), torch.zeros(4)
    scale = 1 / 255 if pixels else 1.0
    job = step.Job(x, index, target, parameters, network, coefficients, losses, workspace, scale)
    if how == "steps":
        # Two full batches and a shorter one.
        persistent.train_steps(job, 0, 2 * rows, rows - 3)
        return
    if how == "built and step":
        step.build_step(job, rows)
    step.train_step(job, 1, rows, 2, how == "overlap")


TO_10 = (784, 512, 10)
ODD = (127, 301, 10)
CASES = (
    # Layers too wide for one launch.
    Case("bfloat16, to 10 classes", chain(BFLOAT, 1024, (784, 512, 512, 10), need_x=True)),
    Case("float32, to 10 classes", chain(FLOAT, 1024, TO_10, final_relu=True, need_x=True)),
    Case("float32, transposed gradient", chain(FLOAT, 1024, TO_10, final_relu=True, gradient="transposed")),
    Case("float16, odd widths", chain(HALF, 77, ODD, final_relu=True)),
    Case("float16, transposed gradient", chain(HALF, 77, ODD, final_relu=True, gradient="transposed")),
    Case(
        "bfloat16, x transposed, no bias, one gradient",
        chain(BFLOAT, 512, (64, 512), True, bias=False, transposed=True, gradient="one number"),
        (90,),
    ),
    Case("bfloat16, 1 wide", chain(BFLOAT, 512, (1, 512, 1)), (80,)),
    Case("float32, 1 wide", chain(FLOAT, 512, (512, 1)), (90,)),
    Case("TF32", in_tf32(chain(FLOAT, 4096, (512, 512, 512))), (90,)),
    Case("TF32, odd widths", in_tf32(chain(FLOAT, 77, ODD)), (80,)),
    # Narrow layers: all in one launch.
    Case("bfloat16, narrow", chain(BFLOAT, 256, MNIST)),
    Case("float32, narrow, odd widths", chain(FLOAT, 77, (127, 100, 127, 7), final_relu=True), (80, 90, 100)),
    Case("bfloat16, narrow, inference", chain(BFLOAT, 256, MNIST, inference=True), (90,)),
    Case("float16, narrow, 1 wide", chain(HALF, 256, (1, 64, 1)), (80,)),
    Case("float16, narrow, many rows", chain(HALF, 65536, (64, 64, 64, 64), need_x=True), (80, 90)),
    Case("TF32, narrow", in_tf32(chain(FLOAT, 256, (784, 128, 128, 10))), (80,)),
    # Training steps. tests/kernels/test_codegen.py compiles those of more layers.
    Case(
        "step built ahead, float32, pixels, Adam",
        training(FLOAT, 100, SHALLOW, "cross_entropy", "adam", pixels=True, how="built and step"),
    ),
    Case(
        "step, bfloat16, SGD, squared error, odd",
        training(BFLOAT, 99, (51, 201, 7), "mse", "sgd"),
        (80, 90, 120),
    ),
    Case("step, TF32, many rows", in_tf32(training(FLOAT, 4096, SHALLOW, "cross_entropy", "adamw")), (90,)),
    Case("step, float16, 1 wide", training(HALF, 1, (1, 16, 1), "mse", "adam"), (80,)),
    Case(
        "step overlapping, bfloat16",
        training(BFLOAT, 128, SHALLOW, "cross_entropy", "adamw", pixels=True, how="overlap"),
        (90,),
    ),
    Case(
        "step overlapping, one layer",
        training(BFLOAT, 128, ONE_LAYER, "cross_entropy", "adamw", how="overlap"),
        (100, 120),
    ),
    Case(
        "steps, float16, pixels, AdamW",
        training(HALF, 128, SHALLOW, "cross_entropy", "adamw", pixels=True, how="steps"),
        (80, 90),
    ),
    Case(
        "steps, float16, one layer",
        training(HALF, 128, ONE_LAYER, "cross_entropy", "adamw", pixels=True, how="steps"),
        (86, 89, 100, 120),
    ),
    Case("steps, TF32, SGD", in_tf32(training(FLOAT, 128, SHALLOW, "mse", "sgd", how="steps")), (80,)),
)
