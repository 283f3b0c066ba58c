"""In-context regression with a range of examples: how many a step draws, what is held out, and how a run records it."""

import numpy as np
import pytest
import torch
from refused import refused

import hooklens as hl
from hooklens.core.errors import ArgumentError, InputError
from hooklens.model.config import VectorEmbed
from hooklens.training import Settings


def regression(**changes):
    return hl.data.in_context_regression(**{"d": 2, "n_points": (3, 6), "curriculum": 40, "seed": 4} | changes)


def test_the_largest_number_of_examples_grows_linearly_to_its_bound():
    data = regression(n_points=(5, 50), curriculum=450)
    drawn = np.array([data.points_at(step) for step in range(2000)])
    bound = 5 + np.minimum(45, np.arange(2000) // 10)
    assert (drawn >= 5).all() and (drawn <= bound).all()
    early = drawn[200:250] - 5  # bounds from 25 to 29: mean 11 of a uniform draw, standard error about 1
    assert abs(early.mean() - 11) < 4
    late = drawn[450:]
    assert set(late) == set(range(5, 51)) and abs(late.mean() - 27.5) < 4 * 13.3 / len(late) ** 0.5


def test_without_a_curriculum_the_whole_range_is_drawn_from_the_first_step():
    assert {regression(curriculum=0).points_at(step) for step in range(60)} == {3, 4, 5, 6}


def test_batches_of_a_range_are_functions_of_the_step_with_one_length_each():
    data, again = regression(), regression()
    for step in (0, 7, 100):
        batch = data.batch(step, 8)
        assert torch.equal(batch.inputs, again.batch(step, 8).inputs)
        assert batch.inputs.shape == (8, data.points_at(step) + 1, 3)
        assert batch.counts.sum(1).tolist() == [1] * 8 and bool(batch.counts[:, -1].all())
    assert not torch.equal(data.batch(100, 8).inputs[:, :3], data.batch(101, 8).inputs[:, :3])


def test_held_out_tasks_cover_the_range_evenly_also_before_the_curriculum_does():
    small, large = (list(regression().held_out(size)) for size in (50, 1000))
    tasks = {k: sum(len(b) for b in small if b.inputs.shape[1] == k + 1) for k in (3, 4, 5, 6)}
    assert set(tasks.values()) == {128} and [len(batch) for batch in large] == [128] * 4
    assert torch.equal(small[0].inputs, large[0].inputs[:50])
    assert not torch.equal(large[0].inputs[:, :3], large[1].inputs[:, :3])


def test_a_single_number_of_examples_is_as_it_was():
    data = hl.data.in_context_regression(2, 3, seed=1)
    assert "curriculum" not in data.identity() and data.n_positions == 4
    shapes = [data.draw(4, torch.Generator().manual_seed(0), k)[0].shape for k in (None, 7)]
    assert shapes == [(4, 4, 2), (4, 8, 2)]
    assert regression().identity()["n_points"] == [3, 6] != regression(n_points=(3, 7)).identity()["n_points"]
    assert regression().identity() != regression(curriculum=41).identity()
    assert regression(interleaved=True).n_positions == 13


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_points": (6, 3)}, r"n_points is a number of examples, or the smallest and the largest.* got \(6, 3\)"),
        ({"n_points": (1, 2, 3)}, "or the smallest and the largest"),
        ({"n_points": "5"}, "n_points is a whole number"),
        ({"n_points": (0, 5)}, "n_points is a whole number of at least 1, got 0"),
        ({"n_points": (1, 5.0)}, "n_points is a whole number"),
        ({"curriculum": -1}, "curriculum is a whole number of at least 0"),
        ({"n_points": 5}, r"curriculum is the number of steps over which a range of n_points grows.* got 5 examples"),
    ],
)
def test_ranges_that_are_none_are_refused(changes, message):
    with refused(ArgumentError, message):
        regression(**changes)


def model_of(data, **changes):
    cfg = hl.HookedTransformerConfig(
        **{"n_layers": 1, "d_model": 8, "n_heads": 1, "n_ctx": data.n_positions, "d_vocab": 1} | changes,
        embed=VectorEmbed(d_in=data.d_in),
        positional_embedding_type="none",
        mask="none",
    )
    return hl.HookedTransformer(cfg, seed=0)


def test_a_run_records_the_held_out_loss_of_every_number_of_examples(tmp_path):
    data, settings = regression(), Settings(batch=64, loss="squared_error", evaluate=2, checkpoints=1)
    model = model_of(data)
    run = hl.train(model, data, steps=4, settings=settings, out=tmp_path / "whole", show=False)
    by_position = run.evaluations()["by_position"]
    assert by_position.shape == (3, 7) and np.isnan(by_position[:, :3]).all()
    with torch.no_grad():
        expected = [float((model(b.inputs) - b.targets)[:, -1].square().mean() / 2) for b in data.held_out(1000)]
    np.testing.assert_allclose(by_position[-1, 3:], expected, rtol=1e-5)
    assert run.held_out_loss[-1] == pytest.approx(np.mean(expected), rel=1e-5)


def test_a_curriculum_goes_on_where_it_was_stopped(tmp_path):
    def stop(step, loss):
        if step == 9:
            raise RuntimeError

    data = regression(curriculum=12)
    settings = Settings(batch=64, loss="squared_error", schedule="constant", evaluate=1, checkpoints=1)
    whole, resumed = model_of(data), model_of(data)
    hl.train(whole, data, steps=16, settings=settings, out=tmp_path / "whole", show=False)
    with pytest.raises(RuntimeError):
        hl.train(resumed, data, steps=16, settings=settings, out=tmp_path / "cut", after_step=stop, show=False)
    hl.train(model_of(data), data, steps=16, settings=settings, out=tmp_path / "cut", show=False)
    ends = [hl.open_run(tmp_path / name).checkpoints()[-1].load() for name in ("whole", "cut")]
    assert torch.equal(ends[0].blocks[0].attn.q.weight, ends[1].blocks[0].attn.q.weight)


def test_a_model_that_is_too_short_for_the_longest_rows_is_refused_before_the_first_step():
    data = regression()
    with pytest.raises(InputError, match="the data have 7 positions, this model has n_ctx 4"):
        hl.train(model_of(data, n_ctx=4), data, steps=1, settings=Settings(batch=4, loss="squared_error"), show=False)
