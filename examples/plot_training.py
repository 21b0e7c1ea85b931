"""--plot of train_mnist.py: loss curves, and test digits with the network's answers."""

from pathlib import Path

import torch
from matplotlib.figure import Figure  # pyplot is not needed, because nothing is shown on a display

ROWS, COLUMNS = 6, 8
MISTAKES = 16
STYLES = {"torch": {"color": "#f2a65a", "linewidth": 5.0}, "fusedmlp": {"color": "#1d3557", "linewidth": 1.6}}


def plot(
    path: Path,
    curves: dict[str, list[float]],
    steps_per_epoch: int,
    images: torch.Tensor,
    labels: torch.Tensor,
    predictions: torch.Tensor,
) -> None:
    figure = Figure(figsize=(13, 6.4), dpi=150, layout="constrained")
    ((left, right),) = figure.subfigures(1, 2, squeeze=False)

    axes = left.subplots()
    window = max(1, steps_per_epoch // 10)
    for name, losses in curves.items():
        smooth = torch.tensor(losses).unfold(0, window, 1).mean(1)
        epochs = (torch.arange(len(smooth)) + window / 2) / steps_per_epoch
        axes.plot(epochs, smooth, label=name, **STYLES[name])
    axes.set(xlabel="epoch", ylabel="training loss", yscale="log", title="Training loss (running mean)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)

    images, labels, predictions = images.cpu(), labels.cpu(), predictions.cpu()
    wrong = (predictions != labels).nonzero().flatten()
    mistakes = wrong[:MISTAKES]
    shown = torch.cat([torch.arange(ROWS * COLUMNS - len(mistakes)), mistakes]).tolist()
    right.suptitle(f"First test digits, then mistakes: {len(wrong)} of {len(labels):,} read wrongly")
    for axes, index in zip(right.subplots(ROWS, COLUMNS).flat, shown, strict=True):
        read, truth = int(predictions[index]), int(labels[index])
        axes.imshow(images[index].view(28, 28), cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(read != truth)
        axes.spines[:].set(color="crimson", linewidth=1.5)
        if read == truth:
            axes.set_title(read, fontsize=10, color="0.35", pad=3)
        else:
            axes.set_title(f"{read}, is {truth}", fontsize=10, color="crimson", pad=3, fontweight="bold")
    figure.savefig(path)
