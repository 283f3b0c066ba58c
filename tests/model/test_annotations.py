"""Every tensor that a function of model/ takes or returns says its shape; the tests run with these executed."""

import ast
from pathlib import Path

import hooklens.model

SHAPED = {"Float", "Int", "Integer", "Bool", "Shaped", "Num", "Complex", "Inexact", "Callable"}
# What stands for a weight or any tensor by design: algebra on matrices of any shape, weights seen through, free input.
FREE = {"factored.py", "views.py"}
FREE_NAMES = {"to_string", "to_str_tokens", "write", "views", "ours", "theirs"}


def bare(node):
    """Does the annotation name a Tensor without a shape?"""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in SHAPED:
        return False
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return bare(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.Name) and node.id == "Tensor":
        return True
    return ast.unparse(node) == "torch.Tensor" or any(map(bare, ast.iter_child_nodes(node)))


def annotations(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for each in (*(a.annotation for a in arguments), node.returns):
                if each is not None:
                    yield node.name, each
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target), node.annotation


def test_no_tensor_of_the_model_is_without_a_shape():
    folder = Path(hooklens.model.__file__).parent
    found = [
        f"{path.name}: {name}: {ast.unparse(annotation)}"
        for path in sorted(folder.glob("*.py"))
        if path.name not in FREE
        for name, annotation in annotations(ast.parse(path.read_text()))
        if bare(annotation) and name not in FREE_NAMES
    ]
    assert not found


def test_a_bare_tensor_is_seen():
    code = 'def f(a: Float[Tensor, "x"], b: "Tensor | None", c: torch.Tensor) -> tuple[Tensor, int]: ...'
    seen = [ast.unparse(each) for _, each in annotations(ast.parse(code)) if bare(each)]
    assert seen == ["'Tensor | None'", "torch.Tensor", "tuple[Tensor, int]"]
