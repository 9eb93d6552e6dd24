"""Tables and figures of an experiment directory, made from the files that training, decoding and scoring left there."""

from zipperasr.config import Settings


class ReportSettings(Settings):
    """What the tables need to know: the target languages with little training data (Table VI of arXiv:2603.17558)."""

    low_resource: list[str] = ["ar", "ja", "ko", "pt"]
