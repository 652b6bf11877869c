"""Penalties of a sampler: logits that depend on which tokens a slot had.

The counts lie in the engine's rows (graph.Rows): "count" [B, V], how often a token was generated,
decaying; "generated" and "read" [B, V], whether it was, and whether it was or is in the prompt;
"bias" [B, V]; "weighs" [B], which of `rows.weights` [tokenizers, V] says how much a token counts.

V vocabulary, B rows.
"""

import functools

from gosling.choice import column

import torch

KEYS = ("count", "generated", "read", "bias", "weighs")


def start(rows, row, prompt_ids, request):
    """A slot begins anew."""
    V, tokenizer = rows.vocab_size, request.options.tokenizer
    for key in ("count", "bias"):
        rows.add(key, V)
    for key in ("generated", "read"):
        rows.add(key, V, dtype=torch.bool)
    rows.add("weighs", dtype=torch.long)
    if tokenizer not in rows.tokenizers:
        weights = weights_of(tokenizer, V).to(rows.device)[None]
        before = [] if rows.weights is None else [rows.weights]
        rows.weights = torch.cat([*before, weights])
        rows.tokenizers.append(tokenizer)
    rows["count"][row], rows["generated"][row], rows["read"][row] = 0, False, False
    rows["read"][row, prompt_ids] = True
    rows["bias"][row] = request.bias
    rows["weighs"][row] = rows.tokenizers.index(tokenizer)


@functools.lru_cache(maxsize=4)
def weights_of(tokenizer, vocab_size):
    """How often a token counts, [V]. As in the RWKV runners, blanks and digits count 0 times."""
    if tokenizer is None:
        return torch.ones(vocab_size)
    texts = [tokenizer.decode([token]) for token in range(vocab_size)]
    return torch.tensor([float(text not in " \t0123456789") for text in texts])


def apply(logits, rows, table, at=None):
    """logits [B, V], float32, of these slots -> those that the choice is made from

    at: the slots' numbers, or None of all of them; table [B, columns] is theirs.
    """
    count, generated, read, bias = (rows.some(key, at) for key in KEYS[:4])
    repetition, inverse = column(table, "repetition_penalty"), column(table, "inverse_repetition")
    factor = torch.where(logits > 0, inverse, repetition)
    logits = torch.where(read, logits * factor, logits)
    held_back = column(table, "presence_penalty") * generated
    held_back = held_back + column(table, "frequency_penalty") * count
    return logits - held_back + bias


def add(ids, rows, table, at=None):
    """Count the tokens chosen."""
    weights = rows.weights[rows.some("weighs", at), ids]
    if at is None:
        rows["count"].mul_(column(table, "penalty_decay"))
        at = torch.arange(len(ids), device=ids.device)
    else:
        rows["count"][at] *= column(table, "penalty_decay")
    rows["count"][at, ids] += weights
    yes = torch.ones_like(ids, dtype=torch.bool)
    rows["generated"][at, ids] = rows["read"][at, ids] = yes
