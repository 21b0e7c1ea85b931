"""The ladder and the race of train_mnist.py: where each factor of the speed comes from, and where it ends."""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mnist_data import Mnist
from tqdm import tqdm
from trainer import Trainer, normalized, say, steps_per_epoch, stop, warm_up

import fusedmlp

GOAL = 0.98  # of a race

Row = dict[str, Any]
Keep = Callable[[list[Row]], None]  # writes what there is so far


class Rung(NamedTuple):
    name: str
    trainer: Trainer
    files: Path | None = None
    starts_at: float = 0.0  # seconds that compiling and capturing took


def ladder(args: argparse.Namespace, data: Mnist, keep: Keep = lambda rows: None) -> list[Row]:
    """Every rung trains from the same parameters on the same batches; the rungs' epochs alternate.

    However it ends, the table shows the rungs that have trained for an epoch at least.
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
        with tqdm(
            total=args.epochs * len(ways) * steps_per_epoch(args, images), unit="step", leave=False
        ) as bar:
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
        f"From the first row to TrainStep.epoch it is a factor of {first / last:.1f}: {first / second:.1f}"
        f" by the loader, which plain PyTorch can drop too, and {second / last:.1f} on the same data."
    )
    say("first: a few steps on a network thrown away, with what they compile or capture; in no other column.")
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
            lines.append("beside it, on the preloaded data:")
        band = f"[{min(row['seconds']):.3f}, {max(row['seconds']):.3f}]"
        first = f"{row['first_steps']:.2f}" if row["first_steps"] else "-"
        lines.append(
            f"{row['name']:27}{row['median']:8.3f} {band:>16}{row['accuracy']:10.2%}"
            f"{rows[0]['median'] / row['median']:9.2f}x{first:>8}"
        )
    return "\n".join(lines)


def race(args: argparse.Namespace, data: Mnist, keep: Keep = lambda rows: None) -> list[Row]:
    """The whole schedule, once for each seed; what it took, and whether the goal was reached."""
    images, labels, test_images = (
        normalized(data.train_images),
        data.train_labels,
        normalized(data.test_images),
    )
    first = warm_up(Trainer(fusedmlp.nn, args, args.mode), images, labels)
    seed, rows = args.seed, list[Row]()
    try:
        with tqdm(
            total=args.seeds * args.epochs * steps_per_epoch(args, images), unit="step", leave=False
        ) as bar:
            for number in range(args.seeds):
                args.seed = seed + 1000 * number  # the shuffles of an epoch take the numbers in between
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
    say(f"not counted: {first:.3f} s of first steps with what they compile or capture, data, and the test")
    if statistics.median(row["accuracy"] for row in rows) < GOAL:
        stop(f"The median test accuracy is below the goal of {GOAL:.0%}.")
    return rows


def _outcome(args: argparse.Namespace, rows: list[Row]) -> str:
    seconds, accuracies = ([row[key] for row in rows] for key in ("seconds", "accuracy"))
    reached = sum(accuracy >= GOAL for accuracy in accuracies)
    lines = [
        f"training of {args.epochs} epochs, n = {len(rows)}; reached {GOAL:.0%}: {reached} of {len(rows)}"
    ]
    for name, values, form in (("seconds", seconds, ".3f"), ("test accuracy", accuracies, ".2%")):
        middle, low, high = (format(f(values), form) for f in (statistics.median, min, max))
        lines.append(f"{name:14} median {middle}, from {low} to {high}")
    return "\n".join(lines)


def log(path: Path, header: str, args: argparse.Namespace, rows: list[Row]) -> None:
    """What ran, with everything that it was told, and what came out: the whole file, or the one before."""
    settings = {
        name: value if isinstance(value, (int, float, list)) or value is None else str(value)
        for name, value in vars(args).items()
    }
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(
            json.dumps({"ran_on": header, "settings": settings, "results": rows}, indent=1) + "\n"
        )
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
