"""`hooklens probe`."""

from pathlib import Path
from typing import Annotated

import typer

from hooklens.cli.base import command, say
from hooklens.cli.options import Out, ReportOptions
from hooklens.cli.output import show
from hooklens.core.errors import judge


@command
def probe(
    texts: Annotated[Path, typer.Argument(help="A JSONL file with one text and label per line; see the docs.")],
    site: Annotated[str, typer.Option(help="The site to read, at every layer.")] = "resid_post",
    out: Out = Path("probe.html"),
    *,
    settings: ReportOptions,
) -> None:
    """Can a linear probe read these labels, at which layer, and how much of that is due to the probe itself?

    Example: `hooklens probe sentiment.jsonl --site resid_post --out probe.html`
    """
    from hooklens.cli import estimates
    from hooklens.core.names import axes, resolve
    from hooklens.data.jsonl import check_texts, read_texts_file
    from hooklens.plugins.probing import probe_texts
    from hooklens.studies.probe_page import probe_report

    read = settings.judge({"texts": lambda: read_texts_file(texts), "site": lambda: axes(site)})["texts"]
    model = settings.load_reader()
    names = model.hook_names()
    judge({"texts": lambda: check_texts(model, read, str(texts)), "site": lambda: resolve(site, names)})

    say(
        *estimates.how_long(model, sum(len(model.to_tokens(text)[0]) for text in read.text))
    )  # reading only; fits print theirs
    study = probe_texts(model, read.text, read.label, group=read.group, site=site, seed=settings.seed)
    written = settings.write(probe_report(study, f"A probe of {texts.stem} in {model.cfg.model_name}"), study)
    caption = "How well the label is read from texts that the probe was not fitted on, and baselines without the model."
    show(study.table(), settings.as_json, caption=caption, more=written)
