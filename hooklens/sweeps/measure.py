"""The metric of patched streams: only what it reads is unembedded, and pairs come in the order that it expects."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hooklens.core.errors import InputError, WrongType
from hooklens.core.hooks import HookFn
from hooklens.core.names import Where
from hooklens.metrics import ReadingMetric, Reads, need_metric, need_pairs
from hooklens.model.ids import as_ids
from hooklens.model.linear import is_plain, packed_linears
from hooklens.model.transformer import HookedTransformer
from hooklens.sweeps.naive import why_plain
from hooklens.sweeps.rows import Group

_LOGITS_AT_ONCE = 32 * 2**20  # numbers, not bytes: a chunk of full logits


class Reader:
    """A metric bound to a model and the streams of the base run.

    `read` is the positions `[pair read]` that it reads, None if it may read any. `whole`: must it see the logits of all
    pairs at once? With None the reader decides.
    """

    def __init__(
        self,
        model: HookedTransformer,
        metric: Any,
        stream: Float[Tensor, "pair pos d_model"],
        *,
        whole: bool | None = None,
    ):
        self.model, self.metric, self.stream = model, need_metric(metric), stream
        self.n_pairs, self.n_pos = stream.shape[:2]
        self.every = torch.arange(self.n_pairs, device=stream.device)
        self.dtype = torch.promote_types(stream.dtype, torch.float32)  # of values: means over pairs are taken of them
        self.read: Int[Tensor, "pair read"] | None = None
        self.tokens: Int[Tensor, "pair token"] | None = None
        self.by_pair = False
        # a hook on the way out may look at positions, so that it sees all
        self.whole = why_plain(model) is not None if whole is None else whole
        self.base_logits: Tensor | None = None
        if getattr(metric, "reads", None) is not None:
            self._bind_reads(stream.device)
        self.base = self._base_values()

    def _bind_reads(self, device: torch.device) -> None:
        if isinstance(self.metric, ReadingMetric):
            need_pairs(len(self.metric.reads.pos), self.n_pairs)
            self.metric = self.metric.pairs(self.every.cpu()) if self.n_pairs > 1 else self.metric
        reads = self.metric.reads
        self._check_reads(reads)
        pos = as_ids(reads.pos, "reads.pos of a metric is integers [pair read]", device)
        pos = torch.where(pos < 0, pos + self.n_pos, pos)
        if bool(((pos < 0) | (pos >= self.n_pos)).any()):
            raise InputError(
                f"the metric reads positions {int(reads.pos.min())} to {int(reads.pos.max())}, and the prompts have 0 "
                f"to {self.n_pos - 1} (or -{self.n_pos} to -1); make it with one of these as pos=, a loss from these"
            )
        need_pairs(len(pos), self.n_pairs)
        self.read = pos.expand(self.n_pairs, -1)
        if reads.tokens is not None:
            tokens = as_ids(reads.tokens, "reads.tokens of a metric is integers [pair token]", device)
            self.tokens = tokens.expand(self.n_pairs, -1)

    def _check_reads(self, reads: Reads) -> None:
        for name, part in zip(("pos", "tokens"), reads, strict=True):
            if part is not None and torch.as_tensor(part).ndim != 2:
                shape = list(torch.as_tensor(part).shape)
                raise InputError(f"reads.{name} of a metric is [pair {name}], one row a pair; got {shape}")
        n = self.model.cfg.d_vocab_out
        if reads.tokens is not None and not 0 <= int(reads.tokens.min()) <= int(reads.tokens.max()) < n:
            raise InputError(f"the metric reads tokens {reads.tokens.flatten().tolist()!r:.60}; there are 0 to {n - 1}")

    # -- streams to logits

    def finals(self, groups: Sequence[Group], read_only: bool) -> dict[int, Float[Tensor, "_pos d_model"]]:
        """What is unembedded of every item's rows: the read positions, or all from its start.

        `read_only`: the groups hold the read positions alone.
        """
        streams: dict[int, Tensor] = {}
        for group in groups:
            x = group.x
            if self.read is not None and not read_only:
                at = (self.read[group.pair] - group.start).clamp_min(0)
                x = x[torch.arange(len(at), device=at.device)[:, None], at]
            streams |= dict(zip(group.item.tolist(), x, strict=True))
        return streams

    def logits(self, x: Float[Tensor, "row read d_model"], pair: Int[Tensor, "row"]) -> Float[Tensor, "row read token"]:
        """Logits of the tokens that are read (of all, if the metric does not say)."""
        model, linear = self.model, self.model.unembed.linear
        if self.tokens is None or not is_plain(linear):
            return self._of_tokens(model.read_out(x), pair)
        normed, tokens = x if model.ln_final is None else model.ln_final(x), self.tokens[pair]
        out = torch.einsum("nrd,nkd->nrk", normed, linear.weight[tokens])
        out = out if linear.bias is None else out + linear.bias[tokens][:, None]
        return model.unembed.cap(out)

    def _of_tokens(self, logits: Float[Tensor, "row read d_vocab"], pair: Tensor) -> Float[Tensor, "row read token"]:
        if self.tokens is None:
            return logits
        return logits.gather(2, self.tokens[pair][:, None].expand(-1, logits.shape[1], -1))

    def _at_read(self, x: Float[Tensor, "pair pos d"]) -> Float[Tensor, "pair read d"]:
        return x[self.every[:, None], self.read]

    # -- metric values

    def _base_values(self) -> Float[Tensor, "pair"]:
        if self.whole:
            self.base_logits = self.model.read_out(self.stream)
        elif self.read is None:
            self.base_logits = torch.cat([self.model.read_out(self.stream[i : i + 1]) for i in range(self.n_pairs)])
        else:
            x, every = self._at_read(self.stream), self.every
            self.base_read = torch.cat([self.logits(x[i : i + 1], every[i : i + 1]) for i in range(self.n_pairs)])
            return self._checked(self.metric.on_read(self.base_read.clone()))  # a metric may write into what it gets
        return self.on_logits(self.base_logits.clone())

    def _of_logits(self, logits: Float[Tensor, "pair pos d_vocab"]) -> Tensor:
        """The metric on full logits of all pairs; one that returns a single number is asked pair by pair."""
        if self.read is not None:
            return self.metric.on_read(self._of_tokens(self._at_read(logits), self.every))
        value = None if self.by_pair else self._numbers(self.metric(logits))
        if value is None or (value.ndim == 0 and self.n_pairs > 1):
            self.by_pair = True
            values = [self._numbers(self.metric(logits[i : i + 1])) for i in range(self.n_pairs)]
            value = torch.stack([number.squeeze() for number in values])
        return value

    def on_logits(self, logits: Float[Tensor, "pair pos d_vocab"]) -> Float[Tensor, "pair"]:
        """The metric on full logits, whether or not it says what it reads."""
        return self._checked(self._of_logits(logits))

    def on_streams(self, streams: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "time pair"]:
        """The metric on the streams that leave the last block, of all pairs some times; every token is unembedded
        where the metric reads.
        """
        if self.read is None or self.whole:
            return torch.stack([self.on_logits(self.model.read_out(rows)) for rows in streams.split(self.n_pairs)])
        values, at_once = [], max(1, _LOGITS_AT_ONCE // (self.read.numel() * self.model.cfg.d_vocab_out))
        for some in streams.split(at_once * self.n_pairs):
            read = self.read.repeat(len(some) // self.n_pairs, 1)
            with packed_linears(enabled=False):  # packing the unembedding takes longer than a few rows of it
                logits = self.model.read_out(some[torch.arange(len(some), device=some.device)[:, None], read])
            values += [self.metric.on_read(self._of_tokens(rows, self.every)) for rows in logits.split(self.n_pairs)]
        return torch.stack([self._checked(value) for value in values])

    def in_graph(self, stream: Float[Tensor, "pair pos d_model"]) -> Float[Tensor, "pair"]:
        """The metric on the stream that leaves the last block, in the graph: for a backward pass."""
        if self.read is None or self.whole:
            return self._of_logits(self.model.read_out(stream)).view(self.n_pairs)
        return self.metric.on_read(self.logits(self._at_read(stream), self.every))

    def under_hooks(
        self,
        entering: Shaped[Tensor, "pair pos *d_model"],
        hooks: Sequence[tuple[Where, HookFn]],
        times: int = 1,
        *,
        start_at_layer: int | None = None,
    ) -> Float[Tensor, "time pair"]:
        """The metric under hooks, from one forward pass of a batch that has all pairs so many times.

        `entering` are the tokens, or the stream that enters a layer.
        """
        last = None if self.read is None or self.whole else self.model.cfg.n_layers
        given = entering.repeat(times, *[1] * (entering.ndim - 1))
        out = self.model.run_with_hooks(given, fwd_hooks=hooks, start_at_layer=start_at_layer, stop_at_layer=last)
        if last is not None:
            return self.on_streams(out)
        return torch.stack([self.on_logits(rows) for rows in out.split(self.n_pairs)])

    def _numbers(self, value: Any) -> Tensor:
        if isinstance(value, Tensor) and value.is_complex():
            raise WrongType(f"the metric returned complex values, {value!r:.60}; a metric returns real ones")
        if isinstance(value, Tensor):
            return value.to(self.stream.device)
        try:
            return torch.as_tensor(value, dtype=torch.float64, device=self.stream.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise WrongType(
                f"the metric returned {value!r:.60}; a metric returns one value a pair, or a single number"
            ) from error

    def _checked(self, value: Any) -> Float[Tensor, "pair"]:
        value = self._numbers(value)
        value = value[None] if value.ndim == 0 and self.n_pairs == 1 else value
        if value.shape != (self.n_pairs,):
            raise InputError(
                f"the metric returned shape {list(value.shape)} for {self.n_pairs} prompt pairs; "
                "a metric returns one value a pair, or a single number"
            )
        return value.detach().to(self.dtype)

    def rowwise(self) -> bool:
        """Can values be computed for any rows, in any order?"""
        return self.read is not None and isinstance(self.metric, ReadingMetric)

    def values_of_rows(self, x: Tensor, pair: Int[Tensor, "row"], start: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        """The metric of single rows; read positions before a row's start are the base run's."""
        width = self.model.cfg.d_vocab_out if self.tokens is None else self.tokens.shape[1]
        at_once = max(1, _LOGITS_AT_ONCE // (width * x.shape[1]))
        out = []
        for i in range(0, len(x), at_once):
            rows = slice(i, i + at_once)
            read = self._with_base(self.logits(x[rows], pair[rows]), pair[rows], start[rows])
            metric = self.metric if self.n_pairs == 1 and len(read) == 1 else self.metric.pairs(pair[rows].cpu())
            out.append(metric.on_read(read).to(self.dtype))
        return torch.cat(out)

    def _with_base(self, read: Tensor, pair: Tensor, start: Tensor) -> Tensor:
        assert self.read is not None
        before = self.read[pair] < start[:, None]
        return torch.where(before[..., None], self.base_read[pair], read) if bool(before.any()) else read

    def values_of_patch(self, rows: Sequence[Tensor], pair: Tensor, start: Tensor) -> Float[Tensor, "pair"]:
        """The metric of one patch from the streams of its rows; other pairs keep the base run's logits."""
        if self.read is not None:
            read = self.base_read.clone()
            read[pair] = self._with_base(self.logits(torch.stack(list(rows)), pair), pair, start)
            return self._checked(self.metric.on_read(read))
        assert self.base_logits is not None
        logits = self.base_logits.clone()
        at_once = max(1, _LOGITS_AT_ONCE // logits[0].numel())
        for begin in start.unique().tolist():
            for some in (start == begin).nonzero().flatten().split(at_once):
                logits[pair[some], begin:] = self.model.read_out(torch.stack([rows[i] for i in some.tolist()]))
        return self.on_logits(logits)
