"""What is checked before a run begins: that model, data and settings fit each other."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hooklens.core.errors import InputError, WrongType
from hooklens.core.hooks import HookPoint
from hooklens.data.batches import Batch, TrainingData
from hooklens.model.config import TokenEmbed
from hooklens.model.transformer import HookedTransformer, need_hooked
from hooklens.pretrained.builder import own_parameters
from hooklens.training.losses import SquaredError
from hooklens.training.parameter_vector import check_trained
from hooklens.training.processes import Processes
from hooklens.training.training_settings import Settings

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer


def check_fit(model: HookedTransformer, data: TrainingData, settings: Settings, group: Processes) -> Batch:
    """Raise unless the model can be trained on the data with these settings; returns the first batch."""
    if not isinstance(settings, Settings):
        raise WrongType(f"settings= takes hooklens.training.Settings(...), got {settings!r:.80}")
    check_precision(settings.precision, model.device, model.dtype)
    batch = data.batch(0, settings.batch)
    group.first_row(len(batch))
    _check_inputs(model, data, batch)
    _check_targets(model, batch, settings.loss)
    tokenizer_of_both(model, data)
    for name in ("patience", "solved"):
        if getattr(settings, name) is not None and next(held_out_batches(data, 1), None) is None:
            raise InputError(f"{name}= stops a run by held-out data, and these data hold nothing out; leave it out")
    if settings.solved is not None and batch.targets.is_floating_point():
        raise InputError("solved= is an accuracy, and targets that are vectors have none; use patience=")
    return batch


def held_out_batches(data: TrainingData, size: int) -> Iterator[Batch]:
    """The held-out batches that have rows."""
    return (batch for batch in data.held_out(size) if len(batch))


def tokenizer_of_both(model: HookedTransformer, data: TrainingData) -> "Tokenizer | None":
    """The tokenizer of model and data; raises if a token stands for one thing here and for another there.

    >>> from hooklens.data.decimals import decimal_arithmetic
    >>> from hooklens.testing import tiny_model
    >>> tokenizer_of_both(tiny_model(d_vocab=15), decimal_arithmetic()).to_str_tokens("1+2")
    ['1', '+', '2']
    """
    ours, theirs = model.tokenizer, getattr(data, "tokenizer", None)
    if ours is None or theirs is None or ours is theirs:
        return theirs if ours is None else ours
    here, there = ({token: text for text, token in side.backend.get_vocab().items()} for side in (ours, theirs))
    odd = next((token for token in sorted({**here, **there}) if here.get(token) != there.get(token)), None)
    if odd is not None:
        raise InputError(
            f"the data have another tokenizer than the model: token {odd} is {there.get(odd)!r:.40} in the data and "
            f"{here.get(odd)!r:.40} in the model; make the data with tokenizer=model.tokenizer, or "
            "begin with model.tokenizer = data.tokenizer"
        )
    return ours


def hooked_names(model: HookedTransformer) -> list[str]:
    """Where hooks of the caller act, which change what is trained.

    >>> from hooklens.testing import tiny_model
    >>> model = tiny_model()
    >>> with model.hooks([(("z", 0), lambda z, hook: z * 0)]):
    ...     hooked_names(model)
    ['blocks.0.attn.hook_z']
    """

    def is_hooked(module: nn.Module) -> bool:
        if isinstance(module, HookPoint) and module.listening():
            return True
        forward = module._forward_hooks or module._forward_pre_hooks
        return bool(forward or module._backward_hooks or module._backward_pre_hooks)

    return [name for name, module in model.named_modules() if is_hooked(module)]


def check_precision(precision: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise unless passes can run in this precision, and steps in the dtype of the weights.

    >>> check_precision("bfloat16", torch.device("meta"), torch.float32)
    Traceback (most recent call last):
    ...
    hooklens.core.errors.InputError: precision='bfloat16' needs autocast, which the device meta lacks; leave it out
    """
    if dtype == torch.float16:
        raise InputError(
            "this model's weights are float16, in which small gradients are rounded to 0 and Adam divides by 0; call "
            "model.float(), and give precision='bfloat16' for passes of 16 bits"
        )
    if precision == "model":
        return
    has_none = device.type == "cuda" and not torch.cuda.is_bf16_supported()
    if has_none or not torch.amp.is_autocast_available(device.type):
        raise InputError(f"precision='bfloat16' needs autocast, which the device {device} lacks; leave it out")
    if dtype != torch.float32:
        raise InputError(
            f"precision='bfloat16' keeps weights in float32, and this model has {dtype}; call model.float()"
        )


def check_trainable(model: Any, data: Any) -> None:
    """Raise for objects that are no model or no data of training."""
    need_hooked(model, "hl.train")
    if torch.is_inference_mode_enabled():
        raise InputError("hl.train needs gradients, which torch.inference_mode() rules out; call it outside that block")
    if any(p.is_inference() or p.is_meta for p in model.parameters()):
        raise InputError(
            "this model was built under torch.inference_mode() or on the device meta, so it has no weights to train; "
            "build or load it outside of both"
        )
    own_parameters(model, "hl.train")
    check_trained({name: p for name, p in model.named_parameters() if p.requires_grad})
    if not isinstance(data, TrainingData):
        raise WrongType(f"hl.train reads data of hl.data, such as hl.data.modular_arithmetic(); got {data!r:.80}")


def _check_inputs(model: HookedTransformer, data: Any, batch: Batch) -> None:
    n_pos, n_ctx, d_vocab = max(batch.inputs.shape[1], data.n_positions), model.cfg.n_ctx, model.cfg.d_vocab
    if n_pos > n_ctx:
        raise InputError(f"the data have {n_pos} positions, this model has n_ctx {n_ctx}; use a smaller window")
    if not isinstance(model.cfg.embed, TokenEmbed):
        d_in = model.cfg.embed.d_in
        if not batch.inputs.is_floating_point() or batch.inputs.shape[-1] != d_in:
            seen = f"vectors of {batch.inputs.shape[-1]}" if batch.inputs.is_floating_point() else "tokens"
            raise InputError(f"this model reads vectors of {d_in} numbers, and the data are {seen}")
        return
    if batch.inputs.is_floating_point():
        raise InputError(
            f"the data are vectors, and this model reads tokens; give embed=VectorEmbed(d_in={batch.inputs.shape[-1]})"
        )
    needed = max(getattr(data, "d_vocab", 0), int(batch.inputs.max()) + 1)
    if needed > d_vocab:
        raise InputError(f"the data have {needed} tokens, this model has d_vocab {d_vocab}; give d_vocab={needed}")


def _check_targets(model: HookedTransformer, batch: Batch, loss: Any) -> None:
    d_out = model.cfg.d_vocab_out
    if isinstance(loss, SquaredError) != batch.targets.is_floating_point():
        kind = "vectors, for the loss 'squared_error'" if batch.targets.is_floating_point() else "tokens"
        raise InputError(f"the targets are {kind}, and the loss is {loss.name!r}; give Settings(loss=...)")
    if batch.targets.is_floating_point():
        if batch.targets.shape[-1] != d_out:
            raise InputError(
                f"targets have {batch.targets.shape[-1]} numbers, the model's output {d_out} (d_vocab_out)"
            )
        return
    counted = batch.targets[batch.counts]
    if not len(counted) or int(counted.min()) < 0:
        seen = "no target that counts" if not len(counted) else f"the target {int(counted.min())}"
        raise InputError(f"the first batch has {seen}; `counts` is True at the targets to predict, and only there")
    needed = int(counted.max()) + 1
    if needed > d_out:
        raise InputError(f"the targets reach token {needed - 1}, this model has d_vocab_out {d_out}; make it larger")
