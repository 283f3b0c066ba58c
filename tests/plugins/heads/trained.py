"""A two-layer attention-only model, trained in seconds on random tokens that repeat."""

import torch

from hooklens.testing import tiny_model

D_VOCAB, LENGTH = 64, 33


def trained_on_repeats(seed: int = 0, steps: int = 700):
    """A hooklens model and its last training loss on the repeated tokens."""
    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 64, "n_ctx": LENGTH, "d_vocab": D_VOCAB, "attn_only": True}
    model = tiny_model(seed=seed, **sizes)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: min(1, (i + 1) / 50) * (1 - i / steps))
    for _ in range(steps):
        period = int(torch.randint(8, 17, (1,), generator=generator))
        drawn = torch.rand(64, D_VOCAB, generator=generator).argsort(1)[:, : period + 1]
        tokens = torch.cat([drawn[:, -1:], drawn[:, :period].repeat(1, LENGTH // period + 1)[:, : LENGTH - 1]], 1)
        log_probs = model(tokens)[:, period + 1 : -1].log_softmax(-1)
        loss = -log_probs.gather(2, tokens[:, period + 2 :, None]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model, loss.item()
