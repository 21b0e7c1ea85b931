"""explain: what it says of a model, that it is what really runs, and that nothing else is changed by it."""

import contextlib
import copy
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import compatibility
import numpy as np
import pytest
import torch
from torch import nn as tnn
from torch.nn.utils import parametrizations

import fusedmlp
from fusedmlp import nn
from fusedmlp.inspection.explain import Explanation, explain

CPU = "The input is on the CPU; the fused kernels need a CUDA GPU."


def shown(explanation: Explanation) -> str:
    """The printed form, which fits a terminal."""
    text = str(explanation)
    assert max(map(len, text.splitlines())) <= 80, text
    assert "\t" not in text
    return text


class Holder(tnn.Module):
    """A model whose forward is what a test wants it to be."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.code = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.code(self, *args, **kwargs)


@pytest.mark.parametrize(
    ("model", "layers", "widths", "relus"),
    [
        (nn.MLP(5, [4, 3], 2), [("0", "2", "4")], [(5, 4, 3, 2)], [False]),
        (nn.Linear(5, 2), [("(the model)",)], [(5, 2)], [False]),
        (nn.LinearReLU(5, 2), [("(the model)",)], [(5, 2)], [True]),
        (nn.Sequential(nn.LinearReLU(5, 2), nn.Linear(2, 3)), [("0", "1")], [(5, 2, 3)], [False]),
        (nn.Sequential(tnn.Linear(5, 2, bias=False), nn.ReLU()), [("0",)], [(5, 2)], [True]),
        (
            nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 3), nn.ReLU()),
            [("0",), ("3",)],
            [(5, 4), (4, 3)],
            [True, True],
        ),
        (
            nn.Sequential(nn.MLP(5, [4], 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU())),
            [("0.0", "0.2"), ("1.0",)],
            [(5, 4, 3), (3, 3)],
            [False, True],
        ),
    ],
    ids=["MLP", "Linear", "LinearReLU", "LinearReLU first", "final ReLU", "Dropout", "nested"],
)
def test_one_row_a_chain(model: tnn.Module, layers: Any, widths: Any, relus: Any) -> None:
    explanation = explain(model, torch.randn(2, 3, 5))
    assert [row.layers for row in explanation.rows] == layers
    assert [row.widths for row in explanation.rows] == widths
    assert [row.final_relu for row in explanation.rows] == relus
    for row in explanation.rows:
        assert (row.rows, row.dtype, row.device, row.reason) == (6, "float32", "cpu", CPU)
        for one in (row.forward, row.backward):
            assert one is not None
            assert one.backend == "PyTorch's operators"
            assert (one.launches, one.bytes) == (one.unfused_launches, one.unfused_bytes)
    assert explanation.layers_not_fused == explanation.layers_not_run == ()
    text = shown(explanation)
    for row in explanation.rows:
        assert " -> ".join(map(str, row.widths)) in text


def test_positional_and_keyword_arguments() -> None:
    model = Holder(lambda self, x, *, shift: self.fc(x + shift), fc=nn.Linear(5, 2))
    (row,) = explain(model, torch.randn(4, 5), shift=1.0).rows
    assert (row.layers, row.rows) == (("fc",), 4)
    assert explain(Holder(lambda self, model: self.fc(model), fc=nn.Linear(5, 2)), model=torch.ones(5)).rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_size_of_an_element(dtype: torch.dtype) -> None:
    x = torch.randn(4, 5)
    (row,), (other,) = (explain(nn.Linear(5, 2, dtype=d), x.to(d)).rows for d in (torch.float32, dtype))
    assert other.dtype == str(dtype).removeprefix("torch.")
    assert other.forward.bytes * 4 == row.forward.bytes * dtype.itemsize


def test_bytes_and_operators_by_hand() -> None:
    """8 rows through 5 -> 4 -> 3, in elements of 4 bytes."""
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=False)), torch.randn(8, 5)
    (row,) = explain(model, x).rows
    # linear 0: x 40, weight 20, bias 4, y 32: 96; relu: 32 + 32 = 64; linear 2: 32 + 12 + 24 = 68.
    assert row.forward.launches == ("linear", "relu", "linear")
    assert row.forward.bytes == 4 * (96 + 64 + 68) == 912
    # Layer 2: its input's gradient from 24 and 12 to 32, its weight's from 24 and 32 to 12: 68 each.
    # threshold_backward reads 32 and 32, writes 32: 96. Layer 0, weight: 32 + 40 + 20 = 92; sum: 32 + 4 = 36.
    assert row.backward is not None
    assert row.backward.launches == ("mm", "mm", "threshold_backward", "mm", "sum")
    assert row.backward.bytes == 4 * (68 + 68 + 96 + 92 + 36) == 1440
    # With a gradient for x one product more: 32 + 20 + 40 = 92.
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
    """A launch for each layer, of narrow chains too."""
    from fusedmlp.kernels import chain

    for launcher in ("narrow_forward", "narrow_backward"):
        patch.setattr(chain, launcher, lambda *args: None)


@pytest.mark.kernels
def test_bytes_of_a_narrow_chain_by_hand(device: torch.device) -> None:
    """As above, with x and a final ReLU."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU()).to(device)
    with fusedmlp.backend("triton"):
        (row,) = explain(model, torch.randn(8, 5, device=device, requires_grad=True)).rows
    assert row.backward is not None
    assert row.forward.launches == ("narrow_forward",)
    # x 40, weight 20, bias 4, y 32, kept for the backward; weight 12, bias 3, y 24.
    assert row.forward.bytes == 4 * (96 + 39) == 540
    # 24 come in, weights 20 and 12, both y 32 and 24; gradients before the ReLUs 32 and 24, of biases 4 and
    # 3, of x 40: 215. grad_weights: 24, 32 to 12: 68, and 32, 40 to 20: 92.
    assert row.backward.launches == ("narrow_backward", "grad_weights")
    assert row.backward.bytes == 4 * (215 + 68 + 92) == 1500


@pytest.mark.kernels
def test_bytes_of_the_kernels_by_hand(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, a launch for each layer."""
    one_by_one(monkeypatch)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU()).to(device)
    x = torch.randn(8, 5, device=device, requires_grad=True)
    with fusedmlp.backend("triton"):
        (row,) = explain(model, x).rows
    assert row.reason is None
    assert row.backward is not None
    assert row.forward.launches == ("linear_forward", "linear_forward")
    # x 40, weight 20, bias 4, y 32; 32, 12, 3, 24. Unfused, relu takes 64 and 48 more.
    assert row.forward.bytes == 4 * (96 + 71) == 668
    assert row.forward.unfused_bytes == 668 + 4 * (64 + 48)
    # relu_backward: 24, 24 to 24 and 3: 75. grad_input of layer 2: 24, 12 and the mask 32 to 32 and 4: 104;
    # of layer 0: 32 and 20 to 40: 92. grad_weights: 24, 32 to 12: 68, and 32, 40 to 20: 92.
    assert Counter(row.backward.launches)["add_up"] <= 1
    assert row.backward.bytes == 4 * (75 + 104 + 92 + 68 + 92) == 1724
    # threshold_backward 72 and 96, sum 27 and 36, products 68, 68, 92, 92.
    assert row.backward.unfused_bytes == 4 * (72 + 96 + 27 + 36 + 2 * 68 + 2 * 92) == 2204
    with fusedmlp.backend("triton"):  # and of many rows, every partial sum is written and read
        (many,) = explain(model, torch.randn(600, 5, device=device, requires_grad=True)).rows
    assert many.backward is not None
    assert "add_up" in many.backward.launches
    assert many.backward.bytes > 4 * (600 * (9 + 11 + 9 + 7 + 9) + 3 + 12 + 4 + 20 + 12 + 20)
    model[2].requires_grad_(False)
    with fusedmlp.backend("triton"):
        (row,) = explain(model[:3], x).rows
    # Without the last layer's gradients no sum of the rows that come in, only what goes on to layer 0.
    assert row.backward is not None
    assert row.backward.bytes == 4 * (104 + 92 + 92) == 1152


@contextlib.contextmanager
def launched() -> Iterator[list[str]]:
    """Names of the kernels that really are launched: on a GPU by Triton's hook, else in its interpreter."""
    import triton
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []

    def note(name: str) -> None:
        names.append(name.strip("_").removesuffix("_kernel"))

    if torch.cuda.is_available():
        hook = triton.knobs.runtime.launch_enter_hook
        entered = lambda data: note(data.get()["name"])  # noqa: E731  it is removed again
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
    """Names of torch's operators that run on the CPU's side, with the shapes of what they are given."""
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
@pytest.mark.parametrize("rows", [7, 600])  # of 600, sums over rows are split
@pytest.mark.parametrize(
    ("widths", "final_relu", "bias", "frozen", "need_x"),
    [
        ((5, 4, 3, 2), False, True, 0, False),
        ((5, 4, 3, 2), True, True, 0, False),
        ((5, 4, 3, 2), True, True, 0, True),
        ((5, 4, 3, 2), False, True, 1, False),  # the first layer is frozen,
        ((5, 4, 3, 2), False, True, 2, False),  # the first two,
        ((5, 4, 3), True, True, 1, True),  # the first, but x needs its gradient
        ((5, 4, 3), False, True, 2, True),  # all, but x does
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
    if in_one and of_activations > 1:  # of one there is nothing to put together
        assert count.pop("narrow_backward") == 1
    else:
        assert count.pop("grad_input", 0) == hidden + need_x
        assert count.pop("relu_backward", 0) == final_relu
    assert count.pop("grad_weights", 0) == (trained > 0)
    assert count.pop("add_up", 0) <= 1
    assert not count
    # Beside the launches nothing is computed on a tensor of so many rows: no mask, no sum, no product.
    assert seen
    assert {name for name, shapes in seen if any(rows in shape for shape in shapes)} <= HARMLESS


def test_operators_are_those_of_a_real_run() -> None:
    """The same on PyTorch's operators: their names and how many."""
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
        # The profiler sees what the kernels make superfluous.
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


def test_names_of_shared_and_parametrized_and_functional_layers() -> None:
    a = nn.Linear(5, 5)
    b = nn.Linear(5, 5)
    b.weight = a.weight
    c = parametrizations.weight_norm(nn.Linear(5, 5))
    d = parametrizations.weight_norm(nn.Linear(5, 5, bias=False))

    def code(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.d(self.c(self.b(self.a(x))))
        return fusedmlp.functional.linear(
            fusedmlp.functional.linear_relu(x, self.w, self.v), torch.ones(2, 5)
        )

    parameters = {"w": tnn.Parameter(torch.ones(5, 5)), "v": tnn.Parameter(torch.ones(5))}
    explanation = explain(Holder(code, a=a, b=b, c=c, d=d, **parameters), torch.randn(3, 5))
    names = [row.layers for row in explanation.rows]
    assert names == [("a",), ("b",), ("c",), ("(unnamed)",), ("w",), ("(unnamed)",)]
    assert explanation.layers_not_run == explanation.layers_not_fused == ()
    shown(explanation)


def test_layers_that_are_not_fused_or_did_not_run() -> None:
    members = {f"l{i}": tnn.Linear(5, 5) for i in range(5)} | {
        "ours": nn.Linear(5, 5),
        "idle": nn.Linear(5, 5),
    }
    explanation = explain(Holder(lambda self, x: self.ours(self.l0(x)), **members), torch.randn(3, 5))
    assert explanation.layers_not_fused == ("l0", "l1", "l2", "l3", "l4")
    assert explanation.layers_not_run == ("idle",)
    text = " ".join(shown(explanation).split())
    assert "5 plain torch.nn.Linear layers, which fusedmlp.fuse(model) changes: l0, l1, l2 and so on." in text
    assert "1 fused layer did not run in this call: idle." in text
    text = shown(explain(tnn.Sequential(tnn.Linear(5, 5)), torch.randn(3, 5)))
    assert text.startswith("No fused layer ran.\n\n1 plain torch.nn.Linear layer, which")


def test_a_compiled_model_says_what_is_the_compilers() -> None:
    members = nn.MLP(5, [4], 3)
    model = torch.compile(members, backend="eager")
    explanation = explain(model, torch.randn(3, 5))
    (row,) = explanation.rows
    assert explanation.compiled
    assert row.layers == ("0", "2")
    assert row.forward.backend == row.backward.backend == "torch.compile's own code"  # type: ignore[union-attr]
    assert row.forward.launches is row.forward.bytes is None
    assert row.forward.unfused_launches == ("linear", "relu", "linear")
    assert shown(explanation).startswith("2 layers in 1 chain on cpu: torch.compile's own code.")
    json.dumps(explanation.to_dict())
    partly = Holder(lambda self, x: self.plain(self.fast(x)), fast=model, plain=nn.Linear(3, 2))
    explanation = explain(partly, torch.randn(3, 5))
    assert [(row.layers, row.forward.backend) for row in explanation.rows] == [
        (("fast.0", "fast.2"), "torch.compile's own code"),
        (("plain",), "PyTorch's operators"),
    ]
    assert "not counting the code that torch.compile makes" in " ".join(shown(explanation).split())
    assert not explain(nn.Linear(5, 3), torch.randn(3, 5)).compiled
    members.compile(backend="eager")  # in place: the module stays what it is
    (row,) = explain(members, torch.randn(3, 5)).rows
    assert row.forward.backend == "torch.compile's own code"


class CallsReLU(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = tnn.Linear(5, 4), tnn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.kernels
def test_a_compiled_forward_that_calls_relu_is_the_compilers() -> None:
    model = fusedmlp.fuse(CallsReLU())
    compiled = torch.compile(model, backend="eager")
    route = compatibility.Route(True)
    with compatibility.taken(route):
        first, second = explain(compiled, torch.randn(3, 5)).rows
        eagerly, _ = explain(model, torch.randn(3, 5)).rows
    assert first.reason == "torch.compile sees the ReLU in the forward that calls this layer."
    assert first.forward.backend == "torch.compile's own code"
    assert second.forward.backend == eagerly.forward.backend == "Triton kernels"


def test_many_alike_and_long_texts_fit_the_terminal() -> None:
    blocks = [nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 5)) for _ in range(12)]
    name = "a_name_of_a_module_that_is_longer_than_anybody_would_want_to_type_" + "x" * 60
    model = Holder(
        lambda self, x: getattr(self, name)(self.encoder(x)),
        encoder=tnn.Sequential(*blocks),
        **{name: nn.MLP(5, [5] * 40, 2)},
    )
    explanation = explain(model, torch.randn(3, 5, requires_grad=True))
    assert len(explanation.rows) == 25
    text = shown(explanation)
    assert "encoder.*.0  x 12, all together\n3 rows, 5 -> 7, ReLU, float32 on cpu\n" in text
    assert "\n            12 linear, 12 relu\n" in text
    assert text.count("forward   PyTorch's operators") == 3
    assert "xxx: 0, 2, 4, 6, 8," in text
    with torch.no_grad(), Noted():
        text = shown(explain(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), torch.randn(3, 5)))
    assert "0; 2  x 2, all together\n" in text
    assert "why       A TorchFunctionMode is active; it sees only PyTorch's own functions." in text


class Noted(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_as_data() -> None:
    explanation = explain(nn.MLP(5, [4], 3), torch.randn(8, 5))
    data = json.loads(json.dumps(explanation.to_dict()))
    assert data["rows"][0]["layers"] == ["0", "2"]
    assert data["rows"][0]["forward"]["backend"] == "PyTorch's operators"
    assert data["rows"][0]["backward"]["bytes"] == explanation.rows[0].backward.bytes  # type: ignore[union-attr]
    assert set(data) == {"rows", "layers_not_fused", "layers_not_run", "compiled"}


class Restless(tnn.Module):
    """Its forward changes everything that it can."""

    def __init__(self, device: torch.device, fails: bool) -> None:
        super().__init__()
        self.fails, self.calls, self.log = fails, 0, ["made"]
        self.chain = nn.Sequential(
            nn.Linear(5, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 4), nn.BatchNorm1d(4)
        )
        self.spectral = parametrizations.spectral_norm(nn.Linear(4, 3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(0))
        self.to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.spectral(self.chain(x))
        self.calls += 1
        self.log.append("called")
        self.count = self.count + 1
        self.seen.resize_(2).fill_(7)
        random.random(), np.random.rand()
        (y.sum() * 3).backward()
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(2)
        self.eval()
        if self.fails:
            raise LookupError("as planned")
        return y


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("path", ["auto", pytest.param("triton", marks=pytest.mark.kernels)])
def test_everything_is_left_as_it_was(path: Any, fails: bool, device: torch.device) -> None:
    model = Restless(device, fails)
    model.chain[0].eval()
    x = torch.randn(9, 5, device=device)
    for parameter in model.chain.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = {name: (p.grad, copy.deepcopy(p.grad)) for name, p in model.named_parameters()}
    buffers = {name: (b, b.clone(), b._version) for name, b in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    numbers = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    on_device = torch.cuda.get_rng_state() if device.type == "cuda" else None
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with fusedmlp.backend(path), pytest.raises(LookupError) if fails else contextlib.nullcontext():
        explain(model, x)
    for name, p in model.named_parameters():
        gradient, values = gradients[name]
        assert p.grad is gradient, name
        assert gradient is None or torch.equal(gradient, values), name
    assert list(buffers) == [name for name, _ in model.named_buffers()]
    for name, b in model.named_buffers():
        assert b is buffers[name][0], name
        assert torch.equal(b, buffers[name][1]), name
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert (model.calls, model.log) == (0, ["made"])
    assert random.getstate() == numbers[0]
    assert (np.random.get_state()[1] == numbers[1]).all()
    assert torch.equal(torch.get_rng_state(), numbers[2])
    assert on_device is None or torch.equal(torch.cuda.get_rng_state(), on_device)
    assert fusedmlp.dispatch.backend_choice.quiet()  # nothing is recorded any more


def test_a_forward_before_it_can_still_go_backward() -> None:
    """The statistics of a BatchNorm in eval mode are saved for its backward: their version counts."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    y = model.eval()(torch.randn(8, 5))
    explain(model.train(), torch.randn(8, 5))
    y.sum().backward()


def test_keeps_no_tensor() -> None:
    import gc
    import weakref

    model, x = nn.MLP(5, [4], 3), torch.randn(8, 5)
    alive = weakref.ref(x)
    explanation = explain(model, x)
    del x
    gc.collect()
    assert alive() is None
    assert explanation.rows


def test_lazy_modules_become_what_they_shall_be() -> None:
    model = tnn.Sequential(tnn.LazyLinear(4), tnn.LazyBatchNorm1d(), nn.Linear(4, 2))
    assert explain(model, torch.randn(3, 5)).layers_not_fused == ("0",)
    assert model(torch.randn(3, 5)).shape == (3, 2)


def test_unusual_inputs() -> None:
    linear = nn.Linear(5, 2)
    for x in (torch.randn(5), torch.randn(0, 5), torch.randn(2, 3, 5).transpose(0, 1)):
        (row,) = explain(linear, x).rows
        assert row.rows == x.numel() // 5
        shown(explain(linear, x))
    nested = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)], layout=torch.jagged)
    assert explain(linear, nested).rows[0].rows == 5
    linear.weight.data = torch.randn(2, 0)
    assert explain(linear, torch.randn(4, 0)).rows[0].rows == 4
    shown(explain(nn.MLP(5, [4], 3, bias=False), torch.randn(0, 5)))
    (row,) = explain(nn.Linear(5, 2, device="meta"), torch.empty(4, 5, device="meta")).rows
    assert (row.device, row.forward.launches) == ("meta", ("linear",))


def test_what_does_not_run() -> None:
    with pytest.raises(RuntimeError):
        explain(nn.Linear(5, 3), torch.randn(()))
    with (
        fusedmlp.backend("triton"),
        pytest.raises(RuntimeError, match=r"backend\('triton'\) cannot run here\."),
    ):
        explain(nn.Linear(5, 3).double(), torch.randn(3, 5).double())


def test_a_pair_in_a_forward_has_its_own_reason_and_relu() -> None:
    class Frozen(dict[str, int]):
        def update(self, *args: Any, **kwargs: Any) -> None:
            raise TypeError

    class Pair(Holder):
        def forward(self, x: torch.Tensor) -> Any:
            return self.fc(x).relu()

    model = fusedmlp.fuse(Pair(print, fc=tnn.Linear(5, 5), config=Frozen(a=1)))
    (row,) = explain(model, torch.ones(2, 5)).rows
    assert (row.final_relu, row.reason) == (True, CPU)
    assert row.forward.unfused_launches == ("linear", "relu")
    assert model.config == {"a": 1}
