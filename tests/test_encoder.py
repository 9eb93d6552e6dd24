"""The encoder at true lengths against openai-whisper's own modules."""

import pytest
import tiny
import torch
from torch.nn import functional as F

from zipperasr.adapters import AdapterSettings, adapt, adapted_layers
from zipperasr.errors import UserError
from zipperasr.model.encoder import ADAPTED, SpeechEncoder

LENGTHS = [1, 2, 3, 57, 58, 119, 120, 90]
LANGS = ["de"] * len(LENGTHS)


@pytest.fixture(scope="module")
def whisper():
    torch.manual_seed(0)
    return tiny.make_whisper(num_mel_bins=8, n_audio_ctx=60).requires_grad_(False)


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(1)
    return [torch.randn(n, 8) for n in LENGTHS]


def by_whisper(whisper, features):
    """Whisper's own forward on one utterance, its positional embedding cut to the utterance."""
    encoder, table = whisper.encoder, whisper.encoder.positional_embedding
    encoder.positional_embedding = table[: (len(features) + 1) // 2]
    try:
        return encoder(features.T[None])[0]
    finally:
        encoder.positional_embedding = table


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_full_windows_equal_whispers_own_encoder(whisper):
    mel = torch.randn(3, 120, 8)
    x, lengths = SpeechEncoder(whisper.encoder)(list(mel), ["de"] * 3)
    assert lengths == [60, 60, 60]
    assert_close(x.view(3, 60, -1), whisper.encoder(mel.transpose(1, 2)))


def test_true_lengths_equal_whispers_modules_on_each_utterance_alone(whisper, features):
    x, lengths = SpeechEncoder(whisper.encoder)(features, LANGS)
    assert lengths == [(n + 1) // 2 for n in LENGTHS]
    for actual, utterance in zip(x.split(lengths), features, strict=True):
        assert_close(actual, by_whisper(whisper, utterance))


@pytest.mark.parametrize("chunk_s", [None, 0.3])
@pytest.mark.parametrize("pad_to_30s", [False, True])
def test_a_batch_of_one_equals_a_batch_of_many(whisper, features, chunk_s, pad_to_30s):
    encoder = SpeechEncoder(whisper.encoder, pad_to_30s=pad_to_30s)
    x, lengths = encoder(features, LANGS, chunk_s)
    for actual, utterance in zip(x.split(lengths), features, strict=True):
        torch.testing.assert_close(actual, encoder([utterance], ["de"], chunk_s)[0], rtol=0, atol=2e-6)


def test_a_neighbour_changes_nothing_whatever_it_holds(whisper, features):
    encoder = SpeechEncoder(whisper.encoder)
    x, lengths = encoder(features, LANGS)
    loud = [features[0], *(1e3 * f for f in features[1:-1]), features[-1]]
    y, _ = encoder(loud, LANGS)
    for i in (0, -1):
        torch.testing.assert_close(x.split(lengths)[i], y.split(lengths)[i], rtol=0, atol=2e-6)


def test_chunks_are_encoded_as_utterances_of_their_own(whisper, features):
    encoder = SpeechEncoder(whisper.encoder)
    chunked, lengths = encoder(features[4:6], ["de", "de"], chunk_s=0.4)
    pieces = [piece for f in features[4:6] for piece in f.split(40)]
    assert lengths == [29, 60]
    torch.testing.assert_close(chunked, encoder(pieces, ["de"] * len(pieces))[0], rtol=0, atol=2e-6)


def test_one_chunk_is_full_context(whisper, features):
    encoder = SpeechEncoder(whisper.encoder)
    torch.testing.assert_close(encoder(features, LANGS, 1.2)[0], encoder(features, LANGS)[0], rtol=0, atol=0)


def test_padding_to_30_s_equals_whispers_own_encoder_on_padded_features(whisper, features):
    x, lengths = SpeechEncoder(whisper.encoder, pad_to_30s=True)(features, LANGS)
    for actual, f in zip(x.split(lengths), features, strict=True):
        padded = F.pad(f, (0, 0, 0, 120 - len(f)), value=max(f.max().item() - 2, -1.5))
        assert_close(actual, whisper.encoder(padded.T[None])[0, : len(actual)])


@pytest.mark.parametrize("pad_to_30s", [False, True])
def test_flylora_counts_the_frames_of_utterances_and_not_their_padding(features, pad_to_30s):
    torch.manual_seed(0)
    encoder = SpeechEncoder(tiny.make_whisper(num_mel_bins=8, n_audio_ctx=60).encoder, pad_to_30s=pad_to_30s)
    adapt(encoder, ADAPTED, AdapterSettings(method="flylora", rank=4, flylora={"top_k": 3}))
    x, lengths = encoder.train()(features, LANGS)
    x.sum().backward()
    assert {layer.load.sum().item() for layer in adapted_layers(encoder).values()} == {3 * sum(lengths)}


def test_gradients_equal_those_of_whispers_modules(features):
    torch.manual_seed(2)
    whisper = tiny.make_whisper(num_mel_bins=8, n_audio_ctx=60)
    parameters = dict(whisper.encoder.named_parameters())
    sum(by_whisper(whisper, f).square().sum() for f in features).backward()
    expected = {name: p.grad.clone() for name, p in parameters.items()}
    whisper.encoder.zero_grad()
    SpeechEncoder(whisper.encoder)(features, LANGS)[0].square().sum().backward()
    for name, p in parameters.items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-3)


def test_half_precision_weights_work(whisper, features):
    torch.manual_seed(0)
    encoder = SpeechEncoder(tiny.make_whisper(num_mel_bins=8, n_audio_ctx=60).bfloat16().encoder)
    x, _ = encoder(features, LANGS)
    assert x.dtype == torch.bfloat16 and x.isfinite().all()


@pytest.mark.parametrize("num_frames, chunk_s", [(121, None), (200, 1.5), (0, None)])
def test_a_segment_that_does_not_fit_the_window_is_named(whisper, num_frames, chunk_s):
    with pytest.raises(UserError, match=r"takes more than 0 and at most 1.2 s"):
        SpeechEncoder(whisper.encoder)([torch.zeros(num_frames, 8)], ["de"], chunk_s)
