"""Prompts, tasks to train on, and prompt pairs of known tasks; each is imported on first use."""

from importlib import import_module

_HOMES = {
    "PromptPairs": "prompt_pairs",
    "decimal_arithmetic": "decimals",
    "gendered_pronouns": "pronouns",
    "greater_than": "years",
    "in_context_regression": "regression",
    "ioi": "indirect_object",
    "markov_source": "markov_chains",
    "modular_arithmetic": "modular",
    "random_repeats": "repeated",
    "repeated_tokens": "repeated",
    "shakespeare": "plays",
    "text": "text_windows",
    "tiny_stories": "stories",
    "tiny_stories_dataset": "story_files",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"hooklens.data has no {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(f"hooklens.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
