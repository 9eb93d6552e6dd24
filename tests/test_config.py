"""Configuration: strict, typed, overridable, and read back as it was saved."""

import ast
import re
from pathlib import Path

import pytest

from zipperasr import config
from zipperasr.cli import recipe
from zipperasr.config import Settings
from zipperasr.data.augment import SpecAugmentSettings
from zipperasr.data.packing import RowsPerBatch
from zipperasr.errors import UserError

CONF = Path(__file__).resolve().parents[1] / "egs" / "multilingual12" / "conf"
NAMES = sorted(path.name for path in CONF.glob("*.yaml"))


class Inner(Settings):
    rank: int = 4
    alpha: float = 8.0


class Outer(Settings):
    inner: Inner = Inner()
    maybe: Inner | None = None
    by_name: dict[str, Inner] = {}


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "a.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize("text", ["inner: {rnk: 3}", "maybe: {rnk: 3}", "by_name: {x: {rnk: 3}}"])
def test_an_unknown_key_lists_the_known_ones(write, text):
    with pytest.raises(UserError, match=r"unknown key '.*rnk'; known here: alpha, rank"):
        config.load(write(text), Outer)


def test_an_unknown_section_is_an_error(write):
    with pytest.raises(UserError, match=r"unknown key 'iner'; known here: by_name, inner, maybe"):
        config.load(write("iner: {}"), Outer)


def test_a_wrong_value_is_named(write):
    with pytest.raises(UserError, match=r"a.yaml: inner.rank: .*integer.*'many'"):
        config.load(write("inner: {rank: many}"), Outer)


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "inner: 3"])
def test_what_is_no_mapping_is_an_error(write, text):
    with pytest.raises(UserError, match=re.escape("a.yaml")):
        config.load(write(text), Outer)


def test_a_missing_file_names_its_neighbours(write, tmp_path):
    write("{}", "there.yaml")
    with pytest.raises(UserError, match="there.yaml"):
        config.load(tmp_path / "absent.yaml", Outer)


def test_overrides_win_over_the_file(write):
    path = write("inner: {rank: 3, alpha: 5}")
    outer = config.load(path, Outer, overrides=["inner.rank=7", "maybe.alpha=1e-3", "by_name.x.rank=1"])
    assert (outer.inner.rank, outer.inner.alpha) == (7, 5)
    assert outer.maybe.alpha == 1e-3 and outer.by_name["x"].rank == 1


def test_an_override_of_one_section_leaves_its_alias_alone(write):
    path = write("inner: &same {rank: 3}\nmaybe: *same")
    outer = config.load(path, Outer, overrides=["maybe.rank=7"])
    assert (outer.inner.rank, outer.maybe.rank) == (3, 7)


def test_an_override_can_remove_a_section(write):
    assert config.load(write("maybe: {rank: 3}"), Outer, overrides=["maybe=null"]).maybe is None


@pytest.mark.parametrize("override", ["rank", "=3"])
def test_an_override_without_key_or_value_is_an_error(write, override):
    with pytest.raises(UserError, match="key=value"):
        config.load(write("{}"), Outer, overrides=[override])


def test_a_file_is_laid_over_its_base(write):
    write("inner: {rank: 3, alpha: 5}\nmaybe: {rank: 1}", "base.yaml")
    outer = config.load(write("base: base.yaml\ninner: {rank: 9}\nmaybe: null"), Outer)
    assert (outer.inner.rank, outer.inner.alpha, outer.maybe) == (9, 5, None)


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError):
        Inner().rank = 3


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_configurations_are_valid_and_read_back_as_saved(tmp_path, name):
    whole = recipe.load(CONF / name)
    config.save(tmp_path / "config.yaml", whole)
    assert recipe.load(tmp_path / "config.yaml") == whole


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("corpora.read.langs=[de, xx]", "unknown language 'xx'"),
        ("model.adapter.langs=[de, xx]", "unknown language 'xx'"),
        ("model.adapter.method=zipper", "known methods: .*zipper_soft"),
        ("training.stage2.setting=traget", "training.stage2.setting: 'traget' .* known: .*target_1h"),
        ("data.lists.settings.source.test.rad_de_test=null", "'rad_de_test' is not <corpus>_<lang>_<split>"),
        ("data.lists.settings.source.test.read_detest=null", "'read_detest' is not <corpus>_<lang>_<split>"),
        ("data.lists.settings.source.test.read_zh_test=null", "corpus 'read' has no language 'zh'"),
        ("corpora.my_own={prepare: mls, langs: [de]}", "'my_own' holds an underscore"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_an_error(override, message):
    with pytest.raises(UserError, match=message):
        recipe.load(CONF / "mini.yaml", overrides=[override])


def test_the_paper_configuration_has_the_papers_numbers():
    """Table I and section V-B, arXiv:2603.17558."""
    whole = recipe.load(CONF / "paper.yaml")
    hours = whole.data.lists.settings["target_1h"].train
    assert (len(hours), sum(draw.hours for draw in hours.values())) == (12, 4 * 1 + 5 * 1000 + 960 + 865 + 500)
    assert (whole.model.adapter.rank, whole.model.adapter.alpha, whole.model.llm.lora.rank) == (32, 64, 32)
    assert whole.training.stage2.lr == 2e-5 and whole.training.stage2.warmup_ratio == 0.1
    assert whole.data.packing.max_tokens_per_row == 2048
    assert whole.data.packing.rows_per_batch.model_dump() == {"full": 10, "chunked": 16}
    assert whole.model.encoder.chunk_durations_s == (1, 2, 4, 8) and whole.model.encoder.decode_chunk_s == 8


def test_no_setting_is_one_that_nothing_reads():
    trees = [ast.parse(path.read_text()) for path in Path(config.__file__).parent.rglob("*.py")]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    sections = {cls for cls in Settings.__subclasses__() if cls.__module__.startswith("zipperasr.")}
    fields = {cls.__name__: set(cls.model_fields) for cls in sections - {SpecAugmentSettings, RowsPerBatch}}
    assert fields["Config"] == set(recipe.Config.model_fields) and sum(map(len, fields.values())) > 100
    assert {name: names - read for name, names in fields.items() if names - read} == {}
