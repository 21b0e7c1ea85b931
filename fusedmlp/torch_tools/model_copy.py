"""A copy of a model with other tensors in it, and one that computes in float64."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_UP = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
# Operators whose result is random and nothing else: it can be had again by writing it down.
_DRAWS = {
    *("bernoulli", "bernoulli_", "binomial", "cauchy_", "exponential_", "geometric_", "log_normal_"),
    *("multinomial", "normal", "normal_", "poisson", "rand", "rand_like", "randint", "randint_like"),
    *("randn", "randn_like", "random_", "randperm", "uniform_"),
}


def twin(
    module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.nn.Module, dict[int, Any]]:
    """A deep copy with ``change(tensor.data)`` for each tensor in it, and the copies by the originals' id."""
    memo: dict[int, Any] = {}
    tensors: list[Any] = [*module.parameters(), *module.buffers()]
    for one in module.modules():
        if isinstance(one, torch.jit.ScriptModule):
            memo[id(one)] = one  # a step, whatever is in it, and a copy would copy its memory
        else:
            tensors += tree_leaves(list(one.__dict__.values()))
    for tensor in tensors:
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and id(tensor) not in memo:
            data = change(tensor.data)
            if type(tensor) is torch.nn.Parameter:
                data = torch.nn.Parameter(data, tensor.requires_grad)
            else:
                data.requires_grad_(tensor.requires_grad)
            data.__dict__.update(tensor.__dict__)
            memo[id(tensor)] = data
    return copy.deepcopy(module, memo), memo


def up(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, or complex128, if it was less; the same numbers."""
    return tensor.to(_UP[tensor.dtype]) if tensor.dtype in _UP else tensor


class _Mode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to say so to torch._dynamo would import it, for seconds


class Draws(_Mode):
    """Writes down the random numbers that operators draw: with one seed, another dtype may draw others."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[torch.Tensor] = []
        self.unknown: set[str] = set()  # operators that draw, and whose result depends on other things too

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        before = random_states(args)
        result = func(*args, **(kwargs or {}))
        if name in _DRAWS:
            self.drawn.append(result.detach().clone())
        elif name == "native_dropout":
            self.drawn.append(result[1].clone())
        elif not all(map(torch.equal, before, random_states(args))):
            self.unknown.add(name)
        return result


def random_states(tensors: Any) -> list[torch.Tensor]:
    """The state of the random numbers on the CPU, and on the CUDA devices of these tensors."""
    devices = {t.device for t in tree_leaves(tensors) if isinstance(t, torch.Tensor) and t.is_cuda}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in sorted(devices, key=str))]


class InFloat64(_Mode):
    """Every operator computes in float64, on inputs of less too, whatever dtype it was asked for; the random
    numbers are those that Draws wrote down."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.drawn = iter(draws.drawn)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = _wider(kwargs or {})
        name = func.overloadpacket.__name__
        if name in _DRAWS:
            return self._replayed(args[0] if func._schema.is_mutable else None)
        if name == "native_dropout":
            x, p, _ = args
            mask = self._replayed(None)
            return up(x) * mask * (1 / (1 - p) if p < 1 else 0), mask
        if func._schema.is_mutable:  # of its arguments one is to be written to, and a copy would not do
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, up, (args, kwargs))
        return tree_map_only(torch.Tensor, up, func(*args, **kwargs))

    def _replayed(self, target: torch.Tensor | None) -> torch.Tensor:
        drawn = next(self.drawn, None)
        if drawn is None or (target is not None and target.shape != drawn.shape):
            raise RuntimeError("in float64 the model draws other random numbers")
        return up(drawn.clone()) if target is None else target.copy_(drawn)


def _wider(keywords: Mapping[str, Any]) -> dict[str, Any]:
    dtype = keywords.get("dtype")
    return {**keywords, "dtype": _UP[dtype]} if dtype in _UP else dict(keywords)
