"""Trajectories: what a logit lens says at one position, and how the stream itself turns towards its end."""

from importlib import import_module

import pytest
import torch
from model.zoo import TOKENS, ZOO, zoo_model

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.plugins.lens import reading
from hooklens.plugins.lens.affine_lens import TunedLens, tuned_lens
from hooklens.plugins.lens.layer_lens import lens_logits, logit_lens
from hooklens.plugins.lens.reading import streams_of
from hooklens.plugins.lens.trajectory import Trajectory, trace_predictions
from hooklens.testing import induction_model, tiny_model

module = import_module("hooklens.plugins.lens.trajectory")  # the package has a function of that name


@pytest.mark.parametrize("name", ZOO)
def test_it_is_the_logit_lens_at_one_position(name):
    model = zoo_model(name, dtype=torch.float64)
    path, lens = trace_predictions(model, TOKENS, answer=[1, 2], pos=3), logit_lens(model, TOKENS, answer=[1, 2])
    assert path.layers == lens.layers
    for field in ("rank", "log_prob", "entropy", "kl"):
        expected = getattr(lens, field)[:, :, 3].T
        torch.testing.assert_close(getattr(path, field), expected, atol=1e-10, rtol=1e-10)


def test_controls_norms_and_cosines_by_hand():
    model = zoo_model("llama", dtype=torch.float64)
    path = trace_predictions(model, TOKENS, answer=[1, 2])
    streams, logits = streams_of(model, TOKENS), lens_logits(model, TOKENS)
    others = [1, 2, 3]  # not the first position, and not the last, which is read
    for i, answer in enumerate((1, 2)):
        ranks = (logits[:, i, others] > logits[:, i, others, answer, None]).sum(-1)
        torch.testing.assert_close(path.control_rank[i], ranks.double().median(-1).values)
        final = streams[-1, i, -1]
        cosines = torch.cosine_similarity(streams[:, i], final[None, None], dim=-1)
        torch.testing.assert_close(path.cosine[i], cosines[:, -1])
        torch.testing.assert_close(path.control_cosine[i], cosines[:, others].mean(-1))
        torch.testing.assert_close(path.norm[i], streams[:, i, -1].norm(dim=-1))
    torch.testing.assert_close(path.cosine[:, -1], torch.ones(2, dtype=torch.float64))


def test_the_induced_answer_comes_up_after_the_last_block():
    path = trace_predictions(induction_model(), [[3, 1, 4, 9, 3]], answer=1, wrong_answer=4)
    assert path.rank.tolist() == [[5, 5, 0]] and path.logit_diff.tolist() == [[0, 0, 10]]
    assert path.top(1).rows == path.table().rows[-1:] and path.table().rows[-1][0] == "final_post"
    assert path.top(1).rows[0][3] == pytest.approx(float(path.log_prob.diff().max()))
    assert len(path.top(5)) == 2  # nothing rises before the first stream


def test_prompts_of_different_length_are_prompts_one_by_one(monkeypatch):
    model = tiny_model(dtype=torch.float64)
    rows = [[1, 2, 3], [4, 5], [6, 7, 8], [1, 1], [9]]
    monkeypatch.setattr(reading, "_STREAMS_AT_ONCE", 150)
    together = trace_predictions(model, rows, answer=[1, 2, 3, 4, 5], wrong_answer=6)
    for i, row in enumerate(rows):
        alone = trace_predictions(model, [row], answer=i + 1, wrong_answer=6)
        for field in ("rank", "log_prob", "wrong_log_prob", "control_rank", "kl", "cosine", "control_cosine"):
            ours, theirs = getattr(together, field)[i], getattr(alone, field)[0]
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0, equal_nan=True)
    assert bool(together.control_rank[4].isnan().all())  # one token: no other position


def test_through_a_tuned_lens():
    model, lens = zoo_model("gpt2", dtype=torch.float64), TunedLens(2, 8, dtype=torch.float64)
    plain = trace_predictions(model, TOKENS, answer=[1, 2])
    torch.testing.assert_close(trace_predictions(model, TOKENS, answer=[1, 2], lens=lens).kl, plain.kl)
    with torch.no_grad():
        lens.bias[0] += torch.arange(8.0, dtype=torch.float64)
    path = trace_predictions(model, TOKENS, answer=[1, 2], lens=lens)
    expected = tuned_lens(model, TOKENS, lens, answer=[1, 2])
    torch.testing.assert_close(path.kl, expected.kl[:, :, -1].T, atol=1e-10, rtol=0)
    assert path.lens == "tuned lens" and not torch.allclose(path.kl[:, 0], plain.kl[:, 0])


def test_what_cannot_be_followed_is_refused():
    model = tiny_model()
    with pytest.raises(InputError, match="pos=7"):
        trace_predictions(model, TOKENS, answer=1, pos=7)
    with pytest.raises(InputError, match="one per prompt, got 3 for 2"):
        trace_predictions(model, TOKENS, answer=[1, 2, 3])
    with pytest.raises(InputError, match="3 layers of d_model 8, but the model has 2"):
        trace_predictions(model, TOKENS, answer=1, lens=TunedLens(3, 8))


def test_tables_figures_files(tmp_path):
    for tokens in (TOKENS, TOKENS[:1], [[3]]):
        path = trace_predictions(tiny_model(), tokens, answer=1, wrong_answer=2)
        assert len(path.table()) == 3 and path.table().columns[-1] == "logit difference"
        path.figure().to_json()
        path.distance_figure().to_json()
        path.save(tmp_path / "path.safetensors")
        assert torch.equal(Trajectory.load(tmp_path / "path.safetensors").kl, path.kl)
    assert trace_predictions(tiny_model(), TOKENS, answer=1).logit_diff is None


@pytest.mark.slow
def test_smollm2_tells_the_names_apart_from_layer_24_on():
    model = hl.load("smollm2-135m-instruct")
    path = trace_predictions(
        model, "When Mary and John went to the store, John gave a drink to", answer=" Mary", wrong_answer=" John"
    )
    assert path.logit_diff[0, -1] > 5
    assert bool((path.logit_diff[0, :24] < 0).all()) and bool((path.logit_diff[0, 24:] > 0).all())
    assert path.rank[0, -1] == 0 < path.control_rank[0, -1]
