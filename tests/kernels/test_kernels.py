"""Every launcher is compared with float64, on the GPU if there is one, else in Triton's interpreter."""

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from launched import Canaries, as_double, bounds, tensors_of
from oracle import assert_right, surrounded
from torch.utils._pytree import tree_map_only

from fusedmlp.dispatch import reference

pytestmark = pytest.mark.kernels

aten = torch.ops.aten
INTERPRETED = not torch.cuda.is_available()

# (M, N, K): sizes of 1, unaligned sizes, one row, MNIST's sizes, tiles filled exactly and in part, several
# tiles in each direction, enough rows to be split into parts, and sizes of 0
SHAPES = [
    (1, 1, 1),
    (1, 10, 784),
    (7, 127, 10),
    (33, 10, 127),
    (128, 128, 64),
    (130, 70, 16),
    (257, 129, 48),
    (272, 144, 48),
    (600, 32, 16),
    (0, 3, 4),
    (4, 0, 3),
    (5, 3, 0),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["few multiprocessors", "many multiprocessors"])
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few multiprocessors: large tiles and long persistent loops; many: small tiles and split sums."""
    from fusedmlp.kernels import launch

    sms = 2 if request.param == "few multiprocessors" else 40
    monkeypatch.setattr(launch, "device_limits", lambda index: launch.Device(sms, 99 * 1024))


def launch(launcher: str, *arguments: Any, **options: Any) -> Any:
    """Return a launcher's result, after its partial sums over rows have been added up."""
    from fusedmlp.kernels import launch, partial_sums
    from fusedmlp.kernels.layer import forward, grad_input, grad_weight, relu_backward

    setting = launch.setting_of(tensors_of(arguments)[0])
    sums: Any = []
    if launcher == "linear_forward":
        x, weight, bias, _ = arguments
        aligned = (
            launch.is_aligned_tensor(x)
            and launch.is_aligned_tensor(weight)
            and launch.is_aligned(len(weight))
        )
        aligned = aligned and (bias is None or bias.stride(0) == 1)
        return forward.linear_forward(*arguments, aligned, setting)
    if launcher == "relu_backward":
        result: Any = relu_backward.relu_backward(*arguments, setting, sums)
    elif launcher == "grad_input":
        aligned = all(launch.is_aligned_tensor(t) for t in arguments[:3] if t is not None)
        result = grad_input.grad_input(*arguments, aligned, setting, sums, **options)
    else:
        pairs, bias_left = arguments
        layers = [
            grad_weight.Layer(
                z,
                x,
                launch.is_aligned_tensor(z) and launch.is_aligned_tensor(x),
                x.new_empty(z.shape[1], x.shape[1]),
            )
            for z, x in pairs
        ]
        grad_bias = grad_weight.grad_weights(layers, bias_left, setting, sums)
        result = [layer.grad for layer in layers], grad_bias
    partial_sums.add_up(sums)
    return result


class Plain:
    """What the launchers compute, in plain torch."""

    linear_forward = staticmethod(reference.linear_forward)

    @staticmethod
    def relu_backward(grad_output: Any, y: Any, need_grad_bias: bool) -> Any:
        grad_z = grad_output if y is None else reference.relu_backward(grad_output, y)
        return grad_z, grad_z.sum(0) if need_grad_bias else None

    @staticmethod
    def grad_input(grad_z: Any, weight: Any, y: Any, need_grad_bias: bool) -> Any:
        return Plain.relu_backward(grad_z @ weight, y, need_grad_bias)

    @staticmethod
    def grad_weights(layers: Any, bias_left: Any) -> Any:
        grads = [grad_z.t() @ x for grad_z, x in layers]
        return grads, None if bias_left is None else bias_left.sum(0)


def run(launcher: str, *arguments: Any, **options: Any) -> Any:
    """Run a launcher and check that it writes all of its outputs and nothing else."""
    given = tensors_of(arguments)
    versions, before = [t._version for t in given], [t.clone() for t in given]
    with Canaries() as canaries:
        result = launch(launcher, *arguments, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    canaries.check()
    assert versions == [t._version for t in given]
    for old, new in zip(before, given, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    return result


def check(launcher: str, *arguments: Any, **options: Any) -> None:
    """Compare a launcher with plain torch, in the same dtype and in float64."""
    plain = getattr(Plain, launcher)
    dtype = tensors_of(arguments)[0].dtype
    ours = tensors_of([run(launcher, *arguments, **options)])
    torchs, exact = (tensors_of([plain(*a)]) for a in (arguments, as_double(arguments)))
    for i, (our, its, right) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert our.is_contiguous() or any(our is t for t in tensors_of(arguments))
        assert_right(our, its, right, f"{launcher}[{i}] {dtype}", **bounds(dtype))


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_linear_forward(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, chip: None) -> None:
    x, weight, bias = (torch.randn(s, device=device, dtype=dtype) for s in ((M, K), (N, K), (N,)))
    for b in (bias, None):
        for relu in (True, False):
            check("linear_forward", x, weight, b, relu)


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_backward(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, chip: None) -> None:
    x, weight, grad = (torch.randn(s, device=device, dtype=dtype) for s in ((M, K), (N, K), (M, N)))
    y, below = torch.relu(torch.randn(M, N, device=device, dtype=dtype)), torch.relu(x)
    for need_grad_bias in (True, False):
        check("relu_backward", grad, y, need_grad_bias)
        check("grad_input", grad, weight, below, need_grad_bias)
    check("relu_backward", grad, None, True)
    check("grad_input", grad, weight, None, False)
    check("grad_weights", [(grad, x)], None)
    check("grad_weights", [(grad, x)], grad)


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("M", [0, 1, 130, 700])
@pytest.mark.parametrize(
    "widths",
    [(32, 16, 48), (7, 5, 1, 10), (48, 10), (784, 16, 10), (3, 0, 4), tuple(range(1, 20)), (16,) * 18],
    ids=["aligned", "unaligned", "one", "both kinds", "an empty one", "many", "many aligned"],
)
def test_grouped_weight_gradients(
    widths: tuple[int, ...], M: int, dtype: torch.dtype, device: torch.device, chip: None
) -> None:
    """One launch computes the weight gradients of all layers, and the bias gradient of the last one."""
    layers = [
        (torch.randn(M, N, device=device, dtype=dtype), torch.randn(M, K, device=device, dtype=dtype))
        for K, N in itertools.pairwise(widths)
    ]
    check("grad_weights", layers, layers[-1][0])


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("counts", [(0, 1, 2), (2, 33, 1), (2, 1, 600)])
def test_adding_up(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Sums may have any size and any number of parts, and there may be more than fit in one launch."""
    from fusedmlp.kernels import partial_sums

    shapes = [(parts, *size) for parts in counts for size in ((1,), (70,), (3, 9), (0,))] * 3
    assert len(shapes) > partial_sums.MOST_AT_ONCE
    partials = [torch.randn(shape, device=device) for shape in shapes]
    outs = [torch.full(shape[1:], float("nan"), device=device, dtype=dtype) for shape in shapes]
    partial_sums.add_up(list(zip(partials, outs, strict=True)))
    for parts, out in zip(partials, outs, strict=True):
        # The interpreter adds a block's parts one by one; PyTorch and a GPU add them as a tree.
        floor = 16 * torch.finfo(torch.float32).eps
        assert_right(out, parts.sum(0).to(dtype), parts.double().sum(0), str(tuple(parts.shape)), floor=floor)


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "layout", ["surrounded", "transposed", "every third", "one number", "one column", "offset"]
)
def test_strides(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    M, N, K = 70, 40, 50

    def laid(rows: int, columns: int) -> torch.Tensor:
        if layout == "transposed":
            return torch.randn(columns, rows, device=device, dtype=dtype).t()
        if layout == "every third":
            return torch.randn(2 * rows, 3 * columns, device=device, dtype=dtype)[::2, ::3]
        if layout == "one number":  # the gradient of .sum()
            return torch.ones(1, device=device, dtype=dtype).expand(rows, columns)
        if layout == "one column":
            return torch.randn(rows, 1, device=device, dtype=dtype).expand(rows, columns)
        if layout == "offset":  # unaligned: starts 1 element late
            return torch.randn(rows * columns + 1, device=device, dtype=dtype)[1:].view(rows, columns)
        return surrounded(torch.randn(rows, columns, device=device, dtype=dtype))

    x, weight, grad, y = laid(M, K), laid(N, K), laid(M, N), laid(M, N)
    bias = torch.randn(2 * N, device=device, dtype=dtype)[::2]
    below = laid(M, K)
    check("linear_forward", x, weight, bias, True)
    check("relu_backward", grad, y, True)
    check("relu_backward", grad, None, True)
    check("grad_input", grad, weight, below, True)
    if layout in ("surrounded", "offset"):  # mlp_backward passes only row-major tensors
        check("grad_weights", [(grad, x)], grad)


def test_nan_and_infinity_follow_torch(device: torch.device) -> None:
    """relu keeps NaN. Its gradient is 0 where y <= 0 and passes elsewhere, also where y is NaN."""
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[nan, 1.0], [1.0, -1.0], [inf, 1.0], [-inf, 1.0], [0.0, 0.0]], device=device)
    check("linear_forward", x, torch.randn(3, 2, device=device), torch.randn(3, device=device), True)
    y = torch.tensor([[nan, 0.0, -0.0, 1.0, inf, 1e-45, 0.0, 2.0]], device=device)
    grad = torch.tensor([[3.0, inf, nan, nan, -inf, 4.0, -inf, inf]], device=device)
    expected = aten.threshold_backward(grad, y, 0)
    ours, _ = run("relu_backward", grad, y, False)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    ours, _ = run("grad_input", grad.t().contiguous(), torch.eye(1, device=device), y.t().contiguous(), False)
    torch.testing.assert_close(ours.t(), expected, rtol=0, atol=0, equal_nan=True)


def test_infinite_weights_do_not_reach_the_sums_from_beyond_the_last_row(device: torch.device) -> None:
    """A tile reaches past the last row, and 0 * inf there would be NaN."""
    weight = torch.full((16, 16), float("inf"), device=device)
    grad, y = torch.ones(5, 16, device=device), torch.ones(5, 16, device=device)
    assert run("grad_input", grad, weight, y, True)[1].isinf().all()


def test_large_bias_is_added_last(device: torch.device) -> None:
    """A sum that starts from the bias would lose the product's low bits against it."""
    x, weight = torch.randn(16, 8192, device=device), torch.randn(16, 8192, device=device)
    check("linear_forward", x, weight, torch.full((16,), 1e4, device=device), False)


def test_forward_rounds_once(device: torch.device) -> None:
    """Almost all values are float64's rounded once; float32's error matters only next to a tie."""
    x, weight, bias = (torch.randn(s, device=device).half() for s in ((64, 96), (80, 96), (80,)))
    y = run("linear_forward", x, weight, bias, True)
    exact = reference.linear_forward(x.double(), weight.double(), bias.double(), True)
    assert (y == exact.half()).double().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_same_bits_every_time(dtype: torch.dtype, device: torch.device, chip: None) -> None:
    x, grad = (
        torch.randn(1500, 20, device=device, dtype=dtype),
        torch.randn(1500, 24, device=device, dtype=dtype),
    )
    y = torch.relu(torch.randn_like(grad))
    for launcher, arguments in (
        ("grad_weights", ([(grad, x), (grad, y)], grad)),
        ("relu_backward", (grad, y, True)),
        ("grad_input", (x, torch.randn_like(grad[:20]), y, True)),
    ):
        first, second = (tensors_of([launch(launcher, *arguments)]) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("pitch", [2**21, 2**26], ids=["aligned", "huge strides"])
def test_offsets_past_31_bits(pitch: int, device: torch.device) -> None:
    """The rows are so far apart that a 32-bit offset would wrap. Only pages that hold rows take memory."""
    rows = 2**31 // pitch + 6
    far = torch.empty(rows * pitch, dtype=torch.float16, device=device).view(rows, pitch)
    x, grad = far[:, :16], far[:, 16:48]
    x.copy_(torch.randn(rows, 16))
    grad.copy_(torch.randn(rows, 32))
    weight = torch.randn(32, 16, device=device, dtype=torch.float16)
    for launcher, arguments in (
        ("linear_forward", (x, weight, None, True)),
        ("relu_backward", (grad, grad, True)),
        ("grad_input", (grad, weight, x, True)),
        ("grad_weights", ([(grad, x)], grad)),
    ):
        ours = launch(launcher, *arguments)
        expected = launch(launcher, *tree_map_only(torch.Tensor, torch.Tensor.contiguous, arguments))
        torch.testing.assert_close(ours, expected)


def test_a_bias_of_huge_strides(device: torch.device) -> None:
    far = torch.empty(32 * 2**27, dtype=torch.float16, device=device).view(32, 2**27)
    bias = far[:, 0]
    bias.copy_(torch.arange(32))
    x, weight = (torch.zeros(s, dtype=torch.float16, device=device) for s in ((4, 16), (32, 16)))
    assert torch.equal(launch("linear_forward", x, weight, bias, True)[0], bias)


# Each setting of torch for float32 products -> the arithmetic that the kernels use.
SETTINGS = {
    "": "ieee",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.set_float32_matmul_precision('highest')": "ieee",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
}


def test_float32_arithmetic_follows_torchs_settings() -> None:
    """Each setting gets its own process: they are global, and old and new forms cannot be mixed."""
    code = (
        "import os, torch\n"
        "from fusedmlp.kernels.launch import arithmetic\n"
        f"for setting in {list(SETTINGS)!r}:\n"
        "    if os.fork() == 0:\n"
        "        exec(setting)\n"
        "        print(arithmetic(torch.float32), flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == list(SETTINGS.values()), run.stderr


@pytest.mark.gpu
def test_outputs_past_31_bits(device: torch.device) -> None:
    M, N = 2**31 // 512 + 300, 512
    x, weight = torch.randn(M, 16, device=device).bfloat16(), torch.randn(N, 16, device=device).bfloat16()
    y = launch("linear_forward", x, weight, None, True)
    grad_z, _ = launch("relu_backward", y, y, False)
    for rows in (slice(0, 300), slice(M - 300, M)):
        torch.testing.assert_close(y[rows], reference.linear_forward(x[rows], weight, None, True))
        assert torch.equal(grad_z[rows], y[rows])


@pytest.mark.gpu
def test_tf32_follows_torchs_setting(device: torch.device) -> None:
    x, weight = torch.randn(256, 512, device=device), torch.randn(128, 512, device=device)
    exact = x.double() @ weight.double().t()
    errors = {}
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            y = launch("linear_forward", x, weight, None, False)
            assert_right(y, reference.linear_forward(x, weight, None, False), exact, precision)
            errors[precision] = (y.double() - exact).abs().max().item()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["tf32"] > 10 * errors["ieee"]


def test_what_counts_as_aligned() -> None:
    """Aligned means: Triton can copy 16 bytes at once, and offsets within a tile fit in 32 bits."""
    from fusedmlp.kernels.launch import is_aligned, is_aligned_tensor

    x = torch.empty(8, 64, dtype=torch.float16)
    assert is_aligned_tensor(x)
    for other in (
        x.t(),
        x[:, :24],
        x[:, 1:33],
        torch.empty(8, 24, dtype=torch.float16),
        torch.empty(8, 64, dtype=torch.float16)[:, ::2],
        torch.empty(1, dtype=torch.float16).expand(8, 64),
        torch.empty(1, 2**22, dtype=torch.float16),
        torch.empty(2**22, dtype=torch.float16).expand(8, -1),
    ):
        assert not is_aligned_tensor(other)
    assert is_aligned(32)
    assert not is_aligned(10)
    assert not is_aligned(2**22)
