"""How often intervals cover what they are of, and how often p-values of nothing are small: simulated, with raw counts.

`python -m benchmarks.coverage` takes some minutes on one core and writes results/<date>_coverage.json and .md.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.rounds import write
from hooklens.plugins.probing.folds import make_folds
from hooklens.plugins.probing.gathering import Activations
from hooklens.plugins.probing.probe_training import _study
from hooklens.plugins.probing.probes import Logistic, MassMean, ProbeKind, Ridge
from hooklens.plugins.probing.study import ProbeStudy
from hooklens.plugins.probing.task import ProbeTask, read_task
from hooklens.results.claims import Measured, claim
from hooklens.results.statistics import mean_interval, ratio_interval, sign_flip_p, studentised_interval
from hooklens.testing import tiny_model

Make = Callable[[int, int, torch.Generator], Tensor]
DRAWS: dict[str, Make] = {  # values of mean 0
    "normal": lambda n, runs, g: torch.randn(n, runs, generator=g, dtype=torch.float64),
    "exponential": lambda n, runs, g: -torch.rand(n, runs, generator=g, dtype=torch.float64).log() - 1,
    "lognormal": lambda n, runs, g: torch.randn(n, runs, generator=g, dtype=torch.float64).exp() - math.exp(0.5),
}


def means(runs: int = 1000) -> list[dict[str, Any]]:
    """Coverage of both 95 % intervals of a mean, and how often the p of sign flips is at most 0.05."""
    rows = []
    for name, make in DRAWS.items():
        for n in (2, 3, 4, 5, 6, 8, 12, 20, 40, 100):
            values = make(n, runs, torch.Generator().manual_seed(n))
            plain, skewed = mean_interval(values), studentised_interval(values)
            ratio = ratio_interval(values, torch.rand(n, generator=torch.Generator().manual_seed(1)).double() + 0.5)
            small = (sign_flip_p(values, draws=999) <= 0.05).double().mean()
            covers = {"percentile": covered(plain), "ratio": covered(ratio)}
            covers |= {"studentised": covered(skewed)} if n > 2 else {}  # two groups have none
            rows.append({"of": f"mean of {name}", "n": n, "runs": runs, **covers, "p <= 0.05": float(small)})
    return rows


def covered(ends: tuple[Tensor, Tensor], truth: float = 0.0) -> float:
    return float(((ends[0] <= truth) & (ends[1] >= truth)).double().mean())


def claims(runs: int = 200) -> list[dict[str, Any]]:
    """How often effects of mean 0 beside a control of next to nothing are called causal."""
    rows = []
    for name, make in DRAWS.items():
        for n in (6, 8, 12, 20, 40):
            generator = torch.Generator().manual_seed(n)
            effects, controls = make(n, runs, generator).T, 0.01 * torch.randn(runs, n, generator=generator)
            called = sum(is_causal(a, b) for a, b in zip(effects, controls, strict=True))
            rows.append({"of": f"claims, {name}", "n": n, "runs": runs, "called causal": called / runs})
    return rows


def is_causal(effect: Tensor, control: Tensor) -> bool:
    parts = Measured.of("effect", effect), Measured.of("control", control)
    return claim("a model", "it matters", observation=parts[0], intervention=parts[0], control=parts[1]).causal


def studies(n: int, gap: float, kind: ProbeKind, runs: int, *, points: int = 1, draws: int = 0) -> list[ProbeStudy]:
    """Studies of classes whose means lie `gap` deviations apart in one of 20 dimensions; control tasks at n = 80."""
    found = []
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        label, ids = torch.randperm(n, generator=generator) % 2, torch.arange(n)
        x = torch.randn(points, n, 20, generator=generator, dtype=torch.float64)
        x[:, :, 0] += gap * label
        beside = torch.randn(2, n, 20, generator=generator, dtype=torch.float64)
        beside[0, :, 0] += 0.5 * gap * label  # what embeddings read: less
        acts = Activations(
            x, [f"blocks.{i}.hook_z" for i in range(points)], ids % 10 if n == 80 else ids, ids, 0 * ids, ids, *beside
        )
        folds = make_folds(label, ids, seed=seed)
        found.append(_study(acts, task_of(label), kind, folds, draws, seed))
    return found


def task_of(label: Tensor) -> ProbeTask:
    return read_task(tiny_model(d_vocab=len(label)), torch.arange(len(label))[:, None], label.tolist())


def probes() -> list[dict[str, Any]]:
    """Coverage of the mean over data sets by the intervals of accuracy, selectivity, and probe minus embedding."""
    rows = []
    for n, runs in ((20, 150), (80, 100), (400, 50)):
        for gap in (0.0, 2.0, 4.0):
            for kind in (MassMean(), Logistic()):
                found = studies(n, gap, kind, runs)
                row: dict[str, Any] = {"of": f"probe, {kind.name}, {gap:g} apart", "n": n, "runs": runs}
                for name, of in (
                    ("accuracy", lambda one: (one.balanced_accuracy, *map(float, one.interval()))),
                    ("selectivity", lambda one: one.selectivity_interval()),
                    ("difference", lambda one: one.over_embeddings()),
                ):
                    value, low, high = torch.tensor([of(one) for one in found], dtype=torch.float64).T
                    if not bool(value.isnan().any()):
                        row[f"mean {name}"], row[name] = float(value.mean()), covered((low, high), float(value.mean()))
                rows.append(row)
    return rows


def nulls() -> list[dict[str, Any]]:
    """How often p of a study of noise is at most 0.05, and of its single points; 6 examples are the fewest."""
    rows = []
    for n, points, kind, runs in (
        (6, 1, Ridge(), 100), (6, 6, Ridge(), 100), (12, 6, Ridge(), 100), (40, 6, Ridge(), 200),
        (40, 6, MassMean(), 100), (40, 1, Logistic(), 100),
    ):  # fmt: skip
        found = studies(n, 0.0, kind, runs, points=points, draws=39)
        small = [sum(one.p <= 0.05 for one in found) / runs]
        small += [float(torch.cat([one.point_p for one in found]).le(0.05).double().mean())]
        least = sum(one.least_p for one in found) / runs
        what = f"noise, {kind.name}, {points} points"
        rows.append(
            {"of": what, "n": n, "runs": runs, "p <= 0.05": small[0], "point p <= 0.05": small[1], "least p": least}
        )
    return rows


def main() -> None:
    rows = [*means(), *claims(), *nulls(), *probes()]
    write("coverage", "Coverage of 95 % intervals, and p-values where nothing is there", rows, {})


if __name__ == "__main__":
    main()
