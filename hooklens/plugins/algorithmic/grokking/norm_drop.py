"""Does the norm of the weights drop at grokking, and more than in runs that do not grok?"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.errors import ArgumentError, InputError, WrongType
from hooklens.plugins.algorithmic.grokking.given_curves import Numbers, given_steps, given_values
from hooklens.results.result import Result, Table
from hooklens.training.training_run import Run, open_run

GROKKING, NO_DECAY, SHUFFLED = "grokking run", "weight decay 0", "shuffled answers"
CONTROLS = (NO_DECAY, SHUFFLED)

_POINTS = 400  # of a stored curve


@dataclass(frozen=True, eq=False)
class NormDrops(Result):
    """The sum of squared weights of runs over the same window of steps, that of the rise of the held-out accuracy.

    `drop` is 1 - after/before: positive where the sum of squares fell. A drop is evidence of what happens at grokking
    only if it is larger than in every control, because weight decay alone also shrinks weights.
    """

    terms = {
        "kind": "a run that groks, or a control of the same model, budget and window",
        "before": "sum of squared weights at the start of the rise",
        "after": "the same at the end of the rise",
        "drop": "1 - after / before",
    }
    baselines = ("start", "stop")

    start: int
    stop: int
    kinds: list[str]
    seeds: list[int]
    steps: list[Int[Tensor, "_point"]]
    squares: list[Float[Tensor, "_point"]]

    @property
    def before(self) -> Float[Tensor, "run"]:
        """The sum of squares at the start of the window."""
        return self._at(self.start)

    @property
    def after(self) -> Float[Tensor, "run"]:
        """The sum of squares at its end."""
        return self._at(self.stop)

    @property
    def drop(self) -> Float[Tensor, "run"]:
        """The share of the sum of squares that was lost in the window."""
        return 1 - self.after / self.before

    @property
    def is_evidence(self) -> bool:
        """Whether both kinds of control are there, and every grokking run drops by more than all of them."""
        grokking, controls = self._split()
        return set(CONTROLS) <= set(self.kinds) and bool(grokking.min() > max(float(controls.max()), 0.0))

    @property
    def statement(self) -> str:
        """What the drops say, from their numbers."""
        grokking, controls = self._split()
        least, most = float(grokking.min()), float(controls.max())
        change = f"fell by {least:.1%}" if least >= 0 else f"rose by {-least:.1%}"
        lost = f"Between steps {self.start:,} and {self.stop:,} the sum of squared weights {change}"
        missing = [kind for kind in CONTROLS if kind not in self.kinds]
        if missing:
            return f"{lost}. This is no evidence yet: no control with {' or '.join(missing)} was trained."
        fell = f"in the controls it fell by at most {most:.1%}" if most >= 0 else "in no control it fell"
        if self.is_evidence:
            return f"{lost}, and {fell}: the drop goes with grokking."
        reason = "because runs that do not grok lose as much" if least > 0 else "because there is none"
        return f"{lost}, and {fell}: the drop is no evidence, {reason}."

    def table(self, n: int | None = None) -> Table:
        """One row per run."""
        values = (self.before, self.after, self.drop)
        rows = list(zip(self.kinds, self.seeds, *(column.tolist() for column in values), strict=True))
        return Table(("kind", "seed", "before", "after", "drop"), rows).head(n)

    def figure(self) -> Any:
        """The sum of squared weights against steps; the window is between the dashed lines."""
        from hooklens.viz.curves import lines
        from hooklens.viz.drawing import mark_steps

        names = [f"{kind}, seed {seed}" for kind, seed in zip(self.kinds, self.seeds, strict=True)]
        values, at = dict(zip(names, self.squares, strict=True)), dict(zip(names, self.steps, strict=True))
        figure = lines(values, at, title="Weight norm", x_title="step", y_title="sum of squared weights", log="xy")
        return mark_steps(figure, {"start": max(self.start, 1), "stop": self.stop})

    def _at(self, step: int) -> Float[Tensor, "run"]:
        """Interpolated between the stored points."""
        curves = zip(self.steps, self.squares, strict=True)
        return torch.tensor([float(np.interp(step, at.numpy(), squares.numpy())) for at, squares in curves])

    def _split(self) -> tuple[Float[Tensor, "grokking_run"], Float[Tensor, "control_run"]]:
        """The drops of grokking runs, and those of controls (0 where there is none)."""
        is_grokking = torch.tensor([kind == GROKKING for kind in self.kinds])
        controls = self.drop[~is_grokking]
        return self.drop[is_grokking], controls if len(controls) else torch.zeros(1)


def squared_weights(
    run: Run | str | os.PathLike, *, including: Sequence[int] = ()
) -> tuple[Int[Tensor, "point"], Float[Tensor, "point"]]:
    """The sum of squared weights before steps of a run, at most 400 of them at equal ratios, with the last.

    Steps to be compared, such as the ends of a window, are given as `including`: between points of the curve a sum is
    only interpolated.

    >>> from hooklens.data.modular import modular_arithmetic
    >>> from hooklens.testing import tiny_model
    >>> from hooklens.training.loop import train
    >>> run = train(tiny_model(d_vocab=6), modular_arithmetic(p=5, fraction=0.8), steps=3)
    >>> steps, squares = squared_weights(run)
    >>> steps.tolist(), bool((squares > 0).all())
    ([0, 1, 2], True)

    Reference: Nanda et al. (2023), section 5.2, which plots the same sum.
    """
    rows = (run if isinstance(run, Run) else open_run(run)).steps()
    at_ratios = np.round(np.geomspace(1, len(rows.steps), _POINTS)).astype(np.int64) - 1
    kept = np.union1d(at_ratios, np.flatnonzero(np.isin(rows.steps, np.asarray(including, dtype=np.int64))))
    squares = np.square(rows["parameter_norms"][kept].astype(np.float64)).sum(1)
    return torch.from_numpy(rows.steps[kept].astype(np.int64)), torch.from_numpy(squares)


def compare_norm_drops(curves: Sequence[tuple[str, int, Numbers, Numbers]], *, start: int, stop: int) -> NormDrops:
    """Is the norm's drop in a window of steps larger than in the controls? Curves are (kind, seed, steps, squares).

    >>> steps = torch.tensor([0, 100, 200])
    >>> falls = torch.tensor([[4.0, 4.0, 1.0], [4.0, 5.0, 6.0], [4.0, 3.0, 2.7]])
    >>> kinds = (GROKKING, NO_DECAY, SHUFFLED)
    >>> drops = compare_norm_drops([(kind, 0, steps, fall) for kind, fall in zip(kinds, falls)], start=100, stop=200)
    >>> drops.is_evidence, [round(drop, 3) for drop in drops.drop.tolist()]
    (True, [0.75, -0.2, 0.1])
    """
    if whole("start", start) > whole("stop", stop):
        raise ArgumentError("the window from {start} {0:,} to {stop} {1:,} ends before it begins", start, stop)
    given = [_given(curve) for curve in curves]
    kinds = [kind for kind, *_ in given]
    if GROKKING not in kinds:
        raise InputError("none of these runs grokked, so that there is no window in which the norm could drop")
    short = [(kind, seed) for kind, seed, steps, _ in given if not len(steps) or int(steps[-1]) + 1 < stop]
    if short:
        raise InputError(
            f"the window ends at step {stop:,}, and these runs were stopped before: {short}; train controls as long"
        )
    return NormDrops(
        start=start,
        stop=stop,
        kinds=kinds,
        seeds=[seed for _, seed, _, _ in given],
        steps=[steps for *_, steps, _ in given],
        squares=[squares for *_, squares in given],
    )


def _given(curve: Any) -> tuple[str, int, Int[Tensor, "_point"], Float[Tensor, "_point"]]:
    """A curve with steps in order, and positive sums."""
    if not isinstance(curve, tuple | list) or len(curve) != 4 or not isinstance(curve[0], str):
        raise WrongType(f"a curve is (kind, seed, steps, squares), such as ('{GROKKING}', 0, ...); got {curve!r:.60}")
    kind, seed, steps, squares = curve
    at = given_steps("steps", steps)
    return kind, seed, at, given_values("squares", squares, at, least=0.0)
