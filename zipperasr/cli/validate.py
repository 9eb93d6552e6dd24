"""Check the manifests of a configuration's corpora; stop on utterances that the recipe cannot use."""

import argparse
from pathlib import Path

from zipperasr.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conf", required=True, help="YAML file; its corpora are checked")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds manifests/")
    parser.add_argument("--drop", action="store_true", help="leave defective utterances out of the manifests")
    parser.add_argument("--nj", type=int, default=1, help="number of processes (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values laid over the file")


def run(args: argparse.Namespace) -> None:
    """Print a counted table and write every defect to manifests/defects.tsv. Raises UserError on fatal ones."""
    from zipperasr import files
    from zipperasr.cli import recipe
    from zipperasr.data import manifests

    corpora = recipe.load(args.conf, overrides=args.overrides).corpora
    found = manifests.find(args.data_dir, {name: corpus.langs for name, corpus in corpora.items()})
    directory = args.data_dir / "manifests"
    if files.is_done(directory, manifests.fingerprint(found)):
        print(f"{directory}: complete, {len(found)} valid manifests")
        return
    report = manifests.validate(found, nj=args.nj)
    table = directory / "defects.tsv"
    manifests.write_defects(table, report.defects)
    print(report.table())
    if report.fatal and args.drop:
        manifests.drop(found, report)
        table.replace(directory / "dropped.tsv")
        print(f"dropped the utterances with fatal defects: {directory / 'dropped.tsv'}")
    elif report.fatal:
        for name in {defect.set for defect in report.fatal}:
            (directory / manifests.marker(name)).unlink(missing_ok=True)  # stage 1 prepares it again
        named = ", ".join(f"{d.utt_id} ({d.kind}, {d.set})" for d in report.fatal[:3])
        raise UserError(
            f"{len(report.fatal)} fatal defects: {named}{' ...' if len(report.fatal) > 3 else ''}; all are in {table}; "
            "mend the corpus and run stage 1 again, or leave them out with `zipperasr validate --drop`"
        )
    files.mark_done(directory, manifests.fingerprint(found))
