"""Generation: one token after the other through the KV cache, hooks and captures active at every step."""

import html
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.cache import ActivationCache
from hooklens.core.errors import Absent, ArgumentError, InputError, WrongType
from hooklens.core.hooks import HookScope, edited_elsewhere
from hooklens.core.names import Where
from hooklens.core.terminal import printable
from hooklens.generation.continuation import Continuation, OnPiece, Stops
from hooklens.generation.decoder import PACKING_PAYS_FROM, Decoder
from hooklens.model.config import TokenEmbed
from hooklens.model.ids import as_ids
from hooklens.model.kv_cache import KVCache
from hooklens.model.linear import packed_linears
from hooklens.results.result import Result, Table

if TYPE_CHECKING:
    from hooklens.model.transformer import HookedTransformer

Prompt = Any  # text, ids, a tensor [pos] or [batch pos], or a list of texts or of id rows of any lengths
Row = Int[Tensor, "_pos"]  # rows of one call differ in length
Logits = Float[Tensor, "batch d_vocab"]
_PRINTED, _PROMPT_SHOWN = 8, 300  # prompts, and characters of each, where a generation is printed


@dataclass(frozen=True, eq=False)
class Generation(Result):
    """The generated tokens and texts of each prompt.

    `new_tokens` include the stop token that ended them; `texts` do not include any stop. Without a tokenizer `texts`
    and `prompt_texts` are None. `caches` has the requested steps; each row is a prompt, even if it stopped earlier.
    Shorter prompts are padded on the left there (`attention_mask` is False): select positions with
    `cache.slice(pos=-1)`. `seed` reproduces the draw.
    """

    prompts: list[Row]
    new_tokens: list[Row]
    texts: list[str] | None
    stopped: list[bool]
    seed: int | None
    caches: dict[int, ActivationCache]
    prompt_texts: list[str] | None = None

    @property
    def text(self) -> str:
        """The new text, if there is one prompt."""
        if self.texts is None:
            raise Absent("a generation without a tokenizer has no text; read its new_tokens")
        if len(self.texts) != 1:
            raise Absent(f"a generation from {len(self.texts)} prompts has no single text; read its texts")
        return self.texts[0]

    @property
    def tokens(self) -> list[Row]:
        """The prompt and new tokens of each row."""
        return [torch.cat(pair) for pair in zip(self.prompts, self.new_tokens, strict=True)]

    def padded(self, pad: int = 0) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """`tokens` as one tensor, padded on the right, and the attention mask that `model(...)` takes with it."""
        rows = self.tokens
        real = [torch.ones_like(row, dtype=torch.bool) for row in rows]
        stack = torch.nn.utils.rnn.pad_sequence
        return stack(rows, batch_first=True, padding_value=pad), stack(real, batch_first=True)

    def table(self, n: int | None = None) -> Table:
        """One row for each prompt."""
        texts = self.texts or _as_numbers(self.new_tokens)
        counts = map(len, self.new_tokens)
        rows = zip(range(len(texts)), texts, counts, self.stopped, strict=True)
        return Table(("prompt", "continuation", "new tokens", "stopped"), list(rows)).head(n)

    def __repr__(self) -> str:
        """Each prompt, or its end if it is long, and its continuation."""
        lines = [f"Generation: {len(self.prompts)} prompt{'s'[: len(self.prompts) > 1]}"]
        for i, (prompt, text, told) in enumerate(self._told()[:_PRINTED]):
            asked = prompt if len(prompt) <= _PROMPT_SHOWN else f"...{prompt[-_PROMPT_SHOWN:]}"
            lines += [f"prompt {i}: {asked}", f"  {told}: {text}"]
        rest = len(self.prompts) - _PRINTED
        return "\n".join(lines + ([f"... {rest} more: .texts"] if rest > 0 else []))

    def _repr_html_(self) -> str:
        """The display in a notebook: each prompt in a paler colour, and its continuation, with their line breaks."""
        look, shown = "white-space:pre-wrap;margin:.3em 0 1em", []
        for i, (prompt, text, told) in enumerate(self._told()):
            asked = f'<span class="prompt" style="opacity:.6">{html.escape(prompt)}</span>'
            said = f'<span class="continuation" style="font-weight:600">{html.escape(text)}</span>'
            both = f"{asked}{said}" if self.prompt_texts else f"{asked} {said}"  # ids are set apart, texts are one
            shown.append(f'<div><b>prompt {i}</b>, {told}<div style="{look}">{both}</div></div>')
        return f"<div>{''.join(shown)}</div>"

    def _told(self) -> list[tuple[str, str, str]]:
        """Of each prompt its text, the new text, and how much that is; ids where there is no tokenizer."""
        prompts = self.prompt_texts or _as_numbers(self.prompts)
        return [
            (printable(prompt), printable(text), f"{count} new tokens{', stopped by itself' if stopped else ''}")
            for prompt, (_, text, count, stopped) in zip(prompts, self.table().rows, strict=True)
        ]


@dataclass(frozen=True)
class Sampling:
    """The choice of a token: the largest logit at temperature 0, otherwise a draw from softmax(logits / temperature).

    `top_k` keeps the k likeliest tokens, then `top_p` the smallest set of likeliest ones whose mass reaches p
    (Holtzman et al. 2020, equation 2): always at least one.

    >>> logits = torch.tensor([[0.0, 2.0, 1.0]])
    >>> Sampling().choose(logits).tolist(), Sampling(1.0, top_p=0.9).probabilities(logits)[0]
    ([1], tensor([[0.7311, 0.2689, 0.0000]], dtype=torch.float64))
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        for name, kind in (("temperature", Real), ("top_k", Integral), ("top_p", Real)):
            value = getattr(self, name)
            good = isinstance(value, kind) and not isinstance(value, bool)
            if not good and (value is not None or name == "temperature"):
                raise WrongType(f"{name} is {'a whole' if kind is Integral else 'a'} number, got {value!r}")
        if not 0 <= self.temperature < math.inf:
            raise ArgumentError("{temperature} must be 0 (greedy) or a positive number, got {0}", self.temperature)
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k keeps that many tokens and must be at least 1, got {self.top_k}; None keeps all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is a probability mass, above 0 and at most 1, got {self.top_p}; None keeps all")

    def choose(self, logits: Logits, draws: Float[Tensor, "batch"] | None = None) -> Int[Tensor, "batch"]:
        """One token for each row. `draws`, uniform on [0, 1), has one number for each row, so rows are independent."""
        if draws is None or self.temperature == 0:
            return logits.argmax(-1)
        probs, ids = self.probabilities(logits)
        mass = probs.cumsum(-1)
        # Inverse of the distribution function: the first token at which the mass passes the draw.
        at = torch.searchsorted(mass, draws[:, None].to(mass) * mass[:, -1:], right=True)
        return at[:, 0] if ids is None else ids.gather(-1, at)[:, 0]

    def probabilities(self, logits: Logits) -> tuple[Float[Tensor, "batch kept"], Int[Tensor, "batch kept"] | None]:
        """Probabilities and their tokens, the most likely first; (all, None) if nothing is cut."""
        scaled = (logits.double() - logits.amax(-1, keepdim=True)) / self.temperature  # at most 0: no overflow
        ids = None
        if self.top_k is not None:
            scaled, ids = scaled.topk(min(self.top_k, logits.shape[-1]))
        elif self.top_p is not None:
            scaled, ids = scaled.sort(dim=-1, descending=True, stable=True)
        probs = scaled.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            before = probs.cumsum(-1) - probs
            probs = probs.masked_fill(before >= self.top_p, 0.0)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs, ids


def generate(
    model: "HookedTransformer",
    prompt: Prompt,
    max_new_tokens: int = 20,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | torch.Generator | None = None,
    stop: int | str | Collection[int | str] | None = None,
    stream: bool | OnPiece = False,
    capture: Mapping[int, Where | None] | None = None,
) -> Generation:
    """Continue prompts. Prompts of different lengths, given as a list, have the same continuations as one by one.

    Hooks see every step (`hook.step`: 0 is the prompt, each later step one new token); `capture` maps steps to the
    points that are cached. Weights, hooks and torch's global generator are unchanged.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model()
    >>> model.generate([[1, 2, 3], [4]], 3).new_tokens
    [tensor([..., ..., ...]), tensor([..., ..., ...])]
    >>> def at_step_1(z, hook):
    ...     return z * 0 if hook.step == 1 else None
    >>> with model.hooks(fwd_hooks=[("z", at_step_1)]):
    ...     out = model.generate([1, 2, 3], 3, capture={0: "resid_post", 2: ["z", "pattern"]})
    >>> out.caches[2]["pattern", 0].shape            # batch head query_pos key_pos
    torch.Size([1, 2, 1, 5])

    `temperature` 0 is greedy; `top_k` and `top_p` cut the tail. `seed` is a number or a generator (None: a new seed,
    which the result has). `stop` takes token ids and strings (None: the tokenizer's end of text; (): never).
    `stream=True` prints the text as it grows; a function receives the prompt's number and each piece. Ctrl-C raises
    KeyboardInterrupt with the tokens so far as its `.generation`.
    """
    sampling = Sampling(temperature, top_k, top_p)
    prompts = prompt_rows(model, prompt)
    _check_room(model, prompts, max_new_tokens)
    stops, emit = Stops.of(stop, model.tokenizer), _emitter(stream, len(prompts))
    rows = [Continuation(p, model.tokenizer, stops, emit and partial(emit, i)) for i, p in enumerate(prompts)]
    scopes = _captures(model, capture or {}, max_new_tokens)
    drawn = _generator(seed)
    generator, named = drawn if temperature else (None, None)
    reached: dict[int, ActivationCache] = {}
    try:
        _run(
            model, rows, sampling=sampling, generator=generator, scopes=scopes, reached=reached, n_steps=max_new_tokens
        )
    except KeyboardInterrupt as interrupt:
        vars(interrupt)["generation"] = _gathered(rows, named, reached)
        interrupt.add_note(f"the {len(rows[0].ids)} tokens generated so far are this exception's .generation")
        raise
    for row in rows:
        row.finish()
    if stream is True:
        print(flush=True)
    return _gathered(rows, named, reached)


def _as_numbers(rows: list[Row]) -> list[str]:
    return [" ".join(map(str, row.tolist())) for row in rows]


def _gathered(rows: list[Continuation], seed: int | None, caches: dict[int, ActivationCache]) -> Generation:
    return Generation(
        prompts=[row.prompt for row in rows],
        new_tokens=[torch.tensor(row.ids, dtype=torch.long, device=row.prompt.device) for row in rows],
        texts=None if rows[0].tokenizer is None else [row.text() for row in rows],
        stopped=[row.stopped for row in rows],
        seed=seed,
        caches=caches,
        prompt_texts=None if rows[0].tokenizer is None else [rows[0].tokenizer.to_string(row.prompt) for row in rows],
    )


def _run(
    model: "HookedTransformer",
    rows: list[Continuation],
    sampling: Sampling,
    generator: torch.Generator | None,
    scopes: Mapping[int, tuple[HookScope, ActivationCache]],
    reached: dict[int, ActivationCache],
    n_steps: int,
) -> None:
    # Tensors kept by hooks and captures may enter a graph later, which tensors of inference_mode cannot.
    heard = bool(scopes) or edited_elsewhere(model.hook_points().values())
    decoder = None if heard or n_steps == 1 else Decoder.of(model, len(rows), steps=n_steps)
    batch = _Batch(model, [row.prompt for row in rows], decoder, whole_until=max(scopes, default=0))
    batch.past.to_come = n_steps - 1  # the last token is not run
    pack = packed_linears(rows=len(rows)) if n_steps >= PACKING_PAYS_FROM and decoder is None else nullcontext()
    with torch.no_grad() if heard else torch.inference_mode(), pack:
        for step in range(n_steps):
            scope, cache = scopes.get(step, (nullcontext(), None))
            with scope:
                logits = batch.logits()
            if cache is not None:
                reached[step] = cache
            _check_logits(logits, step)
            # One number for each prompt, including finished ones, so that draws do not depend on when others end.
            draws = None if generator is None else torch.rand(len(rows), generator=generator, dtype=torch.float64)
            chosen = sampling.choose(logits, None if draws is None else draws[batch.rows].to(logits.device))
            for row, token in zip(batch.rows, chosen.tolist(), strict=True):
                rows[row].add(token)
            if all(row.stopped for row in rows):
                return
            batch.feed(chosen, [not rows[row].stopped for row in batch.rows])


class _Batch:
    """The unfinished prompts: rows of one KV cache. `rows` has the prompt's number of each.

    Single steps use the decoder as long as no hook is active and no weight is edited. Up to step `whole_until`, the
    last captured one, every prompt keeps its row.
    """

    def __init__(
        self, model: "HookedTransformer", prompts: Sequence[Row], decoder: Decoder | None, whole_until: int = 0
    ):
        self.model, self.past, self.rows = model, KVCache(), list(range(len(prompts)))
        self.n_prompts, self.whole_until = len(prompts), whole_until
        self.decoder = decoder
        longest = max(map(len, prompts))
        # Padded on the left, so that every row's last token is in the last column.
        self.tokens = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in prompts])
        self.mask: Bool[Tensor, "batch pos"] | None = None
        if any(len(row) < longest for row in prompts):
            starts = torch.tensor([longest - len(row) for row in prompts], device=self.tokens.device)
            self.mask = torch.arange(longest, device=self.tokens.device) >= starts[:, None]

    def logits(self) -> Logits:
        """The logits after the last tokens."""
        if self.past.step and self.decoder is not None and self.decoder.serves():
            return self.decoder(self.tokens, self.past)
        if len(self.rows) < self.n_prompts and self._heard():
            raise InputError(
                f"a hook was attached while generating, when {self.n_prompts - len(self.rows)} of {self.n_prompts} "
                "prompts had stopped and left the batch; attach it before, then every prompt keeps its row"
            )
        out = self.model(self.tokens, attention_mask=self.mask, kv_cache=self.past, logits_at=-1)
        return out[:, -1]

    def feed(self, chosen: Int[Tensor, "batch"], going: list[bool]) -> None:
        """Set each row's next token. Finished rows leave the batch, except under hooks, which see a constant batch."""
        self.tokens, self.mask = chosen[:, None], None
        if not all(going) and self.past.step > self.whole_until and not self._heard():
            kept = [i for i, goes_on in enumerate(going) if goes_on]
            index = torch.tensor(kept, device=chosen.device)
            self.rows, self.tokens = [self.rows[i] for i in kept], self.tokens[index]
            self.past.keep_rows(index)

    def _heard(self) -> bool:
        return edited_elsewhere(self.model.hook_points().values())


def prompt_rows(model: "HookedTransformer", prompt: Prompt) -> list[Row]:
    """One row of ids for each prompt, from text, ids, or a list of either.

    >>> from hooklens.testing import tiny_model
    >>> [row.tolist() for row in prompt_rows(tiny_model(), [[1, 2], [3]])]
    [[1, 2], [3]]
    """
    given = [prompt] if isinstance(prompt, str) else prompt
    if hasattr(given, "tolist"):
        given = given if isinstance(given, Tensor) else given.tolist()
    if not isinstance(given, Tensor | list | tuple):
        raise WrongType(f"a prompt is text, token ids or a list of these, got {type(prompt).__name__}")
    if len(given) == 0:
        raise InputError("the prompt is empty; give some text, or at least one token id")
    if isinstance(given[0], Integral) or (isinstance(given[0], Tensor) and given[0].ndim == 0):
        given = [given]
    return [_row(model, prompt) for prompt in given]


def _row(model: "HookedTransformer", prompt: Any) -> Row:
    if isinstance(prompt, str):
        return model.to_tokens(prompt)[0]
    ids = as_ids(prompt, "each prompt is a text or a row of integers", model.device)
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim != 1 or len(ids) == 0:
        raise InputError(f"each prompt is one row of at least one token id, got shape {list(ids.shape)}")
    return model._check_tokens(ids)


def check_length(max_new_tokens: int) -> None:
    """Raise unless this is a valid number of new tokens."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ArgumentError(
            "{max_new_tokens} is the number of tokens to generate, at least 1, got {0!r}", max_new_tokens
        )


def _check_room(model: "HookedTransformer", prompts: Sequence[Row], max_new_tokens: int) -> None:
    cfg = model.cfg
    check_length(max_new_tokens)
    if not isinstance(cfg.embed, TokenEmbed) or cfg.d_vocab_out > cfg.d_vocab:
        raise InputError("generation needs a model that reads its own output tokens; run this one step by step")
    if not cfg.causal:
        raise InputError("generation needs a causal mask: in this model earlier positions would see the new tokens")
    needed = max(map(len, prompts)) + max_new_tokens - 1  # the last token is not read again
    if needed > cfg.n_ctx:
        raise InputError(
            f"{max(map(len, prompts))} prompt tokens and {max_new_tokens} new ones do not fit this model's n_ctx of "
            f"{cfg.n_ctx}; shorten the prompt or generate at most {max(cfg.n_ctx - needed + max_new_tokens, 0)}"
        )


def _check_logits(logits: Logits, step: int) -> None:
    largest = logits.amax(-1).tolist()  # NaN wins a maximum
    row = next((row for row, value in enumerate(largest) if not math.isfinite(value)), None)
    if row is not None:
        raise InputError(
            f"the largest logit of row {row} is {largest[row]} at step {step}, so no token can be chosen; look "
            "for a hook that divides by zero or forbids every token, or for weights that are not finite"
        )


def _captures(
    model: "HookedTransformer", capture: Mapping[int, Where | None], n_steps: int
) -> dict[int, tuple[HookScope, ActivationCache]]:
    if not isinstance(capture, Mapping):
        raise WrongType(f"capture maps steps to points, for example {{0: 'resid_post'}}; got {capture!r}")
    wrong = [s for s in capture if isinstance(s, bool) or not isinstance(s, int) or not 0 <= s < n_steps]
    if wrong:
        last = n_steps - 1
        raise InputError(f"capture asks for step {wrong[0]!r}; with max_new_tokens={n_steps} the steps are 0 to {last}")
    return {step: model.capture(where) for step, where in capture.items()}


def _generator(seed: int | torch.Generator | None) -> tuple[torch.Generator, int]:
    if isinstance(seed, torch.Generator):
        # A generator on the CPU draws by the last 32 bits of its seed, and `seeded` hashes larger numbers.
        return seed, seed.initial_seed() % 2**32 if seed.device.type == "cpu" else seed.initial_seed()
    if seed is None:
        number = torch.Generator().seed() % 2**32
        return seeded(number), number
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise WrongType(f"seed is a whole number or a torch.Generator, got {seed!r:.80}")
    return seeded(int(seed)), int(seed)


def _emitter(stream: bool | OnPiece, n_prompts: int) -> OnPiece | None:
    if not isinstance(stream, bool | None) and not callable(stream):
        raise WrongType(
            "stream is True, which prints, False, or a function of the prompt's number and a piece of text; got "
            f"{stream!r:.80}"
        )
    if stream is True and n_prompts > 1:
        raise InputError(
            f"stream=True prints one continuation, and there are {n_prompts} prompts; pass a function that takes the "
            "prompt's number and a piece"
        )
    return _print if stream is True else stream or None


def _print(number: int, piece: str) -> None:
    # A model may write terminal escapes; only line breaks and tabs go to the terminal as they are.
    print(printable(piece), end="", flush=True)
