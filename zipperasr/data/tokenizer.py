"""The LLM's tokenizer, whichever library it comes from, as a `prompts.Tokenizer`; the targets of millions of texts."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from zipperasr.data import workers
from zipperasr.errors import UserError
from zipperasr.prompts import Tokenizer

if TYPE_CHECKING:
    import numpy as np

FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")
"""One of these is where a folder has a tokenizer."""
AT_ONCE = 10_000
"""Texts that are encoded together; more than these are encoded beside the process that finds them."""


class BatchTokenizer(Tokenizer, Protocol):
    """A tokenizer that also encodes many texts at once; how it does that beside other work, `executor` says."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def executor(self) -> Executor: ...


def load_tokenizer(name: str | Path) -> BatchTokenizer:
    """The tokenizer of a folder or of a model id of the Hugging Face hub.

    A folder with `tokenizer.model` is read by sentencepiece, everything else by transformers.
    Raises UserError when there is none, or an empty one, or it has no end-of-text token.
    """
    model = Path(name) / "tokenizer.model"
    tokenizer = _SentencePiece(model) if model.is_file() else _HuggingFace(str(name))
    if tokenizer.end_of_text is None or tokenizer.end_of_text < 0:
        raise UserError(f"{name}: its tokenizer has no end-of-text token; choose an LLM that has one")
    if not tokenizer.encode("a"):  # what transformers makes of a folder that lacks its tokenizer's files
        raise UserError(f"{name}: no tokenizer found; put its {' or '.join(FILES)} beside the weights")
    return tokenizer


def stand_in_tokenizer(name: str | Path) -> BatchTokenizer:
    """The tokenizer of a folder that has one; where there is nothing but the name of an LLM, one of bytes."""
    return load_tokenizer(name) if any(Path(name, file).is_file() for file in FILES) else _Bytes()


class Targets:
    """The target ids of texts as they come, each different text encoded once; if they are many, while others come.

    with Targets(tokenizer) as targets:
        for text in texts:
            targets.add(text)
        ids = targets.by_text()
    """

    def __init__(self, tokenizer: BatchTokenizer):
        self._tokenizer, self._executor = tokenizer, None
        self._ids: dict[str, np.ndarray | None] = {}
        self._batch: list[str] = []
        self._submitted: deque[tuple[list[str], Future]] = deque()

    def __enter__(self) -> Targets:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def add(self, text: str) -> None:
        """Take another text."""
        if text not in self._ids:
            self._ids[text] = None
            self._batch.append(text)
            if len(self._batch) == AT_ONCE:
                self._executor = self._executor or self._tokenizer.executor()
                self._submitted.append((self._batch, self._executor.submit(_encode, self._tokenizer, self._batch)))
                self._batch = []
                while self._submitted and self._submitted[0][1].done():
                    self._take()

    def by_text(self) -> dict[str, np.ndarray]:
        """What prompts.target_ids gives for each text, in int32."""
        self._ids.update(zip(self._batch, _split(*_encode(self._tokenizer, self._batch))))
        while self._submitted:
            self._take()
        return self._ids

    def _take(self) -> None:
        texts, encoded = self._submitted.popleft()
        self._ids.update(zip(texts, _split(*encoded.result())))


def _encode(tokenizer: BatchTokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The target ids of texts end to end, and how many each has: quick to hand from one process to another."""
    import numpy as np

    targets = [[*ids, tokenizer.end_of_text] for ids in tokenizer.encode_batch(texts)]
    lengths = np.array([len(ids) for ids in targets], dtype=np.int64)
    return np.fromiter(chain.from_iterable(targets), dtype=np.int32, count=lengths.sum()), lengths


def _split(ids: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    start = 0
    for length in lengths.tolist():
        yield ids[start : start + length]
        start += length


def _num_processes() -> int:
    """The cores that a rank of training has for itself."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class _SentencePiece:
    def __init__(self, model: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{model}: not a sentencepiece model ({error})") from error
        self.end_of_text = self._processor.eos_id()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=1)

    def executor(self) -> Executor:
        """Processes: sentencepiece's threads wait for each other."""
        return ProcessPoolExecutor(_num_processes(), multiprocessing.get_context("fork"), workers.begin)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([i for i in ids if i != self.end_of_text])


class _HuggingFace:
    def __init__(self, name: str):
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: no tokenizer found ({str(error).splitlines()[0]})") from error
        self.end_of_text = self._tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def executor(self) -> Executor:
        """A thread: what is written in Rust spreads a batch over threads of its own."""
        return ThreadPoolExecutor(1)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Bytes:
    """Each byte of UTF-8 is a token."""

    end_of_text = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def executor(self) -> Executor:
        """A thread: there is nothing to compute."""
        return ThreadPoolExecutor(1)

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < self.end_of_text).decode(errors="replace")
