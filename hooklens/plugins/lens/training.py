"""Training of a tuned lens: Adam on KL(model || lens), all layers from one forward pass, in bounded memory."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.envelope import read_envelope, write_envelope
from hooklens.core.errors import FileRefused
from hooklens.core.files import reading
from hooklens.core.fingerprint import identity
from hooklens.core.precision import widened
from hooklens.core.progress_bar import progress
from hooklens.metrics import kl_divergence
from hooklens.model.linear import is_plain
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.lens.least_squares import stream_sizes
from hooklens.plugins.lens.reading import check_quiet, expected, prompts_at_once, read_streams, streams_of
from hooklens.plugins.lens.translators import LENS_SCHEMA, TunedLens
from hooklens.training.optimizers import Adam

_LOGITS_AT_ONCE = 16 * 2**20  # about four tensors of this size exist during a gradient
_SECONDS_BETWEEN_FILES = 60.0
_ADAM = Adam(betas=(0.9, 0.98))

Maps = Float[Tensor, "layer in d_model"]


@dataclass(frozen=True)
class Schedule:
    """The settings that determine a run: the same schedule, model and windows give the same lens, bit for bit."""

    train: Int[Tensor, "window pos"]
    steps: int
    lr: float
    seed: int
    batch: int

    def windows(self, step: int) -> Int[Tensor, "batch pos"]:
        """The windows of one step: every window is used once per epoch, in an order drawn for each epoch."""
        n = len(self.train)
        at = torch.arange(step * self.batch, (step + 1) * self.batch)
        orders = {epoch: torch.randperm(n, generator=seeded(self.seed, epoch)) for epoch in (at // n).unique().tolist()}
        return self.train[torch.stack([orders[int(i) // n][i % n] for i in at]).to(self.train.device)]

    def rate(self, step: int) -> float:
        """The learning rate, decaying linearly to 0."""
        return self.lr * (1 - step / self.steps)


@dataclass(frozen=True)
class State:
    """A run between two steps. Each step makes a new state, so an interrupt never leaves a half-updated lens.

    The last row of a layer's map is its bias, in units of `size`, the size of the layer's stream: Adam moves all
    parameters equally far, and the bias must keep up with the stream.
    """

    maps: Maps
    first: Maps
    second: Maps
    size: Float[Tensor, "layer"]
    loss: Float[Tensor, "step layer"]

    @property
    def step(self) -> int:
        return len(self.loss)

    def lens(self) -> TunedLens:
        """The maps as a module."""
        return TunedLens.of(self.maps[:, :-1], self.maps[:, -1] * self.size[:, None])


def train(
    model: HookedTransformer, schedule: Schedule, held_out: Tensor, start: TunedLens | None, path: Path | None
) -> tuple[State, dict[str, Tensor]]:
    """Run all remaining steps and keep the file up to date; Ctrl-C writes the last complete step."""
    check_quiet(model)
    key = "" if path is None else _key(model, schedule, held_out, start)
    if path is not None and path.exists():
        state, held = _read(path, key, model.device)
    else:
        state = begin(model, schedule.train, start)
        held = {"before": window_kl(model, held_out), "constant": constant_kl(model, schedule.train, held_out)}

    def save() -> None:
        if path is not None:
            _save(path, state, held, key)

    written = time.monotonic()
    with progress("tuned lens", schedule.steps, unit="steps") as advance:
        advance(state.step)
        try:
            while state.step < schedule.steps:
                grads, loss = gradients(model, state, schedule.windows(state.step))
                state = advanced(state, grads, loss, schedule.rate(state.step))
                advance()
                if time.monotonic() - written > _SECONDS_BETWEEN_FILES:
                    save()
                    written = time.monotonic()
        except KeyboardInterrupt:
            save()
            raise
    save()
    return state, held


def _key(model: HookedTransformer, schedule: Schedule, held_out: Tensor, start: TunedLens | None) -> str:
    """A hash of everything that a run must share with its continuation."""
    fixed = (schedule.train, held_out, schedule.steps, schedule.lr, schedule.seed, schedule.batch)
    return identity((model.cfg.to_json(), dict(model.state_dict()), fixed, start), "the run")


def _save(path: Path, state: State, held: dict[str, Tensor], key: str) -> None:
    """Save the current lens and the state needed to continue."""
    lens = state.lens()
    tensors = {"weight": lens.weight, "bias": lens.bias, "loss": state.loss, "size": state.size, **held}
    tensors |= {"maps": state.maps, "first": state.first, "second": state.second}
    write_envelope(path, LENS_SCHEMA, key, tensors)


def _read(path: Path, key: str, device: torch.device) -> tuple[State, dict[str, Tensor]]:
    """Read the state of a run; the file of another run is refused."""
    file = read_envelope(path, LENS_SCHEMA)
    if file.content != key:
        raise FileRefused(
            f"{path} contains a tuned lens of another run (other weights, tokens, start, steps, lr, seed or batch), or "
            "one without a run; give another path=, or read it with TunedLens.load"
        )
    on = {name: tensor.to(device) for name, tensor in file.tensors()}
    with reading(path, "a tuned lens in training"):
        state = State(*(on[name] for name in ("maps", "first", "second", "size", "loss")))
        return state, {name: on[name] for name in ("before", "constant")}


def begin(model: HookedTransformer, train: Int[Tensor, "window pos"], start: TunedLens | None = None) -> State:
    """Zero maps, or those to start from, and the size of each layer's stream, measured on a few windows."""
    streams = streams_of(model, train[: max(1, 512 // train.shape[1])]).flatten(1, 2)[:-1]
    streams = widened(streams)
    size = stream_sizes(streams)
    zeros = size.new_zeros(len(size), streams.shape[-1] + 1, streams.shape[-1])
    maps = zeros
    if start is not None:
        bias = start.bias.detach().to(zeros) / size[:, None]
        maps = torch.cat([start.weight.detach().to(zeros), bias[:, None]], 1)
    return State(maps, zeros, zeros, size, size.new_zeros(0, len(size)))


def gradients(
    model: HookedTransformer, state: State, tokens: Int[Tensor, "batch pos"]
) -> tuple[Maps, Float[Tensor, "layer"]]:
    """d mean KL / d maps of every layer, and the mean KL, a few rows and one layer at a time."""
    grads, loss = torch.zeros_like(state.maps), state.size.new_zeros(len(state.maps))
    for some in prompts_at_once(model, tokens):
        streams = streams_of(model, some).flatten(1, 2)
        for rows in streams.split(max(1, _LOGITS_AT_ONCE // model.cfg.d_vocab_out), dim=1):
            target = _final(model, rows[-1]).exp()
            for layer in range(len(grads)):
                grad, value = _one_layer(model, state, layer, rows[layer], target)
                grads[layer] += grad / tokens.numel()
                loss[layer] += value / tokens.numel()
    return grads, loss


def _one_layer(
    model, state: State, layer: int, stream: Float[Tensor, "row d_model"], target: Float[Tensor, "row d_vocab"]
) -> tuple[Float[Tensor, "in d_model"], Float[Tensor, ""]]:
    """d KL / d maps and the KL, summed over rows. Where possible, only the final norm uses autograd."""
    wide = stream.to(state.maps.dtype)
    with torch.enable_grad():
        maps = state.maps[layer].clone().requires_grad_()
        read = wide + wide @ maps[:-1] + state.size[layer] * maps[-1]
        x = read.to(stream.dtype)
        normed = x if model.ln_final is None else model.ln_final(x)
        if not is_plain(model.unembed.linear):
            logits = model.unembed(normed[None])[0].to(target.dtype)
            kl = kl_divergence(target.log(), logits.log_softmax(-1)).sum()
            return torch.autograd.grad(kl, maps)[0], kl.detach()
        with torch.no_grad():
            back, kl = _through_unembedding(model, normed, target)
        return torch.autograd.grad(normed, maps, back)[0], kl


def _through_unembedding(
    model, normed: Float[Tensor, "row d_model"], target: Float[Tensor, "row d_vocab"]
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, ""]]:
    """d KL / d normed in closed form, (softmax - target) W_U, with two tensors of logits instead of autograd's five."""
    linear, cap = model.unembed.linear, model.unembed.soft_cap
    raw = linear(normed)
    z = model.unembed.cap(raw).to(target.dtype)
    peak = z.amax(-1, keepdim=True)
    aligned = expected(target, z)
    slope = None if cap is None else 1 - (z / cap).square()
    probs = z.sub(peak).exp_()
    total = probs.sum(-1, keepdim=True)
    kl = torch.special.xlogy(target, target).sum() + (peak + total.log()).sum() - aligned.sum()
    back = probs.div_(total).sub_(target)
    back = back if slope is None else back.mul_(slope)
    return back.to(normed.dtype) @ linear.weight, kl


def _final(model, stream: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    """The model's own log-probabilities."""
    with torch.no_grad():
        logits = model.read_out(stream[None])[0]
        return widened(logits).log_softmax(-1)


def advanced(state: State, grads: Maps, loss: Float[Tensor, "layer"], rate: float) -> State:
    """One step of Adam (Kingma and Ba 2015, algorithm 1)."""
    change, slots = grads.clone(), {"first": state.first.clone(), "second": state.second.clone()}
    _ADAM.adapt(change, slots, state.step + 1, rate)
    return replace(state, maps=state.maps + change, **slots, loss=torch.cat([state.loss, loss[None]]))


def window_kl(
    model: HookedTransformer, tokens: Int[Tensor, "window pos"], lens: TunedLens | None = None
) -> Float[Tensor, "window layer"]:
    """KL(model || lens) of every window, mean over its positions; without a lens, that of the logit lens."""
    parts = []
    for some in prompts_at_once(model, tokens):
        streams = streams_of(model, some).flatten(1, 2)
        nothing = torch.empty(streams.shape[1], 0, dtype=torch.long, device=tokens.device)
        with torch.no_grad():
            kl = read_streams(model, streams, nothing, k=1, translate=lens).kl[:-1]
        parts.append(kl.unflatten(1, some.shape).mean(-1).T)
    return torch.cat(parts)


def constant_kl(
    model: HookedTransformer, train: Int[Tensor, "train_window pos"], held_out: Int[Tensor, "window pos"]
) -> Float[Tensor, "window"]:
    """KL(model || c) for the constant distribution c, the model's mean over training windows, as a baseline."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for rows in _final_rows(model, train[:32]):
        total, count = total + rows.exp().sum(0).double().cpu(), count + len(rows)
    mean = (total / count).clamp_min(1e-30).log().to(held_out.device)
    values = []
    for window in held_out:
        rows = torch.cat([kl_divergence(row, mean.to(row)) for row in _final_rows(model, window[None])])
        values.append(rows.mean())
    return torch.stack(values)


def _final_rows(model, tokens: Tensor) -> Iterator[Float[Tensor, "row d_vocab"]]:
    for window in tokens:
        with torch.no_grad():
            stream = model(window[None], stop_at_layer=model.cfg.n_layers)[0]
        for rows in stream.split(max(1, _LOGITS_AT_ONCE // model.cfg.d_vocab_out)):
            yield _final(model, rows)
