"""The command line of train_mnist.py. Wrong options are refused here, before any training."""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from mnist_data import DEFAULT_DATA_DIR

LEARNING_RATES = {"sgd": 0.1, "adam": 0.001}
DTYPES = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# These reach 98 % in few epochs with the default widths, and were confirmed with other seeds.
RACE = {"optimizer": "sgd", "lr": 0.3, "batch_size": 64, "epochs": 4}

EXAMPLES = """examples:
  python examples/train_mnist.py --plot mnist.png
  python examples/train_mnist.py --ladder --epochs 3
  python examples/train_mnist.py --race --seeds 10 --log race.json
  torchrun --nproc-per-node=2 examples/train_mnist.py --hidden 1024 1024 --batch-size 256
"""


def parse_arguments(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "(default: %(default)s)"

    def add(name: str, help: str, **options: Any) -> None:
        parser.add_argument(name, help=help, **options)

    ladder = "time each step from a DataLoader loop to TrainStep.epoch, and PyTorch's fastest ways"
    add("--ladder", ladder, action="store_true")
    race = ", ".join(f"{name} {value}" for name, value in RACE.items())
    race = f"train to 98%% with several seeds, the fastest way; its own defaults are {race}"
    add("--race", race, action="store_true")
    add("--seeds", f"number of seeds in a --race {default}", type=_positive, default=5, metavar="N")
    log = "write the settings and results of --ladder or --race"
    add("--log", log, type=_output, metavar="FILE.json")
    mode = (
        "how fusedmlp trains: its layers in a plain loop, TrainStep in the loop, or TrainStep.epoch "
        "(default: epoch; module under torchrun and in float16)"
    )
    add("--mode", mode, choices=["module", "step", "epoch"], default=None)
    threads = f"threads of PyTorch on a CPU (default: PyTorch's choice, {torch.get_num_threads()} here)"
    add("--threads", threads, type=_positive, metavar="N")
    add("--impl", f"what to train {default}", choices=["both", "torch", "fusedmlp"], default="both")
    hidden = "widths of the hidden layers (default: 256 128 128)"
    add("--hidden", hidden, type=_positive, nargs="+", default=[256, 128, 128], metavar="N")
    batch = f"samples per step, of all processes together {default}"
    add("--batch-size", batch, type=_positive, default=128, metavar="N")
    add("--epochs", f"passes over the training images {default}", type=_positive, default=5, metavar="N")
    add(
        "--lr",
        "first learning rate, which falls linearly (default: 0.1 with sgd, 0.001 with adam)",
        type=_rate,
    )
    add("--optimizer", f"the optimizer {default}", choices=list(LEARNING_RATES), default="adam")
    device = f"cpu, cuda, cuda:1, ...; under torchrun each process takes its own GPU {default}"
    add("--device", device, type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    dtype = f"dtype of the products; parameters stay float32; bf16 is short for bfloat16 {default}"
    add("--dtype", dtype, choices=list(DTYPES), default="float32")
    add("--seed", f"seed of the parameters and the shuffling {default}", type=_seed, default=0)
    folder = f"folder into which MNIST is unpacked, once {default}"
    add("--data-dir", folder, type=Path, default=DEFAULT_DATA_DIR, metavar="DIR")
    plot = "draw loss curves, and test digits with the network's answers"
    add("--plot", plot, type=_png, metavar="FILE.png")
    save = "write the parameters after each epoch (those of fusedmlp, when both train)"
    add("--save", save, type=_output, metavar="FILE")
    add("--load", "start from a file of --save, with either implementation", type=Path, metavar="FILE")
    if "--race" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**RACE)
    args = parser.parse_args(argv)
    args.dtype = DTYPES[args.dtype]
    if args.ladder and args.race:
        parser.error("--ladder and --race exclude each other")
    if args.log and not (args.ladder or args.race):
        parser.error("--log is for --ladder and --race")
    if args.mode in ("step", "epoch") and args.dtype is torch.float16:
        parser.error(f"--mode {args.mode} computes in float32 or bf16; float16 needs --mode module")
    args.mode = args.mode or ("module" if args.dtype is torch.float16 else "epoch")
    args.lr = LEARNING_RATES[args.optimizer] if args.lr is None else args.lr
    return args


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def _seed(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"{text} is not an integer from 0 to 2**32 - 1")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 <= rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number >= 0")
    return rate


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()  # fails if the device does not exist
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _output(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write into {path.parent}: {error.strerror}") from None
    return path


def _png(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png")
    return _output(text)
