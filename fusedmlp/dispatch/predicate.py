"""ONE predicate: which implementation runs for these tensors, and the reason in words.

The only module that imports ``fusedmlp.kernels``, and with it Triton, and only once kernels are to run.
"""

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fusedmlp.dispatch import reference
from fusedmlp.dispatch.backend_choice import MEASURING, Run, chosen, forced
from fusedmlp.torch_tools.patched import why_patched
from fusedmlp.torch_tools.warn import warn

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Rows or columns: the kernels count them in 32 bits, rounded up to whole tiles and parts, and offsets in 64.
_LARGEST = 2**31 - 2**20

# The conservative rule of "auto", for what was not measured. A launch of a Triton kernel from Python
# costs 9 to 12 us of the CPU's time against about 5 for one of ATen's: below about 1 GFLOP that is more
# than fusing saves. Above N*K/(N+K) FLOP a byte a layer is limited by arithmetic (A100 156, H200 184), and
# there a product a few per cent slower than cuBLAS's costs more than fusing saves.
_LEAST_FLOPS = 1e9
_LEAST_GAIN = 0.98  # what was measured to take longer than this part of PyTorch's time may be noise
_MOST_INTENSITY = 150


# By name: small calls count.
_function_modes, _tracing_state = torch._C._len_torch_function_stack, torch._C._get_tracing_state


def record(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    final_relu: bool,
    reason: str | None,
) -> None:
    """Tell who listens, if there is somebody."""
    if chosen.note is not None:
        basis = _why_fused(x, weights, biases, final_relu) if reason is None else None
        chosen.note(Run(x, weights, biases, final_relu, reason, basis))


def surely_unfused(x: torch.Tensor) -> bool:
    """A quick sign that why_not_fused has a reason, for who needs no words: on a CPU every call counts."""
    return type(x) is torch.Tensor and x.is_cpu and chosen.quiet


def surely_too_little(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    """The same for a GPU, by the rule of "auto" where nothing was measured: that a launch costs more.

    Where the arithmetic takes next to no time, the 4 us of why_not_fused would be a third of eager's call.
    """
    if (
        not chosen.quiet
        or type(x) is not torch.Tensor
        or is_compiling()
        or _tracing_state() is not None  # which would note that a size was asked for
        or _function_modes() > 0
    ):
        return False
    try:
        products = 0
        for weight in weights:
            products += weight.numel()
        if 2 * x.numel() * products >= _LEAST_FLOPS * len(weights) * max(1, x.size(-1)):
            return False
    except (AttributeError, IndexError):  # no tensor, or of no dimension
        return False
    if not _may_have_kernels():
        return True
    return not kernels().table_of(x.device.index if x.is_cuda else None).stretches


def why_no_kernels(x: torch.Tensor) -> str | None:
    """None if kernels of any kind can run on x under the present settings, else the reason."""
    if chosen.backend == "torch":
        return "backend('torch') is in force"
    if type(x) not in _PLAIN:
        return f"x is a {type(x).__name__}, not a plain torch.Tensor"
    if not x.is_cuda and not _interpreted(x):
        return f"x is on the {x.device.type}, and the kernels run on CUDA devices"
    return _why_not_here(x.device.type, x.device.index) or (
        None if _is_plain_memory(x, False) else _NOT_PLAIN_MEMORY
    )


def left_to_compiler(x: torch.Tensor) -> bool:
    """Whether a compiler that is tracing shall see the modules one by one: nothing here will be fused."""
    return torch.compiler.is_compiling() and (_exporting() or surely_unfused(x))


def _exporting() -> bool:
    return bool(torch.compiler._is_exporting_flag)  # is_exporting() is always true while torch 2.11 compiles


def why_not_fused(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, relu: bool = True
) -> str | None:
    """None if the Triton kernels run for this layer under the present settings, else the reason why not.

    x ``(..., in_features)``, weight ``(out_features, in_features)``, bias ``(out_features,)`` or None.
    Under ``backend("triton")`` a reason here is what the call raises.

    >>> fusedmlp.functional.why_not_fused(torch.randn(8, 4), torch.randn(2, 4))
    "x is on the cpu, and the kernels run on CUDA devices"
    """
    return why_not_fused_mlp(x, [weight], [bias], final_relu=relu)


def why_not_fused_mlp(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    final_relu: bool = False,
) -> str | None:
    """The same for a chain of layers with a ReLU between them, the arguments those of :func:`mlp`.

    >>> layers = [torch.randn(3, 4), torch.randn(2, 3)]
    >>> fusedmlp.functional.why_not_fused_mlp(torch.randn(8, 4), layers, [None, None])
    "x is on the cpu, and the kernels run on CUDA devices"
    """
    name = chosen.backend
    if name == "torch":
        return "backend('torch') is in force"
    compiling = torch.compiler.is_compiling()
    reason = _why_impossible(x, weights, biases, compiling)
    if reason is None and name == "auto":
        reason = _why_closed(x.device.index) or _why_not_worth_it(x, weights, biases, final_relu, compiling)
    return reason


def _why_impossible(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    compiling: bool,
) -> str | None:
    # What every call on a CPU meets comes first, what costs most comes last.
    # torch.set_default_device() and `with torch.device(...)` are such a mode too, and change nothing here.
    # Before anything else is asked of a tensor: such a mode sees that as well.
    if torch._C._len_torch_function_stack() > 0 and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    ):
        return "a TorchFunctionMode is active, and sees PyTorch's own functions only"
    if type(x) not in _PLAIN:
        return f"x is a {type(x).__name__}, not a plain torch.Tensor"
    device = x.device
    if not x.is_cuda and not _interpreted(x):
        return f"x is on the {device.type}, and the kernels run on CUDA devices"
    if compiling and _exporting():
        return "torch.export is tracing, and what it exports is to run without this package"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    autocast = autocast_dtype(device.type)
    dtype = dtype_after_cast(x.dtype, autocast)
    if dtype not in _DTYPES:
        return f"there are kernels for float32, float16 and bfloat16, not for {dtype}"
    for optional, group in ((False, weights), (True, biases)):
        for tensor in group:
            if tensor is None:
                if not optional:
                    return "a weight is None"
                continue
            if type(tensor) not in _PLAIN:
                what = _name(tensor, weights, biases)
                return f"{what} is a {type(tensor).__name__}, not a plain torch.Tensor"
            if tensor.device != device:
                return f"{_name(tensor, weights, biases)} is on {tensor.device}, x on {device}"
            if tensor.dtype is not dtype and dtype_after_cast(tensor.dtype, autocast) is not dtype:
                return f"{_name(tensor, weights, biases)} is {tensor.dtype}, x {dtype}"
            # Inline: a chain has many tensors, and none of them is complex.
            if tensor.layout is not torch.strided or (
                not compiling and (tensor.is_nested or tensor.is_neg())
            ):
                return _NOT_PLAIN_MEMORY
    if not _is_plain_memory(x, compiling):
        return _NOT_PLAIN_MEMORY
    before, columns = x, x.shape[-1] if x.dim() else None
    for weight, bias in zip(weights, biases, strict=True):
        wrong = None
        shape = weight.shape
        if len(shape) != 2 or columns != shape[1]:
            wrong = before
        elif bias is not None and (bias.dim() != 1 or bias.shape[0] != shape[0]):
            wrong = bias
        if wrong is not None:
            named = "x" if wrong is x else _name(wrong, weights, biases)
            pair = f"{named} {tuple(wrong.shape)}, {_name(weight, weights, biases)} {tuple(shape)}"
            return f"the shapes do not fit: {pair}"
        if shape[0] > _LARGEST or shape[1] > _LARGEST:
            return f"a dimension is over {_LARGEST}"
        before, columns = weight, shape[0]
    if x.shape[:-1].numel() > _LARGEST:
        return f"a dimension is over {_LARGEST}"
    if (reason := _why_not_here(device.type, device.index)) is not None:
        return reason
    if (reason := why_patched()) is not None:
        return reason
    if _transformed():
        return "a torch.func transform (vmap, grad, jvp, ...) is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if not compiling and torch._C._len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode is active, and sees PyTorch's own operators only"
    return None


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype to which autocast casts what goes into a product, or None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def dtype_after_cast(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """What a tensor of this dtype becomes: autocast leaves float64 and what is not a float as it is."""
    return autocast if autocast is not None and dtype in _DTYPES else dtype


def cast(tensor: torch.Tensor, autocast: torch.dtype | None) -> torch.Tensor:
    """What autocast makes of an input of ``linear``."""
    return tensor.to(dtype_after_cast(tensor.dtype, autocast))


def _name(
    tensor: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> str:
    """What the caller calls this one of a chain's parameters."""
    for what, group in (("weight", weights), ("bias", biases)):
        for i, one in enumerate(group):
            if tensor is one:
                several = {"weight": "weights", "bias": "biases"}[what]
                return what if len(weights) == 1 else f"{several}[{i}]"
    raise AssertionError("not one of the chain's parameters")


def as_compiled(run: Run) -> Run:
    """The same stretch, as it is decided on where torch.compile traces it."""
    stretch = run.x, run.weights, run.biases
    if chosen.backend != "auto" or _why_impossible(*stretch, False) is not None:
        return run
    reason = _why_closed(run.x.device.index) or _why_not_worth_it(*stretch, run.final_relu, True)
    return run._replace(reason=reason, basis=_BY_RULE if reason is None else None)


_BY_RULE = "limited by memory and large enough to pay for the launches, by rule, not by measurement"


def _why_fused(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    final_relu: bool,
) -> str:
    """On what the choice of the kernels rests."""
    if forced():
        return "backend('triton') is in force"
    if chosen.backend == MEASURING:
        return "they are being measured"
    found = _measured(x, weights, biases, final_relu)
    return _BY_RULE if found is None else found[1]


def _measured(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    final_relu: bool,
) -> tuple[bool, str] | None:
    """Whether the kernels were measured to be faster than eager PyTorch, and the figures; None if unknown."""
    table = kernels().table_of(x.device.index if x.is_cuda else None)
    if not table.stretches:
        return None
    training = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *weights, *biases)
    )
    mode = "training" if training else "inference"
    kind = kernels().arithmetic(dtype_after_cast(x.dtype, autocast_dtype(x.device.type)))
    rows = x.shape[:-1].numel()
    found = table.stretch(mode, kind, rows, (x.shape[-1], *[w.shape[0] for w in weights]), final_relu)
    if found is None:
        return None
    stretch, how = found
    figures = (
        f"measured {how}{' in one launch' if stretch.in_one else ''} for {mode}, {stretch.us:.4g} us against "
        f"PyTorch's {stretch.torch_us:.4g}, on {stretch.source}"
    )
    return stretch.us < _LEAST_GAIN * stretch.torch_us, figures


def _why_not_worth_it(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    final_relu: bool,
    compiled: bool,
) -> str | None:
    count = len(weights)
    if count == 1 and not final_relu:
        return "a Linear without a ReLU leaves nothing to fuse"
    # A compiler has more to fuse than eager PyTorch, against which was measured, and no number of rows.
    if not compiled:
        found = _measured(x, weights, biases, final_relu)
        if found is not None:
            return None if found[0] else f"the kernels are not faster: {found[1]}"
    # Of a chain the averages count.
    products = sum(weight.numel() for weight in weights)
    flops = 2 * x.shape[:-1].numel() * products
    if flops < _LEAST_FLOPS * count:
        much = "this"
        if not torch.compiler.is_compiling():  # which has no number where the batch is any
            much = f"{flops / 1e9:.2g} GFLOP" + (f" in {count} layers" if count > 1 else "")
        return f"{much} is too little to pay for launching kernels from Python"
    if dtype_after_cast(x.dtype, autocast_dtype(x.device.type)) is torch.float32 and _ieee_float32():
        return "IEEE float32 is limited by arithmetic, where cuBLAS is trusted to be faster"
    if products / sum(N + K for N, K in (weight.shape for weight in weights)) > _MOST_INTENSITY:
        widths = " to ".join(map(str, [weights[0].shape[1], *(weight.shape[0] for weight in weights)]))
        what = "a layer" if count == 1 else "a chain"
        return f"{what} of {widths} is limited by arithmetic, where cuBLAS is trusted to be faster"
    return None


def is_for_kernels(grad_output: torch.Tensor) -> bool:
    """Whether the kernels' mlp_backward is right for a chain whose forward was fused.

    With grad mode on (``create_graph=True``), under vmap (``is_grads_batched=True``), forward-mode
    differentiation or a mode, and for a gradient that is not plain memory, only PyTorch's own operators are
    right.
    """
    return not (
        torch.is_grad_enabled()
        or type(grad_output) not in _PLAIN
        or not _is_plain_memory(grad_output, False)
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(grad_output)
        or torch._C._len_torch_dispatch_stack() > 0
    )


HOW_TO_REPORT = "python -m fusedmlp --report problem.txt collects what a report of this needs"

# By the index of the device: which kernel has failed there, and how.
_closed: dict[int | None, str] = {}


def _why_closed(index: int | None) -> str | None:
    """Why "auto" takes no kernel on this device any more, if one has failed there."""
    return _closed.get(index)


def kernels_or_reference(name: str, insist: bool, tensor: torch.Tensor, *rest: Any) -> Any:
    """``mlp_forward`` or ``mlp_backward`` by the kernels; by PyTorch's operators once a kernel has failed.

    tensor: the first argument of both, which says on which device. insist: raise KernelFailed instead, as
    under ``backend("triton")`` and while tune measures.
    """
    room, index = kernels(), tensor.device.index
    if insist or index not in _closed:
        try:
            return getattr(room, name)(tensor, *rest)
        except room.KernelFailed as failure:
            if insist:
                raise
            reason = str(failure)
        # Outside of the except block, so that what the kernels had allocated is free.
        _closed[index] = reason
        warn(f"layers on {tensor.device} run on PyTorch's operators from now on: {reason}. {HOW_TO_REPORT}")
    return getattr(reference, name)(tensor, *rest)


_NOT_PLAIN_MEMORY = "a tensor is sparse or nested, or a lazy conjugate or negative"


def _is_plain_memory(tensor: torch.Tensor, compiling: bool) -> bool:
    """Whether shape and strides say where the values lie: not sparse, nested or lazily negated.

    What a compiler traces is never nested, and PyTorch settles the last before it calls an operator.
    """
    return tensor.layout is torch.strided and (
        compiling or not (tensor.is_nested or tensor.is_conj() or tensor.is_neg())
    )


@functools.cache
def kernels() -> ModuleType:
    return importlib.import_module("fusedmlp.kernels")


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _may_have_kernels() -> bool:
    return has_triton() and torch.version.hip is None


def _interpreted(x: torch.Tensor) -> bool:
    """Whether the kernels can run on x, a CPU tensor: in Triton's interpreter, where that was asked for."""
    return x.device.type == "cpu" and chosen.backend in ("triton", MEASURING) and _interpreting()


def _interpreting() -> bool:
    return has_triton() and bool(kernels().interpreting())


def _transformed() -> bool:
    return bool(torch._C._are_functorch_transforms_active())


def _ieee_float32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision != "tf32")


def _why_not_here(device_type: str, index: int | None) -> str | None:
    """Why the kernels run on no tensor of this device."""
    if not has_triton():
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "the kernels are made for NVIDIA GPUs"
    if device_type == "cuda" and _capability(index) < (8, 0):
        return f"compute capability {_capability(index)} is below 8.0"
    return None


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


# What torch.compiler.assume_constant_result does, which imports the whole compiler: these ask in ways that
# cannot be traced what cannot change, or what torch.compile guards anyway.
for _function in (_interpreting, _transformed, _ieee_float32, _why_not_here, _why_closed):
    vars(_function)["_dynamo_marked_constant"] = True
