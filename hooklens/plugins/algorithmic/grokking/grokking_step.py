"""When did a run grok? Memorisation and generalisation as steps of its accuracy curves, and "did not grok" said."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import real
from hooklens.core.errors import ArgumentError, InputError
from hooklens.plugins.algorithmic.grokking.given_curves import Numbers, given_steps, given_values
from hooklens.results.result import Result, Table
from hooklens.training.training_run import Run, open_run

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

BOUND = 0.99  # accuracy from which a set counts as learnt
DELAY = 2.0  # generalisation comes at least so many times later than memorisation
_RISES = 0.25  # of the way from the held-out accuracy at memorisation to the bound: below it the rise has not begun

Curve = Float[Tensor, "evaluation"]


@dataclass(frozen=True, eq=False)
class GrokkingStep(Result):
    """The accuracies and losses at every evaluation, and the steps at which each set was learnt (None: never).

    `memorised_at` is the first step with a training accuracy of at least `bound`; `generalised_at` the first evaluation
    with such a held-out accuracy. The run grokked if it did both, the second at least `delay` times as late as the
    first. The definition is ours: the papers show curves and name no threshold.
    """

    baselines = ("bound",)

    steps: Int[Tensor, "evaluation"]
    train_accuracy: Curve
    held_out_accuracy: Curve
    train_loss: Curve
    held_out_loss: Curve
    memorised_at: int | None
    bound: float = BOUND
    delay: float = DELAY

    @classmethod
    def of_curves(
        cls,
        train_steps: Numbers,
        train_accuracy: Numbers,
        held_out_steps: Numbers,
        held_out_accuracy: Numbers,
        *,
        losses: tuple[Float[Tensor, "step"], Curve] | None = None,
        bound: float = BOUND,
        delay: float = DELAY,
    ) -> "GrokkingStep":
        """When did these curves grok? `losses` are those of training and of the held-out set, at the same steps.

        >>> steps = torch.tensor([0, 100, 1000, 10000])
        >>> train, held_out = torch.tensor([0.01, 1, 1, 1]), torch.tensor([0.01, 0.02, 0.05, 1])
        >>> GrokkingStep.of_curves(steps, train, steps, held_out).statement[:97]
        'The run grokked: training accuracy reached 0.99 at step 100, held-out accuracy at step 10,000, 10'
        """
        if not 0 < real("bound", bound) <= 1:
            raise ArgumentError("{bound} is an accuracy above 0, at most 1; got {0}", bound)
        real("delay", delay, 1.0)
        train_steps = given_steps("train_steps", train_steps)
        held_out_steps = given_steps("held_out_steps", held_out_steps)
        train_accuracy = given_values("train_accuracy", train_accuracy, train_steps, least=0.0, most=1.0)
        held_out_accuracy = given_values("held_out_accuracy", held_out_accuracy, held_out_steps, least=0.0, most=1.0)
        if not len(train_steps) or not len(held_out_steps):
            raise InputError("grokking is a matter of two curves, and one of them has no step; train for at least one")
        at = torch.searchsorted(train_steps, held_out_steps).clamp_max(len(train_steps) - 1)
        missing = torch.full((len(train_steps),), torch.nan), torch.full((len(held_out_steps),), torch.nan)
        train_loss, held_out_loss = missing if losses is None else losses
        return cls(
            steps=held_out_steps,
            train_accuracy=train_accuracy[at],
            held_out_accuracy=held_out_accuracy,
            train_loss=train_loss[at],
            held_out_loss=held_out_loss.clone(),
            memorised_at=_first(train_steps, _reaches(train_accuracy, bound)),
            bound=float(bound),
            delay=float(delay),
        )

    @property
    def generalised_at(self) -> int | None:
        """The first evaluation at which the held-out accuracy is at least `bound`."""
        return _first(self.steps, _reaches(self.held_out_accuracy, self.bound))

    @property
    def rise_at(self) -> int | None:
        """Where the rise begins: the last evaluation before generalisation at which little of the way was made.

        That is, with a held-out accuracy below a quarter of the way from that at memorisation to the bound. A model
        that memorises may answer many unseen pairs, such as those whose partner (b, a) it was trained on.
        """
        if self.generalised_at is None:
            return None
        memorised = self.steps >= (self.memorised_at or 0)
        start = float(self.held_out_accuracy[memorised][0] if bool(memorised.any()) else self.held_out_accuracy[-1])
        low = self.held_out_accuracy < start + _RISES * (self.bound - start)
        before = (self.steps < self.generalised_at) & low
        return int(self.steps[before].max()) if bool(before.any()) else int(self.steps[0])

    @property
    def gap(self) -> int | None:
        """The steps between memorisation and generalisation."""
        if self.memorised_at is None or self.generalised_at is None:
            return None
        return self.generalised_at - self.memorised_at

    @property
    def grokked(self) -> bool:
        """Whether generalisation came, and at least `delay` times as late as memorisation."""
        if self.memorised_at is None or self.generalised_at is None:
            return False
        return self.generalised_at >= self.delay * max(self.memorised_at, 1)

    @property
    def verdict(self) -> str:
        """One of five: what the run did."""
        if self.grokked:
            return "grokked"
        if self.memorised_at is None and self.generalised_at is None:
            return "did not grok: never memorised"
        if self.generalised_at is None:
            return "did not grok: memorised, not generalised by the end"
        if self.memorised_at is None:
            return "did not grok: generalised without a memorised training set"
        return "did not grok: generalised without a delay"

    @property
    def statement(self) -> str:
        """The verdict with its numbers, as a sentence."""
        last, n = int(self.steps[-1]), f"{self.bound:g}"
        train, held_out = float(self.train_accuracy[-1]), float(self.held_out_accuracy[-1])
        ends = f"training accuracy {train:.3f} and held-out accuracy {held_out:.3f} after the last step, {last:,}"
        if self.generalised_at is None or self.memorised_at is None:
            return f"The run {self.verdict} (bound {n}); {ends}."
        factor = self.generalised_at / max(self.memorised_at, 1)
        return (
            f"The run {self.verdict}: training accuracy reached {n} at step {self.memorised_at:,}, held-out accuracy "
            f"at step {self.generalised_at:,}, {factor:.1f} times as late; {ends}."
        )

    def table(self, n: int | None = None) -> Table:
        """The verdict, the steps, and the accuracies at the end."""
        rows = [
            ("verdict", self.verdict),
            ("memorised at step", self.memorised_at),
            ("generalised at step", self.generalised_at),
            ("gap (steps)", self.gap),
            ("steps between evaluations", int(self.steps.diff().max()) if len(self.steps) > 1 else None),
            ("training accuracy, last", float(self.train_accuracy[-1])),
            ("held-out accuracy, last", float(self.held_out_accuracy[-1])),
            ("training loss, last (nats)", float(self.train_loss[-1])),
            ("held-out loss, last (nats)", float(self.held_out_loss[-1])),
        ]
        return Table(("what", "value"), rows).head(n)

    def figure(self) -> Any:
        """The grokking gap: both accuracies above both losses, against steps."""
        from hooklens.viz.curves import lines
        from hooklens.viz.drawing import mark_steps
        from hooklens.viz.small_multiples import panels

        after = self.steps > 0  # step 0 has no place on a logarithmic axis
        at = self.steps[after].double()
        accuracies = {"training": self.train_accuracy[after], "held out": self.held_out_accuracy[after]}
        losses = {"training": self.train_loss[after], "held out": self.held_out_loss[after]}
        accuracy = lines(accuracies, at, title="Accuracy", x_title="step", y_title="share correct", log="x")
        steps = {"memorised": self.memorised_at, "generalised": self.generalised_at}
        accuracy = mark_steps(accuracy, {name: step for name, step in steps.items() if step})
        loss = lines(losses, at, title="Loss", x_title="step", y_title="nats", log="xy")
        return panels([accuracy, loss])


def find_grokking(run: Run | str | os.PathLike, *, bound: float = BOUND, delay: float = DELAY) -> GrokkingStep:
    """When did a run of `hl.train`, or the run in a folder, grok? From the accuracies that it recorded.

    >>> from hooklens.data.modular import modular_arithmetic
    >>> from hooklens.testing import tiny_model
    >>> from hooklens.training.loop import train
    >>> run = train(tiny_model(d_vocab=6), modular_arithmetic(p=5, fraction=0.8), steps=2)
    >>> find_grokking(run).verdict
    'did not grok: never memorised'

    Reference: Power et al. (2022), "Grokking: generalization beyond overfitting on small algorithmic datasets", where
    the phenomenon is described; the thresholds are ours.
    """
    run = run if isinstance(run, Run) else open_run(run)
    steps = run.steps()
    try:
        evaluations = run.evaluations()
    except InputError as error:
        raise InputError(f"whether a run grokked is read from evaluations on held-out pairs: {error}") from error
    if not len(evaluations.steps):
        raise InputError(f"no grokking without held-out pairs, and the run in {str(run.path)!r} has none")
    for rows in (steps, evaluations):
        if "accuracy" not in rows.columns:
            raise InputError(f"the run in {str(run.path)!r} recorded no accuracy; train it again with this hooklens")
        if np.isnan(rows["accuracy"]).all():
            raise InputError(
                f"grokking is read from accuracies, and the task of the run in {str(run.path)!r} has none: its answers "
                "are numbers and not tokens; give a run such as one on hl.data.modular_arithmetic"
            )
    return GrokkingStep.of_curves(
        _tensor(steps.steps),
        _tensor(steps["accuracy"]),
        _tensor(evaluations.steps),
        _tensor(evaluations["accuracy"]),
        losses=(_tensor(steps["loss"]), _tensor(evaluations["loss"])),
        bound=bound,
        delay=delay,
    )


def _tensor(values: Any) -> Tensor:
    array = np.ascontiguousarray(values)
    return torch.from_numpy(array.astype(np.int64 if array.dtype.kind in "iu" else np.float64))


def _reaches(accuracy: Tensor, bound: float) -> Tensor:
    """Where an accuracy is at least the bound. Runs record float32, in which 9 of 10 is below the 0.9 of float64."""
    return accuracy.float() >= accuracy.new_tensor(bound).float()


def _first(steps: Int[Tensor, "step"], reached: Tensor) -> int | None:
    """The first step at which something is so; None if it never is."""
    return int(steps[reached][0]) if bool(reached.any()) else None


def demo(model: "HookedTransformer") -> GrokkingStep:
    """Planted curves, because a model alone has no run: training is learnt at step 100, the other pairs at 8,000."""
    steps = torch.arange(0, 10_001, 100)
    train, held_out = (torch.sigmoid((steps.double() - middle) / width) for middle, width in ((50, 5), (6000, 300)))
    return GrokkingStep.of_curves(steps, train, steps, held_out, losses=(-train.log(), -held_out.log()))
