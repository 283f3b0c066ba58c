"""What a linear probe reads at every layer, beside the controls that an accuracy needs."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.names import parse
from hooklens.plugins.probing.calibration import Calibration
from hooklens.plugins.probing.probes import Probe
from hooklens.result import Result
from hooklens.statistics import mean_interval, null_p
from hooklens.table import Table

Row = tuple[str, float, float | None, float | None, float | None]


@dataclass(frozen=True, eq=False)
class ProbeStudy(Result):
    """How well a class can be read, example by example, out of fold, beside what reads it without the model.

    `nested` is the number to report: right or wrong at the point that the fold's inner folds chose, for examples that
    had no part in the choice or the fit. `correct` is the same at every point (whoever picks the best of these has
    looked at the test examples). `control` is the accuracy on random labels of token types, or of groups where tokens
    do not recur (`control_by`), with folds in which types come back; `shuffled` on labels that could have been; `null`
    the nested accuracy of such labels, one number a draw. `majority`, `embed` and `context` are the most common class,
    the token's own embedding and the mean embedding of the prompt so far.
    """

    task: str
    kind: str
    points: list[str]
    classes: list[str]
    label: Int[Tensor, "example"]
    group: Int[Tensor, "example"]
    fold: Int[Tensor, "example"]
    chosen: Int[Tensor, "fold"]
    nested: Float[Tensor, "example"]
    correct: Float[Tensor, "point example"]
    control: Float[Tensor, "point example"]
    shuffled: Float[Tensor, "point example"]
    null: Float[Tensor, "draw"]
    majority: Float[Tensor, "example"]
    embed: Float[Tensor, "example"]
    context: Float[Tensor, "example"]
    prob: Float[Tensor, "example n_class"]
    control_by: str | None
    best: int
    weight: Float[Tensor, "n_class d"]
    bias: Float[Tensor, "n_class"]
    step: Float[Tensor, "n_class d"]
    means: Float[Tensor, "n_class d"]

    @property
    def accuracy(self) -> float:
        """The share of examples that are right at the point chosen in inner folds."""
        return float(self.nested.mean())

    @property
    def p(self) -> float:
        """How often labels that say nothing reach that accuracy; NaN where none were drawn."""
        return float(null_p(self.nested.mean(), self.null)) if len(self.null) else float("nan")

    @property
    def selectivity(self) -> float:
        """The accuracy minus that of the control task at the same points; NaN where no type recurs."""
        return float((self.nested - self._control_where_chosen()).mean())

    @property
    def point(self) -> str:
        """Where `probe` reads: the point that is best over all folds."""
        return self.points[self.best]

    @property
    def probe(self) -> Probe:
        """The probe at `point`, fitted on every example, its logits scaled so that their softmax is calibrated."""
        return Probe(self.weight, self.bias, self.means, step=self.step, classes=self.classes, point=self.point)

    @property
    def calibration(self) -> Calibration:
        """Said against come true, out of fold."""
        return Calibration.of(self.prob, self.label)

    def interval(self, right: Float[Tensor, "*point example"] | None = None) -> tuple[Tensor, Tensor]:
        """The 95 % interval of an accuracy, resampling groups; the fitted probes are held."""
        values = self.nested if right is None else right
        return mean_interval(values.movedim(-1, 0), group=self.group)

    def table(self, n: int | None = None) -> Table:
        """The accuracy, what else reaches it, and by how much it is better than they are."""
        embeddings = max((self.embed, self.context), key=lambda one: float(one.mean()))
        control, by = self._control_where_chosen(), self.control_by or "token or group: none recurs"
        drawn = self.null if len(self.null) else torch.full_like(self.nested[:1], float("nan"))
        low, high = drawn.quantile(0.025), drawn.quantile(0.975)
        rows = [
            self._row(f"{self.kind} probe, point chosen inside", self.nested, self.p),
            self._row("embedding of the token alone", self.embed),
            self._row("mean embedding of the prompt so far", self.context),
            self._row(f"control task (random label a {by})", control),
            ("shuffled labels (mean and 95 % of draws)", float(drawn.mean()), float(low), float(high), None),
            self._row("most common class", self.majority),
            self._row("selectivity: minus the control task", self.nested - control),
            self._row("minus the better embedding", self.nested - embeddings),
        ]
        return Table(("what", "accuracy", "95% low", "95% high", "p"), rows).head(n)

    def top(self, k: int = 5) -> Table:
        """The `k` points of the largest accuracy. To pick one of these is to look at the test examples."""
        values, (low, high) = self.correct.mean(1), self.interval(self.correct)
        order = values.argsort(descending=True, stable=True)[:k].tolist()
        rows = [(self.points[i], float(values[i]), float(low[i]), float(high[i])) for i in order]
        return Table(("point", "accuracy", "95% low", "95% high"), rows)

    def figure(self) -> Any:
        """Accuracy by point beside the control task and shuffled labels, with intervals over groups."""
        from hooklens.viz.curves import lines

        shown = {"probe": self.correct, f"control task ({self.control_by})": self.control, "shuffled": self.shuffled}
        shown = {name: right for name, right in shown.items() if not bool(right.isnan().any())}
        bands = {name: self.interval(right) for name, right in shown.items()}
        layers = [getattr(parse(name), "layer", None) for name in self.points]
        by_layer = len(layers) > 1 and None not in layers and len(set(layers)) == len(layers)
        marks = {"mean embedding of the prompt": self.context, "token's embedding": self.embed}
        drawn = lines(
            {name: right.mean(1) for name, right in shown.items()},
            torch.tensor(layers) if by_layer else None,
            bands,
            f"{self.task}: {self.kind} probe ({' | '.join(self.classes)}), layer chosen inside {self.accuracy:.2f}",
            x_title="layer" if by_layer else "point",
            y_title="accuracy out of fold",
            marks={name: float(right.mean()) for name, right in marks.items()},
        )
        return drawn if len(self.points) > 1 else drawn.update_traces(mode="markers", selector={"mode": "lines"})

    def _row(self, name: str, right: Float[Tensor, "example"], p: float | None = None) -> Row:
        if bool(right.isnan().any()):
            return name, float("nan"), None, None, p
        low, high = self.interval(right)
        return name, float(right.mean()), float(low), float(high), p

    def _control_where_chosen(self) -> Float[Tensor, "example"]:
        return self.control[self.chosen[self.fold], torch.arange(len(self.fold))]
