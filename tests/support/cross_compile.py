"""Compile every kernel with every tile that ships for one chip, and report what its machine code uses.

    python tests/support/cross_compile.py linear_forward 90

No GPU is needed: Triton compiles for a named target. One JSON object a line goes to stdout. It runs in a
process of its own because kernels that Triton's interpreter has claimed cannot be compiled.
"""

import contextlib
import io
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from machine_code import instructions_of, resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedmlp.kernels.launch import COMPILE_OPTIONS
from fusedmlp.kernels.layer.forward import _linear_forward_kernel
from fusedmlp.kernels.layer.grad_input import _grad_input_kernel
from fusedmlp.kernels.layer.grad_weight import _grad_weights_kernel
from fusedmlp.kernels.layer.relu_backward import NUM_WARPS, relu_backward_kernel
from fusedmlp.kernels.narrow.backward import _narrow_backward_kernel
from fusedmlp.kernels.narrow.forward import (
    FEW_ROWS,
    IN_REGISTERS,
    THROUGH_CACHE,
    Form,
    _narrow_forward_kernel,
)
from fusedmlp.kernels.partial_sums import _add_up_kernel
from fusedmlp.kernels.tiles import ITEMSIZE, TILES, UNALIGNED, Tile, block_of
from fusedmlp.kernels.train_step.persistent import PERSISTENT_TILES, _steps_kernel, why_not_persistent
from fusedmlp.kernels.train_step.step import (
    ROWS_TILES,
    WEIGHTS_TILES,
    RowsTile,
    WeightsTile,
    _step_rows_kernel,
    _step_weights_kernel,
)

DTYPES = {"half": ("bf16", "fp16"), "tf32": ("fp32",), "ieee": ("fp32",)}


class Spec(NamedTuple):
    """One build: for each argument a type ("i32"; "*bf16:16": a multiple of 16), a constant or a tuple."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    kind: str | None = None
    tile: Tile | Form | RowsTile | WeightsTile | None = None
    num_warps: int = 4  # without a tile


# Which sizes of an unaligned product are not multiples of 16, as Triton sees them: all; one size with the
# pitches equal to it (784 -> 10: only N); or none, where a product is unaligned because its strides are huge.
UNALIGNED_SHAPES = ("all odd", "N odd", "K odd", "all even")


def products(
    kernel: Any,
    operands: tuple[str, ...],
    pitches: dict[str, str],  # pitch of an operand with contiguous rows -> the size that it is
    blocks: tuple[str, ...],
    variants: dict[str, dict[str, Any]],
) -> Iterator[Spec]:
    """One of the three products in every variant, with every tile and dtype. A stride of 1 is a constant."""
    ships = [(kind, tile, "aligned") for kind, tiles in TILES.items() for tile in tiles]
    ships += [(kind, tile, shape) for kind, tile in UNALIGNED.items() for shape in UNALIGNED_SHAPES]
    for (variant, given), (kind, tile, shape) in itertools.product(variants.items(), ships):
        if "transposed" in variant and shape != "all odd":  # transposed operands are unaligned
            continue
        for dtype in DTYPES[kind]:
            multiple = "" if shape == "all odd" else ":16"
            arguments: dict[str, Any] = dict.fromkeys(kernel.arg_names, f"i32{multiple}")
            arguments |= dict.fromkeys(operands, f"*{dtype}{multiple}")
            odd = shape[0]  # the size N or K, where the shape names one
            arguments |= {name: "i32" for name, size in [*pitches.items(), (odd, odd)] if size == odd}
            arguments |= dict(zip(blocks, tile[:3], strict=True))
            arguments |= {"INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee"}
            arguments |= {"WIDE": shape != "aligned", "M": "i32"} | given
            if arguments.get("bias_ptr") == "like x":
                arguments["bias_ptr"] = arguments["x_ptr"]
            name = f"{kernel.__name__} {dtype} {kind} {tuple(tile)} {shape} {variant}"
            arguments = {key: value for key, value in arguments.items() if key in kernel.arg_names}
            yield Spec(name, kernel, arguments, kind, tile)


def layers_like(count: str, dtype: str, out: str, shape: str) -> Any:
    """That many layers as grad_weights passes them, or None. "one wide": one output feature, a constant."""
    many = int(count or 0)
    aligned, even_N, even_K = (
        "" if odd else ":16" for odd in (shape == "all odd", shape in ("all odd", "N odd"), "K odd" in shape)
    )
    N = stride_z = 1 if shape == "one wide" else f"i32{even_N}"
    K = stride_x = "i32" if shape == "all odd" else f"i32{even_K}"
    pointer = f"*{dtype}{aligned}"
    one = (pointer, pointer, out, N, K, stride_z, stride_x)
    return tuple((value,) * many for value in one) if many else None


def grouped_products() -> Iterator[Spec]:
    """grad_weights: aligned layers, unaligned layers, and both in one launch."""
    for kind, tiles in TILES.items():
        odd = UNALIGNED[kind]
        ships = [(tile, layers, "all odd") for tile in tiles for layers in ("1", "3", "1+1", "2+2")]
        ships += [(tiles[0], "1+1", "one wide"), (odd, "0+3", "all odd")]
        ships += [(odd, "0+1", shape) for shape in (*UNALIGNED_SHAPES, "one wide")]
        # Parts of a sum are float32. If the results are float32 too, both ways are the same build.
        ways = (True, False) if kind == "half" else (True,)
        for (tile, layers, shape), dtype, parts in itertools.product(ships, DTYPES[kind], ways):
            aligned, _, unaligned = layers.partition("+")
            out = "*fp32:16" if parts else f"*{dtype}:16"
            blocks = {"TILE": tile[:3], "UNALIGNED_TILE": odd[:3]}
            bias_left: dict[str, Any] = {"grad_z_ptr": f"*{dtype}", "partials_ptr": "*fp32:16"}
            bias_left |= dict.fromkeys(("N", "stride_zm", "chunks", "rows_per_chunk"), "i32")
            arguments = {"layers": layers_like(aligned, dtype, out, "all even")}
            arguments |= {"unaligned_layers": layers_like(unaligned, dtype, out, shape)}
            arguments |= dict.fromkeys(("M", "splits", "rows_per_split"), "i32") | bias_left | blocks
            arguments |= {"INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee"}
            name = f"grad_weights {dtype} {kind} {tuple(tile)} {layers} layers, {shape}, {parts=}"
            yield Spec(name, _grad_weights_kernel, arguments, kind, tile)


# Networks for the training step, with the other compile-time constants: MNIST from pixels; the deepest and
# widest; sizes that are multiples of nothing.
NETWORKS = {
    "mnist": ((784, 256, 128, 10), "cross_entropy", "adamw", "u8"),
    "widest": ((784, *[256] * 8, 256), "cross_entropy", "sgd", "fp16"),
    "odd": ((51, 201, 33, 7), "mse", "adam", "fp32"),
    "even": ((64, 208, 48, 7), "mse", "adam", "fp32"),
}


def training_steps(which: str) -> Iterator[Spec]:
    """The training step's phases, and both of them in one launch."""
    kernel = {"step_rows": _step_rows_kernel, "step_weights": _step_weights_kernel, "steps": _steps_kernel}[
        which
    ]
    for (name, (widths, loss, optimizer, x)), (kind, dtypes) in itertools.product(
        NETWORKS.items(), DTYPES.items()
    ):
        layers = len(widths) - 1
        if which == "steps":
            if kind not in PERSISTENT_TILES or why_not_persistent(widths, torch.float16) is not None:
                continue
            tiles = [PERSISTENT_TILES[kind]]
        else:
            tiles = [(tile, WEIGHTS_TILES[kind]) for tile in ROWS_TILES[kind]]
            if name == "even":  # only for the persistent form, which has no odd sizes
                continue
        if which == "step_weights":
            tiles = tiles[:1]
        for (rows_tile, weights_tile), dtype in itertools.product(
            tiles, dtypes if name == "mnist" else dtypes[:1]
        ):
            tile = rows_tile if which == "step_rows" else weights_tile
            stored, master = (f"*{dtype}:16",) * layers, ("*fp32:16",) * layers
            low_precision = stored if kind == "half" else (None,) * layers
            squares = (None,) * layers if optimizer == "sgd" else master
            arguments: dict[str, Any] = dict.fromkeys(kernel.arg_names, "i32")
            arguments |= {"x_ptr": f"*{x}:16", "index_ptr": "*i64:16", "scale": "fp32"}
            arguments |= {"target_ptr": "*fp32:16" if loss == "mse" else "*i64:16", "arrived_ptr": "*i32:16"}
            arguments |= {"weights": stored, "biases": master, "hidden": stored[1:], "grads": stored}
            arguments |= {"parameters": (master, master, low_precision, master, master, squares, squares)}
            arguments |= dict.fromkeys(("partials_ptr", "coefficients_ptr", "losses_ptr"), "*fp32:16")
            arguments["wrong_ptr"] = "*i64:16"
            arguments |= {"WIDTHS": widths, "BLOCKS": tuple(map(block_of, widths)), "LOSS": loss}
            arguments |= {"OPTIMIZER": optimizer, "NESTEROV": True, "OVERLAP": False}
            arguments |= {"INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee"}
            arguments |= {"ROWS_BLOCK_M": rows_tile.BLOCK_M, "ROWS_BLOCK_K": rows_tile.BLOCK_K}
            arguments |= {key: value for key, value in tile._asdict().items() if key.startswith("BLOCK")}
            arguments = {key: value for key, value in arguments.items() if key in kernel.arg_names}
            yield Spec(f"{which} {name} {dtype} {kind} {tuple(tile)}", kernel, arguments, kind, tile)


# Chains of narrow layers: the deepest and widest allowed, MNIST's, and odd widths.
DEEP, DEEP_IN_REGISTERS, MNIST, MNIST_WIDE, WIDE, ODD = (
    (128,) * 9, (128,) * 5, (784, 128, 128, 10), (784, 256, 128, 10), (256,) * 5, (127, 100, 127, 7)
)  # fmt: skip


def narrow(backward: bool) -> Iterator[Spec]:
    """Chains in one launch, in every form: for inference, and for training with every result."""
    ships = [
        (kind, form, widths)
        for table, chains in (
            (FEW_ROWS, (DEEP, WIDE, MNIST_WIDE, ODD)),
            (THROUGH_CACHE, (DEEP,)),
            ({} if backward else {"half": IN_REGISTERS}, (DEEP_IN_REGISTERS, MNIST)),
        )
        for kind, form in table.items()
        for widths in chains
    ]
    for kind, form, widths in ships:
        for dtype, training in itertools.product(DTYPES[kind], (True, False)):
            # Only MNIST's chains get every variant. float16 differs only in the name of an instruction.
            if (dtype == "fp16" or not training) and widths not in (MNIST, MNIST_WIDE):
                continue
            L = len(widths) - 1
            pointer, new = f"*{dtype}" if widths == ODD else f"*{dtype}:16", f"*{dtype}:16"
            arguments: dict[str, Any] = form._asdict() | {
                "WIDTHS": widths,
                "PADDED": tuple(max(16, triton.next_power_of_2(width)) for width in widths),
                "STRIDES": tuple((K, 1, 1) for K in widths[:-1]),
                "FINAL_RELU": training,
                "INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee",
                "M": "i32",
                "zero": "i32:16",
                "weight_ptrs": (pointer,) * L,
            }
            if backward:
                # Not training: without the first layer's input gradient and the last layer's ReLU.
                inside = (new,) * (L - 1) + (new if training else None,)
                arguments |= {"grad_output_ptr": pointer, "y_ptrs": inside, "grad_z_ptrs": inside}
                sums = tuple(None if one is None else "*fp32:16" for one in inside)
                arguments |= {"partials_ptrs": sums, "grad_x_ptr": new if training else None}
                arguments["weight_ptrs"] = (pointer if training else None,) + (pointer,) * (L - 1)
                arguments |= {"stride_gm": "i32" if widths[-1] % 16 else "i32:16", "stride_gn": 1}
            else:
                arguments |= {"x_ptr": pointer, "bias_ptrs": (pointer,) * L, "KEEP": 0 if training else L - 1}
                hidden = new if training or form.STAGED else None
                arguments["y_ptrs"] = (hidden,) * (L - 1) + (new,)
                arguments |= {"stride_xm": "i32" if widths[0] % 16 else "i32:16", "stride_xk": 1}
            kernel = _narrow_backward_kernel if backward else _narrow_forward_kernel
            arguments = {name: arguments[name] for name in kernel.arg_names}
            name = f"narrow {dtype} {kind} {tuple(form)} {widths} {training=}"
            yield Spec(name, kernel, arguments, kind, form)


LAUNCHERS = [
    "linear_forward",
    "grad_input",
    "grad_weights",
    "relu_backward",
    "narrow_forward",
    "narrow_backward",
    "step_rows",
    "step_weights",
    "steps",
]


def one_of_each() -> Iterator[Spec]:
    """The first build of each kernel."""
    seen = set()
    for spec in itertools.chain.from_iterable(map(specs, LAUNCHERS)):
        if spec.kernel not in seen:
            seen.add(spec.kernel)
            yield spec


def specs(which: str) -> Iterator[Spec]:
    """Every build of one launcher."""
    if which == "one of each":
        yield from one_of_each()
    elif which == "linear_forward":
        layer: dict[str, Any] = {"RELU": True, "bias_ptr": "like x", "stride_b": 1, "stride_wk": 1}
        yield from products(
            _linear_forward_kernel,
            ("x_ptr", "weight_ptr", "y_ptr"),
            {"stride_xm": "K", "stride_wn": "K"},
            ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
            {
                "relu and bias": layer | {"stride_xk": 1},
                "plain": layer | {"RELU": False, "bias_ptr": None, "stride_xk": 1},
                "x transposed": layer | {"stride_xm": 1},
            },
        )
    elif which == "grad_input":
        layer = {"stride_zn": 1, "stride_wk": 1, "stride_yk": 1}
        yield from products(
            _grad_input_kernel,
            ("grad_z_ptr", "weight_ptr", "y_ptr", "grad_x_ptr"),
            {"stride_zm": "N", "stride_wn": "K", "stride_ym": "K"},
            ("BLOCK_M", "BLOCK_K", "BLOCK_N"),
            {
                "relu and sums": layer | {"partials_ptr": "*fp32:16"},
                "relu": layer | {"partials_ptr": None},
                "plain": layer | {"y_ptr": None, "stride_ym": 0, "partials_ptr": None},
                "grad_z transposed": layer | {"stride_zm": 1, "partials_ptr": "*fp32:16"},
            },
        )
    elif which == "grad_weights":
        yield from grouped_products()
    elif which in ("narrow_forward", "narrow_backward"):
        yield from narrow(which == "narrow_backward")
    elif which == "relu_backward":
        flags = itertools.product((True, False), repeat=3)
        for dtype, (relu, bias, odd) in itertools.product(("fp32", "fp16", "bf16"), flags):
            arguments = dict.fromkeys(relu_backward_kernel.arg_names, "i32" if odd else "i32:16")
            arguments |= {"grad_output_ptr": f"*{dtype}:16", "M": "i32", "rows_per_chunk": "i32"}
            arguments |= {"y_ptr": f"*{dtype}:16", "grad_z_ptr": f"*{dtype}:16"} if relu else {}
            constants = {} if relu else {"y_ptr": None, "grad_z_ptr": None, "stride_ym": 0, "stride_yn": 0}
            constants |= {"partials_ptr": "*fp32:16" if bias else None, "stride_gn": 1, "stride_yn": 1}
            constants |= {"block_n": None, "chunk": None}
            if (relu and bias) or ((relu or bias) and not odd):
                name = f"relu_backward {dtype} {relu=} {bias=} {odd=}"
                yield Spec(name, relu_backward_kernel, arguments | constants, num_warps=NUM_WARPS)
        for dtype, block_p in itertools.product(("fp32", "fp16", "bf16"), (8, 32, 256)):
            arguments = {"partials_ptrs": ("*fp32:16",) * 3, "out_ptrs": (f"*{dtype}:16",) * 3}
            arguments |= {"odd_parts": ("i32",) * 3, "sizes": ("i32:16", "i32", "i32:16")}
            arguments |= {"BLOCK_P": block_p, "BLOCK": 2048 // block_p}
            yield Spec(f"add_up {dtype} {block_p} at a time", _add_up_kernel, arguments)
    elif which in ("step_rows", "step_weights", "steps"):
        yield from training_steps(which)
    elif which == "overlapping_step":
        for phase in ("step_rows", "step_weights"):
            spec = next(training_steps(phase))
            yield spec._replace(
                name=f"step overlapping, {spec.name}", arguments=spec.arguments | {"OVERLAP": True}
            )
    else:
        raise SystemExit(f"no launcher {which!r}")


def build(spec: Spec, arch: int) -> dict[str, Any]:
    """Compile for sm_<arch>, and return what ptxas reports and which instructions the machine code has."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def describe(value: Any, place: tuple[int, ...]) -> Any:
        """The type of an argument as Triton writes it. Its constants and alignments are noted by place."""
        compiled_in = spec.kernel.params[place[0]].is_constexpr
        if isinstance(value, tuple) and not compiled_in:
            return tuple(describe(part, (*place, i)) for i, part in enumerate(value))
        if not isinstance(value, str) or compiled_in:
            constants[place] = value
            return "constexpr"
        type_, _, multiple = value.partition(":")
        if multiple:
            attributes[place] = [["tt.divisibility", int(multiple)]]
        return type_

    signature = {name: describe(spec.arguments[name], (i,)) for i, name in enumerate(spec.kernel.arg_names)}
    options: dict[str, Any] = COMPILE_OPTIONS | {"num_warps": spec.num_warps}
    if spec.tile is not None:
        options |= {"num_warps": spec.tile.num_warps, "num_stages": spec.tile.num_stages}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # Triton prints ptxas's log to stdout
        source = ASTSource(spec.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    report = log.getvalue()
    used = resources(report, compiled.metadata)
    if used is None:
        raise SystemExit(f"ptxas said nothing about {spec.name}:\n{report}")
    table_says = 16 * 1024 if spec.tile is None else None  # no limit is known for the other forms
    if isinstance(spec.tile, Tile):
        table_says = spec.tile.shared_memory(ITEMSIZE[spec.kind or ""])
    return used | {
        "name": spec.name,
        "kind": spec.kind,
        "table_says": table_says,
        "rows": 0 if spec.tile is None else spec.tile[0],
        **instructions_of(spec.kernel.__name__, spec.kind, spec.tile, compiled.asm),
    }


def main() -> None:
    which, arch = sys.argv[1], int(sys.argv[2])
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    for spec in specs(which):
        print(json.dumps(build(spec, arch)), flush=True)


if __name__ == "__main__":
    main()
