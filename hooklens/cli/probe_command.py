"""`hooklens probe`."""

from pathlib import Path
from typing import Annotated

import typer

from hooklens.cli.base import app
from hooklens.cli.options import DEFAULT, AsJson, Device, Model, OfDtype, Out, Seed, check_out, load_reader, of_model
from hooklens.cli.output import say_how_long, show, written
from hooklens.core.errors import judge


@app.command()
def probe(
    texts: Annotated[Path, typer.Argument(help="A JSONL file with one text and label per line; see the docs.")],
    site: Annotated[str, typer.Option(help="The site to read, at every layer.")] = "resid_post",
    model: Model = DEFAULT,
    out: Out = Path("probe.html"),
    device: Device = None,
    dtype: OfDtype = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Can a linear probe read these labels, at which layer, and how much of that is due to the probe itself?

    Example: `hooklens probe sentiment.jsonl --site resid_post --out probe.html`
    """
    from hooklens.core.names import axes, resolve
    from hooklens.data.jsonl import check_texts, read_texts_file
    from hooklens.plugins.probing import probe_texts
    from hooklens.studies.probe_page import probe_report

    checks = {"out": lambda: check_out(out), "texts": lambda: read_texts_file(texts), "site": lambda: axes(site)}
    read = judge({**checks, **of_model(model, device)})["texts"]
    loaded = load_reader(model, device, dtype)
    names = loaded.hook_names()
    judge({"texts": lambda: check_texts(loaded, read, str(texts)), "site": lambda: resolve(site, names)})

    say_how_long(loaded, sum(len(loaded.to_tokens(text)[0]) for text in read.text))  # reading only; fits print theirs
    study = probe_texts(loaded, read.text, read.label, group=read.group, site=site, seed=seed)
    probe_report(study, f"A probe of {texts.stem} in {loaded.cfg.model_name}").save(out, data=study)
    told = "How well the label is read from texts that the probe was not fitted on, and baselines without the model."
    show(study.table(), as_json, caption=told, more=written(out))
