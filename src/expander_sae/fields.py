"""What the fields of a dataclass of settings mean: the string under each is its documentation, in help and on pages."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap


def field_texts(section: type) -> dict[str, str]:
    """Name to the string below it, in one line, for every annotated field of a class and its bases that has one."""
    texts: dict[str, str] = {}
    for kind in reversed(section.__mro__[:-1]):  # but for `object`
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
        for field, after in itertools.pairwise(body):
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                    texts[name] = " ".join(said.split())
    return texts
