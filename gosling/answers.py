"""On top of the engine: scores of given answers, and answers as they are shown."""

from gosling import engine
from gosling.batch import pack_ids
from gosling.config import UserError, print0
from gosling.engine import TURNS

import torch


@torch.no_grad()
def score_choices(model, prompts, choices, *, state=None, temperature=1.0, per_token=False):
    """Log-probabilities of fixed continuations.

    choices: for each prompt a list of lists of ids -> for each prompt a list with each choice's
    sum, or with per_token its list; an empty one's sum is 0. A prompt is read once; its choices go
    on from copies of its state, packed. state: as in `generate`.
    """
    model = getattr(model, "module", model)
    if len(choices) != len(prompts) or not temperature > 0:
        raise UserError(
            f"{len(prompts)} prompts, {len(choices)} lists of choices, temperature={temperature}: "
            "expected a list for each prompt and a temperature above 0"
        )
    engine.check_temperature(temperature)
    engine.check_ids(model, prompts)
    engine.check_ids(model, [ids for of_prompt in choices for ids in of_prompt], "choice", True)
    scores = []
    with engine.inference(model):
        for i, j in engine.spans([len(ids) for ids in prompts], engine.slots_for(model)):
            start = engine.state_rows(state, range(i, j), model.emb.weight.device)
            logits, after = engine.prefill(model, prompts[i:j], start)
            first_logps = (logits.float() / temperature).log_softmax(-1)
            scores += score_group(model, first_logps, after, choices[i:j], temperature)
    if per_token:
        return scores
    return [[sum(logps, 0.0) for logps in of_prompt] for of_prompt in scores]


def score_group(model, first_logps, state, choices, temperature):
    """Choices of prompts that are read -> their tokens' log-probabilities, lists like `choices`.

    first_logps [P, V]: of what may follow the prompts; state [L, P, ...]: after the prompts.
    """
    owner = [p for p, of_prompt in enumerate(choices) for _ in of_prompt]
    flat = [ids for of_prompt in choices for ids in of_prompt]
    first_ids = [ids[:1] for ids in flat]  # [] of an empty choice
    scores = [first_logps[p, ids].tolist() for p, ids in zip(owner, first_ids, strict=True)]
    for a, b in engine.spans([len(ids) for ids in flat], engine.slots_for(model)):
        x, cu_seqlens = pack_ids([ids[:-1] for ids in flat[a:b]], first_logps.device)
        y, _ = pack_ids([ids[1:] for ids in flat[a:b]], first_logps.device)
        if x.shape[1] == 0:
            continue
        forked = {key: value[:, owner[a:b]] for key, value in state.items()}
        logps = model.token_logprobs(x, y, forked, cu_seqlens=cu_seqlens, temperature=temperature)
        for row, rest in zip(scores[a:b], logps[0].split(cu_seqlens.diff().tolist()), strict=True):
            row += rest.tolist()
    in_order = iter(scores)
    return [[next(in_order) for _ in of_prompt] for of_prompt in choices]


@torch.no_grad()
def score_tokens(model, ids, state=None):
    """Of each token but the first: [(its log-probability, the likeliest id, that one's), ...]."""
    ids, scores = torch.tensor([ids], device=model.emb.weight.device), []
    pairs = zip(ids[:, :-1].split(256, 1), ids[0, 1:].split(256), strict=True)
    for x, y in pairs if ids.shape[1] > 1 else ():
        logits, state = model(x, state)
        logps = logits[0].float().log_softmax(-1)  # [T, V]
        values, likeliest = logps.max(-1)
        own = logps.gather(-1, y[:, None])[:, 0]
        scores += zip(own.tolist(), likeliest.tolist(), values.tolist(), strict=True)
    return scores


def settled(text, stop=()):
    """What of a text that still grows will stay, and can be shown.

    A character whose bytes are not all there yet waits, and so does what may become a stop text.
    """
    text = text.removesuffix("\ufffd")
    beginnings = [s[:n] for s in stop for n in range(1, len(s) + 1)]
    held_back = max((len(s) for s in beginnings if text.endswith(s)), default=0)
    return text[: len(text) - held_back]


@torch.no_grad()
def greedy_answer(model, prompt_ids, tokenizer, max_new_tokens=128):
    """A greedy answer by the plainest loop there is -> text. `generate` is the fast way."""
    state, device, ids = None, model.emb.weight.device, []
    for piece in torch.tensor([prompt_ids], device=device).split(engine.PREFILL, 1):
        logits, state = model(piece, state, last_only=True)
    for _ in range(max_new_tokens):
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == tokenizer.end_id:
            return tokenizer.decode(ids[:-1])
        text, turn, _ = tokenizer.decode(ids).partition(TURNS[0])
        if turn:
            return text
        logits, state = model(torch.tensor([ids[-1:]], device=device), state)
    return tokenizer.decode(ids)


def show_answers(model, documents, tokenizer, off=False):
    """Print what a model in eval mode answers where the last reply of each document begins.

    documents: (ids, mask) pairs. off: also what it answers without its adapter or tuned state.
    """
    for ids, mask in documents:
        end = len(mask) - mask[::-1].index(1)
        start = end
        while start > 0 and mask[start - 1]:
            start -= 1
        if start == 0:  # a document that is a reply from its first token on
            continue
        print0(f"  {tokenizer.decode(ids[:start])[-200:]!r}")
        print0(f"    model: {greedy_answer(model, ids[:start], tokenizer)!r}")
        if off:
            with model.reference():
                print0(f"    off:   {greedy_answer(model, ids[:start], tokenizer)!r}")
        print0(f"    data:  {tokenizer.decode(ids[start:end])!r}")
