"""Records steering and directional ablation by TransformerLens 3.9.0's hooks, for tests/plugins/steering.

It has no steering of its own: these are hooks as its users write them.

Run where transformer_lens==3.9.0 is installed, from the repository root:
    python benchmarks/record_steering.py > tests/plugins/steering/recorded_steering.py
"""

import sys
import textwrap
from pathlib import Path

import torch
from record_transformer_lens import build

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "model"))
from parity import CONFIGS, TOKENS, fill

#: By site: the point, and whether a vector there is one a head.
SITES = {"resid_post": ("hook_resid_post", False), "mlp_out": ("hook_mlp_out", False), "z": ("attn.hook_z", True)}
COEFFICIENT, LAYER, FIRST = 1.5, 1, 2


def added(model, name: str, site: str) -> torch.Tensor:
    """Logits with the direction added at one layer, from position FIRST on."""
    point, per_head = SITES[site]
    shape = (model.cfg.n_heads, model.cfg.d_head) if per_head else (model.cfg.d_model,)
    vector = fill(f"steer.{name}.{site}", shape)

    def add(act, hook):
        act[:, FIRST:] += COEFFICIENT * vector
        return act

    return model.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.{LAYER}.{point}", add)])


def ablated(model, name: str) -> torch.Tensor:
    """Logits with a direction projected out of the stream at every layer."""
    unit = torch.nn.functional.normalize(fill(f"steer.{name}.ablated", (model.cfg.d_model,)), dim=0)

    def remove(act, hook):
        return act - (act @ unit)[..., None] * unit

    return model.run_with_hooks(TOKENS, fwd_hooks=[(lambda point: "hook_resid_" in point, remove)])


def main() -> None:
    print('"""Steering by hooks of TransformerLens 3.9.0; written by benchmarks/record_steering.py."""\n')
    print("# By model and site: the logits of the last position, a row a prompt.")
    print("# fmt: off")
    print("LOGITS = {")
    for name in CONFIGS:
        model = build(name)
        with torch.no_grad():
            found = {s: added(model, name, s) for s in SITES if s != "mlp_out" or not model.cfg.attn_only}
            found["ablated"] = ablated(model, name)
        for site, logits in found.items():
            print(f'    ("{name}", "{site}"): [')
            for row in logits[:, -1].tolist():
                numbers = ", ".join(str(round(x, 6)) for x in row)
                print(textwrap.fill(f"[{numbers}],", 118, initial_indent=" " * 8, subsequent_indent=" " * 9))
            print("    ],")
    print("}")


if __name__ == "__main__":
    main()
