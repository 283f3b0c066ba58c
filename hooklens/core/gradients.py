"""A check that gradients are available."""

import torch

from hooklens.core.errors import InputError


def need_gradients(asker: str) -> None:
    """Raise in inference mode: nothing that is computed there can be differentiated, not even inside enable_grad().

    >>> with torch.inference_mode():
    ...     need_gradients("attribution_patching")
    Traceback (most recent call last):
    hooklens.core.errors.InputError: attribution_patching needs gradients, which torch.inference_mode() rules out; ...
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            f"{asker} needs gradients, which torch.inference_mode() rules out; leave that block, or use "
            "torch.no_grad(), which saves as much memory and lets gradients be switched on inside it"
        )
