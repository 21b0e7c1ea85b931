"""Which Linear of a module's own forward is followed by ReLU: torch.fx runs it, and it is only read."""

import contextlib
import inspect
import io
import logging
import random
import sys
import textwrap
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.fx.proxy import Proxy, TraceError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fusedmlp.convert.pending_relu import observed, which_relu
from fusedmlp.torch_tools.model_copy import twin

# A branch on a value that is unknown is taken both ways, up to so many ways through one forward, ...
_MOST_PATHS = 8
# ... and so many branches on the way; the others are taken as if it were False, ...
_MOST_BRANCHES = 64
# ... and a loop that goes on for as long as it is False ends after so many rounds.
_MOST_ROUNDS = 1000


class Call(NamedTuple):
    """One call of a Linear: the kind of ReLU that takes its output, or why none does."""

    linear: torch.nn.Module
    kind: str | None
    reason: str


def calls_in_forward(
    module: torch.nn.Module, linears: Iterable[torch.nn.Module]
) -> tuple[list[Call], str | None]:
    """All calls of these Linears that this module's own forward makes, and why it cannot be traced, if so.

    The output must have one user, ReLU out of place. Every other module is one step, whatever is in it.
    Parameters with a default keep it, ``*args`` and ``**kwargs`` are empty. A way through the forward that
    raises counts up to there, as long as another one reaches the end. It is a copy that runs, and the module
    stays as it is. What a forward does elsewhere stays done: a cache of its Python module, for one, or what
    is written through a NumPy view of a tensor.
    """
    wanted = set(linears)
    calls, error = _calls_on_all_paths(module, wanted, False)
    if error is not None:
        # Real parameters let code ask for their shapes and types; stand-ins go where unknown sizes go.
        calls, still = _calls_on_all_paths(module, wanted, True)
        error = error if still is not None else None
    return calls, error


def _calls_on_all_paths(
    module: torch.nn.Module, linears: set[torch.nn.Module], stand_ins: bool
) -> tuple[list[Call], str | None]:
    forks: list[bool] = []
    seen: list[Call] = []
    reached: set[torch.nn.Module] | None = None  # by a path that comes to its end
    error = None
    for _ in range(_MOST_PATHS):
        try:
            twin = _Twin(module)  # a new one each time, as one way may leave values for the next
        except Exception as problem:
            return [], f"it cannot be copied: {_in_words(problem)}"
        tracer = _Tracer(linears, forks, stand_ins, twin.originals)
        with _OnCopies(twin.shared), tracer.functions_as_steps():
            try:
                tracer.trace(twin.module)
            except (Exception, SystemExit) as problem:
                error, complete = error or _in_words(problem), False
            else:
                complete = True
            calls = tracer.calls(complete)
        seen += calls
        if complete:
            reached = (reached or set()).union(call.linear for call in calls)
        forks = tracer.forks
        while forks and forks[-1]:
            forks.pop()
        if not forks:
            break
        forks[-1] = True
    if reached is None:
        return [], error
    return [call for call in seen if call.linear in reached], None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Run others' code without a word on the terminal, and without drawing its random numbers."""
    numpy = sys.modules.get("numpy")
    state = random.getstate(), numpy and numpy.random.get_state()
    disabled = logging.root.manager.disable
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with (
        torch.random.fork_rng(devices),
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
            random.setstate(state[0])
            if numpy:
                numpy.random.set_state(state[1])


class _Tracer(torch.fx.Tracer):
    """Writes down one way through a forward; ``forks`` are the decisions to take, then those taken."""

    def __init__(
        self,
        linears: set[torch.nn.Module],
        forks: list[bool],
        stand_ins: bool,
        originals: dict[torch.nn.Module, torch.nn.Module],
    ) -> None:
        super().__init__()
        self.linears, self.stand_ins, self.originals = linears, stand_ins, originals
        self.modules: dict[torch.fx.Node, torch.nn.Module] = {}
        self.outputs: list[tuple[torch.fx.Node, weakref.ref[Proxy]]] = []
        self.planned = forks
        self.forks: list[bool] = []
        self.rounds = 0

    def calls(self, complete: bool) -> list[Call]:
        found = []
        for node, proxy in self.outputs:
            if node.users or complete:
                kind, reason = self._taken_by(node)
                if kind and complete and proxy() is not None:
                    kind, reason = None, "its output is kept for later"
                found.append(Call(self.modules[node], kind, reason))
        return found

    def _taken_by(self, node: torch.fx.Node) -> tuple[str | None, str]:
        if len(node.users) != 1:
            return None, f"its output is used {len(node.users)} times"
        (user,) = node.users
        if user.op == "output":
            return None, "its output is returned"
        if user.op == "call_module":
            module = self.modules[user]
            if type(module) is not torch.nn.ReLU:
                return None, f"its output goes to {type(module).__name__}"
            if module.inplace:
                return None, "ReLU works in place"
            reason = observed(module)
            return (None, f"of its ReLU, {reason}") if reason else ("relu", "")
        function = getattr(torch.Tensor, user.target, None) if user.op == "call_method" else user.target  # type: ignore[arg-type]
        name = getattr(user.target, "__name__", str(user.target))
        if name == "relu_" or (name == "relu" and True in (*user.args[1:2], user.kwargs.get("inplace"))):
            return None, "ReLU works in place"
        if not user.args or user.args[0] is not node:
            return None, f"its output goes to {name}"
        kind = which_relu(function, user.args[1:], user.kwargs)
        return kind, "" if kind else f"its output goes to {name}"

    # --- what torch.fx asks ---

    def create_args_for_root(self, root_fn: Callable[..., Any], *_: Any) -> tuple[Any, list[Any]]:
        positional, keywords = [], {}
        for name, parameter in list(inspect.signature(root_fn).parameters.items())[1:]:
            if parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ):
                proxy = self.create_proxy("placeholder", name, (), {})
                if parameter.kind is parameter.KEYWORD_ONLY:
                    keywords[name] = proxy
                else:
                    positional.append(proxy)

        def forward(*arguments: Any) -> Any:
            return root_fn(*arguments, **keywords)

        return forward, [self.root, *positional]

    def call_module(
        self, m: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        proxy = self.create_proxy("call_module", type(m).__name__, args, kwargs)
        original = self.modules[proxy.node] = self.originals.get(m, m)
        if original in self.linears:
            self.outputs.append((proxy.node, weakref.ref(proxy)))
        return proxy

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.stand_ins and isinstance(attr_val, torch.Tensor):
            return self.create_proxy("get_attr", attr, (), {})
        return attr_val

    def create_arg(self, a: Any) -> Any:
        # torch.fx would look for its name, and else put it into the module; here nobody will run the graph.
        return "a tensor" if isinstance(a, torch.Tensor) else super().create_arg(a)

    def to_bool(self, obj: Proxy) -> bool:
        if len(self.forks) == _MOST_BRANCHES:
            self.rounds += 1
            if self.rounds > _MOST_ROUNDS:
                raise TraceError(f"more than {_MOST_BRANCHES + _MOST_ROUNDS} branches")
            return False
        self.forks.append(self.planned[len(self.forks)] if len(self.forks) < len(self.planned) else False)
        return self.forks[-1]

    @contextlib.contextmanager
    def functions_as_steps(self) -> Iterator[None]:
        """Do not look into an autograd.Function: what its forward does says nothing of its backward."""
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
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    text = textwrap.shorten(lines[0].split(". ")[0].rstrip("."), 120, placeholder=" ...") if lines else ""
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


class _Twin:
    """A copy of a module, to run: its tensors are new objects, with a version and flags of their own, over
    the module's memory, for _OnCopies to protect."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.shared: set[int] = set()

        def same_memory(data: torch.Tensor) -> torch.Tensor:
            self.shared.add(_memory(data))
            return data

        self.module, memo = twin(module, same_memory)
        # For what is asked of a module: a copy may leave out that it is compiled, for one.
        self.originals = {memo.get(id(one), one): one for one in module.modules()}


class _OnCopies(TorchDispatchMode):
    """Operators that write, write into copies of what lies in this memory."""

    def __init__(self, memory: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            args, kwargs = tree_map_only(torch.Tensor, self._or_copy, (args, kwargs))
        return func(*args, **kwargs)

    def _or_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if _memory(tensor) in self.memory else tensor


def _memory(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, for one
        return id(tensor)
