"""Does the layer x head x position sweep give TransformerLens's numbers? One in `PART` of 2,880 patches is compared.

Needs transformer-lens==3.9.0. Run: python -m benchmarks.sweeps_same_numbers
"""

import torch

import hooklens as hl
from benchmarks import peers
from benchmarks.rounds import write
from benchmarks.sweeps import RIGHT, WRONG, prompts, theirs

PART = 24


def main() -> None:
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    model = peers.ours()
    clean, second, _ = prompts()
    metric = hl.logit_diff(model, answer=RIGHT, wrong_answer=WRONG)
    by = "layer x head x pos"
    ours = hl.patch(model, clean, second, metric, site="z", by=by).values.permute(0, 2, 1).reshape(-1)[::PART]
    peer = theirs(peers.transformer_lens(model), clean, second, by, PART).reshape(-1)
    largest = float((ours - peer).abs().max())
    rows = [{"patches compared": len(peer), "largest difference": f"{largest:.1e}", "bar": "1e-4"}]
    raw = {"hooklens": ours.tolist(), "TransformerLens 3.9.0": peer.tolist()}
    write("sweeps_same_numbers", "z by layer, head and position: the same numbers", rows, raw)


if __name__ == "__main__":
    main()
