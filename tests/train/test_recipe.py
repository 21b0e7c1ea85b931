"""Whatever the direct route does not support takes the ordinary step; hooks and modes see everything."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks_of_modules
from torch.optim import optimizer as hooks_of_optimizers
from torch.utils._python_dispatch import TorchDispatchMode
from training import CROSS_ENTROPY, OPTIMIZERS, Twins, assert_close, batches, mlp, plain

import fusedmlp

SGD, ADAM = OPTIMIZERS["SGD"], OPTIMIZERS["Adam"]


class Residual(nn.Sequential):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


class Doubled(nn.Parameter):
    pass


def with_(model: nn.Sequential, at: int, module: nn.Module) -> nn.Sequential:
    model[at] = module
    return model


def tied() -> nn.Sequential:
    model = mlp(widths=(7, 7, 7, 5))
    model[2].weight = model[0].weight
    return model


def twice() -> nn.Sequential:
    layer = nn.Linear(7, 7)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(7, 5)).double()


def subclassed() -> nn.Sequential:
    model = mlp()
    model[0].weight = Doubled(model[0].weight.detach())
    return model


def transposed() -> nn.Sequential:
    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    return model


def mixed() -> nn.Sequential:
    model = mlp()
    return model.append(nn.ReLU()).append(nn.Linear(5, 5).float())


def no_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Identity())
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    return model


def frozen() -> nn.Sequential:
    model = mlp()
    model[2].bias.requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: with_(mlp(), 1, nn.Dropout(0.0)), "Dropout"),
    "tanh": (lambda: with_(mlp(), 1, nn.Tanh()), "Tanh"),
    "two Linears": (lambda: with_(mlp(), 1, nn.Identity()), "follow each other"),
    "two ReLUs": (lambda: with_(mlp(), 1, nn.Sequential(nn.ReLU(), nn.ReLU())), "does not follow"),
    "ReLU at the end": (lambda: mlp().append(nn.ReLU()), "last layer"),
    "ReLU at the start": (lambda: nn.Sequential(nn.ReLU(), *mlp()), "does not follow"),
    "a ReLU in a Linear, at the end": (lambda: fusedmlp.nn.LinearReLU(7, 5).double(), "last layer"),
    "a subclass of Sequential": (lambda: Residual(*mlp()), "Residual"),
    "a module of somebody's": (lambda: mlp().append(nn.ModuleList([])), "ModuleList"),
    "no layers": (no_layers, "last layer"),
    "a late Flatten": (lambda: mlp().append(nn.Flatten()), "Flatten"),
    "tied weights": (tied, "share a parameter"),
    "a layer twice": (twice, "share a parameter"),
    "a subclass of Parameter": (subclassed, "Doubled"),
    "other strides": (transposed, "not contiguous"),
    "two dtypes": (mixed, "not all of one dtype"),
    "a frozen parameter": (frozen, "frozen"),
    "weight_norm": (lambda: with_(mlp(), 0, nn.utils.weight_norm(nn.Linear(7, 9).double())), "hook"),
    "a parametrization": (
        lambda: with_(mlp(), 0, nn.utils.parametrizations.weight_norm(nn.Linear(7, 9).double())),
        "ParametrizedLinear",
    ),
    "spectral_norm": (lambda: with_(mlp(), 0, nn.utils.spectral_norm(nn.Linear(7, 9).double())), "hook"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", MODELS)
def test_models_without_a_direct_route(name: str) -> None:
    build, reason = MODELS[name]
    model = build()
    step = fusedmlp.TrainStep(model, CROSS_ENTROPY, SGD(model.parameters()))
    ((x, y),) = batches(1)
    text = step.explain(x, y)
    assert text.startswith("Ordinary")
    assert reason in text, text


@pytest.mark.parametrize(
    "name", ["dropout", "tied weights", "a layer twice", "other strides", "a frozen parameter", "tanh"]
)
def test_models_without_a_direct_route_train_as_in_the_plain_loop(name: str) -> None:
    twins = Twins(MODELS[name][0](), SGD)
    twins.train(batches(3), "Ordinary")
    twins.assert_same()


OTHER_LOSSES: dict[str, Callable[[], Any]] = {
    "weights": lambda: nn.CrossEntropyLoss(torch.rand(5).double()),
    "label smoothing": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "ignore_index": lambda: nn.CrossEntropyLoss(ignore_index=2),
    "a subclass": lambda: type("Mine", (nn.CrossEntropyLoss,), {})(),
    "a function": lambda: lambda output, y: F.cross_entropy(output, y) * 2,
    "another": lambda: nn.MultiMarginLoss(),
    "sum of squares": lambda: nn.MSELoss(reduction="sum"),
}


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_losses_without_a_direct_route(name: str) -> None:
    twins = Twins(mlp(), SGD, OTHER_LOSSES[name]())
    data = batches(3)
    if name == "sum of squares":
        data = [(x, torch.randn(len(x), 5, dtype=x.dtype)) for x, _ in data]
    twins.train(data, "Ordinary")
    twins.assert_same()


@pytest.mark.parametrize("name", ["weight", "ignore_index", "label_smoothing", "reduction"])
def test_a_loss_without_one_of_its_attributes_raises_as_in_the_loop(name: str) -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    delattr(loss_fn, name)
    step = fusedmlp.TrainStep(model, loss_fn, SGD(model.parameters()))
    ((x, y),) = batches(1)
    with pytest.raises(AttributeError, match=name):
        step(x, y)


def test_weights_that_a_loss_is_given_later() -> None:
    twins = Twins(mlp(), SGD, nn.CrossEntropyLoss())
    twins.train(batches(1), "Direct")
    twins.loss_fn.weight = torch.rand(5).double()
    twins.train(batches(2), "Ordinary")
    twins.assert_same()


OTHER_OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], str]] = {
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=0.01), "RMSprop"),
    "a subclass": (lambda p: type("Mine", (torch.optim.SGD,), {})(p, lr=0.1), "Mine"),
    "maximize": (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize"),
    "amsgrad": (lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad"),
    "differentiable": (lambda p: torch.optim.SGD(p, lr=0.1, differentiable=True), "differentiable"),
    "not all": (lambda p: torch.optim.SGD(list(p)[1:], lr=0.1), "not just the parameters"),
    "other ones": (
        lambda p: torch.optim.SGD([*list(p)[1:], nn.Parameter(torch.ones(2))], lr=0.1),
        "is not in",
    ),
    "more": (lambda p: torch.optim.SGD([*p, nn.Parameter(torch.ones(2))], lr=0.1), "not just the parameters"),
}


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_optimizers_without_a_direct_route(name: str) -> None:
    make, reason = OTHER_OPTIMIZERS[name]
    twins = Twins(mlp(), make)
    if name == "differentiable":  # PyTorch's step raises for leaf parameters
        ((x, y),) = batches(1)
        assert reason in twins.step.explain(x, y)
        return
    twins.train(batches(3), "Ordinary")
    twins.assert_same()
    assert reason in twins.step.explain(*batches(1)[0])


@pytest.mark.parametrize("change", ["maximize", "amsgrad", "differentiable", "capturable"])
def test_flag_that_is_set_later(change: str) -> None:
    twins = Twins(mlp(), ADAM)
    twins.train(batches(2), "Direct")
    twins.optimizer.param_groups[0][change] = True
    assert change in twins.step.explain(*batches(1)[0])


def test_group_that_is_added_later() -> None:
    twins = Twins(mlp(), SGD)
    twins.train(batches(2), "Direct")
    for optimizer in (twins.optimizer, twins.twins):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    twins.train(batches(2), "Ordinary")
    twins.assert_same()


class Moment(torch.Tensor):
    pass


UNUSUAL_STATE: dict[str, Callable[[torch.Tensor], Any]] = {
    "another dtype": lambda tensor: tensor.float(),
    "another shape": lambda tensor: tensor[:1].clone(),  # it would broadcast
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "one value for all": lambda tensor: tensor.new_full((), 0.5).expand_as(tensor),
    "another device": lambda tensor: tensor.to("meta"),
    "a subclass": lambda tensor: tensor.as_subclass(Moment),
    "none": lambda tensor: None,
}
IN_STATE = {"SGD, momentum": ["momentum_buffer"], "Adam": ["exp_avg", "exp_avg_sq"]}


@pytest.mark.parametrize("change", UNUSUAL_STATE)
@pytest.mark.parametrize(
    ("optimizer", "name"), [(optimizer, name) for optimizer in IN_STATE for name in IN_STATE[optimizer]]
)
def test_state_that_is_not_like_its_parameter(optimizer: str, name: str, change: str) -> None:
    """A step accepts or rejects such state as the plain loop does."""
    twins = Twins(mlp(), OPTIMIZERS[optimizer])
    twins.train(batches(2), "Direct")
    for model, of in ((twins.model, twins.optimizer), (twins.twin, twins.twins)):
        state = of.state[model[2].weight]
        state[name] = UNUSUAL_STATE[change](state[name])
    ((x, y),) = batches(1)
    said = twins.step.explain(x, y)
    assert said.startswith("Ordinary"), said
    assert "state" in said
    try:
        expected = twins.plain(x, y)
    except Exception as error:
        with pytest.raises(type(error)):
            twins.step(x, y)
    else:
        assert_close(twins.step(x, y), expected)
        twins.assert_same()


@pytest.mark.parametrize("name", ["0.weight", "2.bias", "4.weight"])
@pytest.mark.parametrize("optimizer", ["SGD", "SGD, momentum", "Adam"])
def test_one_parameter_that_was_made_in_inference_mode(optimizer: str, name: str) -> None:
    """Like the plain loop, a step trains the first layer's weight and raises for other parameters."""
    found = []
    for fused in (True, False):
        torch.manual_seed(4)
        model, ((x, y),) = mlp(), batches(1)
        layer, kind = name.split(".")
        with torch.inference_mode():
            setattr(model[int(layer)], kind, nn.Parameter(getattr(model[int(layer)], kind).detach().clone()))
        made = OPTIMIZERS[optimizer](model.parameters())
        for parameter in model.parameters():  # the state that a first step makes
            names = IN_STATE.get(optimizer, [])
            made.state[parameter].update({key: torch.zeros(parameter.shape).double() for key in names})
            if optimizer == "Adam":
                made.state[parameter]["step"] = torch.tensor(0.0)
        step = fusedmlp.TrainStep(model, CROSS_ENTROPY, made)
        assert "made in inference mode" in step.explain(x, y)
        try:
            loss: Any = step(x, y) if fused else plain(model, CROSS_ENTROPY, made, x, y)
        except RuntimeError as error:
            assert name != "0.weight"
            loss = str(error)
        found.append((loss, dict(model.state_dict())))
    assert found[0][0] == found[1][0]
    assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.int, lambda count: count.reshape(1)])
def test_counts_of_steps_that_are_unusual(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    twins = Twins(mlp(), ADAM)
    twins.train(batches(2), "Direct")
    for of in (twins.optimizer, twins.twins):
        for state in of.state.values():
            state["step"] = change(state["step"])
    said = twins.step.explain(*batches(1)[0])
    assert "count of steps" in said, said
    twins.train(batches(2), "Ordinary")
    twins.assert_same()


def test_counts_of_steps_on_another_device() -> None:
    twins = Twins(mlp(), ADAM)
    twins.train(batches(1))
    twins.optimizer.state[twins.model[2].weight]["step"] = torch.tensor(1.0, device="meta")
    said = twins.step.explain(*batches(1)[0])
    assert said.startswith("Ordinary"), said
    assert "state is not of" in said


Heard = list[str]


@contextlib.contextmanager
def put_back(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name, contextlib)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is contextlib:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


class Listening(TorchDispatchMode):
    def __init__(self, heard: Heard) -> None:
        super().__init__()
        self.heard = heard

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(str(function))
        return function(*args, **(kwargs or {}))


def patched_step(twins: Twins, heard: Heard) -> Any:
    step = twins.optimizer.step

    def mine(closure: Any = None) -> Any:
        heard.append("step")
        return step(closure)

    return put_back(twins.optimizer, "step", mine)


def patched_forward(twins: Twins, heard: Heard) -> Any:
    module = twins.model[2]
    forward = module.forward

    def mine(input: torch.Tensor) -> torch.Tensor:
        heard.append("forward")
        return forward(input)

    return put_back(module, "forward", mine)


def patched(kind: type[nn.Module]) -> Any:
    """The forward of this class is replaced for all its modules."""

    def patch(twins: Twins, heard: Heard) -> Any:
        forward = kind.forward

        def mine(self: nn.Module, *args: Any) -> torch.Tensor:
            heard.append("forward")
            return forward(self, *args)

        return put_back(kind, "forward", mine)

    return patch


def patched_calls(twins: Twins, heard: Heard) -> Any:
    call = nn.Module.__call__

    def mine(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        heard.append("call")
        return call(self, *args, **kwargs)

    return put_back(nn.Module, "__call__", mine)


def saved_tensors(twins: Twins, heard: Heard) -> Any:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        heard.append("saved")
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


@contextlib.contextmanager
def autocast(twins: Twins, heard: Heard) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        heard.append("not a hook")
        yield


@contextlib.contextmanager
def anomaly(twins: Twins, heard: Heard) -> Iterator[None]:
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        heard.append("not a hook")
        yield


def handle(register: Callable[[Twins, Any], Any]) -> Callable[[Twins, Heard], Any]:
    @contextlib.contextmanager
    def listening(twins: Twins, heard: Heard) -> Iterator[None]:
        handle = register(twins, lambda *_: heard.append("called"))
        try:
            yield
        finally:
            handle.remove()

    return listening


LISTENERS: dict[str, Callable[[Twins, Heard], Any]] = {
    "forward hook": handle(lambda twins, hook: twins.model[1].register_forward_hook(hook)),
    "forward hook of the model": handle(lambda twins, hook: twins.model.register_forward_hook(hook)),
    "forward pre-hook": handle(lambda twins, hook: twins.model[0].register_forward_pre_hook(hook)),
    "backward hook": handle(lambda twins, hook: twins.model[2].register_full_backward_hook(hook)),
    "backward pre-hook": handle(lambda twins, hook: twins.model[2].register_full_backward_pre_hook(hook)),
    "hook of the loss": handle(lambda twins, hook: twins.loss_fn.register_forward_hook(hook)),
    "global hook": handle(lambda twins, hook: hooks_of_modules.register_module_forward_hook(hook)),
    "hook of a parameter": handle(lambda twins, hook: twins.model[0].bias.register_hook(hook)),
    "hook after accumulation": handle(
        lambda twins, hook: twins.model[0].weight.register_post_accumulate_grad_hook(hook)
    ),
    "pre-hook of the optimizer": handle(lambda twins, hook: twins.optimizer.register_step_pre_hook(hook)),
    "hook of the optimizer": handle(lambda twins, hook: twins.optimizer.register_step_post_hook(hook)),
    "global hook of optimizers": handle(
        lambda twins, hook: hooks_of_optimizers.register_optimizer_step_post_hook(hook)
    ),
    "global pre-hook of optimizers": handle(
        lambda twins, hook: hooks_of_optimizers.register_optimizer_step_pre_hook(hook)
    ),
    "patched step": patched_step,
    "patched forward": patched_forward,
    "patched Linear": patched(nn.Linear),
    "patched loss": patched(nn.CrossEntropyLoss),
    "patched calls": patched_calls,
    "dispatch mode": lambda twins, heard: Listening(heard),
    "saved tensors": saved_tensors,
    "autocast": autocast,
    "anomaly detection": anomaly,
}


@pytest.mark.parametrize("name", LISTENERS)
def test_hooks_and_modes_see_everything(name: str) -> None:
    loss_fn = nn.CrossEntropyLoss()
    twins = Twins(mlp(), SGD, loss_fn)
    twins.train(batches(1), "Direct")
    heard: Heard = []
    ((x, y),) = batches(1)
    with LISTENERS[name](twins, heard):
        assert twins.step.explain(x, y).startswith("Ordinary")
        loss = twins.step(x, y)
    assert heard
    assert_close(loss, twins.plain(x, y))
    twins.train(batches(2), "Direct")
    twins.assert_same()


def test_hook_that_changes_the_gradient() -> None:
    twins = Twins(mlp(), SGD)
    for model in (twins.model, twins.twin):
        model[0].weight.register_hook(lambda grad: grad * 2)
    twins.train(batches(3), "Ordinary")
    twins.assert_same()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, y: (x.requires_grad_(), y), "requires grad"),
        (lambda x, y: (nn.Parameter(x, requires_grad=False), y), "not a plain"),
        (lambda x, y: (x, F.one_hot(y, 5).double()), "class numbers"),
        (lambda x, y: (x.unsqueeze(1), y), "not a batch of rows"),
        (lambda x, y: (x[0], y[0]), "not a batch of rows"),
        (lambda x, y: (x.to_sparse(), y), "sparse"),
    ],
)
def test_arguments_without_a_direct_route(change: Any, reason: str) -> None:
    twins = Twins(mlp(), SGD)
    x, y = change(*batches(1)[0])
    assert reason in twins.step.explain(x, y)
    if reason != "not a batch of rows" and reason != "sparse":
        twins.train([(x, y)], "Ordinary")
        twins.assert_same()


def test_gradient_of_x() -> None:
    twins = Twins(mlp(), SGD)
    ((x, y),) = batches(1)
    x.requires_grad_()
    twins.step(x, y)
    ours, x.grad = x.grad, None
    twins.plain(x, y)
    assert_close(ours, x.grad)


def test_empty_batch() -> None:
    twins = Twins(mlp(), SGD)
    twins.train([(torch.empty(0, 7, dtype=torch.float64), torch.empty(0, dtype=torch.int64))], "Ordinary")
    twins.assert_same()


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_input_that_is_many_tensors(compute_dtype: torch.dtype | None) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(7, 5).double()

        def forward(self, both: dict[str, torch.Tensor]) -> Any:
            return self.layer(both["a"] + both["b"])

    twins = Twins(Sum(), SGD, compute_dtype=compute_dtype)
    data = [({"a": x, "b": x}, y) for x, y in batches(3)]
    twins.train(data, "Ordinary")
    twins.assert_same()


def test_forced_kernels_rule_out_the_direct_route() -> None:
    twins = Twins(mlp(), SGD)
    with fusedmlp.backend("triton"):
        assert "backend('triton')" in twins.step.explain(*batches(1)[0])
