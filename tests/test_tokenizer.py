"""Both kinds of tokenizer keep the promises of prompts.Tokenizer."""

import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zipperasr import prompts
from zipperasr.data import tokenizer as tokenizers_of_ours
from zipperasr.data.tokenizer import Targets, load_tokenizer
from zipperasr.errors import UserError
from zipperasr.languages import LANGUAGES


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    tiny.make_tokenizer(folder / "tokenizer.model")
    return load_tokenizer(folder)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_prompt_is_encoded_and_decoded_without_loss(tokenizer, lang):
    ids = prompts.prompt_ids(tokenizer, lang)
    assert len(ids) > 0 and tokenizer.decode(ids) == LANGUAGES[lang].prompt


def test_a_target_ends_with_end_of_text_which_decodes_to_nothing(tokenizer):
    ids = prompts.target_ids(tokenizer, "haus baum")
    assert ids[-1] == tokenizer.end_of_text and tokenizer.end_of_text not in ids[:-1]
    assert tokenizer.decode(ids) == "haus baum"


TEXTS = [f"haus baum {'katze ' * (i % 7)}{i % 90}" for i in range(100)]


@pytest.mark.parametrize("at_once", [7, 10_000])
@pytest.mark.parametrize("library", ["sentencepiece", "hugging face"])
def test_targets_of_many_texts_are_those_of_each(tokenizer, library, at_once, tmp_path, monkeypatch):
    """Whether there are so many that they are encoded by other processes or threads, or not."""
    monkeypatch.setattr(tokenizers_of_ours, "AT_ONCE", at_once)
    if library == "hugging face":
        hugging_face(tmp_path, eos_token="<|end|>")
        tokenizer = load_tokenizer(tmp_path)
    with Targets(tokenizer) as targets:
        for text in TEXTS:
            targets.add(text)
        found = targets.by_text()
    assert {text: ids.tolist() for text, ids in found.items()} == {
        text: prompts.target_ids(tokenizer, text) for text in TEXTS
    }


def test_each_different_text_is_encoded_once():
    class Counting:
        end_of_text, encoded = 0, []

        def encode_batch(self, texts):
            self.encoded += texts
            return [[len(text)] for text in texts]

    with Targets(Counting()) as targets:
        for text in ("a", "bb", "a", "", "bb"):
            targets.add(text)
        found = {text: ids.tolist() for text, ids in targets.by_text().items()}
    assert found == {"a": [1, 0], "bb": [2, 0], "": [0, 0]}
    assert Counting.encoded == ["a", "bb", ""]


def test_no_texts_have_no_targets(tokenizer):
    with Targets(tokenizer) as targets:
        assert targets.by_text() == {}


def test_text_cannot_spell_end_of_text(tokenizer):
    assert tokenizer.end_of_text not in tokenizer.encode("<|endoftext|>")


def hugging_face(folder, **special):
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<|end|>": 1, "haus": 2, "baum": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special).save_pretrained(folder)


def test_a_hugging_face_tokenizer_adds_no_special_tokens(tmp_path):
    hugging_face(tmp_path, eos_token="<|end|>")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("haus baum") == [2, 3] and tokenizer.end_of_text == 1
    assert tokenizer.decode([2, 3, 1]) == "haus baum"


def test_a_tokenizer_that_is_missing_broken_or_endless_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*no tokenizer found"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"broken.*not a sentencepiece model"):
        load_tokenizer(tmp_path / "broken")
    hugging_face(tmp_path / "endless")
    with pytest.raises(UserError, match=r"endless.*no end-of-text token"):
        load_tokenizer(tmp_path / "endless")
