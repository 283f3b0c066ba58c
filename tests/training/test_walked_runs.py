"""A run as a newcomer makes it: its text, its models in other methods, and what it says of itself."""

import ast
import re
from pathlib import Path

import pytest
import torch

import hooklens as hl
from hooklens.core.errors import FileRefused, InputError
from hooklens.plugins.probing.labels import odd_first
from hooklens.testing import tiny_model
from hooklens.training import AdamW, Settings

RHYME = "the cat sat on the mat. the dog sat on the log.\n" * 40


@pytest.fixture(scope="module")
def rhyme(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "rhyme.txt"
    path.write_text(RHYME)
    return hl.data.text(path, window=12)


@pytest.fixture(scope="module")
def trained(rhyme, tmp_path_factory):
    """A model that was trained with dropout, and had no tokenizer; and its run."""
    model = tiny_model(d_vocab=rhyme.d_vocab, n_ctx=12, dropout=0.1)
    settings = Settings(batch=8, optimizer=AdamW(lr=0.02), schedule="constant", checkpoints=3, evaluate=2)
    return model, hl.train(model, rhyme, steps=40, out=tmp_path_factory.mktemp("runs") / "run", settings=settings)


def test_a_trained_model_had_no_tokenizer_and_read_no_text(trained, rhyme):
    model, run = trained
    assert len(model.generate("the ", 6).text) == 6 and model.tokenizer is rhyme.tokenizer
    for checkpoint in hl.checkpoints(run):
        assert checkpoint.load().to_str_tokens("cat") == ["c", "a", "t"]


def test_a_checkpoint_met_an_unknown_character_with_an_error_of_the_tokenizers_package(trained):
    loaded = hl.checkpoints(trained[1])[-1].load()
    with pytest.raises(InputError, match=r"the text holds 'é', which is none of the 15 tokens .*'\\n', ' '"):
        loaded.generate("thé", 3)


def test_data_in_another_vocabulary_than_the_models_were_trained_on_in_silence(trained, rhyme, tmp_path):
    (tmp_path / "other.txt").write_text("a bad cab fed a bee. " * 40)
    other = hl.data.text(tmp_path / "other.txt", window=12)
    model = hl.checkpoints(trained[1])[-1].load()
    with pytest.raises(
        InputError, match=r"token 0 is ' ' in the data and '\\n' in the model.*tokenizer=model.tokenizer"
    ):
        hl.train(model, other, steps=1)
    again = hl.data.text(rhyme_path(rhyme, tmp_path), tokenizer=model.tokenizer, window=12)
    assert hl.train(model, again, steps=1).steps_done == 1  # a tokenizer that was loaded is the one that was saved
    assert hl.train(model, rhyme, steps=1).steps_done == 1


def rhyme_path(rhyme, folder):
    path = folder / rhyme.name
    path.write_text(RHYME)
    return path


def test_a_run_went_on_with_another_part_of_the_held_out_text(trained, rhyme):
    model, run = trained
    settings = Settings.from_json(run.identity["settings"])
    with pytest.raises(InputError, match=r"data.evaluated was 64 and is None"):
        hl.train(model, rhyme.with_all_held_out(), steps=40, out=run.path, settings=settings)


def test_five_methods_read_the_checkpoints_of_a_run_with_dropout(trained):
    """Lens, patching, heads, a probe and a circuit on the first and the last kept model, trained with dropout."""
    _, run = trained
    seen, kept = [], hl.checkpoints(run)
    for checkpoint in (kept[0], kept[-1]):
        model = checkpoint.load()
        assert not model.training and model.cfg.dropout == 0.1
        metric = hl.logit_diff(model, answer="t", wrong_answer="g")
        clean, corrupted = "the ca", "the do"
        lens = hl.logit_lens(model, clean)
        sweep = hl.patch(model, clean, corrupted, metric, site="resid_post")
        assert float(sweep.values[-1, -1]) == pytest.approx(sweep.clean, abs=1e-4)  # all that the logits read
        heads = hl.heads.score_heads(model, draws=2)
        task = odd_first(model)
        _, study = hl.train_probe(model, task, kind=hl.probing.MassMean(), null_draws=1)
        edges = hl.circuits.eap(model, clean, corrupted, metric)
        seen.append((lens.top_words(1), sweep.values, heads.mean("previous"), study.table(1).rows, edges.scores))
    untrained, last = seen
    assert not torch.allclose(untrained[1], last[1]) and not torch.allclose(untrained[2], last[2])


def test_a_run_said_nothing_but_its_path(trained, tmp_path):
    _, run = trained
    losses = f"loss {run.loss[-1]:.4g}, held out {run.held_out_loss[-1]:.4g}"
    assert repr(run) == f"Run({str(run.path)!r}: 40 of 40 steps, {losses})"
    assert repr(hl.training.Run(tmp_path)) == f"Run({str(tmp_path)!r})"


def test_a_run_given_as_a_model_names_its_last_checkpoint(trained):
    _, run = trained
    with pytest.raises(FileRefused, match=re.escape(f"such as {run.checkpoints()[-1].path}")):
        hl.load(run.path)


def test_type_checkers_saw_every_task_as_an_object():
    """Each lazy name of hl.data is imported for type checkers, from the module that it really comes from."""
    import hooklens.data as tasks

    (block,) = (
        node
        for node in ast.parse(Path(tasks.__file__).read_text()).body
        if isinstance(node, ast.If) and any(isinstance(inner, ast.ImportFrom) for inner in node.body)
    )
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == {name: f"hooklens.data.{module}" for name, module in tasks._HOMES.items()}
    assert set(typed) == set(tasks.__all__)
