"""Narrow chains in one launch are compared with float64; and the rule that chooses one launch is tested."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from available import HAS_TRITON
from launched import Canaries, as_double, bounds, tensors_of
from oracle import assert_all_right, assert_right, surrounded

from fusedmlp.dispatch import reference

if not HAS_TRITON:
    pytest.skip("Triton is not installed: no kernels to run", allow_module_level=True)

from fusedmlp.kernels import launch, partial_sums
from fusedmlp.kernels.narrow import backward as narrow_backward
from fusedmlp.kernels.narrow import forward as narrow_forward
from fusedmlp.kernels.narrow.forward import FEW_ROWS, IN_REGISTERS, THROUGH_CACHE, Form, select_form, wins
from fusedmlp.kernels.tiles import ITEMSIZE, UNALIGNED
from fusedmlp.kernels.tuning_table import Product, Table

pytestmark = pytest.mark.kernels

KIND = {torch.float32: "ieee", torch.float16: "half", torch.bfloat16: "half"}
TABLES = {
    "few rows": FEW_ROWS,
    "through the cache": THROUGH_CACHE,
    "in registers": dict.fromkeys(("half", "ieee"), IN_REGISTERS),
}


def chain(device: torch.device, M: int, widths: Sequence[int], dtype: torch.dtype) -> Any:
    """x, weights and biases. Every third layer has no bias."""
    sizes = list(itertools.pairwise(widths))
    x = torch.randn(M, widths[0], device=device, dtype=dtype)
    weights = [(torch.randn(N, K, device=device) / K**0.5).to(dtype) for K, N in sizes]
    biases = [
        None if i % 3 == 2 else torch.randn(N, device=device).to(dtype) for i, (_, N) in enumerate(sizes)
    ]
    return x, weights, biases


def untouched(function: Any, *arguments: Any) -> Any:
    """Call a function and check that it writes all of its outputs and nothing else."""
    given = tensors_of(arguments)
    before = [t.clone() for t in given]
    with Canaries() as canaries:
        result = function(*arguments)
    canaries.check()
    for old, new in zip(before, given, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    return result


def forward(x: Any, weights: Any, biases: Any, final_relu: bool, keep: int, form: Form) -> Any:
    ys = narrow_forward.narrow_forward(x, weights, biases, final_relu, keep, launch.setting_of(x), form)
    assert ys is not None
    return ys


def backward(
    grad: Any,
    activations: Any,
    weights: Any,
    final_relu: bool,
    need_x: bool,
    need_w: Any,
    need_b: Any,
    form: Form,
) -> Any:
    """Return grad_x, grad_z of each layer, and the bias gradients."""
    sums: Any = []
    given = narrow_backward.Chain(
        grad, activations, weights, final_relu, need_x, need_w, need_b, launch.setting_of(grad), sums
    )
    found = narrow_backward.narrow_backward(given, form)
    partial_sums.add_up(sums)
    assert found is not None
    return found


def plain_backward(grad: Any, activations: Any, weights: Any, final_relu: bool) -> Any:
    """All gradients in plain torch, except the bias gradient of a last layer without a ReLU."""
    grads_z, grads_b = [], []
    last = len(weights) - 1
    for i in range(last, -1, -1):
        if i < last or final_relu:
            grad = reference.relu_backward(grad, activations[i + 1])
        grads_z.append(grad)
        grads_b.append(grad.sum(0) if i < last or final_relu else None)
        grad = grad @ weights[i]
    return grad, grads_z[::-1], grads_b[::-1]


def check_forward(arguments: Any, final_relu: bool, keep: int, form: Form) -> None:
    ours = untouched(forward, *arguments, final_relu, keep, form)
    torchs = reference.mlp_forward(*arguments, final_relu, keep)
    exact = reference.mlp_forward(*as_double(arguments), final_relu, keep)
    assert len(ours) == len(exact)
    dtype = arguments[0].dtype
    for i, (our, its, right) in enumerate(zip(ours, torchs, exact, strict=True)):
        # Errors add up over several products, and PyTorch's own error is sometimes small by chance.
        assert_right(our, its, right, f"y {keep + i} {dtype}", **({"factor": 3.0} | bounds(dtype)))


def check_backward(arguments: Any, grad: torch.Tensor, final_relu: bool, need_x: bool, form: Form) -> None:
    x, weights, biases = arguments
    ys = reference.mlp_forward(x, weights, biases, final_relu, 0)
    saved = [x, *ys] if final_relu else [x, *ys[:-1], None]
    everything = [True] * len(weights)
    ours = untouched(backward, grad, saved, weights, final_relu, need_x, everything, everything, form)
    assert (ours[0] is not None) is need_x

    def plain(grad: Any, saved: Any, weights: Any) -> list[torch.Tensor]:
        found = plain_backward(grad, saved, weights, final_relu)
        return tensors_of(found if need_x else found[1:])

    def nearby(nudged: Any) -> list[torch.Tensor]:
        return plain(nudged(grad), saved, [nudged(weight) for weight in weights])

    mine, exact = tensors_of(ours), plain(as_double(grad), as_double(saved), as_double(weights))
    which = ["grad_x"] * need_x + ["grad_z"] * len(weights)
    names = [f"{name} {grad.dtype}" for name in which + ["grad_bias"] * (len(exact) - len(which))]
    room = {"factor": 3.0} | bounds(grad.dtype)
    assert_all_right(mine, plain(grad, saved, weights), exact, names, nearby, **room)


WIDTHS = [
    (784, 128, 64, 10),
    (127, 1, 7, 10),
    (16, 127),
    (10, 16, 100),
    (33, 32, 16, 7, 10, 1, 64, 16, 5),  # the largest depth
]


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", KIND)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("table", TABLES)
def test_forward_and_backward(
    table: str, widths: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    form = TABLES[table][KIND[dtype]]
    if dtype == torch.bfloat16:  # the interpreter truncates to bfloat16, and the errors of many layers add up
        widths = widths[:5]
    for M, final_relu in ((1, False), (7, True), (127, False)):
        arguments = chain(device, M, widths, dtype)
        keep = {1: len(widths) - 2, 7: 0, 127: (len(widths) - 1) // 2}[M]
        check_forward(arguments, final_relu, keep, form)
        grad = torch.randn(M, widths[-1], device=device).to(dtype)
        check_backward(arguments, grad, final_relu, final_relu or M == 1, form)


@pytest.mark.parametrize("table", ["few rows", "through the cache"])
def test_width_256(table: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.float16):
        arguments = chain(device, 70, (784, 256, 128, 10), dtype)
        form = TABLES[table][KIND[dtype]]
        check_forward(arguments, False, 0, form)
        check_forward(arguments, False, 2, form)
        check_backward(arguments, torch.randn(70, 10, device=device).to(dtype), False, True, form)


@pytest.mark.thinned
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("layout", ["surrounded", "transposed", "every third", "offset"])
def test_strides(layout: str, table: str, device: torch.device) -> None:
    def laid(t: torch.Tensor) -> torch.Tensor:
        rows, columns = t.shape
        if layout == "transposed":
            return t.t().contiguous().t()
        if layout == "every third":
            wide = t.new_full((2 * rows, 3 * columns), float("nan"))
            wide[::2, ::3] = t
            return wide[::2, ::3]
        if layout == "offset":  # unaligned: starts 1 element late
            flat = t.new_empty(rows * columns + 1)
            flat[1:] = t.flatten()
            return flat[1:].view(rows, columns)
        return surrounded(t)

    x, weights, biases = chain(device, 70, (50, 40, 33), torch.float32)
    arguments = laid(x), [laid(w) for w in weights], [b.repeat_interleave(2)[::2] for b in biases]
    form = TABLES[table]["ieee"]
    check_forward(arguments, True, 0, form)
    for grad in (torch.randn(70, 33, device=device), torch.ones(1, device=device).expand(70, 33)):
        check_backward(arguments, laid(grad) if grad.is_contiguous() else grad, True, True, form)


@pytest.mark.parametrize("table", TABLES)
def test_every_combination_of_needed_gradients(table: str, device: torch.device) -> None:
    x, weights, biases = chain(device, 20, (20, 16, 33, 5), torch.float32)
    form = TABLES[table]["ieee"]
    ys = reference.mlp_forward(x, weights, biases, True, 0)
    grad = torch.randn(20, 5, device=device)
    exact = plain_backward(as_double(grad), as_double([x, *ys]), as_double(weights), True)
    torchs = plain_backward(grad, [x, *ys], weights, True)
    some = [[True] * 3, [False] * 3, [False, True, False], [True, False, True]]
    for need_x, need_w, need_b in itertools.product([False, True], some, some):
        saved = [x if need_w[0] else None, *ys]
        given = weights if need_x else [None, *weights[1:]]
        grad_x, grads_z, grads_b = untouched(backward, grad, saved, given, True, need_x, need_w, need_b, form)
        assert (grad_x is not None) == need_x
        assert [g is not None for g in grads_b] == need_b
        wanted = [(grad_x, torchs[0], exact[0])] if need_x else []
        wanted += [three for need, *three in zip(need_w, grads_z, torchs[1], exact[1], strict=True) if need]
        wanted += [three for need, *three in zip(need_b, grads_b, torchs[2], exact[2], strict=True) if need]
        for our, its, right in wanted:
            assert_right(our, its, right, str((need_x, need_w, need_b)), factor=3)


@pytest.mark.parametrize("table", TABLES)
def test_nan_and_infinity_follow_torch(table: str, device: torch.device) -> None:
    """The widths are unaligned, so values past an edge could spoil results if they were not masked."""
    nan, inf = float("nan"), float("inf")
    form = TABLES[table]["ieee"]
    x, weights, biases = chain(device, 5, (3, 5, 7, 4), torch.float32)
    for value in (nan, inf, -inf):
        x[1, 2] = value
        weights[1][0, 1] = value
        for final_relu in (False, True):
            ours = forward(x, weights, biases, final_relu, 0, form)
            theirs = reference.mlp_forward(x, weights, biases, final_relu, 0)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)
        ys = reference.mlp_forward(x, weights, biases, True, 0)
        grad = torch.randn(5, 4, device=device)
        grad[3, 1] = value
        needs = [True] * 3
        ours = backward(grad, [x, *ys], weights, True, True, needs, needs, form)
        theirs = plain_backward(grad, [x, *ys], weights, True)
        for a, b in zip(tensors_of([ours]), tensors_of([theirs]), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.thinned
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_same_bits_every_time(dtype: torch.dtype, table: str, device: torch.device) -> None:
    x, weights, biases = chain(device, 300, (24, 32, 10), dtype)
    form = TABLES[table][KIND[dtype]]
    grad, needs = torch.randn(300, 10, device=device).to(dtype), [True] * 2
    both = []
    for _ in range(2):
        ys = forward(x, weights, biases, True, 0, form)
        both.append([*ys, *tensors_of([backward(grad, [x, *ys], weights, True, True, needs, needs, form)])])
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b)


def test_offsets_past_31_bits(device: torch.device) -> None:
    """The rows are so far apart that a 32-bit offset would wrap. Only pages that hold rows take memory."""
    pitch = 2**21
    rows = 2**31 // pitch + 70
    far = torch.empty(rows * pitch, dtype=torch.float16, device=device).view(rows, pitch)
    x, grad = far[:, :16], far[:, 16:32]
    x.copy_(torch.randn(rows, 16))
    grad.copy_(torch.randn(rows, 16))
    _, weights, biases = chain(device, 1, (16, 32, 16), torch.float16)
    needs = [True] * 2
    for form in (FEW_ROWS["half"], IN_REGISTERS):
        ys = forward(x, weights, biases, True, 0, form)
        found = tensors_of([ys, backward(grad, [x, *ys], weights, True, True, needs, needs, form)])
        near, gradient = x.contiguous(), grad.contiguous()
        ys = forward(near, weights, biases, True, 0, form)
        again = tensors_of([ys, backward(gradient, [near, *ys], weights, True, True, needs, needs, form)])
        for a, b in zip(found, again, strict=True):
            assert torch.equal(a, b)


def test_huge_strides_and_unusual_activations_go_layer_by_layer(device: torch.device) -> None:
    x, weights, biases = chain(device, 4, (16, 32, 16), torch.float32)
    setting, form = launch.setting_of(x), FEW_ROWS["ieee"]
    far = torch.empty(4 * 2**22, device=device).view(4, 2**22)[:, :16]
    assert narrow_forward.narrow_forward(far, weights, biases, False, 0, setting, form) is None
    assert narrow_forward.narrow_forward(x[:0], weights, biases, False, 0, setting, form) is None
    far_bias = torch.empty(31 * 2**22 + 1, device=device)[:: 2**22]
    assert narrow_forward.narrow_forward(x, weights, [far_bias, None], False, 0, setting, form) is None
    hidden = torch.ones(32, 4, device=device).t()
    needs = [True] * 2
    saved = [x, hidden, None]
    given = narrow_backward.Chain(x[:, :16], saved, weights, False, False, needs, needs, setting, [])
    assert narrow_backward.narrow_backward(given, form) is None


def test_which_form() -> None:
    """The form depends on rows, widths and alignment. There is none for too many or too wide layers."""
    sms = 132
    for kind in ITEMSIZE:
        mnist, wide = (784, 128, 10), (784, 256, 10)
        cached = THROUGH_CACHE.get(kind, FEW_ROWS[kind])
        in_registers = IN_REGISTERS if kind == "half" else cached
        for M, widths, aligned, forward, form in (
            (16 * sms, mnist, True, True, FEW_ROWS[kind]),
            (16 * sms + 1, mnist, False, True, FEW_ROWS[kind]),
            (16 * sms + 1, mnist, True, True, in_registers),
            (16 * sms + 1, mnist, True, False, cached),
            (16 * sms + 1, wide, True, True, FEW_ROWS[kind]),
            (16 * sms + 1, (16,) * 6, True, True, cached),
        ):
            assert select_form(M, widths, kind, aligned, forward, sms) == form
        for M in (16, 65536):
            assert select_form(M, (16,) * 9, kind, True, True, sms) is not None
            for widths in ((16,) * 10, (784, 257, 10), (784, 0, 10), (0, 16, 10)):
                assert select_form(M, widths, kind, True, True, sms) is None


def taken(M: int, widths: tuple[int, ...], kind: str = "half", keep: int | None = None) -> bool:
    """Whether the rule chooses one launch for the forward, on 132 multiprocessors."""
    form = select_form(M, widths, kind, True, True, 132)
    if form is None:
        return False
    weights = sum(K * N for K, N in itertools.pairwise(widths))
    hidden = widths[1:-1]
    columns = 2 * sum(hidden) - sum(hidden[len(hidden) if keep is None else keep :])
    return wins(form, M, weights, len(hidden), columns, ITEMSIZE[kind], 132)


def test_when_one_launch_is_chosen() -> None:
    """One launch pays off if it saves more than it costs.

    With few rows it saves launches; with many rows it saves reads and writes of memory. Its cost is that
    every program reads all weights from the cache.
    """
    assert taken(128, (784, 128, 10))
    assert taken(128, (784, 256, 128, 10))
    assert not taken(128, (784, 256, 10))
    assert not taken(128, (4096, 128, 10))
    assert not taken(128, (784, 256, 128, 10), "ieee")  # twice the bytes
    assert taken(2**20, (64, 64, 64, 64))
    assert taken(2**20, (128, 128, 128, 128))
    assert not taken(2**20, (784, 128, 10))  # most of the work is in the first layer
    assert not taken(2**20, (128, 128, 128, 128), keep=0)  # the hidden activations must be written anyway
    assert taken(2**20, (64, 64, 64, 64), keep=0)


def test_a_chain_measured_layer_by_layer_runs_layer_by_layer(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights, biases = chain(device, 8, (16, 32, 16), torch.float32)
    before = launch.setting_of(x)
    assert narrow_forward.narrow_forward(x, weights, biases, False, 0, before) is not None
    product = Product(UNALIGNED["ieee"], 1.0, 2.0)
    table = Table({("forward", "ieee", 8, 16, 32): product})
    monkeypatch.setattr(launch, "table_of", lambda index: table)
    setting = launch.setting_of(x)
    assert narrow_forward.narrow_forward(x, weights, biases, False, 0, setting) is None
    saved, needs = [x, torch.ones(8, 32, device=device), None], [True, True]
    given = narrow_backward.Chain(x, saved, weights, False, True, needs, needs, setting, [])
    assert narrow_backward.narrow_backward(given) is None
