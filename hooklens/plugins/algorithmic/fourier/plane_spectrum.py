"""The two-dimensional Fourier transform of neurons or logits over the table of pairs."""

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import layer_number
from hooklens.core.errors import did_you_mean
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.fourier.basis import component_names, transform_2d
from hooklens.plugins.algorithmic.fourier.demo_task import demo_modulus
from hooklens.plugins.algorithmic.fourier.pair_table import PairTable, Task, as_table, need_neurons
from hooklens.plugins.weights.matrices import read_mlp
from hooklens.plugins.weights.needs import Needs
from hooklens.results.result import Result, Table


@dataclass(frozen=True, eq=False)
class PlaneSpectrum(Result):
    """The norm, over neurons or answers, of each product of a component of a and one of b, after centring.

    Rows and columns are the components of `fourier_basis`: the constant, cos 1, sin 1, ... A circuit of the sum has
    pairs of equal norms at (cos k, cos k), (sin k, sin k) and at (cos k, sin k), (sin k, cos k).
    """

    ranked_by = "norm"
    terms = {"share": "share of the variance over all pairs"}

    norms: Float[Tensor, "component_a component_b"]
    site: str

    @property
    def shares(self) -> Float[Tensor, "component_a component_b"]:
        """The share of the variance over all pairs in each product."""
        squares = self.norms.square()
        return squares / squares.sum()

    def table(self, n: int | None = 12) -> Table:
        """The products with the largest norms."""
        names, p = component_names(len(self.norms)), len(self.norms)
        shares, rows = self.shares, []
        for i in self.norms.flatten().argsort(descending=True, stable=True).tolist():
            at = divmod(i, p)
            rows.append((names[at[0]], names[at[1]], float(self.norms[at]), float(shares[at])))
        return Table(("of a", "of b", "norm", "share"), rows).head(n)

    def figure(self) -> Any:
        """The norm of every product."""
        from hooklens.viz.figures import heatmap

        names, title = component_names(len(self.norms)), f"2-D Fourier components of the {_SITES[self.site]}"
        of = "component"
        if len(names) > _NAMED:  # of very many labels every second is shown: all cosines would be missing
            names, of = [name.removeprefix("cos ").removeprefix("sin ") for name in names], "frequency (cosine, sine)"
        return heatmap(
            self.norms,
            x=names,
            y=names,
            title=title,
            x_title=f"{of} of b",
            y_title=f"{of} of a",
            colourbar="norm",
            diverging=False,
        )


_NAMED = 40  # components that are all named
_SITES = {"post": "neurons", "logits": "logits"}


def measure_plane_spectrum(
    model: HookedTransformer | PairTable,
    data: Task | None = None,
    *,
    site: Literal["post", "logits"] = "post",
    layer: int = -1,
) -> PlaneSpectrum:
    """Which products of a wave in a and a wave in b are the neurons, or the logits, made of?

    >>> from hooklens.plugins.algorithmic.fourier.logit_formula import formula_logits
    >>> from hooklens.plugins.algorithmic.fourier.pair_table import tabulate
    >>> spectrum = measure_plane_spectrum(tabulate(formula_logits(5, {2: 1.0})), site="logits")
    >>> [row[:2] for row in spectrum.table(2).rows], round(spectrum.table(1).rows[0][-1], 6)
    ([('cos 2', 'cos 2'), ('cos 2', 'sin 2')], 0.25)

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", figure 4.
    """
    if site not in _SITES:
        raise did_you_mean("site for a spectrum", site, _SITES)
    layer_number("layer", layer)
    if isinstance(model, HookedTransformer) and not model.cfg.attn_only:
        read_mlp(model, layer)  # also refused where the logits do not need it
    table = as_table(model, data, layer=layer if site == "post" else None)
    values = need_neurons(table) if site == "post" else table.logits
    return PlaneSpectrum(transform_2d(values - values.mean((0, 1))).norm(dim=-1), site)


def demo(model: HookedTransformer) -> PlaneSpectrum | Needs:
    """The logits of all pairs of the model's tokens."""
    p = demo_modulus(model)
    return p if isinstance(p, Needs) else measure_plane_spectrum(model, p, site="logits")
