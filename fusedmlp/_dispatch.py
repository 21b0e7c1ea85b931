"""ONE predicate: which implementation runs for these tensors, and the reason in words.

The only module that imports ``fusedmlp.kernels``, and with it Triton, and only once kernels are to run.
"""

import contextlib
import functools
import importlib
import importlib.util
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Literal

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fusedmlp import _reference

Backend = Literal["auto", "triton", "torch"]

_BACKENDS = ("auto", "triton", "torch")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Rows or columns: the kernels count them in 32 bits, rounded up to whole tiles and parts, and offsets in 64.
_LARGEST = 2**31 - 2**20

# The conservative rule of "auto", until measurements replace it. A launch of a Triton kernel from Python
# costs 9 to 12 us of the CPU's time against about 5 for one of ATen's: below about 1 GFLOP that is more
# than fusing saves. Above N*K/(N+K) FLOP a byte a layer is limited by arithmetic (A100 156, H200 184), and
# there a product a few per cent slower than cuBLAS's costs more than fusing saves.
_LEAST_FLOPS = 1e9
_MOST_INTENSITY = 150


class _Chosen(threading.local):
    """What backend() chose in this thread. torch.compile cannot trace a ContextVar in torch 2.11."""

    backend: Backend = "auto"


_chosen = _Chosen()


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose what runs inside the ``with`` block, in this thread.

    - ``"auto"``, the default: the Triton kernels where they can run and should win, else PyTorch's operators;
    - ``"triton"``: the kernels, or a RuntimeError with the reason why they cannot run;
    - ``"torch"``: PyTorch's operators.

    The backward of a layer runs on what its forward ran on. Activation checkpointing runs the forward again
    during the backward, on a GPU in another thread: give it this context by its ``context_fn``. Code under
    ``torch.compile`` is the compiler's, whatever is chosen here. Raises ValueError for any other name.

    >>> with fusedmlp.backend("torch"):
    ...     y = model(x)
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {name!r}")
    before = _chosen.backend
    _chosen.backend = name
    try:
        yield
    finally:
        _chosen.backend = before


def forced() -> bool:
    """Whether ``backend("triton")`` is in force."""
    return _chosen.backend == "triton"


def surely_unfused(x: torch.Tensor) -> bool:
    """A quick sign that why_not_fused has a reason, for who needs no words: on a CPU every call counts."""
    return type(x) is torch.Tensor and x.is_cpu and _chosen.backend != "triton"


def why_not_fused(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, relu: bool = True
) -> str | None:
    """None if the Triton kernels run for this layer under the present settings, else the reason why not.

    x ``(..., in_features)``, weight ``(out_features, in_features)``, bias ``(out_features,)`` or None.
    Under ``backend("triton")`` a reason here is what the call raises.

    >>> fusedmlp.functional.why_not_fused(torch.randn(8, 4), torch.randn(2, 4))
    "x is on the cpu, and the kernels run on CUDA devices"
    """
    if torch.compiler.is_compiling():
        return "torch.compile is tracing, and fuses PyTorch's own operators itself"
    name = _chosen.backend
    if name == "torch":
        return "backend('torch') is in force"
    reason = _why_impossible(x, weight, bias)
    if reason is None and name == "auto":
        reason = _why_not_worth_it(x, weight, relu)
    return reason


def _why_impossible(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    # What every call on a CPU meets comes first, what costs most comes last.
    # torch.set_default_device() and `with torch.device(...)` are such a mode too, and change nothing here.
    # Before anything else is asked of a tensor: such a mode sees that as well.
    if torch._C._len_torch_function_stack() > 0 and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    ):
        return "a TorchFunctionMode is active, and sees PyTorch's own functions only"
    named = (("x", x), ("weight", weight)) if bias is None else (("x", x), ("weight", weight), ("bias", bias))
    for what, tensor in named:
        if type(tensor) not in _PLAIN:
            return f"{what} is a {type(tensor).__name__}, not a plain torch.Tensor"
    if not x.is_cuda and not _interpreted(x):
        return f"x is on the {x.device.type}, and the kernels run on CUDA devices"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    for what, tensor in named[1:]:
        if tensor.device != x.device:
            return f"{what} is on {tensor.device}, x on {x.device}"
        if tensor.dtype != x.dtype:
            return f"{what} is {tensor.dtype}, x {x.dtype}"
    if x.dtype not in _DTYPES:
        return f"there are kernels for float32, float16 and bfloat16, not for {x.dtype}"
    if not all(_is_plain_memory(tensor) for _, tensor in named):
        return "a tensor is sparse or nested, or a lazy conjugate or negative"
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return f"the shapes do not fit: x {tuple(x.shape)}, weight {tuple(weight.shape)}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"the shapes do not fit: bias {tuple(bias.shape)}, weight {tuple(weight.shape)}"
    if max(x.numel() // max(x.shape[-1], 1), *weight.shape) > _LARGEST:
        return f"a dimension is over {_LARGEST}"
    if not has_triton():
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "the kernels are made for NVIDIA GPUs"
    if x.is_cuda and _capability(x.device.index) < (8, 0):
        return f"compute capability {_capability(x.device.index)} is below 8.0"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on, and chooses the dtype operator by operator"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform (vmap, grad, jvp, ...) is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode is active, and sees PyTorch's own operators only"
    return None


def _why_not_worth_it(x: torch.Tensor, weight: torch.Tensor, relu: bool) -> str | None:
    N, K = weight.shape
    flops = 2 * x.numel() * N
    if not relu:
        return "a Linear without a ReLU leaves nothing to fuse"
    if flops < _LEAST_FLOPS:
        return f"{flops / 1e9:.2g} GFLOP is too little to pay for launching kernels from Python"
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "IEEE float32 is limited by arithmetic, where cuBLAS is trusted to be faster"
    if N * K / (N + K) > _MOST_INTENSITY:
        return f"a layer of {K} to {N} is limited by arithmetic, where cuBLAS is trusted to be faster"
    if kernels().interpreting():
        return "TRITON_INTERPRET is set, and Triton's interpreter runs only under backend('triton')"
    return None


def backward_operators(grad_output: torch.Tensor) -> ModuleType:
    """The room with relu_backward, grad_bias, grad_input, grad_weight for a layer whose forward was fused.

    With grad mode on (``create_graph=True``), under vmap (``is_grads_batched=True``), forward-mode
    differentiation or a compiler, and for a gradient that is not plain memory, only PyTorch's own operators
    are right.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or type(grad_output) not in _PLAIN
        or not _is_plain_memory(grad_output)
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(grad_output)
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return _reference
    return kernels()


def _is_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether shape and strides say where the values lie: not sparse, nested or lazily negated."""
    return (
        tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


@functools.cache
def kernels() -> ModuleType:
    return importlib.import_module("fusedmlp.kernels")


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted(x: torch.Tensor) -> bool:
    """Whether the kernels can run on x, a CPU tensor: in Triton's interpreter, where that was asked for."""
    return x.device.type == "cpu" and has_triton() and forced() and bool(kernels().interpreting())


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
