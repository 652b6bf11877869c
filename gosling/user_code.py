"""The border to the user's Python, and to signals.

A function of a config file may raise, hang, end the process, or leave PyTorch in another mode. Here
that becomes one line, in time, and training goes on as if nothing had been touched.
"""

import asyncio
import contextlib
import functools
import inspect
import os
import select
import signal
import threading

from gosling.config import UserError, failure

import torch

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if name in dir(signal)]


class Interrupt(BaseException):
    """Raised within a function of the user's: its time is over, or a signal came.

    No `except Exception` of the user's catches it.
    """


received = []  # numbers of the signals that came in an open catch_signals
calls = []  # what of the user's runs now


# ----------------------------------------------------------------------------------------------
# signals


@contextlib.contextmanager
def catch_signals():
    """SIGTERM, Ctrl-C and SIGHUP as a list that the loop reads between steps, to save first.

    A second Ctrl-C interrupts at once; a function of the user's ends with the first signal. Outside
    the main thread (notebooks) signals are left alone, and SIGHUP under nohup.
    """
    before = {}
    received.clear()

    def handler(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        name = signal.Signals(number).name
        say(f"\n{name}: finishing this step, then saving\n")
        if calls:
            raise Interrupt(f"was ended by {name}")

    with contextlib.suppress(ValueError):
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                before[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        received.clear()
        for number, old_handler in before.items():
            signal.signal(number, old_handler)


def say(text):
    """Text on stderr, of rank 0, past Python's buffers: a handler may run amid a print of the loop.

    Nothing is written where that would block, as in a pager.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        with contextlib.suppress(OSError, ValueError):
            if os.name != "posix" or select.select([], [2], [], 0)[1]:
                os.write(2, text.encode())


# ----------------------------------------------------------------------------------------------
# functions


def call(what, function, seconds=None, /, *args, **kwargs):
    """function(*args, **kwargs) -> what it returns; an async function is awaited.

    UserError, "`what` failed: …", for whatever it raises, sys.exit included, and if it takes longer
    than `seconds`; the exception itself is its cause. Ctrl-C outside of catch_signals goes through.
    """
    calls.append(what)
    try:
        with as_before(), time_limit(seconds):
            returned = function(*args, **kwargs)
            return wait_for(returned) if inspect.isawaitable(returned) else returned
    except (KeyboardInterrupt, UserError):
        raise
    except Interrupt as e:
        raise UserError(f"{what} {e}") from None
    except BaseException as e:
        raise UserError(f"{what} failed: {failure(e)}") from e
    finally:
        calls.pop()


@contextlib.contextmanager
def as_before():
    """Gradients on or off, the default dtype and the working folder, afterwards as they were."""
    with_grad, dtype, folder = torch.is_grad_enabled(), torch.get_default_dtype(), os.getcwd()
    try:
        yield
    finally:
        torch.set_grad_enabled(with_grad)
        torch.set_default_dtype(dtype)
        os.chdir(folder)


@contextlib.contextmanager
def time_limit(seconds):
    """Interrupt in the code within, if it takes longer; None, another thread, Windows: no limit.

    A timer of its own, and not SIGALRM, which libraries of rewards use themselves.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if seconds is None or not in_main_thread or not hasattr(signal, "SIGVTALRM"):
        yield
        return

    def end(number, frame):
        raise Interrupt(f"took longer than {seconds:g} s, its limit")

    before = signal.signal(signal.SIGVTALRM, end)
    to_this_thread = (threading.get_ident(), signal.SIGVTALRM)
    timer = threading.Timer(seconds, signal.pthread_kill, to_this_thread)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # no signal comes after this line
        signal.signal(signal.SIGVTALRM, before)


def wait_for(awaitable):
    """What an awaitable of the user's gives; it runs in the loop of all of them."""
    future = asyncio.run_coroutine_threadsafe(as_coroutine(awaitable), event_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def as_coroutine(awaitable):
    return await awaitable


@functools.cache
def event_loop():
    """The loop of all async functions, in a thread: clients can keep connections between calls."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop
