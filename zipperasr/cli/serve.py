"""Serve a trained run over HTTP: OpenAI's API for transcriptions, metrics for Prometheus, and a web page.

What the environment variable ZIPPERASR_API_KEY holds is asked of every client but the page itself. SIGTERM and SIGINT
end the service when what is in flight is done.
"""

import argparse
import ipaddress
import os
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from zipperasr.cli import recipe
from zipperasr.errors import UserError

OVERRIDABLE = ("decoding.", "transcription.", "serving.")
API_KEY = "ZIPPERASR_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="RUN_DIR", help="config.yaml and checkpoints")
    parser.add_argument("--name", help="what clients call the model (default: as its directory)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=_port, default=8000, help="%(default)s; 0: any that is free")
    recipe.add_checkpoint_arguments(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as serving.max_upload_mb=500 or decoding.beam=4"
    )


def run(args: argparse.Namespace) -> None:
    """Serve until a signal ends it. Raises UserError where the run or the address cannot be had."""
    recipe.bound_memory()
    from zipperasr.serving import app, server
    from zipperasr.serving.metrics import Metrics

    token = os.environ.get(API_KEY)
    token = token and token.strip()  # a file that it comes from may end with a newline, which no header can have
    if token == "":
        raise UserError(f"{API_KEY}: it is set, but empty; give it a value, or unset it")
    whole = recipe.load_run(args.model, overrides=args.overrides, allowed=OVERRIDABLE)
    job = recipe.transcription_job(args.model, whole, step=args.step, average=args.average)
    name, metrics = args.name or args.model.resolve().name, Metrics()
    with server.bind(args.host, args.port) as bound:
        is_local = ipaddress.ip_address(bound.getsockname()[0]).is_loopback
        if not is_local and not token:
            print(
                f"whoever reaches {args.host} may use this service; set {API_KEY} to ask for a token", file=sys.stderr
            )
        from zipperasr.decoding.engine import Engine

        with (
            closing(Engine(job, checks_given=whole.serving.check_language, on_batch=metrics.on_batch)) as engine,
            tempfile.TemporaryDirectory(prefix="zipperasr-") as folder,
        ):
            created = int((args.model / "config.yaml").stat().st_mtime)
            service = app.Service(engine, whole.serving, name, created, Path(folder), metrics)
            greeting = f"serving {name} on {server.url(bound)} (Ctrl-C ends it)"
            server.serve(app.create(service, token=token, is_local=is_local), bound, whole.serving, greeting=greeting)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port, 0 to 65535")
    return int(text)
