"""What is here, what runs for a given MLP and why, and is it right: ``python -m fusedmlp``."""

import argparse
import contextlib
import importlib.metadata
import platform
import re

import torch

import fusedmlp
from fusedmlp import _dispatch, _tune, nn
from fusedmlp.functional import why_not_fused

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def versions() -> str:
    triton = importlib.metadata.version("triton") if _dispatch.has_triton() else "absent"
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
        "run, else on PyTorch's operators. The exit status is 0 if they are right, 1 if not.",
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
    subparsers = parser.add_subparsers(title="or", metavar="tune")
    _tune.add_parser(subparsers, DTYPES)
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

    print(versions())
    print(devices())
    print()
    torch.manual_seed(0)
    model = nn.MLP(widths[0], widths[1:-1], widths[-1], device=device, dtype=dtype)
    x = torch.randn(options.batch, widths[0], device=device, dtype=dtype)
    print(fusedmlp.explain(model, x))
    with fusedmlp.backend("triton"):
        possible = why_not_fused(probe, probe) is None
    where = "on the Triton kernels" if possible else "on PyTorch's operators, as the kernels cannot run here"
    print(f"\nIs it right {where}?\n")
    with fusedmlp.backend("triton") if possible else contextlib.nullcontext():
        return 0 if fusedmlp.verify(model, x) else 1


if __name__ == "__main__":
    raise SystemExit(main())
