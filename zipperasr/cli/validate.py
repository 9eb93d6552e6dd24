"""Check the manifests of a configuration's corpora; stop on utterances that the recipe cannot use."""

import argparse
from pathlib import Path

from zipperasr.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conf", required=True, help="YAML file; its corpora are checked")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds manifests/")
    parser.add_argument("--drop", action="store_true", help="go on without the utterances of fatal defects")
    parser.add_argument("--audio", action="store_true", help="read the audio files of prepared sets again too")
    parser.add_argument("--nj", type=int, default=1, help="number of processes (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values laid over the file")


def run(args: argparse.Namespace) -> None:
    """Write manifests/REPORT.md, and every defect found to manifests/defects.tsv. Raises UserError on fatal ones."""
    from zipperasr import files
    from zipperasr.cli import recipe
    from zipperasr.data import defects, manifests, validation

    corpora = recipe.load(args.conf, overrides=args.overrides).corpora
    paths = manifests.find(args.data_dir, {name: corpus.langs for name, corpus in corpora.items()})
    directory = args.data_dir / "manifests"
    if files.is_done(directory, validation.fingerprint(paths)) and not args.audio:
        print(f"{directory}: complete, {len(paths)} valid manifests")
        return
    tallies, found = validation.validate(paths, nj=args.nj, read_audio=args.audio)
    fatal = validation.fatal(tallies, found)
    with defects.log(directory / "defects.tsv") as log:
        for one in found:
            log(one.defect)
    if args.drop:
        validation.drop(paths, tallies, found)
    for one in found:
        if not (args.drop and one.is_fatal):  # those are in the tally by now
            tallies[one.defect.set].add(one.defect.kind, one.defect.utt_id)
    text = defects.report(tallies)
    with files.write(directory / "REPORT.md") as stream:
        stream.write(text)
    print(text, end="")
    if fatal and not args.drop:
        for name in {defect.set for defect in fatal}:
            (directory / manifests.marker(name)).unlink(missing_ok=True)  # stage 1 prepares it again
        named = ", ".join(f"{d.utt_id} ({d.kind}, {d.set})" for d in fatal[:3])
        raise UserError(
            f"{len(fatal)} fatal defects: {named}{' ...' if len(fatal) > 3 else ''}; {directory / 'REPORT.md'} counts "
            f"them, {directory}/*defects.tsv name them; mend the corpus and run stage 1 again, or go on without these "
            "utterances: `zipperasr validate --drop`"
        )
    files.mark_done(directory, validation.fingerprint(paths))
