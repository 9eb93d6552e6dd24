"""The corpora of the paper: what is published of each file, how a tree is laid out, how a person gets access."""

import importlib.util
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zipperasr import languages
from zipperasr.data.download import fetch
from zipperasr.data.download.archives import Archive
from zipperasr.data.download.clients import Collective
from zipperasr.data.download.hub import HubCorpus, HubPart
from zipperasr.data.download.parts import Download, Part, Transfer
from zipperasr.errors import UserError

# What is published of each file

LIBRISPEECH = {  # openslr.org/12: part, md5
    "dev-clean": "42e2234ba48799c1f50f24a7926300a1",
    "dev-other": "c8d0bcc9cca99d4f8b62fcc847357931",
    "test-clean": "32fa31d27d2e1cad72775fee3f4849a9",
    "test-other": "fb5a50374b501bb3bac4815ee91d3135",
    "train-clean-100": "2a93770f6d5c6c964bc36631d331a522",
    "train-clean-360": "c0e676e450a7ff2f54aeade5171606fa",
    "train-other-500": "d1a0fd59409feb2c614ce4d30c387708",
}
MLS = ("de", "en", "es", "fr", "it", "pt")  # openslr.org/94; md5sum.txt lies beside the archives
RELEASE = "cv-corpus-18.0-2024-06-14"
COMMON_VOICE = {  # bytes of <release>-<lang>.tar.gz, for the languages of the paper; no digest is published
    "ar": 3457567716,
    "ja": 10131552007,
    "ko": 127874298,
    "pt": 4849160820,
    "th": 8899675233,
}
WENETSPEECH = {  # openslr.org/121: part, where it is in the tree; md5s are in the corpus's own list of archives
    "labels": "WenetSpeech.json",
    "dev": "audio/dev",
    "test_meeting": "audio/test_meeting",
    "test_net": "audio/test_net",
    "train": "audio/train",
}
MSR86K = ("ar", "de", "en", "es", "fr", "it", "ja", "ko", "pt", "ru", "th", "vi")  # of fifteen, those this project has


@dataclass
class Request:
    """A corpus and what is wanted of it."""

    corpus: str
    langs: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    sources: list[Path] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)

    @property
    def ids(self) -> dict[str, str]:
        """The id of each language's dataset."""
        return dict(item.partition("=")[::2] for item in self.datasets)


class Corpus:
    """Where a corpus comes from. `variable` is the environment variable of the credential that it needs, if any."""

    langs: Sequence[str]
    variable = ""
    steps: Sequence[str] = ()

    def parts(self, request: Request) -> list[Part]:
        """The parts that are wanted. Raises UserError for what the corpus has not."""
        raise NotImplementedError

    def archives(self, parts: Sequence[Part], request: Request) -> dict[str, list[Archive]]:
        """The archives of each part. Raises UserError when a list of them cannot be had."""
        raise NotImplementedError

    def lacking(self, parts: Sequence[Part], request: Request) -> str:
        """What a person must see to before the parts can be fetched; empty if nothing."""
        return f"{self.variable} is not set" if self.variable and not os.environ.get(self.variable) else ""

    def tasks(self, parts: Sequence[Part], root: Path, request: Request, *, nj: int, keep: bool) -> list:
        """What fetches the parts, `nj` files at once."""
        return [Transfer(self.downloads(parts, root, request), nj=nj, keep=keep)]

    def downloads(self, parts: Sequence[Part], root: Path, request: Request) -> list[Download]:
        """The parts with their archives."""
        found = self.archives(parts, request)
        return [Download(part, root, tuple(found[part.name])) for part in parts]


@dataclass(frozen=True)
class LibriSpeech(Corpus):
    base: str = "https://www.openslr.org/resources/12"
    md5s: Mapping[str, str] = field(default_factory=lambda: LIBRISPEECH)
    langs = ("en",)

    def parts(self, request: Request) -> list[Part]:
        chosen("--lang", request.langs, self.langs)
        names = chosen("--parts", request.parts, self.md5s)
        return [Part(name, (f"LibriSpeech/{name}", name), ("*/*/*.trans.txt",)) for name in names]

    def archives(self, parts: Sequence[Part], request: Request) -> dict[str, list[Archive]]:
        return {part.name: [self._archive(f"{part.name}.tar.gz", self.md5s[part.name])] for part in parts}

    def _archive(self, name: str, md5: str) -> Archive:
        return Archive(name, f"{self.base}/{name}", digest=f"md5:{md5}")


@dataclass(frozen=True)
class MultilingualLibriSpeech(Corpus):
    base: str = "https://dl.fbaipublicfiles.com/mls"
    langs = MLS

    def parts(self, request: Request) -> list[Part]:
        forms = chosen("--parts", request.parts or ["flac"], ("flac", "opus"))
        needs = tuple(f"{split}/transcripts.txt" for split in ("train", "dev", "test"))
        found = []
        for lang in chosen("--lang", request.langs, self.langs):
            name = f"mls_{languages.get(lang).name.lower()}"
            folders = {"flac": name, "opus": f"{name}_opus"}
            others = () if request.parts else (folders["opus"], lang)
            found += [Part(folders[form], (folders[form], *others), needs) for form in forms]
        return found

    def archives(self, parts: Sequence[Part], request: Request) -> dict[str, list[Archive]]:
        md5s = {Path(name).name: md5 for md5, name in published(f"{self.base}/md5sum.txt", request.sources)}
        if unknown := [part.name for part in parts if f"{part.name}.tar.gz" not in md5s]:
            raise UserError(f"{self.base}/md5sum.txt: no checksum of {', '.join(unknown)}; has the corpus moved?")
        return {part.name: [self._archive(f"{part.name}.tar.gz", md5s)] for part in parts}

    def _archive(self, name: str, md5s: Mapping[str, str]) -> Archive:
        return Archive(name, f"{self.base}/{name}", digest=f"md5:{md5s[name]}")


@dataclass(frozen=True)
class CommonVoice(Corpus):
    sizes: Mapping[str, int] = field(default_factory=lambda: COMMON_VOICE)
    langs = tuple(languages.LANGUAGES)
    variable = "MDC_API_KEY"
    steps = (
        "Make an account at https://mozilladatacollective.com and sign in.",
        f"Get Common Voice 18.0 ({RELEASE}) in each of your languages, and agree to the terms on its page; releases "
        "that are not the newest are given on request.",
        "Note the id of each dataset: on its page, Download > API / Python Access > Python Library.",
        "Make a key at https://mozilladatacollective.com/api-reference and give it by the environment: "
        "read -rs MDC_API_KEY && export MDC_API_KEY",
        "Install Mozilla's client: pip install datacollective",
        "Run the same command again with an id for each language: --dataset th=<id> ja=<id>",
    )

    def parts(self, request: Request) -> list[Part]:
        needs = (*(f"{split}.tsv" for split in ("train", "dev", "test", "validated", "other")), "clips")
        langs = chosen("--lang", request.langs or list(self.sizes), self.langs)
        return [Part(lang, (f"{RELEASE}/{lang}", lang), needs) for lang in langs]

    def archives(self, parts: Sequence[Part], request: Request) -> dict[str, list[Archive]]:
        names = {part.name: f"{RELEASE}-{part.name}.tar.gz" for part in parts}
        return {lang: [Archive(name, request.ids.get(lang, ""), self.sizes.get(lang))] for lang, name in names.items()}

    def lacking(self, parts: Sequence[Part], request: Request) -> str:
        if reason := super().lacking(parts, request):
            return reason
        if importlib.util.find_spec("datacollective") is None:
            return "Mozilla's client, datacollective, is not installed"
        without = [part.name for part in parts if not request.ids.get(part.name)]
        return f"--dataset gives no id for {', '.join(without)}" if without else ""

    def tasks(self, parts: Sequence[Part], root: Path, request: Request, *, nj: int, keep: bool) -> list:
        return [Collective(self.downloads(parts, root, request), nj=nj, keep=keep)]


@dataclass(frozen=True)
class WenetSpeech(Corpus):
    base: str = "http://wenet.meeting.tencent.com/WenetSpeech"  # no https there; md5s come from the list below
    list_url: str = "https://raw.githubusercontent.com/wenet-e2e/WenetSpeech/main/metadata/v1.list"
    langs = ("zh",)
    variable = "WENETSPEECH_PASSWORD"
    steps = (
        "Read the terms at https://wenet-e2e.github.io/WenetSpeech and ask for the password by the form there.",
        "Give the password by the environment: read -rs WENETSPEECH_PASSWORD && export WENETSPEECH_PASSWORD",
        "Run the same command again.",
    )

    def parts(self, request: Request) -> list[Part]:
        chosen("--lang", request.langs, self.langs)
        names = chosen("--parts", request.parts, WENETSPEECH)
        return [Part(name, (WENETSPEECH[name],), () if name == "labels" else ("**/*.opus",)) for name in names]

    def archives(self, parts: Sequence[Part], request: Request) -> dict[str, list[Archive]]:
        listed = published(self.list_url, request.sources)
        found = {part.name: [self._archive(*row) for row in listed if row[1].startswith(part.places)] for part in parts}
        if nothing := [name for name, of_part in found.items() if not of_part]:
            raise UserError(f"{self.list_url}: no archive of {', '.join(nothing)}; has the corpus moved?")
        return found

    def lacking(self, parts: Sequence[Part], request: Request) -> str:
        return super().lacking(parts, request) or ("" if shutil.which("openssl") else "openssl is not installed")

    def _archive(self, md5: str, name: str) -> Archive:
        return Archive(name, f"{self.base}/{name}", digest=f"md5:{md5}", password=self.variable)


@dataclass(frozen=True)
class Msr86k(Corpus):
    repo: str = "Alex-Song/MSR-86K"
    endpoint: str | None = None
    langs = MSR86K
    variable = "HF_TOKEN"
    steps = (
        "Make an account at https://huggingface.co and sign in.",
        "Ask for access at https://huggingface.co/datasets/Alex-Song/MSR-86K; it is granted by hand.",
        "Make a token with the right to read at https://huggingface.co/settings/tokens and give it by the environment: "
        "read -rs HF_TOKEN && export HF_TOKEN",
        "Run the same command again.",
    )

    def parts(self, request: Request) -> list[Part]:
        return [HubPart(langs=tuple(chosen("--lang", request.langs, self.langs)), patterns=tuple(request.parts))]

    def archives(self, parts: Sequence[Part], request: Request) -> dict[str, list[Archive]]:
        """What the user has; the hub's own files are not known here."""
        return {part.name: [Archive(path.name) for path in request.sources if path.is_file()] for part in parts}

    def tasks(self, parts: Sequence[Part], root: Path, request: Request, *, nj: int, keep: bool) -> list:
        return [HubCorpus(self.repo, root, part, endpoint=self.endpoint, nj=nj, keep=keep) for part in parts]


CORPORA: dict[str, Corpus] = {
    "librispeech": LibriSpeech(),
    "mls": MultilingualLibriSpeech(),
    "commonvoice": CommonVoice(),
    "wenetspeech": WenetSpeech(),
    "msr86k": Msr86k(),
}


def chosen(option: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names that an option gives, or all. Raises UserError for one that is not known."""
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{option} {' '.join(unknown)}: not in the corpus; known: {', '.join(sorted(known))}")
    return list(dict.fromkeys(names)) or list(known)


def published(url: str, sources: Sequence[Path]) -> list[tuple[str, str]]:
    """The rows "<md5> <name>" of a published list: from beside the user's own archives, or else from the web."""
    folders = [source if source.is_dir() else source.parent for source in sources]
    copies = [path for folder in folders if (path := folder / url.rpartition("/")[2]).is_file()]
    content = copies[0].read_text(encoding="utf-8") if copies else fetch.text(url)
    return re.findall(r"^([0-9a-f]{32})\s+\*?(\S+)", content, re.MULTILINE)
