#!/usr/bin/env python3
"""Stage 0: corpora and pretrained models, from where they are published or from what you have.

    local/download.sh --dir data/corpora --corpus librispeech --corpus mls --lang de es --parts opus
    local/download.sh --dir data/corpora --corpus commonvoice --lang th --from cv-corpus-18.0-2024-06-14-th.tar.gz
    local/download.sh --model large-v3 --model Qwen/Qwen3-1.7B

--lang, --parts, --from and --dataset belong to the --corpus before them. A tree that lies at DIR/<corpus> already is
taken as it is, if it has all that is asked for. What is complete is skipped, what was interrupted is gone on with.
Credentials come from the environment (MDC_API_KEY, WENETSPEECH_PASSWORD, HF_TOKEN); without them, the steps to get them
are printed.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from corpora import CORPORA, Corpus, Request

from zipperasr.data import prepare
from zipperasr.data.download import archives
from zipperasr.data.download.parts import Download, Part, Transfer
from zipperasr.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Link:
    """The task of linking a tree that the user has."""

    tree: Path
    target: Path

    @property
    def folder(self) -> Path:
        return self.target.parent

    def measure(self) -> None:
        """There is nothing to measure."""

    def room(self) -> int:
        return 0

    def describe(self) -> list[str]:
        return [f"{self.target}: a link to {self.tree}"]

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.target.symlink_to(self.tree)
        except FileExistsError as error:
            raise UserError(f"{self.target}: is there already; move it away to link {self.tree} there") from error
        print(f"{self.target}: links to {self.tree}")


def run(args: argparse.Namespace) -> None:
    if not (args.requests or args.models):
        raise UserError("nothing is asked for; say --corpus NAME or --model NAME (see --help)")
    if args.requests and not args.dir:
        raise UserError("--corpus needs --dir, the folder of the corpora")
    missing = for_all(lambda request: find_missing(request, args.dir / request.corpus), args.requests)
    wanted = [(request, parts) for request, parts in zip(args.requests, missing) if parts]
    found = for_all(lambda name: model_tasks(name, nj=args.nj), args.models)
    found += for_all(lambda item: corpus_tasks(*item, args), wanted)
    tasks = together([task for of_one in found for task in of_one])
    for_all(lambda task: task.measure(), tasks)
    room = [(task.folder, task.room()) for task in tasks]
    if args.dry_run:
        print(*[line for task in tasks for line in task.describe()], *map(room_of, room), sep="\n")
        return
    archives.check_room(room)
    for_all(lambda task: task.run(), tasks)
    for_all(lambda item: confirm(item[1], args.dir / item[0].corpus), wanted)


def for_all(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results for all items. One that fails does not stop the others; then UserError says what each failed of."""
    results, errors = [], []
    for item in items:
        try:
            results.append(function(item))
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("; ".join(errors))
    return results


def find_missing(request: Request, root: Path) -> list[Part]:
    """The parts of a corpus that are not at `root`. Raises UserError where a person must see to something first."""
    corpus = CORPORA.get(request.corpus)
    if corpus is None:
        check_own(request.corpus, root)
        return []
    parts = corpus.parts(request)
    missing = [part for part in parts if not part.is_there(root)]
    for part in parts:
        if part not in missing:
            print(f"{root}: {part.name} is complete{'' if part.is_done(root) else ', a tree of your own'}")
    for part in missing:
        refuse_other_trees(part, root)
    if missing and not request.sources and (reason := corpus.lacking(missing, request)):
        ask(corpus, request, reason)
    return missing


def check_own(name: str, root: Path) -> None:
    """Raises UserError unless a corpus that is not known here lies at `root`."""
    if not root.is_dir():
        mend = f"put or link it there; those that can be fetched are {', '.join(CORPORA)}"
        raise UserError(f"{name}: no folder {root}; {mend}")
    print(f"{root}: taken as it is")


def refuse_other_trees(part: Part, root: Path) -> None:
    """Raises UserError where a missing part would be written into a tree of the user's own, naming what is missing."""
    lacks = part.lacks(root)
    what = ", ".join(lacks or [part.places[0]])
    for path in (root, *(root / above for above in Path(part.places[0]).parents)):
        if path.is_symlink():
            raise UserError(f"{path}: links to {path.resolve()}, which lacks {what}; add it there, or remove the link")
    if lacks and not part.is_moving(root):
        raise UserError(f"{root}: lacks {what}; complete {part.name}, or move it away to have it fetched")


def ask(corpus: Corpus, request: Request, reason: str) -> None:
    """Print what a person has to do to get a corpus, and raise UserError."""
    steps = [f"  {number}. {step}" for number, step in enumerate(corpus.steps, start=1)]
    instead = "  Or, with its archives or its tree in hand, run the same command again with --from <path> behind it."
    print(f"{request.corpus}: {reason}. To get the corpus:", *steps, instead, sep="\n", file=sys.stderr)
    raise UserError(f"{request.corpus}: {reason}; see the steps above")


def model_tasks(name: str, *, nj: int) -> list:
    """What fetches a model; nothing if it is there. Raises UserError for a name that nobody knows."""
    from zipperasr.data.download.clients import WhisperModel
    from zipperasr.data.download.hub import HubModel

    if Path(name).exists():
        print(f"{name}: is there")
        return []
    if Path(name).is_absolute() or name.startswith(("pretrained/", ".")):
        raise UserError(f"{name}: no such file or folder; what is part of the repository comes back with git checkout")
    model = HubModel(name, nj=nj) if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else WhisperModel(name)
    if model.is_there():
        print(f"{name}: is complete")
        return []
    return [model]


def corpus_tasks(request: Request, parts: list[Part], args: argparse.Namespace) -> list:
    """What brings the parts of a corpus: links to trees, archives that the user has, or downloads."""
    corpus, root = CORPORA[request.corpus], args.dir / request.corpus
    if not request.sources:
        return corpus.tasks(parts, root, request, nj=args.nj, keep=args.keep_archives)
    if absent := [str(source) for source in request.sources if not source.exists()]:
        raise UserError(f"--from {' '.join(absent)}: no such file or folder")
    found = [find_given(corpus, part, root, request) for part in parts]
    downloads = [item for item in found if isinstance(item, Download)]
    is_encrypted = any(archive.password for d in downloads for archive in d.archives)
    if is_encrypted and (reason := corpus.lacking(parts, request)):
        ask(corpus, request, reason)
    links = [item for item in found if isinstance(item, Link)]
    return links + ([Transfer(downloads, nj=args.nj, keep=args.keep_archives)] if downloads else [])


def find_given(corpus: Corpus, part: Part, root: Path, request: Request) -> Link | Download:
    """A part among what the user has given: a tree, or all of its archives. Raises UserError naming what is missing."""
    trees = [found for source in request.sources for found in find_trees(source.absolute(), part)]
    for place, tree in trees:
        if not part.misses(tree):
            return Link(tree, root / place)
    wanted = corpus.archives([part], request)[part.name]
    there = [replace(archive, local=find_archive(archive.name, request.sources)) for archive in wanted]
    if there and all(archive.local for archive in there):
        return Download(part, root, tuple(there))
    lacks = [lack for _, tree in trees for lack in part.misses(tree)] or part.places
    absent = [archive.name for archive in there if not archive.local] or ["archive"]
    more = f" and {len(absent) - 1} more" if absent[1:] else ""
    where = " ".join(map(str, request.sources))
    raise UserError(f"--from {where}: {part.name}: there is no {', '.join(lacks)}, and no {absent[0]}{more}")


def find_trees(source: Path, part: Part) -> list[tuple[str, Path]]:
    """The places of a part that a folder has, be it the corpus's root or a folder within; each with what is there."""
    found = []
    for place in part.places:
        steps = Path(place).parts
        for depth in range(len(steps) + 1):  # how many of the steps `source` has gone already
            tree = source.joinpath(*steps[depth:])
            is_on_the_way = source.parts[len(source.parts) - depth :] == steps[:depth]
            if is_on_the_way and (tree.exists() if steps else tree.is_dir()):
                found.append((place, tree))
    return found


def find_archive(name: str, sources: Iterable[Path]) -> Path | None:
    """Where an archive is among what the user has given."""
    base = Path(name).name
    candidates = [path for source in sources for path in (source / name, source / base, source) if path.name == base]
    return next((path.absolute() for path in candidates if path.is_file()), None)


def together(tasks: list) -> list:
    """The tasks, with plain transfers made one, so that their files are fetched side by side."""
    plain = [task for task in tasks if type(task) is Transfer]
    others = [task for task in tasks if type(task) is not Transfer]
    downloads = list(dict.fromkeys(download for task in plain for download in task.downloads))
    return others + ([Transfer(downloads, nj=plain[0].nj, keep=plain[0].keep)] if plain else [])


def confirm(parts: list[Part], root: Path) -> None:
    """Raises UserError for a part that was unpacked and yet has not what it needs."""
    for part in parts:
        if not part.is_there(root):
            lacks = ", ".join(part.lacks(root) or part.places)
            raise UserError(f"{root}: {part.name} was unpacked, but {lacks} is not there; is the archive another one?")
        print(f"{root}: {part.name} is complete")


def room_of(item: tuple[Path, int]) -> str:
    folder, need = item
    free = shutil.disk_usage(archives.existing(folder)).free
    return f"{folder}: needs {archives.in_bytes(need)} of room; {archives.in_bytes(free)} are free"


class Begin(argparse.Action):
    """Begins the request for a corpus."""

    def __call__(self, parser, namespace, value, option_string=None) -> None:
        namespace.requests = [*namespace.requests, Request(value)]


class Detail(argparse.Action):
    """Adds to the request that was begun last."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if not namespace.requests:
            raise UserError(f"{option_string} belongs to a corpus; put it behind --corpus NAME")
        getattr(namespace.requests[-1], self.dest).extend(values)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="local/download.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    of_corpus = {"nargs": "+", "action": Detail, "default": argparse.SUPPRESS}
    parser.add_argument("--dir", type=Path, help="folder of the corpora; each lies in DIR/<corpus>")
    parser.add_argument("--corpus", dest="requests", metavar="NAME", action=Begin, default=[], help=", ".join(CORPORA))
    parser.add_argument("--lang", dest="langs", **of_corpus, help="language codes (default: all)")
    parser.add_argument(
        "--parts",
        **of_corpus,
        help="librispeech: dev-clean ... (default: all); mls: flac (default), opus; wenetspeech: labels dev test_net "
        "test_meeting train (default: all); msr86k: patterns of paths on the hub (default: named after --lang)",
    )
    parser.add_argument(
        "--from",
        dest="sources",
        type=Path,
        metavar="PATH",
        **of_corpus,
        help="trees, which are linked, or archives (or folders of them), which are verified and unpacked",
    )
    parser.add_argument(
        "--dataset", dest="datasets", metavar="LANG=ID", **of_corpus, help="of commonvoice: where it is"
    )
    parser.add_argument(
        "--model", dest="models", metavar="NAME", action="append", default=[], help="Whisper's or hub's"
    )
    parser.add_argument("--nj", type=int, default=4, help="files that are fetched at once (default: %(default)s)")
    parser.add_argument("--keep-archives", action="store_true", help="leave them in DIR/<corpus>/.download")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, and the room it needs")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(prepare.main(build_parser(), run))
    except KeyboardInterrupt:
        sys.exit("download.py: interrupted; run the same command again to go on")
