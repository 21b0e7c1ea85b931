"""Run a chain on PyTorch's operators, with oneDNN's float32 product where it is faster than MKL's.

PyTorch's float32 product is MKL's, which does not use AVX-512 on AMD's CPUs. oneDNN's does, and is 1.15 to
2.6 times as fast within the limits below, on one thread of an AMD EPYC (Zen 5, torch 2.14.1). On Intel's CPUs
it is 0.85 to 1.2 times as fast, and not used. oneDNN's product has no gradient.

The ReLU is PyTorch's, in place, because oneDNN's ReLU turns NaN into 0. For this reason oneDNN's fused
Linear+ReLU for bfloat16, which is 1.02 to 1.3 times as fast there, is not used.
"""

import functools
import pathlib

import torch
from torch import is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import functional as F

from fusedmlp.dispatch import reference
from fusedmlp.dispatch.backend_choice import Biases, Weights, chosen
from fusedmlp.dispatch.reference import relu_forward, watched
from fusedmlp.torch_tools.patched import why_patched

_Tensor, _tracing_state = torch.Tensor, torch._C._get_tracing_state  # bound once: small calls count
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_LEAST_PRODUCTS = 2_000_000  # multiplications per thread: below, its 10 us a call are more than it saves
_LEAST_ROWS = 8  # with fewer, both wait for the weight to come from memory
_LEAST_INPUTS = 2048  # with fewer, nothing else is checked: at batch 1 that would be a tenth of the call
# oneDNN adds up longer runs of terms than MKL: its RMS error is 1.6 times MKL's for 1024 terms, 2.2 for 2048.
MOST_TERMS = 1024


def mlp_forward(x: torch.Tensor, weights: Weights, biases: Biases, final_relu: bool) -> torch.Tensor:
    """``x (..., K)`` through each ``weight (N, K)``, with a ReLU between the layers: ``(..., N)``."""
    last = len(weights) - 1
    # torch.jit.trace compares what it traced with and without gradients, down to the lines of the source.
    if is_grad_enabled() or is_compiling() or _tracing_state() is not None:
        return reference.mlp_forward(x, weights, biases, final_relu, last)[0]
    for i, weight in enumerate(weights):
        x = linear_forward(x, weight, biases[i], final_relu or i < last)
    return x


def linear_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool
) -> torch.Tensor:
    """``x (..., K) @ weight.T (K, N) + bias (N,)``, then ReLU if asked: ``(..., N)``."""
    # The cheapest checks of why_not come first, for small calls. Under a tracer no size may be read.
    if (
        is_grad_enabled()
        or is_compiling()
        or _tracing_state() is not None
        or type(x) is not _Tensor
        or x.numel() < _LEAST_INPUTS
        or x.dtype is not torch.float32
        or why_not(x, weight, bias) is not None
    ):
        y = F.linear(x, weight, bias)
        return relu_forward(y, not watched()) if relu else y
    y = product(x, weight, bias)
    return y.relu_() if relu else y


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x (..., K) @ weight.T (K, N) + bias (N,)``. Call it without grad mode: the result has no gradient."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y


def why_not(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """None if oneDNN computes this layer, else the reason against it."""
    if is_compiling():
        return "torch.compile has a product of its own."
    if _tracing_state() is not None:
        return "This call is being traced by torch.jit."
    if is_grad_enabled():
        return "Grad mode is on, and oneDNN's product has no gradient."
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if type(x) is not torch.Tensor or not all(type(t) in _PLAIN for t in tensors):
        return "A tensor is not a plain torch.Tensor."
    shape = weight.shape
    if (reason := why_not_here()) is not None:
        return reason
    columns = x.shape[-1] if x.dim() else 0
    if len(shape) != 2 or columns != shape[1] or not (bias is None or bias.shape == shape[:1]):
        return "The shapes do not fit."
    if columns > MOST_TERMS:
        return f"In sums of more than {MOST_TERMS} terms oneDNN's error is larger than MKL's."
    if x.numel() < max(_LEAST_INPUTS, _LEAST_ROWS * columns) or not pays(x.numel() * shape[0], columns):
        return "The product is too little to pay for the call."
    if not all(t.dtype is torch.float32 and t.is_cpu and t.layout is torch.strided for t in tensors):
        return "A tensor is not float32 on the CPU."
    if not all(t.is_contiguous() and not t.is_neg() for t in tensors):
        return "A tensor is not contiguous."
    if torch.is_autocast_enabled("cpu"):
        return "Autocast is on, and keeps the weights that it has cast."
    if (reason := why_switched_off() or why_patched()) is not None:
        return reason
    if watched() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "A mode or a transform is active."
    return None


def why_switched_off() -> str | None:
    """The reason against oneDNN in the caller's settings, or None."""
    if chosen.backend == "torch":
        return "The caller chose backend('torch')."
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if not torch._C._get_mkldnn_enabled() or matmul.fp32_precision not in ("none", "ieee"):
        return "The settings of torch.backends.mkldnn ask for something else."
    return None


def pays(multiplications: int, terms: int) -> bool:
    """True if oneDNN's product is faster and accurate for these numbers of multiplications and of terms."""
    return multiplications >= _LEAST_PRODUCTS * torch.get_num_threads() and terms <= MOST_TERMS


@functools.cache
def why_not_here() -> str | None:
    """The reason against oneDNN on this CPU and in this PyTorch, or None."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return "This PyTorch has no choice between MKL and oneDNN."
    if not (_is_zen_5() and torch.backends.cpu.get_cpu_capability() == "AVX512"):
        return "On this CPU oneDNN's product is not known to be faster."
    return None if _is_right() else "This PyTorch's oneDNN did not give the right values."


def _is_zen_5() -> bool:
    """True on Zen 5 or newer, AMD's first CPUs with full-width AVX-512 units."""
    try:
        about = pathlib.Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:  # not Linux
        return False
    lines = (line.partition(":") for line in about.splitlines())
    cpu = {name.strip(): value.strip() for name, _, value in lines}
    return cpu.get("vendor_id") == "AuthenticAMD" and int(cpu.get("cpu family", 0)) >= 26


def _is_right() -> bool:
    """True if the operator, which is private to PyTorch, still computes the product."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((2, 9, 100), (17, 100), (17,)))
    x[0, 0, 0], x[0, 1, 1], x[0, 2, 2] = torch.nan, torch.inf, -torch.inf
    try:
        with torch.no_grad():
            for b in (bias, None):
                exact = F.linear(x.double(), weight.double(), None if b is None else b.double()).float()
                torch.testing.assert_close(product(x, weight, b), exact, rtol=1e-5, atol=1e-4, equal_nan=True)
    except (AttributeError, RuntimeError, TypeError, AssertionError):
        return False
    return True
