"""examples/mnist_data.py: the embedded archive becomes tensors once, completely, or not at all."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision", reason="torchvision is not installed")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def mnist_data():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("mnist_data")


@pytest.fixture(scope="module")
def data_dir(mnist_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    mnist_data.load_mnist(folder)
    return folder


def raw_files(data_dir: Path) -> dict[str, int]:
    # The time of change, because the archive sets the modification time.
    return {file.name: file.stat().st_ctime_ns for file in (data_dir / "MNIST" / "raw").iterdir()}


def test_tensors_are_the_whole_of_mnist(mnist_data, data_dir):
    data = mnist_data.load_mnist(data_dir)
    for images, labels, length in [
        (data.train_images, data.train_labels, 60_000),
        (data.test_images, data.test_labels, 10_000),
    ]:
        assert images.shape == (length, 784)
        assert images.dtype == torch.float32
        assert images.min() == 0
        assert images.max() == 1
        assert labels.shape == (length,)
        assert labels.dtype == torch.int64
        counts = labels.bincount()
        assert len(counts) == 10
        assert counts.sum() == length
        # In MNIST the digits are nearly, but not exactly, equally frequent.
        assert counts.min() > 0.08 * length
        assert counts.max() < 0.12 * length


def test_images_and_labels_belong_together(mnist_data, data_dir):
    # The nearest mean image recognises most digits, without any network.
    data = mnist_data.load_mnist(data_dir)
    means = torch.stack([data.train_images[data.train_labels == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(data.test_images, means).argmin(1)
    assert (nearest == data.test_labels).float().mean() > 0.75


def test_unpacked_once(mnist_data, data_dir):
    before = raw_files(data_dir)
    mnist_data.load_mnist(data_dir)
    assert raw_files(data_dir) == before
    assert set(before) == set(mnist_data.FILES_SHA256)
    assert [entry.name for entry in data_dir.iterdir()] == ["MNIST"], "a temporary folder was left behind"


def test_half_written_file_is_replaced(mnist_data, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    victim = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    mnist_data.load_mnist(tmp_path)
    assert victim.read_bytes() == whole


@pytest.mark.parametrize("damage", ["truncated", "one byte changed"])
def test_damaged_archive_is_refused(mnist_data, tmp_path, damage):
    content = bytearray(mnist_data.ARCHIVE.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    archive = tmp_path / "mnist.tar.xz"
    archive.write_bytes(content)
    with pytest.raises(SystemExit, match=r"mnist\.tar\.xz is damaged .*git checkout"):
        mnist_data.load_mnist(tmp_path / "data", archive=archive)
    assert not any(file.is_file() for file in (tmp_path / "data").rglob("*"))


def test_missing_archive_and_no_network_is_one_sentence(mnist_data, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist_data.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing answers there
    missing = tmp_path / "missing.tar.xz"
    with pytest.raises(SystemExit) as stopped:
        mnist_data.load_mnist(tmp_path / "data", archive=missing)
    message = str(stopped.value)
    assert "\n" not in message
    for part in (
        str(missing),
        "Connection refused",
        "git checkout",
        str(tmp_path / "data" / "MNIST" / "raw"),
    ):
        assert part in message


def test_folder_that_cannot_be_written_is_one_sentence(mnist_data, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SystemExit, match=r"cannot be stored in .*--data-dir"):
        mnist_data.load_mnist(tmp_path / "file")


@pytest.mark.slow
def test_two_processes_may_unpack_at_once(mnist_data, tmp_path):
    code = "import pathlib, sys, mnist_data; mnist_data.load_mnist(pathlib.Path(sys.argv[1]))"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], cwd=EXAMPLES, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert set(raw_files(tmp_path)) == set(mnist_data.FILES_SHA256)
    assert mnist_data.load_mnist(tmp_path).train_labels.shape == (60_000,)
