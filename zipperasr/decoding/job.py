"""What there is to decode: one set, or audio from anywhere, with one model."""

from dataclasses import dataclass
from pathlib import Path

from zipperasr import files
from zipperasr.data import FeatureSettings
from zipperasr.decoding import DecodingSettings, TranscriptionSettings
from zipperasr.model import RunSettings

OUTPUTS = ("hyp", "ref", "utts.jsonl", "encodings.npz", "timing.json", "meta.json")


@dataclass(frozen=True)
class Job:
    """One set to decode with a checkpoint of a run, or with the mean of several.

    `model` is a digest of the weights and their settings, `key` of all that the result depends on. `as_lang` is the
    language to decode as, in place of the set's own; `first` the number of utterances, from the top of the list.
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
    as_lang: str | None = None
    first: int | None = None

    @property
    def directory(self) -> Path:
        """Where the results go; those of another language's adapter and prompt apart."""
        return self.run_dir / (f"as_{self.as_lang}" if self.as_lang else "") / f"decode_{self.set}"

    @property
    def lang(self) -> str:
        """The language of the set."""
        return self.set.split("_", 2)[1]

    @property
    def spoken_as(self) -> str:
        """The language whose adapter and prompt are used."""
        return self.as_lang or self.lang

    @property
    def is_done(self) -> bool:
        """Whether the results are there, whole, and of this key."""
        return files.is_done(self.directory, self.key) and all((self.directory / name).is_file() for name in OUTPUTS)


@dataclass(frozen=True)
class TranscriptionJob:
    """All that transcripts depend on besides their audio.

    `langs` are the languages that are looked for, `lang` the one that all is said to be in, if any; `model` as above,
    `aligner` the digest of the run's aligner, if it has one of these weights.
    """

    run_dir: Path
    steps: tuple[int, ...]
    run: RunSettings
    decoding: DecodingSettings
    transcription: TranscriptionSettings
    langs: tuple[str, ...]
    lang: str | None
    model: str
    aligner: str | None = None

    @property
    def key(self) -> str:
        """Stands for all of it."""
        settings = [self.decoding.model_dump(), self.transcription.model_dump()]
        return files.fingerprint([self.model, self.aligner, *settings, self.langs, self.lang])
