"""Trainer: one network that learns MNIST in one of several ways, with its losses and times."""

import argparse
import contextlib
import math
import os
import textwrap
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST
from tqdm import tqdm

import fusedmlp

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
MEAN, STD = 0.1307, 0.3081  # mean and standard deviation of MNIST's pixels


def build(nn: ModuleType, hidden: list[int]) -> torch.nn.Sequential:
    """The network, from the layers of torch.nn or of fusedmlp.nn."""
    layers: list[torch.nn.Module] = []
    for inputs, outputs in zip([784, *hidden], hidden, strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    network: torch.nn.Sequential = nn.Sequential(*layers, nn.Linear(hidden[-1], 10))
    return network


class Trainer:
    """mode: "module" trains in a plain loop, "step" with TrainStep in it, "epoch" with TrainStep.epoch."""

    def __init__(
        self,
        nn: ModuleType,
        args: argparse.Namespace,
        mode: str = "module",
        fused_optimizer: bool = False,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(args.seed)
        self.args, self.mode = args, mode
        self.network = build(nn, args.hidden)
        if args.load:
            load(args.load, self.network)
        # Parameters stay float32 even if products are computed in bfloat16 or float16: in these an update
        # is often smaller than half a rounding step, and would be lost.
        self.network.to(args.device)
        self.model: torch.nn.Module = self.network
        self.rank, self.processes = 0, 1
        if dist.is_initialized():
            self.model = DistributedDataParallel(self.network)
            self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        if compiled:
            how = "reduce-overhead" if args.device.type == "cuda" else "default"  # uses CUDA graphs or not
            self.model = torch.compile(self.network, mode=how)  # type: ignore[assignment]
        options = {"fused": True} if fused_optimizer else {}
        self.optimizer = OPTIMIZERS[args.optimizer](self.network.parameters(), lr=args.lr, **options)
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, total_iters=args.epochs)
        low = args.dtype if args.dtype != torch.float32 else None
        self.scaler = torch.amp.GradScaler(args.device.type) if low is torch.float16 else None
        if mode != "module":
            self.step = fusedmlp.TrainStep(self.model, F.cross_entropy, self.optimizer, compute_dtype=low)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def train_epoch(
        self, images: torch.Tensor, labels: torch.Tensor, bar: "tqdm[NoReturn]", files: Path | None = None
    ) -> None:
        """Train on preloaded images or, if ``files`` is given, on the same images from a DataLoader."""
        start = self._clock()
        generator = torch.Generator(images.device).manual_seed(self.args.seed + len(self.seconds))
        if self.mode == "epoch":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a loss that is not finite is checked below
                means = self.step.epoch(images, labels, self.args.batch_size, generator)
            bar.update(len(means))
        else:
            order = torch.randperm(len(images), generator=generator, device=images.device)
            batches = self._preloaded(images, labels, order) if files is None else self._loaded(files, order)
            losses = []
            for x, y, share in batches:
                losses.append(self.step(x, y) if self.mode == "step" else self._plain_step(x, y, share))
                bar.update()
            means = torch.stack(losses) / self.processes
        self.seconds.append(self._clock() - start)
        self.schedule.step()

        # Losses are read once per epoch, because reading one makes the CPU wait for the GPU.
        if dist.is_initialized():
            dist.all_reduce(means)
        self.losses += means.tolist()
        if not means.isfinite().all():
            step = int(means.isfinite().int().argmin())
            value = means[step].item()
            where = f"In epoch {len(self.seconds)}, at step {step + 1} of {len(means)}"
            stop(f"{where}, the loss stopped being a finite number ({value}): try a smaller --lr.")

    def _preloaded(
        self, images: torch.Tensor, labels: torch.Tensor, order: torch.Tensor
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor, float]]:
        for batch in order.split(self.args.batch_size):
            mine = batch.tensor_split(self.processes)[self.rank]
            # DistributedDataParallel averages over the processes. This scale makes it the mean over the whole
            # batch, even if the processes' shares differ in length.
            yield images[mine], labels[mine], self.processes / len(batch)

    def _loaded(self, files: Path, order: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor, float]]:
        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
        data = MNIST(files, train=True, transform=transform)
        for x, y in DataLoader(data, self.args.batch_size, sampler=order.tolist()):
            yield x.flatten(1).to(self.args.device), y.to(self.args.device), 1 / len(x)

    def _plain_step(self, x: torch.Tensor, y: torch.Tensor, share: float) -> torch.Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(x.device.type, self.args.dtype, enabled=self.args.dtype != torch.float32):
            scores = self.model(x)
        loss = F.cross_entropy(scores.float(), y, reduction="sum") * share
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.detach()

    def _clock(self) -> float:
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)
        return time.perf_counter()

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.network(images)
        return scores.argmax(1)

    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        return (self.predict(images) == labels).float().mean().item()


def warm_up(trainer: Trainer, images: torch.Tensor, labels: torch.Tensor, files: Path | None = None) -> float:
    """Compile and capture for both batch sizes, with a trainer that is not used again; the seconds."""
    size = trainer.args.batch_size
    some = min(len(images), 3 * size + len(images) % size)
    if files is None:
        trainer.train_epoch(images[:some], labels[:some], tqdm(disable=True))
    return sum(trainer.seconds)


def normalized(images: torch.Tensor) -> torch.Tensor:
    return (images - MEAN) / STD


def steps_per_epoch(args: argparse.Namespace, images: torch.Tensor) -> int:
    steps: int = math.ceil(len(images) / args.batch_size)
    return steps


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which then replaces ``path``. A killed process leaves the old file whole."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: Path, network: torch.nn.Module) -> None:
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        stop(f"{path} cannot be read: {error.strerror}.")
    except Exception as error:  # torch.load raises all kinds of errors for a damaged file
        stop(f"{path} is not a checkpoint of a network with these --hidden widths ({type(error).__name__}).")


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    if is_first():
        for line in text.splitlines():
            print(textwrap.fill(line, 80), flush=True)


def stop(reason: str) -> NoReturn:
    raise SystemExit(reason if is_first() else 1)
