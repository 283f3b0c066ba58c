"""The plays of Shakespeare, as a text to train on."""

from typing import TYPE_CHECKING

from hooklens.data.text_windows import TextSplit, TextWindows

if TYPE_CHECKING:
    from hooklens.pretrained.tokenizer import Tokenizer


def shakespeare(
    *, tokenizer: "str | Tokenizer" = "characters", window: int = 128, d_vocab: int = 1024, seed: int = 0
) -> TextWindows:
    """38 plays, 5.0 million characters; the last tenth by position is held out.

    The text is an asset that is downloaded once; offline, before that, it raises with what to do. `tokenizer` and
    `d_vocab` as in `hl.data.text`.
    """
    from hooklens.pretrained.assets import text

    plays = text("shakespeare")
    return TextSplit("Shakespeare's plays", lambda: iter([plays]), 0.1).windows(
        tokenizer, d_vocab, window=window, seed=seed
    )
