"""The launches and bytes that explain names are those of a real run."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inspected import CPU, Holder, shown
from torch import nn as tnn

import fusedmlp
from fusedmlp import nn
from fusedmlp.inspection.explain import explain


def test_bytes_and_operators_by_hand() -> None:
    """8 rows through 5 -> 4 -> 3, in elements of 4 bytes."""
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=False)), torch.randn(8, 5)
    (row,) = explain(model, x).rows
    # linear 0: x 40, weight 20, bias 4, y 32: 96; relu: 32 + 32 = 64; linear 2: 32 + 12 + 24 = 68.
    assert row.forward.launches == ("linear", "relu", "linear")
    assert row.forward.bytes == 4 * (96 + 64 + 68) == 912
    # Layer 2: its input's gradient reads 24, 12, writes 32; its weight's reads 24, 32, writes 12: 68 each.
    # threshold_backward reads 32 and 32, writes 32: 96. Layer 0, weight: 32 + 40 + 20 = 92; sum: 32 + 4 = 36.
    assert row.backward is not None
    assert row.backward.launches == ("mm", "mm", "threshold_backward", "mm", "sum")
    assert row.backward.bytes == 4 * (68 + 68 + 96 + 92 + 36) == 1440
    # The gradient of x takes one more product: 32 + 20 + 40 = 92.
    (row,) = explain(model, x.requires_grad_()).rows
    assert row.backward is not None
    assert row.backward.bytes == 1440 + 4 * 92
    text = shown(explain(model, x))
    assert "2 layers in 1 chain on cpu: 9 launches (unfused 9), 2.72 kB moved" in text
    assert "1 linear" not in text
    assert "2 linear, 1 relu\n" in text
    assert "4 mm, 1 threshold_backward, 1 sum\n" in text
    assert CPU in text


def one_by_one(patch: pytest.MonkeyPatch) -> None:
    """Make narrow chains use one launch per layer too."""
    from fusedmlp.kernels import chain

    for launcher in ("narrow_forward", "narrow_backward"):
        patch.setattr(chain, launcher, lambda *args: None)


@pytest.mark.kernels
def test_bytes_of_a_narrow_chain_by_hand(device: torch.device) -> None:
    """The same chain with a gradient for x and a final ReLU."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU()).to(device)
    with fusedmlp.backend("triton"):
        (row,) = explain(model, torch.randn(8, 5, device=device, requires_grad=True)).rows
    assert row.backward is not None
    assert row.forward.launches == ("narrow_forward",)
    # Layer 0: x 40, weight 20, bias 4, and y 32, kept for the backward. Layer 2: weight 12, bias 3, y 24.
    assert row.forward.bytes == 4 * (96 + 39) == 540
    # narrow_backward reads the incoming gradient 24, weights 20 and 12, and outputs 32 and 24. It writes the
    # gradients before the ReLUs 32 and 24, of the biases 4 and 3, and of x 40: 215 in all.
    # grad_weights reads 24 and 32, writes 12: 68; then it reads 32 and 40, writes 20: 92.
    assert row.backward.launches == ("narrow_backward", "grad_weights")
    assert row.backward.bytes == 4 * (215 + 68 + 92) == 1500


@pytest.mark.kernels
def test_bytes_of_the_kernels_by_hand(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same chain with one launch per layer."""
    one_by_one(monkeypatch)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU()).to(device)
    x = torch.randn(8, 5, device=device, requires_grad=True)
    with fusedmlp.backend("triton"):
        (row,) = explain(model, x).rows
    assert row.reason is None
    assert row.backward is not None
    assert row.forward.launches == ("linear_forward", "linear_forward")
    # Layer 0: x 40, weight 20, bias 4, y 32. Layer 2: 32, 12, 3, 24. Unfused, relu moves 64 and 48 more.
    assert row.forward.bytes == 4 * (96 + 71) == 668
    assert row.forward.unfused_bytes == 668 + 4 * (64 + 48)
    # relu_backward reads 24 and 24, writes 24 and 3: 75. grad_input of layer 2 reads 24, 12 and the mask 32,
    # writes 32 and 4: 104; that of layer 0 reads 32 and 20, writes 40: 92. grad_weights is as above: 68, 92.
    assert Counter(row.backward.launches)["add_up"] <= 1
    assert row.backward.bytes == 4 * (75 + 104 + 92 + 68 + 92) == 1724
    # threshold_backward 72 and 96, sum 27 and 36, products 68, 68, 92, 92.
    assert row.backward.unfused_bytes == 4 * (72 + 96 + 27 + 36 + 2 * 68 + 2 * 92) == 2204
    with fusedmlp.backend("triton"):  # with many rows, partial sums are written and read too
        (many,) = explain(model, torch.randn(600, 5, device=device, requires_grad=True)).rows
    assert many.backward is not None
    assert "add_up" in many.backward.launches
    assert many.backward.bytes > 4 * (600 * (9 + 11 + 9 + 7 + 9) + 3 + 12 + 4 + 20 + 12 + 20)
    model[2].requires_grad_(False)
    with fusedmlp.backend("triton"):
        (row,) = explain(model[:3], x).rows
    # The last layer is frozen, so only its grad_input and the gradients of layer 0 and x are computed.
    assert row.backward is not None
    assert row.backward.bytes == 4 * (104 + 92 + 92) == 1152


@contextlib.contextmanager
def launched() -> Iterator[list[str]]:
    """Record the kernels that are really launched, on a GPU by Triton's hook, else in its interpreter."""
    import triton
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []

    def note(name: str) -> None:
        names.append(name.strip("_").removesuffix("_kernel"))

    if torch.cuda.is_available():
        hook = triton.knobs.runtime.launch_enter_hook
        entered = lambda data: note(data.get()["name"])  # noqa: E731  remove() needs this object
        hook.add(entered)
        try:
            yield names
        finally:
            hook.remove(entered)
    else:
        call = GridExecutor.__call__

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            note(self.fn.__name__)
            return call(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", counted)
            yield names


@contextlib.contextmanager
def operators() -> Iterator[list[tuple[str, tuple[tuple[int, ...], ...]]]]:
    """Record PyTorch's operators that the CPU runs or launches, with the shapes of their inputs."""
    seen: list[tuple[str, tuple[tuple[int, ...], ...]]] = []
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, acc_events=True
    ) as profile:
        yield seen
    seen += [
        (event.name, tuple(tuple(shape) for shape in event.input_shapes))
        for event in profile.events()
        if event.name.startswith("aten::")
    ]


# These make a tensor or another view of one, and compute nothing.
HARMLESS = {f"aten::{name}" for name in ("new_empty", "empty", "view", "as_strided", "detach", "alias")}


@pytest.mark.thinned
@pytest.mark.kernels
@pytest.mark.parametrize("in_one", [False, True], ids=["one by one", "in one"])
@pytest.mark.parametrize("rows", [7, 600])  # with 600 rows, sums over rows are split
@pytest.mark.parametrize(
    ("widths", "final_relu", "bias", "frozen", "need_x"),
    [
        ((5, 4, 3, 2), False, True, 0, False),
        ((5, 4, 3, 2), True, True, 0, False),
        ((5, 4, 3, 2), True, True, 0, True),
        ((5, 4, 3, 2), False, True, 1, False),  # the first layer is frozen
        ((5, 4, 3, 2), False, True, 2, False),  # the first two layers are frozen
        ((5, 4, 3), True, True, 1, True),  # the first layer is frozen, but x needs its gradient
        ((5, 4, 3), False, True, 2, True),  # both layers are frozen, but x needs its gradient
        ((5, 4, 3), False, False, 0, True),
        ((5, 4, 3), True, False, 0, False),
        ((32, 16, 16), False, True, 0, False),
        ((5, 3), True, True, 0, False),
        ((5, 3), False, True, 0, True),
        ((5, 3), False, False, 0, False),
    ],
)
def test_launches_are_those_of_a_real_run(
    widths: tuple[int, ...],
    final_relu: bool,
    bias: bool,
    frozen: int,
    need_x: bool,
    rows: int,
    in_one: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    L = len(widths) - 1
    if not in_one:
        one_by_one(monkeypatch)
    pairs = [(nn.Linear(widths[i], widths[i + 1], bias, device), nn.ReLU()) for i in range(L)]
    layers: list[tnn.Module] = [module for pair in pairs for module in pair]
    model = nn.Sequential(*(layers if final_relu else layers[:-1]))
    for linear, _ in pairs[:frozen]:
        linear.requires_grad_(False)
    x = torch.randn(rows, widths[0], device=device, requires_grad=need_x)
    grad = torch.randn(rows, widths[-1], device=device)
    with fusedmlp.backend("triton"):
        with launched() as names:
            (row,) = explain(model, x).rows
        assert row.forward.launches == tuple(names)  # explain itself runs the forward once, and no backward
        with launched() as names:
            y = model(x)
        one_launch = in_one and L > 1
        assert row.forward.launches == tuple(names)
        assert tuple(names) == (("narrow_forward",) if one_launch else ("linear_forward",) * L)
        with launched() as names, operators() as seen:
            y.backward(grad)
    assert row.backward is not None
    assert row.backward.launches == tuple(names)
    count = Counter(names)
    trained = L - frozen
    hidden = L - 1 if need_x else trained - 1
    of_activations = hidden + need_x + final_relu
    if in_one and of_activations > 1:  # a single launch cannot be merged
        assert count.pop("narrow_backward") == 1
    else:
        assert count.pop("grad_input", 0) == hidden + need_x
        assert count.pop("relu_backward", 0) == final_relu
    assert count.pop("grad_weights", 0) == (trained > 0)
    assert count.pop("add_up", 0) <= 1
    assert not count
    # Besides the kernels, nothing computes on a tensor with this many rows: no mask, no sum, no product.
    assert seen
    assert {name for name, shapes in seen if any(rows in shape for shape in shapes)} <= HARMLESS


def test_operators_are_those_of_a_real_run() -> None:
    """On the CPU, explain names the operators of PyTorch that a real run calls, and counts them right."""
    ours = {"linear", "relu", "threshold_backward", "mm", "sum"}
    for need_x in (False, True):
        model, x = nn.MLP(5, [4, 3], 2), torch.randn(8, 5, requires_grad=need_x)
        model[0].bias.requires_grad_(False)
        (row,) = explain(model, x).rows
        with operators() as forward:
            y = model(x)
        with operators() as backward:
            y.backward(torch.ones_like(y))
        assert row.backward is not None
        for events, launches in ((forward, row.forward.launches), (backward, row.backward.launches)):
            names = (name.removeprefix("aten::").rstrip("_") for name, _ in events)
            assert Counter(name for name in names if name in ours) == Counter(launches)
        # The profiler also sees threshold_backward, which the kernels make unnecessary.
        assert ("aten::threshold_backward", ((8, 4), (8, 4), ())) in backward


@pytest.mark.parametrize("how", ["frozen", "no_grad", "inference_mode", "no_grad inside"])
def test_without_a_backward(how: str) -> None:
    model: tnn.Module = nn.MLP(5, [4], 3)
    x = torch.randn(8, 5)
    modes = {"no_grad": torch.no_grad(), "inference_mode": torch.inference_mode()}
    if how == "frozen":
        model.requires_grad_(False)
    if how == "no_grad inside":

        def code(self: Any, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.base(x)
            return self.head(x)

        model = Holder(code, base=model, head=nn.Linear(3, 2))
    with modes.get(how, contextlib.nullcontext()):
        explanation = explain(model, x)
    row, *rest = explanation.rows
    assert row.backward is None
    assert all(other.backward is not None for other in rest)
    assert len(rest) == (how == "no_grad inside")
    assert "backward  none: nothing requires grad, or grad mode is off" in shown(explanation)


@pytest.mark.kernels
def test_without_a_backward_on_the_kernels(device: torch.device) -> None:
    model, x = nn.MLP(5, [4, 4], 3, device=device), torch.randn(2, 4, 5, device=device)
    with torch.no_grad(), fusedmlp.backend("triton"):
        (row,) = explain(model, x).rows
    assert row.forward.launches == ("narrow_forward",)
    assert row.backward is None
