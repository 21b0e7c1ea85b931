"""The training step, in two launches and in its persistent form, is compared with torch.optim in float64."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from oracle import assert_right

pytestmark = pytest.mark.kernels

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "plain SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    "Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3}),
}
KINDS = {"SGD": "sgd", "Adam": "adam", "AdamW": "adamw"}


class Guards:
    """Puts tensors between canaries, which detect writes past an end."""

    PAD, CANARY = 2**14, 77.0

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        buffer = tensor.new_full((tensor.numel() + 2 * self.PAD,), self.CANARY)
        self.buffers.append(buffer)
        inside = buffer[self.PAD : -self.PAD].view(tensor.shape)
        return inside.copy_(tensor)

    def check(self) -> None:
        for buffer in self.buffers:
            edges = torch.cat((buffer[: self.PAD], buffer[-self.PAD :]))
            assert (edges == self.CANARY).all(), "written past the end"


class Training(NamedTuple):
    """A model, an optimizer that has made one step, and the data."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: Any
    x: torch.Tensor
    target: torch.Tensor
    order: torch.Tensor


def training(
    widths: tuple[int, ...],
    loss: str,
    optimizer: str,
    device: torch.device,
    rows: int = 40,
    pixels: bool = False,
) -> Training:
    layers = [m for K, N in itertools.pairwise(widths) for m in (torch.nn.Linear(K, N), torch.nn.ReLU())][:-1]
    model = torch.nn.Sequential(*layers).to(device)
    kind, options = OPTIMIZERS[optimizer]
    made = kind(model.parameters(), **options)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) / 10
    made.step()
    made.zero_grad()
    x = torch.randn(rows, widths[0])
    if pixels:
        x = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    if loss == "mse":
        target, loss_fn = torch.randn(rows, widths[-1]), torch.nn.MSELoss()
    else:
        target, loss_fn = torch.randint(0, widths[-1], (rows,)), torch.nn.CrossEntropyLoss()
    return Training(model, made, loss_fn, x.to(device), target.to(device), torch.randperm(rows).to(device))


def in_torch(given: Training, batches: list[slice], dtype: torch.dtype, scale: float) -> tuple[Training, Any]:
    """Train with autograd and torch.optim, on copies; return model, optimizer and losses."""
    model = copy.deepcopy(given.model).to(dtype)
    optimizer = type(given.optimizer)(model.parameters())
    optimizer.load_state_dict(copy.deepcopy(given.optimizer.state_dict()))
    losses = []
    for batch in batches:
        rows = given.order[batch]
        x, target = given.x[rows].to(dtype), given.target[rows]
        target = target.to(dtype) if target.is_floating_point() else target
        optimizer.zero_grad()
        loss = given.loss_fn(model(x * scale), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return given._replace(model=model, optimizer=optimizer), torch.stack(losses)


def coefficients_for(given: Training, steps: int) -> torch.Tensor:
    from fusedmlp.kernels.train_step import optimizers

    group, rows = given.optimizer.param_groups[0], []
    for i in range(steps):
        if isinstance(given.optimizer, torch.optim.SGD):
            one = optimizers.sgd_coefficients(
                group["lr"], group["momentum"], group["dampening"], group["weight_decay"]
            )
        else:
            decoupled = isinstance(given.optimizer, torch.optim.AdamW)
            one = optimizers.adam_coefficients(
                group["lr"], group["betas"], group["eps"], group["weight_decay"], decoupled, i + 2
            )
        rows.append([one] * len(group["params"]))
    return torch.tensor(rows, dtype=torch.float32, device=given.x.device)


def on_kernels(
    given: Training,
    batches: list[slice],
    dtype: torch.dtype,
    scale: float,
    persistent: bool = False,
    index_dtype: torch.dtype | None = torch.int64,
    record: list[torch.Tensor] | None = None,
) -> tuple[Training, torch.Tensor]:
    """Train with our kernels, on copies of model and optimizer, in a workspace filled with NaN."""
    from fusedmlp.kernels.train_step import persistent as persistent_form
    from fusedmlp.kernels.train_step import step

    model = copy.deepcopy(given.model)
    optimizer = type(given.optimizer)(model.parameters())
    optimizer.load_state_dict(copy.deepcopy(given.optimizer.state_dict()))
    guard = Guards()
    state = [optimizer.state[p] for p in model.parameters()]
    for parameter, its_state in zip(model.parameters(), state, strict=True):
        parameter.data = guard(parameter.data)
        its_state.update({k: guard(t) for k, t in its_state.items() if t is not None and t.dim()})
    firsts = [s.get("momentum_buffer", s.get("exp_avg")) for s in state]
    squares = [s.get("exp_avg_sq") for s in state]
    data = [p.detach() for p in model.parameters()]
    widths = (data[0].shape[1], *(bias.shape[0] for bias in data[1::2]))
    most = max(len(given.order[batch]) for batch in batches)
    made = step.workspace_for(widths, most, dtype, given.x.device)

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return guard(tensor.fill_(float("nan")))

    workspace = made._replace(
        low_precision=tuple(None if low is None else poisoned(low) for low in made.low_precision),
        hidden=tuple(map(poisoned, made.hidden)),
        grads=tuple(map(poisoned, made.grads)),
        partials=poisoned(made.partials),
    )
    if record is not None:
        record.append(workspace.wrong)
    parameters = step.Parameters(
        *(tuple(part) for part in (data[::2], data[1::2], workspace.low_precision)),
        *(tuple(part) for part in (firsts[::2], firsts[1::2], squares[::2], squares[1::2])),
    )
    step.refresh_low_precision(parameters)
    network = step.Network(
        widths,
        "mse" if isinstance(given.loss_fn, torch.nn.MSELoss) else "cross_entropy",
        KINDS[type(optimizer).__name__],
        optimizer.param_groups[0].get("nesterov", False),
    )
    coefficients = coefficients_for(given, len(batches))
    losses = guard(torch.full((len(batches),), float("nan"), device=given.x.device))
    index, x, target = given.order, given.x, given.target
    if index_dtype is None:
        index, x, target = None, x[given.order], target[given.order]
    else:
        index = index.to(index_dtype)
    job = step.Job(x, index, target, parameters, network, coefficients, losses, workspace, scale)
    if persistent:
        first, last, batch = batches[0].start, batches[-1].stop, batches[0].stop - batches[0].start
        persistent_form.train_steps(job, first, last - first, batch)
    else:
        for i, batch in enumerate(batches):
            step.train_step(job, batch.start, batch.stop - batch.start, i)
    guard.check()
    for weight, rounded in zip(data[::2], workspace.low_precision, strict=True):
        if rounded is not None and not (dtype == torch.bfloat16 and not x.is_cuda):
            assert torch.equal(rounded, weight.to(dtype))  # the interpreter truncates to bfloat16
    return given._replace(model=model, optimizer=optimizer), losses


def all_of(given: Training) -> list[torch.Tensor]:
    """All parameters, then all optimizer state."""
    parameters = list(given.model.parameters())
    state = [t for p in parameters for t in given.optimizer.state[p].values() if t is not None and t.dim()]
    return [p.detach() for p in parameters] + state


def check(given: Training, batches: list[slice], scale: float = 1.0, **how: Any) -> None:
    """Compare losses, parameters and state with PyTorch's, in float32 and in float64."""
    ours, losses = on_kernels(given, batches, torch.float32, scale, **how)
    torchs, its_losses = in_torch(given, batches, torch.float32, scale)
    exact, right_losses = in_torch(given, batches, torch.float64, scale)
    # The interpreter adds rows one by one, and Adam's division enlarges errors of small gradients.
    floor = 32 * torch.finfo(torch.float32).eps
    assert_right(losses, its_losses, right_losses, "losses", floor=floor)
    for i, tensors in enumerate(zip(all_of(ours), all_of(torchs), all_of(exact), strict=True)):
        assert_right(*tensors, f"tensor {i}", floor=floor)


# The tests cover: sizes that no tile divides, one layer and nine, a short last batch, and an order of rows
# that has 64 or 32 bits or is absent.
BATCHES = [slice(0, 18), slice(18, 36), slice(36, 40)]


@pytest.fixture(params=[False, True], ids=["two launches", "persistent"])
def persistent(request: pytest.FixtureRequest) -> Iterator[bool]:
    """The persistent form does not support IEEE float32, so it is tested with TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    if request.param:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.thinned
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_three_steps(loss: str, optimizer: str, persistent: bool, device: torch.device) -> None:
    widths = (48, 32, 16, 7) if persistent else (51, 40, 17, 7)
    check(training(widths, loss, optimizer, device), BATCHES, persistent=persistent)


def test_pixels(persistent: bool, device: torch.device) -> None:
    given = training((112, 64, 10), "cross_entropy", "SGD", device, pixels=True)
    check(given, BATCHES, 1 / 255, persistent=persistent)


@pytest.mark.parametrize(
    "widths", [(7, 1), (784, 10), (1, 1, 1), (127, 256, 256), (10, *[16] * 8, 3), (33, 1, 130, 2)]
)
def test_widths_and_depths(widths: tuple[int, ...], device: torch.device) -> None:
    for loss, optimizer in (("mse", "Adam"), ("cross_entropy", "Nesterov")):
        check(training(widths, loss, optimizer, device), [slice(0, 33), slice(33, 34)])


@pytest.mark.parametrize("index_dtype", [torch.int32, None], ids=["int32", "no index"])
def test_the_order_of_rows(index_dtype: torch.dtype | None, device: torch.device) -> None:
    given = training((20, 16, 5), "cross_entropy", "AdamW", device)
    check(given, [slice(3, 20), slice(20, 37)], index_dtype=index_dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_half_precision_products(loss: str, dtype: torch.dtype, device: torch.device) -> None:
    """The error is at most twice autocast's, plus the rounding of the products' inputs."""
    given = training((51, 40, 17, 7), loss, "SGD", device)
    ours, losses = on_kernels(given, BATCHES, dtype, 1.0)
    exact, right = in_torch(given, BATCHES, torch.float64, 1.0)
    with torch.autocast(device.type, dtype):
        cast, _ = in_torch(given, BATCHES, torch.float32, 1.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(losses.double(), right, rtol=4 * eps, atol=0)
    for our, its, goal in zip(all_of(ours), all_of(cast), all_of(exact), strict=True):
        # Rounding may switch a ReLU on or off, in autocast too; if none switches, 4 eps is enough.
        assert (our.double() - goal).norm() <= 2 * (its.double() - goal).norm() + 4 * eps * goal.norm()


def test_same_bits_every_time(device: torch.device) -> None:
    given = training((51, 40, 7), "cross_entropy", "AdamW", device, rows=200)
    runs = [on_kernels(given, [slice(0, 150), slice(150, 200)], torch.float16, 1.0) for _ in range(2)]
    for one, other in zip(*(all_of(ours) for ours, _ in runs), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(runs[0][1], runs[1][1])


def test_ignored_targets(device: torch.device) -> None:
    """Rows with the target -100 are ignored, as in cross_entropy."""
    given = training((20, 16, 5), "cross_entropy", "SGD", device)
    given.target[given.order[3:9]] = -100
    check(given, BATCHES)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_class_that_does_not_exist_stops_the_training(
    optimizer: str, persistent: bool, device: torch.device
) -> None:
    """From that step on nothing is updated, not even by momentum or decay. The first one is recorded."""
    from fusedmlp.kernels.train_step import step

    widths = (32, 16, 5) if persistent else (20, 17, 5)
    given = training(widths, "cross_entropy", optimizer, device)
    right, _ = on_kernels(given, BATCHES[:1], torch.float32, 1.0, persistent=persistent)
    for wrong in (5, -1, 2**31 + 1, -(2**40), -99):
        target = given.target.clone()
        target[given.order[30]] = wrong  # in the second step, and another one in the third
        target[given.order[37]] = -7
        record: list[torch.Tensor] = []
        ours, losses = on_kernels(
            given._replace(target=target), BATCHES, torch.float32, 1.0, persistent=persistent, record=record
        )
        assert losses.isnan().tolist() == [False, True, True]
        for our, its in zip(all_of(ours), all_of(right), strict=True):
            assert torch.equal(our, its)
        assert step.wrong_label(record[0]) == (1, max(-(2**31), min(wrong, 2**31 - 1)))


def test_only_ignored_targets(device: torch.device) -> None:
    """If all targets are -100, the loss is NaN and the gradient 0, as in PyTorch."""
    given = training((20, 16, 5), "cross_entropy", "plain SGD", device)
    given.target.fill_(-100)
    ours, losses = on_kernels(given, BATCHES, torch.float32, 1.0)
    assert losses.isnan().all()
    for our, its in zip(all_of(ours), all_of(given), strict=True):
        assert torch.equal(our, its)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_follow_torch(value: float, device: torch.device) -> None:
    given = training((20, 16, 16, 5), "cross_entropy", "SGD", device)
    given.x[given.order[20], 3] = value
    ours, losses = on_kernels(given, BATCHES, torch.float32, 1.0)
    torchs, its_losses = in_torch(given, BATCHES, torch.float32, 1.0)
    assert losses.isnan().tolist() == its_losses.isnan().tolist() == [False, True, True]
    for our, its in zip(all_of(ours), all_of(torchs), strict=True):
        assert our.isnan().any() == its.isnan().any()


def test_logits_of_any_size(device: torch.device) -> None:
    """Large logits do not overflow: the largest is subtracted before exp."""
    given = training((4, 3), "cross_entropy", "plain SGD", device)
    with torch.no_grad():
        given.x.mul_(1e4)
    check(given, BATCHES[:1])


def test_why_there_is_no_step() -> None:
    from fusedmlp.kernels.train_step import persistent, step

    assert step.why_no_step((784, 256, 128, 10), 512, torch.float32) is None
    assert step.why_no_step((10**6, *[256] * 9), step.MOST_ROWS, torch.bfloat16) is None
    for widths, rows, dtype, word in (
        ((784, 257, 10), 64, torch.float32, "257 outputs"),
        ((16,) * 11, 64, torch.float32, "10 layers"),
        ((16, 0, 3), 64, torch.float32, "empty"),
        ((2**22 + 1, 3), 64, torch.float32, "inputs"),
        ((16, 3), 0, torch.float32, "empty"),
        ((16, 3), step.MOST_ROWS + 1, torch.float32, "rows"),
        ((16, 3), 64, torch.float64, "float64"),
    ):
        assert word in (step.why_no_step(widths, rows, dtype) or "")
    assert persistent.why_not_persistent((784, 256, 128, 10), torch.float16) is None
    assert "IEEE" in (persistent.why_not_persistent((784, 256, 128, 10), torch.float32) or "")
    assert "5 layers" in (persistent.why_not_persistent((16,) * 6, torch.float16) or "")
    assert "multiple of 16" in (persistent.why_not_persistent((784, 100, 10), torch.float16) or "")


@pytest.mark.gpu
def test_steps_in_a_graph(device: torch.device) -> None:
    """A replay repeats the steps, starting from the current parameters."""
    from fusedmlp.kernels.train_step import step

    given = training((51, 40, 17, 7), "cross_entropy", "SGD", device)
    data = [p.detach() for p in given.model.parameters()]
    moments = [given.optimizer.state[p]["momentum_buffer"] for p in given.model.parameters()]
    none = (None,) * 3
    parameters = step.Parameters(
        tuple(data[::2]), tuple(data[1::2]), none, tuple(moments[::2]), tuple(moments[1::2]), none, none
    )
    expected, right = in_torch(given, BATCHES * 2, torch.float32, 1.0)
    workspace = step.workspace_for((51, 40, 17, 7), 18, torch.float32, device)
    network, coefficients = step.Network((51, 40, 17, 7), "cross_entropy", "sgd"), coefficients_for(given, 3)
    losses = torch.empty(3, device=device)
    job = step.Job(given.x, given.order, given.target, parameters, network, coefficients, losses, workspace)

    def three_steps() -> None:
        for i, batch in enumerate(BATCHES):
            step.train_step(job, batch.start, batch.stop - batch.start, i)

    three_steps()  # compiles the kernels before the capture
    before = losses.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        three_steps()
    graph.replay()
    torch.testing.assert_close(torch.cat((before, losses)), right, rtol=1e-4, atol=1e-6)
    for our, its in zip(data, expected.model.parameters(), strict=True):
        torch.testing.assert_close(our, its, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_mnist_epoch_on_all_multiprocessors(dtype: torch.dtype, device: torch.device) -> None:
    """Both forms have the right losses, and the same bits in every run, with many programs."""
    given = training((784, 256, 128, 10), "cross_entropy", "AdamW", device, rows=4096 + 100, pixels=True)
    batches = [slice(i, min(i + 512, 4196)) for i in range(0, 4196, 512)]
    _, right = in_torch(given, batches, torch.float64, 1 / 255)
    for persistent in (False, True) if dtype != torch.float32 else (False,):
        ours, losses = on_kernels(given, batches, dtype, 1 / 255, persistent=persistent)
        tolerance = 1e-4 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(losses.double(), right, rtol=tolerance, atol=tolerance)
        again, _ = on_kernels(given, batches, dtype, 1 / 255, persistent=persistent)
        for one, other in zip(all_of(ours), all_of(again), strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
def test_overlapping_launches(device: torch.device) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    import functools

    from fusedmlp.kernels.train_step import step

    given = training((784, 256, 128, 10), "cross_entropy", "SGD", device, rows=2048)
    batches = [slice(i, i + 128) for i in range(0, 2048, 128)]
    plain = on_kernels(given, batches, torch.float16, 1.0)
    train_step = step.train_step
    try:
        step.train_step = functools.partial(train_step, overlap=True)
        overlapping = on_kernels(given, batches, torch.float16, 1.0)
    finally:
        step.train_step = train_step
    for one, other in zip(all_of(plain[0]), all_of(overlapping[0]), strict=True):
        assert torch.equal(one, other)
