"""Print a table of the data, in Markdown: `table` is Table I of arXiv:2603.17558, ours beside the paper's figures."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zipperasr import languages, markdown
from zipperasr.cli import recipe
from zipperasr.data import lists, manifests
from zipperasr.reporting.tables import CORPORA, MISSING

HEADER = ("setting", "corpus", "language", "train (h)", "paper", "diff.", "test (h)", "paper", "diff.",
          "train utterances", "test utterances")  # fmt: skip
PAPER_COLUMNS = (4, 5, 7, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("table",), help="which table")
    parser.add_argument("--conf", required=True, help="YAML file; the settings of its two trainings are shown")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds manifests/ and lists/")


def run(args: argparse.Namespace) -> None:
    print(table(recipe.load(args.conf), args.data_dir), end="")


def table(whole: recipe.Config, data_dir: Path) -> str:
    """Hours and utterances of every list that is trained or tested on, in Markdown.

    Without `data.lists.paper_hours` the paper's columns are left out. A list that is not there is `–`, with a footnote.
    """
    statistics = _Statistics(whole, data_dir)
    shown = [i for i in range(len(HEADER)) if whole.data.lists.paper_hours or i not in PAPER_COLUMNS]
    rows = [[row[i] for i in shown] for row in statistics.rows()]
    align = "<<<" + ">" * (len(shown) - 3)
    lines = markdown.table([HEADER[i] for i in shown], rows, align=align)
    return lines + "".join(f"\n[{number}] {note}\n" for note, number in statistics.notes.items())


@dataclass
class _Statistics:
    """The rows of the table; `notes` gathers footnotes and their numbers."""

    whole: recipe.Config
    data_dir: Path
    notes: dict[str, int] = field(default_factory=dict)

    def rows(self) -> Iterator[list[str]]:
        """A row a setting, corpus and language, in the order of the configuration."""
        training = self.whole.training
        for setting in dict.fromkeys((training.stage1.setting, training.stage2.setting)):
            parts = self.whole.data.lists.settings[setting]
            for corpus, lang in dict.fromkeys(tuple(name.split("_")[:2]) for name in [*parts.train, *parts.test]):
                train, test = (self._cells(setting, part, f"{corpus}_{lang}_") for part in ("train", "test"))
                heads = [setting, CORPORA.get(corpus, corpus), f"{languages.get(lang).name} ({lang})"]
                yield [*heads, *train[:3], *test[:3], train[3], test[3]]

    def _cells(self, setting: str, part: str, start: str) -> list[str]:
        """Hours, the paper's, the difference, and utterances, of the lists whose sets begin with `start`."""
        names = [name for name in getattr(self.whole.data.lists.settings[setting], part) if name.startswith(start)]
        columns = zip(*(self._list(setting, part, name) for name in names), strict=True)
        return [" \\| ".join(column) for column in columns] or [""] * 4

    def _list(self, setting: str, part: str, name: str) -> tuple[str, str, str, str]:
        settings, size = self.whole.data.lists, self._size(setting, part, name)
        paper, note = settings.paper_hours.get(name), settings.paper_notes.get(name)
        said = (f"{paper:.2f}" if paper else MISSING) + (self._mark(note) if note else "")
        if isinstance(size, str):
            return MISSING + self._mark(size), said, MISSING, MISSING
        hours, lost = size.duration_s / 3600, ""
        if size.num_missing:
            lost = self._mark(f"{name}: no manifest has {size.num_missing} of its ids; run stages 1 and 2 again.")
        unique = f" ({size.num_unique} different)" if size.num_unique < size.num_utts else ""
        difference = f"{hours - paper:+z.2f}" if paper else MISSING
        return f"{hours:.2f}{lost}", said, difference, f"{size.num_utts}{unique}"

    def _size(self, setting: str, part: str, name: str) -> lists.Size | str:
        """The size of a list, or why there is none."""
        path = self.data_dir / "lists" / setting / part / f"{name}.txt"
        if path.is_file():
            return lists.measure(self.data_dir, name, lists.read(path))
        is_prepared = manifests.path_of(self.data_dir, name).is_file()
        return "There is no list: run stage 2." if is_prepared else "There is no manifest: run stage 1."

    def _mark(self, note: str) -> str:
        return f" [{self.notes.setdefault(note, len(self.notes) + 1)}]"
