"""functional.mlp is compared with a chain of torch.nn.functional, in plain torch and on kernels."""

import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from oracle import assert_all_right
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fusedmlp
from fusedmlp.functional import mlp, why_not_fused_mlp

Chain = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]


@pytest.fixture(
    params=[
        "torch",
        pytest.param("triton", marks=pytest.mark.kernels),
        pytest.param("one by one", marks=pytest.mark.kernels),
    ]
)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """PyTorch's operators; kernels with one launch for small chains; kernels with one launch per layer."""
    name = request.param
    if name == "one by one":
        from fusedmlp.kernels import chain as room

        name = "triton"
        for launcher in ("narrow_forward", "narrow_backward"):
            monkeypatch.setattr(room, launcher, lambda *args: None)
    with fusedmlp.backend(name):
        yield name


def plain(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    final_relu: bool = False,
) -> torch.Tensor:
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(x, weight, bias)
        if final_relu or i < len(weights) - 1:
            x = F.relu(x)
    return x


def chain(
    device: torch.device, shape: Sequence[int], *widths: int, dtype: torch.dtype = torch.float32
) -> Chain:
    """x of this shape, and layers of these widths. Every third layer has no bias."""
    pairs = list(itertools.pairwise((shape[-1], *widths)))
    x = torch.randn(shape, device=device, dtype=dtype)
    weights = [torch.randn(N, K, device=device, dtype=dtype) / max(1, K) ** 0.5 for K, N in pairs]
    biases = [
        None if i % 3 == 2 else torch.randn(N, device=device).to(dtype) for i, (_, N) in enumerate(pairs)
    ]
    return x, weights, biases


def leaves_of(tensors: Chain, needs: Sequence[bool], dtype: torch.dtype) -> tuple[Chain, list[torch.Tensor]]:
    """Copies that require gradients as ``needs`` says (x, weights, biases), and a list of those that do."""
    x, weights, biases = tensors
    copies = [
        None if t is None else t.detach().to(dtype, copy=True).requires_grad_(need)
        for t, need in zip((x, *weights, *biases), needs, strict=True)
    ]
    wanted = [t for t in copies if t is not None and t.requires_grad]
    return (copies[0], copies[1 : len(weights) + 1], copies[len(weights) + 1 :]), wanted  # type: ignore[return-value]


def nearby(tensors: Chain, nudge: Callable[[torch.Tensor], torch.Tensor]) -> Chain:
    x, weights, biases = tensors
    return nudge(x), [nudge(w) for w in weights], [None if b is None else nudge(b) for b in biases]


def results(
    function: Callable[..., torch.Tensor],
    tensors: Chain,
    needs: Sequence[bool],
    final_relu: bool,
    grad_output: torch.Tensor,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """The output and every needed gradient."""
    arguments, wanted = leaves_of(tensors, needs, dtype)
    y = function(*arguments, final_relu=final_relu)
    if not wanted:
        assert not y.requires_grad
        return [y]
    return [y, *torch.autograd.grad(y, wanted, grad_output.to(dtype))]


def compare(
    tensors: Chain, grad_output: torch.Tensor, final_relu: bool, needs: Sequence[bool] | None = None
) -> None:
    dtype = tensors[0].dtype
    needs = needs or [True] * (1 + 2 * len(tensors[1]))
    exact, theirs, mine = (
        results(function, tensors, needs, final_relu, grad_output, of)
        for function, of in ((plain, torch.float64), (plain, dtype), (mlp, dtype))
    )

    def again(nudge: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        return results(plain, nearby(tensors, nudge), needs, final_relu, nudge(grad_output), dtype)

    # test_kernels.py allows each kernel twice PyTorch's error; here the errors of several kernels add up.
    names = [f"result {i}" for i in range(len(exact))]
    assert_all_right(mine, theirs, exact, names, again, factor=3)


@pytest.mark.thinned
@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("need_x", [False, True])
def test_every_combination_of_requires_grad(
    need_x: bool, final_relu: bool, path: str, device: torch.device
) -> None:
    tensors = chain(device, (9, 7), 6, 10, 5)
    grad_output = torch.randn(9, 5, device=device)
    for needs in itertools.product([False, True], repeat=5):
        compare(tensors, grad_output, final_relu, (need_x, *needs, False))


SHAPES = [
    ((7,), (10, 3)),
    ((1, 784), (16, 10)),
    ((127, 7), (10, 1, 127)),
    ((130, 16), (32, 48, 16)),
    ((600, 16), (32, 10)),
    ((2, 1, 3, 7), (5, 4, 3, 2)),
    ((0, 7), (10, 3)),
    ((3, 0, 7), (5, 2)),
    ((4, 0), (3, 2)),
    ((4, 3), (0, 2)),
    ((5, 7), (1,)),
]


@pytest.mark.thinned
@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize(("shape", "widths"), SHAPES)
def test_every_shape(
    shape: tuple[int, ...], widths: tuple[int, ...], final_relu: bool, path: str, device: torch.device
) -> None:
    compare(chain(device, shape, *widths), torch.randn(*shape[:-1], widths[-1], device=device), final_relu)


@pytest.mark.kernels
@pytest.mark.parametrize("final_relu", [False, True])
def test_half_precision(final_relu: bool, device: torch.device) -> None:
    """The values are so far from 0 that rounding does not change which ReLUs are active."""
    x, weights, biases = chain(device, (40, 32), 48, 10, dtype=torch.float16)
    biases[0] = torch.where(torch.randn(48, device=device) > 0, 20.0, -20.0).half()
    with fusedmlp.backend("triton"):
        compare((x, weights, biases), torch.randn(40, 10, device=device), final_relu)


@pytest.mark.parametrize("layout", ["transposed", "stepped", "expanded"])
def test_input_of_any_strides(layout: str, path: str, device: torch.device) -> None:
    _, weights, biases = chain(device, (12, 20), 8, 10)
    x = {
        "transposed": lambda: torch.randn(20, 12, device=device).t(),
        "stepped": lambda: torch.randn(24, 40, device=device)[::2, ::2],
        "expanded": lambda: torch.randn(12, 1, device=device).expand(12, 20),
    }[layout]()
    gradients = []
    for function in (mlp, plain):
        leaf = x.detach().requires_grad_()
        copies = [w.clone().requires_grad_() for w in weights]
        gradients.append(torch.autograd.grad(function(leaf, copies, biases).square().sum(), [leaf, *copies]))
    for ours, torchs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("layout", ["stride 0", "transposed", "of sum()"])
def test_hostile_gradients(layout: str, final_relu: bool, path: str, device: torch.device) -> None:
    grad = {
        "stride 0": torch.randn(12, 1, device=device).expand(12, 10),
        "transposed": torch.randn(10, 12, device=device).t(),
        "of sum()": torch.ones((), device=device).expand(12, 10),
    }[layout]
    before = grad.clone()
    compare(chain(device, (12, 20), 8, 10), grad, final_relu)
    assert torch.equal(grad, before)


def test_backward_twice_writes_into_nothing_saved(path: str, device: torch.device) -> None:
    arguments, wanted = leaves_of(chain(device, (12, 20), 8, 9, 10), [True] * 7, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = mlp(*arguments, final_relu=True)
    before = [t.clone() for t in saved]
    grad = torch.randn_like(y)
    first = torch.autograd.grad(y, wanted, grad, retain_graph=True)
    second = torch.autograd.grad(y, wanted, grad)
    for a, b in (*zip(first, second, strict=True), *zip(saved, before, strict=True)):
        assert torch.equal(a, b)


def gradient_penalty(function: Any, tensors: Chain, needs: Sequence[bool], of: torch.dtype) -> list[Any]:
    arguments, wanted = leaves_of(tensors, needs, of)
    y = function(*arguments)
    first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    return list(torch.autograd.grad(penalty, wanted, allow_unused=True))


def test_double_backward_for_every_combination(path: str, device: torch.device) -> None:
    """Autograd sees a saved hidden activation as a constant; terms through it must not be missing."""
    tensors = chain(device, (6, 5), 7, 4, 3)
    for needs in itertools.product([False, True], repeat=6):
        if any(needs):
            exact, theirs, mine = (
                gradient_penalty(function, tensors, (*needs, False), of)
                for function, of in ((plain, torch.float64), (plain, torch.float32), (mlp, torch.float32))
            )
            there = [
                i
                for i, (our, right) in enumerate(zip(mine, exact, strict=True))
                if our is not None and right is not None
            ]
            for i in {*range(len(exact))} - {*there}:  # its second derivative is 0
                for one in (mine[i], exact[i]):
                    assert one is None or not one.any()

            def again(nudge: Any, needs: Any = needs, there: Any = there) -> list[torch.Tensor]:
                found = gradient_penalty(plain, nearby(tensors, nudge), (*needs, False), torch.float32)
                return [found[i] for i in there]

            compared = [[of[i] for i in there] for of in (mine, theirs, exact)]
            assert_all_right(*compared, [str(needs)] * len(there), again, factor=4)  # type: ignore[arg-type]


@pytest.mark.kernels
def test_saves_what_backward_needs_and_no_more(device: torch.device) -> None:
    tensors = chain(device, (4, 7), 6, 5, 3)

    def saved(*needs: bool, final_relu: bool = False) -> list[tuple[int, ...]]:
        arguments, _ = leaves_of(tensors, needs, torch.float32)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)), lambda t: t):
            mlp(*arguments, final_relu=final_relu)
        return shapes

    x, y0, y1, y2 = (4, 7), (4, 6), (4, 5), (4, 3)
    w0, w1, w2 = (6, 7), (5, 6), (3, 5)
    with fusedmlp.backend("triton"):
        assert saved(*[False] * 7) == []
        assert saved(*[True] * 7) == [x, y0, y1, w0, w1, w2]
        assert saved(*[True] * 7, final_relu=True) == [x, y0, y1, y2, w0, w1, w2]
        assert saved(False, True, True, True, True, True, False) == [x, y0, y1, w1, w2]
        assert saved(False, False, False, True, False, False, False) == [y1]  # the last layer alone
        assert saved(False, False, True, False, False, False, False) == [y0, y1, w2]  # the middle layer alone
        assert saved(True, False, False, False, False, False, False) == [y0, y1, w0, w1, w2]  # x alone
        assert saved(False, False, False, False, True, False, False) == [y0, y1, w1, w2]  # first bias alone


@pytest.mark.kernels
def test_backward_frees_the_activations(device: torch.device) -> None:
    """As in eager mode, a loss that is kept after the backward keeps the graph but not the saved tensors."""
    _, weights, biases = chain(device, (4, 7), 6, 5, 3)
    leaves = [w.requires_grad_() for w in weights]
    with fusedmlp.backend("triton"):
        x = torch.randn(4, 7, device=device)
        y = mlp(x, leaves, biases)
    gone = weakref.ref(x)
    del x
    assert gone() is not None
    loss = y.sum()
    loss.backward()
    assert gone() is None


def test_changes_in_place_that_torch_allows(path: str, device: torch.device) -> None:
    """nn.Linear does not save its bias, nor its input if the weight is frozen, so both may change."""
    tensors = chain(device, (6, 5), 7, 4)
    grads = []
    for function in (mlp, plain):
        (x, weights, biases), _ = leaves_of(tensors, [False, True, True, True, True], torch.float32)
        y = function(x, weights, biases)
        with torch.no_grad():
            weights[0].mul_(2)
            for bias in biases:
                assert bias is not None
                bias.add_(1)
        grads.append(torch.autograd.grad(y.sum(), [*weights, *biases]))
        leaf = x.clone().requires_grad_()
        h = leaf * 1
        y = function(h, [w.detach() for w in weights], [None, None])
        h += y.mean()
        grads[-1] += torch.autograd.grad(h.sum() + y.sum(), leaf)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
def test_double_backward_refuses_a_bias_changed_in_place(device: torch.device) -> None:
    (x, weights, biases), wanted = leaves_of(chain(device, (6, 5), 7, 4), [True] * 5, torch.float32)
    with fusedmlp.backend("triton"):
        y = mlp(x, weights, biases)
    with torch.no_grad():
        biases[0].add_(1)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"shape \(7,\) has been modified by an inplace operation"):
        torch.autograd.grad(y.sum(), wanted, create_graph=True)


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(7,), (2, 3, 7)])
def test_the_result_may_be_changed_in_place(shape: tuple[int, ...], device: torch.device) -> None:
    """The output made under no_grad is no view: a view could not be added to in place with a gradient."""
    x, weights, biases = chain(device, shape, 5, 4)
    leaf = torch.randn(4, device=device).requires_grad_()
    with fusedmlp.backend("triton"):
        with torch.no_grad():
            h = mlp(x, weights, biases)
        h += leaf
        h.sum().backward()
        assert leaf.grad is not None
        leaf = x.clone().requires_grad_()
        assert not mlp(leaf, weights, biases).detach_().requires_grad


def test_no_reference_cycle_keeps_tensors_alive(path: str, device: torch.device) -> None:
    """Writing a function of the output into an input must not create a reference cycle."""
    leaf = torch.randn(5, device=device).requires_grad_()

    def run() -> list[weakref.ref[torch.Tensor]]:
        x, weights, _ = chain(device, (3, 4), 5, 2)
        weights = [weights[0], weights[1].requires_grad_()]
        bias, h = leaf * 1, (x.requires_grad_() * 1)
        y = mlp(h, weights, [bias, None])
        bias += y.mean()
        h += y.mean()
        return [weakref.ref(bias), weakref.ref(h)]

    left = run()
    gc.collect()
    assert [t() for t in left] == [None, None]


@pytest.mark.kernels
def test_a_frozen_first_layer_frees_its_input(device: torch.device) -> None:
    x, weights, biases = chain(device, (4, 7), 6, 3)
    weights[1].requires_grad_()
    h = x.requires_grad_() * 1
    with fusedmlp.backend("triton"):
        loss = mlp(h, weights, biases).sum()
    gone = weakref.ref(h)
    del h
    loss.backward()
    assert gone() is None


def test_a_dispatch_mode_sees_what_linear_returned() -> None:
    """Selective checkpointing keeps the results of linear, so mlp must not change them in place unseen."""
    policy = lambda ctx, op, *_, **__: (  # noqa: E731
        CheckpointPolicy.MUST_SAVE
        if op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        else CheckpointPolicy.PREFER_RECOMPUTE
    )
    x, weights, biases = chain(torch.device("cpu"), (6, 5), 7, 4)
    grads = []
    for function in (mlp, plain):
        leaf = x.clone().requires_grad_()
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        y = checkpoint(function, leaf, weights, biases, use_reentrant=False, context_fn=contexts)
        y.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_batched_gradients(path: str, device: torch.device) -> None:
    arguments, wanted = leaves_of(chain(device, (5, 6), 7, 4), [True] * 5, torch.float32)
    vectors = torch.randn(3, 5, 4, device=device)
    ours, torchs = (
        torch.autograd.grad(function(*arguments), wanted, vectors, is_grads_batched=True)
        for function in (mlp, plain)
    )
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant: bool, path: str, device: torch.device) -> None:
    tensors = chain(device, (12, 20), 8, 9, 10)
    contexts = lambda: (fusedmlp.backend(path), fusedmlp.backend(path))  # type: ignore[arg-type]  # noqa: E731
    if use_reentrant and device.type == "cuda":
        pytest.skip(
            "reentrant checkpointing takes no context_fn, and a GPU's backward runs in another thread"
        )
    options: dict[str, Any] = {} if use_reentrant else {"context_fn": contexts}
    grads = []
    for wrapped in (True, False):
        arguments, wanted = leaves_of(tensors, [True] * 7, torch.float32)
        y = (
            checkpoint(mlp, *arguments, final_relu=True, use_reentrant=False, **options)
            if wrapped and not use_reentrant
            else checkpoint(lambda *a: mlp(*a, final_relu=True), *arguments, use_reentrant=True)
            if wrapped
            else mlp(*arguments, final_relu=True)
        )
        y.sum().backward()
        grads.append([leaf.grad for leaf in wanted])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_one_weight_used_twice(path: str, device: torch.device) -> None:
    x, (weight, *_), _ = chain(device, (5, 6), 6)
    grads = []
    for function in (mlp, plain):
        leaf = weight.clone().requires_grad_()
        function(x, [leaf, leaf], [None, None]).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_cpu_path_is_torchs_bit_for_bit() -> None:
    tensors = chain(torch.device("cpu"), (33, 20), 16, 10, 7)
    grad = torch.randn(33, 7)
    for final_relu in (False, True):
        both = [results(f, tensors, [True] * 7, final_relu, grad, torch.float32) for f in (mlp, plain)]
        for a, b in zip(*both, strict=True):
            assert torch.equal(a, b)


@pytest.mark.kernels
def test_same_bits_every_time(device: torch.device) -> None:
    tensors = chain(device, (600, 24), 32, 16, 10)
    grad = torch.randn(600, 10, device=device)
    with fusedmlp.backend("triton"):
        first, second = (results(mlp, tensors, [True] * 7, False, grad, torch.float32) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.kernels
def test_large_products_are_launched_at_once(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Large weight gradients are launched at once: only small ones gain from a common launch."""
    from fusedmlp.kernels import chain as room

    tensors = chain(device, (9, 16), 32, 16, 10)
    grad = torch.randn(9, 10, device=device)
    with fusedmlp.backend("triton"):
        together = results(mlp, tensors, [True] * 7, False, grad, torch.float32)
        monkeypatch.setattr(room, "ENOUGH", 600)
        apart = results(mlp, tensors, [True] * 7, False, grad, torch.float32)
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a, b)


@pytest.mark.kernels
def test_the_predicate_names_the_layer(device: torch.device) -> None:
    x, weights, biases = chain(device, (3, 7), 6, 5)
    strange = weights[1].as_subclass(type("Strange", (torch.Tensor,), {}))
    with fusedmlp.backend("triton"):
        assert why_not_fused_mlp(x, weights, biases) is None
        for reason, arguments in (
            (
                "The weight of layer 1 is a Strange, not a plain torch.Tensor.",
                ([weights[0], strange], biases),
            ),
            (
                "The bias of layer 1 is torch.float16, and the input torch.float32.",
                (weights, [biases[0], x.new_ones(5).half()]),
            ),
            (
                "The shapes do not fit: weight of layer 0 (6, 7), weight of layer 1 (5, 7).",
                ([weights[0], x.new_ones(5, 7)], biases),
            ),
            (
                "The shapes do not fit: bias of layer 0 (5,), weight of layer 0 (6, 7).",
                (weights, [x.new_ones(5), None]),
            ),
        ):
            assert why_not_fused_mlp(x, *arguments) == reason


def test_on_a_cpu_the_reason_is_the_cpu() -> None:
    reason = why_not_fused_mlp(*chain(torch.device("cpu"), (3, 7), 6, 5))
    assert reason == "The input is on the CPU; the fused kernels need a CUDA GPU."


@pytest.mark.gpu
def test_the_rule_of_auto() -> None:
    def reason(rows: int, *widths: int, dtype: torch.dtype = torch.bfloat16) -> str | None:
        pairs = list(itertools.pairwise(widths))
        x = torch.empty(rows, widths[0], device="cuda", dtype=dtype)
        weights = [torch.empty(N, K, device="cuda", dtype=dtype) for K, N in pairs]
        return why_not_fused_mlp(x, weights, [None] * len(weights))

    assert reason(65536, 256, 256, 256, 10) is None
    assert "The work (0.12 GFLOP in 3 layers) is too little" in str(reason(512, 256, 256, 256, 10))
    assert "limited by arithmetic" in str(reason(8192, 4096, 4096, 4096))
    assert "IEEE" in str(reason(65536, 256, 256, 10, dtype=torch.float32))
