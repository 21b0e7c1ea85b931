"""``python -m benchmarks.same_losses``: how far TrainStep's losses are from the plain loop's, on a CPU.

float32 sums in another order differ in their last bits. A unit that close to its ReLU's threshold then
switches, and the next steps enlarge the difference. PyTorch's own sums change with the number of threads, so
the plain loop with two threads shows how large a difference is normal.
"""

import argparse
import statistics

import torch
from torch import nn

import fusedmlp
from benchmarks.cases import network

WIDTHS, BATCH, STEPS, IMAGES = (784, 256, 128, 128, 10), 64, 200, 8192
OPTIMIZERS = {"SGD": {"lr": 0.1}, "SGD, momentum": {"lr": 0.02, "momentum": 0.9}}


def losses(seed: int, options: dict[str, float], ours: bool, threads: int) -> torch.Tensor:
    """The losses of a network that learns from random images and the classes a fixed network gives them."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    x = torch.randn(IMAGES, WIDTHS[0]) * (torch.rand(WIDTHS[0]) < 0.3)
    y = (torch.relu(x[:, :64] @ torch.randn(64, 32)) @ torch.randn(32, WIDTHS[-1])).argmax(1)
    model, loss_fn = network(WIDTHS), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), **options)  # type: ignore[arg-type]
    step = fusedmlp.TrainStep(model, loss_fn, optimizer)
    found = []
    for rows in torch.randint(IMAGES, (STEPS, BATCH)):
        if ours:
            found.append(step(x[rows], y[rows]))
            continue
        optimizer.zero_grad()
        loss = loss_fn(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="runs (default: %(default)s)")
    seeds = range(parser.parse_args().seeds)
    print(f"largest relative difference over {STEPS} steps of {BATCH} rows, {len(seeds)} seeds:")
    print(f"{'':34}{'median':>9}{'largest':>9}{'over 1e-5':>11}")
    for name, options in OPTIMIZERS.items():
        eager = [losses(seed, options, False, 1) for seed in seeds]
        for what, ours, threads in (("TrainStep, 1 thread", True, 1), ("the loop, 2 threads", False, 2)):
            apart = [
                ((losses(seed, options, ours, threads) - eager[seed]).abs() / eager[seed]).max().item()
                for seed in seeds
            ]
            much = f"{sum(each > 1e-5 for each in apart)} of {len(seeds)}"
            print(f"{name + ': ' + what:34}{statistics.median(apart):9.1e}{max(apart):9.1e}{much:>11}")
    print("against the loop with 1 thread")


if __name__ == "__main__":
    main()
