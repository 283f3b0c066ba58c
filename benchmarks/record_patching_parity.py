"""Records what TransformerLens 3.9.0's patching functions return, for tests/sweeps/test_patching_parity.py.

Run where transformer_lens==3.9.0 is installed, from the repository root:
    python benchmarks/record_patching_parity.py > tests/sweeps/recorded_patching.py
"""

import torch
from record_transformer_lens import build
from transformer_lens import patching

CLEAN = torch.tensor([[1, 5, 2, 7, 3, 0], [4, 4, 9, 10, 8, 6]])
CORRUPTED = torch.tensor([[1, 5, 6, 7, 3, 0], [4, 2, 9, 10, 1, 6]])
#: By our site and grid: the function of TransformerLens.
FUNCTIONS = {
    ("resid_pre", "layer x pos"): patching.get_act_patch_resid_pre,
    ("attn_out", "layer x pos"): patching.get_act_patch_attn_out,
    ("mlp_out", "layer x pos"): patching.get_act_patch_mlp_out,
    ("z", "layer x head"): patching.get_act_patch_attn_head_out_all_pos,
    ("q", "layer x head"): patching.get_act_patch_attn_head_q_all_pos,
    ("v", "layer x head x pos"): patching.get_act_patch_attn_head_v_by_pos,
    ("pattern", "layer x head"): patching.get_act_patch_attn_head_pattern_all_pos,
}


def metric(logits):
    """Mean over the pairs of logit 3 minus logit 7, at the last position."""
    return (logits[:, -1, 3] - logits[:, -1, 7]).mean()


def record(name: str, site: str, by: str) -> list:
    model = build(name)
    with torch.no_grad():
        cache = model.run_with_cache(CLEAN)[1]
        values = FUNCTIONS[site, by](model, CORRUPTED, cache, metric)
    if by == "layer x head x pos":  # there: layer, position, head
        values = values.transpose(1, 2)
    return [[round(x, 6) for x in row] for row in values.flatten(0, -2).tolist()]


def main() -> None:
    print('"""What TransformerLens 3.9.0\'s patching returns; written by benchmarks/record_patching_parity.py."""\n')
    print("# By model, site and grid: rows of the last axis, in order.")
    print("# fmt: off")
    print("RECORDED = {")
    for name in ("learned", "rotary", "attn_only"):
        for site, by in FUNCTIONS:
            if (name, site) in (("attn_only", "mlp_out"), ("rotary", "v")):
                continue  # no MLP; and grouped values are repeated for their heads there
            print(f'    ("{name}", "{site}", "{by}"): [')
            for row in record(name, site, by):
                print(f"        {row},")
            print("    ],")
    print("}")


if __name__ == "__main__":
    main()
