"""Calibration of a probe: reliability curve, expected calibration error, Brier score."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.results.result import Result, Table


@dataclass(frozen=True, eq=False)
class Calibration(Result):
    """Examples in bins of equal width by predicted probability: mean prediction, observed frequency, count per bin.

    For two classes the prediction is the probability of class 1, for more classes that of the predicted class. `ece` is
    the mean absolute difference of prediction and frequency over examples. `brier` is the mean squared difference of
    the probabilities and the outcomes, and `brier_of_shares` that of always predicting the class frequencies.
    """

    said: Float[Tensor, "bin"]
    was: Float[Tensor, "bin"]
    count: Int[Tensor, "bin"]
    ece: float
    brier: float
    brier_of_shares: float

    @classmethod
    def of(
        cls, prob: Float[Tensor, "example n_class"], label: Int[Tensor, "example"], *, bins: int = 10
    ) -> "Calibration":
        """Compute the calibration of out-of-sample probabilities: the examples must not have been used for the fit.

        >>> calibration = Calibration.of(torch.tensor([[0.2, 0.8]] * 5), torch.tensor([1, 1, 1, 1, 0]))
        >>> round(calibration.ece, 6), round(calibration.brier, 6)
        (0.0, 0.16)

        Reference: Naeini, Cooper and Hauskrecht (2015), "Obtaining well calibrated probabilities", section 2; Brier
        (1950), halved for two classes so that it is the squared error of one probability.
        """
        whole("bins", bins, 1)
        two = prob.shape[1] == 2
        said = prob[:, 1] if two else prob.amax(1)
        was = (label == 1 if two else prob.argmax(1) == label).to(prob)
        place = (said * bins).long().clamp_max(bins - 1)
        count = place.bincount(minlength=bins)
        sums = torch.zeros(bins, 2).to(prob).index_add_(0, place, torch.stack([said, was], 1))
        mean_said, mean_was = (sums / count[:, None]).T
        truth, scale = torch.nn.functional.one_hot(label, prob.shape[1]).to(prob), 0.5 if two else 1.0
        return cls(
            said=mean_said,
            was=mean_was,
            count=count,
            ece=float((sums[:, 0] - sums[:, 1]).abs().sum() / len(label)),
            brier=scale * float((prob - truth).square().sum(1).mean()),
            brier_of_shares=scale * float((truth.mean(0) - truth).square().sum(1).mean()),
        )

    def table(self, n: int | None = None) -> Table:
        """One row per bin that is not empty."""
        kept = self.count > 0
        columns = (self.said[kept].tolist(), self.was[kept].tolist(), self.count[kept].tolist())
        return Table(("predicted", "observed", "examples"), list(zip(*columns, strict=True))).head(n)

    def figure(self) -> Any:
        """Observed frequency against predicted probability; a calibrated probe lies on the diagonal."""
        from hooklens.viz.curves import lines

        kept = self.count > 0
        shown = {"observed": self.was[kept], "calibrated": self.said[kept]}
        return lines(
            shown,
            self.said[kept],
            title=f"Calibration: error {self.ece:.3f}, Brier {self.brier:.3f} (shares {self.brier_of_shares:.3f})",
            x_title="predicted probability",
            y_title="share of examples",
        )


def temperature(logits: Float[Tensor, "example n_class"], label: Int[Tensor, "example"]) -> float:
    """The factor on the logits that maximises the likelihood of the labels; it changes no prediction.

    >>> logits = torch.tensor([[0.0, 1.0]] * 4); label = torch.tensor([1, 1, 1, 0])
    >>> round(temperature(logits, label), 3)                       # log(3): then class 1 has probability 3/4
    1.099

    Reference: Guo et al. (2017), "On Calibration of Modern Neural Networks", section 4.2.
    """
    from scipy.optimize import minimize_scalar

    scores = logits.double()
    spread = float((scores - scores.mean(1, keepdim=True)).std().clamp_min(1e-30))
    rows = torch.arange(len(label))

    def loss(log_factor: float) -> float:
        return -float((scores * (math.exp(log_factor) / spread)).log_softmax(1)[rows, label].mean())

    optimum = minimize_scalar(loss, bounds=(-7.0, 5.0), method="bounded", options={"xatol": 1e-6})
    return float(math.exp(optimum.x) / spread)
