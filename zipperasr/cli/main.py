"""The table of verbs. A verb is a module of this package with `add_arguments(parser)` and `run(args)`.

Only the module of the verb in use is imported, and it imports torch and the like inside `run`, so that help is instant.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence

from zipperasr import files
from zipperasr.errors import AlreadySaid, UserError

VERBS = {
    "check-config": "check a configuration and print it whole",
    "doctor": "look at machine, data, disk, memory and time before anything is run",
    "show": "print what a configuration names: corpora, sets, methods, pretrained models",
    "validate": "check manifests and say every defect with its utterance id",
    "lists": "write the fixed utterance lists of every setting",
    "data": "print Table I: hours and utterances of every list, beside the paper's figures",
    "features": "precompute log-mel features",
    "train": "train stage 1 or stage 2",
    "add-language": "give a trained stage-2 run another language, and leave the others as they are",
    "decode": "transcribe sets with a trained run",
    "train-aligner": "train a character CTC head on a finished run, for word times",
    "align": "word times and confidences of decoded sets",
    "transcribe": "text or subtitles of audio files of any length, with a trained run",
    "serve": "an HTTP service with a trained run, as OpenAI's API, and a web page",
    "score": "word or character error rates of decode directories",
    "compare": "whether one system's error rate differs from another's, and where",
    "report": "one page about every scored run, with tables and figures",
    "inspect": "print what a checkpoint holds: parameters, languages, shares of specific ranks",
    "export": "write a run in the formats of transformers and PEFT",
    "to-kaldi": "write sets as Kaldi data directories, which ESPnet reads too",
    "bench": "time this code beside what it is compared with",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit status: 0, 1 for what the user can mend, 2 for wrong usage, 130 if interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_help(), flush=True)
            return 0 if argv else 2
        return _run(argv[0], argv[1:])
    except AlreadySaid:
        return 1
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to go on", status=130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has left
        return 1
    except Exception as error:
        if not any(files.is_disk_full(cause) for cause in _causes(error)):
            raise
        return _fail(f"the disk is full ({error}); free some space and run the same command again")


def _run(verb: str, argv: list[str]) -> int:
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(VERBS)}"
        raise UserError(f"unknown verb '{verb}'; {hint}")
    module = importlib.import_module(f"zipperasr.cli.{verb.replace('-', '_')}")
    parser = argparse.ArgumentParser(prog=f"zipperasr {verb}", description=module.__doc__)
    module.add_arguments(parser)
    return module.run(parser.parse_intermixed_args(argv)) or 0


def _help() -> str:
    rows = "\n".join(f"  {verb:<14}{meaning}" for verb, meaning in VERBS.items())
    return f"usage: zipperasr <verb> [options]\n\n{rows}\n\n`zipperasr <verb> --help` lists a verb's options."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _fail(message: str, *, status: int = 1) -> int:
    print(f"zipperasr: error: {message}", file=sys.stderr)
    return status
