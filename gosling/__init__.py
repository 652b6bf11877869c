"""Plumbing that a reader of the training scripts can skip."""

import sys


def quiet_interrupt(kind, error, traceback):
    """sys.excepthook until a command reads its settings: Ctrl-C while torch is imported is a line.

    The commands import gosling before torch, whose import takes seconds.
    """
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = quiet_interrupt
