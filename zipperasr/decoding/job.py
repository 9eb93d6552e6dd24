"""What there is to decode: one set, with one model."""

from dataclasses import dataclass
from pathlib import Path

from zipperasr import files
from zipperasr.data import FeatureSettings
from zipperasr.decoding import DecodingSettings
from zipperasr.model import RunSettings

OUTPUTS = ("hyp", "ref", "utts.jsonl", "timing.json", "meta.json")


@dataclass(frozen=True)
class Job:
    """One set to decode with a checkpoint of a run, or with the mean of several.

    `model` is a digest of the weights and their settings, `key` of all that the result depends on.
    """

    run_dir: Path
    steps: tuple[int, ...]
    run: RunSettings
    data_dir: Path
    setting: str
    set: str
    features: FeatureSettings
    decoding: DecodingSettings
    model: str
    key: str

    @property
    def directory(self) -> Path:
        """Where the results go."""
        return self.run_dir / f"decode_{self.set}"

    @property
    def lang(self) -> str:
        """The language of the set."""
        return self.set.split("_", 2)[1]

    @property
    def is_done(self) -> bool:
        """Whether the results are there, whole, and of this key."""
        return files.is_done(self.directory, self.key) and all((self.directory / name).is_file() for name in OUTPUTS)
