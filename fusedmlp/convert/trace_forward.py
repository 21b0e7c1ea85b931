"""Find the Linears that ReLU follows in a module's own ``forward``: torch.fx traces a copy of the module."""

import contextlib
import inspect
import io
import logging
import textwrap
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.fx.proxy import Proxy, TraceError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fusedmlp.convert.pending_relu import is_relu, more_than_forward
from fusedmlp.torch_tools.model_state import copy_with, random_state_kept

_MOST_PATHS = 8  # through one forward: a branch on an unknown value is taken both ways
_MOST_BRANCHES = 400  # on one path: a loop may run for as long as the unknown value is False


class Call(NamedTuple):
    """One call of a Linear, and why its output does not go to ReLU alone. The reason is empty if it does."""

    linear: torch.nn.Module
    reason: str


def calls_in_forward(
    module: torch.nn.Module, linears: Iterable[torch.nn.Module]
) -> tuple[list[Call], str | None]:
    """All calls of these Linears in the module's own forward, and why it cannot be traced, or None.

    The forwards of other modules that it calls are not traced. Arguments with a default keep it, ``*args``
    and ``**kwargs`` are empty. If a path raises, its calls before the error count, provided that another path
    reaches the end.
    """
    if "forward" in module.__dict__:
        return [], "is patched"
    wanted = set(linears)
    # With real parameters, a forward can read their shapes and dtypes.
    calls, error = _calls_on_all_paths(module, wanted, proxy_parameters=False)
    if error is None:
        return calls, None
    # With proxies for the parameters, it can combine them with sizes that depend on the input.
    calls, second_error = _calls_on_all_paths(module, wanted, proxy_parameters=True)
    return calls, f"cannot be traced: {error}" if second_error else None


def _calls_on_all_paths(
    module: torch.nn.Module, linears: set[torch.nn.Module], proxy_parameters: bool
) -> tuple[list[Call], str | None]:
    branches: list[bool] = []
    seen: list[Call] = []
    reached: set[torch.nn.Module] | None = None  # Linears on the paths that reach the end
    error = None
    memory: set[int] = set()

    def same_memory(data: torch.Tensor) -> torch.Tensor:
        memory.add(_memory_of(data))
        return data

    for _ in range(_MOST_PATHS):
        memory.clear()
        try:  # a new copy for each path, which may leave values in it
            copied, memo = copy_with(module, same_memory)
        except Exception as problem:
            return [], f"it cannot be copied: {_in_words(problem)}"
        # The memo tells which is which. Their positions do not, as a copy may differ from its original.
        originals = {memo.get(id(one), one): one for one in module.modules()}
        tracer = _Tracer(linears, branches, proxy_parameters, originals)
        with _CopyOnWrite(memory), tracer.functions_as_steps():
            complete = False
            try:
                tracer.trace(copied)
                complete = True
            except (Exception, SystemExit) as problem:
                error = error or _in_words(problem)
            calls = tracer.calls(complete)
        seen += calls
        if complete:
            reached = (reached or set()).union(call.linear for call in calls)
        # The next path takes the last branch that was False the other way.
        branches = tracer.branches
        while branches and branches[-1]:
            branches.pop()
        if not branches:
            break
        branches[-1] = True
    if reached is None:
        return [], error
    return [call for call in seen if call.linear in reached], None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Run a model's code without its prints, warnings and logs, and keep the global random states."""
    disabled = logging.root.manager.disable
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with (
        random_state_kept(devices),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


class _Tracer(torch.fx.Tracer):
    """Traces one path through a forward. The first branches follow ``planned``; ``branches`` records all."""

    def __init__(
        self,
        linears: set[torch.nn.Module],
        planned: list[bool],
        proxy_parameters: bool,
        originals: dict[torch.nn.Module, torch.nn.Module],
    ) -> None:
        super().__init__()
        self.linears, self.proxy_parameters, self.originals = linears, proxy_parameters, originals
        self.planned, self.branches = planned, list[bool]()
        self.modules: dict[torch.fx.Node, torch.nn.Module] = {}
        self.outputs: list[tuple[torch.fx.Node, weakref.ref[Proxy]]] = []

    def calls(self, complete: bool) -> list[Call]:
        found = []
        for node, proxy in self.outputs:
            if node.users or complete:
                reason = self._why_not_relu(node)
                if not reason and complete and proxy() is not None:
                    reason = "its output is kept for later"
                found.append(Call(self.modules[node], reason))
        return found

    def _why_not_relu(self, node: torch.fx.Node) -> str:
        if more := more_than_forward(self.modules[node]):
            return f"it {more}"
        if len(node.users) != 1:
            return f"its output is used {len(node.users)} times"
        (user,) = node.users
        if user.op == "output":
            return "its output is returned"
        if user.op == "call_module":
            module = self.modules[user]
            if type(module) is not torch.nn.ReLU:
                return f"its output goes to {type(module).__name__}"
            if module.inplace:
                return "ReLU works in place"
            more = more_than_forward(module)
            return f"its ReLU {more}" if more else ""
        function = getattr(torch.Tensor, user.target, None) if user.op == "call_method" else user.target  # type: ignore[arg-type]
        name = getattr(user.target, "__name__", str(user.target))
        if name == "relu_" or (name == "relu" and True in (*user.args[1:2], user.kwargs.get("inplace"))):
            return "ReLU works in place"
        if user.args and user.args[0] is node and is_relu(function, user.args[1:], user.kwargs):
            return ""
        return f"its output goes to {name}"

    # --- methods that torch.fx calls ---

    def create_args_for_root(self, root_fn: Callable[..., Any], *_: Any) -> tuple[Any, list[Any]]:
        positional, keywords = [self.root], {}
        for name, parameter in list(inspect.signature(root_fn).parameters.items())[1:]:
            various = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if parameter.default is parameter.empty and not various:
                proxy: Any = self.create_proxy("placeholder", name, (), {})
                if parameter.kind is parameter.KEYWORD_ONLY:
                    keywords[name] = proxy
                else:
                    positional.append(proxy)
        return lambda *arguments: root_fn(*arguments, **keywords), positional

    def call_module(
        self, m: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        proxy = self.create_proxy("call_module", type(m).__name__, args, kwargs)
        original = self.modules[proxy.node] = self.originals.get(m, m)
        if original in self.linears:
            self.outputs.append((proxy.node, weakref.ref(proxy)))
        return proxy

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.proxy_parameters and isinstance(attr_val, torch.Tensor):
            return self.create_proxy("get_attr", attr, (), {})
        return attr_val

    def create_arg(self, a: Any) -> Any:
        # torch.fx would look up the tensor's name or store it in the module. This graph is never run.
        return "a tensor" if isinstance(a, torch.Tensor) else super().create_arg(a)

    def to_bool(self, obj: Proxy) -> bool:
        at = len(self.branches)
        if at == _MOST_BRANCHES:
            raise TraceError(f"more than {_MOST_BRANCHES} branches")
        self.branches.append(at < len(self.planned) and self.planned[at])
        return self.branches[-1]

    @contextlib.contextmanager
    def functions_as_steps(self) -> Iterator[None]:
        """Do not trace into an autograd.Function: a ReLU in its forward may have any backward."""
        original = torch.autograd.Function.__dict__["apply"]

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, Proxy) for leaf in tree_leaves((args, kwargs))):
                return self.create_proxy("call_function", cls, args, kwargs)
            return original.__get__(None, cls)(*args, **kwargs)

        torch.autograd.Function.apply = classmethod(apply)
        try:
            yield
        finally:
            torch.autograd.Function.apply = original


def _in_words(problem: BaseException) -> str:
    """The type of an error, and the first sentence of its message."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    text = textwrap.shorten(lines[0].split(". ")[0].rstrip("."), 120, placeholder=" ...") if lines else ""
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


class _CopyOnWrite(TorchDispatchMode):
    """Operators that would write to this memory, which is the model's, write to a copy of it instead."""

    def __init__(self, memory: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            args, kwargs = tree_map_only(torch.Tensor, self._or_copy, (args, kwargs))
        return func(*args, **kwargs)

    def _or_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if _memory_of(tensor) in self.memory else tensor


def _memory_of(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have no storage, for example
        return id(tensor)
