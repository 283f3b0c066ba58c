"""Copy suppression: which heads lower the logit of the token they attend to, and how this affects calibration."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.component import head_name, layer_names
from hooklens.core.precision import widened
from hooklens.data.prompts import Prompts
from hooklens.model.linear import is_plain, packed_linears, without_bias
from hooklens.model.norms import Passage
from hooklens.plugins.heads.ece_change import CalibrationChange, calibration_change, calibration_text
from hooklens.plugins.heads.head_scores import one_length
from hooklens.plugins.heads.mediation import mean_z
from hooklens.plugins.heads.which import Heads, refuse_dropout
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, q_values, sign_flip_p
from hooklens.sweeps.nodes import read_heads

if TYPE_CHECKING:
    from hooklens.core.cache import ActivationCache
    from hooklens.model.transformer import HookedTransformer

PerSequence = Float[Tensor, "sequence layer head"]
_ASKED = 3  # heads whose calibration change is measured: each needs one run per control


@dataclass(frozen=True, eq=False)
class CopySuppression(Result):
    """Each head's direct effect on the logit of the token it attends to, and the change of calibration without it.

    `direct` is what the head adds to that token's logit, relative to the mean over all tokens, weighted by the
    attention: below 0 it suppresses. `control` is the same for another token of the prompt, to which the head does not
    attend. `calibration` is the change of the calibration error without the requested heads, compared with changes of
    the same size to other heads; None if no heads were requested. `data` names the input.
    """

    ranked_by = "how much the head suppresses"

    terms = {
        "another token": "the control: what the head adds to another token of the prompt, to which it does not attend",
    }

    direct: PerSequence
    control: PerSequence
    calibration: CalibrationChange | None
    data: str

    @property
    def anti(self) -> Float[Tensor, "layer head"]:
        """How much more a head lowers the token it attends to than another token: above 0 is suppression."""
        return (self.control - self.direct).mean(0)

    @property
    def q(self) -> Float[Tensor, "layer head"]:
        """Benjamini-Hochberg over heads for "no difference from the control", from sign flips of whole sequences."""
        return q_values(sign_flip_p(self.control - self.direct))

    def order(self) -> list[tuple[int, int]]:
        """Every (layer, head), the strongest suppression first."""
        return [
            divmod(i, self.anti.shape[1]) for i in self.anti.flatten().argsort(descending=True, stable=True).tolist()
        ]

    def table(self, n: int | None = 12) -> Table:
        """One row per head: its effect on the attended token and on another, their difference, and calibration."""
        (low, high), q = mean_interval(self.control - self.direct), self.q
        measured = {} if self.calibration is None else {row[0]: row[1:5] for row in self.calibration.table(None).rows}
        each = (self.direct.mean(0), self.control.mean(0), low, high, q)
        rows = [
            (head_name(i, j), *(float(one[i, j]) for one in each), *measured.get(head_name(i, j), (None,) * 4))
            for i, j in self.order()[:n]
        ]
        columns = ("token looked at", "another token", "anti low", "anti high", "q", "ECE change", "low", "high", "p")
        return Table(("head", *columns), rows)

    def figure(self) -> Any:
        """Layer by head: orange lowers the attended token, blue raises it."""
        from hooklens.viz.figures import heatmap

        rows = layer_names(len(self.anti))
        title = "Direct effect on the logit of the token looked at"
        return heatmap(-self.anti, y=rows, title=title, x_title="head", y_title="layer", colourbar="logit")


def score_copy_suppression(
    model: "HookedTransformer",
    prompts: Prompts | None = None,
    *,
    heads: Heads | None = None,
    n: int = 16,
    calibrate_on: Prompts | None = None,
    seed: int = 0,
) -> CopySuppression:
    """Which heads suppress the token they attend to, and is the model's calibration better or worse because of them?

    The direct effect is exact, including the final norm (but not a final soft cap): the head's output is compared with
    its mean, with all other components fixed. `heads` (by default the three strongest suppressors) are then
    mean-ablated, and the calibration error on the text `calibrate_on` is compared with that under a change of the same
    size to other heads. `prompts` must have one length; by default they are `n` excerpts of a text if the model has a
    tokenizer, else random tokens that repeat.

    >>> from hooklens.testing import induction_model
    >>> found = score_copy_suppression(induction_model(), heads=["L1H1"])
    >>> bool(found.direct.mean(0)[1, 1] > 5), found.direct.mean(0)[0].tolist(), found.calibration.heads
    (True, [0.0, 0.0], ['L1H1'])

    Reference: McDougall et al. (2023), "Copy Suppression", sections 2 and 3; Guo et al. (2017), "On Calibration of
    Modern Neural Networks", equation 3 (expected calibration error).
    """
    model.blocks[0].need_sum("a head's direct path to the logits")
    refuse_dropout(model)
    tokens, data = calibration_text(model, n, seed) if prompts is None else (one_length(model, prompts), "prompts")
    direct, control = anti_copy(model, tokens, seed=seed)
    chosen = _most_negative(direct - control) if heads is None else read_heads(model, heads)
    text = tokens if calibrate_on is None else one_length(model, calibrate_on)
    data_of_text = data if calibrate_on is None else "prompts"
    return CopySuppression(direct, control, calibration_change(model, text, chosen, data_of_text, seed=seed), data)


def anti_copy(
    model: "HookedTransformer", tokens: Int[Tensor, "sequence pos"], *, seed: int = 0
) -> tuple[PerSequence, PerSequence]:
    """What each head adds to the logit of the token that it looks at, and of another one (sequence layer head)."""
    names = ["z", "pattern", *(name for block in model.blocks for name in block.writes_through("attn").scales)]
    with torch.no_grad(), packed_linears(rows=1024):
        stream, cache = model.run_with_cache(tokens, names, stop_at_layer=model.cfg.n_layers)
        mean, other = (
            mean_z(model, cache),
            _another(tokens, min(model.cfg.d_vocab, model.cfg.d_vocab_out), seed),
        )
        each = [
            _direct(model, cache, mean=mean, stream=widened(stream), tokens=tokens, other=other, layer=i)
            for i in range(model.cfg.n_layers)
        ]
    return torch.stack([one[0] for one in each], 1), torch.stack([one[1] for one in each], 1)


def _another(tokens: Int[Tensor, "sequence pos"], d_vocab: int, seed: int) -> Int[Tensor, "sequence pos"]:
    """Another token for each key, drawn once: from its prompt except the first position, else from the vocabulary."""
    generator = seeded(seed)
    differs = tokens[:, :, None] != tokens[:, None, :]
    differs[:, :, 0] = False
    drawn = torch.rand(differs.shape, generator=generator).to(tokens.device).masked_fill(~differs, -1.0)
    any_token = torch.randint(1, max(2, d_vocab), tokens.shape, generator=generator).to(tokens.device)
    return torch.where(differs.any(-1), tokens.gather(1, drawn.argmax(-1)), (tokens + any_token) % d_vocab)


def _direct(
    model, cache: "ActivationCache", mean: dict[int, Tensor], stream: Tensor, tokens: Tensor, other: Tensor, layer: int
) -> tuple[Float[Tensor, "sequence head"], Float[Tensor, "sequence head"]]:
    """Each head's contribution to the logit of its strongest key's token (except the first), and of another token."""
    block, z = model.blocks[layer], cache["z", layer]
    moved = widened(block.attn.results(z)) - widened(block.attn.results(mean[layer].to(z)))
    moved = block.writes_through("attn").frozen(moved, lambda name: cache[name][:, :, None])
    weight, key = widened(cache["pattern", layer])[..., 1:].max(-1)  # position 0 is where heads rest
    weight, key = weight.transpose(1, 2), (key + 1).transpose(1, 2)
    weight = weight * (torch.arange(tokens.shape[1], device=tokens.device) > 0)[:, None]
    with_head, without = stream[:, :, None], stream[:, :, None] - moved
    final = Passage(model.ln_final)  # in wide numbers; the bias cancels
    change = final.scaled_as(with_head, with_head) - final.scaled_as(without, without)
    linear = model.unembed.linear
    W = widened(linear.weight if is_plain(linear) else without_bias(linear, torch.eye(change.shape[-1]).to(z)).T)
    out, rows = [], torch.arange(len(tokens), device=tokens.device)[:, None, None]
    for ids in (tokens, other):
        column = W[ids[rows, key]] - W.mean(0)
        effect = (change * column).sum(-1) * weight
        out.append(effect.sum(1) / weight.sum(1).clamp_min(torch.finfo(effect.dtype).tiny))
    return out[0], out[1]


def _most_negative(difference: PerSequence) -> list[tuple[int, int]]:
    order = difference.mean(0).flatten().argsort(stable=True)[:_ASKED].tolist()
    return [divmod(i, difference.shape[2]) for i in order]


def demo(model: "HookedTransformer") -> CopySuppression:
    """Four short sequences."""
    return score_copy_suppression(model, n=4)
