"""From corpora to utterances: manifests, lists, features, packing. Importing it loads neither torch nor Lhotse."""

from zipperasr.config import Settings
from zipperasr.data.features import FeatureSettings
from zipperasr.data.lists import ListsSettings
from zipperasr.data.packing import PackingSettings


class DataSettings(Settings):
    """Which utterances a recipe uses, their features, and how they are packed into rows."""

    lists: ListsSettings = ListsSettings()
    features: FeatureSettings = FeatureSettings()
    packing: PackingSettings = PackingSettings()
