"""The model families that can be loaded. One file per family; files in this folder are found automatically."""

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from hooklens.core.errors import InputError

if TYPE_CHECKING:
    from hooklens.pretrained.weight_map import Family


@cache
def families() -> dict[str, "Family"]:
    """All families by name.

    >>> "gpt2" in families()
    True
    """
    known = (importlib.import_module(f"{__name__}.{module.name}").FAMILY for module in pkgutil.iter_modules(__path__))
    return {family.name: family for family in known}


def find_family(config: dict[str, Any], where: str) -> "Family":
    """Find the family of a config.json by its model_type, or else by its architecture.

    >>> find_family({"model_type": "mistral"}, "config.json").name
    'llama'
    """
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    for family in families().values():
        if kind in family.model_types or (kind is None and set(architectures) & set(family.architectures)):
            _check_architecture(family, architectures, where)
            return family
    known = ", ".join(kind for family in families().values() for kind in family.model_types)
    seen = f"architectures {architectures}" if architectures else "no model_type"
    if kind:
        seen = f"the model_type {kind!r}"
    raise InputError(f"{where} has {seen}, which belongs to no supported family; supported model types: {known}")


def _check_architecture(family: "Family", architectures: list[str], where: str) -> None:
    """Refuse a classifier or a reward model: it has no unembedding, or a head that would be mistaken for one."""
    if architectures and not set(architectures) & set(family.architectures):
        raise InputError(
            f"{where} describes {', '.join(architectures)}; supported language models of the {family.name} family: "
            f"{', '.join(family.architectures)}"
        )
