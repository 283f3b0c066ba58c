"""What the reference shows differently from how griffe reads it: doctests, and the shapes of tensors."""

import re

import griffe

_DOCTEST = re.compile(r"^>>>.*(?:\n(?!\s*$).*)*", re.MULTILINE)


class ReadSource(griffe.Extension):
    """A doctest becomes code (Markdown reads `>>>` as a quotation), the shape in `Float[Tensor, "pos"]` text."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = _DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_: object) -> None:
        for annotation in (func.returns, *(parameter.annotation for parameter in func.parameters)):
            quote_shapes(annotation)

    def on_attribute(self, *, attr: griffe.Attribute, **_: object) -> None:
        quote_shapes(attr.annotation)


def quote_shapes(annotation: str | griffe.Expr | None) -> None:
    """Quote every shape: griffe drops the quotes of `"pos"`, which it takes for the name of a type."""
    if not isinstance(annotation, griffe.Expr):
        return
    if isinstance(annotation, griffe.ExprSubscript) and annotation.canonical_path.startswith("jaxtyping."):
        array, shape = annotation.slice.elements
        annotation.slice.elements = [array, '"' + str(shape).strip("'\"") + '"']
        return
    for part in annotation.iterate(flat=False):
        if part is not annotation:  # the only part of a name is itself
            quote_shapes(part)
