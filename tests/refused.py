"""An error with its words, or the type check's own: with executed annotations they speak first."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from jaxtyping import TypeCheckError


@contextmanager
def refused(error: type[Exception], says: str) -> Iterator[None]:
    with pytest.raises((error, TypeCheckError)) as caught:
        yield
    assert isinstance(caught.value, TypeCheckError) or re.search(says, str(caught.value)), caught.value
