"""The examples, run as a user runs them, do what their texts promise."""

import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import ROOT, call

import fusedmlp.nn

EXAMPLES = ROOT / "examples"
# One thread per process, because several tests run at the same time.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SCRIPT = [sys.executable, str(EXAMPLES / "train_mnist.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT[1]]
TWO_GOOD_EPOCHS = ["--epochs", "2", "--lr", "0.002"]
NO_TRAINING = ["--epochs", "1", "--lr", "0", "--batch-size", "6000"]
# The losses of two epochs differ by less between runs of torch with different numbers of threads.
NEARLY_EQUAL = 0.1


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
    # With an absolute loss the steps do not shrink: it ends within a few steps (0.05 each) of the line.
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
    """Both implementations, trained once for all tests that only look at the result."""
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
    text = " ".join(trained[1].split())
    assert f"torch {torch.__version__}" in text
    assert f"{torch.get_num_threads()} thread" in text
    assert (
        "fusedmlp trained by TrainStep.epoch, torch by a plain loop, both on preloaded data. Direct" in text
    )
    assert max(map(len, trained[1].splitlines())) <= 80


def test_loss_curves_nearly_coincide(trained):
    found = re.search(
        r"largest difference between their 938 training losses: (.+)$", trained[1], re.MULTILINE
    )
    assert float(found[1]) < NEARLY_EQUAL


def test_with_the_layers_alone_loss_curves_coincide(data_dir):
    options = ["--mode", "module", "--device", "cpu", "--epochs", "1", "--lr", "0.003"]
    result = call(example("train_mnist").main, "--data-dir", data_dir, *options)
    assert "largest difference between their 469 training losses: 0\n" in result.stdout, result.stderr
    kernels = r"fusedmlp ran its Triton kernels in \d of \d layers(, PyTorch's own .+)?$"
    assert re.search(kernels, " ".join(result.stdout.split()))


def digits():
    """Images and labels that a network learns in a few steps."""
    labels = torch.arange(1010) % 10
    noise = torch.randn(1010, 784, generator=torch.Generator().manual_seed(0))
    return noise + 20 * torch.nn.functional.one_hot(labels, 784), labels


@pytest.mark.parametrize("dtype", ["float32", "bf16", "float16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_trainers_agree_and_learn(needed, dtype, optimizer):
    trainer = example("trainer")
    options = ["--device", "cpu", "--optimizer", optimizer, "--hidden", "32", "16", "--batch-size", "50"]
    args = example("train_mnist_options").parse_arguments(None, [*options, "--dtype", dtype])
    modes = ["module"] if dtype == "float16" else ["module", "step", "epoch"]
    trainers = [trainer.Trainer(nn, args) for nn in (torch.nn, fusedmlp.nn)]
    trainers += [trainer.Trainer(fusedmlp.nn, args, mode) for mode in modes[1:]]
    for one in [*trainers, *reversed(trainers)]:
        one.train_epoch(*digits(), trainer.tqdm(disable=True))
        # Parameters stay float32, because an update is often less than half a step of bfloat16.
        assert {parameter.dtype for parameter in one.network.parameters()} == {torch.float32}
    plain, fused, *others = (one.losses for one in trainers)
    assert plain == fused
    assert len(plain) == 2 * 21
    assert sum(plain[-5:]) < 0.9 * sum(plain[:5])
    for losses in others:
        error = {"float32": 1e-4, "bf16": 0.05}[dtype]
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain), rtol=error, atol=error)


def test_the_loader_gives_the_same_batches(data_dir):
    trainer = example("trainer")
    args = example("train_mnist_options").parse_arguments(None, ["--device", "cpu", "--batch-size", "500"])
    images = trainer.normalized(example("mnist_data").load_mnist(data_dir).train_images)
    one = trainer.Trainer(torch.nn, args)
    order = torch.arange(1234, 0, -1)
    for (x, _, share), rows in zip(one._loaded(data_dir, order), order.split(500), strict=True):
        torch.testing.assert_close(x, images[rows])
        assert share == 1 / len(rows)


SMALL = ["--device", "cpu", "--epochs", "1", "--batch-size", "1000", "--hidden", "32", "--threads", "1"]


def some_digits(data_dir):
    data = example("mnist_data").load_mnist(data_dir)
    return data._replace(train_images=data.train_images[:3500], train_labels=data.train_labels[:3500])


def test_ladder(data_dir, capsys):
    ladder = example("ladder")
    options = [*SMALL, "--data-dir", str(data_dir), "--ladder"]
    args = example("train_mnist_options").parse_arguments(None, options)
    rows = ladder.ladder(args, some_digits(data_dir))
    text = capsys.readouterr().out
    assert [row["name"] for row in rows[:2]] == ["DataLoader, PIL, ToTensor", "data preloaded"]
    for row in rows:
        assert f"{row['name']:27}{row['median']:8.3f}" in text
        assert row["last_loss"] == pytest.approx(rows[0]["last_loss"], rel=1e-3)
        assert row["accuracy"] == pytest.approx(rows[0]["accuracy"], abs=0.002)
    assert "which plain PyTorch can drop too" in " ".join(text.split())
    assert "Direct: forward, loss, backward" in text
    assert max(map(len, text.splitlines())) <= 80


def test_race_says_if_the_goal_was_missed_and_log_keeps_its_configuration(data_dir, tmp_path, capsys):
    ladder = example("ladder")
    options = [*SMALL, "--race", "--seeds", "2", "--data-dir", str(data_dir)]
    args = example("train_mnist_options").parse_arguments(None, options)
    assert (args.optimizer, args.lr, args.epochs) == (
        "sgd",
        0.3,
        1,
    )  # its own defaults, given epochs
    with pytest.raises(SystemExit, match="below the goal of 98%"):
        ladder.race(args, some_digits(data_dir))
    text = capsys.readouterr().out
    assert "n = 2; reached 98%: 0 of 2" in text
    ladder.log(tmp_path / "race.json", "a machine", args, [{"seed": 0}])
    kept = json.loads((tmp_path / "race.json").read_text())
    assert (kept["ran_on"], kept["results"]) == ("a machine", [{"seed": 0}])
    assert {name: kept["settings"][name] for name in ("lr", "hidden", "seeds", "dtype", "mode")} == {
        "lr": 0.3, "hidden": [32], "seeds": 2, "dtype": "torch.float32", "mode": "epoch",
    }  # fmt: skip


def interrupt_after(count, kept):
    """A function that an example calls to save its rows, which interrupts it once there are `count`."""

    def keep(rows):
        kept[:] = [dict(row) for row in rows]
        if len(rows) == count:
            raise KeyboardInterrupt

    return keep


def test_an_interrupted_ladder_shows_the_rungs_that_have_an_epoch(data_dir, capsys):
    ladder, kept = example("ladder"), []
    args = example("train_mnist_options").parse_arguments(
        None, [*SMALL, "--ladder", "--data-dir", str(data_dir)]
    )
    with pytest.raises(KeyboardInterrupt):
        ladder.ladder(args, some_digits(data_dir), interrupt_after(3, kept))
    assert [row["name"] for row in kept] == ["DataLoader, PIL, ToTensor", "data preloaded", "fusedmlp.nn"]
    assert all(len(row["seconds"]) == 1 for row in kept)
    table = capsys.readouterr().out
    for row in kept:
        assert f"{row['name']:27}{row['median']:8.3f}" in table
    assert "TrainStep" not in table


def test_an_interrupted_race_shows_the_seeds_that_are_done(data_dir, capsys):
    ladder, kept = example("ladder"), []
    options = [*SMALL, "--race", "--seeds", "5", "--data-dir", str(data_dir)]
    args = example("train_mnist_options").parse_arguments(None, options)
    with pytest.raises(KeyboardInterrupt):
        ladder.race(args, some_digits(data_dir), interrupt_after(2, kept))
    assert [row["seed"] for row in kept] == [0, 1000]
    assert "training of 1 epochs, n = 2; reached 98%: 0 of 2" in capsys.readouterr().out


def test_a_lost_race_is_logged(data_dir, tmp_path):
    log = tmp_path / "race.json"
    options = [*SMALL, "--race", "--seeds", "1", "--data-dir", str(data_dir), "--log", str(log)]
    with pytest.raises(SystemExit, match="below the goal of 98%"):
        example("train_mnist").main(options)
    (row,) = json.loads(log.read_text())["results"]
    assert row["accuracy"] < 0.98
    assert [path.name for path in tmp_path.iterdir()] == ["race.json"]


def test_killed_run_leaves_the_last_whole_checkpoint(data_dir, tmp_path):
    checkpoint = tmp_path / "mnist.pt"
    options = ["--impl", "fusedmlp", "--device", "cpu", "--epochs", "1000", "--batch-size", "6000"]
    process = subprocess.Popen(
        [*SCRIPT, "--data-dir", data_dir, *options, "--save", checkpoint],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(600):
        if checkpoint.exists():
            break
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)  # to kill it anywhere in an epoch, or while it writes
    process.kill()
    process.wait(timeout=60)
    assert torch.load(checkpoint, weights_only=True)["0.weight"].isfinite().all()


def test_plot(trained):
    image = importlib.import_module("matplotlib.image").imread(trained[0] / "mnist.png")
    height, width, _ = image.shape
    assert min(height, width) > 500
    red, green = image[..., 0], image[..., 1]
    # Digits that were read wrongly are marked in red, at the bottom right.
    marked = (red > 0.8) & (green < 0.2)
    assert marked[height // 2 :, width // 2 :].sum() > 1000


def test_checkpoint_interchanges(trained, data_dir):
    # fusedmlp wrote the checkpoint and torch reads it. With a learning rate of 0 it is tested unchanged.
    load = ["--impl", "torch", "--load", trained[0] / "mnist.pt"]
    main = example("train_mnist").main
    result = call(main, "--data-dir", data_dir, "--device", "cpu", *load, *NO_TRAINING)
    assert result.returncode == 0, result.stderr
    assert rows(result.stdout)["torch"][2] == rows(trained[1])["fusedmlp"][2]


def test_accuracy_below_the_bar_fails(data_dir):
    main = example("train_mnist").main
    result = call(main, "--data-dir", data_dir, "--impl", "torch", *NO_TRAINING)
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
        # A shell that runs the tests in the background makes them and their children ignore SIGINT.
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


@pytest.mark.slow
def test_torchrun_trains(data_dir):
    result = run(TORCHRUN, "--data-dir", data_dir, "--device", "cpu", "--impl", "fusedmlp", *TWO_GOOD_EPOCHS)
    assert result.returncode == 0, result.stderr


def test_torchrun_takes_the_same_steps_as_one_process_and_reports_once(data_dir, tmp_path):
    # Two steps: in the first the two shares differ in length, in the second one process has no rows.
    options = ["--data-dir", data_dir, "--device", "cpu", "--impl", "fusedmlp", "--batch-size", "59999"]
    options += ["--optimizer", "sgd", "--epochs", "1", "--save"]
    alone = call(example("train_mnist").main, *options, tmp_path / "alone.pt")
    together = run(TORCHRUN, *options, tmp_path / "together.pt")
    for result in (alone, together):
        assert result.returncode == 1, result.stderr
        assert result.stderr.count("is below the bar of 97%") == 1
    assert together.stdout.startswith("2 processes, each on CPU")
    assert together.stdout.count("test accuracy") == 1
    assert list(rows(together.stdout)) == ["fusedmlp"]
    expected, actual = (
        torch.load(tmp_path / name, weights_only=True) for name in ("alone.pt", "together.pt")
    )
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["module", "epoch"])
def test_diverging_loss_stops_and_names_the_step(data_dir, mode):
    script = example("train_mnist")
    options = ["--optimizer", "sgd", "--lr", "1e30", "--batch-size", "10000", "--mode", mode]
    with pytest.raises(SystemExit, match=r"In epoch 1, at step 2 of \d, the loss stopped .*: try a smaller"):
        script.main(["--data-dir", str(data_dir), *options, "--impl", "fusedmlp"])


@pytest.mark.parametrize("content", ["missing", "bytes", "other widths", "no dictionary"])
def test_bad_checkpoint_is_refused(data_dir, tmp_path, content):
    script = example("train_mnist")
    path = tmp_path / "mnist.pt"
    if content == "bytes":
        path.write_bytes(b"not a checkpoint")
    elif content == "other widths":
        script.save(example("trainer").build(torch.nn, [256, 128, 64]), path)
    elif content == "no dictionary":
        torch.save([torch.ones(3)], path)
    with pytest.raises(SystemExit, match=r"mnist\.pt (cannot be read|is not a checkpoint of a network with)"):
        script.main(["--data-dir", str(data_dir), "--load", str(path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "0 is not a positive integer"),
        (["--hidden", "256", "-1"], "-1"),
        (["--threads", "0"], "0 is not a positive integer"),
        (["--mode", "step", "--dtype", "float16"], "float16 needs --mode module"),
        (["--ladder", "--race"], "--ladder and --race exclude each other"),
        (["--log", "x.json"], "--log is for --ladder and --race"),
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
    assert text.count("examples/train_mnist.py") == 4
    assert text.count("default: ") >= 10
