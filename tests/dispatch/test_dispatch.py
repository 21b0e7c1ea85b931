"""The predicate: which calls run on the kernels, which do not, and the reason that it names."""

import itertools
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusedmlp
from fusedmlp.dispatch import predicate
from fusedmlp.functional import linear_relu, mlp, why_not_fused, why_not_fused_mlp


class Subclass(torch.Tensor):
    pass


class Watching(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


# The device on which the kernels run. On a CPU, Triton's interpreter runs them.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(device: Any = DEVICE, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(s, device=device, dtype=dtype) for s in ((3, 4), (2, 4), (2,)))


def test_on_a_cpu_the_reason_is_the_cpu() -> None:
    reason = why_not_fused(*tensors("cpu"))
    assert reason == "The input is on the CPU; the fused kernels need a CUDA GPU."
    with fusedmlp.backend("torch"):
        assert why_not_fused(*tensors()) == "The caller chose backend('torch')."


def test_backend_is_restored_nested_and_per_thread() -> None:
    reasons = []
    with fusedmlp.backend("torch"):
        with pytest.raises(KeyError), fusedmlp.backend("auto"):
            raise KeyError
        assert "The caller chose" in str(why_not_fused(*tensors()))
        with fusedmlp.backend("auto"):
            assert "The caller chose" not in str(why_not_fused(*tensors()))
        thread = threading.Thread(target=lambda: reasons.append(why_not_fused(*tensors())))
        thread.start()
        thread.join()
    assert "The caller chose" not in reasons[0]


@fusedmlp.backend("torch")
def decorated() -> str | None:
    return why_not_fused(*tensors())


def test_backend_decorates() -> None:
    assert decorated() == "The caller chose backend('torch')."


def forward_mode() -> AbstractContextManager[Any]:
    return forward_ad.dual_level()


# Words of the expected reason -> the arguments and the context of the call
SPECIAL: dict[str, tuple[Callable[[], tuple[Any, ...]], Callable[[], AbstractContextManager[Any]]]] = {
    "float64": (lambda: tensors(dtype=torch.float64), nullcontext),
    "Subclass": (lambda: (tensors()[0].as_subclass(Subclass), *tensors()[1:]), nullcontext),
    "weight is a Subclass": (
        lambda: (tensors()[0], tensors()[1].as_subclass(Subclass), tensors()[2]),
        nullcontext,
    ),
    "bias is torch.float16": (lambda: (*tensors()[:2], tensors()[2].half()), nullcontext),
    "weight is on meta": (lambda: (tensors()[0], tensors("meta")[1], tensors()[2]), nullcontext),
    "meta": (lambda: tensors("meta"), nullcontext),
    "sparse": (lambda: (tensors()[0].to_sparse(), *tensors()[1:]), nullcontext),
    "sparse or nested": (
        lambda: (
            torch.nested.nested_tensor(list(tensors()[0].split(1)), layout=torch.strided),
            *tensors()[1:],
        ),
        nullcontext,
    ),
    "shapes do not fit: input": (lambda: (torch.randn(3, 5, device=DEVICE), *tensors()[1:]), nullcontext),
    "shapes do not fit: bias": (lambda: (*tensors()[:2], torch.randn(7, device=DEVICE)), nullcontext),
    "weight is torch.float64, and the input": (
        lambda: (tensors()[0], tensors()[1].double(), tensors()[2]),  # autocast does not cast float64
        lambda: torch.autocast(DEVICE, torch.float16),
    ),
    "Forward-mode": (tensors, forward_mode),
    "TorchDispatchMode": (tensors, TorchDispatchMode),
    "TorchFunctionMode": (tensors, Watching),
    "FakeTensor": (lambda: tuple(map(FakeTensorMode().from_tensor, tensors())), nullcontext),
}


@pytest.mark.kernels
@pytest.mark.parametrize("reason", SPECIAL)
def test_every_special_case_is_named_and_forcing_raises_it(reason: str) -> None:
    make, context = SPECIAL[reason]
    arguments = make()
    with fusedmlp.backend("triton"):
        assert why_not_fused(*tensors()) is None
        with context():
            assert reason in str(why_not_fused(*arguments))
            if "shapes" not in reason and "is on" not in reason and "is torch" not in reason:
                with pytest.raises(RuntimeError, match=reason):
                    linear_relu(*arguments)
        assert why_not_fused(*tensors()) is None


@pytest.mark.kernels
def test_transforms_and_tracing_are_named() -> None:
    x, weight, bias = tensors()
    reasons: list[str | None] = []

    def note(t: torch.Tensor) -> torch.Tensor:
        reasons.append(why_not_fused(t, weight, bias))
        return t.sum()

    with fusedmlp.backend("triton"):
        torch.func.vmap(note)(x[None])
        torch.jit.trace(note, x, check_trace=False)
    assert "torch.func transform" in str(reasons[0])
    assert "tracing" in str(reasons[1])
    assert len(reasons) == 2


@pytest.mark.kernels
def test_a_default_device_does_not_stop_the_kernels() -> None:
    with fusedmlp.backend("triton"), torch.device(DEVICE):
        assert why_not_fused(*tensors()) is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "dtype", "relu", "reason"),
    [
        (65536, 256, 256, torch.bfloat16, True, None),
        (65536, 256, 256, torch.bfloat16, False, "nothing to fuse"),
        (65536, 256, 256, torch.float32, True, "IEEE"),
        (128, 256, 256, torch.bfloat16, True, "too little"),
        (8192, 4096, 4096, torch.bfloat16, True, "limited by arithmetic"),
    ],
)
def test_the_rule_of_auto(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, relu: bool, reason: str | None
) -> None:
    x, weight = (
        torch.empty(rows, inputs, device="cuda", dtype=dtype),
        torch.empty(outputs, inputs).cuda().to(dtype),
    )
    got = why_not_fused(x, weight, relu=relu)
    assert got is None if reason is None else reason in str(got)


@pytest.mark.kernels
@pytest.mark.parametrize("widths", [(256, 256), (1, 7, 10), (784, 256, 128, 10), (64,) * 9], ids=str)
def test_the_quick_check_matches_the_rule(widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """They agree up to the limit, for CPU tensors that pass for a GPU's."""
    monkeypatch.setattr(predicate, "_interpreted", lambda x: True)
    monkeypatch.setattr(predicate, "_why_not_here", lambda device_type, index: None)
    weights = [torch.empty(N, K) for K, N in itertools.pairwise(widths)]
    edge = int(predicate._LEAST_FLOPS * len(weights) / 2 / sum(map(torch.numel, weights)))
    shapes = [(rows, widths[0]) for rows in (0, 1, edge - 1, edge, edge + 1, 4 * edge)]
    for shape in [*shapes, (2, edge, widths[0]), (widths[0],)]:
        x = torch.empty(()).expand(shape)  # takes no memory at any size
        reason = why_not_fused_mlp(x, weights, [None] * len(weights), final_relu=True)
        assert predicate.surely_too_little(x, weights) is ("too little" in str(reason)), shape


def test_small_calls_skip_the_full_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that run on PyTorch's operators in any case do not compute a reason."""
    x, weight, bias = tensors("meta")
    model = fusedmlp.nn.MLP(4, [5, 3], 2, device="meta")
    with monkeypatch.context() as patched:
        patched.setattr(predicate, "why_not_fused_mlp", None)  # so that it cannot be called
        for layer in (x, x[0], x[None]):
            assert linear_relu(layer, weight, bias).shape == (*layer.shape[:-1], 2)
            assert model(layer).shape == (*layer.shape[:-1], 2)
    # Forcing the kernels and explain() still give the reason in words.
    with pytest.raises(RuntimeError, match="The input is on the meta device"), fusedmlp.backend("triton"):
        linear_relu(x, weight, bias)
    assert "The input is on the meta device" in str(fusedmlp.explain(model, x))
    # Mistakes raise the same type of error as in PyTorch.
    for wrong in ((x[0, 0], weight), (x, weight.t()), (x, None), (x, 3), (None, weight)):
        for function in (
            lambda x, weight: linear_relu(x, weight),
            lambda x, weight: mlp(x, [weight], [None]),
        ):
            with pytest.raises((RuntimeError, TypeError, AttributeError)) as ours:
                function(*wrong)
            with pytest.raises((RuntimeError, TypeError, AttributeError)) as torchs:
                torch.nn.functional.linear(*wrong)
            assert ours.type is torchs.type, wrong


def test_tracers_and_modes_see_no_quick_check() -> None:
    x, weight, bias = tensors("cpu")

    def look(x: torch.Tensor) -> torch.Tensor:
        assert not predicate.surely_too_little(x, [weight])
        return linear_relu(x, weight, bias)

    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        assert "numel" not in str(torch.jit.trace(look, x, check_trace=False).graph)
    with Watching() as mode:
        look(x)
    assert not {"numel", "size"} & {function.__name__ for function in mode.seen}
    assert predicate.surely_too_little(x, [weight])


def test_asking_for_kernels_where_there_are_none_says_why() -> None:
    """This runs in a process of its own, without Triton's interpreter."""
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch, fusedmlp\n"
        "with fusedmlp.backend('triton'):\n"
        "    fusedmlp.Linear(4, 2)(torch.randn(3, 4))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "RuntimeError: backend('triton') cannot run here. The input is on the CPU" in run.stderr
