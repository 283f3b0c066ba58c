"""Values and models that cannot be trained with: each is refused before anything is written, and says what works."""

import sys

import numpy as np
import pytest
import torch
from refused import refused
from torch import nn

from hooklens.core.errors import HooklensError, InputError
from hooklens.data.batches import Batch
from hooklens.data.modular import Modular, modular_arithmetic
from hooklens.model.config import part
from hooklens.testing import tiny_model
from hooklens.training.loop import train
from hooklens.training.optimizers import SGD, Adam, AdamW, Grokfast
from hooklens.training.schedules import Constant, Cosine, Steps
from hooklens.training.training_settings import Settings

DATA = modular_arithmetic(p=5, fraction=0.8)
SETTINGS = Settings(batch=4, evaluate=2, checkpoints=3, schedule="constant")


def model(**changes):
    return tiny_model(**{"d_vocab": DATA.d_vocab} | changes)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"clip": "x"}, "clip bounds the gradient's norm: a finite number above 0, or None for no bound; got 'x'"),
        ({"clip": float("inf")}, "got inf"),
        ({"clip": True}, "got True"),
        ({"optimizer": None}, "optimizer is a part of hl.training or its name, and not None"),
        ({"optimizer": 3}, "optimizer takes a part as an instance, a name, or a dict"),
        ({"snapshots": [3]}, r"snapshots is a list whose entries are names.*got \[3\]"),
        ({"snapshots": ("pattern", 0)}, r'such as \["pattern", 0, 1\]; got'),
        ({"snapshots": [["pattern", 0, "a"]]}, "snapshots is a list"),
        (
            {"snapshot_prompts": "abc"},
            "snapshot_prompts is a number of rows of the held-out data, or a list of prompts",
        ),
        ({"snapshot_prompts": [1, 2]}, r"each a list of token ids such as \[\[1, 2, 3\]\]; got \[1, 2\]"),
    ],
)
def test_a_setting_of_a_wrong_type_names_itself_and_what_works(settings, says):
    with refused(HooklensError, says):
        Settings(**settings)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SGD(lr=-1.0), "lr is -1.0; a finite number of at least 0"),
        (lambda: Adam(lr=1e20), r"Adam: lr is 1e\+20; a finite number from 0 to 1e\+12 .* from 1e-5 to 1 are usual"),
        (lambda: Grokfast(inner=SGD(lr=2e12)), "SGD: lr is 2000000000000.0; a finite number from 0 to"),
        (lambda: AdamW(weight_decay=-0.1), "weight_decay is -0.1; a finite number of at least 0"),
        (lambda: SGD(momentum=1.5), "momentum is 1.5; a finite number from 0 to below 1"),
        (lambda: Grokfast(decay=2.0), "decay is 2.0; a finite number from 0 to below 1"),
        (lambda: Constant(warmup=-3), "warmup is -3; a whole number of at least 0"),
        (lambda: Cosine(floor=-1.0), "floor is -1.0"),
        (lambda: Steps(at=(500.0, 1000.0)), "at holds fractions of the run, from 0 to 1"),
        (lambda: part("optimizer", {"part": "adam", "betas": 0.9}), "betas is 0.9; a tuple of numbers is needed"),
        (lambda: part("schedule", {"part": "steps", "at": 0.5}), "at is 0.5; a tuple of numbers is needed"),
    ],
)
def test_a_part_out_of_its_range_is_refused(make, says):
    with refused(InputError, says):
        make()
    assert Adam(betas=(0.9, 0.99)).betas == (0.9, 0.99) and SGD(lr=0.0).lr == 0


@pytest.mark.skipif("beartype" in sys.modules, reason="executed annotations ask for Python's numbers")
def test_numbers_of_numpy_are_numbers(tmp_path):
    optimizer = AdamW(lr=np.float32(1e-3))
    prompts = np.array([[1, 2]])
    settings = Settings(
        batch=np.int64(4), seed=np.int64(1), optimizer=optimizer, snapshots=["pattern"], snapshot_prompts=prompts
    )
    run = train(model(), DATA, steps=np.int64(3), out=tmp_path / "run", settings=settings)
    assert run.identity["steps"] == 3 and run.snapshots().prompts == [[1, 2]]
    assert train(model(), DATA, steps=3, out=tmp_path / "run", settings=settings).steps_done == 3


class Adapted(nn.Module):
    """A linear map with a low-rank addition, as adapters have it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.low = inner, nn.Parameter(torch.zeros(2, 2))

    def forward(self, x):
        return self.inner(x)


def adapted():
    with_adapter = model()
    with_adapter.blocks[0].mlp.out = Adapted(with_adapter.blocks[0].mlp.out)
    return with_adapter


def tied_by_hand():
    tied = model()
    tied.blocks[1].attn.q.weight = tied.blocks[0].attn.q.weight
    return tied


def built_for_inference():
    with torch.inference_mode():
        return model()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: model(dtype=torch.float16),
            r"float16.*call model.float\(\), and give precision=.bfloat16",
        ),
        (lambda: model().requires_grad_(False), r"nothing to train.*call model.requires_grad_\(\)"),
        (adapted, "hl.train needs a model with exactly the parameters of its configuration.*merge adapters"),
        (tied_by_hand, "blocks.1.attn.q.weight; .*tie the weights that cfg declares as tied"),
        (built_for_inference, r"built under torch.inference_mode\(\).*build or load it outside"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_before_the_folder_is_made(tmp_path, make, says):
    with refused(HooklensError, says):
        train(make(), DATA, steps=2, out=tmp_path / "run", settings=SETTINGS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("after_step", "says"), [(3, r"a function of \(step, loss\), got 3"), (lambda: 1, "too many")])
def test_what_is_called_after_a_step_is_checked_before_the_first(tmp_path, after_step, says):
    with refused(InputError, says):
        train(model(), DATA, steps=2, out=tmp_path / "run", settings=SETTINGS, after_step=after_step)
    assert not (tmp_path / "run").exists()


class Uncounted(Modular):
    """The task with other marks of what counts, or another target."""

    def batch(self, step, size):
        batch = super().batch(step, size)
        if self.seed == 1:
            return Batch(batch.inputs, batch.targets, torch.zeros_like(batch.counts))
        return Batch(batch.inputs, torch.full_like(batch.targets, -100), batch.counts)


@pytest.mark.parametrize(("seed", "says"), [(1, "no target that counts"), (2, "the target -100; `counts` is True")])
def test_targets_that_cannot_be_predicted_are_refused(seed, says):
    with pytest.raises(InputError, match=says):
        train(model(), Uncounted(5, "+", 0.8, seed), steps=1, settings=SETTINGS)


def test_gradients_that_are_turned_off_around_the_call_do_not_matter(tmp_path):
    """Notebooks of this field begin with torch.set_grad_enabled(False)."""
    before = train(model(), DATA, steps=2, out=tmp_path / "before", settings=SETTINGS).loss
    with torch.no_grad():
        assert (train(model(), DATA, steps=2, out=tmp_path / "off", settings=SETTINGS).loss == before).all()
        assert not torch.is_grad_enabled()
    with torch.inference_mode(), pytest.raises(InputError, match="call it outside that block"):
        train(model(), DATA, steps=2, out=tmp_path / "inference", settings=SETTINGS)


def test_dropout_masks_do_not_depend_on_the_default_dtype(tmp_path):
    trained, other = model(dropout=0.3), model(dropout=0.3)
    before = train(trained, DATA, steps=2, out=tmp_path / "single", settings=SETTINGS).loss
    torch.set_default_dtype(torch.float64)
    try:
        after = train(other, DATA, steps=2, out=tmp_path / "double", settings=SETTINGS).loss
    finally:
        torch.set_default_dtype(torch.float32)
    assert (before == after).all()


def test_open_hooks_act_belong_to_the_run_and_stay(tmp_path):
    hooked = model()
    plain = train(model(), DATA, steps=2, out=tmp_path / "plain", settings=SETTINGS)
    with hooked.hooks([(("z", 0), lambda z, hook: z * 0)]):
        run = train(hooked, DATA, steps=2, out=tmp_path / "run", settings=SETTINGS)
    assert run.identity["hooked"] == ["blocks.0.attn.hook_z"] and "hooked" not in plain.identity
    assert run.loss[0] != plain.loss[0]
    with pytest.raises(InputError, match=r"hooked was \['blocks.0.attn.hook_z'\] and is None"):
        train(model(), DATA, steps=2, out=tmp_path / "run", settings=SETTINGS)
    assert not any(point.handles for point in hooked.hook_points().values())


def test_random_numbers_drawn_between_steps_change_nothing(tmp_path):
    def draw(step, loss):
        torch.manual_seed(step)
        np.random.seed(step)

    runs = [
        train(model(dropout=0.2), DATA, steps=3, out=tmp_path / str(i), settings=SETTINGS, after_step=hook)
        for i, hook in enumerate((None, draw))
    ]
    assert (runs[0].loss == runs[1].loss).all()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    train(model(dropout=0.2), DATA, steps=3, out=tmp_path / "other", settings=SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)


def clamp(model):
    weight = model.blocks[0].mlp.out.weight
    weight.data = weight.data.clamp(-1, 1)


def replace(model):
    layer = model.blocks[0].mlp.out
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())


@pytest.mark.parametrize(
    "change", [clamp, replace, lambda model: model.double(), lambda model: model.requires_grad_(False)]
)
def test_parameters_that_are_replaced_between_steps_stop_the_run(change):
    data = modular_arithmetic(p=5, fraction=0.8)
    model = tiny_model(d_vocab=data.d_vocab)
    with pytest.raises(InputError, match=r"after step 1, .* is no longer the parameter that is trained"):
        train(model, data, steps=3, settings=Settings(batch=4), after_step=lambda step, loss: change(model))


def test_parameters_may_be_changed_in_place_between_steps():
    data = modular_arithmetic(p=5, fraction=0.8)
    model = tiny_model(d_vocab=data.d_vocab)
    weight = model.blocks[0].mlp.out.weight
    train(model, data, steps=3, settings=Settings(batch=4), after_step=lambda *_: weight.data.clamp_(-0.01, 0.01))
    assert float(weight.detach().abs().max()) <= 0.01
