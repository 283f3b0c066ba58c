"""Trajectory: the answer's rank and probability, entropy, KL and the stream itself from layer to layer."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts
from hooklens.metrics import Answers
from hooklens.model.ids import show
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.lens import reading
from hooklens.plugins.lens.translators import TunedLens
from hooklens.plugins.weights.needs import Needs, needs_tokens
from hooklens.results.result import Result, Table
from hooklens.results.statistics import Groups

_CONTROLS = 4  # number of other positions of a prompt in which its answer is ranked


@dataclass(frozen=True, eq=False)
class Trajectory(reading.OverPrompts, Result):
    """One position of each prompt through all layers; the last row is the model itself.

    `rank` counts from 0. `control_rank` is the answer's median rank in streams of other positions of its prompt at the
    same layer (NaN for a prompt of one token): the layer's general tendency to predict this token. `norm` is the norm
    of the stream, `cosine` its cosine to the final stream, `control_cosine` the mean cosine of the other positions'
    streams to it.
    """

    ranked_by = "rise"
    terms = {
        "stream": "5_pre is the residual stream before layer 5, 5_mid the stream between its attention and MLP, "
        "final_post the model itself",
        "rank": "the answer's rank among all tokens, 0 the most likely",
        "control rank": "the same answer's rank in the streams of other positions of its prompt: a rank that is not "
        "well below it says nothing about this position",
        "rise": "by how much the block before this stream raised the answer's log-probability",
        "probability": "the answer's",
        "entropy": "entropy of the stream's prediction, in nats",
        "KL": "KL(model || stream) between their predictions, in nats",
        "norm": "norm of the stream",
        "cosine": "cosine to the final stream",
        "control cosine": "mean cosine of other positions' streams",
        "logit difference": "answer minus wrong answer",
    }

    rank: Int[Tensor, "prompt layer"]
    log_prob: Float[Tensor, "prompt layer"]
    wrong_log_prob: Float[Tensor, "prompt layer"] | None
    control_rank: Float[Tensor, "prompt layer"]
    entropy: Float[Tensor, "prompt layer"]
    kl: Float[Tensor, "prompt layer"]
    norm: Float[Tensor, "prompt layer"]
    cosine: Float[Tensor, "prompt layer"]
    control_cosine: Float[Tensor, "prompt layer"]
    layers: list[str]
    answer: list[str]
    lens: str
    group: Int[Tensor, "prompt"] | None = None  # groups of related prompts; None: every prompt is its own group

    @property
    def logit_diff(self) -> Float[Tensor, "prompt layer"] | None:
        """The lens's logit of the answer minus that of the wrong answer, if there is one."""
        return None if self.wrong_log_prob is None else self.log_prob - self.wrong_log_prob

    @property
    def ranking(self) -> Float[Tensor, "layer"]:
        """The rise of the answer's log-probability over the block before each stream, mean over prompts."""
        return self.log_prob.diff(dim=1, prepend=torch.full_like(self.log_prob[:, :1], torch.nan)).mean(0)

    def table(self, n: int | None = None) -> Table:
        """One row per layer: medians of ranks, means of the other values, over prompts."""
        columns = ["stream", "rank", "control rank", "rise", "probability", "entropy", "KL", "norm"]
        columns += ["cosine", "control cosine"]
        means = [
            x.mean(0) for x in (self.log_prob.exp(), self.entropy, self.kl, self.norm, self.cosine, self.control_cosine)
        ]
        if self.logit_diff is not None:
            columns.append("logit difference")
            means.append(self.logit_diff.mean(0))
        medians = [self.rank.to(self.kl).median(0).values, self.control_rank.nanmedian(0).values, self.ranking]
        rows = [(name, *(float(x[i]) for x in (*medians, *means))) for i, name in enumerate(self.layers)]
        return Table(columns, rows).head(n)

    def figure(self) -> Any:
        """Log10 of one plus the answer's rank, with the control."""
        from hooklens.viz.curves import lines

        ranks = {"answer here": self.rank.to(self.kl), "same answer, other positions": self.control_rank}
        shown = {name: (1 + values).log10() for name, values in ranks.items()}
        bands = {name: self.interval(values) for name, values in shown.items() if self._several}
        return lines(
            {name: values.nanmean(0) for name, values in shown.items()},
            bands=bands,
            title=f"{self.lens}: the answer's rank among all tokens",
            x_title="layer",
            y_title="log10(1 + rank)",
        )

    def distance_figure(self) -> Any:
        """Entropy and KL to the model's own prediction by layer, in nats."""
        from hooklens.viz.curves import lines

        shown = {"entropy": self.entropy, "KL to the final prediction": self.kl}
        bands = {name: self.interval(values) for name, values in shown.items() if self._several}
        means = {name: values.mean(0) for name, values in shown.items()}
        return lines(means, bands=bands, title=f"{self.lens}: distance to the end", x_title="layer", y_title="nats")


def trace_predictions(
    model: HookedTransformer,
    tokens: Prompts | PromptPairs,
    *,
    answer: Answers | None = None,
    wrong_answer: Answers | None = None,
    pos: int = -1,
    lens: TunedLens | None = None,
    group: Groups = None,
) -> Trajectory:
    """At which layer does the answer appear? Rank, probability, entropy and KL of every stream.

    >>> from hooklens.testing import induction_model
    >>> path = trace_predictions(induction_model(), [[3, 1, 4, 9, 3]], answer=1, wrong_answer=4)
    >>> path.rank.tolist(), path.logit_diff.tolist()            # prompt layer
    ([[5, 5, 0]], [[0.0, 0.0, 10.0]])

    One position of each prompt is read (default: the last); prompts may differ in length. With `lens`, streams pass
    through a tuned lens first. Prompts of one `group` are related: intervals are over groups. `PromptPairs` stand for
    their clean prompts, answers and groups.

    Reference: nostalgebraist (2020), "interpreting GPT: the logit lens"; Belrose et al. (2023), section 3.
    """
    reading.need_probabilities(model, "trace_predictions")
    reading.check_quiet(model)
    if lens is not None:
        lens.check_fits(model)
    prompts = reading.answered_prompts(model, tokens, answer, wrong_answer, group)
    answers = torch.stack([prompts.right] if prompts.wrong is None else [prompts.right, prompts.wrong], 1)
    parts = []
    with reading.packing(sum(map(len, prompts.rows))):
        for some in prompts.by_length():
            ids, wanted = torch.stack([prompts.rows[i] for i in some]), answers[some]
            for part in reading.prompts_at_once(model, ids):
                parts.append(_followed(model, part, wanted[: len(part)], pos, lens))
                wanted = wanted[len(part) :]
    values = prompts.in_order(parts)
    log_probs = values.pop("log_probs")
    return Trajectory(
        **values,
        log_prob=log_probs[..., 0],
        wrong_log_prob=None if prompts.wrong is None else log_probs[..., 1],
        layers=reading.stream_labels(model),
        answer=show(model, prompts.right),
        lens="logit lens" if lens is None else "tuned lens",
        group=prompts.group,
    )


def _followed(
    model, ids: Int[Tensor, "prompt pos"], asked: Int[Tensor, "prompt asked"], pos: int, lens: TunedLens | None
) -> dict[str, Tensor]:
    """The requested position in the first column, followed by the other positions of the same prompts."""
    n_prompts, n_pos = ids.shape
    if not -n_pos <= pos < n_pos:
        raise InputError(f"pos={pos} is out of range for a prompt of {n_pos} tokens")
    at = pos % n_pos
    streams = reading.streams_of(model, ids)[:, :, [at, *_others(n_pos, at)]]
    n_read = streams.shape[2]
    asked = asked.repeat_interleave(n_read, 0)
    read = reading.read_streams(model, streams.flatten(1, 2), asked, k=1, translate=lens)
    rank, log_prob, entropy, kl = (
        value.unflatten(1, (n_prompts, n_read)).transpose(0, 1)
        for value in (read.rank[..., 0], read.log_prob, read.entropy, read.kl)
    )
    wide = streams.transpose(0, 1).to(kl.dtype)  # prompt layer read d_model
    cosine = torch.nn.functional.cosine_similarity(wide, wide[:, -1:, :1], dim=-1)
    nothing = torch.full_like(kl[..., 0], float("nan"))
    return {
        "rank": rank[..., 0],
        "log_probs": log_prob[..., 0, :],
        "control_rank": rank[..., 1:].to(kl).median(-1).values if n_read > 1 else nothing,
        "entropy": entropy[..., 0],
        "kl": kl[..., 0],
        "norm": wide[:, :, 0].norm(dim=-1),
        "cosine": cosine[..., 0],
        "control_cosine": cosine[..., 1:].mean(-1) if n_read > 1 else nothing,
    }


def _others(n: int, at: int) -> list[int]:
    """Some other positions of a prompt, evenly spaced; not the first, whose stream is often unlike the others."""
    rest = [i for i in range(1, n) if i != at] or [i for i in range(n) if i != at]
    return sorted({rest[(2 * i + 1) * len(rest) // (2 * _CONTROLS)] for i in range(_CONTROLS)}) if rest else []


def demo(model: HookedTransformer) -> Trajectory | Needs:
    """Two short prompts; token numbers if the model has no tokenizer."""
    return needs_tokens(model) or trace_predictions(model, demo_pairs(model, 2))
