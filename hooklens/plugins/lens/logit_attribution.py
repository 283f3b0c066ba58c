"""Direct logit attribution: the contribution of each component to an answer's logit, and a check of their sum."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.component import head_name, head_names, layer_names, neuron_name
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts, reads_vectors
from hooklens.metrics import Answers
from hooklens.model.ids import show
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.lens.direct import direct_effects
from hooklens.plugins.lens.reading import OverPrompts, answered_prompts
from hooklens.plugins.weights.needs import Needs, lacking
from hooklens.results.result import Result, Table
from hooklens.results.statistics import Groups

_FROZEN = (
    "Direct effects only, with the final norm's scale frozen at this prompt's: their sum is the logit before any soft "
    "cap, minus b_U and the final norm's bias through W_U."
)


@dataclass(frozen=True, eq=False)
class LogitAttribution(OverPrompts, Result):
    """The direct contribution of each component to the logit of `answer` (minus that of `wrong_answer`), per prompt.

    `components` sum to `logit - unembed_bias - norm_bias`; `error` is the largest deviation of this sum, and of the
    sums of the parts below. A layer's attention consists of its `heads` and `attn_bias`, a head of its `sources` (the
    share moved from each position), an MLP of its `neurons` and `mlp_bias`. `spread` is the control: the standard
    deviation, over a sample of tokens of the vocabulary, of the component's contribution to a token's logit (or to the
    difference of two such tokens if there is a wrong answer). A contribution that is not large relative to it is not
    specific to this answer.
    """

    ranked_by = "attribution"

    components: Float[Tensor, "prompt component"]
    spread: Float[Tensor, "prompt component"]
    labels: list[str]
    heads: Float[Tensor, "prompt layer head"]
    head_spread: Float[Tensor, "prompt layer head"]
    attn_bias: Float[Tensor, "prompt layer"]
    sources: list[Float[Tensor, "layer head _"]]  # by attended position; prompts may differ in length
    neurons: Float[Tensor, "prompt layer neuron"]
    mlp_bias: Float[Tensor, "prompt layer"]
    logit: Float[Tensor, "prompt"]
    unembed_bias: Float[Tensor, "prompt"]
    norm_bias: Float[Tensor, "prompt"]
    str_tokens: list[list[str]]
    answer: list[str]
    wrong_answer: list[str] | None
    capped: bool
    error: float
    frozen: str = _FROZEN
    group: Int[Tensor, "prompt"] | None = None  # groups of related prompts; None: every prompt is its own group

    @property
    def total(self) -> Float[Tensor, "prompt"]:
        """The sum of all components: the uncapped logit without b_U and without the final norm's bias."""
        return self.components.sum(1)

    @property
    def layers(self) -> Float[Tensor, "prompt layer"]:
        """The contribution of each layer, attention and MLP together."""
        totals = torch.zeros_like(self.attn_bias)
        for i, name in enumerate(self.labels):
            if name[0].isdigit():
                totals[:, int(name.split("_")[0])] += self.components[:, i]
        return totals

    def table(self, n: int | None = 12) -> Table:
        """The components with the largest attribution, mean over prompts, each with its spread over tokens."""
        return self._ranked(self.components, self.spread, self.labels).head(n)

    def top_heads(self, k: int = 10) -> Table:
        """The `k` heads of the largest attribution."""
        names = head_names(self.heads.shape[1], self.heads.shape[2])
        return self._ranked(self.heads.flatten(1), self.head_spread.flatten(1), names).head(k)

    def top_neurons(self, k: int = 10) -> Table:
        """The `k` neurons with the largest attribution, mean over prompts."""
        mean = self.neurons.mean(0)
        chosen = mean.flatten().abs().argsort(descending=True, stable=True)[:k].tolist()
        neurons = [(i // mean.shape[1], i % mean.shape[1]) for i in chosen]
        return Table(("neuron", "attribution"), [(neuron_name(i, j), float(mean[i, j])) for i, j in neurons])

    def _ranked(self, values: Tensor, spread: Tensor, names: list[str]) -> Table:
        mean, wide, (low, high) = values.mean(0), spread.mean(0), self.interval(values)
        rows = [
            (names[i], float(mean[i]), *((float(low[i]), float(high[i])) if self._several else ()), float(wide[i]))
            for i in mean.abs().argsort(descending=True, stable=True).tolist()
        ]
        ends = ("95% low", "95% high") if self._several else ()
        return Table(("component", "attribution", *ends, "spread over tokens"), rows)

    def figure(self) -> Any:
        """Heads by layer, mean over prompts."""
        from hooklens.viz.figures import heatmap

        n_layers, n_heads = self.heads.shape[1:]
        extra = [[f"spread over tokens {float(x):.3f}" for x in row] for row in self.head_spread.mean(0)]
        return heatmap(
            self.heads.mean(0),
            x=[f"H{head}" for head in range(n_heads)],
            y=layer_names(n_layers),
            title=f"What each head adds directly to {self._asked()}",
            x_title="head",
            y_title="layer",
            hover=extra,
            colourbar="logit",
        )

    def component_figure(self) -> Any:
        """Every component in order, mean over prompts, with intervals if there are several prompts."""
        from hooklens.viz.figures import bars

        low, high = self.interval(self.components) if self._several else (None, None)
        title = f"What each component adds directly to {self._asked()}"
        return bars(self.components.mean(0), low, high, self.labels, title, x_title="component", y_title="logit")

    def source_figure(self, layer: int, head: int, prompt: int = 0) -> Any:
        """The positions from which a head moved its contribution."""
        from hooklens.viz.figures import bars

        title = f"{head_name(layer, head)}: what it moved from each position to {self._asked()}"
        values = self.sources[prompt][layer, head]
        return bars(
            values, labels=self.str_tokens[prompt][: len(values)], title=title, x_title="token", y_title="logit"
        )

    def _asked(self) -> str:
        answer = repr(self.answer[0]) if len(set(self.answer)) == 1 else "the answer"
        if self.wrong_answer is None:
            return f"the logit of {answer}"
        wrong = repr(self.wrong_answer[0]) if len(set(self.wrong_answer)) == 1 else "the wrong one"
        return f"the logit of {answer} minus that of {wrong}"


def direct_logit_attribution(
    model: HookedTransformer,
    tokens: Prompts | PromptPairs,
    *,
    answer: Answers | None = None,
    wrong_answer: Answers | None = None,
    pos: int = -1,
    group: Groups = None,
) -> LogitAttribution:
    """Which components write the answer? Its logit as a sum over components, heads, neurons and source positions.

    >>> from hooklens.testing import induction_model
    >>> model = induction_model()
    >>> found = direct_logit_attribution(model, [[3, 1, 4, 9, 3]], answer=1, wrong_answer=4)
    >>> found.heads[0].tolist()                # L1H1 is the induction head    (layer head)
    [[0.0, 0.0], [0.0, 10.0]]
    >>> found.sources[0][1, 1].tolist()        # which moved it from position 1
    [0.0, 10.0, 0.0, 0.0, 0.0]
    >>> float(found.logit), float(found.total)
    (10.0, 10.0)

    `answer` and `wrong_answer` are one token for all prompts or one per prompt; prompts may differ in length. Without a
    wrong answer the numbers are defined only up to a shift of all logits. A component that acts only through later
    layers contributes nothing here, and a contribution that a later layer removes still counts. Prompts of one `group`
    are related: intervals are over groups. `PromptPairs` stand for their clean prompts, answers and groups. For a model
    with one output number the answer is that number: leave it out. It has no spread over tokens.

    Reference: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits"; Wang et al. (2022), section 3.
    """
    model.blocks[0].need_sum("direct logit attribution")
    prompts = answered_prompts(model, tokens, answer, wrong_answer, group)
    parts = []
    for some in prompts.by_length():
        wrong = None if prompts.wrong is None else prompts.wrong[some]
        parts += direct_effects(model, torch.stack([prompts.rows[i] for i in some]), prompts.right[some], wrong, pos)
    numbers = [i for some in prompts.by_length() for i in some]
    sources = dict(zip(numbers, (names for part in parts for names in part.sources), strict=True))
    tensors: Any = prompts.in_order([part.tensors for part in parts])
    return LogitAttribution(
        **tensors,
        labels=parts[0].labels,
        sources=[sources[i] for i in range(len(numbers))],
        str_tokens=[show(model, row) for row in prompts.rows],
        answer=_outputs(model, prompts.right),
        wrong_answer=None if prompts.wrong is None else _outputs(model, prompts.wrong),
        capped=model.cfg.output_logits_soft_cap is not None,
        error=max(part.error for part in parts),
        group=prompts.group,
    )


def _outputs(model: HookedTransformer, ids: Int[Tensor, "prompt"]) -> list[str]:
    """The answers as text; numbers that a model of vectors puts out by their place."""
    return [f"output {i}" for i in ids.tolist()] if reads_vectors(model) else show(model, ids)


def demo(model: HookedTransformer) -> LogitAttribution | Needs:
    """Two short prompts; token numbers where the model has no tokenizer, or vectors and the first output number."""
    answer = 0 if reads_vectors(model) else None
    return lacking(model, tokens=False) or direct_logit_attribution(model, demo_pairs(model, 2), answer=answer)
