"""The languages: one row each. To add a language, add a row.

Units follow the paper (arXiv:2603.17558, section V-B): character error rate for Chinese, Japanese, Korean and Thai,
word error rate for all others. The prompt says "Please transcribe the audio content into text." (its Figure 2).
"""

import functools
from dataclasses import dataclass
from typing import Literal

import regex

from zipperasr.errors import UserError


@dataclass(frozen=True)
class Language:
    """One language: ISO 639-1 and 639-3 codes, English name, unit of its error rate, prompt, normaliser.

    `scripts` are those it is written in, as Unicode names them. `unicode_form` and `is_spaced` (words or phrases stand
    apart) are for the training text, see data/text.py.
    """

    code: str
    iso639_3: str
    name: str
    unit: Literal["word", "char"]
    prompt: str
    scripts: tuple[str, ...] = ("Latin",)
    normaliser: Literal["english", "basic"] = "basic"
    unicode_form: Literal["NFC", "NFKC"] = "NFC"
    is_spaced: bool = True

    @property
    def metric(self) -> Literal["wer", "cer"]:
        """The error rate by which the language is scored."""
        return "wer" if self.unit == "word" else "cer"


_ROWS = (
    Language("ar", "ara", "Arabic", "word", "يرجى تفريغ المحتوى الصوتي إلى نص.", ("Arabic",)),
    Language("de", "deu", "German", "word", "Bitte transkribieren Sie den Audioinhalt in Text."),
    Language("en", "eng", "English", "word", "Please transcribe the audio content into text.", normaliser="english"),
    Language("es", "spa", "Spanish", "word", "Por favor, transcriba el contenido del audio a texto."),
    Language("fr", "fra", "French", "word", "Veuillez transcrire le contenu audio en texte."),
    Language("it", "ita", "Italian", "word", "Per favore, trascrivi il contenuto audio in testo."),
    Language(
        "ja",
        "jpn",
        "Japanese",
        "char",
        "音声の内容をテキストに書き起こしてください。",
        ("Han", "Hiragana", "Katakana"),
        unicode_form="NFKC",
        is_spaced=False,
    ),
    Language("ko", "kor", "Korean", "char", "오디오 내용을 텍스트로 전사해 주세요.", ("Hangul",), unicode_form="NFKC"),
    Language("pt", "por", "Portuguese", "word", "Por favor, transcreva o conteúdo do áudio em texto."),
    Language("ru", "rus", "Russian", "word", "Пожалуйста, расшифруйте содержание аудиозаписи в текст.", ("Cyrillic",)),
    Language("th", "tha", "Thai", "char", "โปรดถอดความเนื้อหาเสียงเป็นข้อความ", ("Thai",)),
    Language("vi", "vie", "Vietnamese", "word", "Vui lòng chuyển nội dung âm thanh thành văn bản."),
    Language(
        "zh", "zho", "Chinese", "char", "请将音频内容转写为文本。", ("Han",), unicode_form="NFKC", is_spaced=False
    ),
)
LANGUAGES = {row.code: row for row in _ROWS}


def get(code: str) -> Language:
    """The row of a language code. Raises UserError naming the known codes."""
    if code not in LANGUAGES:
        known = ", ".join(LANGUAGES)
        raise UserError(f"unknown language '{code}'; known: {known} (add a row to zipperasr/languages.py)")
    return LANGUAGES[code]


def foreign_share(text: str, language: Language) -> float | None:
    """The share of the letters of `text` that are of none of the language's scripts; None where it has no letter."""
    own, foreign = (len(pattern.findall(text)) for pattern in _letters(language.scripts))
    return foreign / (own + foreign) if own + foreign else None


@functools.cache
def _letters(scripts: tuple[str, ...]) -> tuple[regex.Pattern, regex.Pattern]:
    """Letters of the scripts, and letters of others; those that scripts share, such as the ー of kana, are neither."""
    own = "".join(rf"\p{{Script={script}}}" for script in scripts)
    letter = r"(?=\p{L})"
    return regex.compile(f"{letter}[{own}]"), regex.compile(
        rf"{letter}[^{own}\p{{Script=Common}}\p{{Script=Inherited}}]"
    )
