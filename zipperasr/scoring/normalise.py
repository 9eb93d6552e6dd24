"""Text to the units that are scored: words, or characters for the languages whose row says so.

The `whisper` profile is the paper's "Whisper text normalization" (section V-B, arXiv:2603.17558). Its basic normaliser
replaces every combining mark by a space, so that Thai "ปี" and "ปู" are the same; `marks` differs only in keeping them.
A character is one code point (after Whisper's NFKC) that is not white space, so a kept mark counts as a character.
"""

import functools
import importlib.util
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from zipperasr.errors import UserError
from zipperasr.languages import Language


def splitter(language: Language, profile: str) -> Callable[[str], list[str]]:
    """A function from a transcript to its normalised words or characters, by the language's unit.

    Raises UserError when `profile` is not in PROFILES.
    """
    if profile not in PROFILES:
        raise UserError(f"unknown scoring profile '{profile}'; known: {', '.join(PROFILES)}")
    normaliser = PROFILES[profile](language)
    if language.unit == "word":
        return lambda text: normaliser(text).split()
    return lambda text: [char for char in normaliser(text) if not char.isspace()]


def _whisper(language: Language) -> Callable[[str], str]:
    whisper = _whisper_normalizers()
    return whisper.EnglishTextNormalizer() if language.normaliser == "english" else whisper.BasicTextNormalizer()


def _marks(language: Language) -> Callable[[str], str]:
    normaliser = _whisper(language)
    if language.normaliser == "basic":
        normaliser.clean = _spaces_for_symbols
    return normaliser


PROFILES: dict[str, Callable[[Language], Callable[[str], str]]] = {"whisper": _whisper, "marks": _marks}


def _spaces_for_symbols(text: str) -> str:
    """NFKC with symbols and punctuation replaced by spaces: Whisper's `remove_symbols`, but marks stay."""
    return "".join(" " if unicodedata.category(c)[0] in "SP" else c for c in unicodedata.normalize("NFKC", text))


@functools.cache
def _whisper_normalizers() -> ModuleType:
    """openai-whisper's `normalizers` under another name, because importing `whisper` itself imports torch."""
    whisper = importlib.util.find_spec("whisper")
    folder = Path(next(iter(whisper.submodule_search_locations or ()), "") if whisper else "") / "normalizers"
    if not whisper or not folder.is_dir():
        raise UserError("scoring needs Whisper's normalisers: pip install openai-whisper")
    name, source = f"{__name__}_whisper", folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=[str(folder)])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
