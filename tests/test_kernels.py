"""Every launcher against float64: on the GPU if there is one, else in Triton's interpreter."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from oracle import assert_right, surrounded
from torch.utils._python_dispatch import TorchDispatchMode

from fusedmlp import _reference

pytestmark = pytest.mark.kernels

aten = torch.ops.aten
INTERPRETED = not torch.cuda.is_available()

# (M, N, K): one of each, odd ones, one row, the edges of tiles, MNIST's, several tiles each way, rows enough
# to be cut into parts, none
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
    """Large tiles and long persistent loops, or small tiles and split sums, whatever the machine."""
    from fusedmlp.kernels import _launch

    sms = 2 if request.param == "few multiprocessors" else 40
    monkeypatch.setattr(_launch, "device_limits", lambda index: _launch.Device(sms, 99 * 1024))


def bounds(dtype: torch.dtype) -> dict[str, float]:
    """The interpreter truncates to bfloat16 where a GPU rounds to nearest: twice the error, by itself."""
    if dtype == torch.bfloat16 and INTERPRETED:
        return {"factor": 4.0, "floor": torch.finfo(dtype).eps}
    return {}


def kernels() -> Any:
    from fusedmlp import kernels

    return kernels


class Canaries(TorchDispatchMode):
    """Puts every new tensor between canaries, full of NaN: what is not written, or past the end, shows."""

    PAD, CANARY = 2**16, 12345.0  # more than a tile's rows past the end

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not aten.new_empty.default or out.numel() == 0:
            return out
        buffer = out.new_full((out.numel() + 2 * self.PAD,), self.CANARY)
        self.buffers.append(buffer)
        inside = buffer[self.PAD : -self.PAD]
        inside.fill_(float("nan"))
        return inside.view(out.shape)

    def check(self) -> None:
        for buffer in self.buffers:
            edges = torch.cat((buffer[: self.PAD], buffer[-self.PAD :])).float()
            assert (edges == torch.tensor(self.CANARY).to(buffer.dtype).float()).all(), "written past the end"


def run(launcher: str, *arguments: Any) -> Any:
    """The launcher's result, its arguments untouched, its outputs wholly written and nothing past them."""
    versions = [t._version for t in arguments if isinstance(t, torch.Tensor)]
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
    with Canaries() as canaries:
        result = getattr(kernels(), launcher)(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    canaries.check()
    assert versions == [t._version for t in arguments if isinstance(t, torch.Tensor)]
    for old, new in zip(before, arguments, strict=True):
        if isinstance(old, torch.Tensor):
            torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    return result


def doubles(*arguments: Any) -> list[Any]:
    return [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]


def check(launcher: str, *arguments: Any) -> None:
    """A launcher against its namesake in _reference, in the same dtype and in float64."""
    dtype = arguments[0].dtype
    ours = run(launcher, *arguments)
    torchs = getattr(_reference, launcher)(*arguments)
    exact = getattr(_reference, launcher)(*doubles(*arguments))
    if isinstance(ours, torch.Tensor):
        ours, torchs, exact = (ours,), (torchs,), (exact,)
    for i, (our, its, right) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert (our is None) == (its is None)
        if our is not None:
            assert_right(our, its, right, f"{launcher}[{i}] {dtype}", **bounds(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_linear_forward(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, chip: None) -> None:
    x, weight, bias = (torch.randn(s, device=device, dtype=dtype) for s in ((M, K), (N, K), (N,)))
    for b in (bias, None):
        for relu in (True, False):
            check("linear_forward", x, weight, b, relu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_backward(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, chip: None) -> None:
    x, weight, grad = (torch.randn(s, device=device, dtype=dtype) for s in ((M, K), (N, K), (M, N)))
    y = torch.relu(torch.randn(M, N, device=device, dtype=dtype))
    for need_grad_bias in (True, False):
        check("relu_backward", grad, y, need_grad_bias)
    grad_z = torch.where(y > 0, grad, 0)
    check("grad_bias", grad_z)
    check("grad_input", grad_z, weight)
    check("grad_weight", grad_z, x)


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
        if layout == "offset":  # starts on no 16 bytes, rows of an odd length
            return torch.randn(rows * columns + 1, device=device, dtype=dtype)[1:].view(rows, columns)
        return surrounded(torch.randn(rows, columns, device=device, dtype=dtype))

    x, weight, grad, y = laid(M, K), laid(N, K), laid(M, N), laid(M, N)
    bias = torch.randn(2 * N, device=device, dtype=dtype)[::2]
    check("linear_forward", x, weight, bias, True)
    check("relu_backward", grad, y, True)
    check("grad_bias", grad)
    check("grad_input", grad, weight)
    check("grad_weight", grad, x)


def test_nan_and_infinity_follow_torch(device: torch.device) -> None:
    """relu keeps NaN; its gradient is 0 where y <= 0 and passed elsewhere, also where y is NaN."""
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[nan, 1.0], [1.0, -1.0], [inf, 1.0], [-inf, 1.0], [0.0, 0.0]], device=device)
    check("linear_forward", x, torch.randn(3, 2, device=device), torch.randn(3, device=device), True)
    y = torch.tensor([[nan, 0.0, -0.0, 1.0, inf, 1e-45, 0.0, 2.0]], device=device)
    grad = torch.tensor([[3.0, inf, nan, nan, -inf, 4.0, -inf, inf]], device=device)
    ours, _ = run("relu_backward", grad, y, False)
    torch.testing.assert_close(ours, aten.threshold_backward(grad, y, 0), rtol=0, atol=0, equal_nan=True)


def test_large_bias_is_added_last(device: torch.device) -> None:
    """A sum that starts from the bias would lose the product's low bits against it."""
    x, weight = torch.randn(16, 8192, device=device), torch.randn(16, 8192, device=device)
    check("linear_forward", x, weight, torch.full((16,), 1e4, device=device), False)


def test_forward_rounds_once(device: torch.device) -> None:
    """All but the few values within float32's error of a tie are float64's, rounded once."""
    x, weight, bias = (torch.randn(s, device=device).half() for s in ((64, 96), (80, 96), (80,)))
    y = run("linear_forward", x, weight, bias, True)
    exact = _reference.linear_forward(*doubles(x, weight, bias, True))
    assert (y == exact.half()).double().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_same_bits_every_time(dtype: torch.dtype, device: torch.device, chip: None) -> None:
    x, grad = (
        torch.randn(1500, 20, device=device, dtype=dtype),
        torch.randn(1500, 24, device=device, dtype=dtype),
    )
    y = torch.relu(torch.randn_like(grad))
    for launcher, arguments in (("grad_weight", (grad, x)), ("relu_backward", (grad, y, True))):
        first, second = (getattr(kernels(), launcher)(*arguments) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("pitch", [2**21, 2**26], ids=["regular", "huge strides"])
def test_offsets_past_31_bits(pitch: int, device: torch.device) -> None:
    """Rows so far apart that a 32-bit offset would wrap; only the pages with rows in them become memory."""
    rows = 2**31 // pitch + 6
    far = torch.empty(rows * pitch, dtype=torch.float16, device=device).view(rows, pitch)
    x, grad = far[:, :16], far[:, 16:48]
    x.copy_(torch.randn(rows, 16))
    grad.copy_(torch.randn(rows, 32))
    weight = torch.randn(32, 16, device=device, dtype=torch.float16)
    for launcher, arguments in (
        ("linear_forward", (x, weight, None, True)),
        ("relu_backward", (grad, grad, True)),
        ("grad_input", (grad, weight)),
        ("grad_weight", (grad, x)),
    ):
        ours = getattr(kernels(), launcher)(*arguments)
        near = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments]
        expected = getattr(kernels(), launcher)(*near)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("", "ieee"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
        ("torch.set_float32_matmul_precision('high')", "tf32"),
        ("torch.set_float32_matmul_precision('highest')", "ieee"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.fp32_precision = 'tf32'", "tf32"),
        (
            "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'",
            "ieee",
        ),
    ],
)
def test_float32_arithmetic_follows_torchs_settings(setting: str, kind: str) -> None:
    """In a process of its own: the settings are global, and their old and new forms do not mix."""
    imports = "import torch; from fusedmlp.kernels._launch import arithmetic"
    code = f"{imports}\n{setting}\nprint(arithmetic(torch.float32))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == kind, run.stderr


@pytest.mark.gpu
def test_outputs_past_31_bits(device: torch.device) -> None:
    M, N = 2**31 // 512 + 300, 512
    x, weight = torch.randn(M, 16, device=device).bfloat16(), torch.randn(N, 16, device=device).bfloat16()
    y = kernels().linear_forward(x, weight, None, True)
    grad_z, _ = kernels().relu_backward(y, y, False)
    for rows in (slice(0, 300), slice(M - 300, M)):
        torch.testing.assert_close(y[rows], _reference.linear_forward(x[rows], weight, None, True))
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
            y = kernels().linear_forward(x, weight, None, False)
            assert_right(y, _reference.linear_forward(x, weight, None, False), exact, precision)
            errors[precision] = (y.double() - exact).abs().max().item()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["tf32"] > 10 * errors["ieee"]


def test_regular_is_what_the_large_tiles_were_compiled_for() -> None:
    """Aligned for 16-byte copies as Triton sees it, and small enough for 32-bit offsets within a tile."""
    from fusedmlp.kernels._launch import is_regular

    x = torch.empty(8, 64, dtype=torch.float16)
    assert is_regular(x, 32)
    for other, columns in (
        (x, 10),
        (x.t(), 32),
        (x[:, :24], 32),
        (x[:, 1:33], 32),
        (torch.empty(8, 24, dtype=torch.float16), 32),
        (torch.empty(8, 64, dtype=torch.float16)[:, ::2], 32),
        (torch.empty(1, dtype=torch.float16).expand(8, 64), 32),
        (torch.empty(1, 2**22, dtype=torch.float16), 32),
        (x, 2**22),
    ):
        assert not is_regular(other, columns)
