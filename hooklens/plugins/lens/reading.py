"""Read streams with a lens: unembed them block by block, and keep only the requested values."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooklens.core.errors import ArgumentError, InputError
from hooklens.core.hooks import edited_elsewhere
from hooklens.core.precision import as_wide_as, widened
from hooklens.core.progress_bar import progress
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import Prompts, Row, need_tokens, rows_of
from hooklens.metrics import Answers, answer_ids, check_answers_differ
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.results.statistics import Groups, group_numbers, mean_interval
from hooklens.sweeps.naive import drops_out

#: Maps a layer's row and its streams to the streams that the final norm reads instead.
Translate = Callable[[int, Float[Tensor, "row d_model"]], Float[Tensor, "row d_model"]]

_LOGITS_AT_ONCE = 2**25  # size of one product: 128 MiB; a weight is read once for each, which smaller ones do not repay
_STREAMS_AT_ONCE = 64 * 2**20  # size of the streams kept while they are read
_FINAL_AT_ONCE = 32 * 2**20  # size of the model's own logits kept while its streams are read: 128 MiB
_WORTH_PACKING = 256  # minimum number of rows
_DESCRIBED_AT_ONCE = 2**19  # logits per pass through the cores' caches: 6 MiB with two scratch arrays
_SET = 32  # tokens per set; a first pass looks only at the largest logit of each set
# up to this number of threads, one thread of numpy counts faster: its comparisons write bytes, torch's write floats
_NUMPY_COUNTS_UP_TO = 4


class Reading(NamedTuple):
    """The predictions of each row of the streams, layer by layer. Ranks count from 0; ties get the middle rank.

    `larger` is the number of tokens with a larger logit than each of the `others`: the rank if there are no ties.
    """

    top: Int[Tensor, "layer row k"]
    top_log_probs: Float[Tensor, "layer row k"]
    rank: Int[Tensor, "layer row asked"]
    larger: Int[Tensor, "layer row other"]
    log_prob: Float[Tensor, "layer row asked"]
    entropy: Float[Tensor, "layer row"]
    kl: Float[Tensor, "layer row"]


def packing(rows: int) -> AbstractContextManager:
    """Pack the weights if many rows are multiplied; packing costs a pass over the weights, too much for a few rows."""
    return packed_linears(rows=1024) if rows >= _WORTH_PACKING else nullcontext()


def one_length(model: HookedTransformer, prompts: Prompts | PromptPairs) -> Shaped[Tensor, "batch pos *d_in"]:
    """The prompts as tokens [batch pos], or vectors [batch pos d_in]; prompts of different lengths raise an error."""
    rows = rows_of(model, clean_of(prompts), "tokens")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise InputError(
            f"a lens reads all positions of prompts of one length, got prompts of {lengths} tokens; read them one by "
            "one, or use trace_predictions, which reads one position per prompt"
        )
    return torch.stack(rows)


@dataclass(frozen=True)
class AnsweredPrompts:
    """Prompts of any lengths, with the answer to each, the wrong answers if any, and the groups of related prompts."""

    rows: list[Row]
    right: Int[Tensor, "prompt"]
    wrong: Int[Tensor, "prompt"] | None
    group: Groups

    def by_length(self) -> list[list[int]]:
        """The numbers of the prompts, grouped by length in tokens."""
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            groups.setdefault(len(row), []).append(i)
        return list(groups.values())

    def in_order(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Join the values of all lengths, in the order of the prompts."""
        order = torch.tensor([i for some in self.by_length() for i in some]).argsort()
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}


def answered_prompts(
    model: HookedTransformer,
    tokens: Prompts | PromptPairs,
    answer: Answers | None,
    wrong_answer: Answers | None,
    group: Groups,
) -> AnsweredPrompts:
    """Read prompts and answers. PromptPairs stand for their clean prompts, their answers and their groups."""
    right, wrong = answers_of(tokens, answer, wrong_answer)
    if right is None and model.cfg.d_vocab_out == 1:
        right = 0  # the one number that the model puts out
    if right is None:
        raise ArgumentError("{answer} is missing; give a token for all prompts or one per prompt, or PromptPairs")
    rows, wrong_ids = rows_of(model, clean_of(tokens), "tokens"), None
    right_ids = one_a_prompt(model, right, len(rows), "answer")
    if wrong is not None:
        wrong_ids = one_a_prompt(model, wrong, len(rows), "wrong_answer")
        check_answers_differ(model, right_ids, wrong_ids)
    if group is None and isinstance(tokens, PromptPairs):
        group = tokens.group
    return AnsweredPrompts(rows, right_ids, wrong_ids, group)


def clean_of(tokens: Prompts | PromptPairs) -> Prompts:
    """The prompts, which are the clean ones of PromptPairs."""
    return tokens.clean if isinstance(tokens, PromptPairs) else tokens


def answers_of(
    tokens: Prompts | PromptPairs, answer: Answers | None, wrong_answer: Answers | None = None
) -> tuple[Answers | None, Answers | None]:
    """The given answers; if none are given, those of PromptPairs or of their metric."""
    if answer is not None or not isinstance(tokens, PromptPairs):
        return answer, wrong_answer
    source = tokens.metric if tokens.answer is None else tokens
    wrong = getattr(source, "wrong_answer", None) if wrong_answer is None else wrong_answer
    return getattr(source, "answer", None), wrong


def one_a_prompt(model: HookedTransformer, answer: Answers, n: int, name: str) -> Int[Tensor, "prompt"]:
    """Token ids of one answer for all prompts, or of one per prompt."""
    ids = answer_ids(model, answer, name).to(model.device)
    if len(ids) not in (1, n):
        raise InputError(f"{name} must be one token for all prompts or one per prompt, got {len(ids)} for {n} prompts")
    return ids.expand(n)


class OverPrompts:
    """A mixin for results with values per prompt: intervals of their means."""

    answer: list[str]
    group: Int[Tensor, "prompt"] | None

    def interval(self, values: Float[Tensor, "prompt *cell"]) -> tuple[Tensor, Tensor]:
        """The 95 % interval of a mean over prompts, by a bootstrap over their groups; NaN for one group."""
        return mean_interval(values, group=self.group)

    @property
    def _several(self) -> bool:
        return int(group_numbers(len(self.answer), self.group).max()) > 0


def stream_labels(model: HookedTransformer, *, incl_mid: bool = False) -> list[str]:
    """The names of the streams of `streams_of`: 0_pre, 1_pre, ..., final_post."""
    n = model.cfg.n_layers
    mids = ("pre", "mid") if incl_mid else ("pre",)
    return [f"{layer}_{part}" for layer in range(n) for part in mids] + ["final_post"]


def need_probabilities(model: HookedTransformer, asker: str) -> None:
    """Raise where a lens compares distributions over tokens, and the model reads vectors or has one output number."""
    instead = "hl.lens.prediction_lens(model, prompts) gives its output after every layer"
    need_tokens(model, asker, instead)
    if model.cfg.d_vocab_out < 2:
        raise InputError(f"{asker} compares probabilities of tokens, and this model's output is one number; {instead}")


def streams_of(
    model: HookedTransformer, tokens: Shaped[Tensor, "batch pos *d_in"], *, incl_mid: bool = False
) -> Float[Tensor, "layer batch pos d_model"]:
    """The stream before every block (with `incl_mid`, also after its attention), and the input of the final norm."""
    sites = ["resid_pre", "resid_mid"] if incl_mid else ["resid_pre"]
    if incl_mid and "blocks.0.hook_resid_mid" not in model.hook_points():
        raise InputError("incl_mid needs a stream between attention and MLP, and this model's blocks have none")
    with torch.no_grad():
        # not the last resid_post: post-norm blocks normalise it again before it is unembedded
        final, cache = model.run_with_cache(tokens, sites, stop_at_layer=model.cfg.n_layers)
    return torch.stack([*(cache[name] for name in cache), final])


def prompts_at_once(
    model: HookedTransformer, tokens: Shaped[Tensor, "batch pos *d_in"]
) -> Iterator[Shaped[Tensor, "some pos *d_in"]]:
    """Groups of prompts whose streams fit the memory limit."""
    size = tokens.shape[1] * model.cfg.d_model * (2 * model.cfg.n_layers + 1)
    yield from tokens.split(max(1, _STREAMS_AT_ONCE // size))


def read_at_once(model: HookedTransformer, tokens: Int[Tensor, "batch pos"]) -> Iterator[Int[Tensor, "some pos"]]:
    """Groups of prompts for which the model's own logits also fit."""
    size = tokens.shape[1] * model.cfg.d_vocab_out
    for group in prompts_at_once(model, tokens):
        yield from group.split(max(1, _FINAL_AT_ONCE // size))


def final_logits(model: HookedTransformer, stream: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    """The model's own logits for these rows, in blocks of equal size with at most `_LOGITS_AT_ONCE` logits."""
    width = max(1, _LOGITS_AT_ONCE // model.cfg.d_vocab_out)
    many = -(-len(stream) // -(-len(stream) // width))
    with torch.no_grad():
        blocks = [model.read_out(rows[None])[0] for rows in stream.split(many)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def check_quiet(model: HookedTransformer) -> None:
    """Refuse silent errors: dropout, which makes passes differ, and hooks that would mistake layers for positions."""
    if drops_out(model):
        raise InputError("a lens compares passes, which dropout makes different; turn it off with model.eval()")
    points = [point for name, point in model.hook_points().items() if name.startswith(("ln_final.", "unembed."))]
    if edited_elsewhere(points):
        raise InputError(
            "a lens unembeds the streams of all layers in blocks, and hooks at ln_final or unembed are active, which "
            "would mistake these for positions of the prompt; leave that scope, or hook the blocks only"
        )


def read_streams(
    model: HookedTransformer,
    streams: Float[Tensor, "layer row d_model"],
    asked: Int[Tensor, "row asked"],
    *,
    others: Int[Tensor, "row other"] | None = None,
    k: int = 5,
    translate: Translate | None = None,
    final: Float[Tensor, "row d_vocab"] | None = None,
) -> Reading:
    """Unembed every layer's streams; the last layer's are the model's own and are never translated.

    At most `_LOGITS_AT_ONCE` logits exist at a time, of all layers for a few rows, so that a row's final distribution
    serves all its layers. `final` passes the last layer's logits if the caller has them (from `final_logits`).
    """
    check_quiet(model)
    n_layers, n_rows = streams.shape[:2]
    if others is None:
        others = asked.new_empty(n_rows, 0)
    own = n_layers if final is None else n_layers - 1  # the number of layers that are unembedded here
    many = max(1, min(n_rows, _LOGITS_AT_ONCE // (max(1, own) * model.cfg.d_vocab_out)))
    blocks = []
    with (
        torch.no_grad(),
        packing(n_layers * n_rows),
        progress("unembedding streams", n_layers * n_rows, unit="rows") as advance,
    ):
        for start in range(0, n_rows, many):
            rows = slice(start, start + many)
            x = streams[:own, rows]
            if translate is not None and n_layers > 1:
                translated = [translate(i, stream) for i, stream in enumerate(x[: n_layers - 1])]
                x = torch.cat([torch.stack(translated), x[n_layers - 1 :]])
            last = None if final is None else final[rows]
            blocks.append(_read_block(model, x, last, asked[rows], others=others[rows], k=k))
            advance(n_layers * len(asked[rows]))
    reading = Reading(*(torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True)))
    if not bool(reading.entropy.isfinite().all()):
        layer = int((~reading.entropy.isfinite()).any(1).nonzero()[0])
        raise InputError(
            f"the stream in row {layer} of the lens, or its logits, are not finite, so the lens cannot read them"
        )
    return reading


def _read_block(
    model: HookedTransformer, x: Tensor, final: Tensor | None, asked: Tensor, *, others: Tensor, k: int
) -> Reading:
    """Read a few rows of all layers. The last layer of `x` is the model's own, unless `final` has its logits."""
    readings = []
    target = None if final is None else widened(final).softmax(-1)
    if final is not None and target is not None:
        readings.append(_described(final[None], target, asked, others=others, k=k))
    at_once = max(1, _LOGITS_AT_ONCE // (x.shape[1] * model.cfg.d_vocab_out))
    for layers in reversed(x.split(at_once)) if len(x) else ():
        logits = model.read_out(layers)
        if target is None:
            target = widened(logits[-1]).softmax(-1)
        readings.append(_described(logits, target, asked, others=others, k=k))
    reading = Reading(*(torch.cat(parts[::-1]) for parts in zip(*readings, strict=True)))
    kl = (reading.kl - reading.entropy[-1]).clamp_min_(0)
    kl[-1] = 0  # the model against itself: exactly 0, without rounding
    return reading._replace(kl=kl)


def _described(
    logits: Float[Tensor, "layer row d_vocab"],
    target: Float[Tensor, "row d_vocab"],
    asked: Tensor,
    *,
    others: Tensor,
    k: int,
) -> Reading:
    """Read some layers' logits; `kl` contains the cross-entropy, still without the target's entropy subtracted."""
    n_layers, n_rows, d_vocab = logits.shape
    flat, n_asked = logits.flatten(0, 1), asked.shape[1]
    with as_wide_as(target):  # autocast would round the sums
        bounds = flat.gather(-1, torch.cat([asked, others], 1).repeat(n_layers, 1)).to(target.dtype)
        sums = _sums(flat, bounds, n_asked)
        ids = top_tokens(flat, sums.largest, min(k, d_vocab))
        best = flat.gather(-1, ids).to(target.dtype)
        log_total = best[:, :1] + sums.total.log()[:, None]
        reading = Reading(
            top=ids,
            top_log_probs=best - log_total,
            # the middle rank of ties: between #larger and #larger + #equal - 1
            rank=(sums.larger[:, :n_asked] + sums.at_least - 1) // 2,
            larger=sums.larger[:, n_asked:],
            log_prob=bounds[:, :n_asked] - log_total,
            entropy=log_total[:, 0] - sums.mean,
            kl=log_total[:, 0] - _target_means(logits, target).flatten(),
        )
    return Reading(*(value.unflatten(0, (n_layers, n_rows)) for value in reading))


def _target_means(
    logits: Float[Tensor, "layer row d_vocab"], target: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, "layer row"]:
    """The mean logit of every layer, as the model weighs tokens: one product per row, whose layers share the target."""
    z = logits.to(target.dtype)
    means = torch.stack([z[:, row] @ weights for row, weights in enumerate(target)], 1)
    for layer, row in (~means.isfinite()).nonzero().tolist():
        means[layer, row] = expected(target[row : row + 1], z[layer, row : row + 1])
    return means


class _Sums(NamedTuple):
    """The results of the passes over the vocabulary; `largest` belongs to the sets of `_set_maxima`."""

    largest: Float[Tensor, "row n_sets"]
    total: Float[Tensor, "row"]  # of exp(z - largest z)
    mean: Float[Tensor, "row"]  # of z, as the lens weighs tokens
    larger: Int[Tensor, "row bound"]  # number of logits above each bound
    at_least: Int[Tensor, "row asked"]  # and of those not below it


def _sums(logits: Float[Tensor, "row d_vocab"], bounds: Float[Tensor, "row bound"], n_asked: int) -> _Sums:
    """Process a few rows at a time, so that each pass finds its logits in the core's cache, with one shared scratch."""
    n_rows, d_vocab = logits.shape
    few = max(1, min(n_rows, _DESCRIBED_AT_ONCE // d_vocab))
    sums = _Sums(
        largest=bounds.new_empty(n_rows, d_vocab // _SET),
        total=bounds.new_empty(n_rows),
        mean=bounds.new_empty(n_rows),
        larger=torch.empty_like(bounds, dtype=torch.long),
        at_least=bounds.new_empty(n_rows, n_asked, dtype=torch.long),
    )
    scratch = bounds.new_empty(few, d_vocab)
    few_threads = logits.device.type == "cpu" and torch.get_num_threads() <= _NUMPY_COUNTS_UP_TO
    count = _counted_by_numpy if few_threads else _counted
    for start in range(0, n_rows, few):
        rows = slice(start, start + few)
        z = logits[rows].to(bounds.dtype)
        work = scratch[: len(z)]
        _set_maxima(z, sums.largest[rows])
        torch.sub(z, z.amax(-1, keepdim=True), out=work).exp_()
        torch.sum(work, -1, out=sums.total[rows])
        torch.sum(work.mul_(z), -1, out=sums.mean[rows]).div_(sums.total[rows])
        count(z, bounds[rows], larger=sums.larger[rows], at_least=sums.at_least[rows])
    for some in (~sums.mean.isfinite()).nonzero()[:, 0].split(few):
        z = logits[some].to(bounds.dtype)
        sums.mean[some] = expected(z.softmax(-1), z)
    return sums


def _counted_by_numpy(z: Tensor, bounds: Tensor, *, larger: Tensor, at_least: Tensor) -> None:
    """Count the logits above each bound, and those not below the first ones, row by row: a row stays in the cache."""
    above = np.empty(z.shape[-1], dtype=bool)
    counts = (larger.numpy(), np.greater), (at_least.numpy(), np.greater_equal)
    for row, (logits, limits) in enumerate(zip(z.numpy(), bounds.numpy(), strict=True)):
        for count, compare in counts:
            for column in range(count.shape[1]):
                count[row, column] = np.count_nonzero(compare(logits, limits[column], out=above))


def _counted(z: Tensor, bounds: Tensor, *, larger: Tensor, at_least: Tensor) -> None:
    """The same for many threads or another device."""
    above = torch.empty_like(z)
    for column, limit in enumerate(bounds.T):
        larger[:, column] = torch.gt(z, limit[:, None], out=above).sum(-1)
    for column, limit in enumerate(bounds.T[: at_least.shape[1]]):
        at_least[:, column] = torch.ge(z, limit[:, None], out=above).sum(-1)


def _set_maxima(z: Float[Tensor, "row d_vocab"], out: Float[Tensor, "row n_sets"]) -> None:
    """The largest logit of every set of `_SET` tokens, which lie n_sets apart."""
    n = out.shape[-1]
    if n:
        torch.amax(z[:, : n * _SET].unflatten(-1, (_SET, n)), 1, out=out)


def top_tokens(
    logits: Float[Tensor, "row d_vocab"], largest: Float[Tensor, "row n_sets"], k: int
) -> Int[Tensor, "row k"]:
    """The tokens of the k largest logits of each row, equal to `topk` in a third of its time.

    They lie in the k sets of tokens with the largest maxima, given by `largest`.

    >>> logits = torch.arange(10000.0).roll(3)[None]
    >>> largest = torch.empty(1, 10000 // 32)
    >>> _set_maxima(logits, largest)
    >>> top_tokens(logits, largest, 3).tolist()
    [[2, 1, 0]]
    """
    n = largest.shape[-1]
    if n < 8 * k:
        return logits.topk(k).indices
    best = largest.topk(k).indices
    ids = (best[:, None] + torch.arange(0, n * _SET, n, device=best.device)[:, None]).flatten(1)
    rest = torch.arange(n * _SET, logits.shape[-1], device=best.device).expand(len(ids), -1)
    ids = torch.cat([ids, rest], 1)
    return ids.gather(1, logits.gather(1, ids).topk(k).indices)


def expected(probs: Float[Tensor, "*row d_vocab"], z: Float[Tensor, "*row d_vocab"]) -> Float[Tensor, "*row"]:
    """The mean of z under each row of probabilities; a token that is forbidden in both, 0 * -inf, contributes 0.

    >>> expected(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 3.0, float("-inf")]])).tolist()
    [2.0]
    """
    mean = torch.linalg.vecdot(probs, z)
    if bool(mean.isfinite().all()):
        return mean
    return torch.linalg.vecdot(probs, z.masked_fill(z.isneginf() & (probs == 0), 0.0))
