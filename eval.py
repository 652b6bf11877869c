"""Scores on the tasks of lm-evaluation-harness: LAMBADA, MMLU, GSM8K and hundreds more, or a YAML file of your own.

    pip install lm_eval
    python eval.py --model=RWKV-x070-World-0.1B.pth --tasks lambada_openai
    python eval.py --model=out/chats/rwkv-final.pth --tasks mmlu gsm8k --num_fewshot=5 --limit=200
    python eval.py --model=out/lora/lora-final.safetensors --tasks mine --include_path=my_tasks/

A context is read once for all of its choices. A recurrence has no window: however long a text, nothing of it is cut.
"""

import json
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

import common
import prepare
import sample
from common import UserError
from model import fork, forked, load_model


@dataclass
class Config:
    model: str  # weights, a LoRA or a tuned state
    tasks: tuple[str, ...]  # names, as `lm_eval --tasks list` shows them
    include_path: str | None = None  # a folder with tasks of your own (.yaml)
    num_fewshot: int | None = None  # worked examples before each question; none = as the task says
    limit: int | None = None  # only so many questions of each task
    tokenizer: str = (
        ""  # name or file; empty = what the model's folder says, or World if it has 65536 ids
    )
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of weights and computation; auto = bfloat16 on CUDA
    )


def adapter(model, tokenizer):
    """Our model as the harness's LM."""
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):
        eot_token_id = (
            tokenizer.end_id
        )  # stands before a text that has no context, as in pretraining

        def tok_encode(self, text, **_):
            return tokenizer.encode(text)

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests, **_):
            """[(texts, context ids, continuation ids)] -> [(log-probability, whether it is the greedy one)]"""
            groups, out = {}, [None] * len(requests)
            for i, (_, context, _) in enumerate(requests):
                groups.setdefault(tuple(context), []).append(i)
            groups = [([*context] or [self.eot_token_id], mine) for context, mine in groups.items()]
            sizes = [
                len(context) + sum(len(requests[i][2]) for i in mine) for context, mine in groups
            ]
            for a, b in tqdm(sample.spans(sizes, 64), unit="batch", disable=len(sizes) < 2):
                part, numbers = groups[a:b], [i for _, mine in groups[a:b] for i in mine]
                forks = fork(
                    [(context, [requests[i][2] for i in mine]) for context, mine in part],
                    model.emb.weight.device,
                )
                scores = forked(model, forks, sample.PREFILL)
                misses = forks.per_answer((~scores.hits).float()).tolist()
                for i, logp, missed in zip(
                    numbers, forks.per_answer(scores.logps).tolist(), misses
                ):
                    out[i] = logp, missed == 0
            return out

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            rows = [
                (None, [self.eot_token_id], tokenizer.encode(request.args[0]))
                for request in requests
            ]
            return [logp for logp, _ in self._loglikelihood_tokens(rows)]

        def generate_until(self, requests, disable_tqdm=False):
            out, kinds = [None] * len(requests), {}
            for i, request in enumerate(requests):
                kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
            for options, mine in ((json.loads(options), mine) for options, mine in kinds.items()):
                stop = options.get("until") or []
                got = sample.generate(
                    model,
                    [tokenizer.encode(requests[i].args[0]) for i in mine],
                    tokenizer=tokenizer,
                    seed=0,
                    max_new_tokens=options.get("max_gen_toks", 256),
                    stop=[stop] if isinstance(stop, str) else stop,
                    temperature=options.get("temperature", 1.0)
                    if options.get("do_sample")
                    else 0.0,
                )
                for i, completion in zip(mine, got):
                    out[i] = completion.text
            return out

    return Adapter()


def main(cfg):
    try:
        import lm_eval
    except ImportError:
        raise UserError("eval.py needs lm-evaluation-harness: pip install lm_eval") from None
    device, dtype = common.pick_device(cfg)
    model, about = load_model(cfg.model, device, dtype)
    tokenizer = prepare.tokenizer_of(cfg.model, model.config.vocab_size, cfg.tokenizer, about)
    results = lm_eval.simple_evaluate(
        adapter(model.eval(), tokenizer),
        tasks=list(cfg.tasks),
        num_fewshot=cfg.num_fewshot,
        limit=cfg.limit,
        task_manager=lm_eval.tasks.TaskManager(include_path=cfg.include_path),
    )
    print(lm_eval.utils.make_table(results))
    return results


if __name__ == "__main__":
    main(common.read_flags(Config))
