"""Choosing tokens: temperature, top-k, top-p and min-p, for all rows of the engine at once.

What a row wants is a line of numbers in a table, so that rows of different requests choose
together and nothing here has to be read by the host. A Kind says what some of the rows need at all.

V vocabulary, B rows.
"""

from typing import NamedTuple

import numpy as np
import torch

# The columns of the table.
COLUMNS = (
    "temperature",  # 1 where the likeliest token is taken
    "is_greedy",  # the likeliest token is taken; this and the others: 0 or 1
    "is_narrow",  # drawn from some of the tokens
    "is_changed",  # from other logits than the network's own
    "top_p",
    "top_k",  # V for all
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "penalty_decay",
    "repetition_penalty",
    "inverse_repetition",
)
WIDTH = 256  # likeliest tokens that are sorted where top_k does not say how many


class Kind(NamedTuple):
    """What some of the rows that choose together need; what none needs is not computed."""

    greedy: bool  # the likeliest token
    whole: bool  # a draw from all tokens
    width: int  # a draw from so many likeliest ones, or 0
    unbounded: bool  # that number is a guess, which a row may find too small
    plain: bool  # the network's own logits
    penalised: bool  # logits with penalties or biases
    masked: bool  # logits of the tokens that a grammar allows

    def without_asking(self, vocab_size):
        """The same for a step in which no row may find the width too small.

        Few widths, since each is recorded by itself.
        """
        width = vocab_size
        if not self.unbounded:
            width = min(2 ** (self.width - 1).bit_length(), vocab_size) if self.width else 0
        return self._replace(width=width, unbounded=False)


def settings_of(o, vocab_size, is_changed):
    """-> (a row of the table [columns], Kind) for a request's options"""
    is_greedy = o.temperature == 0
    is_narrow = bool(o.top_k or o.top_p < 1 or o.min_p) and not is_greedy
    row = dict(
        temperature=o.temperature or 1.0,
        is_greedy=is_greedy,
        is_narrow=is_narrow,
        is_changed=is_changed or o.grammar is not None,
        top_p=o.top_p,
        top_k=min(o.top_k or vocab_size, vocab_size),
        min_p=o.min_p,
        presence_penalty=o.presence_penalty,
        frequency_penalty=o.frequency_penalty,
        penalty_decay=o.penalty_decay,
        repetition_penalty=o.repetition_penalty,
        inverse_repetition=1 / o.repetition_penalty,
    )
    kind = Kind(
        greedy=is_greedy,
        whole=not is_greedy and not is_narrow,
        width=min(o.top_k or WIDTH, vocab_size) if is_narrow else 0,
        unbounded=is_narrow and not o.top_k,
        plain=not row["is_changed"],
        penalised=is_changed,
        masked=o.grammar is not None,
    )
    return np.array([row[name] for name in COLUMNS], np.float32), kind


def together(kinds):
    """The Kind of rows that choose together."""
    kinds = set(kinds)
    if len(kinds) == 1:
        return kinds.pop()
    return Kind(*map(max, zip(*kinds, strict=True)))


def column(table, name):
    """table [B, columns] -> [B, 1]"""
    i = COLUMNS.index(name)
    return table[:, i : i + 1]


def invert(cumulative, u):
    """Sums [B, n] that rise from left to right, u [B] uniform in [0, 1) -> positions [B].

    A row's choice depends on its own numbers alone.
    """
    # Below the sum even when rounded: the last token might be one that was ruled out.
    total = cumulative[:, -1:]
    target = torch.minimum(u[:, None] * total, total * (1 - 2**-23))
    at = torch.searchsorted(cumulative, target, right=True)
    return at.clamp(max=cumulative.shape[1] - 1)[:, 0]


def draw(p, u):
    """p [B, V] probabilities, u [B] uniform in [0, 1) -> ids [B]"""
    return invert(p.cumsum(-1), u)


def draw_narrow(p, u, top_p, top_k, min_p, width, unbounded=True):
    """As draw, from the tokens that top_p, top_k and min_p, each [B, 1], all leave.

    min_p is a share of the likeliest token's probability; that token always stays. Only the `width`
    likeliest are sorted. unbounded: rows that keep all of these, and may keep more, are drawn again
    with more.
    """
    width = min(width, p.shape[1])
    likeliest, order = p.topk(width)
    keep = (likeliest.cumsum(-1) - likeliest < top_p) & (likeliest >= min_p * likeliest[:, :1])
    keep &= torch.arange(width, device=p.device) < top_k
    at = invert((likeliest * keep).cumsum(-1), u)
    ids = order.gather(-1, at[:, None])[:, 0]
    if unbounded and width < p.shape[1]:
        more = keep[:, -1] & (top_k[:, 0] > width)
        if more.any():
            limits = top_p[more], top_k[more], min_p[more]
            ids[more] = draw_narrow(p[more], u[more], *limits, 16 * width)
    return ids


def pick(logits, u, table, kind, changed=None):
    """logits [B, V], u [B], table [B, columns]
    -> (ids [B], log-probabilities [B] under softmax(logits / temperature))

    changed [B, V]: the logits after penalties, biases and grammars, which the choice is then made
    from by the rows that the table says.
    """
    temperature = column(table, "temperature")
    logp = (logits.float() / temperature).log_softmax(-1)
    is_mixed, is_changed = changed is not None and kind.plain, column(table, "is_changed") > 0
    ids = None
    if kind.greedy:
        scores = logp if changed is None else changed
        if is_mixed:
            scores = torch.where(is_changed, changed, logp)
        ids = scores.argmax(-1)
    if kind.whole or kind.width:
        p = logp.exp() if changed is None else (changed / temperature).softmax(-1)
        if is_mixed:
            p = torch.where(is_changed, p, logp.exp())
    if kind.whole:
        drawn = draw(p, u)
        ids = drawn if ids is None else torch.where(table_says(table, "is_greedy"), ids, drawn)
    if kind.width:
        limits = [column(table, name) for name in ("top_p", "top_k", "min_p")]
        drawn = draw_narrow(p, u, *limits, kind.width, kind.unbounded)
        ids = drawn if ids is None else torch.where(table_says(table, "is_narrow"), drawn, ids)
    return ids, logp.gather(-1, ids[:, None])[:, 0]


def table_says(table, name):
    """table [B, columns] -> whether each row is of that sort, [B]"""
    return column(table, name)[:, 0] > 0
