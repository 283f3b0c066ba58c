"""Records TransformerLens 3.9.0's head detector and composition scores, for tests/plugins/heads/test_heads_parity.py.

Run where transformer_lens==3.9.0 is installed, from the repository root:
    python benchmarks/record_heads_parity.py > tests/plugins/heads/recorded_heads.py
"""

import torch
from record_transformer_lens import build
from transformer_lens.head_detector import detect_head

#: The first token occurs nowhere else: there, a duplicate of it would count.
TOKENS = torch.tensor([[0, 5, 2, 7, 3, 5, 2, 7, 3, 5, 9, 2]])
KINDS = {"previous": "previous_token_head", "duplicate": "duplicate_token_head", "induction": "induction_head"}


def detected(name: str, kind: str) -> list:
    model = build(name)
    model.to_tokens = lambda text: TOKENS
    with torch.no_grad():
        return [[round(x, 6) for x in row] for row in detect_head(model, "", KINDS[kind]).tolist()]


def composed(name: str, mode: str) -> list:
    """With the norms' weights folded in: what its scores are usually taken of."""
    model = build(name)
    model.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    with torch.no_grad():
        scores = model.all_composition_scores(mode).flatten(2).flatten(0, 1)
    return [[round(x, 6) for x in row] for row in scores.tolist()]


def main() -> None:
    print('"""What TransformerLens 3.9.0 says of heads; written by benchmarks/record_heads_parity.py."""\n')
    print("# fmt: off")
    print(f"TOKENS = {TOKENS.tolist()}")
    print("# By model and kind: the share of all attention, layer by head.")
    print("DETECTED = {")
    for name in ("learned", "rotary", "attn_only"):
        for kind in KINDS:
            print(f'    ("{name}", "{kind}"): {detected(name, kind)},')
    print("}")
    print("# By model and mode: writers down, readers across.")
    print("COMPOSED = {")
    for name in ("learned", "rotary", "attn_only"):
        for mode in "QKV":
            print(f'    ("{name}", "{mode}"): [')
            for row in composed(name, mode):
                print(f"        {row},")
            print("    ],")
    print("}")


if __name__ == "__main__":
    main()
