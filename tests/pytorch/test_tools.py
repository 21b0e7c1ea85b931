"""Tools that inspect or change modules work on ours as on torch.nn's: the same values, keys and errors."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compatibility import Route
from networks import NETWORKS, Net, is_ours, linear, pair, results
from oracle import assert_same
from torch import nn as tnn
from torch.nn.utils import fusion, parametrizations, parametrize, prune
from torch.optim import swa_utils

import fusedmlp
from fusedmlp import nn

SECTION = "Tools that look at modules"


Compare = Callable[..., Any]


@pytest.fixture
def compare(compare: Compare) -> Compare:
    return functools.partial(compare, fused=True, again=True)


# --- changes of a layer ---


class Doubled(tnn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


PARAMETRIZATIONS = {
    "weight_norm": lambda m: parametrizations.weight_norm(linear(m)),
    "spectral_norm": lambda m: parametrizations.spectral_norm(linear(m)),
    "custom": lambda m: parametrize.register_parametrization(linear(m), "weight", Doubled()),
}


@pytest.mark.capability(SECTION, "parametrizations: weight_norm, spectral_norm, one's own")
@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_parametrizations(kind: str, compare: Compare, network: str) -> None:
    def change(model: Any) -> None:
        PARAMETRIZATIONS[kind](model)

    def removed(model: Any) -> None:
        change(model)
        parametrize.remove_parametrizations(linear(model), "weight")

    compare(change=change)
    kinds = [type(module) for module in NETWORKS[network][0]().modules()]
    assert [type(module) for module in compare(change=removed).modules()] == kinds


PRUNING = {
    "l1_unstructured": lambda m: prune.l1_unstructured(linear(m), "weight", amount=0.4),
    "random_structured": lambda m: prune.random_structured(linear(m), "weight", amount=1, dim=0),
    "bias": lambda m: prune.random_unstructured(linear(m), "bias", amount=1),
}


@pytest.mark.capability(SECTION, "pruning")
@pytest.mark.parametrize("kind", PRUNING)
def test_pruning(kind: str, compare: Compare) -> None:
    def change(model: Any) -> None:
        PRUNING[kind](model)

    def for_good(model: Any) -> None:
        change(model)
        prune.remove(linear(model), "bias" if kind == "bias" else "weight")

    compare(change=change)
    compare(change=for_good)


HOOKS: dict[str, Callable[[Any, Callable[..., None]], Any]] = {
    "forward": lambda m, note: m.register_forward_hook(lambda m, x, y: note(y)),
    "forward that changes it": lambda m, note: m.register_forward_hook(lambda m, x, y: 2 * y),
    "forward pre": lambda m, note: m.register_forward_pre_hook(lambda m, x: note(*x)),
    "backward": lambda m, note: m.register_full_backward_hook(lambda m, gx, gy: note(*gx, *gy)),
    "backward pre": lambda m, note: m.register_full_backward_pre_hook(lambda m, gy: note(*gy)),
    "of a weight": lambda m, note: linear(m).weight.register_hook(note),
    "after accumulating": lambda m, note: linear(m).weight.register_post_accumulate_grad_hook(
        lambda p: note(p.grad)
    ),
}


@pytest.mark.capability(SECTION, "forward and backward hooks")
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks(kind: str, compare: Compare) -> None:
    def run(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for hooked in (model, linear(model)):
            notes: list[torch.Tensor] = []
            handle = HOOKS[kind](hooked, lambda *given, notes=notes: notes.extend(map(torch.clone, given)))
            found += results(model, x)
            handle.remove()
            assert notes or "changes" in kind
            found += [t.detach() for t in notes]
        return found + results(model, x)

    compare(run)


@pytest.mark.capability(SECTION, "hooks on every module: register_module_forward_hook and its like")
@pytest.mark.parametrize(
    "register",
    [
        tnn.modules.module.register_module_forward_hook,
        tnn.modules.module.register_module_forward_pre_hook,
        tnn.modules.module.register_module_full_backward_hook,
        tnn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_on_every_module(register: Callable[..., Any], compare: Compare) -> None:
    def run(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
        notes: list[tuple[tnn.Module, torch.Tensor]] = []

        def hook(module: tnn.Module, *given: Any) -> None:
            last = given[-1]
            notes.append((module, (last[0] if isinstance(last, tuple) else last).detach().clone()))

        handle = register(hook)
        try:
            found = results(model, x)
        finally:
            handle.remove()
        assert {module for module, _ in notes} == set(model.modules())
        return [*found, *(t for _, t in notes)]

    compare(run)


# --- copies and converted models ---


@pytest.mark.capability(SECTION, "torch.nn.utils.fusion: a norm folded into the layer before it")
@pytest.mark.parametrize("network", sorted(NETWORKS.keys() - {"LinearReLU"}))  # has its ReLU before the norm
def test_fusion(compare: Compare, device: torch.device) -> None:
    def change(model: Any) -> Any:
        layer = linear(model)
        norm = tnn.BatchNorm1d(layer.out_features).to(device)
        with torch.no_grad():
            for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                tensor.uniform_(0.5, 2)  # type: ignore[union-attr]
        folded = fusion.fuse_linear_bn_eval(layer.eval(), norm.eval())
        assert type(folded) is type(layer)
        layer.weight, layer.bias = folded.weight, folded.bias

    compare(change=change)


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.capability(SECTION, "deepcopy, pickle and torch.save of a whole model")
@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle, through_a_file])
def test_copies(clone: Callable[[Any], Any], compare: Compare, network: str) -> None:
    model = compare(change=clone)
    kinds = [type(module) for module in NETWORKS[network][0]().modules()]
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.capability(SECTION, "checkpoints: torch.save, weights_only=True, load_state_dict(assign=True)")
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints(assign: bool, compare: Compare, network: str, device: torch.device) -> None:
    def in_the_other_kind(model: Any) -> Any:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        values = torch.load(file, weights_only=True, map_location=device)
        other = NETWORKS[network][is_ours(model)]().to(device)
        other.load_state_dict(values, assign=assign)
        assert (linear(other).weight.data_ptr() in {value.data_ptr() for value in values.values()}) is assign
        with pytest.raises(RuntimeError, match="size mismatch"):
            other.load_state_dict({name: value[:1] for name, value in values.items()})
        return other

    compare(change=lambda model: in_the_other_kind(in_the_other_kind(model)))


@pytest.mark.capability(SECTION, "meta device, to_empty")
def test_meta_device(compare: Compare, device: torch.device) -> None:
    def change(model: Any) -> Any:
        values = copy.deepcopy(model.state_dict())
        model.to("meta")
        y = model(torch.empty(2, 6, 5, device="meta"))
        assert (y.device.type, y.shape) == ("meta", (2, 6, 3))
        model.to_empty(device=device).load_state_dict(values)

    compare(change=change)


@pytest.mark.capability(SECTION, "torch.set_default_device, with torch.device(...)")
@pytest.mark.parametrize("how", ["set", "with"])
def test_default_device(how: str, compare: Compare, network: str, device: torch.device) -> None:
    def run(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
        make = NETWORKS[network][not is_ours(model)]
        built = []
        for where in (torch.device("meta"), device):
            if how == "set":
                torch.set_default_device(where)
            try:
                with where if how == "with" else torch.enable_grad():
                    built.append(make().to(x.dtype))
                    found = results(built[-1], torch.ones(2, 5, dtype=x.dtype))
                assert {t.device.type for t in (*found, *built[-1].parameters())} == {where.type}
            finally:
                torch.set_default_device(None)
        built[0].load_state_dict(model.state_dict(), assign=True)
        with device:
            return results(built[0], x)

    compare(run)


# --- training ---


@pytest.mark.capability(SECTION, "nn.init")
@pytest.mark.parametrize("name", ["xavier_uniform_", "kaiming_normal_", "orthogonal_", "trunc_normal_"])
def test_init(name: str, compare: Compare) -> None:
    def initialise(module: tnn.Module) -> None:
        if isinstance(module, tnn.Linear):
            getattr(tnn.init, name)(module.weight)
            tnn.init.constant_(module.bias, 0.1)

    compare(change=lambda model: model.apply(initialise))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=2, line_search_fn="strong_wolfe"),
}


def train(
    model: Any, x: torch.Tensor, optimizer: torch.optim.Optimizer, after: Callable[[], Any] = lambda: None
) -> torch.Tensor:
    """The losses of five steps."""

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3].sin()).square().mean()
        loss.backward()
        return loss

    losses = []
    for _ in range(5):
        losses.append(optimizer.step(closure).detach())  # type: ignore[attr-defined]
        after()
    return torch.stack(losses)


@pytest.mark.thinned
@pytest.mark.capability(SECTION, "optimizers: SGD, Adam, AdamW, also fused and foreach, LBFGS")
@pytest.mark.parametrize("network", ["LinearReLU", "MLP", "fused"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers(kind: str, compare: Compare) -> None:
    def run(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
        losses = train(model, x, OPTIMIZERS[kind](model.parameters()))
        assert losses[-1] < losses[0]
        return [losses]

    compare(run)


@pytest.mark.capability(SECTION, "EMA: AveragedModel, update_bn")
def test_averaged_model(compare: Compare, device: torch.device) -> None:
    def run(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = train(model, x, optimizer, lambda: averaged.update_parameters(model))
        swa_utils.update_bn([x, 2 * x], averaged)
        return [losses, *averaged.state_dict().values(), averaged(x).detach()]

    def change(model: Any) -> Any:
        return tnn.Sequential(tnn.BatchNorm1d(5, device=device), model)

    compare(run, change=change)


@pytest.mark.capability(SECTION, "torch.nn.utils: clip_grad_norm_, parameters_to_vector, skip_init")
def test_utilities(compare: Compare, network: str, device: torch.device) -> None:
    def run(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
        results(model, x)
        norm = tnn.utils.clip_grad_norm_(model.parameters(), 0.1)
        gradients = [p.grad.clone() for p in model.parameters()]
        vector = tnn.utils.parameters_to_vector(model.parameters())
        tnn.utils.vector_to_parameters(vector.detach() / 2, model.parameters())
        return [norm, *gradients, vector.detach(), *results(model, x)]

    compare(run)
    arguments: dict[str, Any] = {"Linear": (5, 3), "LinearReLU": (5, 3), "MLP": (5, [4], 3)}
    if network in arguments:
        made = tnn.utils.skip_init(getattr(nn, network), *arguments[network], device=device)
        assert {p.device.type for p in made.parameters()} == {device.type}


@pytest.mark.capability(SECTION, "share_memory, set_swap_module_params_on_conversion")
def test_other_memory(compare: Compare, device: torch.device) -> None:
    def run(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
        before = results(model.share_memory(), x)
        assert device.type != "cpu" or linear(model).weight.is_shared()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            same = list(model.parameters())
            model.to(torch.float64).to(x.dtype)
            model.load_state_dict({name: value / 2 for name, value in model.state_dict().items()})
            assert all(p is q for p, q in zip(model.parameters(), same, strict=True))
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        return [*before, *results(model, x)]

    compare(run)


# --- tools that look at the class ---


def lazy(kind: str, nn: Any) -> Any:
    """kind: a layer, a chain, or a model with a ReLU in its forward."""
    if kind == "Linear":
        return nn.LazyLinear(3)
    if kind == "Sequential":
        return nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(3))
    model = Net()
    model.fc1, model.tail = nn.LazyLinear(4), nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(3))
    return model


@pytest.mark.capability(SECTION, "LazyLinear, which becomes a fused Linear")
@pytest.mark.parametrize("first", ["call", "initialize_parameters", "checkpoint"])
@pytest.mark.parametrize("kind", ["Linear", "Sequential", "forward"])
@pytest.mark.parametrize("how", ["built", "fused"])
def test_lazy(how: str, kind: str, first: str, route: Route, device: torch.device) -> None:
    x = torch.randn(6, 5, device=device)
    found, models = [], []
    for which in range(3):
        model = lazy(kind, nn if how == "built" and which == 0 else tnn)
        model = fusedmlp.fuse(model) if how == "fused" and which == 0 else model
        model = through_pickle(copy.deepcopy(model.to(device)))
        torch.manual_seed(2)
        if first == "checkpoint":
            loaded = lazy(kind, tnn).to(device)
            loaded(x)
            model.load_state_dict(loaded.state_dict())
        elif first == "initialize_parameters":
            layer = linear(model)
            layer.initialize_parameters(x)
        models.append((repr(model), list(model.state_dict())))
        dtype = torch.float64 if which == 2 else torch.float32
        y = model(x)
        random = torch.rand(2, device=device)
        found.append([y.detach(), random, *results(model.to(dtype), x.to(dtype))])
        models.append((repr(model), list(model.state_dict())))
        if which == 0:
            kinds = {type(module).__module__ for module in model.modules() if isinstance(module, tnn.Linear)}
            assert kinds <= {"fusedmlp.nn", "fusedmlp.convert.pending_relu"}
            again = fusedmlp.unfuse(copy.deepcopy(model), built=how == "built")
            assert {type(m) for m in again.modules() if isinstance(m, tnn.Linear)} == {tnn.Linear}
    assert models[:2] == models[2:4]
    found[2][:2] = [t.double() for t in found[1][:2]]
    ours, torchs, exact = found
    assert_same(ours, torchs, exact if route.kernels else None)


def quantized(model: Any) -> Any:
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no engine for quantized layers")
    return torch.ao.quantization.quantize_dynamic(model.cpu().eval(), {tnn.Linear})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.capability(SECTION, "dynamic quantization, after fusedmlp.unfuse(model, built=True)")
def test_dynamic_quantization(network: str, route: Route) -> None:
    ours, torchs = pair(network, torch.device("cpu"))
    if network == "LinearReLU":  # a plain Linear would lose the ReLU
        with pytest.raises(TypeError, match=r"no LinearReLU.*Linear and ReLU in place of: the model itself"):
            fusedmlp.unfuse(ours, built=True)
        assert type(ours) is nn.LinearReLU
        return
    x = torch.randn(6, 5)
    whole = [tnn.Sequential(model) for model in (fusedmlp.unfuse(ours, built=True), torchs)]
    assert repr(quantized(whole[0])) == repr(quantized(whole[1]))
    assert "DynamicQuantizedLinear" in repr(quantized(whole[0]))
    assert torch.equal(quantized(whole[0])(x), quantized(whole[1])(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.capability(SECTION, "dynamic quantization, directly")
@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="it goes by exact type; call fusedmlp.unfuse(model, built=True) first",
)
def test_dynamic_quantization_directly(route: Route) -> None:
    assert "DynamicQuantizedLinear" in repr(quantized(nn.MLP(5, [4], 3)))


@pytest.mark.capability(SECTION, "torch.profiler: names to read")
def test_profiler(network: str, route: Route, device: torch.device) -> None:
    model = NETWORKS[network][0]().to(device)
    x = torch.randn(6, 5, device=device)
    names = []
    for grad in (True, False):
        with torch.profiler.profile() as profile, torch.set_grad_enabled(grad):
            y = model(x)
            if grad:
                y.sum().backward()
        names.append({event.key for event in profile.key_averages()})
    if route.kernels:
        assert {"FusedMLP", "FusedMLPBackward"} <= names[0]
        assert "FusedMLP" in names[1]
        assert "aten::addmm" not in names[0] | names[1]
    else:
        assert "aten::linear" in names[0] & names[1]
        assert "AddmmBackward0" in names[0]
