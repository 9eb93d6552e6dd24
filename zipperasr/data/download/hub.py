"""Models and corpora of the Hugging Face hub, by its client."""

import fnmatch
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from zipperasr import files, languages
from zipperasr.data.download import archives, parts
from zipperasr.data.download.clients import in_our_words
from zipperasr.data.download.fetch import Progress
from zipperasr.data.download.parts import FOLDER, Part
from zipperasr.errors import UserError

TEXTS = ("*.json", "*.jsonl", "*.tsv", "*.md", "*.txt")
"""Of a corpus on the hub, these are fetched whatever language they are of: one list may serve all."""
MODEL_FILES = ("*.json", "*.txt", "*.model", "model.safetensors", "model-*-of-*.safetensors")
"""Of the forms in which a model is on the hub, the one that is read here, and its tokenizer."""
TARS = (".tar", ".tar.gz", ".tgz")

HUB_WORDS = {
    "GatedRepoError": "the account of HF_TOKEN has no access; ask for it on the page of the repository",
    "RepositoryNotFoundError": "no such repository on the hub, or HF_TOKEN may not see it",
    "RevisionNotFoundError": "the repository has no main revision",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "ConnectError": "the hub is out of reach; check the network and run the same command again",
}


class HubModel:
    """A model of the hub, fetched into the hub's own cache."""

    kind = "model"

    def __init__(self, repo: str, *, endpoint: str | None = None, nj: int = 4):
        from huggingface_hub import constants

        self.repo, self.endpoint, self.nj = repo, endpoint, nj
        self.folder = Path(constants.HF_HUB_CACHE)
        self.files: list = []

    def is_there(self) -> bool:
        """Whether all of it is in the cache."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            self._snapshot(local_files_only=True)
        except LocalEntryNotFoundError:
            return False
        return True

    def measure(self) -> None:
        with in_our_words(self.repo, HUB_WORDS):
            self.files = self._snapshot(dry_run=True)

    def room(self) -> int:
        return sum(file.file_size or 0 for file in self.files if file.will_download)

    def describe(self) -> list[str]:
        return [f"{self.repo}: {len(self.files)} files of the Hugging Face hub, {archives.in_bytes(self.room())}"]

    def run(self) -> None:
        self.fetch()
        print(f"{self.repo}: complete")

    def fetch(self) -> Path:
        """The folder with all of it, once what is missing is fetched. Raises UserError saying why it cannot be had."""
        with in_our_words(self.repo, HUB_WORDS):
            return Path(self._snapshot())

    def _snapshot(self, **more):
        from huggingface_hub import snapshot_download

        common = {"repo_type": self.kind, "endpoint": self.endpoint, "max_workers": self.nj}
        return snapshot_download(self.repo, **{"allow_patterns": MODEL_FILES, **common, **more})


@dataclass(frozen=True)
class HubPart(Part):
    """What is wanted of a corpus that is one repository of the hub: languages, or patterns of its files."""

    name: str = "hub"
    places: tuple[str, ...] = (".",)
    langs: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()

    @property
    def wanted(self) -> set[str]:
        return set(self.patterns or self.langs)

    @property
    def key(self) -> str:
        return "\n".join(sorted(self.wanted))

    def fetched(self, root: Path) -> set[str]:
        """Languages and patterns that were fetched before."""
        marker = root / FOLDER / f"{self.name}.done"
        return set(marker.read_text().split("\n")) if marker.exists() else set()

    def is_done(self, root: Path) -> bool:
        return self.wanted <= self.fetched(root)

    def lacks(self, root: Path) -> list[str] | None:
        if self.is_done(root):
            return []
        is_empty = not root.is_dir() or all(path.name == FOLDER for path in root.iterdir())
        return None if is_empty or self.fetched(root) else self.misses(root)

    def misses(self, tree: Path) -> list[str]:
        """The languages, unless patterns are given, that no file or folder of the upper three levels is named after."""
        upper = [path.relative_to(tree) for depth in ("*", "*/*", "*/*/*") for path in tree.glob(depth)]
        langs = () if self.patterns else self.langs
        return [f"{tree}: anything named {' or '.join(names_of(lang))}" for lang in langs if not matching(lang, upper)]

    def mark_done(self, root: Path) -> None:
        everything = "\n".join(sorted(self.wanted | self.fetched(root)))
        files.mark_done(root / FOLDER, everything, name=f"{self.name}.done")


class HubCorpus(HubModel):
    """A corpus that is a gated repository of the hub; of its files, those named after the languages that are wanted."""

    kind = "dataset"

    def __init__(self, repo: str, root: Path, part: HubPart, *, endpoint: str | None, nj: int, keep: bool):
        super().__init__(repo, endpoint=endpoint, nj=nj)
        self.folder, self.part, self.keep = root, part, keep
        self.work = part.work(root)

    def measure(self) -> None:
        """Also raises UserError naming the languages or patterns that no file is named after."""
        super().measure()
        names = [file.filename for file in self.files]
        if self.part.patterns:
            nothing = [pattern for pattern in self.part.patterns if not fnmatch.filter(names, pattern)]
        else:
            nothing = [" or ".join(names_of(lang)) for lang in self.part.langs if not matching(lang, map(Path, names))]
        if nothing:
            mend = "see its files on the hub, and give patterns of their paths with --parts"
            raise UserError(f"{self.repo}: no file is named {', nor '.join(nothing)}; {mend}")

    def room(self) -> int:
        tars = sum(file.file_size or 0 for file in self.files if file.filename.endswith(TARS))
        return super().room() + int(parts.UNPACKED * tars)

    def run(self) -> None:
        """Fetch beside, unpack tars where they lie, move everything into place."""
        with files.lock(self.folder / FOLDER):
            if not files.is_done(self.work, self.part.key, name="fetched"):
                self.fetch()
                self._unpack_tars()
                shutil.rmtree(self.work / "tree" / ".cache", ignore_errors=True)  # the client's, for going on
                files.mark_done(self.work, self.part.key, name="fetched")
            self.part.finish(self.folder)

    def _unpack_tars(self) -> None:
        tars = [path for path in sorted((self.work / "tree").rglob("*.t*")) if path.name.endswith(TARS)]
        progress = Progress("unpack", total=sum(path.stat().st_size for path in tars))
        with progress.bar:
            for path in tars:
                archives.unpack(path, self.work / "partial", progress=progress)
                archives.merge(self.work / "partial", path.parent)
        if not self.keep:
            for path in tars:
                path.unlink()

    def _snapshot(self, **more):
        patterns = self.part.patterns or (*TEXTS, *(p for lang in self.part.langs for p in patterns_of(lang)))
        where = {"local_dir": self.work / "tree", "token": os.environ.get("HF_TOKEN")}
        return super()._snapshot(allow_patterns=list(patterns), **where, **more)


def names_of(lang: str) -> tuple[str, ...]:
    """How files may name a language: th, TH, thai, Thai."""
    name = languages.get(lang).name
    return lang, lang.upper(), name.lower(), name


def patterns_of(lang: str) -> list[str]:
    """Patterns of paths in which a language is a word."""
    return [f"{start}{name}[!A-Za-z]*" for name in names_of(lang) for start in ("", "*[!A-Za-z]")]


def matching(lang: str, paths: Iterable[Path]) -> list[Path]:
    """The paths that name a language."""
    pattern = re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns_of(lang)))
    return [path for path in paths if pattern.match(f"{path}/")]
