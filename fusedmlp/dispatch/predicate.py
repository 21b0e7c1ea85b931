"""ONE predicate: which implementation runs for these tensors, and the reason in words.

The only module that imports ``fusedmlp.kernels``, and with it Triton, and only once kernels are to run.
"""

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fusedmlp.dispatch.autocast import DTYPES, autocast_dtype, dtype_after_cast
from fusedmlp.dispatch.backend_choice import MEASURING, Biases, Run, Weights, chosen, forced
from fusedmlp.torch_tools.patched import why_patched

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# The most rows or columns. The kernels count them in 32 bits, rounded up to whole tiles; offsets have 64.
_LARGEST = 2**31 - 2**20

# The conservative rule of "auto" where nothing was measured. Launching a Triton kernel from Python takes 9 to
# 12 us of the CPU's time, an operator of ATen about 5: below about 1 GFLOP the difference is more than fusing
# saves. A layer does N*K/(N+K) FLOP a byte. Above 156 (A100) or 184 (H200) it is limited by arithmetic, and
# a product a few per cent slower than cuBLAS's costs more than fusing saves.
_LEAST_FLOPS = 1e9
_LEAST_GAIN = 0.98  # a smaller difference from PyTorch's time may be noise
_MOST_INTENSITY = 150

_TORCH_CHOSEN, _TRITON_CHOSEN = "The caller chose backend('torch').", "The caller chose backend('triton')."
_BY_RULE = (
    "By rule, not by measurement: the layers are limited by memory and large enough to pay for the launches."
)
_NOT_PLAIN_MEMORY = "A tensor is sparse or nested, or a lazy conjugate or negative."

# For each device index on which a kernel has failed, the reason why "auto" runs no kernels there any more.
failed: dict[int | None, str] = {}

# Global names, which small calls read faster than attributes.
_Tensor = torch.Tensor
_function_modes, _tracing_state = torch._C._len_torch_function_stack, torch._C._get_tracing_state


def choose_kernels(x: torch.Tensor, weights: Weights, biases: Biases, final_relu: bool) -> bool:
    """True if the kernels run for this call, False if PyTorch's operators do.

    Reports the call to ``explain()``, if it is recording. Raises RuntimeError with the reason if
    ``backend("triton")`` was chosen and the kernels cannot run.
    """
    # surely_unfused, inline: on a CPU every small call comes here.
    if type(x) is _Tensor and chosen.quiet and (x.is_cpu or surely_too_little(x, weights)):
        return False
    reason = why_not_fused_mlp(x, weights, biases, final_relu=final_relu)
    record(x, weights, biases, final_relu, reason)
    return reason is None


def record(x: torch.Tensor, weights: Weights, biases: Biases, final_relu: bool, reason: str | None) -> None:
    """Report this call to ``explain()``, if it is recording; raise a reason against ``backend("triton")``."""
    if chosen.note is not None and not is_compiling():
        basis = _why_fused(x, weights, biases, final_relu) if reason is None else None
        chosen.note(Run(x, weights, biases, final_relu, reason, basis))
    if reason is not None and forced():
        tensors = (x, *weights, *(bias for bias in biases if bias is not None))
        if all(isinstance(tensor, torch.Tensor) for tensor in tensors):  # else PyTorch raises a TypeError
            auto = "backend('auto') uses PyTorch's operators instead."
            raise RuntimeError(f"backend('triton') cannot run here. {reason} {auto}")


def surely_unfused(x: torch.Tensor, weights: Weights) -> bool:
    """Fast check: True if the kernels do not run for this call, and no reason in words is needed."""
    return type(x) is _Tensor and chosen.quiet and (x.is_cpu or surely_too_little(x, weights))


def surely_too_little(x: torch.Tensor, weights: Weights) -> bool:
    """Fast check for a GPU: True if nothing was measured and launching costs more than fusing saves.

    Where the arithmetic takes next to no time, the 4 us of why_not_fused would be a third of eager's call.
    """
    if is_compiling() or _tracing_state() is not None or _function_modes() > 0:
        return False  # a tracer or a mode would see that a size is read
    try:
        products = 0
        for weight in weights:
            products += weight.numel()
        if 2 * x.numel() * products >= _LEAST_FLOPS * len(weights) * max(1, x.size(-1)):
            return False
    except (AttributeError, IndexError):  # not a tensor, or without a dimension
        return False
    if _why_not_here("any", None) is not None:
        return True
    return not kernels().table_of(x.device.index if x.is_cuda else None).stretches


def why_no_kernels(x: torch.Tensor) -> str | None:
    """None if kernels of any kind can run on x under the present settings, else the reason."""
    if chosen.backend == "torch":
        return _TORCH_CHOSEN
    return (
        _why_not_on(x)
        or _why_not_here(x.device.type, x.device.index)
        or (None if _is_plain_memory(x, False) else _NOT_PLAIN_MEMORY)
    )


def left_to_compiler(x: torch.Tensor) -> bool:
    """True if a compiler is tracing and should see the modules one by one, as nothing here will be fused."""
    return is_compiling() and (_exporting() or (chosen.quiet and x.is_cpu))


def _exporting() -> bool:
    return bool(torch.compiler._is_exporting_flag)  # is_exporting() is always true while torch 2.11 compiles


def why_not_fused(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, relu: bool = True
) -> str | None:
    """None if the Triton kernels run for this layer under the present settings, else the reason why not.

    x ``(..., in_features)``, weight ``(out_features, in_features)``, bias ``(out_features,)`` or None.
    Under ``backend("triton")`` the call raises RuntimeError with this reason.

    >>> fusedmlp.functional.why_not_fused(torch.randn(8, 4), torch.randn(2, 4))
    'The input is on the CPU; the fused kernels need a CUDA GPU.'
    """
    return why_not_fused_mlp(x, [weight], [bias], final_relu=relu)


def why_not_fused_mlp(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    final_relu: bool = False,
) -> str | None:
    """The same for a chain of layers with a ReLU between them; the arguments are those of :func:`mlp`.

    >>> layers = [torch.randn(3, 4), torch.randn(2, 3)]
    >>> fusedmlp.functional.why_not_fused_mlp(torch.randn(8, 4), layers, [None, None])
    'The input is on the CPU; the fused kernels need a CUDA GPU.'
    """
    if chosen.backend == "torch":
        return _TORCH_CHOSEN
    reason = _why_impossible(x, weights, biases)
    if reason is None and chosen.backend == "auto":
        compiled = is_compiling()
        reason = _why_failed(x.device.index) or _why_not_worth_it(x, weights, biases, final_relu, compiled)
    return reason


def as_compiled(run: Run) -> Run:
    """The same call, with the reason and the basis that it has when torch.compile traces it."""
    x, weights, biases = run.x, run.weights, run.biases
    if chosen.backend != "auto" or _why_impossible(x, weights, biases) is not None:
        return run
    reason = _why_failed(x.device.index) or _why_not_worth_it(x, weights, biases, run.final_relu, True)
    return run._replace(reason=reason, basis=_BY_RULE if reason is None else None)


def _why_impossible(x: torch.Tensor, weights: Weights, biases: Biases) -> str | None:
    compiling = is_compiling()
    # --- 1. The input, and modes and tracers that see this call ---
    # Function modes are checked first, because they see every attribute that is read below. The mode of
    # torch.set_default_device() and `with torch.device(...)` changes nothing here.
    if torch._C._len_torch_function_stack() > 0 and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    ):
        return "A TorchFunctionMode is active; it sees only PyTorch's own functions."
    if (reason := _why_not_on(x)) is not None:
        return reason
    if compiling and _exporting():
        return "torch.export is tracing this call, and the exported program must run without this package."
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing this call."

    # --- 2. Every tensor alone: type, device, dtype and memory ---
    device = x.device
    autocast = autocast_dtype(device.type)
    dtype = dtype_after_cast(x.dtype, autocast)
    if dtype not in DTYPES:
        return f"There are kernels for float32, float16 and bfloat16, not for {dtype}."
    for what, group in (("weight", weights), ("bias", biases)):
        for tensor in group:
            if tensor is None:
                if what == "weight":
                    return "A weight is None."
                continue
            if type(tensor) not in _PLAIN:
                kind = type(tensor).__name__
                return f"The {_name(tensor, weights, biases)} is a {kind}, not a plain torch.Tensor."
            if tensor.device != device:
                where = f"is on {tensor.device}, and the input on {device}"
                return f"The {_name(tensor, weights, biases)} {where}."
            if tensor.dtype is not dtype and dtype_after_cast(tensor.dtype, autocast) is not dtype:
                return f"The {_name(tensor, weights, biases)} is {tensor.dtype}, and the input {dtype}."
            # Inline: a chain has many tensors, and none of them is complex.
            if tensor.layout is not torch.strided or (
                not compiling and (tensor.is_nested or tensor.is_neg())
            ):
                return _NOT_PLAIN_MEMORY
    if not _is_plain_memory(x, compiling):
        return _NOT_PLAIN_MEMORY

    # --- 3. The shapes ---
    before, columns = x, x.shape[-1] if x.dim() else None
    for weight, bias in zip(weights, biases, strict=True):
        wrong = None
        shape = weight.shape
        if len(shape) != 2 or columns != shape[1]:
            wrong = before
        elif bias is not None and (bias.dim() != 1 or bias.shape[0] != shape[0]):
            wrong = bias
        if wrong is not None:
            named = "input" if wrong is x else _name(wrong, weights, biases)
            pair = f"{named} {tuple(wrong.shape)}, {_name(weight, weights, biases)} {tuple(shape)}"
            return f"The shapes do not fit: {pair}."
        if shape[0] > _LARGEST or shape[1] > _LARGEST:
            return f"A dimension is larger than {_LARGEST}."
        before, columns = weight, shape[0]
    if x.shape[:-1].numel() > _LARGEST:
        return f"A dimension is larger than {_LARGEST}."

    # --- 4. This machine, and what is replaced or active in PyTorch ---
    if (reason := _why_not_here(device.type, device.index) or why_patched()) is not None:
        return reason
    if _transformed():
        return "A torch.func transform (vmap, grad, jvp, ...) is active."
    if forward_ad._current_level >= 0:
        return "Forward-mode differentiation is active."
    if not compiling and torch._C._len_torch_dispatch_stack() > 0:
        return "A TorchDispatchMode is active; it sees only PyTorch's own operators."
    return None


def _why_not_on(x: torch.Tensor) -> str | None:
    """Why the kernels cannot run on this input, by its type and its kind of device."""
    if type(x) not in _PLAIN:
        return f"The input is a {type(x).__name__}, not a plain torch.Tensor."
    if not x.is_cuda and not _interpreted(x):
        where = "CPU" if x.device.type == "cpu" else f"{x.device.type} device"
        return f"The input is on the {where}; the fused kernels need a CUDA GPU."
    return None


def _name(tensor: torch.Tensor, weights: Weights, biases: Biases) -> str:
    """What a message calls this parameter: "bias", or in a chain "bias of layer 1"."""
    for what, group in (("weight", weights), ("bias", biases)):
        for i, one in enumerate(group):
            if tensor is one:
                return what if len(weights) == 1 else f"{what} of layer {i}"
    raise AssertionError("not one of the chain's parameters")


def _why_fused(x: torch.Tensor, weights: Weights, biases: Biases, final_relu: bool) -> str:
    """Why the kernels were chosen."""
    if forced():
        return _TRITON_CHOSEN
    if chosen.backend == MEASURING:
        return "The kernels are being measured."
    found = _measured(x, weights, biases, final_relu)
    return _BY_RULE if found is None else found[1]


def _measured(x: torch.Tensor, weights: Weights, biases: Biases, final_relu: bool) -> tuple[bool, str] | None:
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
    entry, how = found
    figures = (
        f"Measured {how}{' in one launch' if entry.in_one else ''} for {mode}: {entry.us:.4g} us against "
        f"PyTorch's {entry.torch_us:.4g}, on {entry.source}."
    )
    return entry.us < _LEAST_GAIN * entry.torch_us, figures


def _why_not_worth_it(
    x: torch.Tensor, weights: Weights, biases: Biases, final_relu: bool, compiled: bool
) -> str | None:
    count = len(weights)
    if count == 1 and not final_relu:
        return "A Linear without a ReLU leaves nothing to fuse."
    # Measurements do not count for a compiler, which fuses more than eager PyTorch and may not know the
    # number of rows.
    if not compiled:
        found = _measured(x, weights, biases, final_relu)
        if found is not None:
            return None if found[0] else f"The kernels are not faster. {found[1]}"
    # A chain is judged by the averages of its layers.
    products = sum(weight.numel() for weight in weights)
    flops = 2 * x.shape[:-1].numel() * products
    if flops < _LEAST_FLOPS * count:
        much = ""
        if not is_compiling():  # a compiler has no number here if the batch may be of any size
            much = f" ({flops / 1e9:.2g} GFLOP" + (f" in {count} layers)" if count > 1 else ")")
        return f"The work{much} is too little to pay for launching kernels from Python."
    limited = "limited by arithmetic, where cuBLAS is expected to be faster."
    if dtype_after_cast(x.dtype, autocast_dtype(x.device.type)) is torch.float32 and _ieee_float32():
        return f"IEEE float32 is {limited}"
    if products / sum(N + K for N, K in (weight.shape for weight in weights)) > _MOST_INTENSITY:
        widths = " to ".join(map(str, [weights[0].shape[1], *(weight.shape[0] for weight in weights)]))
        return f"A {'layer' if count == 1 else 'chain'} of {widths} is {limited}"
    return None


def is_for_kernels(grad_output: torch.Tensor) -> bool:
    """True if the kernels' mlp_backward may run for a chain whose forward ran on the kernels.

    PyTorch's own operators are needed with grad mode on (``create_graph=True``), under vmap
    (``is_grads_batched=True``), forward-mode differentiation or a mode, and for a gradient that is not plain
    memory.
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


def _is_plain_memory(tensor: torch.Tensor, compiling: bool) -> bool:
    """True if shape and strides say where the values lie: not sparse, nested or lazily negated.

    A compiler traces no nested tensors, and PyTorch resolves lazy ones before it calls an operator.
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


def _interpreted(x: torch.Tensor) -> bool:
    """True if x is on the CPU and the kernels were asked to run there, in Triton's interpreter."""
    return x.device.type == "cpu" and chosen.backend in ("triton", MEASURING) and _interpreting()


def _interpreting() -> bool:
    return has_triton() and bool(kernels().interpreting())


def _transformed() -> bool:
    return bool(torch._C._are_functorch_transforms_active())


def _ieee_float32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision != "tf32")


def _why_failed(index: int | None) -> str | None:
    return failed.get(index)


def _why_not_here(device_type: str, index: int | None) -> str | None:
    """Why the kernels cannot run on any tensor of this device."""
    if not has_triton():
        return "Triton is not installed."
    if torch.version.hip is not None:
        return "The kernels need an NVIDIA GPU, and this PyTorch is built for AMD's."
    if device_type == "cuda" and _capability(index) < (8, 0):
        major, minor = _capability(index)
        return f"The GPU has compute capability {major}.{minor}; the kernels need 8.0 or more."
    return None


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


# This is what torch.compiler.assume_constant_result does, but that imports the whole compiler. torch.compile
# cannot trace these functions. Their results cannot change, or torch.compile guards them anyway.
for _function in (_interpreting, _transformed, _ieee_float32, _why_not_here, _why_failed):
    vars(_function)["_dynamo_marked_constant"] = True
