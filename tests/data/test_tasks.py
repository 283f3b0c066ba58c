"""What every task promises: batches that are functions of the step, and held-out data that no batch holds."""

import inspect

import pytest
import torch
from refused import refused

import hooklens as hl
from hooklens.core.errors import HooklensError, InputError
from hooklens.data.batches import TrainingData, epoch_rows, hashed_share, next_token_batch

WORDS = "the cat saw a dog , and the dog saw two cats . one ran home ; the other sat down .\n"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "cats.txt"
    path.write_text("".join(f"{i} {WORDS}" for i in range(60)))
    return {
        "modular": lambda seed=0: hl.data.modular_arithmetic(p=7, seed=seed),
        "decimals": lambda seed=0: hl.data.decimal_arithmetic(2, seed=seed),
        "characters": lambda seed=0: hl.data.text(path, window=8, seed=seed),
        "byte pairs": lambda seed=0: hl.data.text(path, tokenizer="byte_pairs", d_vocab=280, window=8, seed=seed),
        "stories": lambda seed=0: hl.data.tiny_stories(90, seed=seed),
        "repeats": lambda seed=0: hl.data.random_repeats(30, length=17, seed=seed),
        "regression": lambda seed=0: hl.data.in_context_regression(3, 4, seed=seed),
        "markov": lambda seed=0: hl.data.markov_source(4, window=6, seed=seed),
    }


NAMES = ["modular", "decimals", "characters", "byte pairs", "stories", "repeats", "regression", "markov"]


def same(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("inputs", "targets", "counts"))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_a_function_of_the_step_and_the_seed(tasks, name):
    data, again, other = tasks[name](), tasks[name](), tasks[name](seed=1)
    later = data.batch(5, 4)
    assert len(later) == 4 and later.inputs.shape[:2] == later.targets.shape[:2] == later.counts.shape
    assert same(later, again.batch(5, 4))  # whatever was drawn before
    assert not same(later, data.batch(6, 4)) and not same(later, other.batch(5, 4))
    assert bool(later.counts.any())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_held_out_does_not_depend_on_the_size_of_a_batch(tasks, name):
    data = tasks[name]()
    small, large = (list(data.held_out(size)) for size in (3, 1000))
    assert max(map(len, small)) == 3 and len(large) == 1
    for part in ("inputs", "targets", "counts"):
        assert torch.equal(torch.cat([getattr(batch, part) for batch in small]), getattr(large[0], part))


@pytest.mark.parametrize("name", NAMES)
def test_a_task_says_what_there_is_to_learn_and_names_its_tokens(tasks, name):
    data = tasks[name]()
    assert isinstance(data, TrainingData) and len(data.description()) > 20
    assert data.identity() == tasks[name]().identity() != tasks[name](seed=1).identity()
    if name != "regression":  # its tokens are vectors
        vocabulary = data.vocabulary
        assert len(vocabulary) == data.d_vocab
        assert len(set(vocabulary)) == data.d_vocab or name == "byte pairs"  # in which halves of characters look alike
        assert int(data.batch(0, 8).inputs.max()) < data.d_vocab


@pytest.mark.parametrize("name", ["modular", "decimals", "stories", "repeats", "regression", "markov"])
def test_no_batch_holds_a_held_out_row(tasks, name):
    data = tasks[name]()
    held_out = {tuple(row.flatten().tolist()) for batch in data.held_out(64) for row in batch.inputs}
    drawn = {tuple(row.flatten().tolist()) for step in range(10) for row in data.batch(step, 16).inputs}
    if name == "markov":  # few states: short sequences may come twice, by chance only
        assert len(held_out & drawn) < len(held_out) / 2
    else:
        assert held_out and drawn and not held_out & drawn


def test_no_task_needs_a_model():
    for name in set(hl.data.__all__) - {"PromptPairs", "ioi", "greater_than", "gendered_pronouns", "repeated_tokens"}:
        assert "model" not in inspect.signature(getattr(hl.data, name)).parameters


def test_an_epoch_uses_every_row_once_and_orders_differ():
    rows = torch.cat([epoch_rows(step, 4, 10, seed=3) for step in range(5)])
    first, second = rows[:10], rows[10:]
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert not torch.equal(first, second) and not torch.equal(first, epoch_rows(0, 10, 10, seed=4))
    # a batch larger than an epoch, and one that begins inside one
    assert torch.equal(epoch_rows(0, 20, 10, seed=3), rows) and torch.equal(epoch_rows(2, 4, 10, seed=3), rows[8:12])


def test_hashed_shares_are_spread_evenly():
    shares = torch.tensor([hashed_share(0, str(i)) for i in range(4000)])
    assert abs(float((shares < 0.1).float().mean()) - 0.1) < 0.02
    assert hashed_share(0, "12+34") != hashed_share(1, "12+34")


def test_rows_and_devices_of_a_batch():
    batch = next_token_batch(torch.arange(12).view(3, 4))
    assert batch.targets[:, -1].tolist() == [3, 7, 11] and bool(batch.counts.all())
    assert batch.rows(1, 3).inputs.tolist() == [[4, 5, 6], [8, 9, 10]]
    vectors = hl.data.in_context_regression(2, 3).batch(0, 2).to("cpu", torch.float64)
    assert vectors.inputs.dtype == vectors.targets.dtype == torch.float64 and vectors.counts.dtype == torch.bool


def test_data_without_methods_say_what_to_define():
    for call in (lambda d: d.batch(0, 1), lambda d: d.held_out(1), lambda d: d.description(), lambda d: d.identity()):
        with pytest.raises(InputError, match="define "):
            call(TrainingData())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hl.data.modular_arithmetic(7, fraction=1.5), r"fraction is the share of all 49 pairs .* got 1\.5"),
        (lambda: hl.data.modular_arithmetic(7, fraction=0), "above 0, at most 1"),
        (lambda: hl.data.modular_arithmetic(7, fraction=float("nan")), "got nan"),
        (lambda: hl.data.modular_arithmetic(7, fraction=0.001), "at least one pair"),
        (lambda: hl.data.modular_arithmetic(7, fraction="half"), "got 'half'"),
        (lambda: hl.data.modular_arithmetic(7.5), "p is a whole number of at least 2, got 7.5"),
        (lambda: hl.data.modular_arithmetic(1), "p is a whole number of at least 2"),
        (lambda: hl.data.modular_arithmetic(7, operation="/"), "no operation named '/'"),
        (lambda: hl.data.modular_arithmetic(7, seed=0.5), "seed is a whole number"),
        (lambda: hl.data.decimal_arithmetic(0), "digits is a whole number of at least 1"),
        (lambda: hl.data.decimal_arithmetic(held_out=1), "held_out is a share of all problems"),
        (lambda: hl.data.decimal_arithmetic(4, held_out=1e-6), "from 0.001 to 0.9; got 1e-06 of 100,000,000 problems"),
        (lambda: hl.data.decimal_arithmetic(operation="*"), "no operation named"),
        (lambda: hl.data.tiny_stories(0), "window is a whole number of at least 1"),
        (
            lambda: hl.data.random_repeats(4, length=9, period=4),
            "cannot draw 1 sequences of 9 tokens with a period of 4",
        ),
        (lambda: hl.data.random_repeats(9, length=2), "the period must fit twice"),
        (lambda: hl.data.random_repeats(1), "d_vocab is a whole number of at least 2"),
        (lambda: hl.data.in_context_regression(0), "d is a whole number"),
        (lambda: hl.data.in_context_regression(noise=-1), "noise is a finite number of at least 0"),
        (lambda: hl.data.in_context_regression(inputs="gauss"), "no distribution of inputs named"),
        (lambda: hl.data.markov_source(1), "d_vocab is a whole number of at least 2"),
        (lambda: hl.data.markov_source(concentration=0), "concentration"),
        (lambda: hl.data.markov_source(transitions=torch.eye(3)), "3 parts that never reach each other"),
        (lambda: hl.data.markov_source(transitions=torch.ones(2, 2)), r"sum to 1; got sums \[2\.0, 2\.0\]"),
        (lambda: hl.data.markov_source(transitions=torch.ones(2, 3) / 3), "square matrix"),
        (lambda: hl.data.modullar, "hooklens.data has no 'modullar'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(call, message):
    with refused((HooklensError, AttributeError), message):
        call()


def test_negative_numbers_and_steps_were_counted_from_the_end():
    modular, regression = hl.data.modular_arithmetic(p=5, fraction=0.8), hl.data.in_context_regression(d=2, n_points=3)
    with refused(InputError, "from 0 to 4, got -1 to 2"):
        modular.examples(torch.tensor([[-1, 2]]))
    for data in (modular, regression):
        with refused(InputError, "step is a whole number of at least 0"):
            data.batch(-1, 4)
        with refused(InputError, "size is a whole number of at least 1"):
            next(iter(data.held_out(0)))


@pytest.mark.parametrize("pairs", [torch.tensor([1, 2]), torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 2, 3]])])
def test_pairs_of_another_form_failed_inside_torch_or_became_other_prompts(pairs):
    with refused(InputError, r"whole numbers \[pair 2\]"):
        hl.data.modular_arithmetic(p=5, fraction=0.8).examples(pairs)


@pytest.mark.parametrize("size", [0, -1, 1.5, None, True])
def test_batches_of_no_size_were_empty_or_failed_inside_torch(size):
    with refused(InputError, "size is a whole number of at least 1"):
        hl.data.in_context_regression(d=2, n_points=3).batch(0, size)
