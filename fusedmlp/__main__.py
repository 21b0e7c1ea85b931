"""What is here, what runs for a given MLP and why, and is it right: ``python -m fusedmlp``."""

import argparse
import contextlib
import copy
import importlib.metadata
import pathlib
import platform
import re
import textwrap

import torch

import fusedmlp
from fusedmlp import nn
from fusedmlp.dispatch import predicate
from fusedmlp.functional import why_not_fused
from fusedmlp.inspection import problem_report
from fusedmlp.torch_tools.accuracy import compare
from fusedmlp.tuning import tune

STEPS = 6  # on a GPU other models than MLPs are captured in a CUDA graph at the fourth

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def versions() -> str:
    triton = importlib.metadata.version("triton") if predicate.has_triton() else "absent"
    return (
        f"fusedmlp {fusedmlp.__version__}, torch {torch.__version__}, triton {triton}, "
        f"Python {platform.python_version()}"
    )


def devices() -> str:
    if not torch.cuda.is_available():
        return f"no CUDA device; CPU with {torch.get_num_threads()} threads for torch"
    lines = []
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        lines.append(
            f"cuda:{i} {card.name}, compute capability {card.major}.{card.minor}, "
            f"{card.multi_processor_count} multiprocessors, {card.total_memory / 2**30:.0f} GiB"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fusedmlp",
        description="Say what is installed; which path runs for an MLP of the given widths, and why; and "
        "whether its output and gradients are right against float64, on the Triton kernels wherever they can "
        "run, else on PyTorch's operators; and whether TrainStep trains it as PyTorch's loop does. The exit "
        "status is 0 if all of it is right, 1 if not.",
        epilog="example: python -m fusedmlp --mlp 784,256,128,10 --batch 512 --dtype bf16. Without a GPU, "
        "TRITON_INTERPRET=1 runs the kernels in Triton's interpreter: take small widths, it is slow.",
    )
    parser.add_argument(
        "--mlp",
        nargs="+",
        default=["784,256,128,10"],
        metavar="WIDTHS",
        help="in, hidden ..., out, with commas or spaces between (default: 784,256,128,10)",
    )
    parser.add_argument("--batch", type=int, default=128, help="rows of the input (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        metavar="DTYPE",
        help="fp32, bf16 or fp16 (default: fp32)",
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--report",
        type=pathlib.Path,
        metavar="FILE",
        help="write all of it to FILE, with versions, driver, settings and the traceback of whatever fails: "
        "what to attach where you report a problem",
    )
    subparsers = parser.add_subparsers(title="or", metavar="tune")
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
        probe = torch.ones(1, 1, device=device, dtype=dtype)
        probe.cpu()  # whether there is such a device, and it holds numbers
    except (RuntimeError, AssertionError, NotImplementedError) as refusal:
        parser.error(f"--device {options.device} cannot be used: {str(refusal).splitlines()[0]}")

    if options.report is None:
        return check(widths, options.batch, device, dtype)
    try:
        return problem_report.write(options.report, lambda: check(widths, options.batch, device, dtype))
    except OSError as refusal:
        parser.error(f"--report {options.report} cannot be written: {refusal.strerror}")


def check(widths: list[int], batch: int, device: torch.device, dtype: torch.dtype) -> int:
    """Print what is here, what runs for this MLP and whether it is right; 0 if it is, else 1."""
    print(versions())
    print(devices())
    print()
    torch.manual_seed(0)
    model = nn.MLP(widths[0], widths[1:-1], widths[-1], device=device, dtype=dtype)
    x = torch.randn(batch, widths[0], device=device, dtype=dtype)
    print(fusedmlp.explain(model, x))
    with fusedmlp.backend("triton"):
        possible = why_not_fused(x[:1, :1], x[:1, :1]) is None
    where = "on the Triton kernels" if possible else "on PyTorch's operators, as the kernels cannot run here"
    print(f"\nIs it right {where}?\n")
    with fusedmlp.backend("triton") if possible else contextlib.nullcontext():
        if not fusedmlp.verify(model, x):
            return 1
    print("\nAnd trained by TrainStep?\n")
    return 0 if trains(model, x) else 1


def trains(model: nn.MLP, x: torch.Tensor) -> bool:
    """Train copies of the model by TrainStep and by PyTorch's loop, and print whether the losses agree."""
    y = torch.randn_like(model(x).detach())
    losses, how = [], ""
    for dtype, by_step in ((x.dtype, True), (x.dtype, False), (torch.float64, False)):
        copied = copy.deepcopy(model).to(dtype)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.01, momentum=0.9)
        step = fusedmlp.TrainStep(copied, torch.nn.functional.mse_loss, optimizer)
        if by_step:
            each = [step(x, y) for _ in range(STEPS)]
            how = step.explain(x, y)
        else:
            with fusedmlp.backend("torch"):
                each = [_loop(copied, optimizer, x.to(dtype), y.to(dtype)) for _ in range(STEPS)]
        losses.append(torch.stack(each))
    ours, torchs, exact = losses
    found = compare(ours, torchs, exact, floor=8 * torch.finfo(x.dtype).eps)
    verdict = "right" if found.problem is None else f"WRONG, {found.problem}"
    errors = f"{found.errors[0]:.2g} off float64's, PyTorch's loop's {found.torchs_errors[0]:.2g}"
    for line in (f"{verdict}: the losses of {STEPS} steps are at most {errors}.", *how.splitlines()):
        print(textwrap.fill(line, 80))
    return found.problem is None


def _loop(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


if __name__ == "__main__":
    raise SystemExit(main())
