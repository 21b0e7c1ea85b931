"""Fuse every classification model of torchvision and compare it with an unfused copy, bit by bit.

    python tests/support/all_models.py                 # torchvision's that fit in memory, smallest first
    python tests/support/all_models.py resnet18 vit_b_16    # these two
    python tests/support/all_models.py --timm               # twenty of timm's, each from another family
    python tests/support/all_models.py --timm --largest 10  # those with at most ten million parameters

Weights are random; everything runs in float32 on the CPU. These must be the same: outputs, gradients,
parameters and buffers of a run in train mode; outputs in eval mode, with gradients and under no_grad, also of
the copies that pickle, torch.save and deepcopy make of the fused model; the keys of its state_dict, the names
and class names of its modules, and its repr. unfuse must restore the classes. The input is two images of the
smallest size from 64 that the model takes. The copy runs twice: results that differ between the two runs are
called unsteady and are not compared. Where the package multiplies with oneDNN (under no_grad, on AMD's CPUs
from Zen 5 on), the error of those outputs, against float64, may be twice the copy's; such a model is called
rounded. The exit status is 1 if anything differs.
"""

import argparse
import copy
import gc
import io
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torchvision
from torch.utils._pytree import tree_leaves

from fusedmlp.convert import fuse, report, unfuse
from fusedmlp.dispatch import onednn
from fusedmlp.torch_tools.accuracy import errors_of

TIMM = """ghostnet_050 mixer_s32_224 resmlp_12_224 gmlp_ti16_224 vit_tiny_patch16_224 convnext_atto levit_128s
swin_tiny_patch4_window7_224 efficientnet_b0 mobilenetv3_small_050 xcit_nano_12_p16_224 cait_xxs24_224
coat_lite_tiny crossvit_9_240 beit_base_patch16_224 maxvit_tiny_rw_224 volo_d1_224 poolformer_s12
edgenext_xx_small hrnet_w18_small"""
# Smaller images leave batch norm with one pixel of each, where gradients are almost zero.
SIZES = (64, 75, 96, 128, 160, 192, 224, 240, 256, 299, 384, 448)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their size in bytes
NO_GRAD = " under no_grad"
Results = dict[str, Any]  # what is compared, by its name in the report
Make = Callable[[str], torch.nn.Module]


def compare(model: torch.nn.Module, size: int) -> tuple[list[str], list[str]]:
    """Fuse the model. Return what differs from its unfused copy, and remarks on allowed differences."""
    twin = copy.deepcopy(model)
    looks, classes = looks_of(model), classes_of(model)
    before = [buffer.clone() for buffer in twin.buffers()]
    trained = results(twin, size, train=True)
    for buffer, value in zip(twin.buffers(), before, strict=True):
        buffer.copy_(value)
    unsteady = differences(trained, results(twin, size, train=True))
    evaluated = results(twin, size, train=False)
    unsteady += differences(evaluated, results(twin, size, train=False))
    remarks = [f"unsteady: {name}" for name in unsteady]

    differs = differences(trained, results(fuse(model), size, train=True))
    ours = results(model, size, train=False)
    del trained
    differs += differences(looks, looks_of(model)) + differences(evaluated, ours)
    differs = [name for name in differs if name not in unsteady]
    if onednn.why_not_here() is None and any(name.endswith(NO_GRAD) for name in differs):
        exact = results(twin.double(), size, train=False)
        for name in [name for name in differs if name.endswith(NO_GRAD)]:
            ratio = errors_of(ours[name], exact[name])[1] / errors_of(evaluated[name], exact[name])[1]
            if ratio <= 2:
                differs.remove(name)
                remarks.append(f"rounding of {name}: {ratio:.2f} times the copy's error")
    del twin  # pickle needs memory for several copies
    for way, other in copies(model):
        found = differences(ours, results(other, size, train=False))
        found += ["classes"] if classes_of(other) != classes_of(model) else []
        differs += [f"{name} by {way}" for name in found if name not in unsteady]
        del other  # before the next is made
    if classes_of(unfuse(model)) != classes:
        differs.append("classes after unfuse")
    return differs, remarks


def results(model: torch.nn.Module, size: int, *, train: bool) -> Results:
    """The outputs of one run; in train mode also gradients of their sum, and parameters and buffers."""
    dtype = next(model.parameters()).dtype
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    images.requires_grad_(train)
    found: Results = {}
    losses = []
    for with_grad in (True,) if train else (True, False):
        torch.manual_seed(0)
        np.random.seed(0)  # timm's volo draws boxes with NumPy
        with torch.set_grad_enabled(with_grad):
            outputs = model.train(train)(images)
        mode = ("in train mode" if train else "in eval mode") + ("" if with_grad else NO_GRAD)
        found[f"type of the outputs {mode}"] = type(outputs)
        for i, output in enumerate(tree_leaves(outputs)):
            found[f"output {i} {mode}"] = output.detach() if isinstance(output, torch.Tensor) else output
            if train and isinstance(output, torch.Tensor) and output.requires_grad:
                losses.append((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum())
    if train:
        torch.stack(losses).sum().backward()
        found["gradient of the images"] = images.grad
        found |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
        found |= {f"parameter {name}": parameter.detach() for name, parameter in model.named_parameters()}
        found |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
        model.zero_grad()
    return found


def looks_of(model: torch.nn.Module) -> Results:
    return {
        "keys of the state_dict": list(model.state_dict()),
        "names of the modules": [name for name, _ in model.named_modules(remove_duplicate=False)],
        "class names": [kind.__name__ for kind in classes_of(model)],
        "repr": repr(model),
    }


def classes_of(model: torch.nn.Module) -> list[type[torch.nn.Module]]:
    return [type(module) for module in model.modules()]


def differences(one: Results, other: Results) -> list[str]:
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    return [name for name in one if not same(one[name], other[name])]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        # Compared as integers, NaN equals itself and zero differs from minus zero.
        bits = [tensor.view(INTEGERS.get(tensor.element_size(), tensor.dtype)) for tensor in (one, other)]
        return one.dtype == other.dtype and torch.equal(*bits)
    return type(one) is type(other) and bool(one == other)


def copies(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    yield "pickle", pickle.loads(pickle.dumps(model))
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    yield "torch.save", torch.load(file, weights_only=False)
    del file
    yield "deepcopy", copy.deepcopy(model)


def smallest_size(model: torch.nn.Module) -> int:
    """The smallest size that works, found by trial: many models tell only by an error what is too small."""
    for size in SIZES[:-1]:
        try:
            with torch.no_grad():
                model.train()(torch.randn(2, 3, size, size))
            return size
        except Exception:  # noqa: PERF203
            pass
    return SIZES[-1]


def parameters(make: Make, name: str) -> int:
    """How many parameters the model has, counted on the meta device."""
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in make(name).parameters())
    except NotImplementedError:  # torchvision's regnets compute their widths with tensors
        return int(next(iter(torchvision.models.get_model_weights(name))).meta["num_params"])


def main() -> int:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = memory / 2 / (4 * torch.float32.itemsize) / 1e6  # a model, its copy and the gradients of both
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a model, with --timm any of timm's")
    parser.add_argument("--timm", action="store_true", help="models of timm instead of torchvision's")
    largest = "leave out models with more parameters (default: %(default).0f, to take half of the memory)"
    parser.add_argument("--largest", type=float, default=fits, metavar="MILLIONS", help=largest)
    options = parser.parse_args()
    make: Make = torchvision.models.get_model
    names = known = torchvision.models.list_models(module=torchvision.models)
    if options.timm:
        import timm

        make, names, known = timm.create_model, TIMM.split(), timm.list_models()
    if unknown := set(options.names) - set(known):
        parser.error(f"there are no such models: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # results must not depend on the order of sums
    warnings.filterwarnings("ignore", module="torchvision|timm")
    millions = {name: parameters(make, name) / 1e6 for name in options.names or names}
    counts = dict.fromkeys(("same", "rounded", "differs", "failed", "left out"), 0)
    row = "{:28} {:>9} {:>5} {:>8} {:>6} {:>8}  {}".format
    print(row("model", "millions", "size", "Linears", "pairs", "seconds", "outcome"), flush=True)
    bar = progress(sorted(millions, key=millions.__getitem__))
    for name in bar:
        begin, numbers, remarks, model = time.perf_counter(), ["", "", ""], "", None
        if millions[name] > options.largest:
            outcome, remarks = "left out", f"more than {options.largest:.0f} million parameters"
        else:
            try:
                torch.manual_seed(0)
                model = make(name)
                size, found = smallest_size(model), report(model)
                numbers = [str(size), str(found.linears), str(found.pairs)]
                differs, allowed = compare(model, size)
                rounded = any(remark.startswith("rounding") for remark in allowed)
                outcome = "differs" if differs else "rounded" if rounded else "same"
                remarks = "; ".join(filter(None, (some(differs), some(allowed))))
            except Exception as error:
                outcome, remarks = "failed", f"{type(error).__name__}: {error}"
        del model
        gc.collect()
        counts[outcome] += 1
        seconds = f"{time.perf_counter() - begin:.1f}"
        line = row(name, f"{millions[name]:.1f}", *numbers, seconds, outcome)
        getattr(bar, "write", print)(f"{line}: {remarks}" if remarks else line)
        sys.stdout.flush()
    print(f"{len(millions)} models:", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts["differs"] or counts["failed"] else 0


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def progress(names: list[str]) -> Iterable[str]:
    try:
        from tqdm import tqdm
    except ImportError:
        return names
    return tqdm(names, unit="model", leave=False, disable=None)  # shown on a terminal only


if __name__ == "__main__":
    sys.exit(main())
