"""The examples do what they say, run as a user runs them."""

import importlib
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedmlp.nn

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# One thread per process: several tests at once would otherwise wait for each other's threads.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SCRIPT = [sys.executable, str(EXAMPLES / "train_mnist.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT[1]]
TWO_GOOD_EPOCHS = ["--epochs", "2", "--lr", "0.002"]
NO_TRAINING = ["--epochs", "1", "--lr", "0", "--batch-size", "6000"]


def run(command, *arguments) -> subprocess.CompletedProcess[str]:
    command = [*command, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def example(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)


# --- first_network.py: needs nothing but torch ---


@pytest.fixture(scope="module")
def first_network():
    return example("first_network")


def test_first_network_gives_the_same_numbers(first_network):
    expected, actual = first_network.main(torch.nn), first_network.main(fusedmlp.nn)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


def test_first_network_learns(first_network):
    numbers = first_network.main(fusedmlp.nn)
    # With an absolute loss the steps do not shrink: it stops within a few of them (0.05 each) of the line.
    assert numbers["weight"].item() == pytest.approx(10, abs=0.15)
    assert numbers["bias"].item() == pytest.approx(5, abs=0.15)
    widths = [4, 256, 128, 128, 1]
    size = sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(widths))
    assert numbers["parameters as class"] == numbers["parameters as sequential"] == size
    assert torch.equal(numbers["losses as class"], numbers["losses as sequential"])
    assert numbers["losses as class"][-25:].mean() < numbers["losses as class"][:25].mean()


def test_first_network_runs_as_a_script():
    result = run([sys.executable], EXAMPLES / "first_network.py")
    assert result.returncode == 0, result.stderr
    assert "Linear(in_features=1, out_features=3, bias=True)" in result.stdout


# --- train_mnist.py ---


@pytest.fixture(scope="module")
def needed():
    for name in ("torchvision", "tqdm", "matplotlib"):
        pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.fixture(scope="module")
def data_dir(needed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    example("mnist_data").load_mnist(folder)
    return folder


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """Both implementations, trained once for the tests that only look at the outcome."""
    folder = tmp_path_factory.mktemp("trained")
    outputs = ["--save", folder / "mnist.pt", "--plot", folder / "mnist.png"]
    result = run(SCRIPT, "--data-dir", data_dir, "--device", "cpu", *TWO_GOOD_EPOCHS, *outputs)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def rows(stdout: str) -> dict[str, list[str]]:
    return {
        row[0]: row[1:] for row in map(str.split, stdout.splitlines()) if row and row[-1].endswith(("x", "-"))
    }


def test_table(trained):
    table = rows(trained[1])
    assert list(table) == ["torch", "fusedmlp"]
    seconds = {name: float(row[0]) for name, row in table.items()}
    for name, (_, rate, accuracy, speed_up) in table.items():
        assert float(rate.replace(",", "")) * seconds[name] == pytest.approx(60_000, rel=0.01)
        assert 97 <= float(accuracy.removesuffix("%")) < 100
        assert float(speed_up.removesuffix("x")) == pytest.approx(seconds["torch"] / seconds[name], rel=0.01)
    assert trained[1].count("test accuracy") == 1


def test_says_what_it_ran_on_and_with(trained):
    assert f"torch {torch.__version__}" in trained[1].splitlines()[0]
    assert re.search(
        r"^fusedmlp ran its Triton kernels in \d of \d layers(, PyTorch's own .+)?$", trained[1], re.MULTILINE
    )


def test_loss_curves_coincide(trained):
    assert re.search(r"largest difference between their 938 training losses: 0$", trained[1], re.MULTILINE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_trainers_agree_and_learn(needed, dtype, optimizer):
    script = example("train_mnist")
    options = ["--device", "cpu", "--optimizer", optimizer, "--hidden", "32", "16", "--batch-size", "50"]
    args = script.parse_arguments(None, [*options, "--dtype", str(dtype).removeprefix("torch.")])
    labels = torch.arange(1010) % 10
    noise = torch.randn(1010, 784, generator=torch.Generator().manual_seed(0))
    images = (noise + 20 * torch.nn.functional.one_hot(labels, 784)).to(dtype)
    trainers = [script.Trainer(nn, args) for nn in (torch.nn, fusedmlp.nn)]
    for trainer in [*trainers, *reversed(trainers)]:
        trainer.train_epoch(images, labels, script.tqdm(disable=True))
        assert {parameter.dtype for parameter in trainer.network.parameters()} == {dtype}
    curves = [trainer.losses for trainer in trainers]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 2 * 21
    assert sum(curves[0][-5:]) < 0.9 * sum(curves[0][:5])


def test_low_precision_does_not_lose_small_updates(needed):
    # 0.001 is less than half a step of bfloat16 next to 1, yet many of them have to add up.
    script = example("train_mnist")
    args = script.parse_arguments(
        None, ["--device", "cpu", "--optimizer", "sgd", "--dtype", "bfloat16", "--lr", "1"]
    )
    trainer = script.Trainer(fusedmlp.nn, args)
    for parameters in (trainer.parameters, trainer.masters):
        parameters[0].data.fill_(1)
    for _ in range(100):
        for parameter in trainer.parameters:
            parameter.grad = torch.full_like(parameter, 0.001)
        trainer._update()
    torch.testing.assert_close(trainer.parameters[0].float(), torch.full((256, 784), 0.9), atol=0.004, rtol=0)


def test_plot(trained):
    image = importlib.import_module("matplotlib.image").imread(trained[0] / "mnist.png")
    height, width, _ = image.shape
    assert min(height, width) > 500
    red, green = image[..., 0], image[..., 1]
    # Digits read wrongly are marked in red, below those on the right half that come first.
    marked = (red > 0.8) & (green < 0.2)
    assert marked[height // 2 :, width // 2 :].sum() > 1000


def test_checkpoint_interchanges(trained, data_dir):
    # fusedmlp wrote the checkpoint and torch reads it. With a learning rate of 0 that is what gets tested.
    load = ["--impl", "torch", "--load", trained[0] / "mnist.pt"]
    result = run(SCRIPT, "--data-dir", data_dir, "--device", "cpu", *load, *NO_TRAINING)
    assert result.returncode == 0, result.stderr
    assert rows(result.stdout)["torch"][2] == rows(trained[1])["fusedmlp"][2]


def test_accuracy_below_the_bar_fails(data_dir):
    result = run(SCRIPT, "--data-dir", data_dir, "--impl", "torch", *NO_TRAINING)
    assert result.returncode == 1
    accuracy = rows(result.stdout)["torch"][2]
    assert f"The test accuracy of torch, {accuracy}, is below the bar of 97%." in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c(data_dir, tmp_path):
    checkpoint = tmp_path / "mnist.pt"
    process = subprocess.Popen(
        [*SCRIPT, "--data-dir", data_dir, "--impl", "torch", "--epochs", "1000", "--save", checkpoint],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A shell that runs the tests in the background makes them, and so this, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    seen = b""
    while b"epoch 2 of" not in seen:
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, f"ended too early: {seen.decode()}"
        seen += chunk
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert rest.splitlines()[-1].startswith("Interrupted.")
    assert [file.name for file in tmp_path.iterdir()] == ["mnist.pt"]
    assert torch.load(checkpoint, weights_only=True)["0.weight"].shape == (256, 784)


def test_torchrun_reports_once(data_dir):
    result = run(TORCHRUN, "--data-dir", data_dir, "--device", "cpu", "--impl", "fusedmlp", *TWO_GOOD_EPOCHS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("2 processes, each on CPU")
    assert result.stdout.count("test accuracy") == 1
    assert list(rows(result.stdout)) == ["fusedmlp"]


def test_torchrun_takes_the_same_steps_as_one_process(data_dir, tmp_path):
    # Two steps: the processes' shares of the first differ in length, and of the second one gets none.
    options = ["--data-dir", data_dir, "--device", "cpu", "--impl", "fusedmlp", "--batch-size", "59999"]
    options += ["--optimizer", "sgd", "--epochs", "1", "--save"]
    alone = run(SCRIPT, *options, tmp_path / "alone.pt")
    together = run(TORCHRUN, *options, tmp_path / "together.pt")
    for result in (alone, together):
        assert result.returncode == 1, result.stderr
        assert result.stderr.count("is below the bar of 97%") == 1
    expected, actual = (
        torch.load(tmp_path / name, weights_only=True) for name in ("alone.pt", "together.pt")
    )
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6)


def test_diverging_loss_stops(data_dir):
    script = example("train_mnist")
    with pytest.raises(SystemExit, match="In epoch 1 the loss stopped being a finite number"):
        script.main(
            ["--data-dir", str(data_dir), "--optimizer", "sgd", "--lr", "1e30", "--batch-size", "10000"]
        )


@pytest.mark.parametrize("content", ["missing", "bytes", "other widths", "no dictionary"])
def test_bad_checkpoint_is_refused(data_dir, tmp_path, content):
    script = example("train_mnist")
    path = tmp_path / "mnist.pt"
    if content == "bytes":
        path.write_bytes(b"not a checkpoint")
    elif content == "other widths":
        script.save(script.build(torch.nn, [256, 128, 64]), path)
    elif content == "no dictionary":
        torch.save([torch.ones(3)], path)
    with pytest.raises(SystemExit, match=r"mnist\.pt (cannot be read|is not a checkpoint of a network with)"):
        script.main(["--data-dir", str(data_dir), "--load", str(path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "0 is not a positive integer"),
        (["--hidden", "256", "-1"], "-1"),
        (["--lr", "nan"], "nan is not a finite number"),
        (["--lr", "fast"], "fast is not a finite number"),
        (["--seed", "-1"], "-1"),
        (["--device", "toaster"], "toaster cannot be used"),
        (["--plot", "picture.pdf"], "picture.pdf does not end in .png"),
        (["--plot", "no/such/folder/x.png"], "cannot write into no/such/folder"),
        (["--save", "no/such/folder/x.pt"], "cannot write into no/such/folder"),
        (["--save", "/"], "/ is a folder"),
    ],
)
def test_bad_arguments_are_refused_before_training(needed, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        example("train_mnist").main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_help_teaches(needed, capsys):
    with pytest.raises(SystemExit) as stopped:
        example("train_mnist").main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("examples/train_mnist.py") == 2
    assert text.count("default: ") >= 10
