"""Prompts for the demos of methods: sentences, token numbers for models that cannot read these, or vectors."""

from collections import Counter

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import HooklensError
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.data.prompts import reads_vectors
from hooklens.metrics import AtPosition, log_prob, prediction
from hooklens.model.transformer import HookedTransformer

_COUNTRIES = "France Italy Germany Spain Japan Russia England Egypt Austria Greece Ireland Cuba"
_CITIES = "Paris Rome Berlin Madrid Tokyo Moscow London Cairo Vienna Athens Dublin Havana"
_CAPITALS = dict(zip(_COUNTRIES.split(), _CITIES.split(), strict=True))


def demo_pairs(model: HookedTransformer, n: int = 1, n_pos: int = 6) -> PromptPairs:
    """`n` pairs such as "The capital of France is" and "The capital of Italy is", or pairs of `n_pos` token numbers.

    Models that read vectors get random ones, with the prediction as metric.
    Prompts and answers are token ids. The answers to token numbers are the two tokens whose logits differ most between
    the clean and corrupted prompts.

    >>> from hooklens.testing import tiny_model
    >>> pairs = demo_pairs(tiny_model(), 1, 4)
    >>> pairs.clean.tolist(), pairs.corrupted.tolist(), pairs.answer, pairs.wrong_answer
    ([[1, 2, 3, 4]], [[1, 2, 5, 4]], [2], [3])
    """
    if reads_vectors(model):
        clean, drawn = random_vectors(model, 2 * n, n_pos).chunk(2)
        changed = torch.arange(clean.shape[1], device=clean.device) == clean.shape[1] // 2
        return PromptPairs(clean, torch.where(changed[:, None], drawn, clean), prediction(model))
    rows, answers = _sentences(model, n)
    if rows is not None:
        return PromptPairs(rows[:n], rows[1:], answer=answers[:n], wrong_answer=answers[1:])
    n_pos, d_vocab, row = min(n_pos, model.cfg.n_ctx), model.cfg.d_vocab, torch.arange(n, device=model.device)[:, None]
    clean = (torch.arange(n_pos, device=model.device) + 3 * row + 1) % d_vocab
    corrupted = clean.clone()
    corrupted[:, n_pos // 2] = (clean[:, n_pos // 2] + min(2, d_vocab - 1)) % d_vocab
    with torch.no_grad():
        gap = model(clean, logits_at=-1)[:, 0].mean(0) - model(corrupted, logits_at=-1)[:, 0].mean(0)
    order = gap[: min(d_vocab, model.cfg.d_vocab_out)].argsort(descending=True, stable=True)
    return PromptPairs(clean, corrupted, answer=int(order[0]), wrong_answer=int(order[-1]))


def demo_texts(model: HookedTransformer, n: int, n_pos: int) -> Shaped[Tensor, "text pos *d_in"]:
    """`n` short sentences of one length, or rows of `n_pos` random token numbers or vectors.

    >>> from hooklens.testing import tiny_model
    >>> demo_texts(tiny_model(), 3, 4).shape
    torch.Size([3, 4])
    """
    if reads_vectors(model):
        return random_vectors(model, n, n_pos)
    rows, _ = _sentences(model, n - 1)
    if rows is not None:
        return rows
    shape = (n, min(n_pos, model.cfg.n_ctx))
    return torch.randint(model.cfg.d_vocab, shape, generator=torch.Generator().manual_seed(0)).to(model.device)


def demo_metric(model: HookedTransformer) -> AtPosition:
    """The log-probability of token 0, or the prediction of a model that reads vectors."""
    return prediction(model) if reads_vectors(model) else log_prob(model, answer=0)


def random_vectors(model: HookedTransformer, n: int, n_pos: int, *, seed: int = 0) -> Float[Tensor, "text pos d_in"]:
    """`n` prompts of standard normal vectors for a model that reads vectors."""
    shape = (n, min(n_pos, model.cfg.n_ctx), model.cfg.embed.d_in)
    return torch.randn(shape, generator=seeded(seed)).to(model.device, model.dtype)


def _sentences(model: HookedTransformer, n: int) -> tuple[Int[Tensor, "text pos"] | None, list[int]]:
    """`n` + 1 sentences, neighbours different, with their answers; None if the model cannot read them."""
    if model.tokenizer is None:
        return None, []
    rows, answers = [], []
    try:
        for country, capital in _CAPITALS.items():
            answers.append(model.to_single_token(f" {capital}"))
            rows.append(model.to_tokens(f"The capital of {country} is")[0])
    except HooklensError:  # a capital of several tokens, or a text that this tokenizer cannot read
        return None, []
    length = Counter(map(len, rows)).most_common(1)[0][0]
    usable = [i for i, row in enumerate(rows) if len(row) == length]
    chosen = [usable[i % len(usable)] for i in range(n + 1)]
    largest = max(int(rows[i].max()) for i in chosen)
    fits = length <= model.cfg.n_ctx and largest < model.cfg.d_vocab and max(answers) < model.cfg.d_vocab_out
    if not fits or len(usable) < 2 or len(set(answers)) < len(answers):
        return None, []
    return torch.stack([rows[i] for i in chosen]), [answers[i] for i in chosen]
