"""Name movers: heads that attend to the indirect object and write its name, with each claim measured separately."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.cache import ActivationCache
from hooklens.core.errors import InputError, WrongType
from hooklens.core.precision import widened
from hooklens.core.progress_bar import tracked
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import need_tokens
from hooklens.metrics import LogitDiff, answer_ids, logit_diff
from hooklens.model.ids import as_ids
from hooklens.model.linear import packed_linears, without_bias
from hooklens.model.norms import Passage
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.copying import values_of
from hooklens.plugins.heads.head_ranking import PerSequence as PerPair
from hooklens.plugins.heads.mover_result import Criteria, NameMovers, by_group
from hooklens.plugins.heads.which import check_model
from hooklens.plugins.weights.needs import Needs
from hooklens.results.statistics import group_numbers
from hooklens.sweeps.measure import Reader


def find_name_movers(model: HookedTransformer, pairs: PromptPairs, *, criteria: Criteria | None = None) -> NameMovers:
    """Which heads move the indirect object's name to the answer? Three measurements, each of which can say no.

    The metric is the logit difference of the indirect object and the subject at the last position. Direct effects are
    exact, including the final norm: every other component keeps its value of the corrupted run.

    >>> from hooklens.testing import tiny_model
    >>> found = demo(tiny_model())
    >>> found.direct.shape, found.name_movers        # pair layer head
    (torch.Size([8, 2, 2]), [])

    Reference: Wang et al. (2022), "Interpretability in the Wild", sections 3.1 and 3.2 (copy score, path patching).
    """
    check_model(model, "find_name_movers")
    need_tokens(model, "find_name_movers", "hl.path_patch(model, clean, corrupted, metric) reads vectors")
    model.blocks[0].need_sum("a direct effect")
    if not isinstance(pairs, PromptPairs):
        raise WrongType(f"name movers are found on PromptPairs with columns 'io' and 'end', got {pairs!r:.80}")
    first, last = (f"blocks.{layer}.hook_resid_post" for layer in (0, model.cfg.n_layers - 1))
    scales = [name for block in model.blocks for name in block.writes_through("attn").scales]
    with torch.no_grad(), packed_linears(rows=1024):
        clean_tokens, corrupted_tokens = pairs.tokens(model)
        answer = answer_ids(model, pairs.answer).to(model.device)
        io, end = (_positions(pairs, name, clean_tokens) for name in ("io", "end"))
        _, clean = model.run_with_cache(clean_tokens, ["z", "pattern", "hook_embed", first, last, *scales])
        _, corrupted = model.run_with_cache(corrupted_tokens, ["z", last, *scales])
        attention, margin = _attention(model, clean, io, end)
        metric = logit_diff(model, answer=answer, wrong_answer=pairs.wrong_answer, pos=end)
        direct, placebo, gap = _direct(model, clean, corrupted, metric, end)
        rank, written = _ranks(model, clean, answer, io)
    return NameMovers(
        attention=attention,
        margin=margin,
        rank=rank,
        written=written,
        direct=direct,
        placebo=placebo,
        gap=gap,
        name=answer.unique(return_inverse=True)[1],
        group=group_numbers(len(pairs), pairs.group).to(model.device),
        d_vocab=model.cfg.d_vocab_out,
        criteria=criteria or Criteria(),
    )


def _positions(pairs: PromptPairs, name: str, tokens: Int[Tensor, "pair pos"]) -> Int[Tensor, "pair"]:
    """A column of positions, counted from the start of the prompts."""
    what, n_pos = f"the column {name!r} is one position per pair, an integer", tokens.shape[1]
    pos = as_ids(pairs[name], what, tokens.device)
    if pos.shape != tokens.shape[:1] or not -n_pos <= int(pos.min()) <= int(pos.max()) < n_pos:
        raise InputError(f"{what} below {n_pos}, the number of tokens; got {pos.tolist()!r:.60}")
    return pos % n_pos


def _attention(
    model: HookedTransformer, cache: ActivationCache, io: Int[Tensor, "pair"], end: Int[Tensor, "pair"]
) -> tuple[PerPair, PerPair]:
    """The last position's attention to the indirect object, and its margin over any other position but the first."""
    row = torch.arange(len(io), device=io.device)
    layers = range(model.cfg.n_layers)
    seen = widened(torch.stack([cache["pattern", layer][row, :, end] for layer in layers], 1))  # pair layer head key
    to_io = seen[row, :, :, io]
    others = seen.clone()
    others[row, :, :, io] = 0.0
    return to_io, to_io - others[..., 1:].amax(-1)


def _direct(
    model: HookedTransformer,
    clean: ActivationCache,
    corrupted: ActivationCache,
    metric: LogitDiff,
    end: Int[Tensor, "pair"],
) -> tuple[PerPair, PerPair, Float[Tensor, "pair"]]:
    """How the metric of the corrupted run moves when the final norm alone reads a head's clean output; the placebo."""
    row = torch.arange(len(end), device=end.device)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    reader, stream = Reader(model, metric, corrupted[last]), corrupted[last][row, end]
    other = _of_other_names(metric.answer, metric.wrong_answer).to(end.device)
    pair = row.repeat_interleave(model.cfg.n_heads)
    effects: list[Tensor] = []
    for layer in tracked(range(model.cfg.n_layers), "direct effects", "layers"):
        new, old = (_written(model, cache, layer, end) for cache in (clean, corrupted))
        for sent in (new, new[other]):
            moved = (stream[:, None] + sent - old).flatten(0, 1)[:, None]
            values = reader.values_of_rows(moved, pair, torch.zeros_like(pair)).view(len(end), -1)
            effects.append(values - reader.base[:, None])
    direct, placebo = (torch.stack(effects[i::2], 1) for i in (0, 1))
    return direct, placebo, Reader(model, metric, clean[last]).base - reader.base


def _of_other_names(answer: Int[Tensor, "pair"], wrong_answer: Int[Tensor, "pair"]) -> Int[Tensor, "pair"]:
    """For each pair one with neither of its names, drawn at random; where there is none, itself."""
    names = torch.stack((answer.cpu(), wrong_answer.cpu()), 1)
    share = (names[:, None, :, None] == names[None, :, None, :]).flatten(2).any(-1)
    score = torch.rand(share.shape, generator=torch.Generator().manual_seed(0)).masked_fill(share, -1.0)
    return score.argmax(1).where(~share.all(1), torch.arange(len(names)))


def _written(
    model: HookedTransformer, cache: ActivationCache, layer: int, end: Int[Tensor, "pair"]
) -> Float[Tensor, "pair head d_model"]:
    """Each head's output to the stream at the last position."""
    row, block = torch.arange(len(end), device=end.device), model.blocks[layer]
    result = block.attn.results(cache["z", layer][row, end][:, None])[:, 0]
    return block.writes_through("attn").frozen(result, lambda name: cache[name][row, end][:, None])


def _ranks(
    model: HookedTransformer, cache: ActivationCache, answer: Int[Tensor, "pair"], io: Int[Tensor, "pair"]
) -> tuple[Int[Tensor, "name layer head"], Float[Tensor, "name layer head other"]]:
    """A name's rank among all tokens after each head's OV, and the logits of all names; a norm's scale is left out."""
    names, which = answer.unique(return_inverse=True)
    row = torch.arange(len(io), device=names.device)
    ranks, written = [], []
    for layer in tracked(range(model.cfg.n_layers), "what heads copy", "layers"):
        # the first block's heads read the embedding, later ones the output of block 0
        source = "hook_embed" if layer == 0 else "blocks.0.hook_resid_post"
        z = values_of(model, layer, by_group(cache[source][row, io], which))
        block = model.blocks[layer]
        result = block.writes_through("attn").unscaled(block.attn.results(z[:, None])[:, 0])
        logits = widened(_unembedded(model, result))
        written.append(logits[:, :, names])
        own = logits.gather(2, names[:, None, None].expand(-1, logits.shape[1], 1))
        # #larger - #smaller; with #larger + #smaller + #equal = d_vocab this is the middle rank of ties: a head that
        # writes nothing neither copies nor suppresses
        signs = (logits - own).sign_().sum(-1)
        ranks.append((signs.long() + logits.shape[-1] - 1) // 2)
    return torch.stack(ranks, 1), torch.stack(written, 1)


def _unembedded(model: HookedTransformer, x: Float[Tensor, "name head d_model"]) -> Float[Tensor, "name head d_vocab"]:
    """The logits without the final norm's scale and the bias; a forbidden token, of bias -inf, keeps -inf."""
    linear = model.unembed.linear
    logits, bias = without_bias(linear, Passage(model.ln_final).unscaled(x)), getattr(linear, "bias", None)
    return logits if bias is None else logits.masked_fill(bias.isneginf(), -torch.inf)


def demo(model: HookedTransformer) -> NameMovers | Needs:
    """Eight pairs of token numbers in the form "so A and B, B gave to"; needs no tokenizer."""
    wide = min(model.cfg.d_vocab, model.cfg.d_vocab_out) - 4
    if wide < 2 or model.cfg.n_ctx < 7:
        return Needs("6 tokens, two of them names, and 7 positions")
    couples = [(4 + 2 * i % wide, 4 + (2 * i + 1) % wide) for i in range(2)]
    roles = [(a, b, order) for x, y in couples for a, b in ((x, y), (y, x)) for order in ("ABBA", "BABA")]
    firsts = [(a, b) if order == "ABBA" else (b, a) for a, b, order in roles]
    rows = [[[0, p, 1, q, 2, s, 3] for s in (b, a)] for (p, q), (a, b, _) in zip(firsts, roles, strict=True)]
    tokens = torch.tensor(rows, device=model.device)
    first = torch.tensor([order == "ABBA" for *_, order in roles])
    clean, corrupted = tokens.unbind(1)
    pairs = PromptPairs(
        clean,
        corrupted,
        answer=[role[0] for role in roles],
        wrong_answer=[role[1] for role in roles],
        group=torch.arange(2).repeat_interleave(4),
        columns={"io": torch.where(first, 1, 3), "end": torch.full((len(roles),), 6)},
    )
    return find_name_movers(model, pairs)
