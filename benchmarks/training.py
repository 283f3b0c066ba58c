"""What does recording a run cost, and how fast is a training step?

The bars: 10 % of a step, 1.0x transformers, 0.6x TransformerLens 3.9.0. Recording: `hl.train` against the same steps
without its record, on a model of width 128 and 4 layers, 16 x 64 tokens; a block of steps holds one evaluation of 64
windows. Steps: GPT-2-small shape, the same weights, 2 x 128 tokens, float32, AdamW. TransformerLens does not tie the
unembedding to the embedding, and so trains 39 million parameters more. Each peer steps in a process of its own, between
our steps. Run: python -m benchmarks.training
"""

import argparse
import contextlib
import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

import hooklens as hl
from benchmarks import peers
from benchmarks.rounds import ratios, write
from hooklens.data.batches import Batch, TrainingData, next_token_batch
from hooklens.training import AdamW, Settings
from hooklens.training.parameter_vector import ParameterVector

OPTIMIZER = AdamW(lr=1e-4)
RECORDING, HUGGING_FACE, TRANSFORMER_LENS = 1.1, 1.0, 0.6  # the bars, as ratios of time
N_CHECKED = 4  # steps whose losses are compared between the contenders


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument(
        "--block", type=int, default=40, help="steps between two evaluations, where recording is timed"
    )
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--fused", action="store_true", help="the peers use torch's fused AdamW")
    options.add_argument("--dry", action="store_true", help="print the seconds and write no file")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    rows, raw = recording(chosen.rounds, chosen.block)
    for part in steps(chosen.rounds, chosen.fused):
        rows, raw = rows + part[0], raw | part[1]
    if chosen.dry:
        print(*rows, sep="\n")
    else:
        write("training", "Recording a run, and a training step", rows, raw)


@dataclass(frozen=True)
class RandomTokens(TrainingData):
    """Windows of random tokens: what they say does not change what a step costs."""

    d_vocab: int
    window: int
    evaluated: int

    def batch(self, step: int, size: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        return next_token_batch(torch.randint(self.d_vocab, (size, self.window + 1), generator=generator))

    def held_out(self, size: int) -> Iterator[Batch]:
        for start in range(0, self.evaluated, size):
            yield self.batch(2**40 + start, min(size, self.evaluated - start))

    def description(self) -> str:
        return "nothing: random tokens"

    def identity(self) -> dict[str, Any]:
        return {"task": "random tokens", "d_vocab": self.d_vocab, "window": self.window, "evaluated": self.evaluated}


class Turns:
    """Blocks of steps of `hl.train` and of another contender take turns: the other one runs between two steps.

    No second thread trains: the idle workers of its pool would take the processor from the first.
    """

    def __init__(self, other: Callable[[], None], *, name: str, block: int):
        self.other, self.name, self.block = other, name, block
        self.losses: list[float] = []
        self.seconds: dict[str, list[float]] = {"hooklens": [], name: []}
        self._began, self.timed = 0.0, 0

    def train(self, model: Any, data: TrainingData, settings: Settings, rounds: int) -> None:
        """The first block of both warms up and is not timed; nor is the last, at whose end the run is written."""
        self.timed = (rounds + 1) * self.block
        hl.train(model, data, steps=(rounds + 2) * self.block, settings=settings, after_step=self._after, show=False)

    def _after(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if step % self.block:
            return
        ended = time.perf_counter()
        for _ in range(self.block):
            self.other()
        if self.block < step <= self.timed:
            self.seconds["hooklens"].append(ended - self._began)
            self.seconds[self.name].append(time.perf_counter() - ended)
        self._began = time.perf_counter()


class Unrecorded:
    """The same steps without a record: batch, forward and backward pass, optimiser."""

    def __init__(self, model: Any, data: TrainingData, settings: Settings):
        self.model, self.data, self.settings = model, data, settings
        self.vector, self.t = ParameterVector(model), 0
        self.grads = torch.zeros_like(self.vector.values)
        self.slots = {name: torch.zeros_like(self.vector.values) for name in settings.optimizer.kept}
        self.spans = list(self.vector.slices.values())
        self()

    def __call__(self) -> None:
        batch = self.data.batch(self.t, self.settings.batch)
        output = self.model(batch.inputs)
        self.settings.loss(output[batch.counts], batch.targets[batch.counts]).mean().backward()
        self.vector.gather_gradients(self.grads)
        self.t += 1
        rate = self.settings.optimizer.lr
        self.settings.optimizer.step(self.vector.values, self.grads, self.slots, t=self.t, rate=rate, spans=self.spans)


class Peer:
    """A step of another library's model with torch's AdamW."""

    def __init__(self, logits: Callable[[Any], Any], module: torch.nn.Module, data: TrainingData, fused: bool):
        self.logits, self.data = logits, data
        self.optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=OPTIMIZER.lr,
            betas=(OPTIMIZER.betas[0], OPTIMIZER.betas[1]),
            eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
            fused=fused,
        )
        self.losses: list[float] = []
        self()

    def __call__(self) -> None:
        batch = self.data.batch(len(self.losses), 2)
        loss = cross_entropy(self.logits(batch.inputs).flatten(0, 1), batch.targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))


def recording(rounds: int, block: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    cfg = hl.HookedTransformerConfig(n_layers=4, d_model=128, n_heads=4, n_ctx=64, d_vocab=80)
    data = RandomTokens(80, 64, evaluated=64)
    settings = Settings(batch=16, optimizer=OPTIMIZER, schedule="constant", evaluate=rounds + 2)
    turns = Turns(Unrecorded(hl.HookedTransformer(cfg), data, settings), name="not recorded", block=block)
    turns.train(hl.HookedTransformer(cfg), data, settings, rounds)
    row = {"what": f"{block} steps and 1 evaluation", "bar": RECORDING}
    return table(turns.seconds, {"hooklens": ("not recorded", row)}), {"recording": turns.seconds}


class PeerProcess:
    """A peer in a process of its own, with the allocator of its users; `hl.train` changes that of its process."""

    def __init__(self, name: str, fused: bool):
        context = multiprocessing.get_context("spawn")
        self.connection, far = context.Pipe()
        arguments = (far, name, fused, torch.get_num_threads())
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        self.gap = self.connection.recv()
        self.losses = [self.connection.recv()]

    def __call__(self) -> None:
        self.connection.send("step")
        self.losses.append(self.connection.recv())

    def close(self) -> None:
        self.connection.close()
        self.process.join(10)


def _serve(connection: Any, name: str, fused: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    model = peers.ours()
    module = PEERS[name].build(model)
    data = RandomTokens(peers.SIZES["d_vocab"], 128, evaluated=2)
    with torch.no_grad():
        tokens = data.batch(0, 2).inputs
        connection.send(float((logits_of(name, module)(tokens) - model(tokens)).abs().max()))
    del model
    peer = Peer(logits_of(name, module), module, data, fused)
    connection.send(peer.losses[-1])
    with contextlib.suppress(EOFError):
        while connection.recv() == "step":
            peer()
            connection.send(peer.losses[-1])


class Known(NamedTuple):
    package: str
    build: Callable[[Any], Any]
    bar: float


PEERS = {
    "transformers": Known("transformers", peers.hugging_face, HUGGING_FACE),
    "TransformerLens": Known("transformer_lens", peers.transformer_lens, TRANSFORMER_LENS),
}


def steps(rounds: int, fused: bool) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Against each peer that is installed, so that two models are in memory at a time."""
    data = RandomTokens(peers.SIZES["d_vocab"], 128, evaluated=2)
    for name, known in PEERS.items():
        if importlib.util.find_spec(known.package) is None:
            print(f"{name} is not installed and is left out")
            continue
        peer = PeerProcess(name, fused)
        settings = Settings(batch=2, optimizer=OPTIMIZER, schedule="constant", evaluate=1, checkpoints=1)
        turns = Turns(peer, name=name, block=1)
        turns.train(peers.ours(), data, settings, rounds)
        peer.close()
        checked = [(a, b) for a, b in zip(turns.losses[:N_CHECKED], peer.losses[:N_CHECKED], strict=True)]
        row = {"what": "a step, GPT-2-small shape", "bar": known.bar}
        raw = {"seconds": turns.seconds, "largest logit difference": peer.gap, "losses": checked, "fused": fused}
        yield table(turns.seconds, {"hooklens": (name, row)}), {name: raw}


def logits_of(name: str, module: Any) -> Callable[[Any], Any]:
    """A function from tokens to logits, in the mode in which no dropout acts."""
    if name == "transformers":
        return lambda tokens: module(tokens, use_cache=False).logits
    return module


def table(seconds: dict[str, list[float]], against: dict[str, tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    for who, each in seconds.items():
        row: dict[str, Any] = {"what": "", "who": who, "median ms": 1000 * statistics.median(each)}
        if who in against:
            other, more = against[who]
            row |= {"ratio to": other} | ratios(seconds, who, other) | more
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
