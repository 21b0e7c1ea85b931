"""The command line of train_mnist.py. Whatever can be refused is refused here, before any training."""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch
from mnist_data import DEFAULT_DATA_DIR

LEARNING_RATES = {"sgd": 0.1, "adam": 0.001}
DTYPES = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# 98 % in few epochs: found for a network of the default widths, and confirmed with other seeds.
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
    add, default = parser.add_argument, "(default: %(default)s)"
    add(
        "--ladder",
        action="store_true",
        help="time each step from a DataLoader loop to TrainStep.epoch, and PyTorch at its best",
    )
    add(
        "--race",
        action="store_true",
        help="train to 98%% with several seeds, the fastest way; its own defaults: "
        + ", ".join(f"{k} {v}" for k, v in RACE.items()),
    )
    add("--seeds", type=_positive, default=5, metavar="N", help=f"how many, in a --race {default}")
    add(
        "--log",
        type=_output,
        metavar="FILE.json",
        help="write configuration and results of --ladder or --race",
    )
    add(
        "--mode",
        choices=["module", "step", "epoch"],
        default=None,
        help="what of fusedmlp trains: its layers in the same loop, TrainStep for each batch, or "
        "TrainStep.epoch (default: epoch; module under torchrun and in float16)",
    )
    add(
        "--threads",
        type=_positive,
        metavar="N",
        help="for PyTorch's operators on a CPU (default: PyTorch's own choice, "
        f"{torch.get_num_threads()} here)",
    )
    add("--impl", choices=["both", "torch", "fusedmlp"], default="both", help=f"what to train {default}")
    add(
        "--hidden",
        type=_positive,
        nargs="+",
        default=[256, 128, 128],
        metavar="N",
        help="widths of the hidden layers (default: 256 128 128)",
    )
    add(
        "--batch-size",
        type=_positive,
        default=128,
        metavar="N",
        help=f"samples per step, of all processes together {default}",
    )
    add("--epochs", type=_positive, default=5, metavar="N", help=f"passes over the training images {default}")
    add(
        "--lr",
        type=_rate,
        help="learning rate at the start; it falls linearly (default: 0.1 with sgd, 0.001 with adam)",
    )
    add("--optimizer", choices=list(LEARNING_RATES), default="adam", help=f"how to step {default}")
    add(
        "--device",
        type=_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help=f"cpu, cuda, cuda:1, ...; under torchrun each process takes its own GPU {default}",
    )
    add(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="of the products; the parameters that are trained stay float32. bf16 is short for bfloat16 "
        f"{default}",
    )
    add("--seed", type=_seed, default=0, help=f"of the parameters and the shuffling {default}")
    add(
        "--data-dir",
        type=Path,
        default=DEFAULT_DATA_DIR,
        metavar="DIR",
        help=f"MNIST is unpacked here, once {default}",
    )
    add(
        "--plot",
        type=_png,
        metavar="FILE.png",
        help="draw loss curves, and test digits as the network reads them",
    )
    add(
        "--save",
        type=_output,
        metavar="FILE",
        help="write the parameters after each epoch (those of fusedmlp, when both train)",
    )
    add("--load", type=Path, metavar="FILE", help="start from what --save wrote, with either implementation")
    if "--race" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**RACE)
    args = parser.parse_args(argv)
    args.dtype = DTYPES[args.dtype]
    if args.ladder and args.race:
        parser.error("--ladder and --race are two things")
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
        torch.zeros(1, device=device).item()  # whether it is really there
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
