"""`hooklens models`, `check` and `generate`."""

from typing import TYPE_CHECKING, Annotated

import typer

from hooklens.cli.base import FAILED, OK, app, say
from hooklens.cli.options import DEFAULT, AsJson, Device, Model, OfDtype, Seed, load_model, load_reader, of_model
from hooklens.cli.output import show
from hooklens.core.errors import judge
from hooklens.core.terminal import json_line

if TYPE_CHECKING:
    pass


@app.command()
def models(as_json: AsJson = False) -> None:
    """Which models can be loaded, and from where?

    Example: `hooklens models --json`
    """
    from hooklens.pretrained.loading import models as known

    show(known(), as_json)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="An asset, a GGUF file, a folder, a checkpoint or a hub id.")] = DEFAULT,
    device: Device = None,
    dtype: OfDtype = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Load a model and check the guarantees of every hooklens model; the exit code is 1 if a check fails.

    Example: `hooklens check smollm2-135m-instruct --dtype float64`
    """
    from hooklens.cli import estimates
    from hooklens.pretrained.model_check import check as verify
    from hooklens.results.table import Table

    judge(of_model(model, device))
    loaded = load_model(model, device, dtype)
    say(*estimates.told(estimates.of_check(loaded)))
    report = verify(loaded, seed=seed)
    numbers = Table(("check", "measured", "at most", "ok"), report.rows)
    caption = "The measured values and their bounds."
    show(
        numbers if as_json else report.table(), as_json, caption=caption, more={"model": report.model, "ok": report.ok}
    )
    raise typer.Exit(OK if report.ok else FAILED)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    model: Model = DEFAULT,
    max_new_tokens: Annotated[int, typer.Option(help="The maximum number of new tokens.")] = 50,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    chat: Annotated[bool, typer.Option(help="Apply the model's chat template to the prompt.")] = False,
    device: Device = None,
    dtype: OfDtype = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, and print token by token.

    Example: `hooklens generate --chat "Why is the sky blue?" --temperature 0.7`
    """
    from hooklens.cli import estimates
    from hooklens.generation.sampling import Sampling, check_length

    known = {
        "max_new_tokens": lambda: check_length(max_new_tokens),
        "temperature": lambda: Sampling(temperature),
    }
    judge({**known, **of_model(model, device)})
    loaded = load_reader(model, device, dtype)
    if chat:
        prompt = loaded._need_tokenizer().apply_chat_template([{"role": "user", "content": prompt}])
    say(*estimates.told(estimates.of_generate(loaded, max_new_tokens)))
    new = loaded.generate(prompt, max_new_tokens, temperature=temperature, seed=seed, stream=not as_json)
    if as_json:
        typer.echo(json_line({"text": new.text, "tokens": new.new_tokens[0].tolist(), "seed": seed}))
