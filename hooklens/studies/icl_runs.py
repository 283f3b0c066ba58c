"""The trainings of in-context regression: which models, on which data, with which settings."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hooklens.core.arguments import path_of, real, seed_number, several, whole
from hooklens.core.errors import WrongType, did_you_mean
from hooklens.data.regression import InContextRegression, in_context_regression
from hooklens.model.config import Biases, HookedTransformerConfig, NormalInit, VectorEmbed
from hooklens.model.transformer import HookedTransformer
from hooklens.plugins.algorithmic.task_of_run import kept_checkpoints
from hooklens.pretrained.loading import computing_device
from hooklens.studies.icl_study import ICLStudy, study_in_context
from hooklens.training.loop import train
from hooklens.training.optimizers import AdamW
from hooklens.training.schedules import Cosine
from hooklens.training.training_run import Run, open_run
from hooklens.training.training_settings import Settings

D, SHORTEST, LONGEST, FIXED = 10, 5, 50, 10
_CONTEXT = 4 * LONGEST + 1  # positions have no weights, so that prompts may be longer than those trained on
_GROWING = 0.2  # the share of a run over which the curriculum grows


@dataclass(frozen=True)
class PlannedRun:
    """One training: a name, what it shows, and its sizes. `heads` 0 stands for the six-layer transformer."""

    name: str
    shows: str
    score: str
    heads: int
    steps: int
    batch: int
    lr: float
    clip: float | None = None

    def data(self, steps: int, seed: int) -> InContextRegression:
        """The data: 5 to 50 examples under a curriculum, x from N(0, I); or 10 examples, x uniform."""
        if self.name == FIXED_RUN:
            return in_context_regression(D, FIXED, seed=seed)
        growing = max(1, round(_GROWING * steps))
        return in_context_regression(D, (SHORTEST, LONGEST), inputs="normal", curriculum=growing, seed=seed)

    def model(self, seed: int, device: Any = None) -> HookedTransformer:
        """The untrained model."""
        return raw_attention(self.score, self.heads, seed, device) if self.heads else deep_transformer(seed, device)

    def settings(self, seed: int) -> Settings:
        """How to train."""
        return Settings(
            batch=self.batch,
            optimizer=AdamW(lr=self.lr, betas=(0.9, 0.99), weight_decay=0.0),
            schedule=Cosine(warmup=50),
            loss="squared_error",
            clip=self.clip,
            seed=seed,
            evaluate=20,
        )


FIXED_RUN, TWO_HEADS = "linear, 10 examples", "softmax, two heads"
#: Rates, batches and numbers of steps were searched on short runs. One layer trains without clipping: gradients of long
#: prompts are larger, so that clipping gives them less weight, and the learned rate becomes that of shorter ones.
PLANNED = (
    PlannedRun(FIXED_RUN, "one step at a fixed length", score="linear", heads=1, steps=2000, batch=512, lr=1e-2),
    PlannedRun("linear", "one step for a mixture of lengths", score="linear", heads=1, steps=2500, batch=512, lr=3e-3),
    PlannedRun("softmax", "averages of the answers", score="softmax", heads=1, steps=2500, batch=512, lr=1e-2),
    PlannedRun(TWO_HEADS, "a difference of averages", score="softmax", heads=2, steps=2500, batch=512, lr=1e-2),
    PlannedRun("deep", "six layers", score="softmax", heads=0, steps=6000, batch=64, lr=2e-3, clip=1.0),
)


def raw_attention(score: str, n_heads: int, seed: int = 0, device: Any = None, *, d: int = D) -> HookedTransformer:
    """One layer of attention on the tokens (x, y) as they are: without norms, biases, positions or an MLP.

    >>> model = raw_attention("linear", 1)
    >>> sorted(name for name, weight in model.named_parameters() if weight.requires_grad)[0]
    'blocks.0.attn.k.weight'

    The stream is the token: W_E is the identity, and the prediction is minus the last coordinate, as in the hand-built
    construction. Both are frozen; only W_Q, W_K, W_V and W_O are trained. `d` is the dimension of the points.

    Reference: von Oswald et al. (2023), section 2.
    """
    width = whole("d", d, 1) + 1
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=width,
        d_head=width,
        n_heads=n_heads,
        n_ctx=_CONTEXT,
        d_vocab=1,
        attn_only=True,
        normalization_type=None,
        positional_embedding_type="none",
        mask="none",
        score_fn=score,
        embed=VectorEmbed(d_in=width),
        biases=Biases(qkv=False, o=False, mlp=False),
        init=NormalInit(std=0.1),
        model_name=f"one layer of {score} attention",
    )
    model = HookedTransformer(cfg, seed=seed, device=device)
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(width))
        model.unembed.linear.weight.zero_()
        model.unembed.linear.weight[0, -1] = -1.0
    for frozen in (model.embed.weight, model.unembed.linear.weight):
        frozen.requires_grad_(False)
    return model


def deep_transformer(seed: int = 0, device: Any = None) -> HookedTransformer:
    """Six layers with softmax attention, MLPs and norms, as in GPT-2, that see a prompt as a set of points.

    Garg et al. (2022) train GPT-2 on x and y in tokens of their own with positions and a causal mask. Here a token is a
    point (x, y), without positions or a mask: the order of the examples carries nothing, and one layer less is needed
    to join x and y, which shortens training by far.
    """
    cfg = HookedTransformerConfig(
        n_layers=6,
        d_model=64,
        n_heads=4,
        n_ctx=_CONTEXT,
        d_vocab=1,
        positional_embedding_type="none",
        mask="none",
        embed=VectorEmbed(d_in=D + 1),
        init=NormalInit(residual_scale=True),
        model_name="six layers",
    )
    return HookedTransformer(cfg, seed=seed, device=device)


def train_planned(
    out: str | os.PathLike,
    *,
    names: str | Sequence[str] | None = None,
    seed: int = 0,
    budget: float = 1.0,
    device: Any = None,
    show: bool | None = None,
) -> dict[str, Run]:
    """Train the planned models, each in a folder of its own in `out`; what is there already is resumed or read.

    `budget` scales the numbers of steps. Runs of other seeds and budgets have other folders.
    """
    folder, scale = path_of(out, "out"), real("budget", budget, 1e-6)
    seed_number(seed), computing_device(device)
    runs = {}
    for planned in chosen_runs(names):
        steps = max(2, round(scale * planned.steps))
        where = folder / folder_name(planned.name, seed, steps)
        model, data = planned.model(seed, device), planned.data(steps, seed)
        runs[planned.name] = train(model, data, steps=steps, settings=planned.settings(seed), out=where, show=show)
    return runs


def chosen_runs(names: str | Sequence[str] | None) -> list[PlannedRun]:
    """The planned runs with these names, in their order; all for None.

    >>> [planned.name for planned in chosen_runs(["deep", "linear"])]
    ['linear', 'deep']
    """
    known = [planned.name for planned in PLANNED]
    asked = known if names is None else several("names", names)
    for name in asked:
        if name not in known:
            raise did_you_mean("training of in-context regression", name, known)
    return [planned for planned in PLANNED if planned.name in asked]


def folder_name(name: str, seed: int, steps: int) -> str:
    """The folder of a run.

    >>> folder_name("linear, 10 examples", 1, 300)
    'linear_10_examples_seed_1_steps_300'
    """
    return f"{name.replace(', ', '_').replace(' ', '_')}_seed_{seed}_steps_{steps}"


def study_runs(
    runs: Mapping[str, Run | str | os.PathLike],
    *,
    searched: bool = True,
    tasks: int = 2048,
    seed: int = 0,
    device: Any = None,
) -> ICLStudy:
    """The study of the last models of these runs or folders, as `train_planned` returns them."""
    if not isinstance(runs, Mapping):
        raise WrongType(f"study_runs takes runs by name, as train_planned returns them; got {runs!r:.60}")
    opened = {name: run if isinstance(run, Run) else open_run(run) for name, run in runs.items()}
    models = {name: kept_checkpoints(run)[-1].load(device=device) for name, run in opened.items()}
    model = models.pop(FIXED_RUN, None)
    fixed = None if model is None else (model, in_context_regression(D, FIXED))
    data = in_context_regression(D, (SHORTEST, LONGEST), inputs="normal")
    return study_in_context(models, data, fixed=fixed, searched=searched, tasks=tasks, seed=seed)


def seconds_of(run: Run) -> float:
    """How long the steps of a run took, also if it was resumed in between."""
    return float(run.steps()["seconds"].sum())
