"""Logit lens: unembed the residual stream before every block, and see at which layer the model's answer appears."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import whole
from hooklens.core.errors import InputError
from hooklens.data.demo_prompts import demo_pairs
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts
from hooklens.metrics import Answers, answer_ids
from hooklens.model.ids import show
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.lens import reading
from hooklens.plugins.weights.needs import Needs, needs_tokens
from hooklens.results.result import Result, Table

_WRITTEN = 40  # maximum number of columns for which a figure's cells show words
_LARGEST = 2**30  # maximum size of full logits


@dataclass(frozen=True, eq=False)
class LogitLens(Result):
    """The predictions of each layer's stream at every position; the last row is the model itself.

    Ranks count from 0; tokens that tie share the middle place. `control_ranks` are the ranks of the same answers in
    the streams of other positions at the same layer (the number of tokens with a larger logit there), NaN where such a
    position has that answer itself (unless one answer was given for all): a rank says something about this position
    only where it lies well below those. `kl` is KL(model || lens) in nats. `words` is the text of every token id that
    occurs.
    """

    terms = {
        "control": "the median rank of the same answer in the streams of other positions; a rank that is not well "
        "below it says nothing about this position",
    }

    tokens: Int[Tensor, "batch pos"]
    layers: list[str]
    top_tokens: Int[Tensor, "layer batch pos k"]
    top_log_probs: Float[Tensor, "layer batch pos k"]
    answer: Int[Tensor, "batch pos"]
    rank: Int[Tensor, "layer batch pos"]
    log_prob: Float[Tensor, "layer batch pos"]
    control_ranks: Float[Tensor, "draw layer batch pos"]
    entropy: Float[Tensor, "layer batch pos"]
    kl: Float[Tensor, "layer batch pos"]
    words: dict[int, str]
    lens: str = "logit lens"

    @property
    def control_rank(self) -> Float[Tensor, "layer batch pos"]:
        """The median rank of each answer in the streams of other positions; NaN if there is none."""
        if not len(self.control_ranks):
            return torch.full_like(self.kl, float("nan"))
        return self.control_ranks.nanquantile(0.5, dim=0)

    @property
    def settled(self) -> Int[Tensor, "batch pos"]:
        """The first row of `layers` from which on the most likely token equals the model's own."""
        same = (self.top_tokens[..., 0] == self.top_tokens[-1, ..., 0]).flip(0).long()
        return len(self.layers) - same.cumprod(0).sum(0)

    def table(self, n: int | None = None) -> Table:
        """Row by row, the prediction at the last position of the first prompt; `control` is the rank elsewhere."""
        answer = self.words[int(self.answer[0, -1])]
        columns = ("stream", "says", "probability", f"rank of {answer!r}", "control", "log prob", "entropy", "KL")
        rows = []
        for i, name in enumerate(self.layers):
            at = (i, 0, -1)
            says = repr(self.words[int(self.top_tokens[at][0])])
            numbers = (self.rank, self.control_rank, self.log_prob, self.entropy, self.kl)
            rows.append((name, says, float(self.top_log_probs[at][0].exp()), *(value[at].item() for value in numbers)))
        return Table(columns, rows).head(n)

    def top_words(self, k: int = 5) -> Table:
        """The `k` most likely tokens of every row, at the last position of the first prompt."""
        k, kept = whole("k", k), self.top_tokens.shape[-1]
        if k > kept:
            raise InputError(f"the lens kept {kept} likely tokens, {k} were requested; run it again with k={k}")
        rows = [
            (name, *(repr(self.words[int(token)]) for token in self.top_tokens[i, 0, -1, :k]))
            for i, name in enumerate(self.layers)
        ]
        return Table(("stream", *(str(i + 1) for i in range(k))), rows)

    def figure(self, prompt: int = 0) -> Any:
        """Layers upwards, positions across; each cell shows the most likely token, coloured by its probability."""
        from hooklens.viz.figures import heatmap

        layers = list(reversed(range(len(self.layers))))
        return heatmap(
            self.top_log_probs[:, prompt, :, 0].exp().flip(0),
            x=[self.words[int(token)] for token in self.tokens[prompt]],
            y=[self.layers[layer] for layer in layers],
            title=f"{self.lens}: the most likely next token in every stream",
            x_title="token read",
            y_title="stream",
            hover=[[self._cell(layer, prompt, pos) for pos in range(self.tokens.shape[1])] for layer in layers],
            diverging=False,
            colourbar="probability",
            cells=[[self.words[int(token)] for token in self.top_tokens[layer, prompt, :, 0]] for layer in layers]
            if self.tokens.shape[1] <= _WRITTEN
            else None,
        )

    def _cell(self, layer: int, prompt: int, pos: int) -> tuple[str, ...]:
        """The lines of the hover box below the token's probability."""
        at = (layer, prompt, pos)
        pairs = zip(self.top_tokens[at].tolist(), self.top_log_probs[at].exp().tolist(), strict=True)
        likely = (f"{self.words[token]!r} {prob:.3f}" for token, prob in pairs)
        answer = self.words[int(self.answer[prompt, pos])]
        control = float(self.control_rank[at])
        rank = f"rank of {answer!r}: {int(self.rank[at])} (elsewhere {control:.0f})"
        return *likely, rank, f"entropy {float(self.entropy[at]):.2f}, KL {float(self.kl[at]):.2f}"


def logit_lens(
    model: HookedTransformer,
    tokens: Prompts | PromptPairs,
    *,
    answer: Answers | None = None,
    k: int = 5,
    incl_mid: bool = False,
    controls: int = 2,
) -> LogitLens:
    """Unembed the residual stream before every block: what would the model say if it stopped here?

    >>> from hooklens.testing import induction_model
    >>> lens = logit_lens(induction_model(), [[3, 1, 4, 9, 3]])
    >>> lens.layers, lens.settled.tolist()            # the answer, 1, appears after the last block
    (['0_pre', '1_pre', 'final_post'], [[2, 2, 2, 2, 2]])
    >>> lens.rank.shape, lens.rank[:, 0, -1].tolist()    # layer batch pos
    (torch.Size([3, 1, 5]), [5, 5, 0])

    The last row is the model itself. `answer` is the token whose rank is reported: one for all positions, one for each
    `[batch pos]`, or (None) the model's own prediction. As a control, each answer is also ranked at `controls` other
    positions; every further one costs a pass over the logits.
    `PromptPairs` stand for their clean prompts and, if they have them, their answers.
    `incl_mid` also reads the stream between attention and MLP. Early streams need not use the basis that the
    unembedding reads: a high KL there does not prove that the information is absent.

    Reference: nostalgebraist (2020), "interpreting GPT: the logit lens".
    """
    reading.need_probabilities(model, "logit_lens")
    ids = reading.one_length(model, tokens)
    return read_lens(
        model, ids, answer=reading.answers_of(tokens, answer)[0], k=k, incl_mid=incl_mid, controls=controls
    )


def read_lens(
    model: HookedTransformer,
    ids: Int[Tensor, "batch pos"],
    *,
    answer: Answers | None = None,
    k: int = 5,
    incl_mid: bool = False,
    controls: int = 2,
    translate: reading.Translate | None = None,
    lens: str = "logit lens",
) -> LogitLens:
    """Read streams with the given lens, whatever it does to them before they are unembedded."""
    k, controls = whole("k", k, 1), min(whole("controls", controls), ids.numel())
    reading.check_quiet(model)
    wanted = None if answer is None else _each_position(model, answer, ids)
    one_for_all = wanted is not None and bool((wanted == wanted[0, 0]).all())
    answers: list[Tensor] = []
    elsewhere: list[Tensor] = []
    readings: list[reading.Reading] = []
    with reading.packing(ids.numel()):
        for some in reading.read_at_once(model, ids):
            streams = reading.streams_of(model, some, incl_mid=incl_mid).flatten(1, 2)
            done = sum(len(answer) for answer in answers)
            final = reading.final_logits(model, streams[-1])
            mine = final.argmax(-1) if wanted is None else wanted[done : done + len(some)].flatten()
            shifts = _shifts(len(mine), controls)
            others = [mine.roll(shift) for shift in shifts]
            block = reading.read_streams(
                model,
                streams,
                mine[:, None],
                others=torch.stack(others, 1) if others else None,
                k=k,
                translate=translate,
                final=final,
            )
            answers.append(mine.view(some.shape))
            elsewhere.append(_elsewhere(block, mine, shifts, controls, one_for_all=one_for_all))
            readings.append(block)
    return _assembled(
        model,
        ids,
        answer=torch.cat(answers),
        controls=torch.cat(elsewhere, 2),
        readings=readings,
        incl_mid=incl_mid,
        lens=lens,
    )


def lens_logits(
    model: HookedTransformer, tokens: Prompts | PromptPairs, *, incl_mid: bool = False
) -> Float[Tensor, "layer batch pos d_vocab"]:
    """The full logits of a logit lens, for short prompts: the last row equals `model(tokens)` bit for bit.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model()
    >>> logits = lens_logits(model, [[1, 2, 3]])
    >>> logits.shape, torch.equal(logits[-1], model([[1, 2, 3]]))        # layer batch pos d_vocab
    (torch.Size([3, 1, 3, 11]), True)
    """
    ids = reading.one_length(model, tokens)
    reading.check_quiet(model)
    numbers = len(reading.stream_labels(model, incl_mid=incl_mid)) * ids.numel() * model.cfg.d_vocab_out
    if numbers > _LARGEST:
        raise InputError(
            f"the logits of every layer and position would be {numbers:,} numbers (at most {_LARGEST:,}); give fewer "
            "or shorter prompts, or use logit_lens, which keeps only the likely tokens, ranks, entropy and KL"
        )
    with torch.no_grad():
        return torch.stack([model.read_out(stream) for stream in reading.streams_of(model, ids, incl_mid=incl_mid)])


def _each_position(model: HookedTransformer, answer: Answers, ids: Tensor) -> Int[Tensor, "batch pos"]:
    """Expand one answer for all, one per prompt, or one per position."""
    if isinstance(answer, Tensor) and answer.ndim == 2:
        if answer.shape != ids.shape:
            raise InputError(f"answer [batch pos] has the prompts' shape {list(ids.shape)}, got {list(answer.shape)}")
        return answer_ids(model, answer.flatten()).view(ids.shape).to(ids.device)
    return reading.one_a_prompt(model, answer, len(ids), "answer").to(ids.device)[:, None].expand(ids.shape)


def _shifts(n: int, controls: int) -> list[int]:
    """Up to this many distinct cyclic shifts of n rows, none of them 0."""
    many = min(controls, n - 1)
    return [1 + i * (n - 1) // many for i in range(many)]


def _elsewhere(
    block: reading.Reading, answer: Int[Tensor, "row"], shifts: list[int], controls: int, *, one_for_all: bool
) -> Float[Tensor, "draw layer row"]:
    """The rank of each row's answer in the rows at these distances; NaN where that row has the same answer.

    With `one_for_all` the answer was given for all rows, so rows with the same answer are controls too.
    """
    ranks = torch.full((controls, *block.kl.shape), float("nan"), dtype=block.kl.dtype, device=answer.device)
    for draw, shift in enumerate(shifts):
        there = block.larger[..., draw].roll(-shift, 1).to(ranks)
        ranks[draw] = there if one_for_all else there.where(answer.roll(-shift) != answer, float("nan"))
    return ranks


def _assembled(
    model, ids: Tensor, answer: Tensor, controls: Tensor, readings: list[reading.Reading], incl_mid: bool, lens: str
) -> LogitLens:
    """Join the groups of prompts again."""
    whole = reading.Reading(*(torch.cat(parts, 1).unflatten(1, ids.shape) for parts in zip(*readings, strict=True)))
    known = torch.cat([whole.top.unique(), ids.unique(), answer.unique()]).unique()
    return LogitLens(
        tokens=ids,
        layers=reading.stream_labels(model, incl_mid=incl_mid),
        top_tokens=whole.top,
        top_log_probs=whole.top_log_probs,
        answer=answer,
        rank=whole.rank[..., 0],
        log_prob=whole.log_prob[..., 0],
        control_ranks=controls.unflatten(2, ids.shape),
        entropy=whole.entropy,
        kl=whole.kl,
        words=dict(zip(known.tolist(), show(model, known), strict=True)),
        lens=lens,
    )


def demo(model: HookedTransformer) -> LogitLens | Needs:
    """The lens on two short prompts; token numbers if the model has no tokenizer."""
    return needs_tokens(model) or logit_lens(model, demo_pairs(model, 2).clean)
