"""Recipes of runs that grok modular addition: the published one, a fast one, and controls that cannot or do not."""

from collections.abc import Mapping
from typing import Any

from hooklens.core.arguments import flag, real, seed_number, whole
from hooklens.core.errors import ArgumentError
from hooklens.data.modular import share_of
from hooklens.plugins.algorithmic.grokking.grokking_step import BOUND
from hooklens.plugins.algorithmic.grokking.norm_drop import NO_DECAY, SHUFFLED
from hooklens.training.run_recipe import Recipe

STEPS = 20_000  # most of a run; one that generalised stops before
_WARMUP = 10
_WIDTH = 128
RATE, _FAST_RATE = 1e-3, 3e-3
_LARGEST = 997  # 8 GB of logits in float64


def grokking_recipe(
    p: int = 113,
    *,
    fraction: float = 0.3,
    weight_decay: float = 1.0,
    seed: int = 0,
    steps: int = STEPS,
    solved_for: int | None = 500,
    shuffled: bool = False,
) -> Recipe:
    """The published run that groks addition modulo 113: its data, its model and how it is trained.

    >>> recipe = grokking_recipe(p=5, fraction=0.6, steps=2)
    >>> data = recipe.load_data()
    >>> model = recipe.load_model(data)
    >>> model.cfg.n_layers, model.cfg.act_fn, recipe.settings().optimizer.weight_decay
    (1, 'relu', 1.0)

    `hl.train(model, data, steps=recipe.training["steps"], settings=recipe.settings())` trains it. One layer, width 128,
    4 heads of 32, 512 ReLUs, learned positions, no layer norm, an unembedding of its own. All training pairs in every
    step; AdamW with rate 1e-3 and weight decay 1; cross-entropy at the last position.

    From the authors' code, which the paper does not describe: N(0, 1/d_model) weights, W_U N(0, 1/d_vocab); attention
    has no biases, the MLP has (from 0), and the equals sign is one of the p + 1 answers; betas (0.9, 0.98), 10 steps of
    warm-up (the first at a tenth of the rate, at 0 there); losses in float64.

    The run ends when the held-out accuracy was above 0.99 for `solved_for` steps (None: only after `steps`, as there,
    with 40,000 in the paper and 50,000 in the code). `shuffled` permutes the answers: see `control_recipes`.

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", section 3.
    """
    check_table_size(p, fraction)
    weight_decay, seed = _check_decay(weight_decay, RATE), seed_number(seed)
    p, fraction, steps = int(p), float(fraction), whole("steps", steps, 1)
    data = {"task": "modular_arithmetic", "p": p, "fraction": fraction, "seed": seed}
    init = {"part": "normal", "std": _WIDTH**-0.5, "unembed_std": (p + 1) ** -0.5}
    training = {"steps": steps, "batch": p**2, "seed": seed, "optimizer": {"weight_decay": weight_decay}}
    training |= {"schedule": {"warmup": _WARMUP}}  # of short runs too, so that they are the beginning of longer ones
    if solved_for is not None:
        training |= {"solved": BOUND, "solved_for": whole("solved_for", solved_for)}
    return Recipe(
        data | {"shuffled": True} if flag("shuffled", shuffled) else data,
        {"d_model": _WIDTH, "seed": seed, "init": init},
        training,
    )


def fast_recipe(
    p: int = 43,
    *,
    fraction: float = 0.4,
    weight_decay: float = 1.0,
    seed: int = 0,
    steps: int = 6_000,
    solved_for: int | None = 500,
) -> Recipe:
    """A run that groks in under two minutes on 2 cores: the same model on a smaller table, at three times the rate.

    >>> fast_recipe().training["optimizer"]["lr"], fast_recipe().data["p"]
    (0.003, 43)

    The setting is ours. How many of ten seeds grok: benchmarks/results, by `benchmarks/grokking_fast.py`.
    """
    _check_decay(weight_decay, _FAST_RATE)
    recipe = grokking_recipe(
        p, fraction=fraction, weight_decay=weight_decay, seed=seed, steps=steps, solved_for=solved_for
    )
    return recipe.changed(training={"evaluate": 240, "checkpoints": 30, "optimizer": {"lr": _FAST_RATE}})


def control_recipes(recipe: Recipe) -> Mapping[str, Recipe]:
    """The controls of a run that groks: without weight decay, and on shuffled answers; the same otherwise.

    >>> {name: control.load_data().shuffled for name, control in control_recipes(grokking_recipe()).items()}
    {'weight decay 0': False, 'shuffled answers': True}
    """
    return {
        NO_DECAY: recipe.changed(training={"optimizer": without_decay(recipe.training["optimizer"])}),
        SHUFFLED: recipe.changed(data={"shuffled": True}),
    }


def without_decay(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """A rule with weight decay 0, or with a rule inside it that has."""
    inner = optimizer.get("inner")
    return {**optimizer, **({"weight_decay": 0.0} if inner is None else {"inner": without_decay(inner)})}


def weight_decay_of(optimizer: Mapping[str, Any]) -> float:
    """The weight decay of a rule, or of the rule inside it.

    >>> weight_decay_of({"part": "orthogonal_gradient", "inner": {"part": "adamw", "weight_decay": 0.5}})
    0.5
    """
    inner = optimizer.get("inner")
    return float(optimizer.get("weight_decay", 0.0)) if inner is None else weight_decay_of(inner)


def _check_decay(weight_decay: float, rate: float) -> float:
    """Return the decay; refused if it is negative, or takes all of a weight in one step."""
    decay = real("weight_decay", weight_decay, 0.0)
    if decay * rate >= 1:
        raise ArgumentError(
            "{weight_decay} is below {0:.4g} at the rate {1:g}, got {2:g}: every step would set the weights to 0 or "
            "turn their sign",
            *(1 / rate, rate, weight_decay),
        )
    return decay


def check_table_size(p: int, fraction: float, *, prime: bool = True) -> None:
    """Raise unless p is a prime from 5 on, and the fraction leaves pairs to train on and to test.

    >>> check_table_size(100, 0.3)
    Traceback (most recent call last):
    hooklens.core.errors.ArgumentError: p is a prime of at least 5 here, got 100; the closest are 97 and 101. ...
    """
    if whole("p", p, 5) > _LARGEST:
        raise ArgumentError("{p} is at most {0} here, got {1}: the table has p^2 pairs with p answers", _LARGEST, p)
    if prime and not is_prime(p):
        below = next(n for n in range(p - 1, 1, -1) if is_prime(n))
        above = next(n for n in range(p + 1, 2 * p) if is_prime(n))
        raise ArgumentError(
            "{p} is a prime of at least 5 here, got {0}; the closest are {1} and {2}. Modulo other numbers a frequency "
            "that shares a factor with p cannot tell all answers apart, and key frequencies are not comparable",
            *(p, below, above),
        )
    if not 0 < real("fraction", fraction) <= 1 or share_of(p**2, fraction) < 1:
        raise ArgumentError(
            "{fraction} is the share of all {0} pairs to train on, above 0 and below 1 and at least one pair; got {1}",
            *(p**2, fraction),
        )
    if share_of(p**2, fraction) >= p**2:
        raise ArgumentError(
            "{fraction} {0} leaves no pair of {1} to test on, and a run without held-out pairs cannot be seen to grok; "
            "give less than 1, such as 0.3",
            *(fraction, p**2),
        )


def is_prime(n: int) -> bool:
    """Whether a number is prime.

    >>> [n for n in range(20) if is_prime(n)]
    [2, 3, 5, 7, 11, 13, 17, 19]
    """
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))
