"""Records what TransformerLens 3.9.0's HookedTransformer computes, for tests/model/test_transformer_lens.py.

Run where transformer_lens==3.9.0 is installed, from the repository root:
    python benchmarks/record_transformer_lens.py > tests/model/recorded_transformer_lens.py
"""

import sys
from pathlib import Path

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "model"))
from parity import CONFIGS, SIZES, TOKENS, fill, summary


def build(name: str, **flags: bool) -> HookedTransformer:
    config = SIZES | {"normalization_type": None, "seed": 0} | CONFIGS[name]
    if config.get("positional_embedding_type") == "rotary":
        config["rotary_dim"] = config["d_head"]
    model = HookedTransformer(HookedTransformerConfig(**config, **flags))
    with torch.no_grad():
        for weight, p in model.named_parameters():
            p.copy_(fill(weight.replace("._W", ".W").replace("._b", ".b"), tuple(p.shape)))
            if weight.endswith("b_in") and model.cfg.gated_mlp:
                p.zero_()  # there it is added after the product, here before: they agree where models exist, at 0
    return model


def run(model: HookedTransformer) -> tuple[torch.Tensor, dict[str, tuple]]:
    points: dict[str, tuple] = {}

    def keep(act, hook):
        points[hook.name] = (tuple(act.shape), *summary(act))

    with torch.no_grad():
        logits = model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, keep)])
    return logits, points


def record(name: str) -> dict:
    """Logits and every hook point of one configuration; the split inputs, which change ln1's shape there, apart."""
    logits, points = run(build(name, use_attn_result=True, use_hook_mlp_in=True))
    others = run(build(name, use_split_qkv_input=True))[1]
    if "n_key_value_heads" not in CONFIGS[name]:
        others |= run(build(name, use_attn_in=True))[1]
    inputs = {n: v for n, v in others.items() if n.endswith(("_input", "attn_in"))}
    last = [round(x, 6) for x in logits[0, -1, :8].tolist()]
    return {"logits": summary(logits), "last": last, "points": points, "inputs": inputs}


def main() -> None:
    print('"""What TransformerLens 3.9.0 computes; written by benchmarks/record_transformer_lens.py."""\n')
    print("# A point: shape, mean, standard deviation, three entries (parity.summary). In firing order.")
    print("RECORDED = {")
    for name in CONFIGS:
        recorded = record(name)
        print(f'    "{name}": {{')
        print(f'        "logits": {recorded["logits"]},')
        print(f'        "last": {recorded["last"]},')
        for kind in ("points", "inputs"):
            print(f'        "{kind}": {{')
            for point, values in recorded[kind].items():
                print(f'            "{point}": {values},')
            print("        },")
        print("    },")
    print("}")


if __name__ == "__main__":
    main()
