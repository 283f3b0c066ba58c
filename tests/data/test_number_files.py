"""Comma-separated files in place of our generators: what is read, how it is split, and how bad lines are named."""

import pytest
import torch

import hooklens as hl
from hooklens.core.errors import ArgumentError, FileRefused, InputError
from hooklens.data.number_files import task_of_file
from hooklens.model.config import VectorEmbed
from hooklens.plugins.algorithmic.fourier.pair_table import run_pairs
from hooklens.plugins.algorithmic.icl import prompts_of
from hooklens.testing import tiny_model
from hooklens.training import Settings


def write(tmp_path, *lines, name="numbers.csv"):
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def prompts_file(tmp_path, data, n):
    """Tasks of a generator, as a file."""
    x, y, _ = data.draw(n, torch.Generator().manual_seed(0))
    rows = [
        ",".join([f"p{i}", *map(repr, map(float, [*point, answer]))])
        for i in range(n)
        for point, answer in zip(x[i], y[i], strict=True)
    ]
    header = ",".join(["prompt", *(f"x{i + 1}" for i in range(data.d)), "y"])
    return write(tmp_path, header, *rows), x, y


def triples(p, rule):
    return ["a,b,c", *(f"{a},{b},{rule(a, b) % p}" for a in range(p) for b in range(p))]


def test_prompts_of_a_file_are_the_generators_bit_for_bit(tmp_path):
    generator = hl.data.in_context_regression(3, 4)
    path, x, y = prompts_file(tmp_path, generator, 20)
    data = hl.data.regression_prompts(path, held_out=0.25, seed=2)
    assert torch.equal(data.x, x) and torch.equal(data.y, y)
    whole, kept = data.batch(0, 100), torch.cat([batch.inputs for batch in data.held_out(2)])
    assert len(whole) == 15 and len(kept) == 5
    rows = {tuple(row.flatten().tolist()) for row in torch.cat([whole.inputs, kept])}
    assert rows == {tuple(row.flatten().tolist()) for row in generator.tokens(x, y).inputs}
    assert torch.equal(whole.targets[:, -1, 0], y[data.split[0]][:, -1]) and not whole.inputs[:, -1, -1].any()
    epoch = torch.cat([data.batch(step, 5).inputs for step in range(3)])
    assert {tuple(r.flatten().tolist()) for r in epoch} == {tuple(r.flatten().tolist()) for r in whole.inputs}
    assert not torch.equal(data.split[1], hl.data.regression_prompts(path, held_out=0.25, seed=3).split[1])


def test_a_model_learns_from_a_file_of_prompts(tmp_path):
    path, _, _ = prompts_file(tmp_path, hl.data.in_context_regression(1, 3, inputs="normal"), 64)
    data = hl.data.regression_prompts(path)
    cfg = hl.HookedTransformerConfig(
        n_layers=1, d_model=8, n_heads=1, n_ctx=4, d_vocab=1, embed=VectorEmbed(d_in=data.d_in), mask="none"
    )
    settings = Settings(batch=64, loss="squared_error", evaluate=1)
    run = hl.train(hl.HookedTransformer(cfg, seed=0), data, steps=30, settings=settings, show=False)
    assert run.loss[-1] < 0.7 * run.loss[0] and "64" not in data.description() and "58" in data.description()


def test_triples_of_a_file_are_the_table_of_the_generator(tmp_path):
    path = write(tmp_path, *triples(5, lambda a, b: a + b))
    data, ours = hl.data.modular_triples(path, fraction=0.6, seed=1), hl.data.modular_arithmetic(5, fraction=0.6)
    assert (data.p, data.d_vocab, data.operation) == (5, 6, "+") and "a + b modulo 5" in data.description()
    train, kept = data.pairs
    assert len(train) == 15 and {tuple(row) for row in torch.cat([train, kept]).tolist()} == {
        (a, b) for a in range(5) for b in range(5)
    }
    read, generated = data.examples(train), ours.examples(train)
    assert torch.equal(read.inputs, generated.inputs) and torch.equal(read.targets, generated.targets)
    assert data.identity() == hl.data.modular_triples(path, fraction=0.6, seed=1).identity()
    assert sum(map(len, data.held_out(3))) == 10 and len(data.batch(0, 100)) == 15
    assert torch.equal(data.table, ours.table)


def test_the_analyses_read_files_as_they_read_generators(tmp_path):
    path = write(tmp_path, *triples(5, lambda a, b: a + b))
    data, model = hl.data.modular_triples(path, fraction=0.6), tiny_model(d_vocab=6)
    ours = hl.data.modular_arithmetic(5, fraction=0.6)
    tables = [run_pairs(model, task) for task in (data, ours)]
    assert torch.equal(tables[0].logits, tables[1].logits) and int(tables[0].trained.sum()) == 15
    assert bool(tables[0].trained[tuple(data.pairs[0].T)].all())
    prompts, x, y = prompts_file(tmp_path, hl.data.in_context_regression(2, 3), 8)
    shown = prompts_of(hl.data.regression_prompts(prompts).batch(0, 8))
    assert torch.equal(shown.target.sort().values, y[:, -1][hl.data.regression_prompts(prompts).split[0]].sort().values)
    assert shown.points.shape == (7, 3, 2) and x.shape == (8, 4, 2)


def test_a_part_of_another_table_is_read_as_it_stands(tmp_path):
    path = write(tmp_path, "a, b, c", "4,0,2", "", '"0",1,6', name="table.csv")
    data = hl.data.modular_triples(path, p=11, fraction=0.5)
    assert (data.p, data.operation) == (11, "table") and "a table" in data.description()
    assert data.answers(torch.tensor([[0, 1], [4, 0]])).tolist() == [6, 2]
    with pytest.raises(InputError, match=r"table.csv has no triple for the pair \(1, 1\)"):
        data.answers(torch.tensor([[4, 0], [1, 1]]))
    changed = write(tmp_path, "a,b,c", "4,0,3", "0,1,6", name="other.csv")
    other = hl.data.modular_triples(changed, p=11, fraction=0.5)
    assert data.identity()["triples"] != other.identity()["triples"]
    rules = {"-": int.__sub__, "x": int.__mul__}
    read = {sign: hl.data.modular_triples(write(tmp_path, *triples(7, rule))) for sign, rule in rules.items()}
    assert {sign: data.operation for sign, data in read.items()} == {"-": "-", "x": "x"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["prompt,x1,x3,y"],
            "line 1: the header of regression prompts is prompt,x1,...,xd,y, separated by commas; got prompt,x1,x3,y",
        ),
        (["prompt,y"], "line 1: the header of regression prompts"),
        ([""], "line 1: .*got an empty line"),
        (["prompt,x1,y"], "has 0 prompts; at least 2"),
        (["prompt,x1,y", "1,0,0", "1,0,0"], "has 1 prompts; at least 2"),
        (["prompt,x1,y", "1,0,0", "1,one,0"], "line 3: 'one' is no finite number"),
        (["prompt,x1,y", "1,0,", "1,1,0"], "line 2: '' is no finite number"),
        (["prompt,x1,y", "1,0,nan", "1,1,0"], "line 2: 'nan' is no finite number"),
        (["prompt,x1,y", "1,1e39,1", "1,1,0"], "line 2: '1e39' is no finite number of float32"),
        (["prompt,x1,y", "1,1_0,1", "1,1,0"], "line 2: '1_0' is no finite number"),
        (["prompt,x1,y", "1,0,0", "1,0"], "line 3: 2 values, and the header has 3 columns"),
        (["prompt,x1,y", "1,0,0", "1,0,0", "2,0,0"], "line 4: prompt '2' has 1 row"),
        (
            ["prompt,x1,y", *["1,0,0"] * 3, *["2,0,0"] * 2, "3,1,1"],
            "line 5: prompt '2' has 2 rows, and the first has 3",
        ),
        (["prompt,x1,y", *["1,0,0"] * 2, *["2,0,0"] * 3], "line 4: prompt '2' has 3 rows, and the first has 2"),
        (["prompt,x1,y", *["1,0,0"] * 2, *["2,0,0"] * 2, "1,0,0"], "line 6: prompt '1' began at line 2"),
    ],
)
def test_bad_lines_of_prompts_are_named(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        hl.data.regression_prompts(write(tmp_path, *lines))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,b"], "line 1: the header of triples is a,b,c, separated by commas; got a,b"),
        (["1,2,3"], "line 1: the header of triples is a,b,c, separated by commas; got 1,2,3"),
        (["a,b,c"], "has a header and no triples"),
        (["a,b,c", "1,2,x"], r"line 2: 'x' is no whole number from 0 to p - 1 = 4"),
        (["a,b,c", "1,2,3", "1,3,5"], r"line 3: '5' is no whole number from 0 to p - 1 = 4"),
        (["a,b,c", "-1,2,3"], "line 2: '-1' is no whole number"),
        (["a,b,c", "1,2.0,3"], "line 2: '2.0' is no whole number"),
        (["a,b,c", "1,2,3", "0,0,0", "1,2,3"], r"line 4: the pair \(1, 2\) was given at line 2"),
        (["a,b,c", "1,2,3,4"], "line 2: 4 values, and the header has 3 columns"),
    ],
)
def test_bad_lines_of_triples_are_named(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        hl.data.modular_triples(write(tmp_path, *lines), p=5)


def test_files_and_arguments_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "damaged.csv").write_bytes(b"a,b,c\n1,\xff\xfe,3\n")
    with pytest.raises(InputError, match="got an empty line"):
        hl.data.modular_triples(tmp_path / "empty.csv")
    with pytest.raises(FileRefused, match="cannot read triples"):
        hl.data.modular_triples(tmp_path / "damaged.csv")
    with pytest.raises(InputError, match="there is no such file"):
        hl.data.regression_prompts(tmp_path / "missing.csv")
    path = write(tmp_path, "a,b,c", "1,2,3", "0,0,0")
    with pytest.raises(ArgumentError, match="fraction is the share of all 2 pairs to train on"):
        hl.data.modular_triples(path, fraction=0.4)
    with pytest.raises(InputError, match="p - 1 = 2"):
        hl.data.modular_triples(path, p=3)
    with pytest.raises(ArgumentError, match="held_out is a share of the prompts"):
        hl.data.regression_prompts(path, held_out=1.0)


def test_a_file_is_read_line_by_line(tmp_path):
    """The error of an early line comes before the rest of a file is read."""
    path = tmp_path / "long.csv"
    with open(path, "wb") as file:
        file.write(b"a,b,c\n1,2,9\n")
        file.seek(2**33)  # eight gibibytes of a sparse file
        file.write(b"\n")
    with pytest.raises(InputError, match="line 2: '9'"):
        hl.data.modular_triples(path, p=5)


def test_the_header_says_which_task_reads_a_file(tmp_path):
    tasks = {"a,b,c": "modular_triples", "prompt,x1,y": "regression_prompts", "once upon, a time": "text"}
    assert {line: task_of_file(write(tmp_path, line)) for line in tasks} == tasks


def test_files_that_a_spreadsheet_wrote_are_read_as_plain_ones(tmp_path):
    plain = hl.data.modular_triples(write(tmp_path, *triples(5, lambda a, b: a + b)), fraction=0.6)
    quoted = ['"A","B","C"', *(",".join(f'"{n}"' for n in row) for row in plain.triples.tolist()), ",,", "", " ,,"]
    path = tmp_path / "spreadsheet.csv"
    path.write_bytes(("\ufeff" + "\r\n".join(quoted) + "\r\n").encode())
    assert task_of_file(path) == "modular_triples"
    assert torch.equal(hl.data.modular_triples(path, fraction=0.6).triples, plain.triples)
    prompts = ['"Prompt","X1","Y"', *(f'"p{i}","{i}.5","{-i}"' for i in (1, 1, 2, 2)), ",,"]
    path.write_bytes(("\ufeff" + "\r\n".join(prompts) + "\r\n").encode())
    assert task_of_file(path) == "regression_prompts"
    assert hl.data.regression_prompts(path, held_out=0.5).x.flatten().tolist() == [1.5, 1.5, 2.5, 2.5]


@pytest.mark.parametrize("header", ["a;b;c", "a\tb\tc", '"a";"b";"c"'])
def test_a_table_with_other_separators_is_refused_and_no_text(tmp_path, header):
    path = write(tmp_path, header, "1;2;3")
    assert task_of_file(path) == "modular_triples"
    with pytest.raises(InputError, match="a,b,c, separated by commas; got"):
        hl.data.modular_triples(path)


def test_files_of_the_same_numbers_are_equal_data_and_others_are_not(tmp_path):
    plus, same = (hl.data.modular_triples(write(tmp_path, *triples(5, lambda a, b: a + b)), fraction=0.6) for _ in "ab")
    other = hl.data.modular_triples(write(tmp_path, *triples(5, lambda a, b: a * b + a)), fraction=0.6)
    again = hl.data.modular_triples(write(tmp_path, *triples(5, lambda a, b: a * b + b)), fraction=0.6)
    assert plus == same and hash(plus) == hash(same)
    assert other.operation == again.operation == "table" and other != again and plus != hl.data.modular_arithmetic(5)
