"""Scores on the tasks of lm-evaluation-harness: LAMBADA, MMLU, GSM8K and hundreds more.

    pip install lm_eval
    python eval.py --model=weights/rwkv7-g1a-1.5b-20250922-ctx4096.pth --tasks lambada_openai
    python eval.py --model=out/chats/rwkv-final.pth --tasks mmlu gsm8k --num_fewshot=5 --limit=200
    python eval.py --model=out/lora/lora-final.safetensors --tasks mine --include_path=my_tasks/
    python eval.py --model=... --tasks=ifeval,gsm8k --apply_chat_template --out=out/scores.json

my_tasks/ holds YAML files of your own. A context is read once for all of its choices. A recurrence
has no window: however long a text is, nothing of it is cut.
"""

import contextlib
import difflib
import json
import math
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gosling import engine
from gosling.batch import fork, score_forks
from gosling.config import UserError, failure, read_flags
from gosling.data import render_chat
from gosling.files import write_json
from gosling.processes import pick_device

import torch
from pydantic import NonNegativeInt, PositiveFloat
from tqdm import tqdm


@dataclass
class Config:
    model: str  # weights, a LoRA or a tuned state
    tasks: tuple[str, ...]  # names, as `lm_eval --tasks list` shows them, or patterns: mmlu_*
    include_path: str | None = None  # a folder with tasks of your own (.yaml)
    num_fewshot: NonNegativeInt | None = None  # worked examples before each question
    limit: PositiveFloat | None = None  # only so many questions of each task; below 1, that share
    apply_chat_template: bool = False  # questions are a user's turns, and examples a conversation's
    system_instruction: str | None = None  # a system turn to begin with
    out: str = ""  # keep scores and settings in this file, JSON
    another_base: bool = False  # an adapter or state of another base than this is meant
    tokenizer: str = ""  # name or file; empty = the one recorded with the model or the data
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; auto = bfloat16 on CUDA


def group_by(keys):
    """[key of item 0, key of item 1, ...] -> {key: [numbers of its items]}"""
    groups = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return groups


@torch.no_grad()
def score_continuations(model, pairs):
    """[(context ids, continuation ids)] -> [(log-probability, whether it is the greedy one)]"""
    groups = group_by(tuple(context) for context, _ in pairs)
    forked = [(list(context), [pairs[i][1] for i in group]) for context, group in groups.items()]
    sizes = [len(context) + sum(len(ids) for ids in choices) for context, choices in forked]
    scores = []
    for a, b in tqdm(engine.spans(sizes, 64), unit="batch", disable=len(sizes) < 2):
        forks = fork(forked[a:b], model.emb.weight.device)
        of_tokens = score_forks(model, forks, engine.PREFILL)
        logps = forks.per_answer(of_tokens.logps).tolist()
        misses = forks.per_answer((~of_tokens.hits).float()).tolist()
        scores += [(logp, missed == 0) for logp, missed in zip(logps, misses, strict=True)]
    numbers = [i for group in groups.values() for i in group]
    by_number = dict(zip(numbers, scores, strict=True))
    return [by_number[i] for i in range(len(pairs))]


# In generation_kwargs the most tokens go by these names; the first one that is there counts.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def sampling_of(kwargs):
    """A task's generation_kwargs -> keywords of `generate`, as the harness's adapters read them.

    Numbers may be text. Without do_sample a temperature above 0 samples, without both it is greedy,
    and then top_p, top_k and min_p play no part.
    """
    given = {key: value for key, value in kwargs.items() if value is not None}
    stop = given.pop("until", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, (list, tuple)) or not all(isinstance(x or "", str) for x in stop):
        raise UserError(f"generation_kwargs until={stop!r:.60}: expected text, or a list of texts")
    limits = [(key, number_of(given, key, 0)) for key in LIMITS if key in given]
    limit, max_new_tokens = limits[0] if limits else ("", 256)
    if max_new_tokens < 1:
        raise UserError(f"generation_kwargs {limit}={max_new_tokens:g}: expected 1 or more")
    is_hot = "temperature" in given
    temperature = number_of(given, "temperature", 1.0)
    do_sample = str(given.pop("do_sample", is_hot and temperature > 0)).lower()
    if do_sample not in ("true", "false", "1", "0"):
        raise UserError(f"generation_kwargs do_sample={do_sample!r:.60}: expected true or false")
    choice = {
        "temperature": temperature,
        "top_p": min(number_of(given, "top_p", 1.0), 1.0),
        "top_k": max(int(number_of(given, "top_k", 0)), 0),  # -1 is all, too
        "min_p": number_of(given, "min_p", 0.0),
    }
    if do_sample in ("false", "0"):
        choice = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    repetition_penalty = number_of(given, "repetition_penalty", 1.0)
    if given:
        print(f"note: generation_kwargs {', '.join(given)} are not used", file=sys.stderr)
    return {
        **choice,
        "max_new_tokens": int(max_new_tokens),
        "stop": [text for text in stop if text],
        "repetition_penalty": repetition_penalty,
    }


def number_of(given, key, default):
    """Take a number, which may be text, out of generation_kwargs; UserError for what is none."""
    value = given.pop(key, default)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"generation_kwargs {key}={value!r:.60}: expected a number")
    return number


def answer(model, tokenizer, texts, kwargs):
    """Texts and a task's generation_kwargs -> the completions' texts"""
    prompts = [encode(tokenizer, text) or [tokenizer.end_id] for text in texts]
    completions = engine.generate(
        model, prompts, tokenizer=tokenizer, seed=0, **sampling_of(kwargs)
    )
    return [completion.text for completion in completions]


def encode(tokenizer, text):
    """A task's text -> ids; UserError if it has half a character."""
    try:
        return tokenizer.encode(text)
    except UnicodeError as e:
        raise UserError(f"a task's text is not UTF-8 ({e.reason}): {text!r:.60}") from None


def encode_pair(tokenizer, context, continuation):
    """-> (context ids, continuation ids). Blanks at the context's end go over, as in the harness.

    The two are cut as one text where the context's ids stay what they were; where a token would lie
    across the border, as in "the" + "re", each is cut on its own, so that nothing is lost.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    context_ids, whole = encode(tokenizer, bare), encode(tokenizer, bare + continuation)
    if whole[: len(context_ids)] == context_ids:
        return context_ids, whole[len(context_ids) :]
    return context_ids, encode(tokenizer, continuation)


def adapter(model, tokenizer):
    """Our model as the harness's LM."""
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):
        eot_token_id = tokenizer.end_id  # stands before a text that has no context
        tokenizer_name = tokenizer.name
        takes_chats = False

        def tok_encode(self, text, **_):
            return encode(tokenizer, text)

        def chat_template(self, chat_template=False):
            return "gosling.data.render_chat" if chat_template else None

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            self.takes_chats = True
            return chat_text(chat_history, tokenizer, add_generation_prompt)

        def loglikelihood(self, requests, disable_tqdm=False):
            pairs = [encode_pair(tokenizer, *request.args) for request in requests]
            return self._loglikelihood_tokens([(None, *pair) for pair in pairs])

        def _loglikelihood_tokens(self, requests, **_):
            pairs = [(context or [tokenizer.end_id], ids) for _, context, ids in requests]
            return score_continuations(model, pairs)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            texts = [encode(tokenizer, request.args[0]) for request in requests]
            scores = score_continuations(model, [([tokenizer.end_id], ids) for ids in texts])
            return [logp for logp, _ in scores]

        def generate_until(self, requests, disable_tqdm=False):
            texts = [None] * len(requests)
            kinds = group_by(json.dumps(request.args[1], sort_keys=True) for request in requests)
            for options, group in kinds.items():
                prompts = [requests[i].args[0] for i in group]
                if self.takes_chats:  # see chat_text
                    prompts = [prompt.removesuffix(" ") for prompt in prompts]
                answers = answer(model, tokenizer, prompts, json.loads(options))
                for i, text in zip(group, answers, strict=True):
                    texts[i] = text
            return texts

    return Adapter()


def chat_text(messages, tokenizer, generation_prompt):
    """[{"role", "content"}] -> the chat as text, which the harness puts a continuation behind.

    It ends in "Assistant: ", because the harness leaves out the blank before an answer; before
    text is generated that blank is taken away. Else the last message goes on.
    """
    messages = [dict(message) for message in messages]
    ids, _ = render_chat(messages, tokenizer, generation_prompt=generation_prompt)
    if generation_prompt:
        return tokenizer.decode(ids) + " "
    return tokenizer.decode([token for token in ids if token != tokenizer.end_id])


def find_tasks(names, manager):
    """Names, patterns, comma lists and .yaml files -> names and files; UserError for an unknown."""
    found = []
    for name in (name.strip() for names_of_flag in names for name in names_of_flag.split(",")):
        matched = [name] if Path(name).suffix == ".yaml" and Path(name).is_file() else []
        matched = matched or sorted(manager.match_tasks([name]))
        if name and not matched:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UserError(
                f"--tasks: {name!r} is no task{hint} (`lm_eval --tasks list` shows all)"
            )
        found += matched
    if not found:
        raise UserError("--tasks names no task (`lm_eval --tasks list` shows all)")
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def harness_errors(tasks):
    """UserError for what the harness raises: a task's file or data. What we raise goes through."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        frames = traceback.extract_tb(e.__traceback__)[2:]  # without this one and main's
        here = adapter.__code__.co_filename
        if any(frame.filename == here for frame in frames):  # it came by way of our adapter
            raise
        raise UserError(
            f"--tasks: the harness cannot run {', '.join(tasks)}: {failure(e)}; look at its .yaml "
            "and data, and at --num_fewshot"
        ) from e


def main(cfg):
    if cfg.limit and cfg.limit > 1 and cfg.limit % 1:
        raise UserError(f"limit={cfg.limit}: expected a whole number, or a share below 1")
    if cfg.include_path and not Path(cfg.include_path).is_dir():
        raise UserError(f"--include_path={cfg.include_path} is not a folder")
    try:
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError:
        raise UserError("eval.py needs lm-evaluation-harness: pip install lm_eval") from None
    manager = lm_eval.tasks.TaskManager(include_path=cfg.include_path)
    tasks = find_tasks(cfg.tasks, manager)
    model, tokenizer, _ = engine.load(cfg.model, *pick_device(cfg), cfg.tokenizer, cfg.another_base)
    with harness_errors(tasks):
        results = lm_eval.simple_evaluate(
            adapter(model, tokenizer),
            tasks=tasks,
            num_fewshot=cfg.num_fewshot,
            limit=cfg.limit,
            task_manager=manager,
            apply_chat_template=cfg.apply_chat_template,
            system_instruction=cfg.system_instruction,
        )
    print(lm_eval.utils.make_table(results))
    if cfg.out:
        scores = {key: value for key, value in results.items() if key != "samples"}
        write_json(cfg.out, json.loads(json.dumps(scores, default=str)))
    return results


if __name__ == "__main__":
    main(read_flags(Config))
