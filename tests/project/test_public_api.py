"""The public names and signatures are those in ``public_api.txt``.

``python tests/project/test_public_api.py`` prints the present ones. Tell users of a change in CHANGELOG.md.
"""

import contextlib
import inspect
import io
import pathlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import fusedmlp
from fusedmlp import __main__, convert, functional, nn

LIST = pathlib.Path(__file__).with_name("public_api.txt")
OWN_LAYERS = ("LazyLinear", "Linear", "LinearReLU", "MLP", "Sequential")  # the rest of nn is torch.nn's


def described(name: str, value: Any) -> Iterator[str]:
    """The name with its signature, and for a class its fields and methods."""
    if inspect.isfunction(value):
        yield f"{name}{without_annotations(value)}"
    elif inspect.isclass(value):
        yield f"class {name}{without_annotations(value)}"
        fields = [*getattr(value, "__dataclass_fields__", ()), *getattr(value, "_fields", ())]
        yield from (f"{name}.{field}" for field in fields)
        for key, member in vars(value).items():
            if (not key.startswith("_") or key == "__call__") and key not in fields:
                if inspect.isfunction(member):
                    yield f"{name}.{key}{without_annotations(member)}"
                else:
                    yield f"{name}.{key}"
    else:
        yield name


def without_annotations(function: Any) -> str:
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def command_line(*arguments: str) -> Iterator[str]:
    """The options of ``python -m fusedmlp``, from its help."""
    said = io.StringIO()
    with (
        mock.patch("sys.argv", ["fusedmlp", *arguments, "--help"]),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        __main__.main()
    words = {word.strip("[],") for word in said.getvalue().split() if word.strip("[],").startswith("--")}
    yield from (" ".join(["python -m fusedmlp", *arguments, option]) for option in sorted(words))


def public_api() -> str:
    results = {
        "explain(...)": inspect.signature(fusedmlp.explain, eval_str=True).return_annotation,
        "verify(...)": inspect.signature(fusedmlp.verify, eval_str=True).return_annotation,
        "tune(...)": inspect.signature(fusedmlp.tune, eval_str=True).return_annotation,
    }
    lines = []
    for name in fusedmlp.__all__:
        value = getattr(fusedmlp, name)
        lines += [f"fusedmlp.{name}"] if name == "__version__" else described(f"fusedmlp.{name}", value)
    for module, names in ((functional, functional.__all__), (convert, convert.__all__), (nn, OWN_LAYERS)):
        for name in names:
            lines += described(f"{module.__name__}.{name}", getattr(module, name))
    for name, kind in results.items():
        lines += described(name, kind)
    lines += [*command_line(), *command_line("tune")]
    return "".join(f"{line}\n" for line in sorted(set(lines)))


def test_public_names_and_signatures_are_those_in_the_list() -> None:
    assert public_api() == LIST.read_text()


if __name__ == "__main__":
    print(public_api(), end="")
