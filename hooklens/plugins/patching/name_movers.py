"""Name movers: heads that look at the indirect object and write its name, each claim measured on its own."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.precision import widened
from hooklens.data.ioi import IOIPairs
from hooklens.metrics import LogitDiff
from hooklens.model.linear import packed_linears
from hooklens.result import Result, Table
from hooklens.statistics import ratio_interval
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import drops_out

if TYPE_CHECKING:
    from hooklens.core.cache import ActivationCache
    from hooklens.model.transformer import HookedTransformer

PerHead = Float[Tensor, "layer head"]
Ends = tuple[PerHead, PerHead]
_NAMED = 10  # heads whose name is written into the figure


@dataclass(frozen=True)
class Criteria(Result):
    """What a head must show to be called a name mover; `level` is that of every interval.

    attention: the last position's attention to the indirect object, minus that to any other position but the first
    (where idle heads rest), lies above `least_margin`. copying: for at least `least_copying` of the names the head's OV
    puts the name itself among the `top_k` tokens. direct: the share of the clean-corrupted difference that the head
    restores on its direct path to the logits lies above `least_direct`.
    """

    least_margin: float = 0.1
    top_k: int = 5
    least_copying: float = 0.5
    least_direct: float = 0.01
    level: float = 0.95


@dataclass(frozen=True, eq=False)
class NameMovers(Result):
    """The three measurements of every head, pair by pair, and the criteria that they are held against.

    `attention` is what the last position pays to the indirect object, `margin` how much more than to any other position
    but the first. `rank` is the place that a name takes among all tokens when the name itself, as it leaves block 0, is
    put through the head's values and output, the final norm's weight and W_U (0: first; in the last places: the head
    writes the opposite of the name). `written` is what that adds to the logits of all the prompts' names: its diagonal,
    above what is written of the others, is copying of names rather than a liking for names. `direct` is the change of
    the logit difference when the head's output in the corrupted run is replaced by the clean one for the final norm and
    the unembedding only. `group` says which pairs share names and sentence: intervals resample groups, as pairs within
    one are not independent.
    """

    attention: Float[Tensor, "pair layer head"]
    margin: Float[Tensor, "pair layer head"]
    rank: Int[Tensor, "name layer head"]
    written: Float[Tensor, "name layer head other"]
    direct: Float[Tensor, "pair layer head"]
    placebo: Float[Tensor, "pair layer head"]
    gap: Float[Tensor, "pair"]
    name: Int[Tensor, "pair"]
    group: Int[Tensor, "pair"]
    d_vocab: int
    criteria: Criteria

    @property
    def copying(self) -> PerHead:
        """The share of names that the head's OV puts among its `top_k` tokens."""
        return (self.rank < self.criteria.top_k).float().mean(0)

    @property
    def suppressing(self) -> PerHead:
        """The share of names that the head's OV puts among its `top_k` least likely tokens."""
        return (self.rank >= self.d_vocab - self.criteria.top_k).float().mean(0)

    @property
    def share(self) -> PerHead:
        """What each head restores on its direct path, as a share of the clean-corrupted difference."""
        return self.direct.mean(0) / self.gap.mean()

    def share_interval(self) -> Ends:
        """The interval of `share`, over groups of pairs."""
        return self._interval(self.direct, self.gap)

    def margin_interval(self) -> Ends:
        """The interval of the mean `margin`, over groups of pairs."""
        return self._interval(self.margin, torch.ones_like(self.gap))

    @property
    def defined(self) -> bool:
        """Does the model do the task: does the interval of the clean-corrupted difference lie above 0?"""
        low, _ = self._interval(self.gap[:, None, None], torch.ones_like(self.gap))
        return bool(low[0, 0] > 0)

    @property
    def passes(self) -> Bool[Tensor, "test layer head"]:
        """Which heads attend, copy, and act directly, in this order."""
        asked = self.criteria
        attends = self.margin_interval()[0] > asked.least_margin
        acts = self.share_interval()[0] > asked.least_direct
        return torch.stack([attends, self.copying >= asked.least_copying, acts & self.defined])

    def verdict(self) -> list[list[str]]:
        """What each head of each layer is called: "name mover" where all three hold, else what its direct effect is."""
        low, high = self.share_interval()
        least, all_three = self.criteria.least_direct, self.passes.all(0)
        return [
            [
                "name mover"
                if all_three[layer, head]
                else "restores the logit difference"
                if self.defined and low[layer, head] > least
                else "lowers the logit difference"
                if self.defined and high[layer, head] < -least
                else "little direct effect"
                for head in range(low.shape[1])
            ]
            for layer in range(low.shape[0])
        ]

    @property
    def name_movers(self) -> list[tuple[int, int]]:
        """(layer, head) of every head that passes all three, the largest direct effect first."""
        found = [tuple(index) for index in self.passes.all(0).nonzero().tolist()]
        return sorted(found, key=lambda index: -float(self.share[index]))

    def order(self) -> list[tuple[int, int]]:
        """Every (layer, head), the largest direct effect first, whatever its sign."""
        by = self.share.flatten().abs().argsort(descending=True, stable=True).tolist()
        return [divmod(i, self.share.shape[1]) for i in by]

    def top(self, k: int = 10) -> Table:
        """The `k` heads of the largest direct effect."""
        return self.table(k)

    def table(self, n: int | None = 12) -> Table:
        """One row a head: what it is called and why."""
        columns = ("head", "called", "direct effect", "low", "high", "attends to IO", "margin", "copies", "suppresses")
        (low, high), verdict = self.share_interval(), self.verdict()
        each = (self.share, low, high, self.attention.mean(0), self.margin.mean(0), self.copying, self.suppressing)
        rows = [
            (f"L{layer}H{head}", verdict[layer][head], *(float(value[layer, head]) for value in each))
            for layer, head in self.order()[:n]
        ]
        return Table(columns, rows)

    def figure(self) -> Any:
        """Every head by its attention to the indirect object and its direct effect, coloured by how well it copies."""
        from hooklens.viz.curves import scatter

        heads = [f"L{i}H{j}" for i in range(self.share.shape[0]) for j in range(self.share.shape[1])]
        drawn = scatter(
            self.attention.mean(0).flatten(),
            self.share.flatten(),
            heads,
            "Heads: who looks at the indirect object, and who acts on the logits",
            x_title="attention of the last position to the indirect object",
            y_title="direct effect (share of the difference)",
            colour=self.copying.flatten(),
            colourbar="copies names",
        )
        for layer, head in self.order()[:_NAMED]:
            at = {"x": float(self.attention[:, layer, head].mean()), "y": float(self.share[layer, head])}
            drawn.add_annotation(**at, text=f"L{layer}H{head}", showarrow=False, yshift=12, font_size=11)
        return drawn

    def _interval(self, values: Float[Tensor, "pair layer head"], below: Float[Tensor, "pair"]) -> Ends:
        top, bottom = by_group(values, self.group), by_group(below, self.group)
        low, high = ratio_interval(top.flatten(1), bottom, level=self.criteria.level)
        return low.view(values.shape[1:]), high.view(values.shape[1:])


def by_group(values: Float[Tensor, "pair *cell"], group: Int[Tensor, "pair"]) -> Float[Tensor, "group *cell"]:
    """The mean over each group's pairs.

    >>> by_group(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])).tolist()
    [2.0, 5.0]
    """
    return torch.stack([values[group == one].mean(0) for one in group.unique()])


def name_movers(model: "HookedTransformer", pairs: IOIPairs, *, criteria: Criteria | None = None) -> NameMovers:
    """Which heads move the indirect object's name to the answer? Three measurements, each of which can say no.

    The metric is the logit difference of the indirect object and the subject at the last position. A direct effect is
    exact, final norm included: every other component keeps its value of the corrupted run.

    >>> from hooklens.testing import tiny_model
    >>> found = demo(tiny_model())
    >>> found.direct.shape, found.name_movers        # pair layer head
    (torch.Size([8, 2, 2]), [])

    Reference: Wang et al. (2022), "Interpretability in the Wild", sections 3.1 and 3.2 (copy score, path patching).
    """
    if getattr(model.blocks[0], "renorms_stream", False):
        raise InputError(
            "a direct effect needs a stream that is the sum of what heads add to it; this model's post-norm blocks "
            "normalise the stream itself. hl.patch(..., site='z') works there"
        )
    if drops_out(model):
        raise InputError("two runs are compared, and dropout is on: they would differ by its masks; call model.eval()")
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    first = "blocks.0.hook_resid_post"
    with torch.no_grad(), packed_linears(rows=1024):
        _, clean = model.run_with_cache(
            pairs.clean_tokens, ["z", "pattern", "hook_embed", first, last, *_post_scales(model)]
        )
        _, corrupted = model.run_with_cache(pairs.corrupted_tokens, ["z", last, *_post_scales(model)])
        attention, margin = _attention(model, clean, pairs)
        metric = LogitDiff(pairs.end, pairs.answer_tokens, pairs.wrong_answer_tokens)
        direct, placebo, gap = _direct(model, clean, corrupted, pairs, metric)
        rank, written = _ranks(model, clean, pairs)
    name = pairs.answer_tokens.unique(return_inverse=True)[1]
    sizes = pairs.group, model.cfg.d_vocab_out, criteria or Criteria()
    return NameMovers(attention, margin, rank, written, direct, placebo, gap, name, *sizes)


def _post_scales(model: "HookedTransformer") -> list[str]:
    """In sandwich-norm blocks a head reaches the stream through a norm, whose scale is held."""
    return [name for name in model.hook_names() if name.endswith("ln1_post.hook_scale")]


def _attention(
    model: "HookedTransformer", cache: "ActivationCache", pairs: IOIPairs
) -> tuple[Float[Tensor, "pair layer head"], Float[Tensor, "pair layer head"]]:
    row = torch.arange(len(pairs), device=pairs.io.device)
    layers = range(model.cfg.n_layers)
    seen = widened(
        torch.stack([cache["pattern", layer][row, :, pairs.end] for layer in layers], 1)
    )  # pair layer head key
    to_io = seen[row, :, :, pairs.io]
    others = seen.clone()
    others[row, :, :, pairs.io] = 0.0
    return to_io, to_io - others[..., 1:].amax(-1)


def _direct(
    model: "HookedTransformer",
    clean: "ActivationCache",
    corrupted: "ActivationCache",
    pairs: IOIPairs,
    metric: LogitDiff,
) -> tuple[Float[Tensor, "pair layer head"], Float[Tensor, "pair layer head"], Float[Tensor, "pair"]]:
    """How the metric of the corrupted run moves when the final norm alone reads a head's clean output; the placebo."""
    row = torch.arange(len(pairs), device=pairs.io.device)
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    reader = Reader(model, metric, corrupted[name])
    other = _of_other_names(pairs.answer_tokens, pairs.wrong_answer_tokens)
    stream = corrupted[name][row, pairs.end]
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    which = row.repeat_interleave(model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        new, old = (_written(model, cache, layer, pairs.end) for cache in (clean, corrupted))
        for each, sent in zip(found, (new, new[other]), strict=True):
            moved = (stream[:, None] + sent - old).flatten(0, 1)[:, None]
            values = reader.values_of_rows(moved, which, torch.zeros_like(which)).view(len(pairs), -1)
            each.append(values - reader.base[:, None])
    direct, placebo = (torch.stack(each, 1) for each in found)
    return direct, placebo, Reader(model, metric, clean[name]).base - reader.base


def _of_other_names(answer: Int[Tensor, "pair"], wrong_answer: Int[Tensor, "pair"]) -> Int[Tensor, "pair"]:
    """For each pair one with neither of its names, drawn at random; where there is none, itself."""
    names = torch.stack((answer, wrong_answer), 1).cpu()
    share = (names[:, None, :, None] == names[None, :, None, :]).flatten(2).any(-1)
    score = torch.rand(share.shape, generator=torch.Generator().manual_seed(0)).masked_fill(share, -1.0)
    own = score.argmax(1).where(~share.all(1), torch.arange(len(names)))
    return own.to(answer.device)


def _written(
    model: "HookedTransformer", cache: "ActivationCache", layer: int, end: Int[Tensor, "pair"]
) -> Float[Tensor, "pair head d_model"]:
    """What each head adds to the stream at the last position."""
    row, block = torch.arange(len(end), device=end.device), model.blocks[layer]
    result = block.attn.results(cache["z", layer][row, end][:, None])[:, 0]
    norm = getattr(block, "ln1_post", None)
    if norm is None:
        return result
    return norm.linearised(result, cache[f"blocks.{layer}.ln1_post.hook_scale"][row, end][:, None])


def _ranks(
    model: "HookedTransformer", cache: "ActivationCache", pairs: IOIPairs
) -> tuple[Int[Tensor, "name layer head"], Float[Tensor, "name layer head other"]]:
    """A name's place among all tokens after each head's OV, and the logits of all names; a norm's scale is left out."""
    names, which = pairs.answer_tokens.unique(return_inverse=True)
    row = torch.arange(len(pairs), device=names.device)
    places, written = [], []
    for layer in range(model.cfg.n_layers):
        # the first block's heads read the embedding, later ones the name as block 0 leaves it
        source = "hook_embed" if layer == 0 else "blocks.0.hook_resid_post"
        name = by_group(cache[source][row, pairs.io], which)
        logits = widened(_unembedded(model, _through_ov(model, layer, name)))
        written.append(logits[:, :, names])
        own = logits.gather(2, names[:, None, None].expand(-1, logits.shape[1], 1))
        # #larger - #smaller; with #larger + #smaller + #equal = d_vocab this is the middle place of those that tie: a
        # head that writes nothing neither copies nor suppresses
        signs = (logits - own).sign_().sum(-1)
        places.append((signs.long() + logits.shape[-1] - 1) // 2)
    return torch.stack(places, 1), torch.stack(written, 1)


def _through_ov(
    model: "HookedTransformer", layer: int, x: Float[Tensor, "name d_model"]
) -> Float[Tensor, "name head d_model"]:
    """What each head writes when it attends to x alone, biases left out."""
    block, attn = model.blocks[layer], model.blocks[layer].attn
    normed = x if block.ln1 is None else block.ln1(x)
    v = attn.heads(attn.v, normed[:, None], None) - attn.heads(attn.v, torch.zeros_like(normed)[:, None], None)
    z = v.repeat_interleave(attn.n_heads // attn.n_kv_heads, 2)  # heads of a group share their values
    result = attn.results(z)[:, 0]
    norm = getattr(block, "ln1_post", None)
    return result if norm is None else norm.linearised(result, torch.ones_like(result[..., :1]))


def _unembedded(
    model: "HookedTransformer", x: Float[Tensor, "name head d_model"]
) -> Float[Tensor, "name head d_vocab"]:
    if model.ln_final is not None:
        x = model.ln_final.linearised(x, torch.ones_like(x[..., :1]))
    linear = model.unembed.linear
    return linear(x) if linear.bias is None else linear(x) - linear.bias


def demo(model: "HookedTransformer") -> NameMovers:
    """Eight pairs of token numbers in the shape of "so A and B, B gave to"; any model, no tokenizer needed."""
    wide = max(model.cfg.d_vocab - 4, 1)
    couples = [(4 + 2 * i % wide, 4 + (2 * i + 1) % wide) for i in range(2)]
    roles = [(a, b, order) for x, y in couples for a, b in ((x, y), (y, x)) for order in ("ABBA", "BABA")]
    firsts = [(a, b) if order == "ABBA" else (b, a) for a, b, order in roles]
    rows = [[[0, p, 1, q, 2, s, 3] for s in (b, a)] for (p, q), (a, b, _) in zip(firsts, roles, strict=True)]
    tokens = torch.tensor(rows, device=model.device).clamp_max(model.cfg.d_vocab - 1)[..., : model.cfg.n_ctx]
    answer, wrong = (torch.tensor([role[i] for role in roles], device=model.device) for i in (0, 1))
    first = torch.tensor([order == "ABBA" for *_, order in roles], device=model.device)
    io, s1 = torch.where(first, 1, 3), torch.where(first, 3, 1)
    clean, corrupted = tokens.unbind(1)
    pairs = IOIPairs(
        clean=[str(row) for row in clean.tolist()],
        corrupted=[str(row) for row in corrupted.tolist()],
        clean_tokens=clean,
        corrupted_tokens=corrupted,
        answer=[str(token) for token in answer.tolist()],
        wrong_answer=[str(token) for token in wrong.tolist()],
        answer_tokens=answer,
        wrong_answer_tokens=wrong,
        io=io,
        s1=s1,
        s2=torch.full_like(io, 5),
        end=torch.full_like(io, 6),
        order=[order for *_, order in roles],
        template=["numbers"] * len(roles),
        group=torch.arange(2, device=model.device).repeat_interleave(4),
    )
    return name_movers(model, pairs)
