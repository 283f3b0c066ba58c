"""`hooklens models`, `check` and `generate`."""

from typing import Annotated

import typer

from hooklens.cli.base import FAILED, OK, command, say
from hooklens.cli.options import DEFAULT, SOURCE, AsJson, ModelOptions
from hooklens.cli.output import show
from hooklens.core.terminal import json_line


@command
def models(as_json: AsJson = False) -> None:
    """Which models can be loaded, and from where?

    Example: `hooklens models --json`
    """
    from hooklens.pretrained.loading import models as known

    show(known(), as_json)


@command
def check(model: Annotated[str, typer.Argument(help=SOURCE)] = DEFAULT, *, settings: ModelOptions) -> None:
    """Load a model and check the guarantees of every hooklens model; the exit code is 1 if a check fails.

    Example: `hooklens check smollm2-135m-instruct --dtype float64`
    """
    from hooklens.cli import estimates
    from hooklens.pretrained.model_check import check as verify
    from hooklens.results.table import Table

    settings.judge({})
    loaded = settings.load()
    say(*estimates.announced(estimates.of_check(loaded)))
    report = verify(loaded, seed=settings.seed)
    table = Table(("check", "measured", "at most", "ok"), report.rows) if settings.as_json else report.table()
    more = {"model": report.model, "ok": report.ok}
    show(table, settings.as_json, caption="The measured values and their bounds.", more=more)
    raise typer.Exit(OK if report.ok else FAILED)


@command
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="The maximum number of new tokens.")] = 50,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    chat: Annotated[bool, typer.Option(help="Apply the model's chat template to the prompt.")] = False,
    *,
    settings: ModelOptions,
) -> None:
    """Continue a prompt, and print token by token.

    Example: `hooklens generate --chat "Why is the sky blue?" --temperature 0.7`
    """
    from hooklens.cli import estimates
    from hooklens.generation.sampling import Sampling, check_length

    settings.judge(
        {"max_new_tokens": lambda: check_length(max_new_tokens), "temperature": lambda: Sampling(temperature)}
    )
    model, seed, as_json = settings.load_reader(), settings.seed, settings.as_json
    if chat:
        prompt = model._need_tokenizer().apply_chat_template([{"role": "user", "content": prompt}])
    say(*estimates.announced(estimates.of_generate(model, max_new_tokens)))
    new = model.generate(prompt, max_new_tokens, temperature=temperature, seed=seed, stream=not as_json)
    if as_json:
        typer.echo(json_line({"text": new.text, "tokens": new.new_tokens[0].tolist(), "seed": seed}))
