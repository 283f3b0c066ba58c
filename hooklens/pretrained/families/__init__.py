"""The families of models that can be loaded, one file each; a file put here is found."""

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from hooklens.core.errors import InputError

if TYPE_CHECKING:
    from hooklens.pretrained.weight_map import Family


@cache
def families() -> dict[str, "Family"]:
    """Every family by its name.

    >>> "gpt2" in families()
    True
    """
    found = (importlib.import_module(f"{__name__}.{module.name}").FAMILY for module in pkgutil.iter_modules(__path__))
    return {family.name: family for family in found}


def find_family(config: dict[str, Any], where: str) -> "Family":
    """The family that a config.json describes, by its model_type, or else by its architecture.

    >>> find_family({"model_type": "mistral"}, "config.json").name
    'llama'
    """
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    for family in families().values():
        if kind in family.model_types or (kind is None and set(architectures) & set(family.architectures)):
            _check_architecture(family, architectures, where)
            return family
    known = ", ".join(kind for family in families().values() for kind in family.model_types)
    seen = (
        f"the model_type {kind!r}" if kind else f"architectures {architectures}" if architectures else "no model_type"
    )
    raise InputError(f"{where} has {seen}, which is of no family that can be loaded; model types that are: {known}")


def _check_architecture(family: "Family", architectures: list[str], where: str) -> None:
    """Refuse a classifier or a reward model: its weights would lack the unembedding, or be read as one."""
    if architectures and not set(architectures) & set(family.architectures):
        raise InputError(
            f"{where} describes {', '.join(architectures)}; of the {family.name} family these language models can be "
            f"loaded: {', '.join(family.architectures)}"
        )
