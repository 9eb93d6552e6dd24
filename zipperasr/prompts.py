"""What the LLM reads and writes: the one place that lays out a sequence, for training and decoding alike.

    [prompt of the language] [speech embeddings] [transcript] [end of text]

Training sees the whole line, decoding everything before the transcript, so the decoding input is always a strict prefix
of the training sequence (Eq. 4, arXiv:2603.17558).
"""

from typing import Protocol

from zipperasr import languages


class Tokenizer(Protocol):
    """What a tokenizer must offer."""

    end_of_text: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def prompt_ids(tokenizer: Tokenizer, lang: str) -> list[int]:
    """Token ids that stand before the speech of an utterance in `lang`."""
    return tokenizer.encode(languages.get(lang).prompt)


def target_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids that stand after the speech: the transcript and end-of-text. The loss covers exactly these."""
    return [*tokenizer.encode(text), tokenizer.end_of_text]
