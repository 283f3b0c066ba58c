"""The tuned lens: zero is the logit lens, held-out KL falls at every layer, an interrupted run ends as a whole one."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch
from model.zoo import TOKENS, zoo_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from hooklens.core.errors import FileRefused, InputError
from hooklens.plugins.lens import training
from hooklens.plugins.lens.affine_lens import TunedLens, TunedLensTraining, fit_tuned_lens, train_tuned_lens, tuned_lens
from hooklens.plugins.lens.layer_lens import logit_lens
from hooklens.plugins.lens.reading import streams_of
from hooklens.testing import tiny_model

module = import_module("hooklens.plugins.lens.affine_lens")  # the package has a function of that name

WINDOWS = torch.randint(11, (16, 6), generator=torch.Generator().manual_seed(0))
QUICK = {"steps": 6, "lr": 0.02, "batch": 2}


def same_lens(a, b):
    return torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "neox", "post", "bidirectional"])
def test_an_untrained_lens_is_the_logit_lens(name):
    model = zoo_model(name)
    plain, tuned = logit_lens(model, TOKENS), tuned_lens(model, TOKENS, TunedLens(2, 8))
    for field in ("top_log_probs", "rank", "kl", "entropy", "control_ranks"):
        torch.testing.assert_close(getattr(tuned, field), getattr(plain, field), equal_nan=True)
    assert (plain.lens, tuned.lens) == ("logit lens", "tuned lens")


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "post", "attn_only"])
def test_held_out_kl_falls_at_every_layer(name):
    """`after` is what `tuned_lens` reads, and the last row stays the model's."""
    model = zoo_model(name, n_layers=3, **({"mask": "causal"} if name == "gemma2" else {}))
    windows = torch.randint(11, (60, 8), generator=torch.Generator().manual_seed(0))
    lens, found = train_tuned_lens(model, windows, steps=30, lr=0.02, batch=8)
    assert bool((found.fall > 0).all()) and bool((found.fall_interval()[0] > 0).all())
    assert found.before.shape == found.after.shape == (8, 3) and found.loss.shape == (30, 3)
    reading = tuned_lens(model, windows[-8:], lens)
    torch.testing.assert_close(reading.kl[:-1].mean(-1).T, found.after, atol=1e-5, rtol=1e-4)
    plain = logit_lens(model, windows[-8:])
    torch.testing.assert_close(plain.kl[:-1].mean(-1).T, found.before, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(reading.top_log_probs[-1], plain.top_log_probs[-1])


@pytest.mark.parametrize("name", ["llama", "neox", "gemma2", "post"])
def test_so_it_does_in_closed_form_and_training_goes_on_from_there(name):
    model = zoo_model(name, n_layers=3, **({"mask": "causal"} if name == "gemma2" else {}))
    windows = torch.randint(11, (60, 8), generator=torch.Generator().manual_seed(0))
    lens, fit = fit_tuned_lens(model, windows)
    assert bool((fit.fall > 0).all()) and fit.loss.shape == (0, 3)
    state = training.begin(model, windows, lens)
    torch.testing.assert_close(state.lens().weight, lens.weight)
    torch.testing.assert_close(state.lens().bias, lens.bias)
    _, trained = train_tuned_lens(model, windows, start=lens, steps=10, lr=2e-3, batch=8)
    assert torch.equal(trained.before, fit.before)
    assert float(trained.after.mean()) < float(fit.after.mean())


def test_the_closed_form_is_the_ridge_regression_of_the_last_stream():
    """Solved here from the rows themselves, the ridge as rows of its own."""
    model = zoo_model("llama", dtype=torch.float64)
    windows = torch.randint(11, (30, 8), generator=torch.Generator().manual_seed(0))
    lens, _ = fit_tuned_lens(model, windows)
    streams = streams_of(model, windows[:26]).flatten(1, 2)
    weight = 1 / streams[-1].square().mean(-1, keepdim=True).sqrt()
    for layer, x in enumerate(streams[:-1]):
        size = x.square().mean(-1).sqrt().median()
        rows = torch.cat([x, size.expand(len(x), 1)], 1) * weight
        ridge = torch.diag((0.01 * rows.square().sum(0)).sqrt())
        wanted = torch.cat([(streams[-1] - x) * weight, torch.zeros(9, 8, dtype=torch.float64)])
        maps = torch.linalg.lstsq(torch.cat([rows, ridge]), wanted).solution
        torch.testing.assert_close(lens.weight[layer].detach(), maps[:-1], atol=1e-8, rtol=1e-6)
        torch.testing.assert_close(lens.bias[layer].detach(), size * maps[-1], atol=1e-8, rtol=1e-6)


def by_autograd(model, state, tokens):
    """The same gradients, all at once."""
    streams = streams_of(model, tokens).flatten(1, 2)
    target = model.read_out(streams[-1:])[0].softmax(-1).detach()
    maps = state.maps.clone().requires_grad_()
    found = []
    for layer, x in enumerate(streams[:-1]):
        read = x + x @ maps[layer, :-1] + state.size[layer] * maps[layer, -1]
        lens = model.read_out(read[None])[0].log_softmax(-1)
        found.append(F.kl_div(lens, target, reduction="batchmean"))
    (grads,) = torch.autograd.grad(torch.stack(found).sum(), maps)
    return grads, torch.stack(found).detach()


class Wrapped(nn.Module):
    """A linear layer inside another module, as LoRA wraps one."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.bias = linear, linear.bias

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "gpt2_bias_everywhere", "gemma2", "no_norm"])
def test_gradients_by_hand_are_those_of_autograd(name, wrapped, monkeypatch):
    model = zoo_model(name, dtype=torch.float64, tie_word_embeddings=False)
    if wrapped:
        model.unembed.linear = Wrapped(model.unembed.linear)
    state = training.begin(model, WINDOWS)
    noise = torch.randn(state.maps.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = training.replace(state, maps=0.2 * noise)
    expected = by_autograd(model, state, WINDOWS[:4])
    for logits_at_once in (2**20, 50):
        monkeypatch.setattr(training, "_LOGITS_AT_ONCE", logits_at_once)
        for ours, theirs in zip(training.gradients(model, state, WINDOWS[:4]), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_steps_are_those_of_torchs_adam():
    state = training.begin(tiny_model(dtype=torch.float64), WINDOWS)
    p = nn.Parameter(state.maps.clone())
    adam = torch.optim.Adam([p], lr=0.1, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        adam.step()
        state = training.advanced(state, p.grad, p.grad[:, 0, 0], 0.1)
    torch.testing.assert_close(state.maps, p.detach(), atol=1e-12, rtol=1e-10)


def interrupt_after(model, forwards, error=KeyboardInterrupt):
    """A hook that raises in one of the forward passes to come."""
    seen = []

    def count(x, hook):
        seen.append(1)
        if len(seen) == forwards:
            raise error

    return model.hooks(fwd_hooks=[("hook_embed", count)])


def test_an_interrupted_run_ends_with_the_bits_of_a_whole_one(tmp_path):
    model, path = tiny_model(), tmp_path / "lens.safetensors"
    whole, expected = train_tuned_lens(model, WINDOWS, **QUICK)
    for forwards in (21, 2):  # 1 to begin, 1 held-out, 14 + 2 of the constant; then the steps, and the same again
        with interrupt_after(model, forwards), pytest.raises(KeyboardInterrupt):
            train_tuned_lens(model, WINDOWS, **QUICK, path=path)
        done = len(load_file(path)["loss"])
        assert 0 < done < 6
        partial = TunedLens.load(path)  # usable as it is
        assert bool((partial.weight != 0).any()) and not same_lens(partial, whole)
        tuned_lens(model, TOKENS, partial)
    lens, found = train_tuned_lens(model, WINDOWS, **QUICK, path=path)
    assert same_lens(lens, whole)
    for field in ("before", "after", "constant", "loss"):
        assert torch.equal(getattr(found, field), getattr(expected, field))
    again = train_tuned_lens(model, WINDOWS, **QUICK, path=path)  # finished: nothing left to do
    assert same_lens(again[0], whole) and same_lens(TunedLens.load(path), whole)
    assert [file.name for file in tmp_path.iterdir()] == ["lens.safetensors"]


def test_the_file_is_written_now_and_then_too(tmp_path, monkeypatch):
    """A killed process writes nothing more: what stands there is from before."""
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_FILES", 0.0)
    model, path = tiny_model(), tmp_path / "lens.safetensors"
    with interrupt_after(model, 21, error=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        train_tuned_lens(model, WINDOWS, **QUICK, path=path)
    assert len(load_file(path)["loss"]) > 0


def test_files_of_others_are_refused(tmp_path):
    model, path = tiny_model(), tmp_path / "lens.safetensors"
    train_tuned_lens(model, WINDOWS, **QUICK, path=path)
    for changes in ({"lr": 0.01}, {"steps": 5}, {"seed": 1}, {"batch": 3}, {"start": TunedLens(2, 8)}):
        with pytest.raises(FileRefused, match="another run"):
            train_tuned_lens(model, WINDOWS, **QUICK | changes, path=path)
    with pytest.raises(FileRefused, match="another run"):
        train_tuned_lens(tiny_model(seed=1), WINDOWS, **QUICK, path=path)
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FileRefused, match="damaged"):
        TunedLens.load(path)
    path.write_bytes(raw[:100])
    with pytest.raises(FileRefused, match=r"cannot read a tuned lens from .* it is cut short"):
        TunedLens.load(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(FileRefused, match=r"cannot read a tuned lens from .* it is another file"):
        TunedLens.load(path)
    with pytest.raises(InputError, match="no such file"):
        TunedLens.load(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="no folder"):
        train_tuned_lens(model, WINDOWS, path=tmp_path / "none" / "lens.safetensors")


def test_saved_and_loaded(tmp_path):
    lens, _ = train_tuned_lens(tiny_model(), WINDOWS, **QUICK)
    lens.save(tmp_path / "lens.safetensors")
    assert same_lens(TunedLens.load(tmp_path / "lens.safetensors"), lens)
    state = lens.state_dict()
    assert list(state) == ["weight", "bias"]
    with pytest.raises(InputError, match="2 layers of d_model 8, but the model has 3 layers"):
        tuned_lens(tiny_model(n_layers=3), TOKENS, lens)


def test_every_window_is_used_once_before_any_is_used_again():
    schedule = training.Schedule(torch.arange(10).view(5, 2), steps=10, lr=1.0, seed=3, batch=2)
    drawn = torch.cat([schedule.windows(step) for step in range(10)])[:, 0].tolist()
    for epoch in range(4):
        assert sorted(drawn[5 * epoch : 5 * epoch + 5]) == [0, 2, 4, 6, 8]
    assert drawn[:5] != drawn[5:10]
    assert (schedule.rate(0), schedule.rate(5)) == (1.0, 0.5)


def test_the_same_seed_gives_the_same_lens_and_nothing_global_is_drawn():
    state = torch.get_rng_state()
    first, second = (train_tuned_lens(tiny_model(), list(WINDOWS.split(4)), **QUICK)[0] for _ in range(2))
    other = train_tuned_lens(tiny_model(), WINDOWS, **QUICK | {"seed": 1})[0]
    assert same_lens(first, second) and not same_lens(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_one_fixed_distribution_reaches():
    """Where every position says the same, that is all there is to know."""
    model = tiny_model(normalization_type=None)
    with torch.no_grad():
        model.W_U.zero_()
        model.W_U[0] = 1.0
    _, found = train_tuned_lens(model, WINDOWS, **QUICK)
    torch.testing.assert_close(found.constant, torch.zeros(2), atol=1e-5, rtol=0)


def test_what_cannot_be_trained_on_is_refused():
    model = tiny_model()
    refused = {
        "at least 1, got 0": {"steps": 0},
        "above 0": {"lr": 0.0},
        "batch is": {"batch": 0},
        "3 layers of d_model 8": {"start": TunedLens(3, 8)},
    }
    for message, options in refused.items():
        with pytest.raises(InputError, match=message):
            train_tuned_lens(model, WINDOWS, **options)
    with pytest.raises(InputError, match="at least two"):
        train_tuned_lens(model, WINDOWS[:1])
    with pytest.raises(InputError, match="must have one length"):
        train_tuned_lens(model, [WINDOWS, WINDOWS[:, :3]])


def test_tables_figures_files(tmp_path):
    _, found = train_tuned_lens(tiny_model(), WINDOWS, **QUICK)
    assert found.table(1).rows[0][0] == "0_pre" and len(found.top(5)) == 2
    falls = [row[3] for row in found.top().rows]
    assert falls == sorted(falls, reverse=True)
    assert [trace.name for trace in found.figure().data] == ["logit lens", "tuned lens", "one fixed distribution"]
    found.save(tmp_path / "training.safetensors")
    assert torch.equal(TunedLensTraining.load(tmp_path / "training.safetensors").after, found.after)
    _, one = train_tuned_lens(tiny_model(), WINDOWS[:2], **QUICK)
    assert bool(one.fall_interval()[0].isnan().all())


IN_FOUR_GIGABYTES = """
import resource
import hooklens as hl
from hooklens.plugins.lens.affine_lens import fit_tuned_lens, train_tuned_lens
from hooklens.pretrained.assets import text

model = hl.load("smollm2-135m-instruct")
ids = model.to_tokens(text("shakespeare")[1_000_000:1_010_000])[0]
windows = ids[: 40 * 32].view(40, 32)
for _, found in (fit_tuned_lens(model, windows), train_tuned_lens(model, windows, steps=3, batch=1, path="lens.st")):
    assert bool((found.fall > 0).all()), found.table()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_smollm2_trains_within_four_gigabytes(tmp_path):
    """In a process of its own: a peak is that of all that a process has done."""
    command = [sys.executable, "-c", IN_FOUR_GIGABYTES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4 * 2**20  # kilobytes
    assert TunedLens.load(tmp_path / "lens.st").weight.shape == (30, 576, 576)
