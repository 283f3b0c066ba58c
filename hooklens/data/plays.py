"""The plays of Shakespeare, as a text to train on."""

from typing import TYPE_CHECKING

from hooklens.data.text_windows import TextWindows, tokenizer_for

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer


def shakespeare(
    *, tokenizer: "str | Tokenizer" = "characters", window: int = 128, d_vocab: int = 1024, seed: int = 0
) -> TextWindows:
    """38 plays, 5.4 million characters; the last tenth by position is held out.

    The text is an asset that is downloaded once; offline, before that, it raises with what to do. `tokenizer` and
    `d_vocab` as in `hl.data.text`.
    """
    import numpy as np

    from hooklens.pretrained.assets import text

    plays = text("shakespeare")
    chosen = tokenizer_for(tokenizer, lambda: [plays], d_vocab)
    kind = np.uint16 if chosen.vocab_size <= 2**16 else np.uint32
    return TextWindows("Shakespeare's plays", np.asarray(chosen.encode(plays), kind), chosen, window, seed=seed)
