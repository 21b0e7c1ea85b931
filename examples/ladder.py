"""--ladder and --race of train_mnist.py: how much each step speeds up training, and the time to 98 %."""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mnist_data import Mnist
from tqdm import tqdm
from trainer import Trainer, normalized, replacing, say, steps_per_epoch, stop, warm_up

import fusedmlp

GOAL = 0.98  # the test accuracy that a race has to reach

Row = dict[str, Any]
Keep = Callable[[list[Row]], None]  # writes the rows so far


class Rung(NamedTuple):
    name: str
    trainer: Trainer
    files: Path | None = None
    starts_at: float = 0.0  # seconds of compiling and capturing


def ladder(args: argparse.Namespace, data: Mnist, keep: Keep = lambda rows: None) -> list[Row]:
    """Train every rung from the same parameters on the same batches; the rungs' epochs alternate.

    Even after an interrupt the table shows the rungs that have trained for at least one epoch.
    """
    images, labels = normalized(data.train_images), data.train_labels
    test_images = normalized(data.test_images)
    ways: list[tuple[str, dict[str, Any], Path | None]] = [
        ("DataLoader, PIL, ToTensor", {"nn": torch.nn}, args.data_dir),
        ("data preloaded", {"nn": torch.nn}, None),
        ("fusedmlp.nn", {"nn": fusedmlp.nn}, None),
        ("TrainStep", {"nn": fusedmlp.nn, "mode": "step"}, None),
        ("TrainStep.epoch", {"nn": fusedmlp.nn, "mode": "epoch"}, None),
        ("PyTorch, fused optimizer", {"nn": torch.nn, "fused_optimizer": True}, None),
        ("the same, torch.compile", {"nn": torch.nn, "fused_optimizer": True, "compiled": True}, None),
    ]
    rungs: list[Rung] = []
    rows: list[Row] = []
    try:
        total = args.epochs * len(ways) * steps_per_epoch(args, images)
        with tqdm(total=total, unit="step", leave=False) as bar:
            for epoch in range(args.epochs):
                for i in range(len(ways)) if epoch % 2 == 0 else reversed(range(len(ways))):
                    name, options, files = ways[i]
                    bar.set_description(f"{name}, epoch {epoch + 1} of {args.epochs}")
                    if epoch == 0:
                        took = warm_up(Trainer(args=args, **options), images, labels, files)
                        rungs.append(Rung(name, Trainer(args=args, **options), files, took))
                    rungs[i].trainer.train_epoch(images, labels, bar, files)
                    rows[i : i + 1] = [_row(rungs[i], test_images, data.test_labels)]
                    keep(rows)
    finally:
        if rows:
            say(_table(rows))
    first, second, last = (statistics.median(rungs[i].trainer.seconds) for i in (0, 1, 4))
    say(
        f"TrainStep.epoch is {first / last:.1f} times as fast as the first row: {first / second:.1f} times "
        "by dropping the loader, which plain PyTorch can drop too, and "
        f"{second / last:.1f} times on the same data."
    )
    say("first: seconds of a few steps that compile or capture, with another network; in no other column.")
    batch, targets = images[: args.batch_size], labels[: args.batch_size]
    say(f"TrainStep: {rungs[4].trainer.step.explain(batch, targets)}")
    return rows


def _row(rung: Rung, test_images: torch.Tensor, test_labels: torch.Tensor) -> Row:
    trainer = rung.trainer
    return {
        "name": rung.name,
        "seconds": trainer.seconds,
        "median": statistics.median(trainer.seconds),
        "first_steps": rung.starts_at,
        "accuracy": trainer.accuracy(test_images, test_labels),
        "last_loss": trainer.losses[-1],
    }


def _table(rows: list[Row]) -> str:
    lines = [f"{'':27}{'s/epoch':>8} {'[min, max]':>16}{'accuracy':>10}{'speed-up':>10}{'first':>8}"]
    for number, row in enumerate(rows):
        if number == 5:
            lines.append("for comparison, on the preloaded data:")
        band = f"[{min(row['seconds']):.3f}, {max(row['seconds']):.3f}]"
        first = f"{row['first_steps']:.2f}" if row["first_steps"] else "-"
        lines.append(
            f"{row['name']:27}{row['median']:8.3f} {band:>16}{row['accuracy']:10.2%}"
            f"{rows[0]['median'] / row['median']:9.2f}x{first:>8}"
        )
    return "\n".join(lines)


def race(args: argparse.Namespace, data: Mnist, keep: Keep = lambda rows: None) -> list[Row]:
    """Train with each seed: the time, and whether the test accuracy reaches the goal."""
    images, labels = normalized(data.train_images), data.train_labels
    test_images = normalized(data.test_images)
    first = warm_up(Trainer(fusedmlp.nn, args, args.mode), images, labels)
    seed, rows = args.seed, list[Row]()
    try:
        total = args.seeds * args.epochs * steps_per_epoch(args, images)
        with tqdm(total=total, unit="step", leave=False) as bar:
            for number in range(args.seeds):
                args.seed = seed + 1000 * number  # the epochs' shuffles use the numbers in between
                trainer = Trainer(fusedmlp.nn, args, args.mode)
                bar.set_description(f"seed {args.seed}")
                for _ in range(args.epochs):
                    trainer.train_epoch(images, labels, bar)
                accuracy = trainer.accuracy(test_images, data.test_labels)
                rows.append({"seed": args.seed, "seconds": sum(trainer.seconds), "accuracy": accuracy})
                keep(rows)
    finally:
        args.seed = seed
        if rows:
            say(_outcome(args, rows))
    say(f"not counted: {first:.3f} s of first steps that compile or capture, loading data, and the test")
    if statistics.median(row["accuracy"] for row in rows) < GOAL:
        stop(f"The median test accuracy is below the goal of {GOAL:.0%}.")
    return rows


def _outcome(args: argparse.Namespace, rows: list[Row]) -> str:
    seconds, accuracies = ([row[key] for row in rows] for key in ("seconds", "accuracy"))
    reached = sum(accuracy >= GOAL for accuracy in accuracies)
    count = len(rows)
    lines = [f"training of {args.epochs} epochs, n = {count}; reached {GOAL:.0%}: {reached} of {count}"]
    for name, values, form in (("seconds", seconds, ".3f"), ("test accuracy", accuracies, ".2%")):
        middle, low, high = (format(f(values), form) for f in (statistics.median, min, max))
        lines.append(f"{name:14} median {middle}, from {low} to {high}")
    return "\n".join(lines)


def log(path: Path, header: str, args: argparse.Namespace, rows: list[Row]) -> None:
    """Write the settings and the results."""
    settings = {
        name: value if isinstance(value, (int, float, list)) or value is None else str(value)
        for name, value in vars(args).items()
    }
    content = {"ran_on": header, "settings": settings, "results": rows}
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
