"""What is here, does it compute rightly, and what runs for a given MLP: ``python -m fusedmlp``."""

import argparse
import importlib.metadata
import platform
import textwrap

import torch

import fusedmlp
from fusedmlp import _dispatch, nn
from fusedmlp.functional import linear_relu, why_not_fused

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def worst_error(device: torch.device, dtype: torch.dtype, mode: _dispatch.Backend) -> float:
    """Largest error of a layer's output and gradients against float64, in units of PyTorch's own."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((127, 784), (10, 784), (10,), (127, 10))
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    def results(on: torch.device, dtype: torch.dtype, backend: _dispatch.Backend) -> list[torch.Tensor]:
        x, weight, bias, grad_output = (t.to(on, dtype, copy=True) for t in inputs)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        with fusedmlp.backend(backend):
            y = linear_relu(*leaves)
        gradients = torch.autograd.grad(y, leaves, grad_output)
        return [t.detach().cpu().double() for t in (y, *gradients)]

    exact = results(torch.device("cpu"), torch.float64, "torch")
    ratios = []
    for ours, torchs, right in zip(
        results(device, dtype, mode), results(device, dtype, "torch"), exact, strict=True
    ):
        floor = torch.finfo(torch.float32).eps * right.abs().max()
        ratios.append((ours - right).abs().max() / ((torchs - right).abs().max() + floor))
    return float(torch.stack(ratios).max())  # NaN, if there is one


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fusedmlp",
        description="Say what is installed, check a layer against float64, output and gradients, and explain "
        "what runs for an MLP of the given widths, and why.",
        epilog="example: python -m fusedmlp --mlp 256 256 256 10 --batch 65536 --dtype bfloat16",
    )
    parser.add_argument(
        "--mlp", type=int, nargs="+", default=[784, 256, 128, 10], metavar="WIDTH", help="in, hidden ..., out"
    )
    parser.add_argument("--batch", type=int, default=128, help="rows of the input (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    options = parser.parse_args()
    if len(options.mlp) < 2 or min(options.mlp) < 1 or options.batch < 1:
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
    with fusedmlp.backend("triton"):
        possible = why_not_fused(probe, probe) is None
    error = worst_error(device, dtype, "triton" if possible else "torch")
    what = "Triton kernels" if possible else "PyTorch's operators, as the kernels cannot run here"
    right = error <= 2
    check = f"self-check on {device}, {options.dtype}, {what}: worst error of the output and the gradients is"
    print(textwrap.fill(check, 80))
    print(f"{error:.2f} times PyTorch's own: {'right' if right else 'WRONG (2 is the most)'}")
    print()
    model = nn.MLP(options.mlp[0], options.mlp[1:-1], options.mlp[-1], device=device, dtype=dtype)
    print(fusedmlp.explain(model, torch.zeros(options.batch, options.mlp[0], device=device, dtype=dtype)))
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
