"""Copy suppression: which heads lower the logit of the token they attend to, and how this affects calibration."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.cache import ActivationCache
from hooklens.core.component import head_names
from hooklens.core.precision import widened
from hooklens.data.prompts import Prompts, need_tokens
from hooklens.model.linear import matrix_of
from hooklens.model.norms import Passage
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.heads.ece_change import CalibrationChange, calibration_change, calibration_text
from hooklens.plugins.heads.head_ranking import Head, PerHead, PerSequence, head_map, head_table, ranked
from hooklens.plugins.heads.which import Heads, captured, check_model, one_length
from hooklens.plugins.weights.needs import Needs, needs_tokens
from hooklens.results.result import Result, Table
from hooklens.results.statistics import mean_interval, q_values, sign_flip_p
from hooklens.sweeps.nodes import read_heads

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
    def anti(self) -> PerHead:
        """How much more a head lowers the token it attends to than another token: above 0 is suppression."""
        return (self.control - self.direct).mean(0)

    @property
    def q(self) -> PerHead:
        """Benjamini-Hochberg over heads for "no difference from the control", from sign flips of whole sequences."""
        return q_values(sign_flip_p(self.control - self.direct))

    def order(self) -> list[Head]:
        """Every (layer, head), the strongest suppression first."""
        return ranked(self.anti)

    def table(self, n: int | None = 12) -> Table:
        """One row per head: its effect on the attended token and on another, their difference, and calibration."""
        low, high = mean_interval(self.control - self.direct)
        columns: dict[str, Any] = {"token looked at": self.direct.mean(0), "another token": self.control.mean(0)}
        columns |= {"anti low": low, "anti high": high, "q": self.q}
        measured = {} if self.calibration is None else {row[0]: row[1:5] for row in self.calibration.table(None).rows}
        cells = [measured.get(name, (None,) * 4) for name in head_names(*self.anti.shape)]
        columns |= zip(("ECE change", "low", "high", "p"), zip(*cells, strict=True), strict=True)
        return head_table(self.anti, columns, n)

    def figure(self) -> Any:
        """Layer by head: orange lowers the attended token, blue raises it."""
        return head_map(-self.anti, "Direct effect on the logit of the token looked at", "logit")


def score_copy_suppression(
    model: HookedTransformer,
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
    check_model(model, "score_copy_suppression")
    need_tokens(model, "score_copy_suppression", "hl.heads.measure_mediation follows what a head writes")
    model.blocks[0].need_sum("a head's direct path to the logits")
    if prompts is None:
        tokens, data = calibration_text(model, n, seed)
    else:
        tokens, data = one_length(model, prompts, least=2), "prompts"
    direct, control = anti_copy(model, tokens, seed=seed)
    chosen = ranked((control - direct).mean(0))[:_ASKED] if heads is None else read_heads(model, heads)
    text, data_of_text = tokens, data
    if calibrate_on is not None:
        text, data_of_text = one_length(model, calibrate_on, least=2), "prompts"
    change = calibration_change(model, text, chosen, data_of_text, seed=seed)
    return CopySuppression(direct=direct, control=control, calibration=change, data=data)


def anti_copy(
    model: HookedTransformer, tokens: Int[Tensor, "sequence pos"], *, seed: int = 0
) -> tuple[PerSequence, PerSequence]:
    """What each head adds to the logit of the token that it looks at, and of another one (sequence layer head)."""
    scales = [name for block in model.blocks for name in block.writes_through("attn").scales]
    stream, cache = captured(model, tokens, ["z", "pattern", *scales])
    other = _another(tokens, min(model.cfg.d_vocab, model.cfg.d_vocab_out), seed)
    with torch.no_grad():
        W_U = widened(matrix_of(model.unembed.linear, model.cfg.d_model))
        columns = [W_U[ids] - W_U.mean(0) for ids in (tokens, other)]
        effects = [
            _direct(model, cache, stream=widened(stream), columns=columns, layer=layer)
            for layer in range(model.cfg.n_layers)
        ]
    direct, control = (torch.stack(parts, 1) for parts in zip(*effects, strict=True))
    return direct, control


def _another(tokens: Int[Tensor, "sequence pos"], d_vocab: int, seed: int) -> Int[Tensor, "sequence pos"]:
    """Another token for each key, drawn once: from its prompt except the first position, else from the vocabulary."""
    generator = seeded(seed)
    differs = tokens[:, :, None] != tokens[:, None, :]
    differs[:, :, 0] = False
    drawn = torch.rand(differs.shape, generator=generator).to(tokens.device).masked_fill(~differs, -1.0)
    any_token = torch.randint(1, max(2, d_vocab), tokens.shape, generator=generator).to(tokens.device)
    return torch.where(differs.any(-1), tokens.gather(1, drawn.argmax(-1)), (tokens + any_token) % d_vocab)


def _direct(
    model: HookedTransformer,
    cache: ActivationCache,
    stream: Float[Tensor, "sequence pos d_model"],
    columns: list[Float[Tensor, "sequence pos d_model"]],
    layer: int,
) -> list[Float[Tensor, "sequence head"]]:
    """Each head's contribution to the logit of its strongest key's token (except the first), and of another token."""
    block, z = model.blocks[layer], cache["z", layer]
    moved = widened(block.attn.results(z)) - widened(block.attn.results(z.mean((0, 1), keepdim=True)))
    moved = block.writes_through("attn").frozen(moved, lambda name: cache[name][:, :, None])
    weight, key = widened(cache["pattern", layer])[..., 1:].max(-1)  # position 0 is where heads rest
    weight, key = weight.transpose(1, 2).clone(), (key + 1).transpose(1, 2)
    weight[:, 0] = 0.0
    with_head, without = stream[:, :, None], stream[:, :, None] - moved
    final = Passage(model.ln_final)  # in wide numbers; the bias cancels
    change = final.scaled_as(with_head, with_head) - final.scaled_as(without, without)
    sequence = torch.arange(len(z), device=z.device)[:, None, None]
    effects = ((change * column[sequence, key]).sum(-1) * weight for column in columns)
    return [effect.sum(1) / weight.sum(1).clamp_min(torch.finfo(effect.dtype).tiny) for effect in effects]


def demo(model: HookedTransformer) -> CopySuppression | Needs:
    """Four short sequences."""
    return needs_tokens(model) or score_copy_suppression(model, n=4)
