"""What a study of all layers says where the answer is known."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.data.jsonl import read_texts_file
from hooklens.plugins.probing.control import ControlTasks
from hooklens.plugins.probing.folds import make_folds
from hooklens.plugins.probing.gathering import Activations, gather
from hooklens.plugins.probing.probe_training import _study, probe_texts, train_probe
from hooklens.plugins.probing.probe_use import check_probe_use
from hooklens.plugins.probing.probes import PROBES, MassMean, Ridge
from hooklens.plugins.probing.scoring import Trainer
from hooklens.plugins.probing.study import ProbeStudy
from hooklens.plugins.probing.task import read_task
from hooklens.pretrained.tokenizer import tiny_tokenizer
from hooklens.studies import probe_report
from hooklens.studies.probe_page import verdicts
from hooklens.testing import tiny_model

VOCAB = 60


def planted(strength: float = 4.0, **changes):
    """A model whose odd tokens carry a unit vector, which every later layer hands on."""
    model = tiny_model(d_vocab=VOCAB, d_model=16, dtype=torch.float64, **changes)
    where = torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    where /= where.norm()
    with torch.no_grad():
        model.W_E.copy_(model.W_E - (model.W_E @ where)[:, None] * where)
        model.W_E[1::2] += strength * where
    return model, where


def odd_last(n: int = 120, seed: int = 0):
    """Random prompts, read at a last token that is told by its group: no token stands in two folds."""
    tokens = torch.randint(VOCAB, (n, 3), generator=torch.Generator().manual_seed(seed))
    return tokens, [int(row[-1]) % 2 for row in tokens], [int(row[-1]) for row in tokens]


@pytest.mark.parametrize("kind", PROBES.values(), ids=lambda kind: kind.name)
def test_a_planted_direction_is_found(kind):
    model, where = planted(20.0)
    tokens, label, group = odd_last()
    probe, study = train_probe(
        model, read_task(model, tokens, label, group=group), site=("resid_pre", 0), kind=kind, null_draws=9
    )
    assert study.accuracy == 1.0 and study.p == pytest.approx(0.1)
    cosine = float(probe.direction @ where)
    assert cosine > 0.99
    x = gather(model, tokens, site=("resid_pre", 0)).x[0]
    assert torch.equal(probe.predict(x), torch.tensor(label))
    assert probe.gap == pytest.approx(20.0 * cosine, rel=0.1)


def test_the_embedding_baseline_says_where_it_was_already():
    model, _ = planted(20.0)
    tokens, label, group = odd_last()
    task = read_task(model, tokens, label, group=group)
    _, study = train_probe(model, task, null_draws=1)
    assert float(study.embed.mean()) == 1.0
    beyond = study.table().rows[-1]
    assert beyond[0] == "minus the better embedding" and beyond[1] <= 0.0


def test_random_labels_are_at_chance():
    model = tiny_model(d_vocab=VOCAB)
    tokens = torch.randint(VOCAB, (200, 4), generator=torch.Generator().manual_seed(1))
    p = []
    for seed in range(6):
        label = torch.randint(2, (200,), generator=torch.Generator().manual_seed(seed)).tolist()
        _, study = train_probe(model, read_task(model, tokens, label), kind=MassMean(), null_draws=39, seed=seed)
        assert abs(study.accuracy - 0.5) < 0.12
        assert abs(float(study.null.mean()) - 0.5) < 0.03
        p.append(study.p)
    assert min(p) > 1 / 40 and max(p) > 0.3


def noise(n: int = 60, points: int = 30, seed: int = 0):
    """Activations of many layers that say nothing, and the task that was asked of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(points, n, 5, generator=generator, dtype=torch.float64)
    ids = torch.arange(n)
    names = [f"blocks.{i}.hook_resid_post" for i in range(points)]
    task = read_task(tiny_model(d_vocab=n), ids[:, None], [i % 2 for i in range(n)])
    return Activations(x, names, ids, ids, torch.zeros_like(ids), ids, x[0], x[1]), task


@pytest.mark.slow
def test_the_best_of_many_layers_is_not_what_is_reported():
    """At 30 layers of noise the best one lies far above chance; the one that was chosen inside does not."""
    best, inside = [], []
    for seed in range(8):
        acts, task = noise(seed=seed)
        study = _study(acts, task, MassMean(), make_folds(task.label, acts.group, seed=seed), 1, seed)
        best.append(float(study.correct.mean(1).max()))
        inside.append(study.accuracy)
        assert study.best == int(study.correct.mean(1).argmax())
    assert sum(best) / 8 > 0.6
    assert abs(sum(inside) / 8 - 0.5) < 0.06


def test_the_layer_is_chosen_without_the_test_examples():
    acts, task = noise(points=10)
    folds = make_folds(task.label, acts.group)
    before = _study(acts, task, MassMean(), folds, 1, 0)
    x = acts.x.clone()
    x[:, folds[2].test] += 100 * torch.randn(10, len(folds[2].test), 5, dtype=torch.float64)
    moved = Activations(x, acts.points, acts.token, acts.prompt, acts.pos, acts.group, acts.embed, acts.context)
    after = _study(moved, task, MassMean(), folds, 1, 0)
    assert after.chosen[2] == before.chosen[2]
    assert not torch.equal(after.chosen, before.chosen)


def test_predictions_are_scikit_learns_on_the_same_folds():
    model = tiny_model(d_vocab=VOCAB)
    tokens, label, group = odd_last()
    task = read_task(model, tokens, label, group=group)
    _, study = train_probe(model, task, null_draws=1)
    folds = [(fold.train, fold.test) for fold in make_folds(task.label, task.group)]
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=10_000, tol=1e-6))
    for x, right in zip(gather(model, task).x, study.correct, strict=True):
        said = cross_val_predict(peer, x.double().numpy(), task.label.numpy(), cv=folds)
        assert np.array_equal(right.bool().numpy(), said == task.label.numpy())


def test_nested_right_and_wrong_are_those_of_the_chosen_points():
    model = tiny_model(d_vocab=VOCAB)
    tokens, label, group = odd_last()
    _, study = train_probe(model, read_task(model, tokens, label, group=group), null_draws=3)
    for i, fold in enumerate(study.fold.tolist()):
        assert study.nested[i] == study.correct[study.chosen[fold], i]
    assert study.accuracy == pytest.approx(float((study.prob.argmax(1) == study.label).double().mean()))
    low, high = study.interval()
    assert low <= study.accuracy <= high
    torch.testing.assert_close(study.prob.sum(1), torch.ones(120))


@pytest.mark.slow
def test_the_control_task_can_be_memorised_and_selectivity_is_what_is_left():
    """Tokens that come back: a probe with room remembers a random label of each, which is no skill of the model."""
    model = tiny_model(d_vocab=12, d_model=32)
    tokens = torch.randint(12, (240, 3), generator=torch.Generator().manual_seed(0))
    label = [int(row[-1]) % 2 for row in tokens]
    task = read_task(model, tokens, label)
    _, study = train_probe(model, task, kind=Ridge(alpha=0.1), null_draws=1)
    assert study.control_by == "token"
    assert float(study.control.mean()) > 0.95 and study.selectivity < 0.06
    assert study.accuracy > 0.95


def study_of(x, token, label, kind=None, **options):
    """A study of given activations, every example a prompt of its own, which read these tokens."""
    n = len(label)
    ids = torch.arange(n)
    task = read_task(tiny_model(d_vocab=n), ids[:, None], label.tolist())
    names = [f"blocks.{i}.hook_resid_post" for i in range(len(x))]
    acts = Activations(x, names, token, ids, torch.zeros_like(ids), ids, x[0], x[0])
    folds = make_folds(task.label, acts.group, folds=options.pop("folds", 5))
    return _study(acts, task, kind or Ridge(alpha=1.0), folds, options.pop("null_draws", 0), 0)


def test_a_page_says_what_the_controls_take_away():
    """The embedding reads it as well; random labels of tokens are learnt as well; and where neither holds, silence."""
    generator = torch.Generator().manual_seed(0)
    token = torch.arange(240) % 16
    x = torch.randn(16, 40, generator=generator, dtype=torch.float64)[token][None]
    words = verdicts(study_of(x, token, token % 2))
    assert len(words) == 2 and "an embedding of the tokens does as well" in words[0]
    assert "Random labels (one per token) are read as well" in words[1]
    label = torch.randint(2, (240,), generator=generator)
    y = torch.randn(2, 240, 6, generator=generator, dtype=torch.float64)
    y[1, :, 0] += 4.0 * label  # the layer above the embedding, which is y[0]
    read = study_of(y, token, label)
    assert read.accuracy > 0.9 and verdicts(read) == []
    page = probe_report(read, "<b>labels</b>").to_html()
    assert "&lt;b&gt;labels" in page and page.count('class="plot"') == 2 and "need not be used by the model:" in page
    noise = study_of(torch.randn(1, 240, 6, generator=generator, dtype=torch.float64), token, label, null_draws=19)
    assert noise.p > 0.05 and "there is no evidence for the label." in verdicts(noise)[0]


def test_features_that_are_the_token_have_no_selectivity():
    """One vector a token and a class that tokens have: random labels of tokens are learnt as well as that class."""
    generator = torch.Generator().manual_seed(0)
    token = torch.arange(240) % 16
    x = torch.randn(16, 40, generator=generator, dtype=torch.float64)[token][None]
    study = study_of(x, token, token % 2)
    assert study.accuracy == 1.0 and study.selectivity == pytest.approx(0.0, abs=0.02)


def test_a_class_that_no_token_has_is_as_selective_as_it_is_read():
    """The class stands in the activations and the token does not: random labels of tokens are read at chance."""
    generator = torch.Generator().manual_seed(0)
    token, label = torch.arange(240) % 16, torch.randint(2, (240,), generator=generator)
    x = torch.randn(1, 240, 6, generator=generator, dtype=torch.float64)
    x[0, :, 0] += 3.0 * label
    study = study_of(x, token, label)
    rows = {row[0]: row[1:] for row in study.table().rows}
    control = rows["control task (random label a token)"]
    assert control[0] == pytest.approx(0.5, abs=0.06) and control[1] < 0.5 < control[2]
    seen = rows["selectivity: these minus the control task"]
    assert seen[0] == pytest.approx(study.balanced_accuracy - 0.5, abs=0.06) and seen[1] < seen[0] < seen[2]
    assert study.control.shape == study.same_split.shape == (5, 1, 240)


def test_selectivity_compares_the_same_rows():
    """Real labels too are fitted in the control's folds, and the interval knows how many labellings there were."""
    generator = torch.Generator().manual_seed(1)
    token, label = torch.arange(120) % 12, torch.randint(2, (120,), generator=generator)
    x = torch.randn(1, 120, 6, generator=generator, dtype=torch.float64)
    made = ControlTasks.of(label, token, torch.arange(120), torch.arange(120), folds=4, seed=0)
    kind = Ridge(alpha=1.0)
    random, real = made.scores(x[0].numpy(), Trainer(kind, 2))
    for i in range(5):
        assert len(made.folds[i]) == 4
        assert torch.equal(random[i], Trainer(kind, 2).correct(x[0].numpy(), made.label[i][None], made.folds[i])[0])
        assert torch.equal(real[i], Trainer(kind, 2).correct(x[0].numpy(), label[None], made.folds[i])[0])


@pytest.mark.parametrize("seed", range(10))
def test_a_control_task_does_not_refuse_good_data(seed):
    """Six classes, eight kinds of token, one of them read once: every control class can be in two folds."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.cat([torch.arange(119) % 7, torch.tensor([7])])
    label = torch.randperm(120, generator=generator) % 6
    made = ControlTasks.of(label, token, torch.arange(120), torch.arange(120), folds=5, seed=seed)
    assert made.by == "token" and len(made.folds) == 5
    for one, folds in zip(made.label, made.folds, strict=True):
        for fold in folds:
            assert set(one[fold.train].tolist()) == set(one.tolist())


def test_a_control_task_that_cannot_be_cut_says_so():
    """Every label of a class would be in one prompt."""
    token, text = torch.arange(32) // 4, torch.arange(32) % 2
    made = ControlTasks.of(torch.arange(32) % 8, token, text, torch.arange(32), folds=5, seed=0)
    assert made.by is not None or "too few for 8 classes" in made.missing


def test_a_point_that_says_the_common_class_is_not_chosen():
    """One of ten is rare: point 0 is right on 93 % and a third of the rare, point 1 on 82 % and on all of the rare."""
    label = (torch.arange(200) % 10 == 0).long()
    rank = torch.cat([torch.arange(200)[label == one].argsort() for one in (0, 1)])
    order = torch.empty(200, dtype=torch.long)
    order[torch.cat([(label == 0).nonzero().flatten(), (label == 1).nonzero().flatten()])] = rank
    first = ((label == 1) & (order % 3 == 0)).double()
    second = ((label == 1) | (order % 5 == 0)).double()
    x = torch.stack([first, second])[..., None]
    study = study_of(x, torch.arange(200), label, MassMean())
    assert study.correct.mean(1)[0] > 0.9 > study.correct.mean(1)[1]
    assert study.chosen.tolist() == [1] * 5 and study.best == 1
    assert study.balanced_accuracy == pytest.approx(0.9, abs=0.02) and study.accuracy == pytest.approx(0.82, abs=0.02)
    shown = study.table().rows[0]
    assert shown[1] == study.balanced_accuracy and shown[4] == study.accuracy
    assert float(study.majority.mean()) == 0.9 and study.table().rows[4][1] == 0.5


def test_points_have_q_values_over_all_of_them():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(60) % 2
    x = torch.randn(6, 60, 4, generator=generator, dtype=torch.float64)
    x[3, :, 0] += 5.0 * label
    study = study_of(x, torch.arange(60), label, MassMean(), null_draws=39)
    assert study.point_null.shape == (39, 6) and study.null.shape == (39,)
    assert study.top_points(6).columns[-2:] == ("p", "q") and study.top_points(1).rows[0][0] == study.points[3]
    assert study.point_p[3] == pytest.approx(1 / 40) and study.point_q[3] == pytest.approx(6 / 40)
    assert bool((study.point_q >= study.point_p).all())
    assert study.least_p == pytest.approx(1 / 40) and study.least_q == pytest.approx(6 / 40)
    assert "no single layer can reach q 0.05: with 39 draws" in probe_report(study).to_html()


@pytest.mark.slow
def test_one_layer_of_thirty_can_reach_a_q_of_a_twentieth_with_the_draws_that_are_taken():
    """With 20 draws a layer the least p was 1/21, and q of one layer alone 30 / 21: nothing said so."""
    acts, task = noise(n=24, points=30)
    acts.x[7, :, 0] += 5.0 * task.label
    study = _study(acts, task, MassMean(), make_folds(task.label, acts.group), None, 0)
    assert study.point_null.shape == (600, 30) and study.null.shape == (99,)
    assert study.least_q <= 0.05 and float(study.point_q[7]) == pytest.approx(study.least_q)
    assert study.point_q.dtype == torch.float64 and probe_report(study).to_html().count("no single layer can") == 0


def test_few_groups_cannot_be_shuffled_in_many_ways_and_the_least_p_says_so():
    """One of each class in four folds: 16 shuffles, of which two are the real labels but for the classes' names."""
    label, group = torch.arange(8) % 2, torch.arange(8)
    study = study_of(torch.randn(1, 8, 3).double(), group, label, MassMean(), null_draws=400, folds=4)
    assert study.least_p == pytest.approx(2 / 16, abs=0.05)


def test_without_types_that_come_back_there_is_no_control_task():
    model = tiny_model(d_vocab=200)
    study = probe_texts(model, torch.arange(40)[:, None], [i % 2 for i in range(40)], kind=MassMean())
    assert study.control_by is None and study.control.shape[0] == 0
    assert np.isnan(study.selectivity) and "none recurs" in str(study.table()) and study.figure().data


@pytest.mark.slow
def test_several_classes():
    model = tiny_model(d_vocab=VOCAB, d_model=32)
    tokens = torch.randint(VOCAB, (300, 2), generator=torch.Generator().manual_seed(0))
    task = read_task(model, tokens, ["abc"[int(row[-1]) % 3] for row in tokens])
    _, study = train_probe(model, task, kind=Ridge(alpha=1.0), site=("resid_post", 0), null_draws=1)
    assert study.classes == ["a", "b", "c"] and study.prob.shape == (300, 3)
    assert study.probe(study.weight).shape == (3, 3)
    assert study.accuracy > 0.6 and study.calibration.figure().data


def test_texts_of_a_file_of_ones_own(tmp_path):
    model = tiny_model(d_vocab=300)
    model.tokenizer = tiny_tokenizer("good bad day night")
    lines = [
        f'{{"text": "{day} {i} {word}", "label": {str(word == "good").lower()}, "group": {i}}}'
        for i in range(12)
        for day in ("day", "night")
        for word in ("good", "bad")
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines))
    file = read_texts_file(path)
    study = probe_texts(model, file.text, file.label, group=file.group, kind=MassMean())
    assert study.classes == ["False", "True"] and int(study.group.max()) == 11 and study.accuracy > 0.8


def test_a_study_is_a_result(tmp_path):
    model = tiny_model(d_vocab=VOCAB)
    tokens, label, _ = odd_last()
    study = probe_texts(model, tokens, label, kind=MassMean(), site="z")
    study.save(tmp_path / "study.safetensors")
    back = ProbeStudy.load(tmp_path / "study.safetensors")
    assert str(back.table()) == str(study.table()) and torch.equal(back.probe.weight, study.probe.weight)
    assert len(study.top_points(1)) == 1 and study.top_points(1).rows[0][0] == study.point
    assert len(study.figure().data) == 6 and len(repr(study)) < 1200
    assert study.probe.point == study.point and "z" in study.point


def test_errors_say_what_would_work():
    model = tiny_model()
    rows = [[1, 2], [3, 4], [5, 6], [7, 8]]
    with pytest.raises(InputError, match="one entry per prompt, got 3"):
        read_task(model, rows, [0, 1, 0])
    with pytest.raises(InputError, match="all"):
        read_task(model, rows, [1, 1, 1, 1])
    with pytest.raises(InputError, match="at most 20"):
        read_task(model, [[i % 11, i // 11] for i in range(30)], [i / 3 for i in range(30)])
    with pytest.raises(InputError, match="position 2 is out of range for prompt 0"):
        read_task(model, rows, [0, 1, 0, 1], pos=2)
    with pytest.raises(InputError, match="at least two groups"):
        probe_texts(model, rows, [0, 1, 0, 1], group=["a", "b", "a", "b"])


def test_a_model_in_bfloat16_is_probed():
    model, where = planted(20.0)
    model = model.to(torch.bfloat16)
    tokens, label, group = odd_last()
    task = read_task(model, tokens, label, group=group)
    probe, study = train_probe(model, task, site=("resid_pre", 0), kind=MassMean(), null_draws=9)
    assert study.accuracy == 1.0 and study.correct.dtype == probe.weight.dtype == torch.float32
    assert float(probe.direction @ where.float()) > 0.99
    metric = hl.logit_diff(model, answer=1, wrong_answer=0)
    check = check_probe_use(model, probe, task, metric, draws=5)
    wide = check_probe_use(model.to(torch.float32), probe, task, metric, draws=5)
    assert check.accuracy == wide.accuracy == 1.0
    torch.testing.assert_close(check.effect, wide.effect, atol=0.05 * float(wide.told.abs().mean()), rtol=0.05)
