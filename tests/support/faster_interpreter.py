"""Triton's interpreter without a search that it repeats: this takes over a fifth off the kernels' tests.

While a kernel runs, the interpreter replaces functions of triton.language by its own. For each launch, and
for each call of a function in it, it searches all of triton.language for the functions to replace. Here that
search is made once. The same functions are replaced, and the kernels' results are the same.
"""

import inspect
from typing import Any


def install() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_builtin"):  # a later Triton may have changed this
        return

    def builtins_of(place: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]

    places = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    names = {place: builtins_of(place) for place in places}  # searched before anything is replaced

    def patch_builtin(place: Any, builder: Any, scope: Any) -> None:
        for name in names[place]:
            member = getattr(place, name)
            if tl.core.is_builtin(member):  # if not, the enclosing launch has replaced it
                interpreter._patch_attr(place, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
