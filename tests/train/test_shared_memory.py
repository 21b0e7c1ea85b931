"""A step gives the plain loop's results even if parameters, state or data share memory."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training import CROSS_ENTROPY, MSE, OPTIMIZERS, assert_close, mlp, plain

import fusedmlp
from fusedmlp.train import recipe, shared_memory

Case = tuple[nn.Sequential, torch.optim.Optimizer, torch.Tensor, torch.Tensor]
WIDTHS = (6, 6, 6, 6)


def parts(optimizer: str, seed: int = 3) -> Case:
    """A model whose optimizer has its state, and a batch for the mean squared error."""
    torch.manual_seed(seed)
    model = mlp(widths=WIDTHS)
    made = OPTIMIZERS[optimizer](model.parameters())
    x, y = torch.randn(6, 6).double(), torch.randn(6, 6).double()
    plain(model, MSE, made, torch.randn_like(x), y)
    return model, made, x, y


def one_weight_twice(case: Case) -> Case:
    case[0][4].weight.data = case[0][2].weight.data
    return case


def weights_that_overlap(case: Case) -> Case:
    flat = torch.randn(60).double()
    case[0][0].weight.data, case[0][4].weight.data = flat[:36].view(6, 6), flat[24:].view(6, 6)
    return case


def one_bias_twice(case: Case) -> Case:
    case[0][0].bias.data = case[0][2].bias.data
    return case


def a_bias_that_is_a_row_of_a_weight(case: Case) -> Case:
    case[0][2].bias.data = case[0][4].weight.data[3]
    return case


def x_is_a_weight(case: Case) -> Case:
    return *case[:2], case[0][2].weight.data, case[3]


def x_is_columns_beside_a_weight(case: Case) -> Case:
    """Their rows alternate and share no element. The direct route may refuse this as well."""
    flat = torch.randn(72).double()
    case[0][2].bias.data = flat[12:18]
    return *case[:2], flat.view(6, 12)[:, :6], case[3]


def x_is_a_transposed_weight(case: Case) -> Case:
    return *case[:2], case[0][0].weight.data.t(), case[3]


def y_is_a_weight(case: Case) -> Case:
    return *case[:3], case[0][4].weight.data


def state_of(case: Case, layer: int) -> dict[str, Any]:
    return case[1].state[case[0][layer].weight]


def names_of(state: dict[str, Any]) -> list[str]:
    return [name for name, value in state.items() if value is not None and value.dim() == 2]


def one_state_twice(case: Case) -> Case:
    for name in names_of(state_of(case, 2)):
        state_of(case, 2)[name] = state_of(case, 4)[name]
    return case


def state_is_a_weight(case: Case) -> Case:
    for name in names_of(state_of(case, 2)):
        case[0][0].weight.data = state_of(case, 2)[name]
    return case


def x_is_state(case: Case) -> Case:
    state = state_of(case, 2)
    return *case[:2], state[names_of(state)[0]] if names_of(state) else case[0][0].weight.data, case[3]


def one_count_twice(case: Case) -> Case:
    if "step" in state_of(case, 2):
        state_of(case, 2)["step"] = state_of(case, 4)["step"]
        return case
    return one_bias_twice(case)


def a_learning_rate_that_is_learned(case: Case) -> Case:
    case[1].param_groups[0]["lr"] = case[0][2].bias.data[1]
    return case


KINDS: list[Callable[[Case], Case]] = [
    one_weight_twice, weights_that_overlap, one_bias_twice, a_bias_that_is_a_row_of_a_weight, x_is_a_weight,
    x_is_columns_beside_a_weight, x_is_a_transposed_weight, y_is_a_weight, one_state_twice, state_is_a_weight,
    x_is_state, one_count_twice, a_learning_rate_that_is_learned,
]  # fmt: skip


@pytest.mark.parametrize("optimizer", ["SGD", "SGD, weight decay", "SGD, Nesterov", "Adam", "AdamW"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_step_matches_the_plain_loop(kind: Callable[[Case], Case], optimizer: str) -> None:
    model, made, x, y = kind(parts(optimizer))
    twin, its, twins_x, twins_y = kind(parts(optimizer))
    step = fusedmlp.TrainStep(model, MSE, made)
    said = step.explain(x, y)
    for _ in range(3):
        assert_close(step(x, y), plain(twin, MSE, its, twins_x, twins_y))
        assert_close(model.state_dict(), twin.state_dict())
    assert_close(x, twins_x)
    # y is read before anything is written, and so is x unless the optimizer is SGD.
    of_state = kind in (one_state_twice, state_is_a_weight) and not names_of(made.state[model[2].weight])
    if kind is y_is_a_weight or (kind.__name__.startswith("x") and "SGD" not in optimizer) or of_state:
        assert said.startswith("Direct"), said
    else:
        assert "memory" in said, said


def grads_in_one_place(model: nn.Module) -> None:
    parameters = list(model.parameters())
    for first, second in itertools.pairwise(parameters[::2]):
        second.grad.data = first.grad.data  # type: ignore[union-attr]


def grads_in_the_parameters(model: nn.Module) -> None:
    for parameter in list(model.parameters())[2:4]:
        parameter.data = parameter.grad.data  # type: ignore[union-attr]


def a_transposed_grad(model: nn.Module) -> None:
    weight = next(model.parameters())
    weight.grad = weight.grad.t().contiguous().t()  # type: ignore[union-attr]


def a_sparse_grad(model: nn.Module) -> None:
    weight = next(model.parameters())
    weight.grad = weight.grad.to_sparse()  # type: ignore[union-attr]


GRADS: dict[str, tuple[Callable[[Any], None], str]] = {
    "in one place": (grads_in_one_place, "shares memory"),
    "in the parameters": (grads_in_the_parameters, "shares memory"),
    "transposed": (a_transposed_grad, "is not contiguous"),
    "sparse": (a_sparse_grad, "is not contiguous"),
    "x is one": (lambda model: None, "shares memory"),
    "y is one": (lambda model: None, "Direct"),
}


@pytest.mark.parametrize("name", GRADS)
def test_accumulated_gradients(name: str) -> None:
    """Accumulated gradients may share memory or have an unusual layout."""
    change, said = GRADS[name]
    losses, states = [], []
    for fused in (True, False):
        model, made, x, y = parts("SGD, Nesterov")
        step = fusedmlp.TrainStep(model, MSE, made, accumulate=2)
        made.zero_grad()
        (step(x, y) if fused else (MSE(model(x), y) / 2).backward())
        change(model)
        if name == "x is one":
            x = model[0].weight.grad.data
        if name == "y is one":
            y = model[0].weight.grad.data
        if fused:
            assert said in step.explain(x, y)
            losses.append(step(x, y))
        else:
            loss = MSE(model(x), y)
            (loss / 2).backward()
            made.step()
            losses.append(loss.detach())
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    assert_close(*losses)
    assert_close(*states)


def test_the_smallest_case() -> None:
    model = mlp(bias=False, widths=(1, 1, 1, 1))
    for parameter in model.parameters():
        parameter.data.fill_(1)
    model[4].weight.data = model[2].weight.data
    step = fusedmlp.TrainStep(model, MSE, torch.optim.SGD(model.parameters(), lr=0.1))
    step(torch.ones(1, 1).double(), torch.zeros(1, 1).double())
    # The output is 1 and its gradient is 2, so each weight's gradient is 2. The shared weight steps twice.
    assert_close(model[0].weight.item(), 0.8)
    assert_close(model[2].weight.item(), 0.6)


@pytest.mark.parametrize("optimizer", ["SGD", "SGD, Nesterov", "Adam"])
def test_views_of_one_buffer_that_do_not_overlap_stay_fast(optimizer: str) -> None:
    model, made, x, y = parts(optimizer)
    tensors = [p.data for p in model.parameters()]
    state = [(s, n) for s in made.state.values() for n, t in s.items() if t is not None]
    flat = torch.cat([t.flatten() for t in (x, *tensors, y, *(s[n].double() for s, n in state))])
    views = iter(flat.split([t.numel() for t in (x, *tensors, y, *(s[n] for s, n in state))]))
    x = next(views).view_as(x)
    for parameter in model.parameters():
        parameter.data = next(views).view_as(parameter)
    y = next(views).view_as(y)
    for s, name in state:
        view = next(views).view_as(s[name])
        if name != "step":  # it is float32
            s[name] = view
    step = fusedmlp.TrainStep(model, MSE, made)
    twin, its, twins_x, twins_y = parts(optimizer)
    for _ in range(3):
        assert step.explain(x, y).startswith("Direct")
        assert_close(step(x, y), plain(twin, MSE, its, twins_x, twins_y))
    assert_close(model.state_dict(), twin.state_dict())


def test_layers_without_inputs_or_outputs_share_nothing() -> None:
    """Empty tensors may all begin at one address."""
    model = nn.Sequential(nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 0), nn.ReLU(), nn.Linear(0, 3))
    found = recipe.recipe_of(model, CROSS_ENTROPY, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not isinstance(found, str), found


@pytest.mark.kernels
@pytest.mark.parametrize("kind", [one_weight_twice, x_is_a_weight, y_is_a_weight, one_state_twice])
def test_not_in_two_launches(kind: Callable[[Case], Case], device: torch.device) -> None:
    """Shared memory is refused, because some programs would read what others write at the same time."""
    torch.manual_seed(3)
    model = mlp(widths=(16, 16, 16, 16), dtype=torch.float32).to(device)
    made = OPTIMIZERS["Adam"](model.parameters())
    x, y = torch.randn(16, 16, device=device), torch.randn(16, 16, device=device)
    plain(model, MSE, made, x, y)
    step = fusedmlp.TrainStep(model, MSE, made)
    with fusedmlp.backend("triton"):
        assert step.explain(x, y).startswith("Two launches")
        _, _, x, y = kind((model, made, x, y))
        assert "memory" in step.explain(x, y)
        assert "memory" in step._route(x, y, rows=4)[2]["in two launches"]


def numbers(tensor: torch.Tensor) -> set[int]:
    """The addresses of the tensor's elements."""
    places = itertools.product(*map(range, tensor.shape))
    strides = tensor.stride()
    return {
        tensor.data_ptr() + 8 * sum(i * s for i, s in zip(place, strides, strict=True)) for place in places
    }


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_tensors_that_share_an_element_are_found(data: st.DataObject) -> None:
    """This holds for any views of one buffer. Contiguous views that share no element are not refused."""
    flat = torch.zeros(25, dtype=torch.float64)  # the widest view ends 24 elements after its first

    def piece() -> torch.Tensor:
        start = data.draw(st.integers(0, 25))
        return flat[start : data.draw(st.integers(start, 25))]

    def view() -> torch.Tensor:
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        strides = [data.draw(st.integers(0, 4)) for _ in shape]
        reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n > 0)
        return flat.as_strided(shape, strides, data.draw(st.integers(0, 24 - reach)))

    pieces = [piece() for _ in range(data.draw(st.integers(1, 4)))]
    apart = all(numbers(one).isdisjoint(numbers(two)) for one, two in itertools.combinations(pieces, 2))
    spans = shared_memory.memory_of(pieces)
    assert (spans is not None) == apart
    if spans is not None:
        x = view()
        shared = any(not numbers(x).isdisjoint(numbers(one)) for one in pieces)
        assert spans.touch(x) >= shared
        if x.is_contiguous():
            assert spans.touch(x) == shared
