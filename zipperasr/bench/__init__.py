"""Benchmarks, a file each: they time this code beside what it is compared with, in one run.

This module is light: torch is imported by the files.
"""

from pathlib import Path

import zipperasr

MINI = Path(zipperasr.__file__).parents[1] / "egs" / "multilingual12" / "pretrained" / "mini"
SIZES = {
    "mini": (str(MINI / "whisper"), str(MINI / "lm")),
    "small": ("base", str(MINI / "lm")),
    "paper": ("large-v3", "Qwen/Qwen3-1.7B"),
}
"""Encoder and LLM of a model by size; of the mini recipe's only the shapes are taken."""
LENGTHS = {"librispeech": "LibriSpeech", "mls": "MLS", "commonvoice": "Common Voice", "mini": "the mini recipe"}
"""Corpora whose utterances' lengths are imitated, by the name of the option."""
