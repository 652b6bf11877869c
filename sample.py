"""Text from a model: continue a prompt, several prompts at once, or chat.

    python sample.py --model=out/pretrain_tiny/rwkv-final.pth --prompt="def "
    python sample.py --model=weights/rwkv7-g1a-1.5b-20250922-ctx4096.pth --chat
    python sample.py --model=... --prompts=prompts.txt --n=4 --temperature=0.8 --top_p=0.9
    python sample.py --state=none --state=out/state/state-final.pth --prompt="..."
    python sample.py --model=... --prompt="a long text" --save_state=cache.pth
    python sample.py batch in.jsonl out.jsonl --model=... --n=4
    python sample.py --model=... --state=none --state=out/state/state-final.pth --serve

Several states answer side by side. A state that is saved after a prompt, or by /save in a chat, is
one that --state goes on from. G1 models think first with --think=on, and answer at once with
--think=off. batch writes each row again, with "completions"; killed and run again, it goes on. What
the rows are made with stands in out.jsonl.json. --serve is a page to chat with each state and
OpenAI's API, for trying a model, not for production; it samples as the flags say, where a request
does not. No compiler is needed, and a CPU is enough. gosling/engine.py does the work.
"""

import contextlib
import importlib
import json
import os
import re
import select
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from gosling import engine, weights
from gosling.answers import score_choices, settled
from gosling.chat import is_blank
from gosling.config import UserError, read_flags
from gosling.data import read_jsonl, render_chat, render_prompt
from gosling.engine import TURNS, generate, stream
from gosling.files import digest, locked, read_json, read_text, seen_from, whole_lines, write_json
from gosling.processes import pick_device
from gosling.rows import holds_rows
from gosling.serve import serve
from gosling.tokenizer import agree, recorded_tokenizer

import tyro
from pydantic import Field
from tqdm import tqdm

__all__ = ["generate", "score_choices"]  # imported from here by code outside this repository

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}  # what --escape makes of a letter after a \

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]  # a flag that may be given several times


@dataclass
class Config(engine.Sampling):
    model: str = ""  # weights, a LoRA or a state; empty = the one that the state was tuned on
    prompt: str = ""  # text to continue
    prompts: str = ""  # file with a prompt a line, or .jsonl with {"prompt": text or messages}
    chat: bool = False  # talk; Ctrl-D ends, /help lists the commands
    system: str = ""  # chat: a system turn to begin with
    think: Literal["", "on", "off"] = ""  # chat: begin replies as G1 models do that think, or not
    stop: Repeated = ()  # text that ends a sample; repeated: any of them
    escape: bool = False  # read \n, \t, \r and \\ in prompt, system and stop as in Python
    state: Repeated = ()  # tuned state; repeated: side by side; "none" is one too
    serve: bool = False  # a page to chat, and OpenAI's API under /v1; to try a model
    host: str = "127.0.0.1"  # serve: the address to listen on; 0.0.0.0 = any, for all who reach it
    port: Annotated[int, Field(ge=0, le=65535)] = 8000  # serve: 0 = a free one
    save_state: str = ""  # keep the state after the prompt in this file, and stop
    another_base: bool = False  # an adapter or state of another base than this is meant
    tokenizer: str = ""  # name or file; empty = the one recorded with the model or the state
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; auto = bfloat16 on CUDA


@dataclass(kw_only=True)
class BatchConfig(Config):
    rows: tyro.conf.Positional[str]  # .jsonl, a row a line
    out: tyro.conf.Positional[str]  # .jsonl, the same rows with "completions"; it goes on with it
    column: str = "prompt"  # the column with the prompt: text, or a list of messages
    logprobs: bool = False  # also write tokens and their log-probabilities


def utf8(text, name):
    """Text from a flag or the keyboard, where Python makes half characters of odd bytes -> UTF-8.

    UserError for what is not; in a locale that is not UTF-8, what is becomes whole again.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise UserError(f"{name}: {text!r:.60} is not UTF-8 text; convert or retype it") from None


def read_texts(cfg):
    """cfg with the texts of its flags as they are meant; says once if a \\n in them is literal."""
    texts = {"prompt": [cfg.prompt], "system": [cfg.system], "stop": list(cfg.stop)}
    texts = {name: [utf8(text, f"--{name}") for text in found] for name, found in texts.items()}
    if cfg.escape:
        for name, found in texts.items():
            texts[name] = [re.sub(r"\\([ntr\\])", lambda m: ESCAPES[m[1]], text) for text in found]
    literal = [f"--{name}" for name, found in texts.items() if any("\\n" in text for text in found)]
    if literal and not cfg.escape:
        print(
            f"{', '.join(literal)}: \\n is a backslash and an n; --escape makes it a line end",
            file=sys.stderr,
        )
    (prompt,), (system,) = texts["prompt"], texts["system"]
    return replace(cfg, prompt=prompt, system=system, stop=tuple(texts["stop"]))


def check_without_chat(cfg):
    """UserError for a flag that only a chat reads."""
    for name in ("system", "think"):
        if getattr(cfg, name):
            raise UserError(f"--{name} is for --chat; add it, or leave --{name} out")


def load(cfg):
    """-> (model, tokenizer, {name: state or None}, the model's file) of the command line.

    A state says in the file beside it which model and which tokenizer it was tuned with.
    """
    names = cfg.state or ("none",)
    described = {name: weights.read_state(name)[1] for name in names if name != "none"}
    origin = next((name for name, about in described.items() if about), names[0])
    about = described.get(origin, {})
    path = cfg.model or weights.base_of("" if origin == "none" else origin, about)
    tokenizer = cfg.tokenizer or about.get("tokenizer", "")
    if not cfg.tokenizer and (Path(origin).parent / tokenizer).is_file():
        tokenizer = str(Path(origin).parent / tokenizer)
    device, dtype = pick_device(cfg)
    try:
        model, tokenizer, _ = engine.load(path, device, dtype, tokenizer, cfg.another_base)
    except UserError as e:
        said_by = f"{origin}, which says what it was tuned on: " if about else ""
        raise UserError(f"{said_by}{e}") from e
    states = dict.fromkeys(names)
    for name, about in described.items():
        state, _ = weights.read_state(name, model.config)
        states[name] = {key: value.to(device) for key, value in state.items()}
        if about.get("fingerprint") not in (None, weights.fingerprint(model)):
            print(
                f"warning: {name} was tuned on {about.get('model')}, and {path} has other weights",
                file=sys.stderr,
            )
    return model, tokenizer, states, path


def read_prompts(path, tokenizer, column="prompt"):
    """-> [(prompt_ids, row)] of a .jsonl file, or of a text file, whose lines are the prompts."""

    def render(row):
        if column not in row:
            raise UserError(f"no {column!r} in it; its keys are {sorted(row)}")
        json.dumps(row, ensure_ascii=False).encode()  # half a character in any column is an error
        if row[column] == "":
            return [tokenizer.end_id], row
        return render_prompt(row[column], tokenizer), row

    if holds_rows(path):
        return [prompt for _, prompt in read_jsonl(path, f'{{"{column}": "..."}}', render)]
    lines = [line.rstrip("\r") for line in read_text(path).split("\n")]
    return [render({column: line}) for line in lines if line.strip()]


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


# ----------------------------------------------------------------------------------------------
# chat

COMMANDS = {"/reset": False, "/save": True, "/load": True, "/help": False}  # whether with a file
HELP = '''\
/reset      begin again, where this chat began
/save FILE  keep the state of this chat in FILE, a .pth; --chat --state=FILE goes on from it
/load FILE  go on from such a file
/help       this list
A line that ends in \\ goes on in the next. Text between """ and """ may have many lines, and may
begin with /. Ctrl-C stops an answer, Ctrl-D ends the chat.'''
STYLES = {"user": "\033[36m", "name": "\033[1m", "thought": "\033[2m", "plain": "\033[0m"}


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
    reply = tokenizer.decode(begun[len(ids) :])
    styles, note, has_text = styles_for(sys.stdout, os.environ), "", False
    print(f"\n{styles['name']}Assistant:{styles['plain']}", end="")
    print(f"{styles['thought']}{reply}{styles['plain']}", end="", flush=True)
    try:
        before = catch_up(model, talk, ids[:-1])
        pieces = stream(model, [ids[-1:] + begun[len(ids) :]], state=before, **options)
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
    talk.n_read = len(talk.ids) + len(ids) - 1
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


def in_order(pieces, n):
    """Of a stream, the n completions of each prompt, once they and all before them are done."""
    finished, prompt = {}, 0
    for number, completion in pieces:
        if completion.finish_reason:
            finished[number] = completion
        while all(prompt * n + sample in finished for sample in range(n)):
            yield [finished.pop(prompt * n + sample) for sample in range(n)]
            prompt += 1


def count_done(cfg, rows):
    """How many rows cfg.out has already; UserError if its lines are not those of these rows."""
    lines = whole_lines(cfg.out)
    for number, line in enumerate(lines, 1):
        completions = line.get("completions") if isinstance(line, dict) else None
        has_n = isinstance(completions, list) and len(completions) == cfg.n
        wanted = {**rows[number - 1], "completions": completions} if number <= len(rows) else None
        if not has_n or line != wanted:
            raise UserError(
                f"{cfg.out}:{number} is not row {number} of {cfg.rows} with {cfg.n} completions; "
                "give another file to write"
            )
    return len(lines)


def made_with(cfg, tokenizer, path):
    """What a batch's completions follow from, beside its rows: {name: value}."""
    free = ("prompt", "prompts", "chat", "system", "escape", "save_state", "batch_size", "device")
    free += ("think", "rows", "out")
    about = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in free}
    states = [name if name == "none" else digest(name) for name in cfg.state or ("none",)]
    files = {"model": digest(path), "state": states, "tokenizer": f"digest {tokenizer.digest}"}
    return {**about, **files, "stop": list(cfg.stop)}


def keep_or_compare(cfg, about, n_done):
    """Write what a new output is made with beside it; UserError if one that grows has another.

    An output without that note is gone on with as it is.
    """
    path = f"{cfg.out}.json"
    if n_done == 0:
        write_json(path, about)
        return
    before = read_json(path)
    for key, value in before.items():
        if key in about and value != about[key]:
            raise UserError(
                f"{cfg.out} was made with {key}={value!r:.200}, and this is {key}={about[key]}; "
                f"give another file to write, or the settings in {path}"
            )


def complete(cfg, model, tokenizer, state, prompts, n_done):
    """Append the rows from number n_done on, with their completions."""
    rows, options = [row for _, row in prompts], options_of(cfg, tokenizer)
    if any(isinstance(row[cfg.column], list) for row in rows):
        options["stop"] = cfg.stop + TURNS
    numbers, prompt_ids = range(n_done, len(rows)), [ids for ids, _ in prompts[n_done:]]
    pieces = stream(model, prompt_ids, n=cfg.n, indices=numbers, state=state, **options)
    with open(cfg.out, "a", encoding="utf-8", newline="\n") as f:
        bar = tqdm(
            in_order(pieces, cfg.n), total=len(rows), initial=n_done, unit="row", disable=None
        )
        for row, completions in zip(rows[n_done:], bar, strict=True):
            written = [as_row(completion, cfg.logprobs) for completion in completions]
            f.write(json.dumps({**row, "completions": written}, ensure_ascii=False) + "\n")
            f.flush()


def batch(cfg):
    """Rows of a JSONL file with their completions beside them, in order.

    The output says how far it is: killed at any moment, the next run goes on behind its last line.
    """
    cfg = read_texts(cfg)
    check_without_chat(cfg)
    model, tokenizer, states, path = load(cfg)
    if len(states) > 1:
        raise UserError("batch takes one --state")
    (state,) = states.values()
    prompts = read_prompts(cfg.rows, tokenizer, cfg.column)
    rows = [row for _, row in prompts]
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.out).touch()
    with locked(cfg.out):
        n_done = count_done(cfg, rows)
        keep_or_compare(cfg, made_with(cfg, tokenizer, path), n_done)
        complete(cfg, model, tokenizer, state, prompts, n_done)
    before = f", {n_done} of them from before" if n_done else ""
    print(f"{cfg.out}: {len(rows)} rows{before}")


def as_row(completion, logprobs):
    """What batch writes of a completion."""
    row = {"text": completion.text, "finish_reason": completion.finish_reason}
    if logprobs:
        row["tokens"] = completion.tokens
        row["logprobs"] = [round(logprob, 4) for logprob in completion.logprobs]
    return row


def options_of(cfg, tokenizer):
    """The keywords of `stream`, all but n."""
    options = {field.name: getattr(cfg, field.name) for field in fields(engine.Sampling)}
    del options["n"]
    return {**options, "tokenizer": tokenizer}


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


def main(cfg):
    cfg = read_texts(cfg)
    if not cfg.chat:
        check_without_chat(cfg)
    elif cfg.prompt or cfg.prompts or cfg.save_state or cfg.n > 1:
        raise UserError(
            "--chat goes without --prompt, --prompts, --n and --save_state; type what you would "
            "say, and /save FILE"
        )
    if cfg.save_state:
        check_state_name(cfg.save_state)
    model, tokenizer, states, path = load(cfg)
    options = options_of(cfg, tokenizer)
    engine.complete(model, [], engine.Options(**options))  # a mistake comes before any output
    if cfg.serve:
        if cfg.prompt or cfg.prompts or cfg.chat or cfg.system or cfg.save_state or cfg.n > 1:
            raise UserError("--serve takes no prompt, chat, system, save_state or n; requests do")
        name = Path(path).stem
        models = {name if of == "none" else f"{name}:{of}": state for of, state in states.items()}
        serve(model, models, options, cfg.host, cfg.port)
        return
    if cfg.prompts:
        prompts = read_prompts(cfg.prompts, tokenizer)
    else:
        prompts = [(tokenizer.encode(cfg.prompt) or [tokenizer.end_id], {"prompt": cfg.prompt})]
    prompt_ids = [ids for ids, _ in prompts]
    texts = []
    for ids, row in prompts:
        text = row["prompt"]
        texts.append(text if isinstance(text, str) else tokenizer.decode(ids))
    if (cfg.chat or cfg.save_state) and (len(states) > 1 or len(prompts) > 1):
        raise UserError("--chat and --save_state take one prompt and one --state")
    if cfg.save_state:
        _, state = engine.prefill(model, prompt_ids, *states.values())
        save_state(model, state, texts[0], cfg.save_state, path, cfg)
        print(f"{cfg.save_state}: the state after {len(prompt_ids[0])} tokens")
        return
    if cfg.chat:
        chat(model, tokenizer, cfg, options, *states.values(), path)
        return
    for name, state in states.items():
        if len(states) > 1:
            print(f"=== state {name}")
        if len(prompts) * cfg.n == 1:
            print(texts[0], end="", flush=True)
            print_stream(stream(model, prompt_ids, state=state, **options), tokenizer, cfg.stop)
            continue
        completions = generate(model, prompt_ids, n=cfg.n, state=state, **options)
        for number, completion in enumerate(completions):
            p, sample = divmod(number, cfg.n)
            print(f"--- prompt {p + 1}, sample {sample + 1}, {completion.finish_reason}")
            print(f"{texts[p]}{completion.text}", flush=True)


if __name__ == "__main__":
    # In any locale; what is typed and is not UTF-8 comes in halves of characters, see utf8.
    if sys.stdin:
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        if sys.argv[1:2] == ["batch"]:
            batch(read_flags(BatchConfig, sys.argv[2:]))
        else:
            main(read_flags(Config))
    except KeyboardInterrupt:
        print()
        sys.exit(130)
