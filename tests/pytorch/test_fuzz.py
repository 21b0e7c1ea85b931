"""Random shapes, strides, values and mistakes, compared with ``F.relu(F.linear)``.

The cases are the same in every run; ``pytest tests/pytorch/test_fuzz.py --hypothesis-seed=1`` draws others.
By default few of them run. A case that fails is printed as the ``Case`` to add to ``NAMED``.
"""

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from compatibility import Route
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fusedmlp import functional

# How many cases each part has, on PyTorch's operators and where the kernels can run. "small" runs by default.
CASES = {"small": {False: 200, True: 60}} | {part: {False: 500, True: 150} for part in ("1", "2", "3", "4")}
TIMES = int(os.environ.get("FUZZ_TIMES", "1"))  # for a longer run
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Layout(NamedTuple):
    """Where the values lie inside a buffer of NaN: a read beside them makes the result NaN."""

    reverse: bool = False  # the first dimension is the innermost
    step: int = 1  # in every dimension
    offset: int = 0
    expand: str = ""  # the dimension of stride 0: first, last or all


LAYOUTS = [Layout(), Layout(offset=1), Layout(offset=8)] + [
    Layout(*one)
    for one in itertools.product((False, True), (1, 2, 3), (0, 3), ("", "first", "last", "all"))
    if one[3] != "all" or not any(one[:2])
]


class Case(NamedTuple):
    function: str
    leading: tuple[int, ...]
    widths: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    final_relu: bool = True
    biases: tuple[bool, ...] = (True,) * 4
    needs: tuple[bool, ...] = (True,) * 9  # gradients of x, the weights, the biases
    layouts: tuple[Layout, ...] = (Layout(),) * 10  # x, the weights, the biases, the output's gradient
    values: str = "integers"
    special: tuple[tuple[int, str], ...] = ()  # (index of the tensor, value) at a random place
    number: int = 0  # seed of the random values
    mode: str = "grad"
    twice: bool = False
    mistake: tuple[int, str] | None = None  # (index of the tensor, kind of mistake)


SPECIAL = ("nan", "inf", "-inf", "-0.0", "subnormal", "large")
MISTAKES = ("longer", "dtype", "int64", "meta", "rank 0", "one dimension more")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    function = draw(st.sampled_from(["linear_relu", "linear", "mlp", "mlp"]))
    count = draw(st.integers(1, 4)) if function == "mlp" else 1
    size = st.one_of(st.sampled_from([3, 16, 1, 5, 8, 17, 0]), st.integers(0, 40))
    leading = tuple(draw(st.lists(st.sampled_from([2, 1, 3, 5, 0]), max_size=4)))
    if len(leading) < 2 and draw(st.booleans()):
        leading = (*leading, draw(st.integers(0, 40)))
    bits = draw(st.integers(0, 2 ** (3 * count + 1) - 1)) if draw(st.booleans()) else 0
    off = [bool(bits >> i & 1) for i in range(3 * count + 1)]  # if 0: with all biases and gradients
    tensors = 2 * count + 2
    which = st.integers(0, tensors - 1)
    mistake = None
    if draw(st.integers(0, 11)) == 11:
        mistake = (draw(st.integers(0, tensors - 2)), draw(st.sampled_from(MISTAKES)))
    values = draw(st.sampled_from(["integers", "normal"]))
    special: list[tuple[int, str]] = []
    if draw(st.integers(0, 3)) == 3:
        special = draw(st.lists(st.tuples(which, st.sampled_from(SPECIAL)), min_size=1, max_size=3))
    return Case(
        function,
        leading,
        tuple(draw(size) for _ in range(count + 1)),
        draw(st.sampled_from((*DTYPES[:3], *DTYPES))),
        draw(st.booleans()),
        tuple(not one for one in off[:count]),
        tuple(not one for one in off[count:]),
        tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(tensors)),
        values,
        tuple(special),
        draw(st.integers(0, 2**16)),
        draw(st.sampled_from(["grad"] * 8 + ["no_grad", "inference"])),
        draw(st.integers(0, 7)) == 7,
        mistake,
    )


def values_of(case: Case, shape: Sequence[int], weight: bool, random: torch.Generator) -> torch.Tensor:
    if case.values == "normal":
        t = torch.randn(*shape, generator=random, dtype=torch.float64)
        return t / max(1, shape[-1]) ** 0.5 if weight else t
    # Sums of few small integers are exact in every dtype and every order.
    t = torch.randint(-2, 3, tuple(shape), generator=random).double()
    few = 0.3 if case.dtype in (torch.float16, torch.bfloat16) else 0.8
    return t.sign() * (torch.rand(*shape, generator=random) < few) if weight else t


def special_value(what: str, dtype: torch.dtype) -> float:
    if what == "subnormal":
        return torch.finfo(dtype).smallest_normal / 4
    if what == "large":
        return 300.0 if dtype is torch.float16 else 1e25
    return float(what)


def placed(values: torch.Tensor, layout: Layout, dtype: torch.dtype, device: torch.device) -> Any:
    """The values as a tensor of this layout, and the buffer that it lies in."""
    ends = {"first": {0}, "last": {values.dim() - 1}, "all": set(range(values.dim()))}.get(
        layout.expand, set()
    )
    kept = [1 if i in ends and n > 1 else n for i, n in enumerate(values.shape)]
    order = list(range(values.dim()))[:: -1 if layout.reverse else 1]
    spread = [kept[i] * layout.step for i in order]
    count = torch.Size(spread).numel()
    buffer = torch.full((layout.offset + count + 8,), float("nan"), dtype=dtype, device=device)
    view = buffer[layout.offset : layout.offset + count].view(spread)
    view = view[tuple(slice(None, None, layout.step) for _ in order)].permute(order)  # reversed: its inverse
    view.copy_(values[tuple(slice(n) for n in kept)])
    return view.expand(values.shape), buffer


class Made(NamedTuple):
    x: Any
    weights: list[Any]
    biases: list[Any]
    gradient: Any
    buffers: list[torch.Tensor]

    @property
    def parameters(self) -> list[Any]:
        return [self.x, *self.weights, *self.biases]

    @property
    def wanted(self) -> list[Any]:
        return [t for t in self.parameters if t is not None and t.requires_grad]


def make(case: Case, device: torch.device) -> Made:
    random = torch.Generator().manual_seed(case.number)
    pairs = list(itertools.pairwise(case.widths))
    count = len(pairs)
    shapes: list[Sequence[int]] = [(*case.leading, case.widths[0]), *[(N, K) for K, N in pairs]]
    shapes += [*[(N,) for _, N in pairs], (*case.leading, case.widths[-1])]
    every = [values_of(case, shape, 0 < i <= count, random) for i, shape in enumerate(shapes)]
    for i, what in case.special:
        if every[i].numel():
            place = int(torch.randint(every[i].numel(), (), generator=random))
            every[i].view(-1)[place] = special_value(what, case.dtype)
    wrong, mistake = case.mistake or (None, None)
    tensors, buffers = [], []
    for i, values in enumerate(every):
        dtype = case.dtype
        if i == wrong and mistake == "longer":
            values = torch.cat([values, values[..., :1], values.new_ones(*values.shape[:-1], 1)], -1)
        if i == wrong and mistake == "dtype":
            dtype = DTYPES[DTYPES.index(dtype) - 1]
        t, buffer = placed(values, case.layouts[i], dtype, device)
        buffers.append(buffer)
        if i == wrong and mistake == "int64":
            t = torch.ones(t.shape, dtype=torch.int64, device=device)
        if i == wrong and mistake == "meta":
            t = t.to("meta")
        if i == wrong and mistake == "rank 0":
            t = torch.ones((), dtype=dtype, device=device)
        if i == wrong and mistake == "one dimension more":
            t = t[None]
        needed = i < len(shapes) - 1 and case.needs[i] and t.is_floating_point()
        tensors.append(t.detach().requires_grad_(needed))
    biases = [t if has else None for t, has in zip(tensors[1 + count : -1], case.biases, strict=False)]
    return Made(tensors[0], tensors[1 : 1 + count], biases, tensors[-1], buffers)


def plain(x: Any, weights: Sequence[Any], biases: Sequence[Any], final_relu: bool) -> Any:
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(x, weight, bias)
        x = F.relu(x) if final_relu or i < len(weights) - 1 else x
    return x


def ours(case: Case) -> Callable[[Any, Sequence[Any], Sequence[Any]], Any]:
    if case.function == "mlp":
        return lambda x, weights, biases: functional.mlp(x, weights, biases, final_relu=case.final_relu)
    one = functional.linear_relu if case.function == "linear_relu" else functional.linear
    return lambda x, weights, biases: one(x, weights[0], biases[0])


def has_relu(case: Case) -> bool:
    return case.function == "linear_relu" or (case.function == "mlp" and case.final_relu)


def results(function: Callable[..., Any], case: Case, made: Made) -> Any:
    """The output, its gradients, and second derivatives; or the error."""
    mode: Any = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
    try:
        with mode[case.mode]():
            y = function(made.x, made.weights, made.biases)
        if not y.requires_grad:
            return [y], [], []
        grads = torch.autograd.grad(y, made.wanted, made.gradient, create_graph=case.twice)
        again: Sequence[Any] = []
        if case.twice:
            penalty = sum(g.square().sum() for g in grads)
            again = torch.autograd.grad(penalty, made.wanted, allow_unused=True)
        return [y], list(grads), list(again)
    except Exception as error:
        return error


SMALLEST = torch.finfo(torch.float32).smallest_normal


def flushed(t: torch.Tensor) -> torch.Tensor:
    """The error of flushing float32's subnormal numbers to 0, as the interpreter does for bfloat16."""
    return t.abs() * (t.abs() < SMALLEST)


class Exact:
    """Results in float64, and a bound of each one's error when computed in case.dtype, in any order."""

    def __init__(self, case: Case, made: Made) -> None:
        self.dtype, self.finfo = case.dtype, torch.finfo(case.dtype)
        rows, last = torch.Size(case.leading).numel(), len(made.weights) - 1
        doubles = [
            None if t is None else t.detach().double().cpu() for t in (*made.parameters, made.gradient)
        ]
        # Whether nothing is rounded: every intermediate value fits this dtype, and every sum float32.
        self.whole = all(t is None or torch.equal(t, t.round()) for t in doubles)
        self.overflows = self.flips = False  # whether rounding decides what is infinite, active
        a, weights, g = (
            doubles[0].reshape(rows, -1 if rows else case.widths[0]),
            doubles[1 : last + 2],
            doubles[-1],
        )
        off = flushed(a)
        inputs, zs = [], []
        for i, (weight, bias) in enumerate(zip(weights, doubles[last + 2 : -1], strict=True)):
            inputs.append((a, off))
            a, off = self.product(a, off, weight.t(), flushed(weight).t(), bias)
            zs.append(a)
            if i < last or has_relu(case):
                self.flips |= not self.whole and bool((a.abs() <= off).any())
                a = a.clamp_min(0)
        self.y = a.reshape(made.gradient.shape), off.reshape(made.gradient.shape)
        g = g.reshape(a.shape)
        off = flushed(g)
        grads_w, grads_b = [], []
        for i in range(last, -1, -1):
            if i < last or has_relu(case):
                g, off = (t.masked_fill(zs[i] <= 0, 0) for t in (g, off))
            grads_w.append(self.product(g.t(), off.t(), *inputs[i]))
            ones = torch.ones(1, rows, dtype=torch.float64)
            grads_b.append([t[0] for t in self.product(ones, torch.zeros_like(ones), g, off)])
            g, off = self.product(g, off, weights[i], flushed(weights[i]))
        every = [(g.reshape(made.x.shape), off.reshape(made.x.shape)), *grads_w[::-1], *grads_b[::-1]]
        self.grads = [
            one for one, t in zip(every, made.parameters, strict=True) if t is not None and t.requires_grad
        ]

    def product(self, a: Any, a_off: Any, b: Any, b_off: Any, bias: Any = None) -> tuple[Any, Any]:
        value = a @ b + (0 if bias is None else bias)
        total = a.abs() @ b.abs() + (0 if bias is None else bias.abs())
        off = a_off @ b.abs() + a.abs() @ b_off + a_off @ b_off
        # eps is twice the error of rounding to nearest, because Triton's interpreter truncates to bfloat16.
        eps = (a.shape[1] + 3) * torch.finfo(torch.float32).eps + self.finfo.eps
        smallest = max(
            self.finfo.smallest_normal * self.finfo.eps, torch.finfo(torch.float32).smallest_normal
        )
        off = off + eps * (total + off) + smallest
        self.whole &= torch.equal(value, value.to(self.dtype).double()) and bool((total < 2**24).all())
        self.overflows |= bool((total.isfinite() & (total + off > self.finfo.max)).any())
        return value, off


def check_close(mine: Any, torchs: Any, exact: Any, whole: bool, what: str) -> None:
    right, off = exact
    mine, torchs = mine.detach().cpu().double(), torchs.detach().cpu().double()
    assert torch.equal(mine.isnan(), torchs.isnan()), f"{what}: NaN in other places"
    assert torch.equal(mine.isinf() * mine.sign(), torchs.isinf() * torchs.sign()), (
        f"{what}: other infinities"
    )
    sure = mine.isfinite() & right.isfinite() & off.isfinite()
    error, most = (mine - right).abs()[sure], off[sure] * (not whole)
    assert bool((error <= most).all()), f"{what}: off by {error[error > most].max()}"


def bits(t: torch.Tensor) -> list[Any]:
    plain = t.detach().clone(memory_format=torch.contiguous_format).flatten()
    return [t.dtype, t.shape, t.stride(), plain.view(torch.uint8).tolist()]


def check(case: Case, route: Route, device: torch.device, counts: Counter[str]) -> None:
    made = make(case, device)
    before = [bits(buffer) for buffer in made.buffers]
    del route.reasons[:]
    mine = results(ours(case), case, made)
    reasons = list(route.reasons)
    torchs = results(lambda *a: plain(*a, has_relu(case)), case, made)
    assert [bits(buffer) for buffer in made.buffers] == before, "an input was written to"
    counts["cases"] += 1
    if isinstance(torchs, Exception) or isinstance(mine, Exception):
        assert type(mine) is type(torchs), f"{mine!r} instead of {torchs!r}"
        counts["mistakes"] += 1
        return
    for my, its in zip(mine, torchs, strict=True):
        assert len(my) == len(its)
        for a, b in zip(my, its, strict=True):
            if a is not None and b is not None:
                properties = [(t.shape, t.dtype, t.device, t.requires_grad, t.is_inference()) for t in (a, b)]
                assert properties[0] == properties[1]
    if case.mistake is not None and case.mistake[1] == "meta":
        return  # torch 2.15 may return memory that was not written to
    fused = route.kernels and reasons == [None]
    if not fused:
        for a, b in zip(itertools.chain(*mine), itertools.chain(*torchs), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert bits(a) == bits(b)
        return
    counts["fused"] += 1
    exact = Exact(case, made)
    if exact.overflows:
        return
    check_close(mine[0][0], torchs[0][0], exact.y, exact.whole, "y")
    if exact.flips:
        return
    names = [f"gradient {tuple(t.shape)}" for t in made.wanted]
    for args in zip(mine[1], torchs[1], exact.grads, itertools.repeat(exact.whole), names, strict=False):
        check_close(*args)
    counts["gradients"] += len(mine[1]) > 0
    counts["exact"] += exact.whole
    if mine[2] and case.dtype is torch.float32 and not case.special:
        check_second(case, made, mine[2])


def check_second(case: Case, made: Made, mine: Sequence[Any]) -> None:
    """Second derivatives are computed by PyTorch's operators, so that no term may be missing."""
    copies = [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in made.parameters
    ]
    count = len(made.weights)
    double = Made(copies[0], copies[1 : count + 1], copies[count + 1 :], made.gradient.double(), [])
    right = results(lambda *a: plain(*a, has_relu(case)), case, double)[2]
    for a, b in zip(mine, right, strict=True):
        if a is not None and b is not None:
            scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * scale)
        else:  # the second derivative is zero
            assert all(t is None or not t.any() for t in (a, b))


# Mistakes that random cases have found, as small cases
NAMED = {
    "second derivatives through frozen upper layers": Case(
        "mlp", (), (3, 3, 3), final_relu=False, needs=(True, True, False, True, True), twice=True
    ),
    "second derivatives of one weight in the middle": Case(
        "mlp",
        (),
        (3, 3, 3, 3),
        final_relu=False,
        biases=(False, True, True),
        needs=(False, False, True, False, True, True, True),
        twice=True,
    ),
    "second derivatives of no rows": Case("mlp", (2, 0), (3, 3, 3), final_relu=False, twice=True),
    "second derivatives of an empty layer": Case("mlp", (), (3, 3, 3, 0, 3), final_relu=False, twice=True),
    "gradient with steps and one column": Case("linear", (), (3, 1), layouts=(Layout(step=2),) * 4),
    "subnormal bfloat16": Case(
        "linear_relu", (2,), (16, 3), torch.bfloat16, biases=(True,), special=((0, "subnormal"),)
    ),
    "subnormal bfloat16 times several": Case(
        "linear_relu",
        (2, 2, 5),
        (3, 2),
        torch.bfloat16,
        layouts=(Layout(), Layout(True, 3, 0, "first"), Layout(), Layout(expand="last")),
        values="normal",
        special=((1, "subnormal"),),
        number=1,
    ),
    "weight on no device": Case("linear_relu", (), (3, 3), mode="no_grad", mistake=(1, "meta")),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_cases(name: str, route: Route, device: torch.device) -> None:
    check(NAMED[name], route, device, Counter())


@pytest.mark.capability("Errors", "random shapes, strides, offsets, dtypes, values, gradients and mistakes")
@pytest.mark.parametrize(
    "part", ["small", *(pytest.param(part, marks=pytest.mark.slow) for part in CASES if part != "small")]
)
def test_random_cases(part: str, route: Route, device: torch.device, request: pytest.FixtureRequest) -> None:
    counts: Counter[str] = Counter()
    said: dict[str | None, None] = {}
    base = request.config.getoption("--hypothesis-seed", None) or ""

    @seed(f"{base} {part}")
    @settings(
        max_examples=CASES[part][route.kernels] * TIMES,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
    )
    @given(cases())
    def each(case: Case) -> None:
        check(case, route, device, counts)
        if case.mistake is None:
            said.update(dict.fromkeys(route.reasons))

    try:
        each()
    finally:
        request.node.user_properties.append(("random cases", [route.kernels, counts["cases"]]))
    route.reasons[:] = said
    if route.kernels:  # enough cases must have run on the kernels
        assert counts["fused"] > 0.6 * counts["cases"]
        assert counts["gradients"] > 0.6 * counts["fused"]
        assert counts["exact"] > 0.3 * counts["fused"]
