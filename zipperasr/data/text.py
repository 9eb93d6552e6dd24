"""The text that is trained on, made from the text of a corpus.

Corpora write differently: LibriSpeech in capitals, Common Voice with punctuation, Multilingual LibriSpeech with
neither. One model learns one way: lower case, no punctuation, numbers as the corpus writes them. In order:

1. Unicode NFC (Chinese, Japanese and Korean: NFKC, so that full-width letters and digits become plain ones). Invisible
   format characters go, and the Arabic tatweel, which only stretches a word.
2. Lower case, in the scripts that have it.
3. Typographic apostrophes become `'`. Apostrophes and hyphens stay inside words (l'eau, well-known), and `. , : /` stay
   between digits (3,5 and 9:30). All other punctuation becomes a space. Symbols that are spoken stay: currencies and
   % & + = °.
4. White space becomes single spaces; in Chinese and Japanese there is none beside a Chinese or Japanese character.

The text of the corpus is kept beside it, and is what hypotheses are scored against.
"""

import unicodedata

import regex

from zipperasr import languages

_INVISIBLE = regex.compile(r"[\p{Cf}\u0640]")
_APOSTROPHE = regex.compile("[\u2018\u2019\u02bc\uff07`\u00b4]")
_INSIDE = r"(?<=\d)[.,:/](?=\d)|(?<=\w)['-](?=\w)"
_UNSPOKEN = regex.compile(rf"(?:{_INSIDE})(*SKIP)(*FAIL)|(?![%&+=°\p{{Sc}}])[\p{{P}}\p{{S}}]")
_IDEOGRAPH = r"[\p{Han}\p{Hiragana}\p{Katakana}ー]"
_BESIDE_IDEOGRAPH = regex.compile(rf"(?<={_IDEOGRAPH})\s+|\s+(?={_IDEOGRAPH})")


def train_text(text: str, lang: str) -> str:
    """The normalised form of a corpus's text in the language `lang`, by the rules above; may be empty."""
    row = languages.get(lang)
    text = unicodedata.normalize(row.unicode_form, _INVISIBLE.sub("", text)).lower()
    text = _UNSPOKEN.sub(" ", _APOSTROPHE.sub("'", text))
    if not row.is_spaced:
        text = _BESIDE_IDEOGRAPH.sub("", text)
    return " ".join(text.split())
