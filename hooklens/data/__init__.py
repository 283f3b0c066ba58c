"""Prompts, tasks to train on, and prompt pairs of known tasks; each is imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hooklens.data.batches import Batch as Batch
    from hooklens.data.batches import TrainingData as TrainingData
    from hooklens.data.decimals import decimal_arithmetic as decimal_arithmetic
    from hooklens.data.indirect_object import ioi as ioi
    from hooklens.data.markov_chains import markov_source as markov_source
    from hooklens.data.modular import modular_arithmetic as modular_arithmetic
    from hooklens.data.number_files import modular_triples as modular_triples
    from hooklens.data.number_files import regression_prompts as regression_prompts
    from hooklens.data.plays import shakespeare as shakespeare
    from hooklens.data.prompt_pairs import PromptPairs as PromptPairs
    from hooklens.data.pronouns import gendered_pronouns as gendered_pronouns
    from hooklens.data.regression import in_context_regression as in_context_regression
    from hooklens.data.repeated import random_repeats as random_repeats
    from hooklens.data.repeated import repeated_tokens as repeated_tokens
    from hooklens.data.stories import tiny_stories as tiny_stories
    from hooklens.data.story_files import tiny_stories_dataset as tiny_stories_dataset
    from hooklens.data.text_windows import text as text
    from hooklens.data.years import greater_than as greater_than

_HOMES = {
    "Batch": "batches",
    "PromptPairs": "prompt_pairs",
    "TrainingData": "batches",
    "decimal_arithmetic": "decimals",
    "gendered_pronouns": "pronouns",
    "greater_than": "years",
    "in_context_regression": "regression",
    "ioi": "indirect_object",
    "markov_source": "markov_chains",
    "modular_arithmetic": "modular",
    "modular_triples": "number_files",
    "random_repeats": "repeated",
    "regression_prompts": "number_files",
    "repeated_tokens": "repeated",
    "shakespeare": "plays",
    "text": "text_windows",
    "tiny_stories": "stories",
    "tiny_stories_dataset": "story_files",
}

__all__ = list(_HOMES)

if not TYPE_CHECKING:  # a type checker would take every name, also a misspelt one, for an object

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"hooklens.data has no {name!r}; it has {', '.join(_HOMES)}")
        return getattr(import_module(f"hooklens.data.{_HOMES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted(__all__)
