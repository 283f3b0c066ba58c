"""A tuned lens in closed form: regress the final stream on each layer's stream, without unembedding."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.progress_bar import progress
from hooklens.model.linear import packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.lens.reading import prompts_at_once, streams_of
from hooklens.plugins.lens.translators import TunedLens

_RIDGE = 0.01  # share of each feature's own variance: few windows leave some directions undetermined


def stream_sizes(streams: Float[Tensor, "layer row d_model"]) -> Float[Tensor, "layer"]:
    """The typical size of a coordinate of each layer's stream; the median, as single tokens can be 100 times larger."""
    return streams.square().mean(-1).sqrt().median(-1).values.clamp_min(1e-6)


def regressed(model: HookedTransformer, tokens: Int[Tensor, "window pos"]) -> TunedLens:
    """The maps x -> x + x A + b closest to the final stream, with tokens weighted by the final norm's scale."""
    n, d = model.cfg.n_layers, model.cfg.d_model
    gram = torch.zeros(n, d + 1, d + 1, dtype=torch.float64, device=tokens.device)
    cross = gram.new_zeros(n, d + 1, d)
    size: Tensor | None = None
    with packed_linears(rows=1024), progress("tuned lens by least squares", tokens.numel(), unit="tokens") as advance:
        for some in prompts_at_once(model, tokens):
            for window in some.split(max(1, 2048 // some.shape[1])):
                streams = streams_of(model, window).flatten(1, 2)
                size = stream_sizes(streams[:-1].double()) if size is None else size
                _add(gram, cross, streams, size)
                advance(window.numel())
    gram.diagonal(dim1=1, dim2=2).mul_(1 + _RIDGE).add_(1e-12)  # avoids division by 0 for a coordinate that is always 0
    # by Cholesky, as the matrix is positive definite; batched LU on two threads also fails in torch's MKL (docs/log.md)
    maps = torch.cholesky_solve(cross, torch.linalg.cholesky(gram))
    wide = torch.promote_types(model.dtype, torch.float32)
    assert size is not None
    return TunedLens.of(maps[:, :-1].to(wide), (maps[:, -1] * size[:, None]).to(wide))


def _add(
    gram: Float[Tensor, "layer in in"],
    cross: Float[Tensor, "layer in d_model"],
    streams: Float[Tensor, "layer+1 row d_model"],
    size: Float[Tensor, "layer"],
) -> None:
    """Add these rows to the normal equations of every layer."""
    final = streams[-1].double()
    weight = 1 / final.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    for layer, stream in enumerate(streams[:-1]):
        x = stream.double()
        features = torch.cat([x, size[layer].expand(len(x), 1)], 1) * weight
        gram[layer] += features.T @ features
        cross[layer] += features.T @ ((final - x) * weight)
