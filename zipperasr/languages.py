"""The languages: one row each. To add a language, add a row.

Units follow the paper (arXiv:2603.17558, section V-B): character error rate for Chinese, Japanese, Korean and Thai,
word error rate for all others. The prompt says "Please transcribe the audio content into text." (its Figure 2).
"""

from dataclasses import dataclass
from typing import Literal

from zipperasr.errors import UserError


@dataclass(frozen=True)
class Language:
    """One language: ISO 639-1 code, English name, unit of its error rate, normaliser and prompt."""

    code: str
    name: str
    unit: Literal["word", "char"]
    prompt: str
    normaliser: Literal["english", "basic"] = "basic"

    @property
    def whisper_token(self) -> str:
        """The language's token in Whisper's vocabulary."""
        return f"<|{self.code}|>"

    @property
    def metric(self) -> Literal["wer", "cer"]:
        """The error rate by which the language is scored."""
        return "wer" if self.unit == "word" else "cer"


_ROWS = (
    Language("ar", "Arabic", "word", "يرجى تفريغ المحتوى الصوتي إلى نص."),
    Language("de", "German", "word", "Bitte transkribieren Sie den Audioinhalt in Text."),
    Language("en", "English", "word", "Please transcribe the audio content into text.", "english"),
    Language("es", "Spanish", "word", "Por favor, transcriba el contenido del audio a texto."),
    Language("fr", "French", "word", "Veuillez transcrire le contenu audio en texte."),
    Language("it", "Italian", "word", "Per favore, trascrivi il contenuto audio in testo."),
    Language("ja", "Japanese", "char", "音声の内容をテキストに書き起こしてください。"),
    Language("ko", "Korean", "char", "오디오 내용을 텍스트로 전사해 주세요."),
    Language("pt", "Portuguese", "word", "Por favor, transcreva o conteúdo do áudio em texto."),
    Language("ru", "Russian", "word", "Пожалуйста, расшифруйте содержание аудиозаписи в текст."),
    Language("th", "Thai", "char", "โปรดถอดความเนื้อหาเสียงเป็นข้อความ"),
    Language("vi", "Vietnamese", "word", "Vui lòng chuyển nội dung âm thanh thành văn bản."),
    Language("zh", "Chinese", "char", "请将音频内容转写为文本。"),
)
LANGUAGES = {row.code: row for row in _ROWS}


def get(code: str) -> Language:
    """The row of a language code. Raises UserError naming the known codes."""
    if code not in LANGUAGES:
        known = ", ".join(LANGUAGES)
        raise UserError(f"unknown language '{code}'; known: {known} (add a row to zipperasr/languages.py)")
    return LANGUAGES[code]
