"""A model on the whole table of pairs (a, b) at once: its logits, its neurons, and which pairs it was trained on."""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import layer_number, whole
from hooklens.core.errors import InputError, WrongType
from hooklens.data.modular import Modular
from hooklens.model.config import TokenEmbed
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.plugins.algorithmic.fourier.basis import need_finite, need_pairs, sums
from hooklens.results.result import Result
from hooklens.results.result import Table as ResultTable

_BATCH = 2048  # pairs that run together
_COMPARED = 16  # pairs on which a table is compared with the model that it is said to be of
_SAME = 1e-3  # of the largest logit: far above the differences between batches of other sizes
#: The task that a model was trained on: `hl.data.modular_arithmetic(...)`, or p where the training pairs do not matter.
Task = Modular | int | np.integer


@dataclass(frozen=True, eq=False)
class PairTable(Result):
    """Logits of the p answers to every pair, activations of one layer's neurons at the last position, training pairs.

    Losses are in nats, accuracies shares from 0 to 1. Without known training pairs `trained` is None and their measures
    are NaN. A model that always answers with equal probabilities has the loss `chance`, ln p.
    """

    baselines = ("loss", "chance")

    logits: Float[Tensor, "a b answer"]
    post: Float[Tensor, "a b neuron"] | None
    trained: Bool[Tensor, "a b"] | None

    @property
    def modulus(self) -> int:
        """The modulus."""
        return len(self.logits)

    @property
    def answers(self) -> Int[Tensor, "a b"]:
        """(a + b) mod p."""
        return sums(self.modulus)

    @property
    def losses(self) -> Float[Tensor, "a b"]:
        """The cross-entropy of each pair over the p answers."""
        return cross_entropy(self.logits)

    @property
    def correct(self) -> Bool[Tensor, "a b"]:
        """Whether the right answer has the largest logit."""
        return self.logits.argmax(-1) == self.answers

    @property
    def loss(self) -> float:
        """The mean over all pairs."""
        return float(self.losses.mean())

    @property
    def chance(self) -> float:
        """ln p."""
        return math.log(self.modulus)

    @property
    def accuracy(self) -> float:
        """The share of all pairs that are answered correctly."""
        return float(self.correct.double().mean())

    @property
    def held_out(self) -> Bool[Tensor, "a b"] | None:
        """The pairs that were not trained."""
        return None if self.trained is None else ~self.trained

    def mean_over(self, values: Float[Tensor, "a b"] | Bool[Tensor, "a b"], pairs: Bool[Tensor, "a b"] | None) -> float:
        """The mean over some pairs; NaN if they are unknown or there are none."""
        return math.nan if pairs is None else float(values[pairs].double().mean())

    def table(self, n: int | None = None) -> ResultTable:
        """Loss and accuracy on all pairs, on those of training, and on those held out."""
        every = torch.ones_like(self.correct)
        rows = []
        for name, pairs in (("all", every), ("trained", self.trained), ("held out", self.held_out)):
            if pairs is not None:
                measures = (self.mean_over(values, pairs) for values in (self.losses, self.correct))
                rows.append((name, int(pairs.sum()), *measures))
        return ResultTable(("pairs", "n", "loss", "accuracy"), rows).head(n)

    def figure(self) -> Any:
        """The log-probability of the right answer to every pair."""
        from hooklens.viz.figures import heatmap

        title = f"Log-probability of (a + b) mod {self.modulus}"
        return heatmap(-self.losses, title=title, x_title="b", y_title="a", colourbar="nats", diverging=False)


def cross_entropy(logits: Float[Tensor, "a b answer"]) -> Float[Tensor, "a b"]:
    """The cross-entropy of (a + b) mod p for every pair, in nats and float64.

    >>> round(cross_entropy(torch.zeros(5, 5, 5))[1, 3].item(), 6) == round(math.log(5), 6)
    True
    """
    p = need_logits(logits)
    answers = sums(p).to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), answers.flatten(), reduction="none")
    return losses.view(p, p)


def need_logits(logits: Any) -> int:
    """Return p of the logits of all pairs; anything except a tensor p x p x p of finite numbers is refused.

    >>> need_logits(torch.zeros(5, 5, 6))
    Traceback (most recent call last):
    ...
    hooklens.core.errors.InputError: the logits of all pairs are a tensor [a b answer] with p entries along each axis...
    """
    if isinstance(logits, PairTable):
        raise WrongType("this reads the logits of all pairs, and got a table of pairs; give its .logits")
    square = isinstance(logits, Tensor) and logits.ndim == 3 and len(set(logits.shape)) == 1 and len(logits) >= 2
    if not square or not logits.is_floating_point():
        seen = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"the logits of all pairs are a tensor [a b answer] with p entries along each axis, got {seen}; reshape "
            "those of a list of pairs by (p, p, -1) and drop the columns that are no answers, such as '='"
        )
    need_finite("logits", logits)
    return len(logits)


def need_trained(trained: Any, p: int) -> None:
    """Raise unless this says of every pair whether it was trained on."""
    if not isinstance(trained, Tensor) or trained.dtype != torch.bool or tuple(trained.shape) != (p, p):
        seen = f"{trained.dtype} {list(trained.shape)}" if isinstance(trained, Tensor) else f"{trained!r:.60}"
        raise InputError(
            f"trained says of every pair whether it was trained, a boolean tensor [a b] for p = {p}; got {seen}"
        )


def tabulate(
    logits: Float[Tensor, "a b answer"],
    *,
    post: Float[Tensor, "a b neuron"] | None = None,
    trained: Bool[Tensor, "a b"] | None = None,
) -> PairTable:
    """The table of any model, from its logits: what every method here takes in place of a model.

    >>> logits = torch.nn.functional.one_hot(sums(5), 5).double()        # always right
    >>> tabulate(9 * logits).accuracy
    1.0
    """
    p = need_logits(logits)
    if post is not None and need_pairs("post", post, "[a b neuron]") != p:
        raise InputError(f"post is a tensor [a b neuron] for the same p = {p} as the logits, got {list(post.shape)}")
    if post is not None:
        need_finite("activations", post)
    if trained is not None:
        need_trained(trained, p)
    # Copies: the caller's tensors may change later.
    return PairTable(
        logits=logits.detach().to("cpu", torch.float64, copy=True),
        post=None if post is None else post.detach().to("cpu", torch.float64, copy=True),
        trained=None if trained is None else trained.to("cpu", copy=True),
    )


def run_pairs(model: HookedTransformer, data: Task, *, layer: int | None = -1) -> PairTable:
    """Run a model on every pair, and keep what it says at the last position, in float64.

    >>> from hooklens.data.modular import modular_arithmetic
    >>> from hooklens.testing import tiny_model
    >>> table = run_pairs(tiny_model(d_vocab=6), modular_arithmetic(p=5, fraction=0.8))
    >>> table.logits.shape, table.post.shape, int(table.trained.sum())
    (torch.Size([5, 5, 5]), torch.Size([5, 5, 32]), 20)

    Prompts are "a b =" for a model with p + 1 tokens, "a b" for one with p tokens or a context of two. Only the logits
    of the p numbers are kept, as in the authors' code: that of "=" is dropped. `layer` is that of the neurons, None
    for none.

    Reference: Nanda et al. (2023), "Progress measures for grokking via mechanistic interpretability", section 4.
    """
    p, layer = modulus_of(data), layer_number("layer", layer)
    prompts = pair_prompts(model, p)
    activations: list[Tensor] | None = None if layer is None or model.cfg.attn_only else []
    where = ("post", -1 if layer is None else layer)
    logits = run_prompts(model, prompts, keep=None if activations is None else (where, activations))
    trained = None
    if isinstance(data, Modular):
        trained = torch.zeros(p, p, dtype=torch.bool)
        trained[tuple(data.pairs[0].T)] = True
    post = None if activations is None else torch.cat(activations).unflatten(0, (p, p))
    return tabulate(logits[:, :p].view(p, p, p), post=post, trained=trained)


def run_prompts(
    model: HookedTransformer,
    prompts: Int[Tensor, "pair pos"],
    *,
    keep: tuple[Any, list[Tensor]] | None = None,
    write: tuple[Any, Float[Tensor, "pair width"]] | None = None,
) -> Float[Tensor, "pair d_vocab"]:
    """The logits at the last position, in float64. `keep` appends what is at a point there to a list, in batches;
    `write` replaces it by a value for each prompt."""
    logits = []
    with torch.no_grad():
        for start in range(0, len(prompts), _BATCH):
            part = prompts[start : start + _BATCH]
            hooks = [] if keep is None else [(keep[0], _keep_last(keep[1]))]
            hooks += [] if write is None else [(write[0], _write_last(write[1][start : start + _BATCH]))]
            with model.hooks(fwd_hooks=hooks):
                logits.append(model(part.to(model.device), logits_at=-1)[:, -1].detach().cpu().double())
    joined = torch.cat(logits)
    need_finite("logits", joined)
    return joined


def as_table(model: HookedTransformer | PairTable, data: Task | None, *, layer: int | None = -1) -> PairTable:
    """The table that was given, or that of the model."""
    if isinstance(model, Tensor):
        raise WrongType("this takes a model and its task, or a table; give logits of all pairs as tabulate(logits)")
    if isinstance(model, PairTable):
        if data is not None and modulus_of(data) != model.modulus:
            raise InputError(
                f"the table is one of p = {model.modulus}, and data of p = {modulus_of(data)}; leave data out"
            )
        return model
    if data is None:
        raise InputError("a model needs its task: data=hl.data.modular_arithmetic(...), or its p")
    return run_pairs(model, data, layer=layer)


def own_table(
    model: HookedTransformer | PairTable, data: Task | None, table: PairTable | None, *, layer: int
) -> PairTable:
    """The table of the model: one that was made before, after a look at a few pairs, or a new one."""
    if table is not None and isinstance(model, PairTable):
        raise InputError("a table takes the place of the model, so that table= would have no effect; give one of them")
    if table is None or isinstance(model, PairTable):
        return as_table(model, data, layer=layer)
    layer_number("layer", layer)
    p = as_table(table, data).modulus
    some = torch.arange(0, p**2, -(-(p**2) // _COMPARED))
    activations = list[Tensor]()
    seen = run_prompts(
        model, pair_prompts(model, p)[some], keep=None if table.post is None else (("post", layer), activations)
    )
    compared = [("logits", table.logits, seen[:, :p])]
    if table.post is not None:
        compared.append((f"neurons of layer {layer}", table.post, torch.cat(activations).double()))
    for name, values, own in compared:
        kept = values.flatten(0, 1)[some]
        if kept.shape != own.shape or bool((own - kept).abs().max() > _SAME * kept.abs().max()):
            raise InputError(f"the table is not that of this model: the {name} differ; leave it out, or make it again")
    return table


def need_neurons(table: PairTable) -> Float[Tensor, "a b neuron"]:
    """The activations, refused if there are none."""
    if table.post is None:
        raise InputError("there are no neurons to analyse: the model has no MLP, or the table was made without post")
    return table.post


def modulus_of(data: Task) -> int:
    """p of a task; refused if it is not addition."""
    if isinstance(data, Modular) and data.operation != "+":
        raise InputError(
            f"the Fourier analysis here is that of a + b, and this task is a {data.operation} b; train with "
            "operation='+', or rename b (a - b is a + b with -b for b)"
        )
    if isinstance(data, Modular) and data.shuffled:
        raise InputError(
            "the Fourier analysis here is that of a + b, and the answers of this control are shuffled, so that there "
            f"is no such circuit to find; in Python its weights and logits can be read with p = {data.p} in place of "
            "the data"
        )
    if not isinstance(data, Modular) and (isinstance(data, bool) or not isinstance(data, Integral)):
        hint = "; frequencies are a keyword here, frequencies=[...]" if isinstance(data, list | tuple) else ""
        raise WrongType(f"data is hl.data.modular_arithmetic(...) or p, got {data!r:.60}{hint}")
    return whole("p", data.p if isinstance(data, Modular) else data, 2)


def need_model(model: Any, p: int) -> HookedTransformer:
    """The model, refused unless it can have been trained on addition modulo p."""
    if isinstance(model, Tensor | PairTable):
        raise WrongType("this reads weights or runs the model, so that it needs the model itself and its task")
    need_hooked(model, "the Fourier analysis")
    cfg = model.cfg
    if not isinstance(cfg.embed, TokenEmbed):
        raise InputError("this model reads vectors, not numbers; give the logits of your pairs to tabulate(logits)")
    if cfg.d_vocab not in (p, p + 1):
        raise InputError(
            f"addition modulo {p} has the tokens 0 to {p - 1} and perhaps '=', and this model has d_vocab "
            f"{cfg.d_vocab}: it was trained on another p, on {cfg.d_vocab - 1}, or {cfg.d_vocab} if it has no '='"
        )
    if cfg.d_vocab == p and cfg.n_ctx == 3:  # as of "a b =", whose last token is no number
        raise InputError(
            f"this model has d_vocab {p} and n_ctx 3, as models on 'a b =' modulo {p - 1} have: give p = {p - 1}. A "
            f"model on pairs 'a b' modulo {p} has n_ctx 2; of another one, give the logits of all pairs"
        )
    if cfg.d_vocab_out < p:
        raise InputError(
            f"addition modulo {p} has {p} answers, and this model has {cfg.d_vocab_out} outputs (d_vocab_out)"
        )
    if cfg.n_ctx < 2:
        raise InputError(f"a pair is two tokens, and this model has n_ctx {cfg.n_ctx}")
    return model


def pair_prompts(model: HookedTransformer, p: int) -> Int[Tensor, "pair pos"]:
    """The prompt of every pair, "a b =" or "a b", in the order of the table; refused if the model cannot read them."""
    cfg = need_model(model, p).cfg
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    has_equals = cfg.d_vocab == p + 1 and cfg.n_ctx >= 3
    return torch.cat([pairs, torch.full_like(pairs[:, :1], p)], 1) if has_equals else pairs


def _keep_last(kept: list[Tensor]) -> Any:
    def keep(act: Tensor, hook: Any) -> None:
        kept.append(act[:, -1].detach().cpu().clone())

    return keep


def _write_last(values: Float[Tensor, "pair width"]) -> Any:
    def write(act: Tensor, hook: Any) -> Tensor:
        act[:, -1] = values.to(act)
        return act

    return write
