"""The whole configuration of a recipe: every package's section, and the checks that need more than one section."""

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat

from zipperasr import config, files, languages
from zipperasr.config import Settings
from zipperasr.data import DataSettings
from zipperasr.decoding import DecodingSettings, TranscriptionSettings
from zipperasr.errors import UserError
from zipperasr.model import ModelSettings
from zipperasr.reporting import ReportSettings
from zipperasr.scoring import ScoringSettings
from zipperasr.serving import ServingSettings
from zipperasr.training import TrainingSettings

if TYPE_CHECKING:
    from zipperasr.decoding.job import TranscriptionJob


class CorpusSettings(Settings):
    """One corpus, read by `local/prepare_<prepare>.py` with `options`.

    Stage 0 fetches it by local/download.sh with the options `download`, or makes it if it is `synthetic`, of this size.
    """

    prepare: str
    langs: list[str]
    options: list[str] = []
    download: list[str] = []
    synthetic: PositiveFloat | None = None


class Config(Settings):
    """Everything a run depends on; saved whole beside its checkpoints."""

    stage: Literal[1, 2] = 2
    corpora: dict[str, CorpusSettings] = {}
    data: DataSettings
    model: ModelSettings
    training: TrainingSettings
    decoding: DecodingSettings = DecodingSettings()
    transcription: TranscriptionSettings = TranscriptionSettings()
    serving: ServingSettings = ServingSettings()
    scoring: ScoringSettings = ScoringSettings()
    report: ReportSettings = ReportSettings()


def load(path: Path | str, *, overrides: Iterable[str] = ()) -> Config:
    """The checked configuration of `path` with `key=value` overrides. Raises UserError, one line a mistake."""
    whole = config.load(path, Config, overrides=overrides)
    try:
        _check(whole)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return whole


def load_run(run_dir: Path, *, overrides: Sequence[str] = (), allowed: tuple[str, ...] = ()) -> Config:
    """The checked configuration that a run was trained with; `allowed` is how an override may begin.

    Raises UserError where there is none, for another override, and as `load`.
    """
    if other := [text for text in overrides if not text.startswith(allowed)]:
        keys = " and ".join(f"{start}<key>" if start.endswith(".") else start for start in allowed)
        raise UserError(f"override '{other[0]}': a trained run takes only {keys}")
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir}: no run (it has no config.yaml); give what stage 4 or 6 has made, as exp/mini/<run>"
        )
    return load(run_dir / "config.yaml", overrides=overrides)


def transcription_job(
    run_dir: Path, whole: Config, *, step: int | str | None, average: int, lang: str | None = None
) -> "TranscriptionJob":
    """How a run of these settings transcribes audio, all in `lang` if that is given.

    Raises UserError where there is no such checkpoint.
    """
    from zipperasr.decoding.decode import model_digest
    from zipperasr.decoding.job import TranscriptionJob
    from zipperasr.model import RunSettings, choose_steps

    run_settings = RunSettings(stage=whole.stage, model=whole.model)
    steps = choose_steps(run_dir, step, average=average)
    digests = model_digest(run_dir, run_settings, steps), _aligner_digest(run_dir, steps)
    settings = run_settings, whole.decoding, whole.transcription
    return TranscriptionJob(run_dir, steps, *settings, _trained_languages(whole), lang, *digests)


def _aligner_digest(run_dir: Path, steps: Sequence[int]) -> str | None:
    """Stands for the run's aligner, if it has one that was trained on this checkpoint alone."""
    from zipperasr.model import ALIGNER, ALIGNER_SETTINGS

    settings = run_dir / ALIGNER / ALIGNER_SETTINGS
    if not settings.is_file() or list(steps) != [files.read_json(settings)["step"]]:
        return None
    return files.fingerprint([files.sha256(path) for path in sorted(settings.parent.glob("[!.]*"))])


def _trained_languages(whole: Config) -> tuple[str, ...]:
    if whole.stage == 2 and whole.model.adapter:
        return tuple(whole.model.adapter.langs)
    sets = whole.data.lists.settings[getattr(whole.training, f"stage{whole.stage}").setting].train
    return tuple(dict.fromkeys(name.split("_")[1] for name in sets))


def bound_memory() -> None:
    """Bound what oneDNN keeps for each shape of a batch, of which hardly two are alike: 300 MB an hour of audio.

    To be called before torch is loaded.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


def share(text: str) -> tuple[int, int]:
    """A job and the number of jobs, from `2/8`: the type of command-line options. Raises ArgumentTypeError."""
    job, _, num_jobs = text.partition("/")
    if not (job.isdecimal() and num_jobs.isdecimal() and 1 <= int(job) <= int(num_jobs)):
        raise argparse.ArgumentTypeError(f"'{text}' is not <job>/<number of jobs>, such as 2/8")
    return int(job), int(num_jobs)


def positive(text: str) -> int:
    """A number above 0: the type of command-line options. Raises ArgumentTypeError."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return int(text)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Which of a run's checkpoints is meant, for zipperasr.model.choose_steps."""
    parser.add_argument("--step", type=_step, help="checkpoint, or best: the lowest dev error (default: the latest)")
    parser.add_argument(
        "--average",
        type=positive,
        default=1,
        metavar="N",
        help="take the mean of N: it and those before it, or the N best",
    )


def _step(text: str) -> int | str:
    return text if text == "best" else int(text)


def _check(whole: Config) -> None:
    for corpus, settings in whole.corpora.items():
        if "_" in corpus:
            raise UserError(f"corpora: '{corpus}' holds an underscore (sets are <corpus>_<lang>_<split>); rename it")
        for lang in settings.langs:
            languages.get(lang)
    for lang in whole.model.adapter.langs if whole.model.adapter else ():
        languages.get(lang)
    _check_lists(whole)
    for stage in ("stage1", "stage2"):
        setting = getattr(whole.training, stage).setting
        if setting not in whole.data.lists.settings:
            known = ", ".join(whole.data.lists.settings) or "none"
            raise UserError(f"training.{stage}.setting: '{setting}' is not in data.lists.settings; known: {known}")


def _check_lists(whole: Config) -> None:
    lists, names = whole.data.lists, set()
    for setting, parts in lists.settings.items():
        for part, name in parts.draws:
            _check_set(whole, f"data.lists.settings.{setting}.{part}", name)
            names.add(name)
    for key in ("paper_hours", "paper_notes"):
        for name in sorted(getattr(lists, key).keys() - names):
            raise UserError(f"data.lists.{key}: '{name}' is in no setting; mend its name, or take it out")
    for setting in lists.released.folders.keys() - lists.settings if lists.released else ():
        known = ", ".join(lists.settings) or "none"
        raise UserError(f"data.lists.released.folders: '{setting}' is not in data.lists.settings; known: {known}")


def _check_set(whole: Config, where: str, name: str) -> None:
    corpus, _, rest = name.partition("_")
    lang, _, split = rest.partition("_")
    if corpus not in whole.corpora or not split:
        known = ", ".join(whole.corpora)
        raise UserError(f"{where}: '{name}' is not <corpus>_<lang>_<split> with a corpus of `corpora` ({known})")
    if lang not in whole.corpora[corpus].langs:
        known = ", ".join(whole.corpora[corpus].langs)
        raise UserError(f"{where}: '{name}': corpus '{corpus}' has no language '{lang}'; it has {known}")
