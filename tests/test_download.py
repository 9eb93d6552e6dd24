"""Stage 0: what is fetched is whole, verified, unpacked in its folder, and never fetched twice."""

import errno
import gzip
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
from collections import namedtuple
from pathlib import Path

import pytest
from web import Server

from zipperasr.data.download import archives, fetch
from zipperasr.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "local"))

import corpora
import download

ROOT = Path(__file__).resolve().parents[1]
SECRET = "s3cr3t-of-the-user"
TRANSCRIPT = "1/2/1-2.trans.txt"


@pytest.fixture(autouse=True)
def outside(monkeypatch, tmp_path):
    """No credentials, no proxy, no pauses between tries, caches in the test's folder."""
    for variable in ("MDC_API_KEY", "WENETSPEECH_PASSWORD", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.001)


@pytest.fixture
def web():
    servers = []

    def start(files: dict[str, bytes], **more) -> Server:
        servers.append(Server(files, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def tar(members: dict[str, bytes | tarfile.TarInfo], mode: str = "w:gz") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, content in members.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.name = name
            member.size = 0 if isinstance(content, tarfile.TarInfo) else len(content)
            archive.addfile(member, io.BytesIO(b"" if isinstance(content, tarfile.TarInfo) else content))
    return stream.getvalue()


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo()
    member.type, member.linkname = kind, target
    return member


def noise(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


def part_of_librispeech(part: str, num_bytes: int = 300_000) -> bytes:
    folder = f"LibriSpeech/{part}"
    audio = noise(num_bytes, seed=len(part))
    return tar(
        {"LibriSpeech/README.TXT": b"read me", f"{folder}/{TRANSCRIPT}": b"1-2-3 A", f"{folder}/1/2/a.flac": audio}
    )


def librispeech(monkeypatch, server: Server, **md5s: str) -> None:
    """LibriSpeech is what `server` has under /<part>.tar.gz, with the right digests unless others are given."""
    names = {path[1:].removesuffix(".tar.gz"): content for path, content in server.files.items()}
    known = {name: hashlib.md5(content).hexdigest() for name, content in names.items()} | md5s
    monkeypatch.setitem(corpora.CORPORA, "librispeech", corpora.LibriSpeech(base=server.url, md5s=known))


def run(*args: str | Path) -> None:
    download.run(download.build_parser().parse_args(list(map(str, args))))


def get(folder: Path, *more: str | Path) -> Path:
    """Fetch LibriSpeech into `folder`; where it lies."""
    run("--dir", folder, "--corpus", "librispeech", *more)
    return folder / "librispeech"


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# Fetching


def test_a_corpus_lies_where_its_preparation_looks_for_it(tmp_path, web, monkeypatch):
    parts = {f"/{name}.tar.gz": part_of_librispeech(name) for name in ("dev-clean", "train-clean-100")}
    server = web(parts)
    librispeech(monkeypatch, server)
    root = get(tmp_path)
    assert (root / "LibriSpeech" / "dev-clean" / TRANSCRIPT).read_bytes() == b"1-2-3 A"
    assert (root / "LibriSpeech" / "train-clean-100" / "1/2/a.flac").read_bytes() == noise(300_000, seed=15)
    assert everything_below(root / ".download") == [".lock", "dev-clean.done", "train-clean-100.done"]
    assert server.num_bytes() == sum(map(len, parts.values()))


def test_only_the_parts_that_are_asked_for_are_fetched(tmp_path, web, monkeypatch):
    server = web({f"/{name}.tar.gz": part_of_librispeech(name) for name in ("dev-clean", "train-clean-100")})
    librispeech(monkeypatch, server)
    root = get(tmp_path, "--parts", "dev-clean")
    assert sorted(os.listdir(root / "LibriSpeech")) == ["README.TXT", "dev-clean"]
    assert {served.path for served in server.served} == {"/dev-clean.tar.gz"}


def test_what_is_complete_is_skipped_without_a_request(tmp_path, web, monkeypatch, capsys):
    server = web({"/dev-clean.tar.gz": part_of_librispeech("dev-clean")})
    librispeech(monkeypatch, server)
    get(tmp_path)
    server.served.clear()
    get(tmp_path)
    assert not server.served and "dev-clean is complete" in capsys.readouterr().out


def test_a_part_can_be_added_later(tmp_path, web, monkeypatch):
    server = web({f"/{name}.tar.gz": part_of_librispeech(name) for name in ("dev-clean", "dev-other")})
    librispeech(monkeypatch, server)
    get(tmp_path, "--parts", "dev-clean")
    root = get(tmp_path)
    assert sorted(path.parent.name for path in root.glob("LibriSpeech/*/1")) == ["dev-clean", "dev-other"]
    assert len(server.gets()) == 2


@pytest.mark.parametrize("etag", [True, False])
def test_a_cut_connection_is_taken_up_where_it_broke(tmp_path, web, monkeypatch, etag):
    content = part_of_librispeech("dev-clean")
    server = web({"/dev-clean.tar.gz": content}, cuts=[100_000, 50_000], etag=etag)
    librispeech(monkeypatch, server)
    assert (get(tmp_path) / "LibriSpeech/dev-clean" / TRANSCRIPT).exists()
    assert [served.range for served in server.gets()] == [None, "bytes=100000-", "bytes=150000-"]
    assert server.num_bytes() == len(content)


def test_a_connection_may_be_cut_as_often_as_it_likes_while_bytes_come(tmp_path, web, monkeypatch):
    content = part_of_librispeech("dev-clean")
    server = web({"/dev-clean.tar.gz": content}, cuts=[20_000] * (fetch.TRIES + 4))
    librispeech(monkeypatch, server)
    assert (get(tmp_path) / "LibriSpeech/dev-clean").is_dir()
    assert server.num_bytes() == len(content) and len(server.gets()) == fetch.TRIES + 5


def test_a_connection_that_is_cut_before_every_try_is_given_up(tmp_path, web, monkeypatch):
    server = web({"/dev-clean.tar.gz": part_of_librispeech("dev-clean")}, cuts=[1000] + [0] * 100)
    librispeech(monkeypatch, server)
    with pytest.raises(UserError, match=f"dev-clean.tar.gz: .*{fetch.TRIES} times in a row"):
        get(tmp_path)
    assert len(server.gets()) == fetch.TRIES
    assert (tmp_path / "librispeech/.download/dev-clean.tar.gz.part").stat().st_size == 1000


def test_a_server_that_ignores_ranges_and_cuts_every_answer_is_given_up(tmp_path, web, monkeypatch):
    server = web({"/dev-clean.tar.gz": part_of_librispeech("dev-clean")}, cuts=[9000, 5000] * 50, honours=())
    librispeech(monkeypatch, server)
    with pytest.raises(UserError, match="times in a row"):
        get(tmp_path)
    assert len(server.gets()) == fetch.TRIES


def test_a_server_that_ignores_ranges_does_not_corrupt_the_file(tmp_path, web, monkeypatch):
    content = part_of_librispeech("dev-clean")
    server = web({"/dev-clean.tar.gz": content}, cuts=[100_000], honours=())
    librispeech(monkeypatch, server)
    assert (get(tmp_path) / "LibriSpeech/dev-clean" / TRANSCRIPT).exists()
    assert server.num_bytes() == 100_000 + len(content)


@pytest.mark.parametrize("honours", [("Range", "If-Range"), ("Range",)])
@pytest.mark.parametrize("same_size", [True, False])
def test_two_versions_of_a_file_are_not_glued(tmp_path, web, honours, same_size):
    old, new = noise(300_000, seed=1), noise(300_000 if same_size else 280_000, seed=2)
    server = web({"/file": old}, cuts=[100_000] + [0] * 7, honours=honours)
    progress = fetch.Progress("test", total=0)
    with pytest.raises(UserError):
        fetch.fetch(f"{server.url}/file", tmp_path / "file", progress=progress)
    server.cuts.clear()
    server.files["/file"] = new
    fetch.fetch(f"{server.url}/file", tmp_path / "file", progress=progress)
    assert (tmp_path / "file").read_bytes() == new
    assert len(server.gets()) == fetch.TRIES + (1 if "If-Range" in honours else 2)


def test_a_busy_server_is_asked_again(tmp_path, web, monkeypatch):
    server = web({"/dev-clean.tar.gz": part_of_librispeech("dev-clean")}, statuses=[503, 429])
    librispeech(monkeypatch, server)
    assert (get(tmp_path) / "LibriSpeech/dev-clean").is_dir()


def test_a_file_that_is_gone_is_named_at_once(tmp_path, web, monkeypatch):
    server = web({"/dev-clean.tar.gz": b""})
    librispeech(monkeypatch, server)
    server.files.clear()
    with pytest.raises(UserError, match=r"/dev-clean.tar.gz: the server answers 404 Not Found"):
        get(tmp_path)
    assert len(server.served) == 1


def test_the_query_of_a_url_is_not_shown(tmp_path, web):
    server = web({})
    with pytest.raises(UserError) as error:
        fetch.fetch(f"{server.url}/file?signature={SECRET}", tmp_path / "file", progress=fetch.Progress("", total=0))
    assert SECRET not in str(error.value)


def test_files_are_fetched_side_by_side(tmp_path, web, monkeypatch):
    parts = {f"/{name}.tar.gz": part_of_librispeech(name) for name in ("dev-clean", "dev-other", "test-clean")}
    librispeech(monkeypatch, web(parts, together=threading.Barrier(3)))  # each GET waits for two others
    assert len(list(get(tmp_path, "--nj", "3").glob("LibriSpeech/*/1"))) == 3


def test_one_bad_file_does_not_stop_the_others(tmp_path, web, monkeypatch):
    parts = {f"/{name}.tar.gz": part_of_librispeech(name) for name in ("dev-clean", "dev-other")}
    librispeech(monkeypatch, web(parts), **{"dev-clean": "0" * 32})
    with pytest.raises(UserError, match="dev-clean.tar.gz: expected md5 0+, found"):
        get(tmp_path, "--nj", "1")
    assert (tmp_path / "librispeech/LibriSpeech/dev-other").is_dir()


def test_a_wrong_checksum_is_fetched_once_more_and_then_named(tmp_path, web, monkeypatch):
    content = part_of_librispeech("dev-clean")
    server = web({"/dev-clean.tar.gz": content})
    librispeech(monkeypatch, server, **{"dev-clean": "0" * 32})
    message = f"dev-clean.tar.gz: expected md5 {'0' * 32}, found {hashlib.md5(content).hexdigest()}"
    with pytest.raises(UserError, match=message):
        get(tmp_path)
    assert len(server.gets()) == 2
    assert everything_below(tmp_path / "librispeech") == [".download/.lock"]


def test_a_file_that_was_damaged_on_the_way_once_is_mended(tmp_path, web, monkeypatch):
    content = part_of_librispeech("dev-clean")
    server = web({"/dev-clean.tar.gz": content})
    librispeech(monkeypatch, server)
    server.files["/dev-clean.tar.gz"] = content[:-1] + b"?"
    verify, seen = archives.verify, []

    def mend_after_first(path, archive):
        server.files["/dev-clean.tar.gz"] = content
        seen.append(path)
        verify(path, archive)

    monkeypatch.setattr(archives, "verify", mend_after_first)
    assert (get(tmp_path) / "LibriSpeech/dev-clean").is_dir() and len(seen) == 2


def test_archives_stay_if_they_are_to_be_kept(tmp_path, web, monkeypatch):
    content = part_of_librispeech("dev-clean")
    librispeech(monkeypatch, web({"/dev-clean.tar.gz": content}))
    root = get(tmp_path, "--keep-archives")
    assert (root / ".download/dev-clean.tar.gz").read_bytes() == content


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path, web, monkeypatch, capsys):
    server = web({"/dev-clean.tar.gz": part_of_librispeech("dev-clean")})
    librispeech(monkeypatch, server)
    get(tmp_path, "--dry-run")
    output = capsys.readouterr().out
    assert f"{server.url}/dev-clean.tar.gz, 300kB, md5:" in output and "needs 631kB of room" in output
    assert not server.gets() and not (tmp_path / "librispeech").exists()


# Disks


def test_a_disk_without_room_is_named_before_anything_is_fetched(tmp_path, web, monkeypatch):
    server = web({"/dev-clean.tar.gz": part_of_librispeech("dev-clean")})
    librispeech(monkeypatch, server)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 500_000, 500_000))
    with pytest.raises(UserError, match="needs 631kB of room, has 500kB free"):
        get(tmp_path)
    assert not server.gets()


def test_what_is_there_already_needs_no_room(tmp_path, web, monkeypatch):
    content = part_of_librispeech("dev-clean")
    server = web({"/dev-clean.tar.gz": content}, cuts=[200_000] + [0] * 7)
    librispeech(monkeypatch, server)
    with pytest.raises(UserError):
        get(tmp_path)
    server.cuts.clear()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 500_000, 500_000))
    assert (get(tmp_path) / "LibriSpeech/dev-clean").is_dir()
    assert server.num_bytes() == len(content)


class FullDisk(io.FileIO):
    """A file on a disk that has room for 100,000 bytes of it."""

    def write(self, data) -> int:
        if self.tell() + len(data) > 100_000:
            super().write(data[: 100_000 - self.tell()])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_disk_that_fills_is_one_line_and_the_next_run_goes_on(tmp_path, web, monkeypatch):
    content = part_of_librispeech("dev-clean")
    server = web({"/dev-clean.tar.gz": content})
    librispeech(monkeypatch, server)
    with monkeypatch.context() as context:
        context.setattr(fetch, "open", lambda path, mode: FullDisk(path, "a"), raising=False)
        with pytest.raises(UserError, match="dev-clean.tar.gz: the disk is full; free some space"):
            get(tmp_path)
    server.served.clear()
    assert (get(tmp_path) / "LibriSpeech/dev-clean").is_dir()
    assert [served.range for served in server.gets()] == ["bytes=100000-"]


def test_a_disk_that_fills_while_unpacking_is_one_line_and_leaves_no_tree(tmp_path, web, monkeypatch):
    content = part_of_librispeech("dev-clean")
    server = web({"/dev-clean.tar.gz": content})
    librispeech(monkeypatch, server)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as context:
        context.setattr(archives.tarfile, "copyfileobj", full)
        with pytest.raises(UserError, match="the disk is full"):
            get(tmp_path)
    assert everything_below(tmp_path / "librispeech") == [".download/.lock", ".download/dev-clean.tar.gz"]
    get(tmp_path)
    assert len(server.gets()) == 1


# Archives


@pytest.mark.parametrize(
    "hostile",
    [
        {"../evil": b"x"},
        {"LibriSpeech/../../evil": b"x"},
        {"link": special(tarfile.SYMTYPE, "/etc")},
        {"link": special(tarfile.SYMTYPE, "../..")},
        {"link": special(tarfile.LNKTYPE, "../../../../secret")},
        {"link": special(tarfile.SYMTYPE, "../../outside"), "link/evil": b"x"},
        {"device": special(tarfile.CHRTYPE)},
        {"device": special(tarfile.BLKTYPE)},
        {"pipe": special(tarfile.FIFOTYPE)},
    ],
    ids=lambda members: "-".join(members),
)
def test_an_archive_that_reaches_outside_is_refused(tmp_path, web, monkeypatch, hostile):
    (tmp_path / "secret").write_text("secret")
    librispeech(monkeypatch, web({"/dev-clean.tar.gz": tar({"LibriSpeech/dev-clean/a": b"a", **hostile})}))
    with pytest.raises(UserError, match="dev-clean.tar.gz: refused, as it would write outside of its folder"):
        get(tmp_path / "corpora")
    assert everything_below(tmp_path) == [
        "corpora/librispeech/.download/.lock",
        "corpora/librispeech/.download/dev-clean.tar.gz",
        "secret",
    ]


def test_an_absolute_path_lands_inside(tmp_path, web, monkeypatch):
    outside = tmp_path / "outside"
    members = {f"LibriSpeech/dev-clean/{TRANSCRIPT}": b"", str(outside): b"x"}
    librispeech(monkeypatch, web({"/dev-clean.tar.gz": tar(members)}))
    root = get(tmp_path / "corpora")
    assert not outside.exists() and (root / outside.relative_to("/")).exists()


@pytest.mark.parametrize("damage", ["cut", "cut at a member", "flipped", "no tar"])
def test_a_damaged_archive_leaves_no_tree(tmp_path, damage):
    content = tar({"a/long": noise(100_000), "b": b"x"}, mode="w")
    damaged = {
        "cut": tar({"a/long": noise(100_000)})[:50_000],
        "cut at a member": tar({"a/long": noise(100_000)})[:-8],
        "flipped": gzip.compress(content + bytes(3_000_000)),  # a tar ends before its file does
        "no tar": b"<html>this is not the page you are looking for</html>" * 100,
    }[damage]
    if damage == "flipped":
        damaged = damaged[:-8] + bytes(byte ^ 255 for byte in damaged[-8:-4]) + damaged[-4:]  # gzip's own checksum
    (tmp_path / "archive").write_bytes(damaged)
    (tmp_path / "whole").write_bytes(content)
    progress = fetch.Progress("", total=0)
    with pytest.raises(UserError, match="archive: damaged .*get it anew from its source"):
        archives.unpack(tmp_path / "archive", tmp_path / "tree", progress=progress)
    assert not (tmp_path / "tree").exists()
    archives.unpack(tmp_path / "whole", tmp_path / "tree", progress=progress)
    assert everything_below(tmp_path / "tree") == ["a/long", "b"]


def test_a_damaged_download_without_a_checksum_is_fetched_anew_by_the_next_run(tmp_path, web, monkeypatch):
    content = part_of_librispeech("dev-clean")
    server = web({"/dev-clean.tar.gz": content[:-20]})
    librispeech(monkeypatch, server)
    monkeypatch.setattr(corpora.LibriSpeech, "_archive", lambda c, n, md5: corpora.Archive(n, f"{c.base}/{n}"))
    with pytest.raises(UserError, match="damaged"):
        get(tmp_path)
    server.files["/dev-clean.tar.gz"] = content
    assert (get(tmp_path) / "LibriSpeech/dev-clean").is_dir()


def test_an_archive_of_another_corpus_is_named(tmp_path, web, monkeypatch):
    librispeech(monkeypatch, web({"/dev-clean.tar.gz": tar({"AISHELL/a": b"x"})}))
    with pytest.raises(UserError, match="dev-clean was unpacked, but LibriSpeech/dev-clean, dev-clean is not there"):
        get(tmp_path)


# Interruptions


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path, web, monkeypatch):
    content = part_of_librispeech("dev-clean", num_bytes=4_000_000)
    server = web({"/dev-clean.tar.gz": content}, pause_s=0.03)
    librispeech(monkeypatch, server)
    md5 = hashlib.md5(content).hexdigest()
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import corpora, download\n"
        f"corpora.CORPORA['librispeech'] = corpora.LibriSpeech(base='{server.url}', md5s={{'dev-clean': '{md5}'}})\n"
        "download.run(download.build_parser().parse_args())"
    )
    command = [sys.executable, "-c", code, str(ROOT / "local"), "--dir", str(tmp_path), "--corpus", "librispeech"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    part = tmp_path / "librispeech/.download/dev-clean.tar.gz.part"
    while not (part.exists() and part.stat().st_size > 1_000_000):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.pause_s, have = 0, part.stat().st_size
    assert not (tmp_path / "librispeech/LibriSpeech").exists()
    assert (get(tmp_path) / "LibriSpeech/dev-clean" / TRANSCRIPT).exists()
    assert ("GET", "/dev-clean.tar.gz", f"bytes={have}-", len(content) - have) in server.gets()


def test_a_move_that_is_broken_off_is_not_taken_for_a_tree(tmp_path, web, monkeypatch):
    server = web({"/dev-clean.tar.gz": part_of_librispeech("dev-clean")})
    librispeech(monkeypatch, server)
    merge = archives.merge

    def broken(source, target):
        if source.name == "tree":  # the audio has not come along when the power fails
            (target / "LibriSpeech/dev-clean/1/2").mkdir(parents=True)
            os.replace(source / "LibriSpeech/dev-clean" / TRANSCRIPT, target / "LibriSpeech/dev-clean" / TRANSCRIPT)
            raise KeyboardInterrupt
        merge(source, target)

    with monkeypatch.context() as context:
        context.setattr(archives, "merge", broken)
        with pytest.raises(KeyboardInterrupt):
            get(tmp_path)
    root = get(tmp_path)
    assert (root / "LibriSpeech/dev-clean/1/2/a.flac").exists() and (
        root / "LibriSpeech/dev-clean" / TRANSCRIPT
    ).exists()
    assert len(server.gets()) == 1


def test_an_interruption_ends_the_threads(tmp_path, web, monkeypatch):
    parts = {f"/{name}.tar.gz": part_of_librispeech(name, 4_000_000) for name in ("dev-clean", "dev-other")}
    librispeech(monkeypatch, web(parts, pause_s=0.2))
    monkeypatch.setattr(download.Transfer, "_run_all", interrupted(download.Transfer._run_all))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            get(tmp_path)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - begun < 5  # and not the 12 s of the whole


def interrupted(function):
    """The function, with Ctrl-C after half a second."""

    def wrapped(*args):
        threading.Timer(0.5, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
        return function(*args)

    return wrapped


def test_two_runs_do_not_share_a_folder(tmp_path, web, monkeypatch):
    from zipperasr import files

    librispeech(monkeypatch, web({"/dev-clean.tar.gz": part_of_librispeech("dev-clean")}))
    with files.lock(tmp_path / "librispeech/.download"), pytest.raises(UserError, match="another run is writing here"):
        get(tmp_path)


# Trees and archives of the user's own


def tree_of_librispeech(folder: Path, *parts: str) -> Path:
    for part in parts:
        path = folder / "LibriSpeech" / part / TRANSCRIPT
        path.parent.mkdir(parents=True)
        path.write_text("1-2-3 A")
    return folder


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a request was made")

    for method in ("get", "head"):
        monkeypatch.setattr(f"requests.{method}", refuse)


def test_a_tree_that_is_there_is_taken_as_it_is(tmp_path, offline, capsys):
    tree_of_librispeech(tmp_path / "librispeech", "dev-clean", "dev-other")
    get(tmp_path, "--parts", "dev-clean", "dev-other")
    assert "dev-other is complete, a tree of your own" in capsys.readouterr().out
    assert not (tmp_path / "librispeech/.download").exists()


def test_a_tree_that_lacks_something_is_not_written_into(tmp_path, offline):
    for split in ("train", "dev"):
        (tmp_path / "mls/mls_german" / split).mkdir(parents=True)
    (tmp_path / "mls/mls_german/train/transcripts.txt").touch()
    with pytest.raises(UserError) as error:
        run("--dir", tmp_path, "--corpus", "mls", "--lang", "de")
    folder = tmp_path / "mls/mls_german"
    assert f"lacks {folder}/dev/transcripts.txt, {folder}/test/transcripts.txt; complete" in str(error.value)


def test_a_linked_corpus_is_not_written_into(tmp_path, offline):
    own = tree_of_librispeech(tmp_path / "own", "dev-clean")
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora/librispeech").symlink_to(own)
    get(tmp_path / "corpora", "--parts", "dev-clean")
    with pytest.raises(
        UserError, match=f"librispeech: links to {own}, which lacks LibriSpeech/dev-other; add it there"
    ):
        get(tmp_path / "corpora", "--parts", "dev-clean", "dev-other")


@pytest.mark.parametrize("depth", ["", "LibriSpeech", "LibriSpeech/dev-clean"])
def test_a_given_tree_is_linked_from_whatever_depth(tmp_path, offline, depth):
    own = tree_of_librispeech(tmp_path / "own", "dev-clean")
    root = get(tmp_path / "corpora", "--parts", "dev-clean", "--from", own / depth)
    link = root / "LibriSpeech" / "dev-clean"
    assert link.is_symlink() and link.resolve() == own / "LibriSpeech/dev-clean"
    get(tmp_path / "corpora", "--parts", "dev-clean")  # complete


def test_a_given_tree_that_lacks_something_is_not_linked(tmp_path, offline):
    own = tree_of_librispeech(tmp_path / "own", "dev-clean")
    with pytest.raises(UserError, match="test-clean: there is no LibriSpeech/test-clean, .* and no test-clean.tar.gz"):
        get(tmp_path / "corpora", "--parts", "dev-clean", "test-clean", "--from", own)
    assert not (tmp_path / "corpora").exists()


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_given_archive_is_verified_unpacked_and_left_alone(tmp_path, web, monkeypatch, as_folder):
    content = part_of_librispeech("dev-clean")
    server = web({"/dev-clean.tar.gz": content})
    librispeech(monkeypatch, server)
    archive = tmp_path / "own/dev-clean.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(content)
    root = get(tmp_path / "corpora", "--from", archive.parent if as_folder else archive)
    assert (root / "LibriSpeech/dev-clean" / TRANSCRIPT).exists()
    assert archive.read_bytes() == content and not server.served


def test_a_given_archive_that_is_wrong_is_named_and_left_alone(tmp_path, monkeypatch):
    archive = tmp_path / f"{corpora.RELEASE}-ko.tar.gz"
    archive.write_bytes(b"of another release")
    with pytest.raises(UserError, match=f"{archive}: expected 127874298 bytes, found 18"):
        run("--dir", tmp_path / "corpora", "--corpus", "commonvoice", "--lang", "ko", "--from", archive)
    assert archive.exists()


def test_a_source_that_is_not_there_is_named(tmp_path, offline):
    with pytest.raises(UserError, match="--from /nowhere: no such file or folder"):
        get(tmp_path, "--from", "/nowhere")


def test_another_corpus_must_lie_there(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    run("--dir", tmp_path, "--corpus", "mine", "--lang", "de")
    assert f"{tmp_path}/mine: taken as it is" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"yours: no folder {tmp_path}/yours; put or link it there"):
        run("--dir", tmp_path, "--corpus", "yours")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing is asked for"),
        (["--corpus", "mls"], "--corpus needs --dir"),
        (["--lang", "de", "--corpus", "mls"], "--lang belongs to a corpus; put it behind --corpus NAME"),
        (
            ["--dir", "x", "--corpus", "mls", "--lang", "zh"],
            "--lang zh: not in the corpus; known: de, en, es, fr, it, pt",
        ),
        (["--dir", "x", "--corpus", "mls", "--parts", "wav"], "--parts wav: not in the corpus; known: flac, opus"),
        (["--model", "pretrained/none"], "pretrained/none: no such file or folder"),
        (["--model", "large-v9"], "large-v9: .*large-v3"),
    ],
)
def test_a_wrong_option_is_named(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(*args)


# Multilingual LibriSpeech


def archive_of_mls(folder: str) -> bytes:
    return tar({f"{folder}/{split}/transcripts.txt": b"1_2_3\ttext" for split in ("train", "dev", "test")})


@pytest.fixture
def mls(web, monkeypatch):
    content = {f"/{name}.tar.gz": archive_of_mls(name) for name in ("mls_german", "mls_spanish_opus")}
    sums = "".join(f"{hashlib.md5(data).hexdigest()}  {path[1:]}\n" for path, data in content.items())
    server = web({**content, "/md5sum.txt": sums.encode()})
    monkeypatch.setitem(corpora.CORPORA, "mls", corpora.MultilingualLibriSpeech(base=server.url))
    return server


def test_mls_is_verified_by_its_list(tmp_path, mls):
    run("--dir", tmp_path, "--corpus", "mls", "--lang", "de", "--corpus", "mls", "--lang", "es", "--parts", "opus")
    assert (tmp_path / "mls/mls_german/train/transcripts.txt").exists()
    assert (tmp_path / "mls/mls_spanish_opus/dev/transcripts.txt").exists()
    mls.files["/mls_german.tar.gz"] += b"\0"
    with pytest.raises(UserError, match="mls_german.tar.gz: expected md5"):
        run("--dir", tmp_path / "other", "--corpus", "mls", "--lang", "de")


def test_an_archive_that_the_list_does_not_have_is_named(tmp_path, mls):
    with pytest.raises(UserError, match="md5sum.txt: no checksum of mls_french"):
        run("--dir", tmp_path, "--corpus", "mls", "--lang", "fr")


@pytest.mark.parametrize("folder", ["mls_german", "mls_german_opus", "de"])
def test_each_layout_of_mls_that_can_be_prepared_is_taken(tmp_path, offline, folder):
    for split in ("train", "dev", "test"):
        (tmp_path / "mls" / folder / split).mkdir(parents=True)
        (tmp_path / "mls" / folder / split / "transcripts.txt").touch()
    run("--dir", tmp_path, "--corpus", "mls", "--lang", "de")


# WenetSpeech


def encrypted(folder: Path, members: dict[str, bytes]) -> bytes:
    """An archive as WenetSpeech's: a gzip tar in AES-256-CBC, by the openssl command."""
    (folder / "plain.tgz").write_bytes(tar(members))
    command = ["openssl", "enc", "-e", "-aes-256-cbc", "-salt", "-pbkdf2", "-pass", f"pass:{SECRET}"]
    subprocess.run([*command, "-in", folder / "plain.tgz", "-out", folder / "plain.aes"], check=True)
    (folder / "plain.tgz").unlink()
    return (folder / "plain.aes").read_bytes()


@pytest.fixture
def wenetspeech(web, monkeypatch, tmp_path):
    trees = {
        "WenetSpeech.json": {"WenetSpeech.json": b"{}"},
        "audio/dev/third_party/B00000": {"audio/dev/third_party/B00000/a.opus": noise(50_000)},
        "audio/train/podcast/B00000": {"audio/train/podcast/B00000/b.opus": b"b"},
        "audio/train/youtube/B00000": {"audio/train/youtube/B00000/c.opus": b"c"},
    }
    content = {f"/{name}.aes.tgz": encrypted(tmp_path, members) for name, members in trees.items()}
    rows = [f"{hashlib.md5(data).hexdigest()} {path[1:]}" for path, data in content.items()]
    server = web({**content, "/v1.list": "\n".join(rows).encode()})
    known = corpora.WenetSpeech(base=server.url, list_url=f"{server.url}/v1.list")
    monkeypatch.setitem(corpora.CORPORA, "wenetspeech", known)
    return server


WENETSPEECH = ("--corpus", "wenetspeech", "--parts", "labels", "dev", "train")


def test_wenetspeech_is_decrypted_into_one_tree(tmp_path, wenetspeech, monkeypatch, capfd):
    monkeypatch.setenv("WENETSPEECH_PASSWORD", SECRET)
    run("--dir", tmp_path, *WENETSPEECH)
    root = tmp_path / "wenetspeech"
    assert (root / "audio/dev/third_party/B00000/a.opus").read_bytes() == noise(50_000)
    assert sorted(path.parent.parent.name for path in (root / "audio/train").rglob("*.opus")) == ["podcast", "youtube"]
    assert (root / "WenetSpeech.json").read_bytes() == b"{}"
    assert SECRET not in "".join(capfd.readouterr())


def test_the_password_is_not_on_a_command_line(tmp_path, wenetspeech, monkeypatch):
    monkeypatch.setenv("WENETSPEECH_PASSWORD", SECRET)
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: started.append(command) or popen(command, **more))
    run("--dir", tmp_path, *WENETSPEECH)
    assert started and SECRET not in str(started)


def test_a_wrong_password_is_named_and_costs_no_second_download(tmp_path, wenetspeech, monkeypatch, capfd):
    monkeypatch.setenv("WENETSPEECH_PASSWORD", "wr0ng-one")
    with pytest.raises(UserError, match="cannot be decrypted; is WENETSPEECH_PASSWORD right") as error:
        run("--dir", tmp_path, *WENETSPEECH)
    assert not (tmp_path / "wenetspeech/audio").exists()
    monkeypatch.setenv("WENETSPEECH_PASSWORD", SECRET)
    gets = len(wenetspeech.gets())
    run("--dir", tmp_path, *WENETSPEECH)
    assert [served.path for served in wenetspeech.gets()[gets:]] == ["/v1.list"]
    assert "wr0ng-one" not in str(error.value) + "".join(capfd.readouterr())


def test_wenetspeech_appears_only_when_every_archive_of_a_part_is_there(tmp_path, wenetspeech, monkeypatch):
    monkeypatch.setenv("WENETSPEECH_PASSWORD", SECRET)
    youtube = wenetspeech.files.pop("/audio/train/youtube/B00000.aes.tgz")
    monkeypatch.setattr(fetch, "size_on_server", lambda url: None)
    with pytest.raises(UserError, match="youtube/B00000.aes.tgz: the server answers 404"):
        run("--dir", tmp_path, *WENETSPEECH)
    assert os.listdir(tmp_path / "wenetspeech/audio") == ["dev"]
    wenetspeech.files["/audio/train/youtube/B00000.aes.tgz"] = youtube
    wenetspeech.served.clear()
    run("--dir", tmp_path, *WENETSPEECH)
    assert [served.path for served in wenetspeech.gets()] == ["/v1.list", "/audio/train/youtube/B00000.aes.tgz"]


def test_given_archives_of_wenetspeech_are_decrypted(tmp_path, wenetspeech, monkeypatch):
    for path, content in wenetspeech.files.items():
        (tmp_path / "own" / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / path[1:]).write_bytes(content)
    given = (*WENETSPEECH, "--from", tmp_path / "own")
    with pytest.raises(UserError, match="wenetspeech: WENETSPEECH_PASSWORD is not set; see the steps above"):
        run("--dir", tmp_path, *given)
    monkeypatch.setenv("WENETSPEECH_PASSWORD", SECRET)
    run("--dir", tmp_path, *given)
    assert (tmp_path / "wenetspeech/audio/train/youtube/B00000/c.opus").exists() and not wenetspeech.served


# Common Voice


class Client(types.ModuleType):
    """In place of the package `datacollective`: its two functions over a folder, and its way of failing."""

    class DownloadError(Exception):
        pass

    class AuthenticationError(RuntimeError):
        pass

    def __init__(self, archive: bytes, *, size: int | None = None, failures: list[Exception] = ()):
        super().__init__("datacollective")
        self.archive, self.size, self.failures, self.asked = archive, size or len(archive), list(failures), []

    def get_dataset_details(self, dataset: str) -> dict:
        return {"id": dataset, "sizeBytes": self.size, "checksum": hashlib.sha256(self.archive).hexdigest()}

    def download_dataset(self, dataset: str, *, download_directory: str) -> Path:
        self.asked.append(dataset)
        if self.failures:
            raise self.failures.pop(0)
        path = Path(download_directory) / "mcv-of-mozilla.tar.gz"
        path.write_bytes(self.archive)
        return path


@pytest.fixture
def collective(monkeypatch):
    """Starts a client whose dataset is Common Voice's Thai."""
    tables = [f"{split}.tsv" for split in ("train", "dev", "test", "validated", "other")]
    archive = tar({f"{corpora.RELEASE}/th/{name}": b"x" for name in (*tables, "clips/a.mp3")})
    monkeypatch.setitem(corpora.CORPORA, "commonvoice", corpora.CommonVoice(sizes={"th": len(archive)}))
    monkeypatch.setenv("MDC_API_KEY", SECRET)

    def start(**more) -> Client:
        client = Client(archive, **more)
        client.__spec__ = importlib.util.spec_from_loader("datacollective", loader=None)
        monkeypatch.setitem(sys.modules, "datacollective", client)
        return client

    return start


COMMON_VOICE = ("--corpus", "commonvoice", "--lang", "th", "--dataset", "th=an-id")


def test_common_voice_comes_by_mozillas_client(tmp_path, collective):
    client = collective(failures=[Client.DownloadError("cut")])  # the client goes on by itself when asked again
    run("--dir", tmp_path, *COMMON_VOICE)
    root = tmp_path / "commonvoice"
    assert (root / corpora.RELEASE / "th/clips/a.mp3").exists() and client.asked == ["an-id"] * 2
    assert everything_below(root / ".download") == [".lock", "th.done"]
    run("--dir", tmp_path, *COMMON_VOICE)
    assert len(client.asked) == 2


def test_a_language_of_which_no_size_is_known_comes_too(tmp_path, collective, monkeypatch):
    collective()
    monkeypatch.setitem(corpora.CORPORA, "commonvoice", corpora.CommonVoice(sizes={}))
    run("--dir", tmp_path, *COMMON_VOICE)
    assert (tmp_path / "commonvoice" / corpora.RELEASE / "th/clips/a.mp3").exists()


def test_another_release_is_refused_before_it_is_fetched(tmp_path, collective):
    client = collective(size=7)
    with pytest.raises(UserError, match="dataset an-id: has 7 bytes, but cv-corpus-18.0-2024-06-14-th.tar.gz has"):
        run("--dir", tmp_path, *COMMON_VOICE)
    assert not client.asked


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (Client.AuthenticationError(f"key {SECRET}"), "MDC_API_KEY is not accepted"),
        (PermissionError(SECRET), "agree to the terms"),
        (RuntimeError(f"https://storage?signature={SECRET}"), "dataset an-id: RuntimeError"),
        (OSError(errno.ENOSPC, SECRET), "the disk is full"),
    ],
)
def test_what_the_client_fails_of_is_one_line_without_secrets(tmp_path, collective, failure, message):
    collective(failures=[failure])
    with pytest.raises(UserError, match=message) as error:
        run("--dir", tmp_path, *COMMON_VOICE)
    assert SECRET not in str(error.value)


def test_a_language_without_an_id_is_named(tmp_path, collective, capsys):
    collective()
    with pytest.raises(UserError, match="--dataset gives no id for th; see the steps above"):
        run("--dir", tmp_path, "--corpus", "commonvoice", "--lang", "th")
    assert re.search(r"^  6\. Run the same command again with an id", capsys.readouterr().err, re.MULTILINE)


# The Hugging Face hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub(web, repo: str, content: dict[str, bytes], *, kind: str = "model") -> Server:
    """What the hub answers for a repository."""
    entries = [{"type": "file", "path": name, "size": len(data), "oid": sha1(data)} for name, data in content.items()]
    where = f"/{repo}/resolve/{COMMIT}" if kind == "model" else f"/{kind}s/{repo}/resolve/{COMMIT}"
    pages = {
        f"/api/{kind}s/{repo}/revision/main": json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode(),
        f"/api/{kind}s/{repo}/tree/{COMMIT}": json.dumps(entries).encode(),
        **{f"{where}/{name}": data for name, data in content.items()},
    }
    headers = {f"{where}/{name}": {"X-Repo-Commit": COMMIT} for name in content}
    return web(pages, headers=headers)


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def msr86k(web, monkeypatch):
    """MSR-86K as a repository that has Thai and English, some of it in tars."""
    content = {
        "README.md": b"read me",
        "thai/train.json": b"{}",
        "thai/TH_001.wav": b"th",
        "english/train.json": b"{}",
        "english/EN_shard-1.tar": tar({"EN_1.wav": b"en"}, mode="w"),
        "english/EN_shard-2.tar.gz": tar({"deep/EN_2.wav": b"en"}),
        "russian/RU__en-de.wav": b"ru",
    }
    server = hub(web, "Alex-Song/MSR-86K", content, kind="dataset")
    monkeypatch.setitem(corpora.CORPORA, "msr86k", corpora.Msr86k(endpoint=server.url))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return server


def test_the_languages_of_msr86k_are_found_by_their_names(tmp_path, msr86k):
    run("--dir", tmp_path, "--corpus", "msr86k", "--lang", "th")
    root = tmp_path / "msr86k"
    found = [name for name in everything_below(root) if not name.startswith(".download")]
    assert found == ["README.md", "english/train.json", "thai/TH_001.wav", "thai/train.json"]  # lists are small
    msr86k.served.clear()
    run("--dir", tmp_path, "--corpus", "msr86k", "--lang", "th")
    assert not msr86k.served


def test_a_language_of_msr86k_can_be_added_and_its_tars_are_unpacked(tmp_path, msr86k):
    for lang in ("th", "en"):
        run("--dir", tmp_path, "--corpus", "msr86k", "--lang", lang)
    msr86k.served.clear()
    run("--dir", tmp_path, "--corpus", "msr86k", "--lang", "th", "en")
    assert not msr86k.served
    root = tmp_path / "msr86k"
    assert {"english/EN_1.wav", "english/deep/EN_2.wav", "thai/TH_001.wav"} <= set(everything_below(root))
    assert not list(root.rglob("*.tar*")) and not (root / ".cache").exists()
    assert everything_below(root / ".download") == [".lock", "hub.done"]


def test_a_language_that_no_file_is_named_after_is_named(tmp_path, msr86k):
    with pytest.raises(
        UserError, match="no file is named vi or VI or vietnamese or Vietnamese; see its files on the hub"
    ):
        run("--dir", tmp_path, "--corpus", "msr86k", "--lang", "th", "vi")
    run("--dir", tmp_path, "--corpus", "msr86k", "--lang", "vi", "--parts", "russian/*")
    assert (tmp_path / "msr86k/russian/RU__en-de.wav").exists()


def test_a_gate_that_is_closed_is_one_line_without_the_token(tmp_path, msr86k, capfd):
    msr86k.statuses += [401] * 50
    with pytest.raises(UserError, match="Alex-Song/MSR-86K: ") as error:
        run("--dir", tmp_path, "--corpus", "msr86k", "--lang", "th")
    assert SECRET not in str(error.value) + "".join(capfd.readouterr())


def test_a_tree_of_msr86k_must_have_each_language(tmp_path, offline):
    (tmp_path / "msr86k/English").mkdir(parents=True)
    run("--dir", tmp_path, "--corpus", "msr86k", "--lang", "en")
    with pytest.raises(UserError, match="lacks .*anything named th or TH or thai or Thai"):
        run("--dir", tmp_path, "--corpus", "msr86k", "--lang", "en", "th")


def test_a_given_tree_of_msr86k_is_linked_whole(tmp_path, offline):
    (tmp_path / "own/English").mkdir(parents=True)
    run("--dir", tmp_path / "corpora", "--corpus", "msr86k", "--lang", "en", "--from", tmp_path / "own")
    assert (tmp_path / "corpora/msr86k").resolve() == tmp_path / "own"


def test_a_model_of_the_hub_is_fetched_into_its_cache_once(tmp_path, web, monkeypatch):
    from huggingface_hub import constants, snapshot_download

    from zipperasr.data.download.hub import HubModel

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    server = hub(web, "Qwen/Qwen3-tiny", {"config.json": b"{}", "model.safetensors": noise(50_000)})
    model = HubModel("Qwen/Qwen3-tiny", endpoint=server.url)
    assert not model.is_there()
    model.measure()
    assert model.room() == 50_002
    model.run()
    folder = Path(snapshot_download("Qwen/Qwen3-tiny", local_files_only=True))
    assert (folder / "model.safetensors").read_bytes() == noise(50_000)
    assert HubModel("Qwen/Qwen3-tiny", endpoint=server.url).is_there()


# Whisper


def test_a_model_of_whisper_is_where_whisper_looks_for_it(tmp_path, web, monkeypatch, capsys):
    import whisper

    content = noise(50_000)
    path = f"/{hashlib.sha256(content).hexdigest()}/tiny.pt"
    server = web({path: content}, cuts=[20_000])
    monkeypatch.setitem(whisper._MODELS, "tiny", server.url + path)
    run("--model", "tiny")
    assert server.num_bytes() == len(content)
    cache = tmp_path / "cache" / "whisper"
    assert whisper._download("http://127.0.0.1:9" + path, str(cache), False) == str(cache / "tiny.pt")  # no request
    server.served.clear()
    run("--model", "tiny")
    assert not server.served and "tiny: is complete" in capsys.readouterr().out


def test_a_model_in_a_folder_is_taken_as_it_is(tmp_path, capsys):
    run("--model", tmp_path)
    assert f"{tmp_path}: is there" in capsys.readouterr().out


# The script


def download_sh(*args: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in CREDENTIALS} | env
    command = [str(cwd / "local/download.sh"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


CREDENTIALS = ("MDC_API_KEY", "WENETSPEECH_PASSWORD", "HF_TOKEN")


def test_without_credentials_the_script_prints_the_steps_and_fails(tmp_path):
    corpora_args = [arg for name in ("commonvoice", "wenetspeech", "msr86k") for arg in ("--corpus", name)]
    result = download_sh("--dir", tmp_path, *corpora_args, cwd=ROOT / "egs" / "multilingual12")
    assert result.returncode == 1
    for variable, corpus in zip(CREDENTIALS, ("commonvoice", "wenetspeech", "msr86k")):
        block = result.stderr.partition(f"{corpus}: {variable} is not set. To get the corpus:\n")[2].split("\n  Or, ")[
            0
        ]
        numbers = [int(line.strip().partition(".")[0]) for line in block.splitlines()]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 3
        assert f"export {variable}" in block
    last = result.stderr.splitlines()[-1]
    assert last.startswith("download.py: error: commonvoice: MDC_API_KEY is not set") and "msr86k: HF_TOKEN" in last


def test_the_script_links_a_given_tree(tmp_path):
    own = tree_of_librispeech(tmp_path / "own", "dev-clean")
    args = ("--dir", tmp_path / "corpora", "--corpus", "librispeech", "--parts", "dev-clean", "--from", own)
    result = download_sh(*args, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "corpora/librispeech/LibriSpeech/dev-clean" / TRANSCRIPT).exists()
