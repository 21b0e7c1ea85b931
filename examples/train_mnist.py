"""Train one network on MNIST twice, with torch.nn and with fusedmlp.nn, and compare speed and accuracy.

Both start from the same parameters and see the same preloaded batches in the same order. torch trains in a
plain loop, fusedmlp with TrainStep.epoch (--mode changes that). Their epochs alternate, so other work on the
machine slows both alike, and the table shows the median epoch.

--ladder times each step from a DataLoader of pictures to TrainStep.epoch; --race trains to 98 %.
"""

import argparse
import math
import os
import platform
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from ladder import ladder, log, race
from mnist_data import load_mnist
from tqdm import tqdm
from train_mnist_options import parse_arguments
from trainer import Trainer, is_first, normalized, replacing, say, steps_per_epoch, stop, warm_up

import fusedmlp
from fusedmlp.functional import why_not_fused

IMPLEMENTATIONS: dict[str, ModuleType] = {"torch": torch.nn, "fusedmlp": fusedmlp.nn}
ACCURACY_BAR = 0.97


def train(args: argparse.Namespace) -> int:
    if args.plot:
        from plot_training import plot  # before the training, so a missing matplotlib is noticed at once

    data = load_mnist(args.data_dir, args.device)
    header = environment(args)
    say(header)
    if args.dtype is torch.bfloat16 and not has_bfloat16(args.device):
        say("This CPU has no bfloat16 units: TrainStep computes in float32, a plain loop is slow in bf16.")
    if args.ladder or args.race:

        def keep(rows: list[dict[str, Any]]) -> None:
            if args.log:
                log(args.log, header, args, rows)

        (ladder if args.ladder else race)(args, data, keep)
        return 0
    train_images, test_images = normalized(data.train_images), normalized(data.test_images)
    names = list(IMPLEMENTATIONS) if args.impl == "both" else [args.impl]
    steps = steps_per_epoch(args, train_images)

    modes = {"torch": "module", "fusedmlp": args.mode}
    for name in names:
        warm_up(Trainer(IMPLEMENTATIONS[name], args, modes[name]), train_images, data.train_labels)
    trainers = {name: Trainer(IMPLEMENTATIONS[name], args, modes[name]) for name in names}
    total = args.epochs * len(names) * steps
    with tqdm(total=total, unit="step", leave=False, disable=not is_first()) as bar:
        for epoch in range(args.epochs):
            for name in names if epoch % 2 == 0 else reversed(names):
                bar.set_description(f"{name}, epoch {epoch + 1} of {args.epochs}")
                trainers[name].train_epoch(train_images, data.train_labels, bar)
            if args.save and is_first():
                save(trainers[names[-1]].network, args.save)

    predictions = {name: trainer.predict(test_images) for name, trainer in trainers.items()}
    accuracies = {name: (p == data.test_labels).float().mean().item() for name, p in predictions.items()}
    say(table(trainers, accuracies, len(train_images)))
    if "fusedmlp" in trainers:
        say(what_ran(trainers["fusedmlp"], train_images, data.train_labels))
    if args.plot and is_first():
        curves = {name: trainer.losses for name, trainer in trainers.items()}
        plot(args.plot, curves, steps, data.test_images, data.test_labels, predictions[names[-1]])
    for name, accuracy in accuracies.items():
        if accuracy < ACCURACY_BAR:
            stop(f"The test accuracy of {name}, {accuracy:.2%}, is below the bar of {ACCURACY_BAR:.0%}.")
    return 0


def table(trainers: dict[str, Trainer], accuracies: dict[str, float], samples: int) -> str:
    seconds = {name: statistics.median(trainer.seconds) for name, trainer in trainers.items()}
    lines = [f"{'':10}{'s/epoch':>9}{'samples/s':>12}{'test accuracy':>16}{'speed-up':>11}"]
    for name, each in seconds.items():
        speed_up = f"{seconds['torch'] / each:.2f}x" if "torch" in seconds else "-"
        lines.append(f"{name:10}{each:9.3f}{samples / each:12,.0f}{accuracies[name]:16.2%}{speed_up:>11}")
    if len(trainers) > 1:
        plain, fused = (torch.tensor(trainer.losses) for trainer in trainers.values())
        difference = (plain - fused).abs().max()
        lines.append(f"largest difference between their {len(plain)} training losses: {difference:.2g}")
    return "\n".join(lines)


def what_ran(trainer: Trainer, images: torch.Tensor, labels: torch.Tensor) -> str:
    """How the fusedmlp network was trained: TrainStep's route, or which layers ran kernels, and why."""
    size = trainer.args.batch_size
    if trainer.mode != "module":
        what = {"step": "TrainStep", "epoch": "TrainStep.epoch"}[trainer.mode]
        route = trainer.step.explain(images[:size], labels[:size])
        return f"fusedmlp trained by {what}, torch by a plain loop, both on preloaded data. {route}"
    layers = [layer for layer in trainer.network if isinstance(layer, torch.nn.Linear)]
    rows, reasons = math.ceil(size / trainer.processes), []
    with torch.autocast(images.device.type, trainer.args.dtype, enabled=trainer.args.dtype != torch.float32):
        for layer in layers:
            x = layer.weight.new_empty(rows, layer.in_features)
            reasons.append(why_not_fused(x, layer.weight, layer.bias, relu=layer is not layers[-1]))
    kernels = reasons.count(None)
    others = " ".join(dict.fromkeys(reason for reason in reasons if reason))
    said = f"fusedmlp ran its Triton kernels in {kernels} of {len(layers)} layers"
    return f"{said}, PyTorch's own operators in the rest. {others}" if others else said


def environment(args: argparse.Namespace) -> str:
    """The device and the versions, as the first line of the output."""
    count, chose = torch.get_num_threads(), "chosen by --threads" if args.threads else "PyTorch's choice"
    device = f"CPU with {count} thread{'s' if count > 1 else ''} ({chose})"
    if args.device.type == "cuda":
        device = f"{torch.cuda.get_device_name(args.device)}, CUDA {torch.version.cuda}"
    if dist.is_initialized():
        device = f"{dist.get_world_size()} processes, each on {device}"
    dtype, python = str(args.dtype).removeprefix("torch."), platform.python_version()
    return f"{device}, {dtype}, Python {python}, torch {torch.__version__}, fusedmlp {fusedmlp.__version__}"


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 faster than in float32."""
    cpu = torch.cpu.get_capabilities()
    return device.type != "cpu" or bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


def save(network: torch.nn.Module, path: Path) -> None:
    with replacing(path) as unfinished:
        torch.save(network.state_dict(), unfinished)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(__doc__, argv)
    threads = torch.get_num_threads()
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        if dist.is_torchelastic_launched():
            if args.ladder or args.race:
                raise SystemExit("--ladder and --race run in one process: start them without torchrun.")
            args.mode = "module"  # TrainStep does not support several processes
            if args.device.type == "cuda":
                args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
        if args.device.type == "cuda":
            torch.cuda.set_device(args.device)
        return train(args)
    except KeyboardInterrupt:
        saved = f" {args.save} holds the last epoch that finished, if one did." if args.save else ""
        if is_first():
            print(f"Interrupted.{saved}", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
