"""A softmax head's attention beside a kernel smoother of its keys."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.core.arguments import real
from hooklens.core.component import layer_names
from hooklens.core.errors import InputError, WrongType
from hooklens.data.demo_prompts import demo_texts
from hooklens.model.config import Softmax, VectorEmbed
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.plugins.algorithmic.icl.scored_vectors import Inputs, read_inputs, read_scored_vectors
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table

PerHead = Float[Tensor, "layer head"]
Rows = Float[Tensor, "*head query key"]


@dataclass(frozen=True, eq=False)
class KernelComparison(Result):
    """How far each head's pattern is from kernel weights of its queries and keys: half the sum of |difference| a row.

    0 means equal and 1 disjoint; a mean over queries that see more than one key. `uniform` is the distance from equal
    weights on all keys that are seen. `norm_spread` is the standard deviation of |k|^2 / (2 scale) between the keys of
    an input, in nats: by its exponential, keys are preferred for their norm.
    """

    ranked_by = "distance from the kernel"
    terms = {
        "kernel": "distance from Nadaraya-Watson weights, with a Gaussian kernel of variance scale (sqrt d_head)",
        "with norms": "distance from the same kernel times exp(|k|^2 / (2 scale)); 0 for every softmax head",
        "uniform": "distance from equal weights on the keys that are seen",
        "norm spread": "standard deviation of |k|^2 / (2 scale) over keys, in nats; 0 for keys of equal norm",
    }

    kernel: PerHead
    with_norms: PerHead
    uniform: PerHead
    norm_spread: PerHead

    @property
    def ranking(self) -> Float[Tensor, "row"]:
        """The kernel's distance, a row of the table each."""
        return self.kernel.flatten()

    def table(self, n: int | None = None) -> Table:
        """One row a head."""
        n_layers, n_heads = self.kernel.shape
        names = [f"{layer}H{head}" for layer in layer_names(n_layers) for head in range(n_heads)]
        parts = (self.kernel, self.with_norms, self.uniform, self.norm_spread)
        rows = zip(names, *(part.flatten().tolist() for part in parts), strict=True)
        return Table(("head", "kernel", "with norms", "uniform", "norm spread"), list(rows)).head(n)

    def figure(self) -> Any:
        """The kernel's distance against the spread of the keys' norms."""
        from hooklens.viz.curves import scatter

        heads = [row[0] for row in self.table().rows]
        across, up = "spread of |k|^2 / (2 scale)", "distance from the kernel"
        x, y = self.norm_spread.flatten(), self.kernel.flatten()
        return scatter(x, y, heads, "Attention as a kernel smoother", x_title=across, y_title=up)


def kernel_weights(
    queries: Float[Tensor, "*head query d_head"],
    keys: Float[Tensor, "*head key d_head"],
    variance: float,
    seen: Bool[Tensor, "query key"] | None = None,
) -> Rows:
    """Nadaraya-Watson weights with a Gaussian kernel: exp(-|q - k|^2 / (2 variance)), divided by their sum.

    For keys of equal norm they equal softmax(q k / variance): |q|^2 and |k|^2 cancel in the quotient. Otherwise
    softmax(q k / variance) has the factor exp(|k|^2 / (2 variance)) more at every key.

    >>> keys = torch.tensor([[3.0, 4.0], [5.0, 0.0]])
    >>> query = torch.tensor([[1.0, 2.0]])
    >>> torch.allclose(kernel_weights(query, keys, 2.0), torch.softmax(query @ keys.T / 2.0, -1))
    True

    References: Nadaraya (1964); Watson (1964); Tsai et al. (2019), "Transformer Dissection".
    """
    if real("variance", variance) <= 0:
        raise InputError(f"a kernel has a variance above 0, got {variance}")
    if not all(isinstance(part, Tensor) and part.is_floating_point() for part in (queries, keys)):
        raise WrongType("queries and keys are tensors of real numbers with a point")
    if queries.shape[-1] != keys.shape[-1] or queries.ndim < 2 or keys.ndim < 2:
        shapes = f"{list(queries.shape)} and {list(keys.shape)}"
        raise InputError(f"queries and keys are vectors of one length, [... query d] and [... key d]; got {shapes}")
    # of differences, in float64: |q|^2 + |k|^2 - 2 q k loses the digits of near keys, and float16 ends at 65,504
    distances = torch.cdist(queries.double(), keys.double(), compute_mode="donot_use_mm_for_euclid_dist")
    exponents = -distances.square() / (2 * variance)
    weights = torch.softmax(exponents if seen is None else exponents.masked_fill(~seen, -torch.inf), -1)
    return weights.to(torch.promote_types(queries.dtype, keys.dtype))


def smooth(
    queries: Float[Tensor, "*head query d_head"],
    keys: Float[Tensor, "*head key d_head"],
    values: Float[Tensor, "*head key d_value"],
    variance: float,
) -> Float[Tensor, "*head query d_value"]:
    """The Nadaraya-Watson estimate at each query: the values weighted by the kernel of the keys.

    >>> smooth(torch.zeros(1, 1), torch.tensor([[-1.0], [1.0]]), torch.tensor([[2.0], [4.0]]), 1.0)
    tensor([[3.]])
    """
    weights = kernel_weights(queries, keys, variance)
    if values.ndim < 2 or values.shape[-2] != keys.shape[-2]:
        raise InputError(f"smooth takes a value for each of the {keys.shape[-2]} keys; got {list(values.shape)}")
    return weights.to(values.dtype) @ values


def compare_with_kernel(model: HookedTransformer, tokens: Inputs) -> KernelComparison:
    """How far is each head's softmax attention from a kernel smoother, and is it the keys' norms that separate them?

    >>> from hooklens.testing import tiny_model
    >>> compared = compare_with_kernel(tiny_model(), torch.tensor([[1, 2, 3, 4]]))
    >>> bool((compared.with_norms < 1e-5).all()), compared.kernel.shape
    (True, torch.Size([2, 2]))

    Reference: as for `kernel_weights`; von Oswald et al. (2023), appendix A.8, on attention as kernel smoothing.
    """
    need_hooked(model, "a comparison with a kernel")
    if problem := _unlike_softmax(model):
        raise InputError(f"kernel weights are compared with softmax(q k / scale); this model has {problem}")
    tokens = read_inputs(model, tokens)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names=["pattern"])
    rows = []
    for layer, vectors in enumerate(read_scored_vectors(model, tokens, range(model.cfg.n_layers))):
        attn: Any = model.blocks[layer].attn
        q, k = (part.double() for part in vectors)  # so that distances are not those of rounding
        pattern = cache["pattern", layer].double()
        positions = torch.arange(pattern.shape[-1], device=pattern.device)
        seen = attn.mask.allows(positions[:, None], positions[None])
        rows.append(_distances(pattern, q, k, attn.scale, seen))
    per_head = torch.stack(rows).to(torch.promote_types(model.dtype, torch.float32))
    kernel, with_norms, uniform, norm_spread = per_head.unbind(1)
    return KernelComparison(kernel, with_norms, uniform, norm_spread)


def _distances(
    pattern: Float[Tensor, "batch head query key"],
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch head key d_head"],
    scale: float,
    seen: Bool[Tensor, "query key"],
) -> Float[Tensor, "measure head"]:
    """Distances of the pattern from the kernel, from the kernel with norms, from uniform; the spread of the norms."""
    kernel = kernel_weights(q, k, scale, seen)
    preference = k.square().sum(-1) / (2 * scale)
    lifted = kernel * (preference - preference.amax(-1, keepdim=True)).exp()[..., None, :]
    lifted = lifted / lifted.sum(-1, keepdim=True)
    equal = seen.to(pattern) / seen.sum(-1, keepdim=True)
    several = seen.sum(-1) > 1
    several = several if bool(several.any()) else torch.ones_like(several)
    away = [(pattern - other).abs().sum(-1)[..., several].mean((0, 2)) / 2 for other in (kernel, lifted, equal)]
    return torch.stack([*away, preference.std(-1, correction=0).mean(0)])


def _unlike_softmax(model: HookedTransformer) -> str:
    score = model.cfg.score_fn
    if not isinstance(score, Softmax):
        return f"the score function {score.name!r}"
    return "" if score.soft_cap is None else "a soft cap on its scores"


def demo(model: HookedTransformer) -> KernelComparison | Needs:
    """Two random inputs of up to 8 positions."""
    if problem := _unlike_softmax(model):
        return Needs(f"softmax attention (there: {problem})")
    n = min(8, model.cfg.n_ctx)
    if isinstance(model.cfg.embed, VectorEmbed):
        drawn = torch.randn(2, n, model.cfg.embed.d_in, generator=torch.Generator().manual_seed(0))
        return compare_with_kernel(model, drawn.to(model.device, model.dtype))
    return compare_with_kernel(model, demo_texts(model, 2, n))
