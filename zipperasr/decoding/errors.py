"""Error counts of a model that is being trained, on a few utterances."""

from collections.abc import Sequence

import torch

from zipperasr import languages
from zipperasr.data.utterances import Utterance
from zipperasr.decoding import DecodingSettings
from zipperasr.decoding.generate import Transcriber
from zipperasr.decoding.worker import batches, max_tokens, segment_s
from zipperasr.model import EncoderSettings
from zipperasr.model.speech_llm import SpeechLLM
from zipperasr.scoring.score import Counts, score


def count_errors(
    model: SpeechLLM,
    utterances: Sequence[Utterance],
    *,
    encoder: EncoderSettings,
    decoding: DecodingSettings,
    profile: str,
) -> dict[str, tuple[int, int]]:
    """{language: (errors, length of the references)} in words or characters, by greedy search.

    Raises UserError where an utterance's features cannot be read.
    """
    by_lang: dict[str, list[Utterance]] = {}
    for utterance in sorted(utterances, key=lambda u: -u.num_frames):
        by_lang.setdefault(utterance.lang, []).append(utterance)
    decoding = decoding.model_copy(update={"beam": 1})
    counts = {}
    for lang, some in by_lang.items():
        transcriber, hyps = Transcriber(model, lang, decoding), {}
        for batch in batches(some, decoding, prompt_tokens=len(transcriber.prompt)):
            hyps |= dict(zip((u.id for u in batch), _texts(transcriber, batch, encoder), strict=True))
        aligned = score({u.id: u.reference for u in some}, hyps, languages.get(lang), profile)
        total = sum((utterance.counts for utterance in aligned), Counts())
        counts[lang] = total.errors, total.ref_len
    return counts


@torch.inference_mode()
def _texts(transcriber: Transcriber, batch: Sequence[Utterance], encoder: EncoderSettings) -> list[str]:
    model = transcriber.model
    device, lang = model.encoder.conv1.weight.device, batch[0].lang
    features = [u.features().to(device) for u in batch]
    speech = model.speech_embeddings(features, [lang] * len(batch), segment_s(model, encoder))
    caps = [max_tokens(u, transcriber.settings) for u in batch]
    return [hypothesis.text for hypothesis in transcriber(speech, caps)]
