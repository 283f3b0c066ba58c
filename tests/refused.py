"""An error with its words, or the type check's own: with executed annotations they speak first."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from jaxtyping import TypeCheckError


@contextmanager
def refused(error: type[Exception] | tuple[type[Exception], ...], says: str) -> Iterator[None]:
    errors = error if isinstance(error, tuple) else (error,)
    with pytest.raises((*errors, TypeCheckError)) as caught:
        yield
    assert isinstance(caught.value, TypeCheckError) or re.search(says, str(caught.value)), caught.value
