"""The chat in a terminal, and text that is printed as it comes: `python sample.py --chat`.

A Talk is the conversation as the template renders it, and the state behind what is read of it. A
turn reads what is new and answers from there, so that a long chat costs no more than a short one.
"""

import contextlib
import importlib
import os
import select
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gosling import engine, weights
from gosling.answers import settled
from gosling.chat import is_blank
from gosling.config import UserError
from gosling.data import render_chat
from gosling.engine import TURNS, stream
from gosling.files import seen_from
from gosling.tokenizer import agree, recorded_tokenizer

N_LAST = 16  # ids of a turn that the engine reads itself, which sees from them how the turn ends
COMMANDS = {"/reset": False, "/save": True, "/load": True, "/help": False}  # whether with a file
HELP = '''\
/reset      begin again, where this chat began
/save FILE  keep the state of this chat in FILE, a .pth; --chat --state=FILE goes on from it
/load FILE  go on from such a file
/help       this list
A line that ends in \\ goes on in the next. Text between """ and """ may have many lines, and may
begin with /. Ctrl-C stops an answer, Ctrl-D ends the chat.'''
STYLES = {"user": "\033[36m", "name": "\033[1m", "thought": "\033[2m", "plain": "\033[0m"}


def utf8(text, name):
    """Text from a flag or the keyboard, where Python makes half characters of odd bytes -> UTF-8.

    UserError for what is not; in a locale that is not UTF-8, what is becomes whole again.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise UserError(f"{name}: {text!r:.60} is not UTF-8 text; convert or retype it") from None


def new_text(pieces, tokenizer, stop=()):
    """Yield (the text to show next, the Completion so far) of one sample, as it comes.

    A character whose bytes are not all there yet waits, and so does what may become a stop text.
    """
    shown = ""
    for _, completion in pieces:
        text = completion.text
        if not completion.finish_reason:
            text = settled(tokenizer.decode(completion.tokens), stop)
        if text.startswith(shown):
            yield text[len(shown) :], completion
            shown = text


def print_stream(pieces, tokenizer, stop=()):
    """Print one sample as it comes."""
    for text, _ in new_text(pieces, tokenizer, stop):
        print(text, end="", flush=True)
    print(flush=True)


def save_state(model, state, text, file, path, cfg):
    """Keep the state behind a text in a file, with what `load` needs to go on from it."""
    folder = Path(file).parent
    tokenizer = cfg.tokenizer
    if Path(tokenizer).is_file():
        tokenizer = seen_from(tokenizer, folder)
    weights.write_state(
        state,
        file,
        model=seen_from(path, folder),
        fingerprint=weights.fingerprint(model),
        prompt=text,
        tokenizer=tokenizer,
    )


# ----------------------------------------------------------------------------------------------
# the chat


class Typed(NamedTuple):
    text: str  # of one turn; it may have several lines
    is_command: bool


@dataclass
class Talk:
    """A chat so far, as the template renders it: ids, and the state after those that are read."""

    opening: list  # messages before the next turn that are not read yet
    state: dict | None = None  # after ids[:n_read]; None = the initial state
    ids: list = field(default_factory=list)  # read or to be read since the chat or its state began
    n_read: int = 0


def styles_for(stream, environment):
    """{name: escape sequence}, all empty but on a terminal, and with NO_COLOR set."""
    is_plain = environment.get("NO_COLOR") or environment.get("TERM") == "dumb"
    if is_plain or not stream.isatty():
        return dict.fromkeys(STYLES, "")
    return STYLES


def read_line(prompt):
    """A line as typed, None at the end. One that is not UTF-8 is asked for again."""
    while True:
        try:
            return utf8(input(prompt), "this line")
        except EOFError:
            return None
        except UserError as e:
            print(f"\nerror: {e}", file=sys.stderr)


def is_more_waiting():
    """Whether a terminal has another line already: those of a paste come at once."""
    if os.name == "nt" or not sys.stdin.isatty():
        return False
    ready, _, _ = select.select([sys.stdin], [], [], 0.05)
    return bool(ready)


def read_turn(read=read_line, is_more=is_more_waiting):
    """A turn or a command -> Typed; None at the end of what is typed."""
    line = read("User: ")
    if line is None:
        return None
    if line.lstrip().startswith('"""'):
        return Typed(read_block(line.lstrip().removeprefix('"""'), read), False)
    if line.startswith("/") and "\n" not in line:
        return Typed(line.strip(), True)
    text, is_pasted = line, is_more()
    while is_pasted or text.endswith("\\"):
        text = text if is_pasted else text.removesuffix("\\")
        line = read("... ")
        if line is None:
            break
        text += "\n" + line
        is_pasted = is_more()
    return Typed(text, False)


def read_block(line, read):
    """The lines up to one that ends in three double quotes, or to the end of what is typed."""
    lines = []
    while line is not None and not line.rstrip().endswith('"""'):
        lines.append(line)
        line = read("... ")
    if line is not None:
        lines.append(line.rstrip().removesuffix('"""'))
    return "\n".join(lines)


def catch_up(model, talk, ids):
    """Read what is still to be read of a chat, and `ids` after it -> the state behind them."""
    unread = talk.ids[talk.n_read :] + ids
    if not unread:
        return talk.state
    return engine.prefill(model, [unread], talk.state)[1]


def answer(model, tokenizer, talk, text, options, think):
    """Answer a turn; the chat then holds both as the template renders them, and nothing else.

    Ctrl-C ends the answer where it is. Without an answer the chat is as it was before the turn.
    """
    messages = [*talk.opening, {"role": "user", "content": text}]
    ids, _ = render_chat(messages, tokenizer, generation_prompt=True)
    begun, _ = render_chat(messages, tokenizer, generation_prompt=True, think=think)
    n_reply, n_last = len(begun) - len(ids), min(len(ids), N_LAST)
    reply = tokenizer.decode(begun[len(ids) :])
    styles, note, has_text = styles_for(sys.stdout, os.environ), "", False
    print(f"\n{styles['name']}Assistant:{styles['plain']}", end="")
    print(f"{styles['thought']}{reply}{styles['plain']}", end="", flush=True)
    try:
        before = catch_up(model, talk, ids[:-n_last])
        pieces = stream(model, [begun[-n_last - n_reply :]], state=before, **options)
        for piece, completion in new_text(pieces, tokenizer, options["stop"]):
            reply, has_text = reply + piece, has_text or not is_blank(piece)
            if reply.rfind("<think") > reply.rfind("</think>"):
                piece = f"{styles['thought']}{piece}{styles['plain']}"
            print(piece, end="", flush=True)
            if completion.finish_reason == "length":
                note = f"(cut off: --max_new_tokens={options['max_new_tokens']})"
    except KeyboardInterrupt:
        note = "(stopped)"
    if not has_text:
        note = "(no answer; the chat is as it was before this turn)"
    print(f"\n{styles['thought']}{note}{styles['plain']}\n" if note else "\n")
    if not has_text:
        return
    # The reply is read again as the template has it, without what was generated and not shown. It
    # ends in the blank line that comes before another turn.
    messages.append({"role": "assistant", "content": reply})
    rendered = render_chat(messages, tokenizer)[0][:-1] + tokenizer.encode("\n\n")
    talk.n_read = len(talk.ids) + len(ids) - n_last
    talk.state, talk.ids, talk.opening = before, talk.ids + rendered, []


def check_state_name(file):
    """UserError for a file that is not to be written over with a state, or by the .json beside."""
    note = Path(file).with_suffix(".json")
    if Path(file).suffix != ".pth":
        raise UserError(f"{file}: a state is kept in a file whose name ends in .pth")
    if Path(file).exists():
        weights.read_state(file)  # which says what it is if it is no state
    elif note.exists():
        raise UserError(f"{note} is there, and no state it belongs to; give another name")


def save_talk(model, tokenizer, talk, file, path, cfg):
    """/save"""
    if talk.opening or not (talk.ids or talk.state):
        raise UserError("nothing was said yet")
    check_state_name(file)
    talk.state, talk.n_read = catch_up(model, talk, []), len(talk.ids)
    save_state(model, talk.state, tokenizer.decode(talk.ids), file, path, cfg)
    print(f"{file}: the state of this chat")


def load_talk(model, tokenizer, file, path, cfg):
    """/load -> Talk"""
    state, about = weights.read_state(file, model.config)
    weights.check_base(file, about, model, path, cfg.another_base)
    recorded = recorded_tokenizer(file, 0, tokenizer.name, about)
    agree({"this chat": tokenizer, file: recorded})
    print(f"{file}: the chat goes on from it")
    return Talk([], {key: value.to(model.emb.weight.device) for key, value in state.items()})


def read_command(line):
    """-> (command, its file or ""); UserError for what is no command."""
    word, _, rest = line.partition(" ")
    if word not in COMMANDS:
        raise UserError(
            f'{word}: no such command, /help lists them; text that begins with / goes between """'
        )
    if COMMANDS[word] != bool(rest.strip()):
        expected = "a file" if COMMANDS[word] else "nothing"
        raise UserError(f"{word} takes {expected} behind it")
    return word, os.path.expanduser(rest.strip())


def chat(model, tokenizer, cfg, options, state=None, path=""):
    """Turns in, turns out, to the end of what is typed. A mistake is a line, and the chat goes on.

    path: the model's file, for /save and /load.
    """
    opening = [{"role": "system", "content": cfg.system}] if cfg.system else []
    options = {**options, "stop": TURNS + cfg.stop}
    styles = styles_for(sys.stdout, os.environ)
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # Windows has none
            importlib.import_module("readline")  # gives input() a history, and takes pastes whole
        print(f"{styles['thought']}/help lists the commands, Ctrl-D ends.{styles['plain']}\n")
    talk = Talk(opening, state)
    while True:
        print(styles["user"], end="", flush=True)
        try:
            typed = read_turn()
        finally:
            print(styles["plain"], end="", flush=True)
        if typed is None:
            print()
            return
        try:
            if not typed.is_command:
                if typed.text.strip():
                    answer(model, tokenizer, talk, typed.text, options, cfg.think)
                continue
            word, file = read_command(typed.text)
            if word == "/reset":
                talk = Talk(opening, state)
                print("The chat begins again.")
            elif word == "/save":
                save_talk(model, tokenizer, talk, file, path, cfg)
            elif word == "/load":
                talk = load_talk(model, tokenizer, file, path, cfg)
            else:
                print(HELP)
        except UserError as e:
            print(f"error: {' '.join(str(e).splitlines())}", file=sys.stderr)
