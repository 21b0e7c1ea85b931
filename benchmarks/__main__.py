"""``python -m benchmarks``: measure, compare, or do all that a rented card is worth."""

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
        description="What is faster on this machine, and what is not. Without a command it is 'run'; each "
        "command has a --help of its own.",
        epilog="example: python -m benchmarks --quick; python -m benchmarks report old/results.json "
        "new/results.json",
    )
    subparsers = parser.add_subparsers(required=True, metavar="run | report | gpu-session")
    for room in (sweep, report, session):
        room.add_parser(subparsers)
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["run", *arguments]
    options = parser.parse_args(arguments)
    return int(options.run(options))


if __name__ == "__main__":
    raise SystemExit(main())
