"""Threads, processes, streams, graphs and devices: the results are those of one thread alone."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import compatibility
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import fusedmlp
from fusedmlp import nn
from fusedmlp.dispatch import backend_choice, predicate

PATIENCE = 120  # seconds until a wait for another thread or process fails
SECTION = "Devices, streams, processes"


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc2(F.relu(self.fc1(x)))


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "MLP": lambda: nn.MLP(6, [8], 4),
    "fuse": lambda: fusedmlp.fuse(Plain()),
}


class Step(NamedTuple):
    """A model with its data; a call is one training step."""

    model: torch.nn.Module
    x: torch.Tensor
    target: torch.Tensor

    def __call__(self) -> None:
        self.model.zero_grad()
        F.mse_loss(self.model(self.x), self.target).backward()
        with torch.no_grad():
            for p in self.model.parameters():
                p -= 0.125 * p.grad

    def times(self, steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            self()
        return list(self.model.parameters())


def step(which: str, seed: int, device: Any = "cpu") -> Step:
    torch.manual_seed(seed)
    return Step(MODELS[which]().to(device), torch.randn(5, 6).to(device), torch.randn(5, 4).to(device))


def equal(ours: Any, wanted: Any) -> None:
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


def in_threads(route: compatibility.Route, *jobs: Callable[[], Any]) -> list[Any]:
    """Run the jobs at the same time, each in its thread, on this route, and return their results."""
    start = threading.Barrier(len(jobs), timeout=PATIENCE)
    results: list[Any] = [None] * len(jobs)
    problems: list[BaseException] = []

    def run(i: int) -> None:
        try:
            own = compatibility.Route(route.kernels)
            # Only the recording belongs to one thread; the rest of the route holds in all threads.
            with backend_choice.recorded(lambda run: own.reasons.append(run.reason)):
                start.wait()
                results[i] = jobs[i]()
            route.reasons += own.reasons
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # the threads take turns as often as possible
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    finally:
        sys.setswitchinterval(before)
    if problems:
        raise problems[0]
    assert not any(thread.is_alive() for thread in threads)
    return results


def all_fused(route: compatibility.Route) -> bool:
    return bool(route.reasons) and (not route.kernels or set(route.reasons) == {None})


# --- Threads ---


@pytest.mark.capability(SECTION, "threads, each training its own model")
@pytest.mark.parametrize("which", MODELS)
def test_threads_with_their_own_models(which: str, route: compatibility.Route, device: torch.device) -> None:
    steps = 4 if route.kernels else 100
    wanted = [step(which, seed, device).times(steps) for seed in (1, 2)]
    jobs = [step(which, seed, device) for seed in (1, 2)]
    equal(in_threads(route, *(lambda job=job: job.times(steps) for job in jobs)), wanted)
    assert all_fused(route)


@pytest.mark.capability(SECTION, "threads that share a model in inference")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("which", MODELS)
def test_threads_that_share_a_model(
    which: str, mode: Any, route: compatibility.Route, device: torch.device
) -> None:
    rounds = 5 if route.kernels else 200
    model = step(which, 1, device).model
    xs = [torch.randn(rows, 6, device=device) for rows in (3, 5)]

    def predict(x: torch.Tensor) -> list[torch.Tensor]:
        with mode():
            return [model(x) for _ in range(rounds)]

    wanted = [predict(x) for x in xs]
    equal(in_threads(route, *(lambda x=x: predict(x) for x in xs)), wanted)


@pytest.mark.capability(SECTION, "backward in another thread than forward")
@pytest.mark.parametrize("which", MODELS)
def test_backward_in_another_thread(which: str, route: compatibility.Route, device: torch.device) -> None:
    jobs = [step(which, seed, device) for seed in (1, 2)]
    losses = [F.mse_loss(job.model(job.x), job.target) for job in jobs]
    wanted = [torch.autograd.grad(loss, list(job.model.parameters()), retain_graph=True)
              for loss, job in zip(losses, jobs, strict=True)]  # fmt: skip
    in_threads(route, *(loss.backward for loss in losses))
    equal([tuple(p.grad for p in job.model.parameters()) for job in jobs], wanted)
    assert all_fused(route)


@pytest.mark.capability(SECTION, "`backend()` and `explain` in one thread, another trains")
def test_what_one_thread_chooses_holds_in_it_alone(route: compatibility.Route, device: torch.device) -> None:
    steps = 4 if route.kernels else 100
    wanted = [step("MLP", seed, device).times(steps) for seed in (1, 2)]
    first, second, explained = (step("MLP", seed, device) for seed in (1, 2, 3))
    trained = threading.Event()

    def with_torch() -> list[torch.Tensor]:
        with fusedmlp.backend("torch"):
            return first.times(steps)

    def explain() -> None:
        while not trained.wait(0.001):
            fusedmlp.explain(explained.model, explained.x)

    def train() -> list[torch.Tensor]:
        try:
            return second.times(steps)
        finally:
            trained.set()

    noted: list[Any] = []
    with contextlib.ExitStack() as stack:
        if route.kernels:  # explain() does this for a moment
            stack.enter_context(predicate.kernels().dry_run(lambda *launch: noted.append(launch)))
        ours = in_threads(route, with_torch, explain, train)
    assert noted == []
    torch.testing.assert_close(ours[0], wanted[0])  # on the kernels, wanted has other bits than torch's
    equal(ours[2], wanted[1])
    forced = [reason for reason in route.reasons if reason == "The caller chose backend('torch')."]
    assert len(forced) == steps
    route.reasons[:] = [reason for reason in route.reasons if reason not in forced]  # these are expected
    assert not route.kernels or set(route.reasons) == {None}


# --- Processes ---


def here(kernels: bool, call: Callable[[], Any]) -> tuple[Any, list[str | None]]:
    """The result of a call in this process, and the reasons recorded for its layers."""
    route = compatibility.Route(kernels)
    with compatibility.taken(route):
        return call(), route.reasons


@pytest.fixture
def context(request: pytest.FixtureRequest) -> Any:
    context = torch.multiprocessing.get_context(request.param)
    if request.param == "forkserver":
        context.set_forkserver_preload(["torch"])  # once instead of in every process
    return context


class Features(Dataset[Any]):
    """A data set whose items a fused model computes, in the process that asks for them."""

    def __init__(self, model: torch.nn.Module, kernels: bool) -> None:
        self.model, self.kernels = model, kernels
        self.x = torch.randn(4, 3, 6)

    def __len__(self) -> int:
        return len(self.x)

    @torch.no_grad()
    def __getitem__(self, i: int) -> Any:
        return here(self.kernels, lambda: self.model(self.x[i]))


@pytest.mark.capability(
    SECTION, "`DataLoader` workers by fork, spawn and forkserver, a fused model in them too"
)
@pytest.mark.parametrize(
    "context",
    ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("spawn", "forkserver"))],
    indirect=True,
)
def test_data_loaders(context: Any, route: compatibility.Route, device: torch.device) -> None:
    data = Features(step("MLP", 1).model, route.kernels)
    start = fusedmlp.MLP(4, [8], 2).state_dict()

    def train(**options: Any) -> list[torch.Tensor]:
        trained = fusedmlp.MLP(4, [8], 2).to(device)
        trained.load_state_dict(start)
        for features, reasons in DataLoader(data, batch_size=None, **options):
            route.reasons += reasons
            Step(trained, features.to(device), torch.ones(3, 2, device=device))()
        return list(trained.parameters())

    wanted = train()  # the kernels have now run in this process
    equal(train(num_workers=2, multiprocessing_context=context, timeout=PATIENCE), wanted)
    assert len(route.reasons) == 4 * len(data)
    assert device.type == "cuda" or all_fused(route)


def predict(job: tuple[torch.nn.Module, torch.Tensor, bool]) -> Any:
    model, x, kernels = job
    with torch.no_grad():
        return here(kernels, lambda: model(x))


@pytest.mark.capability(SECTION, "a fused model in a `multiprocessing.Pool`, forked after kernels have run")
@pytest.mark.parametrize("context", ["fork"], indirect=True)
def test_pool(context: Any, route: compatibility.Route, device: torch.device) -> None:
    jobs = [
        (step(which, 1).model, torch.randn(3, 6), route.kernels)
        for which in ("MLP", "fuse")
        for _ in range(3)
    ]
    step("MLP", 1, device)()
    wanted = [predict(job)[0] for job in jobs]
    with context.Pool(2) as pool:
        results = pool.map_async(predict, jobs).get(PATIENCE)
    for (y, reasons), its in zip(results, wanted, strict=True):
        equal(y, its)
        route.reasons += reasons
    assert device.type == "cuda" or all_fused(route)


@pytest.mark.capability(SECTION, "a fused model in a `multiprocessing.Pool`, forked after kernels have run")
@pytest.mark.parametrize("context", ["fork"], indirect=True)
def test_fork_while_another_thread_runs_kernels(context: Any, route: compatibility.Route) -> None:
    """At the fork the other thread may hold a lock, and in the child nothing releases it."""
    # Two jobs: a model that is sent to another process moves to shared memory, even while a thread computes.
    job, others = ((step("MLP", seed).model, torch.randn(3, 6), route.kernels) for seed in (1, 2))
    wanted, _ = predict(job)
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            predict(others)

    other = threading.Thread(target=run)
    other.start()
    try:
        with context.Pool(2) as pool:
            results = pool.map_async(predict, [job] * 4).get(PATIENCE)
    finally:
        stop.set()
        other.join()
    for y, reasons in results:
        equal(y, wanted)
        route.reasons += reasons


def take_turns(rank: int, job: Step, steps: int, kernels: bool, turns: list[Any], said: Any) -> None:
    torch.set_num_threads(1)

    def alternate() -> None:
        for _ in range(steps):
            assert turns[rank].acquire(timeout=PATIENCE)
            job()
            turns[1 - rank].release()

    said.put(here(kernels, alternate)[1])


@pytest.mark.capability(SECTION, "Hogwild: processes that train one model in shared memory")
@pytest.mark.parametrize("context", ["forkserver"], indirect=True)
@pytest.mark.parametrize("which", MODELS)
def test_hogwild(which: str, context: Any, route: compatibility.Route, device: torch.device) -> None:
    """The processes take turns, so that there is only one correct result."""
    steps = 2
    alone, shared = step(which, 1), step(which, 1)
    xs = [shared.x, torch.randn(5, 6)]
    for _ in range(steps):
        for x in xs:
            alone._replace(x=x)()
    shared.model.share_memory()
    turns, said = [context.Semaphore(1), context.Semaphore(0)], context.SimpleQueue()
    processes = [
        context.Process(
            target=take_turns,
            args=(rank, shared._replace(x=x), steps, route.kernels, turns, said),
            daemon=True,
        )
        for rank, x in enumerate(xs)
    ]
    finish(processes)
    for _ in processes:
        route.reasons += said.get()
    equal(list(shared.model.parameters()), list(alone.model.parameters()))
    assert device.type == "cuda" or all_fused(route)


def finish(processes: list[Any]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * len(processes)


def first_calls(kernels: bool, said: Any) -> None:
    route = compatibility.Route(kernels)
    with compatibility.taken(route):
        assert "fusedmlp.kernels" not in sys.modules
        jobs = [step("MLP", seed) for seed in (1, 2)]
        results = in_threads(route, *(lambda job=job: job.times(1) for job in jobs))
        equal(results, [step("MLP", seed).times(1) for seed in (1, 2)])
    said.put(route.reasons)


@pytest.mark.capability(SECTION, "threads, each training its own model")
@pytest.mark.parametrize("context", ["forkserver"], indirect=True)
def test_threads_that_both_are_the_first(
    context: Any, route: compatibility.Route, device: torch.device
) -> None:
    """Both threads import the kernels and find the caches empty."""
    said = context.SimpleQueue()
    finish([context.Process(target=first_calls, args=(route.kernels, said), daemon=True)])
    route.reasons += said.get()
    assert device.type == "cuda" or all_fused(route)


# --- One GPU, or two ---


@pytest.mark.gpu
@pytest.mark.capability(SECTION, "a device that is not the current one")
@pytest.mark.parametrize("which", MODELS)
def test_another_device(which: str, route: compatibility.Route) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    wanted = [p.to("cuda:1") for p in step(which, 1, "cuda:0").times(3)]
    with torch.cuda.device(0):
        ours = step(which, 1, "cuda:1").times(3)
        assert torch.cuda.current_device() == 0
    assert all(p.device.index == 1 for p in ours)
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        equal(ours, wanted)
    else:
        torch.testing.assert_close(ours, wanted)
    assert all_fused(route)


@contextlib.contextmanager
def busy_default_stream() -> Iterator[Callable[[], bool]]:
    """Give the default stream a second of work; yields a function that tells whether it is still busy."""
    default = torch.cuda.default_stream()
    done = torch.cuda.Event()
    with torch.cuda.stream(default):
        torch.cuda._sleep(2**31)
        done.record()
    yield lambda: not done.query()
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.capability(SECTION, "a stream that is not the default one")
@pytest.mark.parametrize("which", MODELS)
def test_another_stream(which: str, route: compatibility.Route) -> None:
    """A launch on the default stream would run after the sleep, and the result would be read before it."""
    model, x, _ = step(which, 1, "cuda")
    parameters = list(model.parameters())

    def results(x: torch.Tensor) -> list[torch.Tensor]:
        y = model(x)
        return [t.cpu() for t in (y.detach(), *torch.autograd.grad(y.square().sum(), parameters))]

    wanted = results(x)
    other = torch.randn_like(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        results(other)  # compiling and first allocations would wait for the default stream
        stream.synchronize()
        with busy_default_stream() as busy:
            ours = results(x)  # .cpu() waits for this stream
            assert busy()
    equal(ours, wanted)
    assert all_fused(route)


@pytest.mark.gpu
@pytest.mark.capability(SECTION, "threads, each with its own model and stream")
@pytest.mark.parametrize("which", MODELS)
def test_threads_with_their_own_streams(which: str, route: compatibility.Route) -> None:
    wanted = [step(which, seed, "cuda").times(50) for seed in (1, 2)]
    jobs = [step(which, seed, "cuda") for seed in (1, 2)]
    torch.cuda.synchronize()

    def train(job: Step) -> list[torch.Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            job.times(50)
            torch.cuda.current_stream().synchronize()
        return list(job.model.parameters())

    equal(in_threads(route, *(lambda job=job: train(job) for job in jobs)), wanted)
    assert all_fused(route)


def on_a_side_stream(call: Callable[[], Any]) -> None:
    """Warm up on a side stream before a capture, as torch's notes on CUDA graphs require."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.gpu
@pytest.mark.capability(SECTION, "CUDA graphs: inference")
@pytest.mark.parametrize("which", MODELS)
def test_cuda_graph_of_inference(which: str, route: compatibility.Route) -> None:
    model, x, _ = step(which, 1, "cuda")
    with torch.no_grad():
        on_a_side_stream(lambda: model(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            equal(y, model(x.clone()))
    assert all_fused(route)


@pytest.mark.gpu
@pytest.mark.capability(SECTION, "CUDA graphs: training steps")
@pytest.mark.parametrize("which", MODELS)
def test_cuda_graph_of_training(which: str, route: compatibility.Route) -> None:
    """Replays forward, backward and the update of the parameters on other data."""
    ours, alone = step(which, 1, "cuda"), step(which, 1, "cuda")
    start = [p.detach().clone() for p in ours.model.parameters()]
    on_a_side_stream(ours)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours()
    with torch.no_grad():
        for p, its in zip(ours.model.parameters(), start, strict=True):
            p.copy_(its)
    for _ in range(3):
        for t in (ours.x, ours.target):
            t.copy_(torch.randn_like(t))
        graph.replay()
        alone._replace(x=ours.x.clone(), target=ours.target.clone())()
        equal(list(ours.model.parameters()), list(alone.model.parameters()))
    assert all_fused(route)


@pytest.mark.gpu
@pytest.mark.capability(SECTION, "CUDA graphs: `make_graphed_callables`")
@pytest.mark.parametrize("which", MODELS)
def test_graphed_callable(which: str, route: compatibility.Route) -> None:
    ours, alone = step(which, 1, "cuda"), step(which, 1, "cuda")
    graphed = ours._replace(model=torch.cuda.make_graphed_callables(ours.model, (torch.randn_like(ours.x),)))
    equal(graphed.times(3), alone.times(3))
    assert all_fused(route)
