"""Text of the mini corpora: numbers and names from CLDR, in 13 languages, with nothing to download.

Each language has a closed inventory: about 60 names and the cardinal numbers 0 to 99. Held-out phrases are new
combinations of known words. A phrase belongs to one part of the data (`part`), whatever corpus it is used in.
"""

import functools
import re
from collections.abc import Iterator

import cn2an
from babel import Locale
from babel.units import get_unit_name
from mini_speech import PARTS, seed_of, speakable
from num2words import num2words

NUM_NAMES = 60
PERCENT = {"test": 8, "dev": 4, "train": 48, "pretrain": 40}

# CLDR keys, in order of preference; a language takes the first NUM_NAMES names that pass its filters.
UNITS = (
    "duration-minute duration-week duration-year length-meter length-kilometer mass-gram mass-kilogram volume-liter"
).split()
TERRITORIES = (
    "DE FR JP CN BR IN EG TH RU IT ES PT KR VN CA MX AR CL PE CU TR GR PL SE NO FI DK NL BE AT CH IE UA RO BG HU CZ "
    "IL IQ IR SA KE NG GH MA DZ TN LY SD ET UG MN NP ID MY PH SG AU PK KZ IS BO EC UY PY VE CO GT PA JM HT LB JO SY "
    "YE OM QA KW CM SN ML"
).split()
LANGUAGES = "de fr ja zh en pt hi ar th ru tr el nl sv pl ko vi uk cs da fi hu he fa".split()
CURRENCIES = "EUR USD JPY CNY RUB INR BRL KRW THB GBP CHF TRY MXN SEK PLN".split()

# Japanese names do not begin with オ: after a number that ends in お eSpeak spells it out.
LATIN = r"[a-zà-öø-ÿœß]+( [a-zà-öø-ÿœß]+)?"
SCRIPTS = {
    "ar": r"[ء-غف-ي]+( [ء-غف-ي]+)?",
    "de": LATIN, "en": r"[a-z]+( [a-z]+)?", "es": LATIN, "fr": LATIN, "it": LATIN, "pt": LATIN,
    "ja": r"(?!オ)[ァ-ヴー]+", "ko": r"[가-힣]+( [가-힣]+)?", "ru": r"[а-яё]+( [а-яё]+)?", "th": r"[ก-ฺเ-๎]+",
    "vi": r"[a-zà-ỹđ]+( [a-zà-ỹđ]+){0,2}", "zh": r"[一-鿿]+",
}  # fmt: skip
MAX_LETTERS = {"th": 12, "zh": 5, "ja": 8, "ko": 7}  # of a name; 14 elsewhere
UNSPACED = ("ja", "th", "zh")

KANA_DIGITS = ("ゼロ", "いち", "に", "さん", "よん", "ご", "ろく", "なな", "はち", "きゅう")

# How two names are joined, and how a time is said, in the source domain.
JOINS = {"en": ("and", "or"), "fr": ("et", "ou"), "th": ("และ", "หรือ"), "zh": ("和", "或者")}
TIMES = {"en": "at {} o clock", "fr": "à {} heures", "th": "เวลา{}นาฬิกา", "zh": "{}点"}


@functools.cache
def phrases(lang: str, corpus: str = "read") -> list[str]:
    """All phrases of a corpus in a language, each once: `read` for the target domain, `talk` for the source domain."""
    return list(dict.fromkeys(_read(lang) if corpus == "read" else _talk(lang)))


def _read(lang: str) -> Iterator[str]:
    """A number and a name, in either order."""
    for number in range(100):
        for name in names(lang):
            yield _join(lang, number_words(lang, number), name)
            yield _join(lang, name, number_words(lang, number))


def _talk(lang: str) -> Iterator[str]:
    """Two joined names, or a name and a time of day."""
    times = [TIMES[lang].format(number_words(lang, hour)) for hour in range(2, 21)]
    for name in names(lang):
        yield from (_join(lang, name, word, other) for word in JOINS[lang] for other in names(lang) if other != name)
        yield from (_join(lang, name, time) for time in times)


@functools.cache
def part(lang: str, text: str) -> str:
    """The part of the data ("test", "dev", "train" or "pretrain") that a phrase belongs to, by a hash of it."""
    point = seed_of("part", lang, text) % 100
    for name in PARTS:
        point -= PERCENT[name]
        if point < 0:
            return name
    raise AssertionError("the percentages sum to 100")


@functools.cache
def names(lang: str) -> list[str]:
    """The inventory's names: lower case, one script, at most two words, all read by eSpeak in the language itself."""
    pattern, max_letters = re.compile(SCRIPTS[lang]), MAX_LETTERS.get(lang, 14)
    cleaned = (name.lower().replace("-", " ").replace("\u200f", "") for name in _cldr_names(lang))
    candidates = [name for name in dict.fromkeys(cleaned) if pattern.fullmatch(name) and len(name) <= max_letters]
    return [name for name, good in zip(candidates, speakable(lang, candidates), strict=True) if good][:NUM_NAMES]


def _cldr_names(lang: str) -> list[str]:
    locale = Locale(lang)
    months, days = locale.months["format"]["wide"], locale.days["format"]["wide"]
    everything = [
        *(months[key] for key in sorted(months)),
        *(days[key] for key in sorted(days)),
        *(get_unit_name(key, locale=locale) for key in UNITS),
        *(locale.territories.get(key) for key in TERRITORIES),
        *(locale.languages.get(key) for key in LANGUAGES),
        *(locale.currencies.get(key) for key in CURRENCIES),
    ]
    return [name for name in everything if name]


@functools.cache
def number_words(lang: str, number: int) -> str:
    """A cardinal number from 0 to 99 in words."""
    if lang == "zh":
        return cn2an.an2cn(str(number))
    if lang == "ja":
        tens, ones = divmod(number, 10)
        head = ("" if tens == 1 else KANA_DIGITS[tens]) + "じゅう" if tens else ""
        return head + (KANA_DIGITS[ones] if ones or not tens else "")
    words = num2words(number, lang={"pt": "pt_BR"}.get(lang, lang))
    return words.replace("-", " ").replace(" و ", " و")


def _join(lang: str, *words: str) -> str:
    return ("" if lang in UNSPACED else " ").join(words)
