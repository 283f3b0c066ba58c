"""The result of probing every layer: accuracy, with the controls that it needs."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.names import parse
from hooklens.plugins.probing.balancing import Ends, balanced, ends, resampled
from hooklens.plugins.probing.confidence import Calibration
from hooklens.plugins.probing.probes import Probe
from hooklens.results.result import Result, Table
from hooklens.results.statistics import middle, null_p, q_values

Estimate = tuple[Float[Tensor, "*cell"], Float[Tensor, "draw *cell"]]  # a value and its bootstrap draws
NAN = float("nan")


@dataclass(frozen=True, eq=False)
class ProbeStudy(Result):
    """How well a class can be read from activations, per example and out of fold, with baselines that need no model.

    `nested` is the number to report: correctness at the point that each fold's inner folds chose, for examples that
    were used neither for the choice nor for the fit. `correct` is the same at every point (choosing the best of these
    uses the test examples). `control` is the correctness on random labels (`control_label`) of token types, or of
    groups where tokens do not recur (`control_by`), with folds in which types recur. `same_split` is the correctness on
    the real labels in those folds. `null` is the nested balanced accuracy on shuffled labels, one number per draw.
    `point_null` is the same at each point, with more draws where there are more points; `least_p` is the smallest
    possible p-value. `majority`, `embed` and `context` are the baselines: the most common class, the token's own
    embedding, and the mean embedding of the prompt so far.
    """

    task: str
    baselines = ("balanced_accuracy",)
    kind: str
    points: list[str]
    classes: list[str]
    label: Int[Tensor, "example"]
    group: Int[Tensor, "example"]
    fold: Int[Tensor, "example"]
    chosen: Int[Tensor, "fold"]
    nested: Float[Tensor, "example"]
    correct: Float[Tensor, "point example"]
    control: Float[Tensor, "labelling point example"]
    same_split: Float[Tensor, "labelling point example"]
    control_label: Int[Tensor, "labelling example"]
    null: Float[Tensor, "draw"]
    point_null: Float[Tensor, "few point"]
    majority: Float[Tensor, "example"]
    embed: Float[Tensor, "example"]
    context: Float[Tensor, "example"]
    prob: Float[Tensor, "example n_class"]
    control_by: str | None
    no_control: str
    best: int
    least_p: float
    weight: Float[Tensor, "n_class d"]
    bias: Float[Tensor, "n_class"]
    step: Float[Tensor, "n_class d"]
    means: Float[Tensor, "n_class d"]

    @property
    def accuracy(self) -> float:
        """The accuracy at the points chosen in inner folds."""
        return float(self.nested.mean())

    @property
    def balanced_accuracy(self) -> float:
        """The same, averaged within classes first: chance is 1 / classes, whatever the class shares."""
        return float(balanced(self.nested, self.label))

    @property
    def p(self) -> float:
        """How often shuffled labels reach this balanced accuracy; NaN without draws."""
        return float(null_p(balanced(self.nested, self.label), self.null)) if len(self.null) else NAN

    @property
    def point_p(self) -> Float[Tensor, "point"]:
        """The same at each point, from the draws that were fitted at every point."""
        value = balanced(self.correct, self.label)
        return null_p(value, self.point_null) if len(self.point_null) else torch.full_like(value, NAN)

    @property
    def point_q(self) -> Float[Tensor, "point"]:
        """`point_p` of all points, as false discovery rates."""
        return q_values(self.point_p)

    @property
    def least_q(self) -> float:
        """The smallest q that a single point can reach with this number of draws and points; 1 without draws."""
        return min(1.0, len(self.points) * self.least_p)

    @property
    def selectivity(self) -> float:
        """Balanced accuracy on the real labels minus that on random labels, in the same folds; NaN if undefined."""
        return self.selectivity_interval()[0]

    @property
    def point(self) -> str:
        """The point that `probe` reads: the best one over all folds."""
        return self.points[self.best]

    @property
    def probe(self) -> Probe:
        """The probe at `point`, fitted on every example, its logits scaled so that their softmax is calibrated."""
        return Probe(self.weight, self.bias, self.means, step=self.step, classes=self.classes, point=self.point)

    @property
    def calibration(self) -> Calibration:
        """Predicted probability against observed frequency, out of fold."""
        return Calibration.of(self.prob, self.label)

    def interval(self, right: Float[Tensor, "*point example"] | None = None) -> Ends:
        """The 95 % interval of a balanced accuracy over data sets of this size, with the probes refitted on each.

        Groups are resampled, and the variance is corrected for refitting: see `balancing.ends`.
        """
        low, high = self._ends(resampled(self.nested if right is None else right, self.label, self.group))
        return low.clamp_min(0.0), high

    def table(self, n: int | None = None) -> Table:
        """The balanced accuracy, its baselines and controls, and the difference to them."""
        null = self.null if len(self.null) else torch.full_like(self.nested[:1], NAN)
        random = f"control task (random label a {self.control_by or self.no_control})"
        rows = [
            self._row(f"{self.kind} probe, point chosen inside", self.nested, p=self.p),
            self._row("embedding of the token alone", self.embed),
            self._row("mean embedding of the prompt so far", self.context),
            ("shuffled labels (mean and 95 % of draws)", null.mean(), *middle(null), None, None),
            self._row("most common class", self.majority),
            self._row(random, self._where_chosen(self.control), label=self.control_label),
            self._row("real labels in the control's folds", self._where_chosen(self.same_split)),
            ("selectivity: these minus the control task", *self.selectivity_interval(), None, None),
            ("minus the better embedding", *self.over_embeddings(), None, None),
        ]
        return Table(("what", "balanced accuracy", "95% low", "95% high", "accuracy", "p"), rows).head(n)

    def top_points(self, k: int = 10) -> Table:
        """The `k` points with the largest balanced accuracy; choosing one of them uses the test examples."""
        values, (low, high) = balanced(self.correct, self.label), self.interval(self.correct)
        columns = (values, low, high, self.correct.mean(1), self.point_p, self.point_q)
        order = values.argsort(descending=True, stable=True)[:k].tolist()
        rows = [(self.points[i], *(column[i] for column in columns)) for i in order]
        return Table(("point", "balanced accuracy", "95% low", "95% high", "accuracy", "p", "q"), rows)

    def figure(self) -> Any:
        """Balanced accuracy by point with the control task, intervals over groups, and a line for shuffled labels."""
        from hooklens.viz.curves import lines

        shown, bands = {"probe": balanced(self.correct, self.label)}, {"probe": self.interval(self.correct)}
        if self.control_by is not None:
            for name, right, label in (
                ("probe, in the control's folds", self.same_split, self.label),
                (f"control task ({self.control_by})", self.control, self.control_label[:, None]),
            ):
                shown[name], drawn = self._estimate(right, label)
                bands[name] = self._ends(drawn)
        marks = {"mean embedding of the prompt": self.context, "token's embedding": self.embed}
        heights = {name: float(balanced(right, self.label)) for name, right in marks.items()}
        heights |= {"shuffled labels": float(self.null.mean())} if len(self.null) else {}
        layers = [getattr(parse(name), "layer", None) for name in self.points]
        by_layer = len(layers) > 1 and None not in layers and len(set(layers)) == len(layers)
        inside = f"{self.balanced_accuracy:.2f} at the layer chosen inside"
        figure = lines(
            shown,
            torch.tensor(layers) if by_layer else None,
            bands,
            f"{self.task}: {self.kind} probe ({' | '.join(self.classes)}), {inside}",
            x_title="layer" if by_layer else "point",
            y_title="balanced accuracy out of fold",
            marks=heights,
        )
        return figure if len(self.points) > 1 else figure.update_traces(mode="markers", selector={"mode": "lines"})

    def over_embeddings(self) -> tuple[float, float, float]:
        """The probe's balanced accuracy minus that of the better embedding baseline, with its 95 % interval."""
        better = max((self.embed, self.context), key=lambda right: float(balanced(right, self.label)))
        return self._with_ends(*self._estimate((self.nested - better)[None], self.label, least=-1.0))

    def selectivity_interval(self) -> tuple[float, float, float]:
        """`selectivity` with its 95 % interval: groups and labellings are resampled, together for both tasks."""
        if not len(self.control):
            return NAN, NAN, NAN
        value, drawn = self._estimate(self._where_chosen(self.same_split), self.label)
        random, random_drawn = self._estimate(self._where_chosen(self.control), self.control_label)
        return self._with_ends(value - random, drawn - random_drawn)

    def _row(self, name: str, right: Tensor, *, label: Tensor | None = None, p: float | None = None) -> tuple:
        """Balanced accuracy with its interval, accuracy and p; NaN where there is no labelling."""
        right = torch.atleast_2d(right)
        if not len(right):
            return name, NAN, NAN, NAN, NAN, p
        value, low, high = self._with_ends(*self._estimate(right, self.label if label is None else label))
        return name, value, max(low, 0.0), high, right.mean(), p

    def _estimate(
        self,
        right: Float[Tensor, "labelling *cell example"],
        label: Int[Tensor, "*labelled example"],
        least: float = 0.0,
    ) -> Estimate:
        """The balanced accuracy, mean over labellings, and its draws.

        Each draw is a mean over resampled labellings: the choice of random labels is a source of variance too.
        """
        drawn, n = resampled(right, label, self.group, least=least), len(right)
        again = torch.randint(n, (len(drawn), n), generator=torch.Generator().manual_seed(1))
        return balanced(right, label).mean(0), drawn[torch.arange(len(drawn))[:, None], again].mean(1)

    def _ends(self, drawn: Float[Tensor, "draw *cell"]) -> Ends:
        return ends(drawn, int(self.fold.max()) + 1)

    def _with_ends(self, value: Float[Tensor, ""], drawn: Float[Tensor, "draw"]) -> tuple[float, float, float]:
        low, high = self._ends(drawn)
        return float(value), float(low), float(high)

    def _where_chosen(self, right: Float[Tensor, "labelling point example"]) -> Float[Tensor, "labelling example"]:
        return right[:, self.chosen[self.fold], torch.arange(len(self.fold))]
