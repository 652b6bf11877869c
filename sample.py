"""Text from a model: continue a prompt, several prompts at once, or chat.

    python sample.py --model=out/pretrain_tiny/rwkv-final.pth --prompt="def "
    python sample.py --model=weights/rwkv7-g1a-1.5b-20250922-ctx4096.pth --chat
    python sample.py --model=... --prompts=prompts.txt --n=4 --temperature=0.8 --top_p=0.9
    python sample.py --state=none --state=out/state/state-final.pth --prompt="..."
    python sample.py --model=... --prompt="a long text" --save_state=cache.pth
    python sample.py batch in.jsonl out.jsonl --model=... --n=4
    python sample.py --model=... --prompt="A fox as JSON:" --json_schema=schema.json
    python sample.py --model=... --state=none --state=out/state/state-final.pth --serve

Several states answer side by side. A state that is saved after a prompt, or by /save in a chat, is
one that --state goes on from. G1 models think first with --think=on, and answer at once with
--think=off. batch writes each row again, with "completions"; killed and run again, it goes on. What
the rows are made with stands in out.jsonl.json. --serve is a page to chat with each state and
OpenAI's API, for trying a model, not for production; it samples as the flags say, where a request
does not. No compiler is needed, and a CPU is enough. gosling/engine.py does the work.
"""

import json
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from gosling import engine, weights
from gosling.answers import score_choices
from gosling.config import UserError, read_flags, warn
from gosling.data import read_jsonl, render_prompt
from gosling.engine import TURNS, generate, stream
from gosling.files import digest, locked, read_json, read_text, whole_lines, write_json
from gosling.grammar import read_schema
from gosling.processes import pick_device
from gosling.rows import holds_rows
from gosling.terminal import chat, check_state_name, print_stream, save_state, utf8

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
    json_schema: str = ""  # file with a JSON schema; every sample fits it
    regex: str = ""  # a regular expression; every sample matches it as a whole
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
            warn(f"{name} was tuned on {about.get('model')}, and {path} has other weights")
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
    files["json_schema"] = digest(cfg.json_schema) if cfg.json_schema else ""
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
    options.update(json_schema=read_schema(cfg.json_schema), regex=cfg.regex or None)
    return {**options, "tokenizer": tokenizer}


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
        from gosling.serve import serve  # the web library takes a moment

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
