"""Two processes, and activation checkpointing: the gradients are those of one process on the whole batch.

Weights and inputs are small whole numbers, so that every sum is exact in any order and split. All results
have the bits of torch.nn's, also on the kernels.
"""

import contextlib
import copy
import datetime
import functools
import multiprocessing
import multiprocessing.connection
import pathlib
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import compatibility
import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fusedmlp
from fusedmlp import nn

RANKS = 2
PATIENCE = 120  # seconds until a check that hangs fails and both processes are killed

# --- Two processes, started once and kept ---


def serve(rank: int, jobs: Any, meeting_point: str) -> None:
    """The main function of each process: run the checks that are sent to it."""
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=RANKS, timeout=patience)
    while True:
        check, kernels, arguments = jobs.recv()
        route = compatibility.Route(kernels)
        problem = None
        try:
            torch.manual_seed(0)
            with compatibility.taken(route):
                check(*arguments)
        except Exception:
            problem = f"in rank {rank}: {traceback.format_exc()}"
        jobs.send((problem, route.reasons))


class Pair:
    """Two processes that run one check after the other, because starting them takes seconds."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.started = 0
        self.processes: list[Any] = []
        self.jobs: list[Any] = []

    def run(self, route: compatibility.Route, check: Callable[..., None], *arguments: Any) -> None:
        if not self.processes:
            self._start()
        for jobs in self.jobs:
            jobs.send((check, route.kernels, arguments))
        waiting, problems = list(self.jobs), []
        end = time.monotonic() + PATIENCE
        while waiting and (ready := multiprocessing.connection.wait(waiting, end - time.monotonic())):
            for jobs in ready:
                waiting.remove(jobs)
                try:
                    problem, reasons = jobs.recv()
                except (EOFError, OSError):
                    problem, reasons = f"rank {self.jobs.index(jobs)} died", []
                route.reasons += reasons
                if problem is not None:
                    problems.append(problem)
                    end = min(end, time.monotonic() + 5)  # the other may wait for this one forever
        if waiting or problems:
            self.stop()
            raise AssertionError("\n".join(problems) or f"no answer in {PATIENCE} seconds")

    def _start(self) -> None:
        self.started += 1
        meeting_point = f"file://{self.folder}/meeting_point_{self.started}"
        context = multiprocessing.get_context("spawn")
        for rank in range(RANKS):
            ours, its = context.Pipe()
            process = context.Process(target=serve, args=(rank, its, meeting_point), daemon=True)
            process.start()
            its.close()  # so that the end of the process is the end of the pipe
            self.processes.append(process)
            self.jobs.append(ours)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes, self.jobs = [], []


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.stop()


@pytest.fixture
def in_both(pair: Pair, route: compatibility.Route) -> Callable[..., None]:
    """Run a check of this module in both processes, on this test's route."""
    if route.kernels and torch.cuda.is_available():
        # gloo works on CPUs, where kernels run in Triton's interpreter only.
        pytest.skip("two processes on the CPU would need Triton's interpreter, and here is a GPU")
    return functools.partial(pair.run, route)


def all_fused(route: compatibility.Route) -> bool:
    return bool(route.reasons) and (not route.kernels or set(route.reasons) == {None})


# --- Models, and what a single process computes ---


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc2(F.relu(self.fc1(x)))


def layers(*last: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4), *last)


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {  # torch.nn's and ours
    "MLP": (layers, lambda: nn.MLP(6, [8], 4)),
    "LinearReLU": (
        lambda: layers(torch.nn.ReLU()),
        lambda: nn.Sequential(nn.LinearReLU(6, 8), nn.Dropout(0), nn.LinearReLU(8, 4)),
    ),
    "fuse": (Plain, lambda: fusedmlp.fuse(Plain())),
}


def models(which: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch.nn's model and ours, with the same weights."""
    theirs, ours = (make() for make in MODELS[which])
    with torch.no_grad():
        for its, our in zip(theirs.parameters(), ours.parameters(), strict=True):
            our.copy_(its.copy_(torch.randint(-1, 2, its.shape)))
    return theirs, ours


def batch(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """An input, and a gradient of the output."""
    return torch.randint(-2, 3, (rows, 6)).float(), torch.randint(-1, 2, (rows, 4)).float()


def mine(rows: torch.Tensor) -> torch.Tensor:
    """This process's rows."""
    return rows[dist.get_rank() :: RANKS]


def whole(tensor: Any) -> Any:
    """The whole tensor, also of a parameter that is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: torch.nn.Module) -> list[Any]:
    return [whole(p.grad) for p in model.parameters()]


def alone(model: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """Output and gradients in a single process."""
    model.zero_grad()
    y = model(x)
    y.backward(grad)
    assert len(y.unique()) > 4  # not all the same: a wrong result would show
    return y.detach(), gradients(model)


same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def train_alike(
    wrapped: Any, ours: torch.nn.Module, theirs: torch.nn.Module, rounds: int = 1, dtype: Any = torch.float32
) -> None:
    """Compare two processes, each on its rows, with one. Gradients are averaged, so each doubles its own."""
    for _ in range(rounds):
        x, grad = batch()
        wanted, wanted_gradients = alone(theirs, x, grad)
        for p in ours.parameters():
            p.grad = None
        y = wrapped(mine(x))
        assert y.dtype is dtype
        y.backward(RANKS * mine(grad).to(dtype))
        same(y.float(), mine(wanted))
        same(gradients(ours), wanted_gradients)


# --- DistributedDataParallel ---


def check_ddp(which: str, options: dict[str, Any]) -> None:
    theirs, ours = models(which)
    wrapped = torch.nn.parallel.DistributedDataParallel(ours, **options)
    train_alike(wrapped, ours, theirs, rounds=2)  # static_graph and buckets are set up in the first


@pytest.mark.capability("Distributed", "DDP: also `gradient_as_bucket_view`, `static_graph`")
@pytest.mark.parametrize(
    ("which", "options"),
    [
        *((which, {}) for which in MODELS),
        ("MLP", {"gradient_as_bucket_view": True}),
        ("MLP", {"static_graph": True}),
        ("fuse", {"gradient_as_bucket_view": True, "static_graph": True}),
    ],
    ids=str,
)
def test_ddp(
    which: str, options: dict[str, Any], in_both: Callable[..., None], route: compatibility.Route
) -> None:
    in_both(check_ddp, which, options)
    assert all_fused(route)


class Branches(torch.nn.Module):
    def __init__(self, left: torch.nn.Module, right: torch.nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: torch.Tensor, left: bool) -> torch.Tensor:
        return (self.left if left else self.right)(x)


def check_ddp_unused() -> None:
    theirs, ours = (Branches(*both) for both in zip(models("MLP"), models("fuse"), strict=True))
    wrapped = torch.nn.parallel.DistributedDataParallel(ours, find_unused_parameters=True)
    for left in (True, False):
        for model in (theirs, ours):
            model.zero_grad()
        x, grad = batch()
        theirs(x, left).backward(grad)
        wrapped(mine(x), left).backward(RANKS * mine(grad))
        assert [g is None for g in gradients(ours)] == [
            left is half for half in (False, True) for _ in range(4)
        ]
        same(gradients(ours), gradients(theirs))


@pytest.mark.capability("Distributed", "DDP: `find_unused_parameters`")
def test_ddp_finds_unused_parameters(in_both: Callable[..., None], route: compatibility.Route) -> None:
    in_both(check_ddp_unused)
    assert all_fused(route)


def check_ddp_no_sync(which: str) -> None:
    theirs, ours = models(which)
    wrapped = torch.nn.parallel.DistributedDataParallel(ours)
    for last in (False, True):
        x, grad = batch()
        theirs(x).backward(grad)
        with contextlib.nullcontext() if last else wrapped.no_sync():
            wrapped(mine(x)).backward(RANKS * mine(grad))
        assert last is all(map(torch.equal, gradients(ours), gradients(theirs)))


@pytest.mark.capability("Distributed", "DDP: accumulating under `no_sync`")
@pytest.mark.parametrize("which", ["MLP", "fuse"])
def test_ddp_accumulates_without_sync(
    which: str, in_both: Callable[..., None], route: compatibility.Route
) -> None:
    in_both(check_ddp_no_sync, which)
    assert all_fused(route)


# --- Fully sharded ---


def mesh() -> Any:
    return dist.device_mesh.init_device_mesh("cpu", (RANKS,))


def shard(model: torch.nn.Module, each: bool = False, **options: Any) -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()) if each else ():
        if isinstance(module, torch.nn.Linear):
            fully_shard(module, mesh=mesh(), **options)
    fully_shard(model, mesh=mesh(), **options)
    return model


def check_fsdp2(which: str, each: bool, reshard_after_forward: bool) -> None:
    theirs, ours = models(which)
    shard(ours, each, reshard_after_forward=reshard_after_forward)
    assert type(next(ours.parameters())).__name__ == "DTensor"
    train_alike(ours, ours, theirs)


@pytest.mark.capability("Distributed", "FSDP2: `fully_shard` of a model")
@pytest.mark.parametrize(
    ("which", "reshard_after_forward"), [*((which, True) for which in MODELS), ("MLP", False)]
)
def test_fsdp2(
    which: str, reshard_after_forward: bool, in_both: Callable[..., None], route: compatibility.Route
) -> None:
    in_both(check_fsdp2, which, False, reshard_after_forward)
    assert all_fused(route)


@pytest.mark.capability("Distributed", "FSDP2: `fully_shard` of each Linear, each a chain of its own")
@pytest.mark.parametrize(
    ("which", "reshard_after_forward"), [*((which, True) for which in MODELS), ("MLP", False)]
)
def test_fsdp2_of_each_layer(which: str, reshard_after_forward: bool, in_both: Callable[..., None]) -> None:
    in_both(check_fsdp2, which, True, reshard_after_forward)


def check_fsdp2_mixed_precision(which: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    theirs, ours = models(which)
    shard(ours, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    train_alike(ours, ours, theirs, dtype=torch.bfloat16)


@pytest.mark.capability("Distributed", "FSDP2: `MixedPrecisionPolicy`, bfloat16")
@pytest.mark.parametrize("which", MODELS)
def test_fsdp2_mixed_precision(which: str, in_both: Callable[..., None], route: compatibility.Route) -> None:
    in_both(check_fsdp2_mixed_precision, which)
    assert all_fused(route)


def check_fsdp1(which: str, use_orig_params: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    theirs, ours = models(which)
    wrapped = FSDP(ours, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    x, grad = batch()
    wanted, wanted_gradients = alone(theirs, x, grad)
    y = wrapped(mine(x))
    y.backward(RANKS * mine(grad))
    same(y, mine(wanted))
    with FSDP.summon_full_params(wrapped, with_grads=use_orig_params):
        if use_orig_params:
            same(gradients(ours), wanted_gradients)
    optimizers = [torch.optim.SGD(model.parameters(), 0.5) for model in (wrapped, theirs)]
    for optimizer in optimizers:
        optimizer.step()
    with FSDP.summon_full_params(wrapped):
        same(list(ours.parameters()), list(theirs.parameters()))


@pytest.mark.capability("Distributed", "FSDP1: `FullyShardedDataParallel`")
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("which", ["MLP", "fuse"])
def test_fsdp1(
    which: str, use_orig_params: bool, in_both: Callable[..., None], route: compatibility.Route
) -> None:
    in_both(check_fsdp1, which, use_orig_params)
    assert all_fused(route)


# --- Tensor parallel ---


def check_tensor_parallel(which: str, split: str) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    theirs, ours = models(which)
    first, second = (name for name, m in ours.named_modules() if isinstance(m, torch.nn.Linear))
    plans = {
        "both": {first: ColwiseParallel(), second: RowwiseParallel()},
        "columns": {first: ColwiseParallel(output_layouts=Replicate())},
        "rows": {second: RowwiseParallel(input_layouts=Replicate())},
    }
    parallelize_module(ours, mesh(), plans[split])
    x, grad = batch()
    wanted, wanted_gradients = alone(theirs, x, grad)
    y = ours(x)
    y.backward(grad)
    same(y, wanted)
    same(gradients(ours), wanted_gradients)


@pytest.mark.capability("Distributed", "tensor parallel: `ColwiseParallel`, `RowwiseParallel`")
@pytest.mark.parametrize("split", ["both", "columns", "rows"])
@pytest.mark.parametrize("which", MODELS)
def test_tensor_parallel(which: str, split: str, in_both: Callable[..., None]) -> None:
    in_both(check_tensor_parallel, which, split)


# --- torch.distributed.checkpoint ---


def check_checkpoint(folder: str, which: str, from_torch: bool, sharded: bool) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    source, target = models(which) if from_torch else models(which)[::-1]
    shard(source)
    trained = torch.optim.SGD(source.parameters(), 0.5, momentum=0.5)
    x, grad = batch()
    source(mine(x)).backward(RANKS * mine(grad))
    trained.step()
    model, optimizer = get_state_dict(source, trained)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    with torch.no_grad():
        for p in target.parameters():
            p.zero_()
    if sharded:
        shard(target)
    other = torch.optim.SGD(target.parameters(), 0.5, momentum=0.5)
    model, optimizer = get_state_dict(target, other)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(target, other, model_state_dict=model, optim_state_dict=state["optimizer"])

    for p, q in zip(source.parameters(), target.parameters(), strict=True):
        same(whole(q), whole(p))
        same(whole(other.state[q]["momentum_buffer"]), whole(trained.state[p]["momentum_buffer"]))
    same(target(x), source(x))


@pytest.mark.thinned
@pytest.mark.capability("Distributed", "`torch.distributed.checkpoint`: torch.nn's model and ours, both ways")
@pytest.mark.parametrize("sharded", [True, False], ids=["to sharded", "to plain"])
@pytest.mark.parametrize("from_torch", [True, False], ids=["from torch.nn", "to torch.nn"])
@pytest.mark.parametrize("which", ["MLP", "fuse"])
def test_checkpoint(
    which: str, from_torch: bool, sharded: bool, in_both: Callable[..., None], tmp_path: pathlib.Path
) -> None:
    in_both(check_checkpoint, str(tmp_path), which, from_torch, sharded)


# --- Activation checkpointing ---


class Checkpointed(torch.nn.Module):
    def __init__(self, body: torch.nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.body, self.use_reentrant = body, use_reentrant

    def forward(self, x: torch.Tensor) -> Any:
        # A reentrant checkpoint has gradients only if its input has one.
        return checkpoint(self.body, x.requires_grad_(self.use_reentrant), use_reentrant=self.use_reentrant)


def check_checkpointed(which: str, use_reentrant: bool, sharded: bool) -> None:
    theirs, ours = models(which)
    model = Checkpointed(ours, use_reentrant)
    wrapped = shard(model) if sharded else torch.nn.parallel.DistributedDataParallel(model)
    train_alike(wrapped, ours, theirs)


@pytest.mark.capability("Distributed", "activation checkpointing under DDP and FSDP2")
@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize(("which", "use_reentrant"), [("MLP", True), ("MLP", False), ("fuse", False)])
def test_checkpointed_in_both(
    which: str, use_reentrant: bool, sharded: bool, in_both: Callable[..., None], route: compatibility.Route
) -> None:
    in_both(check_checkpointed, which, use_reentrant, sharded)
    assert all_fused(route)


def blocks(of: Any) -> Any:
    """With dropout: the forward that runs again must draw the same random numbers."""
    block = of.Sequential(of.Linear(6, 8), of.ReLU(), of.Dropout(0.5), of.Linear(8, 6), of.ReLU())
    return of.Sequential(block, copy.deepcopy(block), of.Linear(6, 4))


def wrapped_linears(model: torch.nn.Module, x: torch.Tensor) -> Any:
    wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    if not any(isinstance(module, CheckpointWrapper) for module in model.modules()):
        apply_activation_checkpointing(
            model, wrap, lambda m: m is not model and isinstance(m, torch.nn.Sequential)
        )
    return model(x)


CHECKPOINTED: dict[str, Callable[[torch.nn.Module, torch.Tensor], Any]] = {
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "not reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "checkpoint_sequential": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=False),
    "apply_activation_checkpointing": wrapped_linears,
}


@pytest.mark.thinned
@pytest.mark.capability("Distributed", "activation checkpointing, of whole models and of blocks")
@pytest.mark.parametrize("converted", [False, True], ids=["nn", "fuse"])
@pytest.mark.parametrize("how", CHECKPOINTED)
def test_activation_checkpointing(
    how: str, converted: bool, route: compatibility.Route, device: torch.device
) -> None:
    theirs = blocks(torch.nn).to(device)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randint(-1, 2, p.shape))
    ours = fusedmlp.fuse(theirs, inplace=False) if converted else blocks(nn).to(device)
    ours.load_state_dict(theirs.state_dict())
    x, grad = (t.to(device) for t in batch())
    results: list[Any] = []
    for model, call in (
        (theirs, torch.nn.Module.__call__),
        (theirs, CHECKPOINTED[how]),
        (ours, CHECKPOINTED[how]),
    ):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        model.zero_grad()
        y = call(model, leaf)
        y.backward(grad)
        results.append([y, leaf.grad, *gradients(model)])
    same(results[2], results[0])
    same(results[1], results[0])
    assert all_fused(route)
