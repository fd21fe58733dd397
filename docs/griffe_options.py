"""Gives the fields of option classes their meaning: `field: int = option(2, "meaning")` has no docstring of its own."""

import ast
from typing import Any

from griffe import Attribute, Docstring, Extension


class Options(Extension):
    """Takes the second argument of `option(default, "meaning", ...)` as the docstring of the field."""

    def on_attribute_instance(self, *, node: Any, attr: Attribute, **_: Any) -> None:
        """Read the meaning where a field is declared."""
        call = getattr(node, "value", None)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "option":
            meaning = ast.literal_eval(call.args[1])
            attr.docstring = Docstring(meaning, parent=attr, lineno=node.lineno)
