"""Zero, mean and resample ablation of the same components side by side: which effects are the model's surprise?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from hooklens.data.demo_prompts import demo_metric, demo_texts
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.patching.ablation import AblationSweep, ablate
from hooklens.plugins.patching.grid import draw_agreement
from hooklens.results.claims import HeldOutEffects
from hooklens.results.result import Result, Table
from hooklens.results.statistics import rank_correlation
from hooklens.sweeps.replacement import Mean, MeanOfOthers, Replacement, Resample, Zero
from hooklens.sweeps.settings import engine

_NAMED = 8  # components whose name is written into the figure


@dataclass(frozen=True, eq=False)
class AblationComparison(Result):
    """The same components ablated in three ways. Zero is a value that most sites never hold; the others are held."""

    ranked_by = "effect of zero"
    terms = {
        "mean of others": "the change of the metric when the mean activation over the other prompts is written",
        "mean of others low": "the lower end of its 95 % interval over prompts",
        "mean of others high": "the upper end of its 95 % interval over prompts",
    }

    zero: AblationSweep
    mean: AblationSweep
    resample: AblationSweep

    @property
    def sweeps(self) -> dict[str, AblationSweep]:
        """Each sweep by what was written."""
        return {sweep.replacement: sweep for sweep in (self.zero, self.mean, self.resample)}

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of zero and resample effects over components; NaN for a single one."""
        return float(rank_correlation(self.zero.effect.flatten(), self.resample.effect.flatten()))

    def held_out_top(self, k: int = 10, *, seed: int = 0) -> HeldOutEffects:
        """The `k` components of largest zero effect on half of the prompts; all three effects on the other half."""
        effects = {kind: sweep.effect_per_prompt for kind, sweep in self.sweeps.items()}
        return HeldOutEffects.of(effects, self.zero.names, self.zero.group, k, seed)

    def table(self, n: int | None = 20) -> Table:
        """A row a component, the largest zero effect first; each effect with its interval where there is one."""
        columns = [self.zero.site, *(f"{kind}{part}" for kind in self.sweeps for part in ("", " low", " high"))]
        parts = [part for sweep in self.sweeps.values() for part in (sweep.effect, *sweep.interval())]
        return Table(columns, self.zero.rows(parts, n))

    def figure(self) -> Any:
        """Every component by its zero and its resample effect; on the diagonal the two agree."""
        drawn = draw_agreement(
            self.zero.effect.flatten(),
            self.resample.effect.flatten(),
            self.zero.names,
            f"{self.zero.site}: the same components, zeroed and resampled",
            ("change of the metric, zero ablation", "change of the metric, resampled"),
        )
        for index in self.zero.order()[:_NAMED]:
            at = {"x": float(self.zero.effect[index]), "y": float(self.resample.effect[index])}
            drawn.add_annotation(**at, text=self.zero.name_of(index), showarrow=False, yshift=12, font_size=11)
        return drawn


def compare_ablations(
    model: HookedTransformer,
    prompts: Prompts | PromptPairs,
    metric: Any = None,
    *,
    site: str = "z",
    by: str | Sequence[str] | None = None,
    reference: Any = None,
    group: Sequence[int] | Int[Tensor, "prompt"] | None = None,
    patches: Any = None,
) -> AblationComparison:
    """Does a component's zero ablation effect survive when what is written is a value that the model does hold?

    Zero, mean and resample ablation (four draws) of the same components on the same prompts. Means and draws are over
    the other prompts, never a prompt's own, or over `reference` prompts.

    >>> import torch
    >>> from hooklens.testing import tiny_model
    >>> from hooklens.metrics import prob
    >>> model = tiny_model(); prompts = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    >>> found = compare_ablations(model, prompts, prob(model, answer=3))
    >>> found.zero.replacement, found.mean.replacement, found.resample.by_draw.shape      # draw layer head
    ('zero', 'mean of others', torch.Size([2, 2, 2]))

    Reference: Chan et al. (2022), "Causal scrubbing"; Li and Janson (2024), "Optimal ablation for interpretability",
    section 2.
    """
    mean = MeanOfOthers() if reference is None else Mean(reference)

    def run(value: Replacement) -> AblationSweep:
        return ablate(model, prompts, metric, site=site, by=by, value=value, group=group, patches=patches)

    return AblationComparison(zero=run(Zero()), mean=run(mean), resample=run(Resample(reference)))


def demo(model: HookedTransformer) -> AblationComparison:
    """Every head, on six short prompts; random token numbers where the model has no tokenizer."""
    with engine(progress=False):
        return compare_ablations(model, demo_texts(model, 6, 8), demo_metric(model))
