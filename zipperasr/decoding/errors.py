"""Error counts of a model that is being trained, on a few utterances."""

from collections.abc import Sequence

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
    transcriber, counts = Transcriber(model, decoding), {}
    for lang, some in by_lang.items():
        hyps: dict[str, str] = {}
        for batch in batches(some, decoding, prompt_tokens=transcriber.prompt_tokens([lang])):
            langs = [lang] * len(batch)
            speech, _ = transcriber.encode([u.features() for u in batch], langs, segment_s(model, encoder))
            found = transcriber(speech, langs, [max_tokens(u, decoding) for u in batch])
            hyps |= {u.id: hypothesis.text for u, hypothesis in zip(batch, found, strict=True)}
        aligned = score({u.id: u.reference for u in some}, hyps, languages.get(lang), profile)
        total = sum((utterance.counts for utterance in aligned), Counts())
        counts[lang] = total.errors, total.ref_len
    return counts
