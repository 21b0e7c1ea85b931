"""The cases that are measured: kinds of work, shapes and dtypes, with the FLOPs and bytes of each."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

LAYER_FORWARD, LAYER_BOTH = "layer forward", "layer forward+backward"
INFERENCE, BOTH, STEP = "MLP inference", "MLP forward+backward", "training step"
KINDS = (LAYER_FORWARD, LAYER_BOTH, INFERENCE, BOTH, STEP)
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}


@contextlib.contextmanager
def arithmetic(dtype: str) -> Iterator[None]:
    """Compute float32 products in TF32 inside if ``dtype``, a key of DTYPES, is "tf32", otherwise in IEEE."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class Case(NamedTuple):
    """One kind of work on ``rows`` rows. A layer ends in a ReLU, an MLP does not."""

    what: str
    rows: int
    widths: tuple[int, ...]
    dtype: str  # a key of DTYPES; "tf32" is float32 with TF32 products allowed

    def __str__(self) -> str:
        return f"{self.what} {self.size}"

    @property
    def size(self) -> str:
        return f"{self.rows}x{'x'.join(map(str, self.widths))} {self.dtype}"

    @property
    def final_relu(self) -> bool:
        return self.what in (LAYER_FORWARD, LAYER_BOTH)

    @property
    def forward_only(self) -> bool:
        return self.what in (LAYER_FORWARD, INFERENCE)

    @property
    def need_x(self) -> bool:
        """Whether to compute the gradient of the input: for a layer inside a network, not for data."""
        return self.what == LAYER_BOTH

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(in, out) of each layer."""
        return list(itertools.pairwise(self.widths))

    @property
    def flops(self) -> int:
        """A multiplication and an addition each: of the forward, and twice as many for the two gradients."""
        forward = [2 * self.rows * K * N for K, N in self.layers]
        if self.forward_only:
            return sum(forward)
        return 3 * sum(forward) - (0 if self.need_x else forward[0])

    @property
    def least_bytes(self) -> int:
        """What kernels that compute a layer each read and write, every tensor once.

        Forward: x, weight, bias, y. Backward: grad_z, x (whose sign is the mask of the layer below), weight
        and, for the gradients, weight and bias again and grad_x; of a last ReLU y. A step's optimizer is not
        counted.
        """
        M, last = self.rows, len(self.layers) - 1
        values = 0
        for i, (K, N) in enumerate(self.layers):
            values += M * K + N * K + N + M * N
            if not self.forward_only:
                values += M * N + M * K + N * K + N
                if i > 0 or self.need_x:
                    values += N * K + M * K
                if i == last and self.final_relu:
                    values += M * N
        return values * DTYPES[self.dtype].itemsize


def network(widths: Sequence[int], final_relu: bool = False, nn: Any = torch.nn) -> torch.nn.Sequential:
    """Linear layers of these widths with a ReLU between them and, if ``final_relu``, after the last."""
    layers: list[torch.nn.Module] = []
    for K, N in itertools.pairwise(widths):
        layers += [nn.Linear(K, N), nn.ReLU()]
    model: torch.nn.Sequential = nn.Sequential(*(layers if final_relu else layers[:-1]))
    return model


MNIST = (784, 256, 128, 10)
NARROW = ((64,) * 5, (128,) * 5)  # four layers of one width

# Rows and widths. The most informative come first, because the time may end before the last.
LAYERS = (
    (65536, 256, 256),
    (8192, 4096, 4096),
    (65536, 1024, 1024),
    (32, 784, 256),
    (128, 784, 256),
    (4096, 784, 256),
    (4096, 127, 127),
    (4096, 784, 10),
    (4096, 1024, 1024),
    (1024, 4096, 4096),
    (65536, 127, 127),
    (65536, 64, 64),
    (65536, 8192, 8192),
)
MLPS = (
    (128, *MNIST),
    (1024, *MNIST),
    (8192, *MNIST),
    (65536, *NARROW[0]),
    (65536, *NARROW[1]),
    (65536, 256, 256, 256, 256),
    (8192, 4096, 4096, 4096),
    (512, *MNIST),
    (4096, *MNIST),
    (4096, 127, 127, 127, 10),
    (65536, 1024, 1024, 1024),
    (65536, 8192, 8192, 8192),
)
STEPS = ((128, *MNIST), (512, *MNIST), (1024, *MNIST), (8192, *MNIST), (65536, 784, 256, 256, 10))


def _of(kinds: Iterable[str], shapes: Iterable[tuple[int, ...]], dtypes: Iterable[str]) -> list[Case]:
    return [
        Case(what, rows, tuple(widths), dtype)
        for dtype, (rows, *widths), what in itertools.product(dtypes, shapes, kinds)
    ]


def sweep() -> list[Case]:
    """All cases, the most informative first."""
    cases = []
    for dtypes in (("bfloat16",), ("tf32",), ("float16", "float32")):
        cases += _of((STEP,), STEPS, dtypes)
        cases += _of((BOTH, INFERENCE), MLPS, dtypes)
        cases += _of((LAYER_BOTH, LAYER_FORWARD), LAYERS, dtypes)
    return cases


def quick() -> list[Case]:
    """A few cases of each kind."""
    cases = _of((STEP,), [STEPS[0], STEPS[2]], ("bfloat16", "tf32"))
    cases += _of((BOTH, INFERENCE), [MLPS[1], MLPS[3], MLPS[5], MLPS[6]], ("bfloat16",))
    return cases + _of((LAYER_BOTH, LAYER_FORWARD), LAYERS[:4], ("bfloat16",))


def numerics() -> list[Case]:
    """Real sizes whose results are compared with float64, those that are hardest for a kernel first."""
    mlps = [MLPS[i] for i in (1, 9, 5, 3, 4, 6, 10)]
    return _of((BOTH,), mlps, DTYPES) + _of((LAYER_BOTH,), [LAYERS[i] for i in (3, 6, 10, 1)], DTYPES)


def on_a_cpu() -> list[Case]:
    """Cases for a CPU, where PyTorch's operators compute everything: they show what our modules add."""
    cases = _of((STEP, BOTH, INFERENCE), ((1, *MNIST), (64, *MNIST), (1024, *MNIST)), ("float32",))
    return cases + _of((LAYER_BOTH, LAYER_FORWARD), ((1, 784, 256), (512, 784, 256)), ("float32",))


def dry() -> list[Case]:
    """Tiny cases of every kind for Triton's interpreter; not in bfloat16, to which it does not round."""
    cases = _of((STEP, BOTH, INFERENCE), ((8, 20, 16, 10),), ("float32", "tf32"))
    return cases + _of((LAYER_BOTH, LAYER_FORWARD), ((8, 16, 16), (5, 17, 7)), ("float32", "float16"))
