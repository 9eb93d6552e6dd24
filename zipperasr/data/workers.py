"""Processes that do a share of another one's work."""

import multiprocessing
import os
import signal
import sys
import threading


def begin() -> None:
    """Make this process a worker: it has one thread for torch, and ends at Ctrl-C or when its parent has gone.

    Whoever needs torch imports it before the fork.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    end_with_parent()


def end_with_parent() -> None:
    """Let this process end at Ctrl-C, and when the one that started it has gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
