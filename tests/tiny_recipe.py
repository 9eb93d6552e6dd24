"""A recipe of seconds, for tests of training: noise as speech in three languages, tiny models, features on the fly.

recipe = tiny_recipe.make(tmp_path)
main(["train", "--conf", str(recipe.conf), "--stage", "1", "--data-dir", str(recipe.data), "--run-dir", ...])
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import tiny
import yaml
from lhotse import MonoCut, Recording, SupervisionSegment

from zipperasr.data import lists, manifests

WORDS = {"de": "haus baum katze", "en": "one two three", "th": "หนึ่ง สอง สาม"}


class Recipe(NamedTuple):
    """A configuration file and a data directory with manifests and lists."""

    conf: Path
    data: Path

    def train(self, stage: int, run_dir: Path, *more: str) -> list[str]:
        """The arguments of `zipperasr` that train a stage."""
        args = ["train", "--conf", self.conf, "--stage", stage, "--data-dir", self.data, "--run-dir", run_dir, *more]
        return list(map(str, args))


def make(folder: Path, *, num_utts: int = 11, seed: int = 0) -> Recipe:
    """Write models, audio, manifests, lists and a configuration under `folder`; `num_utts` a language train."""
    pretrained = tiny.make_pretrained(folder)
    draw = np.random.default_rng(seed)
    for lang in WORDS:
        for split, count in (("train", num_utts), ("dev", 3)):
            cuts = [_cut(folder / "audio", f"{lang}-{split}-{i}", lang, draw) for i in range(count)]
            manifests.write(
                manifests.path_of(folder / "data", f"noise_{lang}_{split}"), [cut.to_dict() for cut in cuts]
            )
    parts = {split: {f"noise_{lang}_{split}": None for lang in WORDS} for split in ("train", "dev")}
    stage = {"setting": "all", "epochs": 3, "lr": 1e-3, "num_workers": 0, "save_every": 2, "lr_scale": {"projector": 3}}
    settings = {
        "corpora": {"noise": {"prepare": "mls", "langs": list(WORDS)}},
        "data": {
            "lists": {"settings": {"all": parts}},
            "features": {"storage": "on_the_fly"},
            "packing": {"max_tokens_per_row": 96, "rows_per_batch": {"full": 2, "chunked": 2}},
        },
        "model": tiny.settings(pretrained, langs=["de", "th"]).model_dump(mode="json"),
        "training": {"stage1": stage, "stage2": stage},
    }
    conf = folder / "tiny.yaml"
    conf.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    lists.write(folder / "data", lists.ListsSettings.model_validate(settings["data"]["lists"]))
    return Recipe(conf, folder / "data")


def _cut(folder: Path, utt_id: str, lang: str, draw: np.random.Generator) -> MonoCut:
    folder.mkdir(parents=True, exist_ok=True)
    samples = draw.normal(0, 0.1, draw.integers(3000, 12000)).astype(np.float32)
    soundfile.write(folder / f"{utt_id}.wav", samples, 16000)
    recording = Recording.from_file(folder / f"{utt_id}.wav", recording_id=utt_id)
    text = " ".join(draw.choice(WORDS[lang].split(), draw.integers(1, 6)))
    supervision = SupervisionSegment(utt_id, utt_id, 0, recording.duration, text=text, language=lang)
    return MonoCut(utt_id, 0, recording.duration, 0, recording=recording, supervisions=[supervision])
