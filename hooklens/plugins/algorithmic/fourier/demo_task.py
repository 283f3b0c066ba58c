"""The task that demos pretend a model was trained on."""

from hooklens.model.config import TokenEmbed
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.weights.needs import Needs, lacking


def demo_modulus(model: HookedTransformer, *, mlp: bool = False) -> int | Needs:
    """The modulus for which the model's last token is "="; what the model lacks if there is none.

    >>> from hooklens.testing import tiny_model
    >>> demo_modulus(tiny_model()), demo_modulus(tiny_model(attn_only=True), mlp=True)
    (10, Needs(what='MLPs'))
    """
    cfg = model.cfg
    if (lacks := lacking(model, mlp=mlp)) is not None:
        return lacks
    if not isinstance(cfg.embed, TokenEmbed) or cfg.d_vocab < 4 or cfg.n_ctx < 3 or cfg.d_vocab_out < cfg.d_vocab - 1:
        return Needs("numbers modulo p and '=' as tokens")
    return min(cfg.d_vocab - 1, cfg.d_vocab_out)
