"""What a Speech-LLM makes up, and how it is kept from it: no speech, the same over and over, another script.

Legend: F frames, S tokens, N utterances, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation import LogitsProcessor

from zipperasr import languages
from zipperasr.decoding import DecodingSettings
from zipperasr.languages import Language
from zipperasr.prompts import Tokenizer

MIN_LOOP = 12  # tokens: "no no no no" is no loop yet
MIN_STEADY_FRAMES = 50  # 0.5 s: in less, speech may be as steady as noise
LEVEL_FRAMES = 10
EDGE_FRAMES = 2  # their windows reach over the ends of the audio, where hum has a kink


def has_speech(features: Tensor, settings: DecodingSettings) -> bool:
    """Whether log-mel features [F, bins] may hold speech: they are not too quiet, and their level changes in time.

    The loudest power of a mel band must reach `min_level_db`; a sine of full scale has 24, the rounding to 16 bits -84.
    (Whisper's features tell it, as only their floor moves with it.) The level, as the mean over bands and 0.1 s, must
    have `min_modulation_db` between its 5th and 95th percentile: hum has none, white, pink and brown noise 0.5 to 0.9,
    speech 1.6 and more in each of 214 clips, and 1 in 98 of 100 of them behind white or pink noise as loud as itself.
    A word in half a minute of silence shows between the 25th and 99th only, where noise varies no more.
    """
    power_db = 10 * (4 * features.float() - 4)
    if power_db.max() < settings.min_level_db:
        return False
    if len(features) < MIN_STEADY_FRAMES:
        return True
    level_db = F.avg_pool1d(power_db[EDGE_FRAMES:-EDGE_FRAMES].mean(1)[None], LEVEL_FRAMES, stride=1)[0]
    low, high = level_db.quantile(torch.tensor([0.05, 0.25, 0.95, 0.99])).view(2, 2)
    return bool((high - low).max() >= settings.min_modulation_db)


def loop_start(ids: Sequence[int], repeats: int) -> int | None:
    """Where a loop's second round begins in `ids` [S]: the same tokens `repeats` times in a row; None without one."""
    x = torch.tensor(ids)
    for unit in range(1, len(ids) // repeats + 1):
        same = (x[unit:] == x[:-unit]).tolist()  # the token is what stands one unit before
        run = 0
        for i, is_same in enumerate(same):
            run = run + 1 if is_same else 0
            if run + unit >= max(repeats * unit, MIN_LOOP):
                return i - run + 1 + unit
    return None


def is_foreign(text: str, language: Language, max_share: float) -> bool:
    """Whether more than `max_share` of the letters of `text` are of another language's script."""
    return (languages.foreign_share(text, language) or 0) > max_share


def foreign_tokens(tokenizer: Tokenizer, vocab_size: int, language: Language) -> Tensor:
    """[V]: the tokens that hold a letter of a script which is not the language's."""
    return torch.tensor([is_foreign(tokenizer.decode([i]), language, 0) for i in range(vocab_size)])


class OwnScript(LogitsProcessor):
    """Forbids the tokens of `foreign` [N, V] in each row."""

    def __init__(self, foreign: Tensor) -> None:
        self.foreign = foreign

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(self.foreign, -torch.inf)


class NoLoops(LogitsProcessor):
    """Forbids the token that would say the same `longest` tokens, or fewer, a third time in a row."""

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        length = input_ids.shape[1]
        for unit in range(1, min(self.longest, (length + 1) // 3) + 1):
            recent = input_ids[:, length - 3 * unit + 1 :]  # two units, and the third but for its last token
            repeats = (recent[:, unit:] == recent[:, :-unit]).all(1)  # [N]
            would = input_ids[:, length - unit, None]  # the token that ends the third
            scores = scores.scatter(1, would, torch.where(repeats[:, None], -torch.inf, scores.gather(1, would)))
        return scores
