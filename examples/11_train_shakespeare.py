# %% [markdown]
# # Train a GPT on Shakespeare and open it
#
# A transformer of 0.8 million parameters learns to write plays, character by character. Then it is studied like any
# other model: sample from it, look for heads, read its residual stream with a logit lens. Set `HOOKLENS_TINY=1` to take
# a few steps on one sentence, which only shows how it is done. `benchmarks/shakespeare.py` trains it for longer.

# %%
import math
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import hooklens as hl
from hooklens.plugins.heads import score_heads
from hooklens.plugins.lens import logit_lens
from hooklens.training import AdamW, Cosine, Settings
from hooklens.viz import Report, attention_heads

tiny = bool(os.environ.get("HOOKLENS_TINY"))
folder = TemporaryDirectory()  # of the run; a run that is to be kept or resumed has a folder of its own
prompt = "ROMEO.\nO, she doth teach the torches to burn b"

# %% [markdown]
# The data: windows of 64 characters from anywhere in the first nine tenths of the plays. The last tenth is held out.

# %%
if tiny:
    source = Path(folder.name) / "text.txt"
    source.write_text(f"{prompt}right!\n" * 12, encoding="utf-8")
    data, steps = hl.data.text(source, window=48), 4
else:
    data, steps = hl.data.shakespeare(window=64), 900
print(data.description())

# %% [markdown]
# The model and its settings. Everything that is not set here has a default; the run records its losses and norms at
# every step.

# %%
sizes = {"n_layers": 4, "d_model": 128, "n_heads": 4} if not tiny else {"n_layers": 2, "d_model": 16, "n_heads": 2}
cfg = hl.HookedTransformerConfig(
    **sizes, n_ctx=data.window, d_vocab=data.d_vocab, positional_embedding_type="rotary", model_name="small plays"
)
model = hl.HookedTransformer(cfg, tokenizer=data.tokenizer, seed=0)
settings = Settings(
    batch=16,
    optimizer=AdamW(lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1),
    schedule=Cosine(warmup=steps // 10, floor=0.02),
    clip=1.0,
    evaluate=20,
)
run = hl.train(model, data, steps=steps, settings=settings, out=Path(folder.name) / "run")
print(run.table())
before, after = run.held_out_loss[0], run.held_out_loss[-1]
print(f"held out: {before:.2f} before, {after:.2f} after; a uniform guess: {math.log(data.d_vocab):.2f}\n")

# %% [markdown]
# Sample from it. Greedy decoding of a small model repeats itself, so the temperature is not 0.

# %%
sample = model.generate("ROMEO.\n", 20 if tiny else data.window - 8, temperature=0.8, seed=0)
print(sample.text, "\n")

# %% [markdown]
# Which heads attend to the previous character, and is there an induction head? The sequences are random characters that
# repeat, so the words of the plays do not help. Some head always has the highest score: its q says whether it is more
# than chance. After this short run, previous-token heads are, and no head's induction score is.

# %%
scores = score_heads(model)
print(scores.top_heads(3, "previous"))
print(scores.top_heads(3, "induction"), "\n")

# %% [markdown]
# A logit lens: the play goes on with "right!". How does the guess after "burn b" form from layer to layer, and how far
# does "r" rise in it? The last row is the model itself.

# %%
lens = logit_lens(model, prompt, answer="r")
print(lens.table(), "\n")

# %% [markdown]
# The checkpoints are models, too. When did the strongest previous-token head become one?

# %%
layer, head = scores.order("previous")[0]
kept = hl.checkpoints(run)
history = [float(score_heads(one.load(), draws=2).mean("previous")[layer, head]) for one in kept]
rows = [(one.step, value) for one, value in zip(kept, history, strict=True)]
print(hl.Table(("step", f"previous-token score of L{layer}H{head}"), rows))

# %% [markdown]
# One page with the pictures: the losses, where two heads attend, and the lens.

# %%
losses = run.figure()
chosen = [scores.order(kind)[0] for kind in ("previous", "induction")]
with torch.no_grad():
    _, cache = model.run_with_cache(prompt, names=["pattern"])
patterns = torch.stack([cache["pattern", n][0, h] for n, h in chosen])
attention = attention_heads(patterns, model.to_str_tokens(prompt), [f"L{n}H{h}" for n, h in chosen], ncols=2)

report = Report("A GPT trained on Shakespeare by character")
parameters = f"{sum(p.numel() for p in model.parameters()):,}"
report.numbers({"parameters": parameters, "held-out loss (nats)": float(after), "untrained": float(before)})
report.text("A sample after ROMEO, at temperature 0.8:").code(sample.text)
report.figure(losses, "Training: the batch of each step. Held out: 64 windows from the last tenth of the text.")
q = [float(scores.top_heads(1, kind).rows[0][-1]) for kind in ("previous", "induction")]
report.figure(
    attention,
    f"The head with the highest previous-token score (left, q = {q[0]:.2g}), and the one with the highest induction "
    f"score (right, q = {q[1]:.2g}: {'above' if q[1] < 0.05 else 'not above'} chance)",
).table(scores.table())
report.figure(lens.figure(), "The most likely character before every block, and the model's own").table(lens.table())
if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
    losses.show()
    attention.show()
    lens.figure().show()
else:
    Path("hooklens-11-shakespeare.html").write_text(report.to_html(), encoding="utf-8")
    print("wrote hooklens-11-shakespeare.html")
folder.cleanup()
