"""Records TransformerLens 3.9.0's direct logit attributions, for tests/plugins/lens/test_logit_attribution_parity.py.

Run where transformer_lens==3.9.0 is installed, from the repository root:
    python benchmarks/record_logit_attribution.py > tests/plugins/lens/recorded_logit_attribution.py

There an attribution leaves out the final norm's weight, so that it is right only where that was folded into W_U: it is
folded here, which changes no logit.
"""

import torch
from record_transformer_lens import build

TOKENS = torch.tensor([[1, 5, 2, 7, 3, 0], [4, 4, 9, 10, 8, 6]])
ANSWER, WRONG_ANSWER = torch.tensor([3, 1]), torch.tensor([7, 2])
UNCHANGED = {"center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}


def rows(values: torch.Tensor) -> list[list[float]]:
    return [[round(x, 6) for x in row] for row in values.T.tolist()]


def record(name: str) -> dict[str, list]:
    """Attributions at the last position, a row a prompt: to the answer's logit, and to the difference."""
    model = build(name)
    model.load_and_process_state_dict(model.state_dict(), fold_ln=True, **UNCHANGED)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        stacks = {
            "components": cache.decompose_resid(pos_slice=-1),
            "heads": cache.stack_head_results(pos_slice=-1),
        }
        if not model.cfg.attn_only:
            stacks["neurons"] = cache.stack_neuron_results(layer=-1, pos_slice=-1)
        found = {}
        for part, stack in stacks.items():
            found[part] = rows(cache.logit_attrs(stack, tokens=ANSWER, pos_slice=-1))
            both = {"tokens": ANSWER, "incorrect_tokens": WRONG_ANSWER}
            found[f"{part} of the difference"] = rows(cache.logit_attrs(stack, **both, pos_slice=-1))
        lens = cache.accumulated_resid(apply_ln=False, incl_mid=False)
        logits = torch.stack([model.unembed(model.ln_final(one)) for one in lens])
    found["lens log prob"] = rows(logits.log_softmax(-1)[:, torch.arange(2), -1, ANSWER])
    return found


def main() -> None:
    print('"""TransformerLens 3.9.0\'s attributions; written by benchmarks/record_logit_attribution.py."""\n')
    print(
        "# By model and part: a row a prompt, at the last position, in its order of components, heads, neurons, layers."
    )
    print("# fmt: off")
    print("RECORDED = {")
    for name in ("learned", "rotary", "attn_only"):
        for part, values in record(name).items():
            print(f'    ("{name}", "{part}"): [')
            for row in values:
                print("        [")
                for i in range(0, len(row), 8):
                    print(f"            {str(row[i : i + 8])[1:-1]},")
                print("        ],")
            print("    ],")
    print("}")


if __name__ == "__main__":
    main()
