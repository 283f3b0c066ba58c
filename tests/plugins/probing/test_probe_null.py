"""p-values of noise are those of noise: every null is held against data in which there is nothing to find."""

import pytest
import torch

import hooklens as hl
from hooklens.plugins.probing.directions import project_tokens
from hooklens.plugins.probing.folds import make_folds, shuffled_in_folds
from hooklens.plugins.probing.gathering import Activations
from hooklens.plugins.probing.geometry import measure_geometry
from hooklens.plugins.probing.probe_training import _study
from hooklens.plugins.probing.probe_transfer import transfer_probe
from hooklens.plugins.probing.probe_use import check_probe_use
from hooklens.plugins.probing.probes import Logistic, MassMean, Probe, Ridge
from hooklens.plugins.probing.study import ProbeStudy
from hooklens.plugins.probing.task import read_task
from hooklens.testing import tiny_model

VOCAB = 60


def labels_and_groups(structure: str, n: int, generator: torch.Generator):
    """Every example its own group; groups of four of one class, of both classes, and of one class and any size."""
    if structure == "single":
        return torch.randperm(n, generator=generator) % 2, torch.arange(n)
    group = torch.arange(n) // 4
    if structure == "mixed":
        return torch.arange(n) % 2, group
    if structure == "uneven":
        group = torch.arange(n).repeat_interleave(torch.randint(1, 8, (n,), generator=generator))[:n]
        return (torch.randperm(int(group.max()) + 1, generator=generator) % 2)[group], group
    return (torch.randperm(n // 4, generator=generator) % 2)[group], group


def noise_study(kind, structure: str, seed: int, *, n: int = 40, points: int = 1, draws: int = 19) -> ProbeStudy:
    generator = torch.Generator().manual_seed(seed)
    label, group = labels_and_groups(structure, n, generator)
    ids = torch.arange(n)
    task = read_task(tiny_model(d_vocab=n), ids[:, None], label.tolist(), group=group.tolist())
    shared = torch.randn(1, n, 10, generator=generator, dtype=torch.float64)
    x = shared + torch.randn(points, n, 10, generator=generator, dtype=torch.float64)  # layers go together
    names = [f"blocks.{i}.hook_resid_post" for i in range(points)]
    acts = Activations(x, names, ids, ids, torch.zeros_like(ids), group, x[0, :, :4], x[0, :, 4:8])
    return _study(acts, task, kind, make_folds(task.label, group, seed=seed), draws, seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "structure"), [(Logistic(), "pure"), (Ridge(), "single"), (Ridge(), "mixed")], ids=str
)
def test_shuffled_labels_do_not_lie_below_chance(kind, structure):
    """A fit with an intercept leans to the class commoner among its rows: folds of other labels put that below 0.5."""
    found = [noise_study(kind, structure, seed) for seed in range(8)]
    assert torch.cat([study.null for study in found]).mean().item() == pytest.approx(0.5, abs=0.03)


def test_shuffled_labels_of_a_rare_class_are_at_chance_too():
    """Nine of one class to one of the other: balanced accuracy, in folds that have as many of each."""
    generator, label = torch.Generator().manual_seed(0), (torch.arange(100) % 10 == 0).long()
    folds = make_folds(label, torch.arange(100))
    new = shuffled_in_folds(label, torch.arange(100), folds, generator)
    assert [int(new[fold.test].sum()) for fold in folds] == [2] * 5 and not torch.equal(new, label)


def share(p) -> float:
    return (torch.as_tensor(p) <= 0.05 + 1e-9).double().mean().item()


CASES = [(Logistic(), "single", 1), (MassMean(), "mixed", 6), (Ridge(), "single", 6), (MassMean(), "uneven", 6)]


@pytest.mark.slow
@pytest.mark.parametrize("kind, structure, points", CASES, ids=str)
def test_probes_of_noise_have_the_p_values_of_noise(kind, structure, points):
    """At 6 layers of noise, labels shuffled where the real ones had chosen gave 7 p <= 0.05 of 60 with ridge probes."""
    n = 80 if structure == "uneven" else 40
    found = [noise_study(kind, structure, seed, n=n, points=points) for seed in range(120)]
    assert share([study.p for study in found]) <= 0.10  # 0.05 and 2.5 deviations of 120
    assert share(torch.cat([study.point_p for study in found])) <= 0.08
    assert torch.cat([study.null for study in found]).mean().item() == pytest.approx(0.5, abs=0.02)
    assert 0.4 < torch.tensor([study.p for study in found]).mean() < 0.65


def random_tasks(model, seed: int, n: int = 40):
    """Two tasks of random prompts with labels that mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(VOCAB, (n, 3), generator=generator) for _ in range(2)]
    return [read_task(model, rows, (torch.randperm(n, generator=generator) % 2).tolist()) for rows in draws]


@pytest.mark.slow
def test_transfer_between_labels_that_mean_nothing_has_the_p_values_of_noise():
    model = tiny_model(d_vocab=VOCAB)
    p = torch.stack(
        [transfer_probe(model, random_tasks(model, seed), site=("resid_post", 0), draws=19).p for seed in range(40)]
    )
    assert share(p.diagonal(dim1=1, dim2=2)) <= 0.10 and share(p[:, 0, 1]) <= 0.10 and share(p[:, 1, 0]) <= 0.10


@pytest.mark.slow
def test_angles_between_labels_that_mean_nothing_have_the_p_values_of_noise():
    model = tiny_model(d_vocab=VOCAB)
    found = [
        measure_geometry(model, random_tasks(model, s), site=("resid_post", 0), draws=19).p[0, 1] for s in range(40)
    ]
    assert share(torch.stack(found)) <= 0.10 and 0.35 < torch.stack(found).mean() < 0.65


def random_probe(seed: int, width: int = 8) -> Probe:
    both = torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
    return Probe(both, torch.zeros(2), both, point="blocks.0.hook_resid_post")


def test_tokens_along_a_random_direction_have_the_p_values_of_noise():
    model, tokens = tiny_model(d_vocab=VOCAB), torch.arange(VOCAB)
    p = [project_tokens(model, random_probe(seed), tokens, tokens % 2, draws=19).p for seed in range(60)]
    assert share(p) <= 0.10


@pytest.mark.slow
def test_edits_along_a_random_direction_have_the_p_values_of_noise():
    model = tiny_model(d_vocab=VOCAB)
    metric = hl.logit_diff(model, answer=1, wrong_answer=0)
    p = []
    for seed in range(40):
        task = random_tasks(model, seed, 16)[0]
        p.append(check_probe_use(model, random_probe(seed), task, metric, draws=19).p)
    assert share(torch.stack(p)) <= 0.10
