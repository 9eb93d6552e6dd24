"""The LLM's tokenizer, whichever library it comes from, as a `prompts.Tokenizer`."""

from pathlib import Path

from zipperasr.errors import UserError
from zipperasr.prompts import Tokenizer


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a folder or of a model id of the Hugging Face hub.

    A folder with `tokenizer.model` is read by sentencepiece, everything else by transformers.
    Raises UserError when there is none or it has no end-of-text token.
    """
    model = Path(name) / "tokenizer.model"
    tokenizer = _SentencePiece(model) if model.is_file() else _HuggingFace(str(name))
    if tokenizer.end_of_text is None or tokenizer.end_of_text < 0:
        raise UserError(f"{name}: its tokenizer has no end-of-text token; choose an LLM that has one")
    return tokenizer


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

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
