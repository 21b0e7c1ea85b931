"""Train one network on MNIST twice, with torch.nn and with fusedmlp.nn, and compare speed and accuracy.

Both start from the same parameters and see the same batches in the same order. Their epochs alternate, so
that whatever else the machine is doing slows both alike, and the table reports the median epoch.
"""

import argparse
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mnist_data import load_mnist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from train_mnist_options import parse_arguments

import fusedmlp
from fusedmlp.functional import why_not_fused

IMPLEMENTATIONS: dict[str, ModuleType] = {"torch": torch.nn, "fusedmlp": fusedmlp.nn}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
ACCURACY_BAR = 0.97


def build(nn: ModuleType, hidden: list[int]) -> torch.nn.Sequential:
    """The network. Which `nn` builds it is the only difference between the two."""
    layers: list[torch.nn.Module] = []
    for inputs, outputs in zip([784, *hidden], hidden, strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    network: torch.nn.Sequential = nn.Sequential(*layers, nn.Linear(hidden[-1], 10))
    return network


class Trainer:
    """One network, its optimizer, and what was measured while it trained."""

    def __init__(self, nn: ModuleType, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.network = build(nn, args.hidden)
        if args.load:
            load(args.load, self.network)
        self.network.to(args.device, args.dtype)
        self.model: torch.nn.Module = self.network
        self.rank, self.processes = 0, 1
        if dist.is_initialized():
            self.model = DistributedDataParallel(self.network)
            self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.parameters: list[torch.Tensor] = list(self.network.parameters())
        # An update is often smaller than half a rounding step of bfloat16 or float16 and would vanish in it:
        # the optimizer works on float32 copies.
        self.masters = self.parameters
        if args.dtype != torch.float32:
            self.masters = [parameter.detach().float() for parameter in self.parameters]
        self.optimizer = OPTIMIZERS[args.optimizer](self.masters, lr=args.lr, fused=True)
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, total_iters=args.epochs)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def train_epoch(self, images: torch.Tensor, labels: torch.Tensor, bar: "tqdm[NoReturn]") -> None:
        start = self._clock()
        generator = torch.Generator().manual_seed(self.args.seed + len(self.seconds))
        batches = torch.randperm(len(images), generator=generator).split(self.args.batch_size)
        shares = [batch.tensor_split(self.processes)[self.rank] for batch in batches]
        mine, lengths = torch.cat(shares).to(images.device), [len(share) for share in shares]
        inputs, targets, losses = images[mine].split(lengths), labels[mine].split(lengths), []
        for x, y, batch in zip(inputs, targets, batches, strict=True):
            # DistributedDataParallel averages over the processes. Scaled like this, that is the mean over the
            # whole batch, also where the processes' shares of it differ in length.
            loss = F.cross_entropy(self.model(x).float(), y, reduction="sum") * (self.processes / len(batch))
            loss.backward()
            self._update()
            losses.append(loss.detach())
            bar.update()
        self.seconds.append(self._clock() - start)
        self.schedule.step()

        # Looked at once per epoch: reading a loss makes the CPU wait for the GPU.
        mean = torch.stack(losses) / self.processes
        if dist.is_initialized():
            dist.all_reduce(mean)
        self.losses += mean.tolist()
        if not mean.isfinite().all():
            stop(f"In epoch {len(self.seconds)} the loss stopped being a finite number: try a smaller --lr.")

    @torch.no_grad()
    def _update(self) -> None:
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
        self.optimizer.step()
        if self.masters is not self.parameters:
            torch._foreach_copy_(self.parameters, self.masters)
        self.model.zero_grad()

    def _clock(self) -> float:
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)
        return time.perf_counter()

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.network(images)
        return scores.argmax(1)


def train(args: argparse.Namespace) -> int:
    if args.plot:
        from plot_training import plot  # before the training: a missing matplotlib shall not cost a result

    data = load_mnist(args.data_dir, args.device)
    train_images, test_images = (
        ((images - 0.1307) / 0.3081).to(args.dtype) for images in (data.train_images, data.test_images)
    )
    names = list(IMPLEMENTATIONS) if args.impl == "both" else [args.impl]
    steps = math.ceil(len(train_images) / args.batch_size)
    say(environment(args))

    # On networks that are thrown away: compiles the kernels, with both lengths of batch that will occur.
    some = min(len(train_images), 3 * args.batch_size + len(train_images) % args.batch_size)
    for name in names:
        warm_up = Trainer(IMPLEMENTATIONS[name], args)
        warm_up.train_epoch(train_images[:some], data.train_labels[:some], tqdm(disable=True))

    trainers = {name: Trainer(IMPLEMENTATIONS[name], args) for name in names}
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
        say(what_ran(trainers["fusedmlp"]))
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


def what_ran(trainer: Trainer) -> str:
    """Which layers of the fused network run its kernels, and why the others do not."""
    layers = [layer for layer in trainer.network if isinstance(layer, torch.nn.Linear)]
    rows, reasons = math.ceil(trainer.args.batch_size / trainer.processes), []
    for layer in layers:
        x = layer.weight.new_empty(rows, layer.in_features)
        reasons.append(why_not_fused(x, layer.weight, layer.bias, relu=layer is not layers[-1]))
    kernels = reasons.count(None)
    others = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
    said = f"fusedmlp ran its Triton kernels in {kernels} of {len(layers)} layers"
    return f"{said}, PyTorch's own operators in the rest: {others}" if others else said


def environment(args: argparse.Namespace) -> str:
    """What this runs on, for whoever reads the figures later."""
    device = f"CPU with {torch.get_num_threads()} threads"
    if args.device.type == "cuda":
        device = f"{torch.cuda.get_device_name(args.device)}, CUDA {torch.version.cuda}"
    if dist.is_initialized():
        device = f"{dist.get_world_size()} processes, each on {device}"
    dtype, python = str(args.dtype).removeprefix("torch."), platform.python_version()
    return f"{device}, {dtype}, Python {python}, torch {torch.__version__}, fusedmlp {fusedmlp.__version__}"


def save(network: torch.nn.Module, path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")  # killed here, it leaves the old file whole
    try:
        torch.save(network.state_dict(), unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: Path, network: torch.nn.Module) -> None:
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        stop(f"{path} cannot be read: {error.strerror}.")
    except Exception as error:  # torch.load raises whatever the bytes of a damaged file lead it to
        stop(f"{path} is not a checkpoint of a network with these --hidden widths ({type(error).__name__}).")


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    if is_first():
        print(text, flush=True)


def stop(reason: str) -> NoReturn:
    raise SystemExit(reason if is_first() else 1)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(__doc__, argv)
    try:
        if dist.is_torchelastic_launched():
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
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
