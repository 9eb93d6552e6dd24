"""The training text: one way of writing for all corpora, by rules that differ between languages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipperasr.data.text import train_text
from zipperasr.languages import LANGUAGES


@pytest.mark.parametrize(
    ("lang", "text", "written"),
    [
        ("en", "MISTER QUILTER IS THE APOSTLE", "mister quilter is the apostle"),  # LibriSpeech
        ("en", "Don't -- stop ‘quoted’ rock-n-roll, at 9:30.", "don't stop quoted rock-n-roll at 9:30"),
        ("fr", "« L’eau, c'est-à-dire 3,5 % ! »", "l'eau c'est-à-dire 3,5 %"),
        ("de", 'Er sagte: "Größe 42', "er sagte größe 42"),  # Common Voice: an unbalanced quote
        ("es", "¿Qué? ¡1.000 €!", "qué 1.000 €"),
        ("ru", "Ёлка — «дом»", "ёлка дом"),
        ("vi", "Tiếng Việt", "tiếng việt"),  # composed, whatever the corpus
        ("ar", "مـــرحبا، السَّلامُ؟", "مرحبا السَّلامُ"),  # vowel marks stay, the stretching goes
        ("th", "ปี ู่ น้ำ  ๆ", "ปี ู่ น้ำ ๆ"),  # SARA AM is not taken apart, as NFKC would
        ("th", "คำ\u200bคำ", "คำคำ"),
        ("ja", "こんにちは、 世界！ Ｈｅｌｌｏ World １２３。", "こんにちは世界hello world 123"),
        ("zh", "你好 ， hello world 世界", "你好hello world世界"),
        ("ko", "안녕하세요, 세계 １２", "안녕하세요 세계 12"),
        ("it", "…", ""),
    ],
)
def test_each_language_is_written_by_its_rules(lang, text, written):
    assert train_text(text, lang) == written


@given(st.text(), st.sampled_from(sorted(LANGUAGES)))
def test_the_text_has_no_upper_case_ascii_no_outer_space_and_no_double_space(text, lang):
    written = train_text(text, lang)
    assert written == " ".join(written.split())
    assert not any("A" <= letter <= "Z" for letter in written)
    assert not set(written) & set('.,;:!?"()[]{}«»„“”…、。') or any(letter.isdigit() for letter in written)


@given(st.text(alphabet="abcdefgh 0123456789'-.,:éü", max_size=30))
def test_writing_again_changes_nothing(text):
    assert train_text(train_text(text, "fr"), "fr") == train_text(text, "fr")


@given(st.text(alphabet="0123456789"), st.sampled_from(sorted(LANGUAGES)))
def test_digits_are_left_alone(text, lang):
    assert train_text(text, lang) == text
