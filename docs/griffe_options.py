"""Shows fields of option classes as what they are: `field: int = option(2, "meaning")` is a 2 with a docstring."""

import ast
from typing import Any

from griffe import Attribute, Docstring, Extension


class Options(Extension):
    """Takes `option(default, "meaning", ...)` apart into the value and the docstring of a field."""

    def on_attribute_instance(self, *, node: Any, attr: Attribute, **_: Any) -> None:
        """Read default and meaning where a field is declared."""
        call = getattr(node, "value", None)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "option":
            attr.docstring = Docstring(ast.literal_eval(call.args[1]), parent=attr, lineno=node.lineno)
            attr.value = ast.unparse(call.args[0])
