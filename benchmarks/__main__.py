"""``python -m benchmarks``: measure, compare two measurements, or do everything on a rented GPU."""

import argparse
import importlib.util
import sys


def main() -> int:
    missing = [name for name in ("tqdm", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f'python -m benchmarks needs {" and ".join(missing)}: pip install -e ".[bench]"', file=sys.stderr
        )
        return 2
    from benchmarks import report, session, sweep

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure where fusedmlp is faster than PyTorch on this machine, and where not. The "
        "default command is 'run'. Each command has its own --help.",
        epilog="example: python -m benchmarks --quick; python -m benchmarks report old/results.json "
        "new/results.json",
    )
    subparsers = parser.add_subparsers(required=True, metavar="run | report | gpu-session")
    for module in (sweep, report, session):
        module.add_parser(subparsers)
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["run", *arguments]
    options = parser.parse_args(arguments)
    return int(options.run(options))


if __name__ == "__main__":
    raise SystemExit(main())
