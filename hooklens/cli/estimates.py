"""How long will a command take? The number of tokens that pass the whole model, times the duration of a timed pass.

The counts assume causal prompts, whose patches recompute on average half of the model and half of the later positions.
They are meant to distinguish a minute from an hour.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooklens.pretrained.model_check import random_inputs

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer
    from hooklens.plugins import PluginInfo
    from hooklens.training.run_recipe import Recipe

_WORTH_SAYING = 60  # seconds
_TIMED = 256  # tokens of the timed pass: with few, a token takes longer than in a sweep
_PASSES, _TIMING = 7, 2.0  # at most so many timed passes, and none begun after so many seconds of them
_STEPS_TIMED = 4  # of training
_DEMO_TOKENS = 64  # of the prompts of a demo
_CANDIDATES = 20  # heads that the demo patches in every pair
# shares of heads, measured on SmolLM2: those with attention to a kind of key above chance; those that suppress a token
_SCORED, _SUPPRESSORS = 0.25, 0.08
# passes per token: in integrated gradients, in one random circuit, and the factor of a full study
_GRADIENT, _A_CIRCUIT, _FULL = 100, 0.8, 40


def of_patch(model: "HookedTransformer", n_pos: int, grids: Sequence[Sequence[str]]) -> float:
    """Token count of a sweep over each of these grids, and of whole layers."""
    cfg = model.cfg
    sizes = {"layer": cfg.n_layers, "pos": n_pos, "head": cfg.n_heads, "neuron": cfg.d_mlp}
    total = float(cfg.n_layers * n_pos)
    for axes in grids:
        cells = 1
        for axis in axes:
            cells *= sizes[axis]
        total += cells * n_pos / (4 if "pos" in axes else 2)
    return total


def of_demo(model: "HookedTransformer", n_pairs: int, n_pos: int) -> float:
    """Token count of the shown pair's sweeps, and of whole layers and the strongest heads in every pair."""
    shown = of_patch(model, n_pos, [("layer", "pos"), ("layer", "head")])
    return shown + n_pairs * n_pos * (4 + model.cfg.n_layers / 2 + _CANDIDATES / 4)


def of_heads(model: "HookedTransformer", n: int, ioi: int, n_pos: int = 25) -> float:
    """Token count of blocked attention on `n` sequences, of runs without a head on text, and of prompt pairs."""
    heads = model.cfg.n_layers * model.cfg.n_heads
    blocked = 2 * 3 * _SCORED * heads * n * n_pos / 2
    without = _SUPPRESSORS * heads * 20 * 8 * 32
    return blocked + without + 4 * n_pos * ioi


def of_head_study(model: "HookedTransformer", tokens: int) -> float:
    """Token count of a sweep over all heads for pairs with this many tokens, and of three passes over them."""
    return tokens * (3 + model.cfg.n_layers * model.cfg.n_heads / 2)


def of_lens(model: "HookedTransformer", tokens: int) -> float:
    """Token count of the passes over these tokens, and of unembedding every layer's stream."""
    unembed = model.cfg.d_model * model.cfg.d_vocab_out
    share = unembed / (unembed + sum(weight.numel() for weight in model.blocks.parameters()))
    return tokens * (3 + model.cfg.n_layers * share)


def of_circuit(model: "HookedTransformer", tokens: int, draws: int, *, full: bool) -> float:
    """Token count of gradients on half of the pairs, and of random circuits on the other half."""
    return tokens / 2 * (_GRADIENT + _A_CIRCUIT * draws) * (_FULL if full else 1)


def of_plugin(model: "HookedTransformer", plugin: "PluginInfo") -> float:
    """Approximate token count of a plugin's demo: a sweep over all heads of four pairs, or what takes longer."""
    more = 0.0
    if ".circuits." in plugin.module or plugin.name == "study_circuit":
        more = of_circuit(model, _DEMO_TOKENS, 100, full=plugin.name == "evaluate_circuit")
    elif plugin.name == "classify_heads":
        more = of_heads(model, 6, 0)
    return max(of_head_study(model, _DEMO_TOKENS), more)


def of_check(model: "HookedTransformer") -> float:
    """Seconds of a self check: about twenty passes over few tokens, twelve of which are steps."""
    return 20 * _seconds_of_a_pass(model, random_inputs(model, batch=2, pos=min(12, model.cfg.n_ctx), seed=0))


def of_generate(model: "HookedTransformer", max_new_tokens: int) -> float:
    """Seconds of this number of steps, each a pass over one token."""
    return max_new_tokens * _seconds_of_a_pass(model, torch.ones(1, 1, dtype=torch.long, device=model.device))


def how_long(model: "HookedTransformer", tokens: int | float) -> list[str]:
    """A line with the time that this many tokens take; none if it is under a minute.

    >>> from hooklens.testing import tiny_model
    >>> how_long(tiny_model(), 1)
    []
    """
    return announced(tokens * seconds_a_token(model))


def announced(seconds: int | float, *, at_most: bool = False) -> list[str]:
    """A line that announces this many seconds, or at most so many; none if it is under a minute.

    >>> [announced(seconds)[0][:33] for seconds in (150, 3 * 3600)]
    ['this will take about 3 minutes on', 'this will take about 3.0 hours on']
    """
    if seconds < _WORTH_SAYING:
        return []
    words = f"{-(-seconds // 60):.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"
    most = "at most " if at_most else ""
    return [f"this will take {most}about {words} on this machine (estimated from one pass); Ctrl-C stops it"]


def seconds_a_token(model: "HookedTransformer") -> float:
    """The duration of one token in a pass of a few hundred."""
    n = min(_TIMED, model.cfg.n_ctx)
    return _seconds_of_a_pass(model, torch.ones(1, n, dtype=torch.long, device=model.device)) / n


def _seconds_of_a_pass(model: "HookedTransformer", inputs: Tensor) -> float:
    """The least of a few: other work on the machine only ever adds."""
    seconds: list[float] = []
    with torch.no_grad():
        model(inputs[:, :1], logits_at=-1)  # one-time preparation is not counted
        while not seconds or (len(seconds) < _PASSES and sum(seconds) < _TIMING):
            begin = time.perf_counter()
            float(model(inputs, logits_at=-1).flatten()[0])  # waits for a device that runs ahead
            seconds.append(time.perf_counter() - begin)
    return min(seconds)


def of_training(recipe: "Recipe", device: Any = None) -> float:
    """Seconds of one training step of a recipe: the least of a few, taken in a temporary folder."""
    from hooklens.training.loop import train

    short = recipe.changed(training={"steps": _STEPS_TIMED, "evaluate": 1, "checkpoints": 1})
    data = short.load_data()
    run = train(short.load_model(data, device=device), data, steps=_STEPS_TIMED, settings=short.settings(), show=False)
    return float(run.steps()["seconds"].min())
