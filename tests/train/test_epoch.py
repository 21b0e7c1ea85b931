"""An epoch gives the results of the loop over its batches, and warns if a loss is not finite."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from training import CROSS_ENTROPY, OPTIMIZERS, Twins, assert_close, mlp

import fusedmlp


def images(count: int = 20, shape: Any = (3, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8), torch.randint(0, 5, (count,))


def plain_epoch(
    twins: Twins, x: torch.Tensor, y: torch.Tensor, size: int, seed: int, drop_last: bool = False
) -> torch.Tensor:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = [part for part in order.split(size) if len(part) == size or not drop_last]
    return torch.stack([twins.plain(x[rows], y[rows]) for rows in parts])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [1, 6, 20, 50])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_epoch_is_the_loop(name: str, size: int, drop_last: bool) -> None:
    twins = Twins(mlp(widths=(12, 9, 5)), OPTIMIZERS[name])
    x, y = images()
    scaled = x.flatten(1).double() / 255
    for seed in (1, 2):
        if drop_last and size > len(x):
            with pytest.raises(ValueError, match="drop_last leaves nothing of 20 rows in batches of 50"):
                twins.step.epoch(x, y, size, seeded(seed), drop_last)
            continue
        ours = twins.step.epoch(x, y, size, seeded(seed), drop_last)
        assert_close(ours, plain_epoch(twins, scaled, y, size, seed, drop_last))
        assert not ours.requires_grad
    twins.assert_same()


def test_the_global_generator_is_the_default() -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(Twins(mlp(widths=(12, 9, 5)), OPTIMIZERS["SGD"]).step.epoch(*images(), 6))
    assert torch.equal(*losses)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_floating_point_images_are_not_scaled(dtype: torch.dtype) -> None:
    twins = Twins(mlp(widths=(12, 9, 5), dtype=dtype), OPTIMIZERS["SGD"])
    x, y = torch.randn(20, 12, dtype=dtype), images()[1]
    ours = twins.step.epoch(x, y, 6, seeded(1))
    torch.testing.assert_close(ours, plain_epoch(twins, x, y, 6, 1))


def test_images_keep_their_shape_for_a_model_that_wants_it() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5)).double()
    twins = Twins(model, OPTIMIZERS["SGD"])
    x, y = images(shape=(1, 3, 4))
    assert_close(twins.step.epoch(x, y, 6, seeded(1)), plain_epoch(twins, x.double() / 255, y, 6, 1))
    twins.assert_same()
    rows = Twins(mlp(widths=(4, 5)).append(nn.Flatten()).append(nn.Linear(15, 5).double()), OPTIMIZERS["SGD"])
    x, y = images()  # their last dimension is the first layer's width
    assert_close(rows.step.epoch(x, y, 6, seeded(1)), plain_epoch(rows, x.double() / 255, y, 6, 1))


def test_targets_that_are_not_classes() -> None:
    twins = Twins(mlp(widths=(12, 9, 5)), OPTIMIZERS["Adam"], nn.MSELoss())
    x, y = torch.randn(20, 12).double(), torch.randn(20, 5).double()
    assert_close(twins.step.epoch(x, y, 6, seeded(1)), plain_epoch(twins, x, y, 6, 1))
    twins.assert_same()


def test_every_batch_lies_in_the_same_memory() -> None:
    places = set()

    class Looking(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            places.add(input.data_ptr())
            return super().forward(input)

    model = Looking(12, 5)
    step = fusedmlp.TrainStep(model, CROSS_ENTROPY, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = images()
    before = x.clone(), y.clone()
    step.epoch(x, y, 6)
    assert len(places) == 1
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_is_named_with_its_step(value: float) -> None:
    model = nn.Linear(12, 1)
    with torch.no_grad():
        model.weight.fill_(1)
    step = fusedmlp.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.0))
    x, y = torch.ones(12, 12), torch.zeros(12, 1)
    bad = int(torch.randperm(12, generator=seeded(3))[7])
    y[bad] = value
    with pytest.warns(
        RuntimeWarning, match=f"The loss is {value} at step 3 of this epoch, of 0 to 5"
    ) as caught:
        losses = step.epoch(x, y, 2, seeded(3))
    assert caught[0].filename == __file__
    assert losses.isfinite().tolist() == [True] * 3 + [False] * 3  # an update of 0 times NaN is NaN
    with torch.no_grad():
        model.weight.fill_(1)
        model.bias.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step.epoch(x, torch.zeros(12, 1), 2)


def test_accumulation_goes_on_from_epoch_to_epoch() -> None:
    """With 5 batches an epoch and 2 a step, the third step takes one batch of each epoch."""
    twins = Twins(mlp(widths=(12, 9, 5)), OPTIMIZERS["Adam"], accumulate=2)
    x, y = images()
    twins.step.epoch(x, y, 4, seeded(1))
    twins.step.epoch(x, y, 4, seeded(2))
    scaled = x.flatten(1).double() / 255
    order = [torch.randperm(20, generator=seeded(seed)).split(4) for seed in (1, 2)]
    for i, rows in enumerate([*order[0], *order[1]]):
        if i % 2 == 0:
            twins.twins.zero_grad()
        (CROSS_ENTROPY(twins.twin(scaled[rows]), y[rows]) / 2).backward()
        if i % 2 == 1:
            twins.twins.step()
    twins.assert_same()


def test_arguments_that_do_not_fit() -> None:
    step = Twins(mlp(widths=(12, 9, 5)), OPTIMIZERS["SGD"]).step
    x, y = images()
    with pytest.raises(ValueError, match="20 images, but 19 labels"):
        step.epoch(x, y[:19], 6)
    with pytest.raises(ValueError, match="batch_size"):
        step.epoch(x, y, 0)
    assert len(step.epoch(x[:0], y[:0], 6)) == 0
