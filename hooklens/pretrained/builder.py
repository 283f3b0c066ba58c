"""Build a model from a config and a stream of weights: check names and shapes, then assign the tensors one by one."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hooklens.core.errors import FileRefused, InputError
from hooklens.core.files import reading
from hooklens.model.config import HookedTransformerConfig
from hooklens.model.transformer import HookedTransformer
from hooklens.pretrained.families import find_family
from hooklens.pretrained.hf_config import HFConfig
from hooklens.pretrained.tokenizer import Tokenizer
from hooklens.pretrained.weight_map import Family, Piece


@dataclass(frozen=True)
class Weights:
    """Named tensors of a model on the hub. A shape may be unknown (None) until its tensor is read.

    `read` yields the tensors with the given names, one at a time, each in its own memory.
    """

    where: str
    shapes: Mapping[str, tuple[int, ...] | None]
    read: Callable[[Collection[str]], Iterator[tuple[str, Tensor]]]


def build(
    values: dict,
    weights: Weights,
    *,
    name: str,
    tokenizer: Tokenizer | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HookedTransformer:
    """Build the model that a Hugging Face config and weights describe, after checking every name and shape."""
    dtype = dtype or torch.float32
    with reading(weights.where, "a model"):
        model, usual, pieces = _planned(values, weights, name, tokenizer, dtype)
    for theirs, tensor in weights.read(usual):
        piece = pieces[usual[theirs]]
        check_shapes({theirs: (tuple(tensor.shape), piece.shape)}, weights.where)
        for ours, part in piece.cut(tensor, model.cfg.n_heads).items():
            assign(model, ours, part.to(device=device or "cpu", dtype=dtype))
    model.tie()
    return model


def _planned(
    values: dict, weights: Weights, name: str, tokenizer: Tokenizer | None, dtype: torch.dtype
) -> tuple[HookedTransformer, dict[str, str], dict[str, Piece]]:
    """The model without its weights; the usual name of each name in the file; and what each usual name contains."""
    config = HFConfig(values, f"the config of {weights.where}", most_layers=len(weights.shapes))
    if quantised := config.get("quantization_config"):
        raise InputError(
            f"{weights.where} is quantised ({dict(quantised).get('quant_method', 'unnamed method')}); "
            "unquantised safetensors and GGUF files can be loaded"
        )
    family = find_family(values, config.where)
    usual = family.usual_names(weights.shapes)
    cfg = family.config(config).replace(model_name=name)
    cfg, usual = _tied(cfg, family, usual, weights)
    model = HookedTransformer(cfg, tokenizer=tokenizer, device="meta", dtype=dtype)
    pieces = family.pieces(cfg, parameter_shapes(model))
    check_names(usual.values(), pieces, weights.where, f"a {family.name} model")
    shapes = {name: (weights.shapes[name], pieces[usual_name].shape) for name, usual_name in usual.items()}
    check_shapes(shapes, weights.where)
    return model, usual, pieces


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter; a tied parameter is listed once."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def own_parameters(model: HookedTransformer, what: str) -> dict[str, nn.Parameter]:
    """The parameters by name, a tied one once. Raises unless the configuration alone describes them."""
    parameters = dict(model.named_parameters())
    wanted = parameter_shapes(HookedTransformer(model.cfg, device="meta"))
    if odd := sorted(name for name in wanted.keys() | parameters.keys() if (name in wanted) != (name in parameters)):
        raise InputError(
            f"{what} needs a model with exactly the parameters of its configuration; these differ: {listed(odd)}; "
            "merge adapters into the weights first, and tie the weights that cfg declares as tied"
        )
    return parameters


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Make this tensor the model's parameter of that name, without copying."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value))


def check_names(seen: Collection[str], wanted: Collection[str], where: str, what: str) -> None:
    """Refuse a set of weights with missing or extra names."""
    missing, extra = sorted(set(wanted) - set(seen)), sorted(set(seen) - set(wanted))
    if missing:
        also = f" (and contains {listed(extra)}, which are not part of it)" if extra else ""
        raise FileRefused(
            f"{where} lacks {len(missing)} of the weights of {what}: {listed(missing)}{also}; "
            "are all of its files present?"
        )
    if extra:
        raise FileRefused(
            f"{where} contains {len(extra)} weights that {what} does not have: {listed(extra)}; "
            "is it a variant of the architecture, or an adapter?"
        )


def check_shapes(shapes: Mapping[str, tuple[tuple[int, ...] | None, tuple[int, ...]]], where: str) -> None:
    """Refuse weights whose shapes differ from those of the configuration; `shapes` holds both, by name."""
    wrong = {name: pair for name, pair in shapes.items() if pair[0] is not None and pair[0] != pair[1]}
    if wrong:
        shown = [f"{name} is {list(seen or ())} instead of {list(wanted)}" for name, (seen, wanted) in wrong.items()]
        raise FileRefused(
            f"{where} contains {len(wrong)} weights whose shape differs from its configuration: {listed(shown)}; "
            "do the configuration and the weights belong together?"
        )


def listed(names: Collection[str], most: int = 6) -> str:
    """The first few names, and the total number if there are more.

    >>> listed("abc", most=2)
    'a, b, ... (3 in all)'
    """
    shown = ", ".join(list(names)[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def _tied(
    cfg: HookedTransformerConfig, family: Family, usual: dict[str, str], weights: Weights
) -> tuple[HookedTransformerConfig, dict[str, str]]:
    """If a tied model's file also stores the unembedding: drop it, or untie if it differs, as transformers does."""
    if not cfg.tie_word_embeddings or family.head not in usual.values():
        return cfg, usual
    theirs = {name: original for original, name in usual.items()}
    embed = f"{family.outside['embed']}.weight"
    if embed in theirs:
        pair = dict(weights.read((theirs[embed], theirs[family.head])))
        if not torch.equal(*pair.values()):
            return cfg.replace(tie_word_embeddings=False), usual
    return cfg, {original: name for original, name in usual.items() if name != family.head}
