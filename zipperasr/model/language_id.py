"""The language of speech, as the pretrained Whisper detects it: by the token that its decoder puts behind the first.

N utterances, F feature frames (100 Hz), T encoder frames (50 Hz), D width, V vocabulary.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.model import AudioEncoder, TextDecoder

from zipperasr.errors import UserError
from zipperasr.model.encoder import SpeechEncoder
from zipperasr.model.whisper_io import load_whole_whisper

OPENAI_TOKENS, ENGLISH_ONLY = 51_865, 51_864  # in the vocabulary, or more: and exactly


class LanguageDetector:
    """A whole Whisper, as it was before a run trained its encoder.

    OpenAI's were trained on 30 s each, and so hear speech with the silence that is missing behind it; another one, such
    as the mini recipe's, hears it at its true length.
    """

    def __init__(self, encoder: AudioEncoder, decoder: TextDecoder, tokens: Mapping[str, int]) -> None:
        self.encoder, self.decoder, self.tokens = SpeechEncoder(encoder), decoder, tokens
        self.start = min(tokens.values()) - 1  # of every transcript: the languages' tokens follow it
        self.is_padded = len(decoder.token_embedding.weight) >= OPENAI_TOKENS

    @classmethod
    def load(cls, name: str, *, device: str = "cpu") -> "LanguageDetector":
        """The detector of a pretrained Whisper. Raises UserError when there is none, or it knows English alone."""
        encoder, decoder, tokens = load_whole_whisper(name)
        if len(decoder.token_embedding.weight) == ENGLISH_ONLY or not tokens or min(tokens.values()) < 1:
            raise UserError(f"{name}: this Whisper has no tokens of languages to detect them by")
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return cls(encoder.to(device, dtype), decoder.to(device), tokens)

    @torch.inference_mode()
    def __call__(self, features: Sequence[Tensor], langs: Collection[str]) -> dict[str, float]:
        """{language: probability} among those of `langs` that have a token, the most probable first.

        features: log-mel of pieces of one speaker's or one file's speech [F, bins]. The probabilities of a piece, which
        add up to 1, count as much as it is long.
        """
        langs = [lang for lang in langs if lang in self.tokens]
        if not langs:
            return {}
        weights = torch.tensor([float(len(x)) for x in features])
        each = self._logits(features)[:, [self.tokens[lang] for lang in langs]].softmax(-1)  # [N, languages]
        mean = (weights @ each / weights.sum()).tolist()
        return dict(sorted(zip(langs, mean, strict=True), key=lambda pair: -pair[1]))

    def _logits(self, features: Sequence[Tensor]) -> Tensor:
        """[N, V]: of the token that follows the start."""
        table = self.decoder.token_embedding.weight
        most = self.encoder.max_frames
        if self.is_padded:  # Whisper's features fall at most 2 below their maximum
            features = [F.pad(x, (0, 0, 0, most - len(x)), value=max(x.max().item() - 2, -1.5)) for x in features]
        start, logits = torch.tensor([[self.start]], device=table.device), []
        for x in features:  # one at a time: a padded one is as large as a batch of others
            frames, _ = self.encoder([x.to(table.device)], [""])  # [T, D]
            logits.append(self.decoder(start, frames[None].to(table.dtype))[0, 0])
        return torch.stack(logits).float().cpu()
