"""Transcribe audio of any length with a trained run: files, folders, Kaldi data directories, Lhotse manifests.

Without --out, txt prints a line "name<TAB>text" for each input, and json an object in a line; srt and vtt take one
input then. With --out DIR there is a file DIR/<name>.<format> for each input and format; what is there already is
skipped, unless the audio, the model or a setting has changed.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from zipperasr import files, languages
from zipperasr.cli import recipe
from zipperasr.errors import UserError

if TYPE_CHECKING:
    from zipperasr.decoding.inputs import Source
    from zipperasr.decoding.job import TranscriptionJob
    from zipperasr.decoding.transcript import Transcript

FORMATS = ("txt", "json", "srt", "vtt", "ctm")
OVERRIDABLE = ("decoding.", "transcription.")
AUTO = "auto"
MAX_PROBED = 100  # inputs whose length is looked up first, for the progress bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="RUN_DIR", help="config.yaml and checkpoints")
    parser.add_argument("--language", default=AUTO, help="a code, or auto (default): as the input says, else detected")
    parser.add_argument(
        "--format",
        nargs="+",
        dest="formats",
        metavar="FORMAT",
        default=["txt"],
        help="txt (default), json, srt, vtt, ctm",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write files (default: print)")
    recipe.add_checkpoint_arguments(parser)
    parser.add_argument(
        "--nj", type=recipe.positive, default=1, help="number of processes (%(default)s; on GPUs at most one each)"
    )
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT",
        help="audio, a folder of it (and of such folders), a Kaldi data directory, a manifest of Lhotse; or key=value, "
        "such as transcription.max_segment_s=15 or decoding.beam=4",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Write each transcript when it is done. Raises UserError in the end that names the inputs without one."""
    from zipperasr.decoding import inputs

    formats = list(itertools.takewhile(FORMATS.__contains__, args.formats))
    given = args.formats[len(formats) :] + args.inputs  # an input may stand right behind --format
    overrides = [text for text in given if text.startswith(OVERRIDABLE)]
    names = [text for text in given if text not in overrides]
    _check_arguments(args, formats, names)
    job = _job(args, formats, overrides)
    sources, failed = inputs.find(names)
    num_inputs = len(sources) + len(failed)
    _check_outputs(args.out, formats, sources)
    todo = _todo(sources, job, formats, args.out, failed)
    say_why = _say_why if num_inputs > 1 else lambda *_: None  # the error of the only one is the command's
    for name, error in failed.items():
        say_why(name, error)
    for source, found in _transcripts(list(todo), job, args.nj):
        if isinstance(found, UserError):
            failed[source.name] = found
            say_why(source.name, found)
        else:
            _write(source, found, formats, args.out, todo[source])
            _say(_summary(found))
    if failed and num_inputs == 1:
        raise next(iter(failed.values()))
    if failed:
        raise UserError(f"{len(failed)} of {num_inputs} inputs have no transcript: {', '.join(failed)}")


def _check_arguments(args: argparse.Namespace, formats: Sequence[str], names: Sequence[str]) -> None:
    if not formats:
        raise UserError(f"--format: '{args.formats[0]}' is unknown; known: {', '.join(FORMATS)}")
    if args.language != AUTO:
        languages.get(args.language)
    if not names:
        raise UserError("nothing to transcribe; name audio, a folder, a Kaldi data directory or a manifest")


def _check_outputs(out: Path | None, formats: Sequence[str], sources: Sequence["Source"]) -> None:
    if out is None and len(formats) > 1:
        raise UserError(f"--format {' '.join(formats)}: one format can be printed; name a directory with --out")
    if out is None and formats[0] in ("srt", "vtt") and len(sources) > 1:
        raise UserError(f"--format {formats[0]}: {len(sources)} inputs make as many files; name a directory with --out")
    if not out:
        return
    outputs: dict[str, Source] = {}
    for source in sources:
        if (other := outputs.setdefault(source.output, source)) != source:
            mend = "rename one, or give it an --out of its own"
            raise UserError(f"{source.name}: would be written over '{other.name}'; {mend}")
    try:  # now, not behind hours of audio
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except FileExistsError as error:
        raise UserError(f"--out {out}: a file, not a directory") from error
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); mend its name or permissions") from error


def _job(args: argparse.Namespace, formats: Sequence[str], overrides: Sequence[str]) -> "TranscriptionJob":
    whole = recipe.load_run(args.model, overrides=overrides, allowed=OVERRIDABLE)
    lang = None if args.language == AUTO else args.language
    job = recipe.transcription_job(args.model, whole, step=args.step, average=args.average, lang=lang)
    if lang and lang not in job.langs:
        _say(f"{args.model}: has not been trained on '{lang}', only on {', '.join(job.langs)}")
    if job.aligner is None and "ctm" in formats:
        raise UserError(f"--format ctm: {args.model} has no aligner of these weights; run zipperasr train-aligner")
    return job


def _todo(
    sources: Iterable["Source"], job: "TranscriptionJob", formats: Sequence[str], out: Path | None, failed: dict
) -> dict["Source", str]:
    """What is not done yet, with the key of its outputs; what is not there goes to `failed`."""
    todo = {}
    for source in sources:
        try:
            key = files.fingerprint([job.key, sorted(formats), source.digest, job.lang or source.lang])
        except UserError as error:
            failed[source.name] = error
            continue
        written = [out / f"{source.output}.{suffix}" for suffix in formats] if out else []
        if out and files.is_done(out, key, name=_marker(source)) and all(path.is_file() for path in written):
            _say(f"{source.name}: complete")
        else:
            todo[source] = key
    return todo


def _marker(source: "Source") -> str:
    return str((path := Path(source.output)).with_name(f".{path.name}.done"))


def _transcripts(todo: Sequence["Source"], job: "TranscriptionJob", nj: int):
    """As zipperasr.decoding.transcribe.transcribe, with a progress bar in seconds of audio."""
    if not todo:
        return
    recipe.bound_memory()
    from zipperasr.decoding.transcribe import transcribe

    total_s = sum(source.duration_s for source in todo) if len(todo) <= MAX_PROBED else None
    shape = "{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}, {rate_fmt}]" if total_s else None
    with tqdm(total=total_s, unit="s", bar_format=shape, disable=None) as bar:
        yield from transcribe(todo, job, nj=nj, on_progress=bar.update)


def _write(source: "Source", found: "Transcript", formats: Sequence[str], out: Path | None, key: str) -> None:
    from zipperasr.decoding.formats import FORMATS as WRITERS
    from zipperasr.decoding.formats import one_line

    if out is None:
        lines = {"txt": lambda: f"{found.file}\t{one_line(found)}\n", "json": lambda: f"{_compact(found)}\n"}
        print(lines[formats[0]]() if formats[0] in lines else WRITERS[formats[0]](found), end="", flush=True)
        return
    (out / _marker(source)).unlink(missing_ok=True)  # no longer what its key stands for
    for name in formats:
        with files.write(out / f"{source.output}.{name}") as stream:
            stream.write(WRITERS[name](found))
    files.mark_done(out, key, name=_marker(source))


def _compact(found: "Transcript") -> str:
    return json.dumps(found.to_dict(), ensure_ascii=False)


def _summary(found: "Transcript") -> str:
    """What was found out about an input, in a line."""
    sure = f" (probability {found.language_probability:.2f})" if found.language_probability is not None else ""
    parts = [f"{found.duration_s:.1f} s", "no speech" if "no_speech" in found.flags else f"{found.language}{sure}"]
    if (found.num_channels or 1) > 1:
        parts.append(f"the mean of {found.num_channels} channels")
    if "language_doubt" in found.flags:
        parts.append(f"but Whisper is sure that it is '{found.detected_language}'")
    return f"{found.file}: {', '.join(parts)}"


def _say_why(name: str, error: UserError) -> None:
    _say(f"no transcript: {error}" if name in str(error) else f"no transcript: {name}: {error}")


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
