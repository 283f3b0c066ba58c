"""How fast is an epoch of the paper's grokking run (p = 113, all 3,830 training pairs)? The bar: 4x TransformerLens.

The peer, version 3.9.0, runs the usual notebook loop: the whole model on the training pairs, cross-entropy in float64
at the last position, backward pass, torch's AdamW; its evaluation of the test pairs after every epoch is left out. It
has the same weights, and runs in a process of its own, between our epochs. Run: python -m benchmarks.modular_epoch
"""

import argparse
import contextlib
import multiprocessing
import statistics
from typing import Any

import torch

import hooklens as hl
from benchmarks.rounds import ratios, write
from benchmarks.training import N_CHECKED, Turns
from hooklens.model.config import Biases
from hooklens.training import AdamW, Constant, CrossEntropy, Settings

THEIRS, BAR = "TransformerLens 3.9.0", 4.0
OPTIMIZER = AdamW(lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=21)
    options.add_argument("--block", type=int, default=3, help="epochs of each contender in a round")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--p", type=int, default=113)
    options.add_argument("--dry", action="store_true", help="print the seconds and write no file")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    data = hl.data.modular_arithmetic(chosen.p)
    peer = PeerProcess(chosen.p)
    settings = Settings(
        batch=chosen.p**2,
        optimizer=OPTIMIZER,
        schedule=Constant(warmup=10),
        loss=CrossEntropy(double=True),
        evaluate=1,
        checkpoints=1,
    )
    turns = Turns(peer, name=THEIRS, block=chosen.block)
    turns.train(model_of(chosen.p), data, settings, chosen.rounds)
    peer.close()
    seconds = {who: [each / chosen.block for each in blocks] for who, blocks in turns.seconds.items()}
    faster = ratios(seconds, THEIRS, "hooklens")
    rows: list[dict[str, Any]] = [
        {"who": who, "median ms of an epoch": 1000 * statistics.median(each)} for who, each in seconds.items()
    ]
    rows[0] |= {"times faster": "than " + THEIRS} | faster | {"bar": BAR}
    checked = list(zip(turns.losses[:N_CHECKED], peer.losses[:N_CHECKED], strict=True))
    gap = max(abs(ours - theirs) for ours, theirs in checked)
    print(f"the first {N_CHECKED} losses differ by at most {gap:.2g} nats")
    if chosen.dry:
        print(*rows, sep="\n")
    else:
        write("modular_epoch", "An epoch of modular addition", rows, {"seconds": seconds, "losses": checked})


def model_of(p: int) -> hl.HookedTransformer:
    """The paper's model."""
    cfg = hl.HookedTransformerConfig(
        n_layers=1,
        d_model=128,
        n_heads=4,
        d_head=32,
        d_mlp=512,
        act_fn="relu",
        normalization_type=None,
        n_ctx=3,
        d_vocab=p + 1,
        biases=Biases(qkv=False, o=False, mlp=True, unembed=False),
    )
    return hl.HookedTransformer(cfg, seed=0)


class PeerProcess:
    """The peer in a process of its own, with the allocator of its users."""

    def __init__(self, p: int):
        context = multiprocessing.get_context("spawn")
        self.connection, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, p, torch.get_num_threads()), daemon=True)
        self.process.start()
        far.close()  # so that a peer that fails ends this process too
        self.losses = [self.connection.recv()]

    def __call__(self) -> None:
        self.connection.send("epoch")
        self.losses.append(self.connection.recv())

    def close(self) -> None:
        self.connection.close()
        self.process.join(10)


def _serve(connection: Any, p: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model, data = model_of(p), hl.data.modular_arithmetic(p)
    peer, batch = their_model(model), data.batch(0, p**2)
    tokens, answers = batch.inputs, batch.targets[:, -1]
    trained = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIMIZER.lr, betas=(0.9, 0.98), weight_decay=OPTIMIZER.weight_decay)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1))

    def epoch() -> float:
        logits = peer(tokens)[:, -1].double()
        loss = -logits.log_softmax(-1).gather(-1, answers[:, None]).mean()
        loss.backward()
        optimizer.step()
        warm_up.step()
        optimizer.zero_grad()
        return float(loss)

    connection.send(epoch())
    with contextlib.suppress(EOFError):
        while connection.recv() == "epoch":
            connection.send(epoch())


def their_model(model: hl.HookedTransformer) -> Any:
    """TransformerLens's HookedTransformer with these weights; the biases that ours lacks are zero and frozen."""
    from transformer_lens import HookedTransformer as Theirs
    from transformer_lens import HookedTransformerConfig as TheirConfig

    cfg = model.cfg
    fields = ("n_layers", "d_model", "n_ctx", "n_heads", "d_head", "d_mlp", "d_vocab", "d_vocab_out", "act_fn")
    peer = Theirs(TheirConfig(**{name: getattr(cfg, name) for name in fields}, normalization_type=None, device="cpu"))
    block = model.blocks[0]
    state = {"embed.W_E": model.W_E, "pos_embed.W_pos": model.W_pos, "unembed.W_U": model.W_U}
    state |= {f"blocks.0.attn.{name}": getattr(block.attn, name) for name in ("W_Q", "W_K", "W_V", "W_O")}
    state |= {f"blocks.0.mlp.{name}": getattr(block.mlp, name) for name in ("W_in", "W_out", "b_in", "b_out")}
    peer.load_state_dict({name: value.detach().clone() for name, value in state.items()}, strict=False)
    for name, parameter in peer.named_parameters():
        if ".b_" in name and name not in state:
            parameter.data.zero_()
            parameter.requires_grad_(False)
    return peer


if __name__ == "__main__":
    main()
