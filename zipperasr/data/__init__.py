"""From corpora to rows of tokens. Importing it loads neither torch nor Lhotse. Where things are, stage by stage:

0 download/
1 prepare (with sources, text, defects; kaldi, kaldi_audio), manifests, validation
2 lists (with draw, released, list_report)
3 features, store (with shar, audio, augment)
4 utterances, tokenizer, packing, loader
"""

from zipperasr.config import Settings
from zipperasr.data.features import FeatureSettings
from zipperasr.data.lists import ListsSettings
from zipperasr.data.packing import PackingSettings


class DataSettings(Settings):
    """Which utterances a recipe uses, their features, and how they are packed into rows."""

    lists: ListsSettings = ListsSettings()
    features: FeatureSettings = FeatureSettings()
    packing: PackingSettings = PackingSettings()
