"""MNIST as tensors, from the archive in `data/`. It needs no network, and unpacks only once."""

import hashlib
import os
import tarfile
import tempfile
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.datasets import MNIST

ARCHIVE = Path(__file__).parent / "data" / "mnist.tar.xz"
ARCHIVE_SHA256 = "0f886ae97c68df7f80b2227fea82fbb5f7f71e90ab7a37c4ebcbaf69f36edf45"
FILES_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
DEFAULT_DATA_DIR = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedmlp"


class Mnist(NamedTuple):
    train_images: torch.Tensor  # (60000, 784) float32 in [0, 1]
    train_labels: torch.Tensor  # (60000,) int64
    test_images: torch.Tensor  # (10000, 784)
    test_labels: torch.Tensor  # (10000,)


def load_mnist(
    data_dir: Path = DEFAULT_DATA_DIR, device: torch.device | str = "cpu", archive: Path = ARCHIVE
) -> Mnist:
    """The whole data set on `device`. `archive` is unpacked into `data_dir`/MNIST/raw, if it is not there."""
    raw = data_dir / "MNIST" / "raw"
    # Hashing 55 MB takes a tenth of a second, and finds files that are damaged or half-written.
    if not all(_sha256(raw / name) == digest for name, digest in FILES_SHA256.items()):
        try:
            _fill(raw, data_dir, archive)
        except OSError as error:
            raise SystemExit(
                f"MNIST cannot be stored in {data_dir} ({error}): choose another folder with --data-dir."
            ) from None
    train, test = MNIST(data_dir, train=True), MNIST(data_dir, train=False)
    return Mnist(
        train.data.to(device).flatten(1) / 255,
        train.targets.to(device),
        test.data.to(device).flatten(1) / 255,
        test.targets.to(device),
    )


def _fill(raw: Path, data_dir: Path, archive: Path) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    # Several processes may start at once (torchrun): each fills its own folder, then moves whole files.
    with tempfile.TemporaryDirectory(prefix="unpacking-", dir=data_dir) as temporary:
        fresh = Path(temporary)
        if archive.exists():
            _unpack(archive, fresh)
        else:
            fresh = _download(fresh, raw, archive)
        for name in FILES_SHA256:
            os.replace(fresh / name, raw / name)


def _unpack(archive: Path, folder: Path) -> None:
    if _sha256(archive) != ARCHIVE_SHA256:
        raise SystemExit(
            f"{archive} is damaged (its SHA-256 is not {ARCHIVE_SHA256}): restore it with "
            "`git checkout`, or delete it to have torchvision download MNIST instead."
        )
    with tarfile.open(archive, "r:xz") as tar:
        tar.extractall(folder, filter="data")


def _download(folder: Path, raw: Path, archive: Path) -> Path:
    try:
        return Path(MNIST(folder, download=True).raw_folder)
    except (RuntimeError, OSError, HTTPException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1]
        raise SystemExit(
            f"{archive} is missing, and MNIST cannot be downloaded ({reason}): restore the archive with "
            f"`git checkout`, or put the four idx files into {raw}, or connect to the network."
        ) from None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
