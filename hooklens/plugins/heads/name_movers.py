"""Name movers: heads that attend to the indirect object and write its name, with each claim measured separately."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.errors import InputError
from hooklens.core.precision import widened
from hooklens.core.progress_bar import tracked
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.metrics import LogitDiff, answer_ids, logit_diff
from hooklens.model.linear import packed_linears
from hooklens.model.norms import Passage
from hooklens.plugins.heads.mover_result import Criteria, NameMovers, by_group
from hooklens.results.statistics import group_numbers
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.naive import drops_out

if TYPE_CHECKING:
    from hooklens.core.cache import ActivationCache
    from hooklens.model.transformer import HookedTransformer


def find_name_movers(model: "HookedTransformer", pairs: PromptPairs, *, criteria: Criteria | None = None) -> NameMovers:
    """Which heads move the indirect object's name to the answer? Three measurements, each of which can say no.

    The metric is the logit difference of the indirect object and the subject at the last position. Direct effects are
    exact, including the final norm: every other component keeps its value of the corrupted run.

    >>> from hooklens.testing import tiny_model
    >>> found = demo(tiny_model())
    >>> found.direct.shape, found.name_movers        # pair layer head
    (torch.Size([8, 2, 2]), [])

    Reference: Wang et al. (2022), "Interpretability in the Wild", sections 3.1 and 3.2 (copy score, path patching).
    """
    model.blocks[0].need_sum("a direct effect")
    if drops_out(model):
        raise InputError("this compares two runs, and with dropout they would differ by its masks; call model.eval()")
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    first = "blocks.0.hook_resid_post"
    with torch.no_grad(), packed_linears(rows=1024):
        clean_tokens, corrupted_tokens = pairs.tokens(model)
        answer = answer_ids(model, pairs.answer).to(model.device)
        io, end = (pairs[name].to(model.device) for name in ("io", "end"))
        _, clean = model.run_with_cache(clean_tokens, ["z", "pattern", "hook_embed", first, last, *_post_scales(model)])
        _, corrupted = model.run_with_cache(corrupted_tokens, ["z", last, *_post_scales(model)])
        attention, margin = _attention(model, clean, io, end)
        metric = logit_diff(model, answer=answer, wrong_answer=pairs.wrong_answer, pos=end)
        direct, placebo, gap = _direct(model, clean, corrupted, metric, end)
        rank, written = _ranks(model, clean, answer, io)
    name = answer.unique(return_inverse=True)[1]
    return NameMovers(
        attention=attention,
        margin=margin,
        rank=rank,
        written=written,
        direct=direct,
        placebo=placebo,
        gap=gap,
        name=name,
        group=group_numbers(len(pairs), pairs.group).to(model.device),
        d_vocab=model.cfg.d_vocab_out,
        criteria=criteria or Criteria(),
    )


def _post_scales(model: "HookedTransformer") -> list[str]:
    """Scales of norms through which heads reach the stream, which are held."""
    return [name for block in model.blocks for name in block.writes_through("attn").scales]


def _attention(
    model: "HookedTransformer", cache: "ActivationCache", io: Int[Tensor, "pair"], end: Int[Tensor, "pair"]
) -> tuple[Float[Tensor, "pair layer head"], Float[Tensor, "pair layer head"]]:
    row = torch.arange(len(io), device=io.device)
    layers = range(model.cfg.n_layers)
    seen = widened(torch.stack([cache["pattern", layer][row, :, end] for layer in layers], 1))  # pair layer head key
    to_io = seen[row, :, :, io]
    others = seen.clone()
    others[row, :, :, io] = 0.0
    return to_io, to_io - others[..., 1:].amax(-1)


def _direct(
    model: "HookedTransformer",
    clean: "ActivationCache",
    corrupted: "ActivationCache",
    metric: LogitDiff,
    end: Int[Tensor, "pair"],
) -> tuple[Float[Tensor, "pair layer head"], Float[Tensor, "pair layer head"], Float[Tensor, "pair"]]:
    """How the metric of the corrupted run moves when the final norm alone reads a head's clean output; the placebo."""
    row = torch.arange(len(end), device=end.device)
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    reader = Reader(model, metric, corrupted[name])
    other = _of_other_names(metric.answer, metric.wrong_answer).to(end.device)
    stream = corrupted[name][row, end]
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    which = row.repeat_interleave(model.cfg.n_heads)
    for layer in tracked(range(model.cfg.n_layers), "direct effects", "layers"):
        new, old = (_written(model, cache, layer, end) for cache in (clean, corrupted))
        for each, sent in zip(found, (new, new[other]), strict=True):
            moved = (stream[:, None] + sent - old).flatten(0, 1)[:, None]
            values = reader.values_of_rows(moved, which, torch.zeros_like(which)).view(len(end), -1)
            each.append(values - reader.base[:, None])
    direct, placebo = (torch.stack(each, 1) for each in found)
    return direct, placebo, Reader(model, metric, clean[name]).base - reader.base


def _of_other_names(answer: Int[Tensor, "pair"], wrong_answer: Int[Tensor, "pair"]) -> Int[Tensor, "pair"]:
    """For each pair one with neither of its names, drawn at random; where there is none, itself."""
    names = torch.stack((answer.cpu(), wrong_answer.cpu()), 1)
    share = (names[:, None, :, None] == names[None, :, None, :]).flatten(2).any(-1)
    score = torch.rand(share.shape, generator=torch.Generator().manual_seed(0)).masked_fill(share, -1.0)
    own = score.argmax(1).where(~share.all(1), torch.arange(len(names)))
    return own


def _written(
    model: "HookedTransformer", cache: "ActivationCache", layer: int, end: Int[Tensor, "pair"]
) -> Float[Tensor, "pair head d_model"]:
    """Each head's output to the stream at the last position."""
    row, block = torch.arange(len(end), device=end.device), model.blocks[layer]
    result = block.attn.results(cache["z", layer][row, end][:, None])[:, 0]
    return block.writes_through("attn").frozen(result, lambda name: cache[name][row, end][:, None])


def _ranks(
    model: "HookedTransformer", cache: "ActivationCache", answer: Int[Tensor, "pair"], io: Int[Tensor, "pair"]
) -> tuple[Int[Tensor, "name layer head"], Float[Tensor, "name layer head other"]]:
    """A name's place among all tokens after each head's OV, and the logits of all names; a norm's scale is left out."""
    names, which = answer.unique(return_inverse=True)
    row = torch.arange(len(io), device=names.device)
    places, written = [], []
    for layer in tracked(range(model.cfg.n_layers), "what heads copy", "layers"):
        # the first block's heads read the embedding, later ones the output of block 0
        source = "hook_embed" if layer == 0 else "blocks.0.hook_resid_post"
        name = by_group(cache[source][row, io], which)
        logits = widened(_unembedded(model, _through_ov(model, layer, name)))
        written.append(logits[:, :, names])
        own = logits.gather(2, names[:, None, None].expand(-1, logits.shape[1], 1))
        # #larger - #smaller; with #larger + #smaller + #equal = d_vocab this is the middle rank of ties: a head that
        # writes nothing neither copies nor suppresses
        signs = (logits - own).sign_().sum(-1)
        places.append((signs.long() + logits.shape[-1] - 1) // 2)
    return torch.stack(places, 1), torch.stack(written, 1)


def _through_ov(
    model: "HookedTransformer", layer: int, x: Float[Tensor, "name d_model"]
) -> Float[Tensor, "name head d_model"]:
    """Each head's output when it attends to x only, without biases."""
    block, attn = model.blocks[layer], model.blocks[layer].attn
    normed = block.before_attn(x)
    v = attn.heads(attn.v, normed[:, None], None) - attn.heads(attn.v, torch.zeros_like(normed)[:, None], None)
    z = v.repeat_interleave(attn.n_heads // attn.n_kv_heads, 2)  # heads of a group share their values
    return block.writes_through("attn").unscaled(attn.results(z)[:, 0])


def _unembedded(
    model: "HookedTransformer", x: Float[Tensor, "name head d_model"]
) -> Float[Tensor, "name head d_vocab"]:
    x = Passage(model.ln_final).unscaled(x)
    linear = model.unembed.linear
    if linear.bias is None:
        return linear(x)
    return linear(x) - linear.bias.masked_fill(linear.bias.isneginf(), 0.0)  # -inf, a forbidden token, stays -inf


def demo(model: "HookedTransformer") -> NameMovers:
    """Eight pairs of token numbers in the form "so A and B, B gave to"; works on any model, without a tokenizer."""
    wide = max(model.cfg.d_vocab - 4, 1)
    couples = [(4 + 2 * i % wide, 4 + (2 * i + 1) % wide) for i in range(2)]
    roles = [(a, b, order) for x, y in couples for a, b in ((x, y), (y, x)) for order in ("ABBA", "BABA")]
    firsts = [(a, b) if order == "ABBA" else (b, a) for a, b, order in roles]
    rows = [[[0, p, 1, q, 2, s, 3] for s in (b, a)] for (p, q), (a, b, _) in zip(firsts, roles, strict=True)]
    tokens = torch.tensor(rows, device=model.device).clamp_max(model.cfg.d_vocab - 1)[..., : model.cfg.n_ctx]
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
