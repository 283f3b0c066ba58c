# %% [markdown]
# # Watch an induction head form
#
# Train a two-layer attention-only model on random tokens that repeat. At first it learns to guess tokens that occur in
# the sequence: that is worth about ln 64 - ln 12 nats. Then, within about 150 steps, the loss falls far below ln 12,
# and heads of layer 1 begin to attend to the token after an earlier occurrence of the current one (Olsson et al. 2022).
# The task is defined here, to show that one is a small class. Set `HOOKLENS_TINY=1` to take a few steps, in which
# nothing forms.

# %%
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import hooklens as hl
from hooklens.data.batches import Batch, TrainingData
from hooklens.plugins.heads import score_heads
from hooklens.training import AdamW, Cosine, Settings
from hooklens.viz import Report, attention_heads, lines

tiny = bool(os.environ.get("HOOKLENS_TINY"))


# %% [markdown]
# The task: a first token, then a pattern of 8 to 16 different tokens that repeats until the end. Only targets that the
# sequence determines count. A batch depends on nothing but its step, so that a run can be resumed.


# %%
@dataclass(frozen=True)
class RepeatedPatterns(TrainingData):
    d_vocab: int = 64
    length: int = 33
    shortest: int = 8
    longest: int = 16

    def draw(self, n: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        period = torch.randint(self.shortest, self.longest + 1, (n, 1), generator=generator)
        different = torch.rand(n, self.d_vocab, generator=generator).argsort(1)
        pos = torch.arange(self.length + 1)
        tokens = different.gather(1, torch.where(pos > 0, 1 + (pos - 1) % period, 0))
        return Batch(tokens[:, :-1], tokens[:, 1:], pos[1:] > period)

    def batch(self, step: int, size: int) -> Batch:
        return self.draw(size, seed=2 * step)

    def held_out(self, size: int) -> Iterator[Batch]:
        yield self.draw(64, seed=1)

    def description(self) -> str:
        return "the next token of a random pattern that repeats: only the sequence itself determines it"

    def identity(self) -> dict[str, object]:
        return {"task": "repeated patterns", "d_vocab": self.d_vocab, "length": self.length}


data = RepeatedPatterns()

# %% [markdown]
# Train, and keep many checkpoints: they are spaced at equal ratios, so the first steps are seen in detail.

# %%
steps, batch = (12, 8) if tiny else (900, 64)
sizes = {"n_layers": 2, "d_model": 64, "n_heads": 2, "n_ctx": data.length, "d_vocab": data.d_vocab, "attn_only": True}
model = hl.HookedTransformer(hl.HookedTransformerConfig(**sizes), seed=0)
settings = Settings(
    batch=batch,
    optimizer=AdamW(lr=1e-3, betas=(0.9, 0.98)),
    schedule=Cosine(warmup=50),
    evaluate=12 if tiny else 45,
    checkpoints=6 if tiny else 60,
)
run = hl.train(model, data, steps=steps, settings=settings)
print(run.table(), "\n")

# %% [markdown]
# The scores of every head at every checkpoint, on the same held-out sequences: the share of attention on the token
# before, and on the token that followed the current one earlier (on average over the positions that have such a key).
# The last column is the probability that the model gives to tokens which occur so far, where the sequence determines
# the next one: it rises before the heads form.

# %%
sequences = next(data.held_out(64)).inputs[:16]
kept = hl.checkpoints(run)
found = [score_heads(one.load(), sequences, draws=2) for one in kept]
names = [f"L{layer}H{head}" for layer in range(2) for head in range(2)]
curves = {}
for kind, layer in (("previous", 0), ("induction", 1)):
    over_steps = torch.stack([one.mean(kind)[layer] for one in found])
    curves |= {f"{kind}, L{layer}H{head}": over_steps[:, head] for head in range(2)}


def on_seen(model, batch):
    """The mean probability of all tokens that occur so far, where the next one is determined."""
    with torch.no_grad():
        probabilities = model(batch.inputs).softmax(-1)
    seen = torch.nn.functional.one_hot(batch.inputs, data.d_vocab).cummax(1).values
    return float((probabilities * seen).sum(-1)[batch.counts].mean())


batch = next(data.held_out(64))
seen = [on_seen(one.load(), batch) for one in kept]
rows = [(one.step, *(float(curve[i]) for curve in curves.values()), seen[i]) for i, one in enumerate(kept)]
print(hl.Table(("step", *curves, "on tokens so far"), rows), "\n")

# %% [markdown]
# Does the head with the highest induction score need what layer 0 writes? Set one head to zero at a time; the other
# heads are the controls. Its attention can only change where a head of layer 0 is set to zero.

# %%
best = found[-1].order("induction")[0]


def without(layer, head):
    """The mean loss with one head set to zero, and the induction score of the best head then."""

    def ablate(z, hook):
        z[:, :, head] = 0
        return z

    with torch.no_grad(), model.hooks(fwd_hooks=[(hl.site("z", layer), ablate)]):
        log_probs = model(batch.inputs).log_softmax(-1)
        score = score_heads(model, sequences, draws=2).mean("induction")[best]
    return float(-log_probs.gather(2, batch.targets[..., None])[..., 0][batch.counts].mean()), float(score)


whole = float(run.held_out_loss[-1])
ablated = [(name, *without(int(name[1]), int(name[3]))) for name in names]
needed = hl.Table(
    ("head set to zero", "change of the loss", f"induction score of L{best[0]}H{best[1]}"),
    [(name, loss - whole, score) for name, loss, score in ablated],
)
print(f"loss {whole:.4f} nats, induction score {float(found[-1].mean('induction')[best]):.4f}")
print(needed, "\n")

# %% [markdown]
# One page: the loss, the scores, and where the head with the highest induction score attends before and after.

# %%
evaluations = run.evaluations()
marks = {"any token: ln 64": math.log(data.d_vocab), "any token of the pattern: about ln 12": math.log(12)}
titles = {"x_title": "step", "y_title": "nats"}
loss = torch.tensor(evaluations["loss"].copy())
losses = lines({"loss": loss}, torch.tensor(evaluations.steps), title="Held-out loss", marks=marks, **titles)
at = torch.tensor([one.step for one in kept])
scores = lines(curves, at, title="Head scores", x_title="step", y_title="share of attention")

layer, head = best
patterns = []
for one in (kept[0], kept[-1]):
    with torch.no_grad():
        _, cache = one.load().run_with_cache(sequences[:1], names=["pattern"])
    patterns.append(cache["pattern", layer][0, head])
words = [str(int(i)) for i in sequences[0]]
attention = attention_heads(
    torch.stack(patterns), words, [f"L{layer}H{head} after {one.step} steps" for one in (kept[0], kept[-1])], ncols=2
)
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    losses.show()
    scores.show()
    attention.show()
else:
    report = Report("An induction head forms")
    report.figure(losses, "Mean loss where the sequence determines the next token; dashed: the losses of two guesses")
    report.figure(
        scores,
        "Layer 0: attention to the token before. Layer 1: attention to what followed the current token earlier.",
    )
    report.figure(
        attention,
        "One held-out sequence, query down, key across. The stripes of the trained head (right) are one period away "
        "from the diagonal, less one token: where the sequence goes on.",
    )
    report.table(needed, f"One head set to zero at a time. Loss of the whole model: {whole:.4f} nats.")
    Path("hooklens-12-induction-head-forms.html").write_text(report.to_html(), encoding="utf-8")
    print("wrote hooklens-12-induction-head-forms.html")
