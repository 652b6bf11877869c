"""Scores on the tasks of lm-evaluation-harness: LAMBADA, MMLU, GSM8K and hundreds more.

    pip install lm_eval
    python eval.py --model=RWKV-x070-World-0.1B.pth --tasks lambada_openai
    python eval.py --model=out/chats/rwkv-final.pth --tasks mmlu gsm8k --num_fewshot=5 --limit=200
    python eval.py --model=out/lora/lora-final.safetensors --tasks mine --include_path=my_tasks/

my_tasks/ holds YAML files of your own. A context is read once for all of its choices. A recurrence
has no window: however long a text is, nothing of it is cut.
"""

import json
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from tqdm import tqdm

from gosling import engine
from gosling.batch import fork, score_forks
from gosling.config import UserError, read_flags
from gosling.runs import pick_device


@dataclass
class Config:
    model: str  # weights, a LoRA or a tuned state
    tasks: tuple[str, ...]  # names, as `lm_eval --tasks list` shows them
    include_path: str | None = None  # a folder with tasks of your own (.yaml)
    num_fewshot: NonNegativeInt | None = None  # worked examples before each question
    limit: PositiveInt | None = None  # only so many questions of each task
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


def answer(model, tokenizer, texts, options):
    """Texts and a task's generation_kwargs -> the completions' texts"""
    stop = options.get("until") or []
    completions = engine.generate(
        model,
        [tokenizer.encode(text) for text in texts],
        tokenizer=tokenizer,
        seed=0,
        max_new_tokens=options.get("max_gen_toks", 256),
        stop=[stop] if isinstance(stop, str) else stop,
        temperature=options.get("temperature", 1.0) if options.get("do_sample") else 0.0,
    )
    return [completion.text for completion in completions]


def adapter(model, tokenizer):
    """Our model as the harness's LM."""
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):
        eot_token_id = tokenizer.end_id  # stands before a text that has no context

        def tok_encode(self, text, **_):
            return tokenizer.encode(text)

        def _loglikelihood_tokens(self, requests, **_):
            pairs = [(context or [tokenizer.end_id], ids) for _, context, ids in requests]
            return score_continuations(model, pairs)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            texts = [tokenizer.encode(request.args[0]) for request in requests]
            scores = score_continuations(model, [([tokenizer.end_id], ids) for ids in texts])
            return [logp for logp, _ in scores]

        def generate_until(self, requests, disable_tqdm=False):
            texts = [None] * len(requests)
            kinds = group_by(json.dumps(request.args[1], sort_keys=True) for request in requests)
            for options, group in kinds.items():
                prompts = [requests[i].args[0] for i in group]
                answers = answer(model, tokenizer, prompts, json.loads(options))
                for i, text in zip(group, answers, strict=True):
                    texts[i] = text
            return texts

    return Adapter()


def main(cfg):
    try:
        import lm_eval
    except ImportError:
        raise UserError("eval.py needs lm-evaluation-harness: pip install lm_eval") from None
    model, tokenizer, _ = engine.load(cfg.model, *pick_device(cfg), cfg.tokenizer)
    results = lm_eval.simple_evaluate(
        adapter(model, tokenizer),
        tasks=list(cfg.tasks),
        num_fewshot=cfg.num_fewshot,
        limit=cfg.limit,
        task_manager=lm_eval.tasks.TaskManager(include_path=cfg.include_path),
    )
    print(lm_eval.utils.make_table(results))
    return results


if __name__ == "__main__":
    main(read_flags(Config))
