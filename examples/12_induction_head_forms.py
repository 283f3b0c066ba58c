# %% [markdown]
# # Watch an induction head form
#
# Train a two-layer attention-only model on random tokens that repeat. At first it learns which tokens occur in the
# sequence: that is worth ln 64 - ln 12 nats. Then, within about 150 steps, the loss falls far below ln 12, and heads of
# layer 1 begin to attend to the token after the last occurrence of the current one (Olsson et al. 2022). The task is
# defined here, to show that one is a small class. Set `HOOKLENS_TINY=1` to take a few steps, in which nothing forms.

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

# %%
sequences = next(data.held_out(64)).inputs[:16]
kept = hl.checkpoints(run)
found = [score_heads(one.load(), sequences, draws=2) for one in kept]
names = [f"L{layer}H{head}" for layer in range(2) for head in range(2)]
curves = {}
for kind, layer in (("previous", 0), ("induction", 1)):
    over_steps = torch.stack([one.mean(kind)[layer] for one in found])
    curves |= {f"{kind}, L{layer}H{head}": over_steps[:, head] for head in range(2)}
rows = [(one.step, *(float(curve[i]) for curve in curves.values())) for i, one in enumerate(kept)]
print(hl.Table(("step", *curves), rows), "\n")

# %% [markdown]
# Does the head in layer 1 need what layer 0 writes? Set one head to zero at a time; the other heads are the controls.

# %%
batch = next(data.held_out(64))


def loss_without(layer, head):
    """The mean loss with one head set to zero."""

    def ablate(z, hook):
        z[:, :, head] = 0
        return z

    with torch.no_grad(), model.hooks(fwd_hooks=[(hl.site("z", layer), ablate)]):
        log_probs = model(batch.inputs).log_softmax(-1)
    return float(-log_probs.gather(2, batch.targets[..., None])[..., 0][batch.counts].mean())


whole = float(run.held_out_loss[-1])
rows = [(name, loss_without(int(name[1]), int(name[3])) - whole) for name in names]
print(f"loss {whole:.4f} nats")
print(hl.Table(("head set to zero", "change of the loss"), rows), "\n")

# %% [markdown]
# One page: the loss, the scores, and where the head with the highest induction score attends before and after.

# %%
evaluations = run.evaluations()
marks = {"any token: ln 64": math.log(data.d_vocab), "any token of the pattern: ln 12": math.log(12)}
titles = {"x_title": "step", "y_title": "nats"}
loss = torch.tensor(evaluations["loss"].copy())
losses = lines({"loss": loss}, torch.tensor(evaluations.steps), title="Held-out loss", marks=marks, **titles)
at = torch.tensor([one.step for one in kept])
scores = lines(curves, at, title="Head scores", x_title="step", y_title="share of attention")

layer, head = found[-1].order("induction")[0]
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
    report.figure(losses, "Mean loss where the sequence determines the next token")
    report.figure(scores, "Both heads of layer 0 by previous-token score, both of layer 1 by induction score")
    report.figure(attention, "One held-out sequence: the untrained head, and the trained one")
    Path("hooklens-12-induction-head-forms.html").write_text(report.to_html(), encoding="utf-8")
    print("wrote hooklens-12-induction-head-forms.html")
