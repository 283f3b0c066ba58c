"""Records ablations and attribution patching done with TransformerLens 3.9.0's hooks, for tests/plugins/patching.

Run where transformer_lens==3.9.0 is installed, from the repository root:
    python benchmarks/record_ablation_parity.py > tests/plugins/patching/recorded_ablation.py
"""

import torch
from record_transformer_lens import build

PROMPTS = torch.tensor([[1, 5, 2, 7, 3, 0], [4, 4, 9, 10, 8, 6], [2, 0, 0, 5, 7, 1]])
CORRUPTED = torch.tensor([[1, 5, 6, 7, 3, 0], [4, 2, 9, 10, 1, 6], [2, 0, 3, 5, 7, 1]])
#: Attribution patching: by our site and grid, the point and the axes of (clean - corrupted) * gradient to sum.
SITES = {
    ("resid_pre", "layer x pos"): ("hook_resid_pre", (2,)),
    ("attn_out", "layer"): ("hook_attn_out", (1, 2)),
    ("z", "layer x head"): ("attn.hook_z", (1, 3)),
    ("q", "layer x head"): ("attn.hook_q", (1, 3)),
    ("pattern", "layer x head"): ("attn.hook_pattern", (2, 3)),
}


def metric(logits):
    """Logit 3 minus logit 7 at the last position, a number a prompt."""
    return logits[:, -1, 3] - logits[:, -1, 7]


def ablations(model, kind: str) -> torch.Tensor:
    """prompt layer head: the metric without each head."""
    _, cache = model.run_with_cache(PROMPTS)
    out = torch.zeros(len(PROMPTS), model.cfg.n_layers, model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.attn.hook_z"
        for head in range(model.cfg.n_heads):

            def write(z, hook, head=head, name=name):
                z[:, :, head] = 0.0 if kind == "zero" else cache[name].mean(0)[:, head]
                return z

            out[:, layer, head] = metric(model.run_with_hooks(PROMPTS, fwd_hooks=[(name, write)]))
    return out


def attributions(model, point: str, axes: tuple[int, ...]) -> torch.Tensor:
    """pair layer ...: (clean - corrupted) . gradient at the corrupted run."""
    names = [f"blocks.{layer}.{point}" for layer in range(model.cfg.n_layers)]
    _, clean = model.run_with_cache(PROMPTS)
    _, corrupted = model.run_with_cache(CORRUPTED)
    grads = {}

    def keep(grad, hook):
        grads[hook.name] = grad.clone()

    with torch.enable_grad(), model.hooks(bwd_hooks=[(name, keep) for name in names]):
        metric(model(CORRUPTED)).sum().backward()
    return torch.stack([((clean[name] - corrupted[name]) * grads[name]).sum(axes) for name in names], 1)


def rows(values: torch.Tensor) -> list:
    return [[round(x, 6) for x in row] for row in values.detach().reshape(-1, values.shape[-1]).tolist()]


def main() -> None:
    print(
        '"""Ablations and attribution patching with TransformerLens 3.9.0 (benchmarks/record_ablation_parity.py)."""\n'
    )
    print("# By model and kind, or model, site and grid: rows of the last axis, prompts first.")
    print("# fmt: off")
    for title in ("ABLATIONS", "ATTRIBUTIONS"):
        print(f"{title} = {{")
        for name in ("learned", "rotary", "attn_only"):
            model = build(name)
            found: dict = {}
            if title == "ABLATIONS":
                with torch.no_grad():
                    found = {(name, kind): ablations(model, kind) for kind in ("zero", "mean")}
            else:
                found = {(name, *key): attributions(model, *SITES[key]) for key in SITES}
            for key, values in found.items():
                print(f"    ({', '.join(f'{part!r}' for part in key)}): [".replace("'", '"'))
                for row in rows(values):
                    print(f"        {row},")
                print("    ],")
        print("}")


if __name__ == "__main__":
    main()
