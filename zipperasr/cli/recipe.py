"""The whole configuration of a recipe: every package's section, and the checks that need more than one section."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import PositiveFloat

from zipperasr import config, languages
from zipperasr.config import Settings
from zipperasr.data import DataSettings
from zipperasr.decoding import DecodingSettings
from zipperasr.errors import UserError
from zipperasr.model import ModelSettings
from zipperasr.reporting import ReportSettings
from zipperasr.scoring import ScoringSettings
from zipperasr.training import TrainingSettings


class CorpusSettings(Settings):
    """One corpus, read by `local/prepare_<prepare>.py`; `synthetic`: made by stage 0, at this fraction of its size."""

    prepare: str
    langs: list[str]
    synthetic: PositiveFloat | None = None


class Config(Settings):
    """Everything a run depends on; saved whole beside its checkpoints."""

    stage: Literal[1, 2] = 2
    corpora: dict[str, CorpusSettings] = {}
    data: DataSettings
    model: ModelSettings
    training: TrainingSettings
    decoding: DecodingSettings = DecodingSettings()
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


def _check(whole: Config) -> None:
    for corpus, settings in whole.corpora.items():
        if "_" in corpus:
            raise UserError(f"corpora: '{corpus}' holds an underscore (sets are <corpus>_<lang>_<split>); rename it")
        for lang in settings.langs:
            languages.get(lang)
    for lang in whole.model.adapter.langs if whole.model.adapter else ():
        languages.get(lang)
    for setting, parts in whole.data.lists.settings.items():
        for part in ("train", "dev", "test"):
            for name in getattr(parts, part):
                _check_set(whole, f"data.lists.settings.{setting}.{part}", name)
    for stage in ("stage1", "stage2"):
        setting = getattr(whole.training, stage).setting
        if setting not in whole.data.lists.settings:
            known = ", ".join(whole.data.lists.settings) or "none"
            raise UserError(f"training.{stage}.setting: '{setting}' is not in data.lists.settings; known: {known}")


def _check_set(whole: Config, where: str, name: str) -> None:
    corpus, _, rest = name.partition("_")
    lang, _, split = rest.partition("_")
    if corpus not in whole.corpora or not split:
        known = ", ".join(whole.corpora)
        raise UserError(f"{where}: '{name}' is not <corpus>_<lang>_<split> with a corpus of `corpora` ({known})")
    if lang not in whole.corpora[corpus].langs:
        known = ", ".join(whole.corpora[corpus].langs)
        raise UserError(f"{where}: '{name}': corpus '{corpus}' has no language '{lang}'; it has {known}")
