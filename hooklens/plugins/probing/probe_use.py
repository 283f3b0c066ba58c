"""Does the model use what a probe reads? Edit the probe's direction, and compare with random directions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import real, seeded, whole
from hooklens.core.errors import InputError, WrongType
from hooklens.core.names import parse
from hooklens.data.prompts import read_pairs, reads_vectors
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.activation import check_metric
from hooklens.plugins.patching.two_runs import joined
from hooklens.plugins.probing.balancing import balanced
from hooklens.plugins.probing.edited_runs import moves_along
from hooklens.plugins.probing.folds import split
from hooklens.plugins.probing.gathering import gather
from hooklens.plugins.probing.labels import odd_first
from hooklens.plugins.probing.probe_training import train_probe
from hooklens.plugins.probing.probes import Logistic, MassMean, Probe
from hooklens.plugins.probing.scoring import Trainer, as_rows
from hooklens.plugins.probing.task import ProbeTask, checked_task, read_task
from hooklens.results.result import Result
from hooklens.results.statistics import Tested, mean_interval, middle, null_p
from hooklens.results.table import Table
from hooklens.sweeps.many_edits import run_edits
from hooklens.sweeps.resume import Resume, resuming

_DRAWS = 50  # random directions: every prompt is run with each of them ablated and steered
EDITS = ("ablate", "steer")
NULLS = ("isotropic", "as the data vary")


@dataclass(frozen=True, eq=False)
class CausalCheck(Tested, Result):
    """The loss of class separation in the metric when the probe's direction is edited.

    `told` is each prompt's margin: how far its metric lies from the midpoint of the two class means, towards its own
    class (on average half their difference). `fall[edit]` is the decrease of the margin under an edit, with both
    classes weighted equally. "ablate" moves each activation along the direction until the probe reads the midpoint of
    the class means. "steer" moves it by `strength` times the gap between the means towards the other class.
    `random_fall[edit, null]` is the decrease when vectors of the same length, prompt by prompt, are added along random
    directions: isotropic ones, and ones with the covariance of the activations within the classes. `read` says where
    the probe is correct. `refit` says where a new probe is correct, fitted out of fold on the original and on the
    ablated activations: what it still reads there was not removed by the edit.
    """

    point: str
    classes: list[str]
    label: Int[Tensor, "prompt"]
    group: Int[Tensor, "prompt"]
    read: Float[Tensor, "prompt"]
    refit: Float[Tensor, "state prompt"]
    told: Float[Tensor, "prompt"]
    fall: Float[Tensor, "edit prompt"]
    random_fall: Float[Tensor, "edit null draw prompt"]
    strength: float
    gap: float

    @property
    def accuracy(self) -> float:
        """The accuracy of the probe on these prompts, for comparison with the causal effect."""
        return float(self.read.mean())

    @property
    def refit_accuracy(self) -> Float[Tensor, "state"]:
        """Balanced accuracy of a new probe on these prompts, before and after ablation; NaN without folds."""
        return balanced(self.refit, self.label)

    @property
    def random(self) -> Float[Tensor, "edit null draw"]:
        """The mean decrease for each random direction."""
        return self.random_fall.mean(-1)

    @property
    def effect(self) -> Float[Tensor, "edit"]:
        """The mean decrease for each edit."""
        return self.fall.mean(1)

    def interval(self) -> tuple[Float[Tensor, "edit"], Float[Tensor, "edit"]]:
        """The 95 % interval of `effect`, from a bootstrap over groups of prompts."""
        return mean_interval(self.fall.T, group=self.group)

    @property
    def p(self) -> Float[Tensor, "edit"]:
        """How often a random direction changes the metric as much, in either direction; the larger of the two nulls."""
        null = self.random.abs().movedim(-1, 0)
        return null_p(self.effect[:, None].expand(null.shape[1:]), null).amax(1)

    @property
    def used(self) -> bool:
        """Do both edits reduce the margin, with intervals above 0, and by more than 95 % of random directions?"""
        return bool(((self.interval()[0] > 0) & (self.p <= 0.05)).all())

    def table(self, n: int | None = None) -> Table:
        """One row per edit of the probe's direction, followed by the random directions."""
        effect, (low, high), p, q = self.effect, self.interval(), self.p, self.q
        rows: list[tuple] = []
        for i, edit in enumerate(EDITS):
            rows.append((f"{edit} the probe's direction", effect[i], low[i], high[i], p[i], q[i]))
            for null, draws in zip(NULLS, self.random[i], strict=True):
                rows.append((f"  random, {null}", draws.mean(), *middle(draws), None, None))
        return Table(("edit", "fall of the metric", "95% low", "95% high", "p", "q"), rows).head(n)

    def top_prompts(self, k: int = 10) -> Table:
        """The `k` prompts with the largest decrease under ablation; the choice uses the measured effects."""
        order = self.fall[0].argsort(descending=True, stable=True)[:k].tolist()
        rows = [(i, self.classes[int(self.label[i])], self.told[i], *self.fall[:, i]) for i in order]
        return Table(("prompt", "class", "margin", *EDITS), rows)

    def figure(self) -> Any:
        """The decrease for the probe's direction with its interval, and the middle 95 % of random directions."""
        from hooklens.viz.figures import bars

        names = [f"{edit}: {direction}" for edit in EDITS for direction in ("probe", *NULLS)]
        value, low, high = torch.tensor([row[1:4] for row in self.table().rows]).T
        title = f"Probe at {self.point}, accuracy {self.accuracy:.0%}: "
        title += f"{'used' if self.used else 'no evidence of use'} by the metric"
        before, after = self.refit_accuracy.tolist()
        title += f"; a new probe has {before:.0%} before ablation, {after:.0%} after"
        marks = {"the whole margin": float(self.told.mean())}
        return bars(value, low, high, names, title, y_title="fall of the metric", marks=marks)


def check_probe_use(
    model: HookedTransformer,
    probe: Probe,
    task: ProbeTask,
    metric: Any,
    *,
    draws: int = _DRAWS,
    strength: float = 1.0,
    seed: int = 0,
    resume: str | Path | Resume | None = None,
) -> CausalCheck:
    """Does the metric depend on the direction that the probe reads, at the place where it reads it?

    Pass prompts that the probe was not trained on (`task.halves()`), two classes, one position per prompt, and a metric
    that is higher for class 1, such as the logit difference of the classes' words. `resume` names a file that keeps
    finished edits, as in `hl.patch`.

    >>> from hooklens.testing import tiny_model
    >>> check = demo(tiny_model())
    >>> check.fall.shape, check.random.shape                    # edit prompt; edit null draw
    (torch.Size([2, 20]), torch.Size([2, 2, 20]))

    Reference: Elazar et al. (2021), "Amnesic Probing", for ablation with random directions as a control; Marks and
    Tegmark (2023), "The Geometry of Truth", for steering by the difference of class means.
    """
    point = _checked_point(probe, checked_task(task))
    whole("draws", draws, 1)
    strength = real("strength", strength)
    prompts = [task.tokens[i] for i in task.prompt.tolist()]  # in the order of the examples
    groups = read_pairs(model, prompts, prompts, ())
    check_metric(metric, groups)
    label, asked = task.label, (dict(probe.state_dict()), task.label, draws, strength, seed)
    with resuming(resume, "check_probe_use") as file:
        x = gather(model, task, site=point).x[0]
        sign = 2 * label.to(x) - 1
        shift = torch.stack([probe.middle - probe.coordinate(x).to(x), -sign * strength * probe.gap])  # edit prompt
        where, null = probe.direction.to(x), random_directions(x, label, draws, seed)  # null draw d
        directions = torch.cat([where[None], null.flatten(0, 1)])
        moves = moves_along(model, groups, point=point, pos=task.pos, shift=shift, directions=directions, asked=asked)
        parts = [(edits, pairs.clean, pairs.of(metric)) for edits, pairs in zip(moves, groups, strict=True)]
        outcome = joined(groups, run_edits(model, parts, title="directions", resume=file))
    clean, edited = outcome.base.to(x), outcome.values.to(x).view(len(shift), len(directions), -1)
    fall = sign * len(x) / (2 * label.bincount().to(x)[label]) * (clean - edited)
    middle = (clean[label == 0].mean() + clean[label == 1].mean()) / 2
    return CausalCheck(
        point=point,
        classes=task.classes,
        label=label,
        group=task.group,
        read=(probe.predict(x) == label).to(x),
        refit=_refitted(torch.stack([x, x + shift[0][:, None] * where]), task, seed),
        told=sign * (clean - middle),
        fall=fall[:, 0],
        random_fall=fall[:, 1:].view(len(EDITS), len(NULLS), draws, len(x)),
        strength=strength,
        gap=probe.gap,
    )


def _checked_point(probe: Probe, task: ProbeTask) -> str:
    """The full name of the probe's point, if its activations in the prompts of the task can be edited."""
    if not isinstance(probe, Probe):
        raise WrongType(f"probe is a Probe, such as train_probe gives first; got {probe!r:.60}")
    site = None if probe.point is None else parse(probe.point)
    if probe.point is None or site is None or site.layer is None:
        raise InputError(
            f"only activations inside a layer can be edited, but this probe's point is {probe.point!r}; "
            "give Probe(..., point='blocks.3.hook_resid_post')"
        )
    if len(task.classes) != 2 or len(task.label.unique()) != 2:
        n = len(task.label.unique())
        raise InputError(f"a direction needs two classes, got {len(task.classes)}, {n} with examples; choose two")
    if len(task.prompt.unique()) < len(task):
        raise InputError(
            f"each prompt is edited at one position, got {len(task)} examples of {len(task.tokens)} prompts; "
            "use one example per prompt"
        )
    return probe.point


def _refitted(x: Float[Tensor, "state prompt d"], task: ProbeTask, seed: int) -> Float[Tensor, "state prompt"]:
    """Out-of-fold correctness of new probes, in the same folds for each state of the activations; NaN without folds."""
    try:
        parts = split(task.label, task.group, 5, seed)
    except InputError:
        return torch.full_like(x[..., 0], float("nan"))
    trainer = Trainer(Logistic(), 2)
    return torch.cat([trainer.correct(as_rows(rows), task.label[None], parts) for rows in x]).to(x)


def random_directions(
    x: Float[Tensor, "row d"], label: Int[Tensor, "row"], draws: int, seed: int
) -> Float[Tensor, "null draw d"]:
    """Random unit vectors: isotropic ones, and ones with the covariance of the rows within the two classes.

    >>> random_directions(torch.randn(6, 3), torch.tensor([0, 1] * 3), draws=4, seed=0).norm(dim=-1).mean()
    tensor(1.)
    """
    generator = seeded(seed)
    isotropic = torch.randn(draws, x.shape[1], generator=generator, dtype=torch.float64)
    means = torch.stack([x[label == i].double().mean(0) for i in range(2)])
    within = (x.double() - means[label]).cpu()
    varied = torch.randn(draws, len(x), generator=generator, dtype=torch.float64) @ within
    both = torch.stack([isotropic, varied])
    return (both / both.norm(dim=-1, keepdim=True).clamp_min(1e-300)).to(x)


def demo(model: HookedTransformer) -> CausalCheck:
    """Is the last token's number odd, and does the logit of token 1 depend on this direction? Works on any model."""
    if reads_vectors(model):
        task = odd_first(model)
    else:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.cfg.d_vocab, (40, min(3, model.cfg.n_ctx)), generator=generator)
        task = read_task(model, tokens, [int(row[-1]) % 2 for row in tokens], name="last token is odd")
    point = "blocks.0.hook_resid_post"
    probe, _ = train_probe(model, task.take(torch.arange(20)), site=point, kind=MassMean(), null_draws=0)

    def logit(logits: Float[Tensor, "pair pos d_vocab"]) -> Float[Tensor, "pair"]:
        return logits[:, -1, min(1, logits.shape[-1] - 1)]

    return check_probe_use(model, probe, task.take(torch.arange(20, 40)), logit, draws=20)
