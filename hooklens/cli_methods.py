"""The methods on the command line: lens, heads, circuit, probe. Prompts come as options or from a JSONL file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hooklens.cli import (
    _DEFAULT,
    AsJson,
    Device,
    Model,
    OfDtype,
    Seed,
    app,
    check_out,
    load_model,
    load_reader,
    of_model,
    of_pair,
    say_how_long,
    show,
    written,
)
from hooklens.core.errors import InputError, judge

if TYPE_CHECKING:
    from hooklens.data.jsonl import PromptPairs
    from hooklens.model.transformer import HookedTransformer
    from hooklens.plugins.claims import Registration
    from hooklens.plugins.lens import LensStudy
    from hooklens.table import Table

Clean = Annotated[str | None, typer.Option(help="The prompt that is answered rightly.")]
Corrupted = Annotated[str | None, typer.Option(help="The same prompt with one thing changed.")]
Answer = Annotated[str | None, typer.Option(help="The prompt's next token, often with a leading space.")]
WrongAnswer = Annotated[str | None, typer.Option(help="Another next token to hold it against.")]
Out = Annotated[Path, typer.Option(help="The report; its numbers go beside it as .json.")]
PairsFile = Annotated[Path | None, typer.Option("--pairs", help="A JSONL file of prompt pairs instead; see docs.")]


Plans = Annotated[
    list[Path] | None, typer.Option("--registered", help="A plan that `hooklens register` wrote before the run.")
]
Digests = Annotated[
    list[str] | None, typer.Option("--digest", help="A plan's whole digest as published; without: self-dated.")
]


@app.command()
def lens(
    prompt: Annotated[str | None, typer.Argument(help="A prompt; or --pairs, whose clean prompts are read.")] = None,
    answer: Answer = None,
    wrong_answer: WrongAnswer = None,
    pairs: PairsFile = None,
    model: Model = _DEFAULT,
    out: Out = Path("lens.html"),
    device: Device = None,
    dtype: OfDtype = None,
    as_json: AsJson = False,
) -> None:
    """What would the model say after every layer, and which parts write its answer?

    Example: `hooklens lens "When Mary and John went to the store, John gave a drink to" --answer " Mary" --wrong-answer
    " John"`
    """

    def prompts() -> "PromptPairs | None":
        if (prompt is None) == (pairs is None):
            raise InputError("give PROMPT or --pairs file.jsonl, one of the two")
        return None if pairs is None else _pairs(pairs, None, None, answer, wrong_answer)

    known = {"out": lambda: check_out(out), "pairs": prompts, **of_pair(None, None, answer, wrong_answer)}
    read = judge({**known, **of_model(model, device)})["pairs"]
    loaded = load_reader(model, device, dtype)
    from hooklens import cli_time
    from hooklens.plugins.lens import lens_study
    from hooklens.table import Table

    if read is None:
        say_how_long(loaded, cli_time.of_lens(loaded, len(loaded.to_tokens(str(prompt))[0])))
        study = lens_study(loaded, str(prompt), answer, wrong_answer, names=["the prompt"])
        study.report().save(out, data=study)
        layers = study.lenses[0].table()
        _show_lens(study, as_json, ("What the stream says after each layer.", layers), study.lenses[0].terms, out)
        return
    from hooklens.data.jsonl import check_pairs

    check_pairs(loaded, read, str(pairs), corrupted=False)
    say_how_long(loaded, cli_time.of_lens(loaded, _tokens(loaded, read)))
    names = [f"line {line}" for line in read.lines]
    study = lens_study(loaded, read.clean, read.answer, read.wrong_answer, group=read.group_numbers(), names=names)
    told = f"the clean prompts of all {len(read)} lines; a lens does not read the corrupted ones"
    study.report().text(f"Read from {pairs}: {told}.").save(out, data=study)
    path = study.trajectory.table()
    layers = Table(path.columns, [row for row in path.rows if not str(row[0]).endswith("_mid")])
    before = ("Layer by layer: medians of ranks, means of the rest, over prompts.", layers)
    _show_lens(study, as_json, before, study.trajectory.terms, out, {"read": told})


def _show_lens(
    study: "LensStudy",
    as_json: bool,
    layers: tuple[str, "Table"],
    terms: Mapping[str, str],
    out: Path,
    more: Mapping[str, str] | None = None,
) -> None:
    controls = "; ".join(f"{name}: {terms[name]}" for name in layers[1].columns if name.startswith("control"))
    caption = "What each part adds directly to the answer's logit, the largest first; nothing where it is not large "
    show(
        study.table(),
        as_json,
        caption=f"{caption}beside its spread over tokens.",
        before={"layers": (f"{layers[0]} {controls}.", layers[1])},
        more={**(more or {}), **written(out)},
    )


@app.command()
def heads(
    clean: Clean = None,
    corrupted: Corrupted = None,
    answer: Answer = None,
    wrong_answer: WrongAnswer = None,
    pairs: PairsFile = None,
    model: Model = _DEFAULT,
    n: Annotated[
        int, typer.Option("--sequences", help="Random sequences for scores, and as many for effects; at least 6.")
    ] = 12,
    ioi: Annotated[
        int, typer.Option(help="Prompt pairs to label name movers by, and measure them on; a multiple of 4; 0: none.")
    ] = 128,
    registered: Plans = None,
    digest: Digests = None,
    out: Out = Path("heads.html"),
    device: Device = None,
    dtype: OfDtype = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Which heads are previous-token, duplicate-token, induction or copy-suppression heads, and on what evidence?

    With prompt pairs, also: which heads carry the answer there, chosen on half of the pairs and measured on the other?

    Example: `hooklens heads --pairs ioi.jsonl --out heads.html`
    """
    from hooklens import cli_time
    from hooklens.plugins.heads import head_study, taxonomy
    from hooklens.plugins.heads.report import taxonomy_report
    from hooklens.plugins.heads.taxonomy import check_pairs_asked, check_sizes

    pair = (clean, corrupted, answer, wrong_answer)
    own = pairs is not None or any(given is not None for given in pair)
    checks = {
        "out": lambda: check_out(out),
        "registered": lambda: _plans(registered, digest),
        "pairs": lambda: _pairs(pairs, *pair) if own else None,
        **of_pair(*pair),
        "n": lambda: check_sizes(n),
        "ioi": lambda: check_pairs_asked(ioi),
        **of_model(model, device),
    }
    known = judge(checks)
    plans, read = known["registered"], known["pairs"]
    loaded = load_model(model, device, dtype) if read is None else load_reader(model, device, dtype)
    if read is not None:
        _check(loaded, read, pairs)
    own_pairs = 0.0 if read is None else cli_time.of_head_study(loaded, _tokens(loaded, read))
    say_how_long(loaded, own_pairs + cli_time.of_heads(loaded, n, 0 if loaded.tokenizer is None else ioi))
    found = taxonomy(loaded, n=n, ioi=ioi, seed=seed)
    if read is None:
        found.report(loaded, registered=plans).save(out, data=found)
        told = "Heads on random sequences that repeat: attention, what the loss rises by without it, and the control."
        show(found.table(20), as_json, caption=told, more={"names": found.note, **written(out)})
        return
    study = head_study(loaded, read, labels=found.labels(), seed=seed)
    taxonomy_report(found, study.report(), loaded, plans).save(out, data={"taxonomy": found, "pairs": study})
    told = "What the logit difference falls by without what each head carries, the largest first."
    show(study.table(20), as_json, caption=told, more=written(out))


@app.command()
def circuit(
    clean: Clean = None,
    corrupted: Corrupted = None,
    answer: Answer = None,
    wrong_answer: WrongAnswer = None,
    pairs: PairsFile = None,
    edges: Annotated[int, typer.Option(help="How many edges the circuit may have.")] = 200,
    draws: Annotated[int, typer.Option(help="Random circuits that stand beside it, at least 100.")] = 100,
    full: Annotated[
        bool, typer.Option("--full", help="Also completeness, minimality and the curve over sizes: minutes a pair.")
    ] = False,
    model: Model = _DEFAULT,
    registered: Plans = None,
    digest: Digests = None,
    out: Annotated[Path, typer.Option(help="The report; its numbers and the circuit go beside it.")] = Path(
        "circuit.html"
    ),
    device: Device = None,
    dtype: OfDtype = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Which edges between heads and MLPs carry an answer? Found on half of the pairs, tested on the other.

    Example: `hooklens circuit --pairs ioi.jsonl --edges 200 --out circuit.html`

    A single pair can only be tested on itself, which the report says.
    """
    from hooklens import cli_time
    from hooklens.plugins.circuits import circuit_graph, study_circuit
    from hooklens.plugins.circuits.circuit_study import check_edges
    from hooklens.plugins.circuits.measure import check_draws

    pair = (clean, corrupted, answer, wrong_answer)
    checks = {
        "out": lambda: check_out(out),
        "registered": lambda: _plans(registered, digest),
        "pairs": lambda: _pairs(pairs, *pair),
        **of_pair(*pair),
        "edges": lambda: check_edges(edges),
        "draws": lambda: check_draws(draws),
        **of_model(model, device),
    }
    known = judge(checks)
    plans, read = known["registered"], known["pairs"]
    loaded = load_reader(model, device, dtype)
    judge({"pairs": lambda: _check(loaded, read, pairs), "edges": lambda: check_edges(edges, circuit_graph(loaded))})
    say_how_long(loaded, cli_time.of_circuit(loaded, _tokens(loaded, read), draws, full=full))
    study = study_circuit(loaded, read, edges=edges, full=full, draws=draws, seed=seed)
    study.report(registered=plans).save(out, data=study)
    kept = study.circuit.save_json(out.with_suffix(".circuit.json"))
    told = "How much of the logit difference the circuit keeps alone, beside random circuits of as many edges."
    show(study.table(), as_json, caption=told, more={**written(out), "circuit": kept.absolute()})


@app.command()
def probe(
    texts: Annotated[Path, typer.Argument(help="A JSONL file: a text and a label a line; see the docs.")],
    site: Annotated[str, typer.Option(help="What is read, at every layer.")] = "resid_post",
    model: Model = _DEFAULT,
    out: Out = Path("probe.html"),
    device: Device = None,
    dtype: OfDtype = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Can a linear probe read these labels, where, and how much of that is the probe's own doing?

    Example: `hooklens probe sentiment.jsonl --site resid_post --out probe.html`
    """
    from hooklens.core.names import axes, resolve
    from hooklens.data.jsonl import check_texts, read_texts_file
    from hooklens.plugins.probing import probe_texts

    checks = {"out": lambda: check_out(out), "texts": lambda: read_texts_file(texts), "site": lambda: axes(site)}
    read = judge({**checks, **of_model(model, device)})["texts"]
    loaded = load_reader(model, device, dtype)
    names = loaded.hook_names()
    judge({"texts": lambda: check_texts(loaded, read, str(texts)), "site": lambda: resolve(site, names)})

    say_how_long(loaded, sum(len(loaded.to_tokens(text)[0]) for text in read.text))  # of what is read; fits tell theirs
    study = probe_texts(loaded, read.text, read.label, group=read.group, site=site, seed=seed)
    study.report(f"A probe of {texts.stem} in {loaded.cfg.model_name}").save(out, data=study)
    told = (
        "How well the label is read from texts that the probe was not fitted on, and what reads it without the model."
    )
    show(study.table(), as_json, caption=told, more=written(out))


def _pairs(
    path: Path | None, clean: str | None, corrupted: str | None, answer: str | None, wrong_answer: str | None
) -> "PromptPairs":
    """Pairs from a file or the one of the options; not both, not half of one."""
    from hooklens.data.jsonl import PromptPairs, read_pairs_file

    given = {"--clean": clean, "--corrupted": corrupted, "--answer": answer, "--wrong-answer": wrong_answer}
    named = [name for name, value in given.items() if value is not None]
    if path is not None:
        if named:
            raise InputError(f"--pairs {path} holds prompts and answers, so {' and '.join(named)} cannot be given too")
        return read_pairs_file(path)
    if len(named) < len(given):
        missing = [name for name in given if name not in named]
        raise InputError(f"give --pairs file.jsonl, or a pair by {', '.join(given)}; missing: {', '.join(missing)}")
    one, other, right, wrong = ([str(value)] for value in given.values())
    return PromptPairs(one, other, right, wrong, ["the pair"])


@app.command()
def register(
    plan: Annotated[Path, typer.Argument(help="The file to write; one that exists is never overwritten.")],
    hypothesis: Annotated[str, typer.Option(help="The statement, as the method's page will put it.")],
    control: Annotated[str, typer.Option(help="What the effect is held against, in the method's words.")],
    n: Annotated[int, typer.Option("--n", help="How many prompts the effect will be measured on.")],
    metric: Annotated[str, typer.Option(help="What is measured.")] = "logit_diff",
    threshold: Annotated[float, typer.Option(help="How far beyond 0 the effect has to lie.")] = 0.0,
    below: Annotated[bool, typer.Option("--below", help="The effect should lie below 0.")] = False,
    model: Annotated[str, typer.Option("--model", "-m", help="The model's name, if the plan is for one only.")] = "",
    as_json: AsJson = False,
) -> None:
    """Write a claim down before the run: `heads` and `circuit` hold what they find against it (--registered).

    Example: `hooklens register plan.json --hypothesis "200 edges carry the answer" --threshold 0.5 --n 32
    --control "what random circuits keep, 97.5 % edge of 100"`, and after it `hooklens circuit --pairs ioi.jsonl
    --registered plan.json`

    The statements and controls of each command stand in docs/claims.md. Publish the digest that is printed, and give
    it to the run (`--digest`): without it the plan counts as self-dated.
    """
    from hooklens.plugins.claims import Registration
    from hooklens.plugins.claims.registration import check_new
    from hooklens.table import Table

    side = "below" if below else "above"
    checks = {
        "plan": lambda: check_new(plan),
        "hypothesis": lambda: Registration(hypothesis, metric, control, threshold, n, side=side, model=model),
    }
    made = judge(checks)["hypothesis"].write(plan)
    rows = [(name, getattr(made, name)) for name in ("hypothesis", "metric", "control", "threshold", "side", "n")]
    more = {"plan": str(plan), "written": made.written, "digest": made.digest}
    show(Table(("plan", "held to"), rows), as_json, more=more)


def _tokens(model: "HookedTransformer", pairs: "PromptPairs") -> int:
    """Of all clean prompts together."""
    return sum(len(model.to_tokens(text)[0]) for text in pairs.clean)


def _plans(paths: list[Path] | None, digests: list[str] | None) -> "list[Registration]":
    """The plans in these files; one that is missing or was edited is refused before anything runs."""
    from hooklens.plugins.claims import read_plans

    return read_plans(paths or [], digests or [])


def _check(model: "HookedTransformer", pairs: "PromptPairs", path: Path | None) -> None:
    """Can the model use these pairs? Every line of a file that it cannot is told, before anything runs."""
    from hooklens.data.jsonl import check_pair, check_pairs

    if path is None:
        check_pair(model, pairs)
    else:
        check_pairs(model, pairs, str(path))
