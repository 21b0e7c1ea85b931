"""``python -m fusedmlp``: show what is installed, what runs for an MLP and why, and how accurate it is."""

import argparse
import contextlib
import copy
import importlib.metadata
import pathlib
import platform
import re

import torch
from torch.nn.functional import mse_loss

import fusedmlp
from fusedmlp import nn
from fusedmlp.functional import why_not_fused
from fusedmlp.inspection import problem_report
from fusedmlp.torch_tools import text
from fusedmlp.torch_tools.accuracy import compare
from fusedmlp.tuning import tune

STEPS = 6  # on a GPU the fourth step of a model that is no MLP is captured in a CUDA graph

SHORT = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = SHORT | {str(dtype).removeprefix("torch."): dtype for dtype in SHORT.values()}


def versions() -> str:
    found = [f"fusedmlp {fusedmlp.__version__}", f"torch {torch.__version__}"]
    for name in ("triton", "numpy", "torchvision", "platformdirs"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def devices() -> str:
    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    lines = [
        f"cuda:{i} {card.name}, compute capability {card.major}.{card.minor}, "
        f"{card.multi_processor_count} multiprocessors, {card.total_memory / 2**30:.0f} GiB"
        for i, card in enumerate(cards)
    ]
    return "\n".join(lines) or f"no CUDA device; CPU with {torch.get_num_threads()} threads for torch"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fusedmlp",
        description="Build an MLP of the given widths and print, for random input: the installed versions "
        "and GPUs; whether the MLP runs on the Triton kernels or on PyTorch's operators, and why; the error "
        "of its output and gradients against float64, beside PyTorch's own error; and whether TrainStep "
        "trains it as an ordinary PyTorch loop does. The exit status is 0 if all is accurate, otherwise 1.",
        epilog="Example: python -m fusedmlp --mlp 784,256,128,10 --batch 512 --dtype bf16. Without a GPU, "
        "TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, which is slow: choose small widths.",
    )
    mlp_help = (
        "features of the input, of each hidden layer and of the output, separated by commas or spaces "
        "(default: 784,256,128,10)"
    )
    parser.add_argument("--mlp", nargs="+", default=["784,256,128,10"], metavar="WIDTHS", help=mlp_help)
    parser.add_argument("--batch", type=int, default=128, help="rows of the input (default: %(default)s)")
    dtype_help = "fp32, bf16 or fp16 (default: %(default)s)"
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", metavar="DTYPE", help=dtype_help)
    parser.add_argument("--device", help="for example cuda:1 (default: cuda if there is a GPU, else cpu)")
    report_help = (
        "also write everything to FILE, with the driver, the settings and the traceback of an error: "
        "attach this file to a bug report"
    )
    parser.add_argument("--report", type=pathlib.Path, metavar="FILE", help=report_help)
    subparsers = parser.add_subparsers(title="other commands", metavar="tune")
    tune.add_parser(subparsers, DTYPES)
    options = parser.parse_args()
    if "run" in options:
        return int(options.run(options))
    try:
        widths = [int(width) for width in re.split("[, ]+", " ".join(options.mlp).strip(", "))]
    except ValueError:
        parser.error(f"--mlp takes whole numbers, got {' '.join(options.mlp)}")
    if len(widths) < 2 or min(widths) < 1 or options.batch < 1:
        parser.error("--mlp takes two widths or more, and every width and the batch are at least 1")
    dtype = DTYPES[options.dtype]
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.ones(1, device=device, dtype=dtype).cpu()  # raises if there is no such device, or it is "meta"
    except (RuntimeError, AssertionError, NotImplementedError) as refusal:
        parser.error(f"--device {options.device} cannot be used: {str(refusal).splitlines()[0]}")
    if options.report is None:
        return check(widths, options.batch, device, dtype)
    try:
        return problem_report.write(options.report, lambda: check(widths, options.batch, device, dtype))
    except OSError as refusal:
        parser.error(f"--report {options.report} cannot be written: {refusal.strerror}")


def check(widths: list[int], batch: int, device: torch.device, dtype: torch.dtype) -> int:
    """Print the installed versions, what runs for this MLP, and whether it is accurate.

    Returns the exit status: 0 if it is accurate, else 1.
    """
    print(f"{versions()}\n{devices()}\n")
    torch.manual_seed(0)
    model = nn.MLP(widths[0], widths[1:-1], widths[-1], device=device, dtype=dtype)
    x = torch.randn(batch, widths[0], device=device, dtype=dtype)
    print(fusedmlp.explain(model, x))
    with fusedmlp.backend("triton"):
        possible = why_not_fused(x[:1, :1], x[:1, :1]) is None
    where = "the Triton kernels" if possible else "PyTorch's operators, as the kernels cannot run here"
    print(f"\nAre its results accurate on {where}?\n")
    with fusedmlp.backend("triton") if possible else contextlib.nullcontext():
        if not fusedmlp.verify(model, x):
            return 1
    print("\nDoes TrainStep train it accurately?\n")
    return 0 if trains(model, x) else 1


def trains(model: nn.MLP, x: torch.Tensor) -> bool:
    """Train copies with TrainStep and with loops in x's dtype and in float64, and compare the losses."""
    y = torch.randn_like(model(x).detach())
    copied = copy.deepcopy(model)
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.01, momentum=0.9)
    step = fusedmlp.TrainStep(copied, mse_loss, optimizer)
    ours = torch.stack([step(x, y) for _ in range(STEPS)])
    with fusedmlp.backend("torch"):
        torchs, exact = (_losses_of_loop(model, x, y, dtype) for dtype in (x.dtype, torch.float64))
    found = compare(ours, torchs, exact, floor=8 * torch.finfo(x.dtype).eps)
    verdict = "right" if found.problem is None else f"WRONG, {found.problem}"
    errors = f"{found.errors[0]:.2g} from float64's, those of PyTorch's loop {found.torchs_errors[0]:.2g}"
    print(text.paragraph(f"{verdict}: the losses of {STEPS} steps differ by at most {errors}."))
    for line in step.explain(x, y).splitlines():
        print(text.paragraph(line))
    return found.problem is None


def _losses_of_loop(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The losses of an ordinary training loop on a copy in this dtype."""
    model, x, y = copy.deepcopy(model).to(dtype), x.to(dtype), y.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(mse_loss(model(x), y))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


if __name__ == "__main__":
    raise SystemExit(main())
