"""The kernels compute a Linear and its ReLU together; other uses of its output are right or raise."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import Clipped, Reverse, assert_right_on_kernels, custom, row, run, spied
from networks import Net
from torch import nn as tnn
from torch.nn import functional as F

import fusedmlp
from fusedmlp.convert import fuse, unfuse

ROOT = Path(__file__).parents[2]


def flagged(m: Any, x: torch.Tensor) -> Any:
    z = m.fc(x)
    if m.flag:
        z = m.flag(m, z)
    return F.relu(z) if m.rectify else z


def checkpointed(m: Any, z: torch.Tensor) -> torch.Tensor:
    return torch.utils.checkpoint.checkpoint(torch.tanh, z, use_reentrant=False)


# Other uses of the Linear's output. A flag turns them on after fuse has read the forward.
DEVIATIONS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "arithmetic": lambda m, z: 2 * z + 1 - z / 3,
    "dropout": lambda m, z: F.dropout(z, 0.5),
    "in place": lambda m, z: z.add_(1),
    "in place, and the name is kept": lambda m, z: (z.mul_(-1), z)[1],
    "an item": lambda m, z: (z.__setitem__(0, 1.0), z)[1],
    "relu_": lambda m, z: (z.relu_(), z)[1],
    "out": lambda m, z: (torch.neg(z.detach(), out=torch.empty_like(z)), z)[1],
    "length": lambda m, z: z[: len(z)],
    "iteration": lambda m, z: torch.stack(list(z)),
    "bool": lambda m, z: -z if z.sum() > 0 else z * 2,
    "isinstance": lambda m, z: -z if isinstance(z, torch.Tensor) else z,
    "type": lambda m, z: -z if z.detach().cpu().numpy().shape == (4, 5) else z,
    "a list": lambda m, z: torch.cat([z, z], dim=1)[:, :5],
    "a hook": lambda m, z: (z.register_hook(lambda g: 2 * g), z)[1],
    "deepcopy and repr": lambda m, z: (repr(z), copy.deepcopy(z.detach()), z)[2],
    "an autograd.Function": lambda m, z: Reverse.apply(z + 0),
    "a function": lambda m, z: F.linear(z, m.other.weight),
    "a module": lambda m, z: tnn.Tanh()(z),
    "another relu": lambda m, z: F.relu(z) + F.relu(z),
    "no_grad": lambda m, z: (m.notes.append(torch.no_grad()(torch.sigmoid)(z)), z)[1],
    "inference_mode": lambda m, z: (m.notes.append(torch.inference_mode()(torch.sigmoid)(z)), z)[1],
    "relu under no_grad": lambda m, z: torch.no_grad()(F.relu)(z) + z,
    "a detached one": lambda m, z: z.detach() + z,
    "checkpoint": checkpointed,
    "a weak reference": lambda m, z: (m.notes.append(torch.utils.weak.WeakTensorKeyDictionary({z: 1})), z)[1],
    "a weak reference and two hooks": lambda m, z: [
        m.notes.append(torch.utils.weak.WeakTensorKeyDictionary({z: 1})),
        z.register_hook(lambda g: 2 * g),
        z.register_hook(lambda g: 3 * g),
        z,
    ][3],
    "its values first": lambda m, z: z * z.mean().item(),
    "vmap": lambda m, z: torch.vmap(torch.sin)(z),
    "kept": lambda m, z: (m.notes.append(z), z)[1],
    "einsum": lambda m, z: torch.einsum("ij,ij->ij", z, z),
    "matmul": lambda m, z: z @ m.other.weight,
}


@pytest.mark.kernels
@pytest.mark.parametrize("rectify", [True, False])
@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_flags_flipped_after_fuse(
    deviation: str, rectify: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = custom(flagged, flag=None, rectify=True, notes=[]).to(device)
    fuse(model)
    assert row(model, "fc").status == "pair in forward of Custom"
    model.flag, model.rectify = DEVIATIONS[deviation], rectify  # type: ignore[assignment]
    with spied(monkeypatch) as calls:
        assert_right_on_kernels(model, torch.randn(4, 5, device=device))
    assert calls == [1]


@pytest.mark.kernels
@pytest.mark.parametrize("deviation", ["dropout", "in place", "length", "its values first"])
def test_an_output_without_relu_keeps_nothing_alive(deviation: str, device: torch.device) -> None:
    model = fuse(custom(flagged, flag=None, rectify=True).to(device))
    model.flag, model.rectify = DEVIATIONS[deviation], False  # type: ignore[assignment]
    x = torch.randn(4, 5, device=device)
    memory = weakref.ref(x)
    gc.disable()
    try:
        with fusedmlp.backend("triton"):
            model(x).sum().backward()
        del x
        assert memory() is None
    finally:
        gc.enable()


def after_relu(m: Any, x: torch.Tensor) -> Any:
    z = m.fc(x)
    y = F.relu(z)
    return y + m.flag(z) if m.flag else y


@pytest.mark.kernels
def test_the_output_of_the_linear_is_used_after_its_relu(device: torch.device) -> None:
    model = fuse(custom(after_relu, flag=None).to(device))
    x = torch.randn(4, 5, device=device)
    for flag in (torch.sin, F.relu, lambda z: z.mul_(3), lambda z: z[0] * z.sum()):
        model.flag = flag  # type: ignore[assignment]
        assert_right_on_kernels(model, x)
    for flag in (lambda z: z.register_hook(print), lambda z: z.retain_grad(), lambda z: z.grad_fn):
        model.flag = flag  # type: ignore[assignment]
        with (
            fusedmlp.backend("triton"),
            pytest.raises(RuntimeError, match="the gradient of a Linear's output"),
        ):
            model(x)


@pytest.mark.kernels
def test_uses_that_cannot_be_right_raise(device: torch.device) -> None:
    model = fuse(custom(flagged, flag=None, rectify=True).to(device))
    x = torch.randn(4, 5, device=device)

    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return x.relu()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0]

    for function in (Reverse, Clipped, Outer):
        model.flag = lambda m, z, function=function: function.apply(z)  # type: ignore[assignment]
        with fusedmlp.backend("triton"), pytest.raises(RuntimeError, match=r"went to an autograd\.Function"):
            model(x)
        with fusedmlp.backend("triton"), torch.no_grad():
            torch.testing.assert_close(model(x), unfuse(model, inplace=False)(x))
    model.flag = None
    with fusedmlp.backend("triton"):
        z = torch.utils.checkpoint.checkpoint(model.fc, x.clone().requires_grad_(), use_reentrant=True)
        with pytest.raises(RuntimeError, match=r"went to an autograd\.Function"):
            F.relu(z)

        class Inner(Outer):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                with torch.enable_grad():
                    return model.fc(x)

        with pytest.raises(RuntimeError, match=r"went to an autograd\.Function"):
            F.relu(Inner.apply(x.clone().requires_grad_()))
        with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match=r"C\+\+"):
            torch.sin(model.fc(x))
        for changed in (x, model.fc.weight, model.fc.bias):
            z = model.fc(x)
            with torch.no_grad():
                changed.add_(1)
            expected = F.relu(F.linear(x - (changed is x) * 1, model.fc.weight, model.fc.bias))
            if changed is x:
                torch.testing.assert_close(F.relu(z), expected)  # computed when the Linear was called
                z = model.fc(x)
                x.add_(1)
            with pytest.raises(RuntimeError, match="changed in place"):
                z.sin()


@pytest.mark.kernels
def test_settings_are_those_when_the_linear_is_called(device: torch.device) -> None:
    model = fuse(custom(lambda m, x: F.relu(m.fc(x))).to(device))
    x = torch.randn(4, 5, device=device)
    for use in (F.relu, torch.sin):
        expected = use(F.linear(x, model.fc.weight, model.fc.bias)).detach()
        with fusedmlp.backend("triton"):
            z = model.fc(x)
        with torch.autocast(device.type, torch.bfloat16), fusedmlp.backend("torch"):
            y = use(z)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.detach(), expected)
        assert y.requires_grad
        with fusedmlp.backend("triton"), torch.no_grad():
            z = model.fc(x)
        assert not use(z).requires_grad
        with fusedmlp.backend("triton"):
            z = model.fc(x)
        with torch.no_grad():
            y = use(z)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected)
        with fusedmlp.backend("triton"), torch.inference_mode():
            inner = x.clone()  # an inference tensor: a later change in place cannot be noticed
            z = model.fc(inner)
            inner.add_(1)
            torch.testing.assert_close(use(z), expected)


def saw(output: torch.Tensor) -> torch.Tensor:
    assert type(output) is torch.Tensor
    return output.detach().clone()


WATCHERS: dict[str, Callable[[tnn.Module, list[Any]], Any]] = {
    "forward hook": lambda m, seen: m.register_forward_hook(lambda *a: seen.append(saw(a[2]))),
    "a hook that changes": lambda m, seen: m.register_forward_hook(lambda *a: (seen.append(0), a[2] * -1)[1]),
    "pre-hook": lambda m, seen: m.register_forward_pre_hook(lambda *a: seen.append(a[1][0].detach().clone())),
    "backward hook": lambda m, seen: m.register_full_backward_hook(lambda *a: seen.append(a[2][0].clone())),
    "backward pre-hook": lambda m, seen: m.register_full_backward_pre_hook(
        lambda *a: seen.append(a[1][0].clone())
    ),
    "global hook": lambda m, seen: tnn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(saw(output)) if module is m else None
    ),
}


@pytest.mark.kernels
@pytest.mark.parametrize("which", ["fc", "act"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_hooks_before_and_after_fuse(watcher: str, when: str, which: str, device: torch.device) -> None:
    x = torch.randn(4, 5, device=device)
    results = []
    for fusing in (False, True):
        torch.manual_seed(3)
        seen: list[Any] = []
        model = custom(lambda m, x: m.act(m.fc(x))).to(device)
        if fusing and when == "after":
            fuse(model)
        handle = WATCHERS[watcher](getattr(model, which), seen)
        if fusing and when == "before":
            fuse(model)
        with handle, fusedmlp.backend("triton" if fusing else "auto"):
            results.append([*run(model, x), *seen])
        assert len(seen) == 1
    for ours, torchs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.kernels
def test_a_wrapped_forward_sees_tensors(device: torch.device) -> None:
    """accelerate wraps forwards like this to move layers between devices."""
    model = fuse(custom(lambda m, x: F.relu(m.fc(x))).to(device))
    inner, seen = model.fc.forward, []
    model.fc.forward = lambda x: (seen.append(inner(x)), seen[-1])[1]  # type: ignore[method-assign]
    x = torch.randn(4, 5, device=device)
    for forward in (model, unfuse(model)):
        with fusedmlp.backend("triton"):
            torch.testing.assert_close(forward(x), F.relu(F.linear(x, model.fc.weight, model.fc.bias)))
    assert [type(z) for z in seen] == [torch.Tensor] * 2


@pytest.mark.kernels
def test_a_patched_call_sees_tensors(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuse(Net().to(device))
    seen = []
    call = tnn.Module.__call__

    def spy(self: Any, *arguments: Any) -> Any:
        seen.append(call(self, *arguments))
        return seen[-1]

    with monkeypatch.context() as patch, fusedmlp.backend("triton"):
        patch.setattr(tnn.Module, "__call__", spy)
        model(torch.randn(2, 5, device=device))
    assert {type(t) for t in seen} == {torch.Tensor}


@pytest.mark.kernels
def test_a_whole_model_on_the_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuse(Net().to(device))
    with spied(monkeypatch) as calls:
        assert_right_on_kernels(model, torch.randn(6, 5, device=device))
        assert calls == [1]
        twin = pickle.loads(pickle.dumps(model))
        assert_right_on_kernels(twin, torch.randn(6, 5, device=device))
        assert calls == [1, 1]
        with fusedmlp.backend("triton"), pytest.raises(RuntimeError, match="float64"):
            copy.deepcopy(model).double()(torch.randn(6, 5, device=device).double())
        second = model(torch.randn(2, 5, device=device, requires_grad=True)).sum()
        assert second.requires_grad
    with fusedmlp.backend("triton"):
        leaf = torch.randn(2, 5, device=device, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
    assert model.fc1.weight.grad is not None


def test_fuse_does_not_import_triton() -> None:
    code = (
        "import sys, torch, fusedmlp.convert\n"
        "before = set(sys.modules)\n"
        "model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())\n"
        "fusedmlp.convert.fuse(model)(torch.ones(1, 2))\n"
        "assert not any(name.startswith('fusedmlp.kernels') for name in sys.modules)\n"
        "assert 'triton' not in set(sys.modules) - before"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.kernels
def test_gradient_of_a_fused_output_is_refused(device: torch.device) -> None:
    model, x = fuse(custom(lambda m, x: m.act(m.fc(x))).to(device)), torch.randn(4, 5, device=device)
    with fusedmlp.backend("triton"):
        z = model.fc(x)
        y = model.act(z).sum()
        with pytest.raises(RuntimeError, match="asked for after ReLU"):
            torch.autograd.grad(y, z, allow_unused=True)
        with pytest.raises(RuntimeError, match="asked for after ReLU"):
            y.backward(inputs=[z]), z.grad
