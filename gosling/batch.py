"""Documents, (ids, mask) pairs, to tensors; answers to shared prompts; held-out loss."""

import itertools
from typing import NamedTuple

from gosling.runs import all_sum, chunks
from model import TokenScores
from wkv_cuda.packed import to_device

import torch
from torch.nn.utils.rnn import pad_sequence


def pack_ids(rows, device="cpu"):
    """D lists of ids -> all of them end to end [1, T], cu_seqlens [D + 1] int64 on the CPU."""
    ids = torch.tensor([list(itertools.chain(*rows))], dtype=torch.long)
    return to_device(ids, device), torch.tensor([0, *map(len, rows)]).cumsum(0)


def pack(documents, device="cpu"):
    """D documents (ids, mask) end to end -> x, y, weight [1, T], cu_seqlens [D + 1].

    x and y are each document's tokens and the next ones; the weight of a position is the mask of
    its target, float32.
    """
    x, cu_seqlens = pack_ids([ids[:-1] for ids, _ in documents], device)
    y, _ = pack_ids([ids[1:] for ids, _ in documents], device)
    weight = [m for _, mask in documents for m in mask[1:]]
    weight = to_device(torch.tensor([weight], dtype=torch.float32), device)
    return x, y, weight, cu_seqlens


def pad(documents, device="cpu"):
    """The same as rows, right padded: x, y, weight [D, T], and None for cu_seqlens.

    A causal network never sees what lies to the right, and the padding weighs 0.
    """
    x = pad_rows([ids[:-1] for ids, _ in documents], device)
    y = pad_rows([ids[1:] for ids, _ in documents], device)
    weight = pad_rows([mask[1:] for _, mask in documents], device)
    return x, y, weight.float(), None


def pad_rows(rows, device):
    """Lists of numbers -> [rows, longest], zeros on the right."""
    return to_device(pad_sequence([torch.tensor(row) for row in rows], batch_first=True), device)


# ----------------------------------------------------------------------------------------------
# answers to shared prompts: every prompt runs once, and its answers start from its state


class Forks(NamedTuple):
    """A answers to P prompts, both packed."""

    prompt_x: torch.Tensor  # [1, T1] all but the last token of each prompt
    prompt_cu_seqlens: torch.Tensor  # [P + 1], or one more
    owner: torch.Tensor  # [A] the prompt of each answer
    x: torch.Tensor  # [1, T] the prompt's last token and the answer
    y: torch.Tensor  # [1, T] what follows each
    cu_seqlens: torch.Tensor  # [A + 1]
    row: torch.Tensor  # [T] the answer that each token belongs to

    def per_answer(self, values):
        """values [1, T] -> [A], summed over each answer."""
        return values.new_zeros(len(self.owner)).index_add(0, self.row, values[0])

    def by_row(self, values):
        """values [1, T] -> [A, longest answer], zeros on the right."""
        return pad_sequence(values[0].split(self.cu_seqlens.diff().tolist()), batch_first=True)


def fork(groups, device="cpu", whole=False):
    """[(prompt_ids, [answer_ids, ...]), ...] -> Forks.

    whole: also run over each answer's last token, where a scalar head's score is read. An answer
    may be empty, a prompt not: ValueError.
    """
    if not all(prompt_ids for prompt_ids, _ in groups):
        raise ValueError("a prompt is empty; begin with the tokenizer's end id")
    prompts = [prompt_ids for prompt_ids, _ in groups]
    pairs = [(prompt_ids, answer) for prompt_ids, answers in groups for answer in answers]
    owner = [i for i, (_, answers) in enumerate(groups) for _ in answers]
    beginnings = [prompt_ids[:-1] for prompt_ids in prompts]
    if not any(beginnings):
        beginnings.append([0])  # the network wants a token; no answer goes on from it
    prompt_x, prompt_cu_seqlens = pack_ids(beginnings, device)
    if whole:
        x, cu_seqlens = pack_ids([prompt_ids[-1:] + answer for prompt_ids, answer in pairs], device)
        y, _ = pack_ids([answer + [0] for _, answer in pairs], device)
    else:
        inputs = [(prompt_ids[-1:] + answer)[: len(answer)] for prompt_ids, answer in pairs]
        x, cu_seqlens = pack_ids(inputs, device)
        y, _ = pack_ids([answer for _, answer in pairs], device)
    row = to_device(torch.arange(len(pairs)).repeat_interleave(cu_seqlens.diff()), device)
    owner = to_device(torch.tensor(owner, dtype=torch.long), device)
    return Forks(prompt_x, prompt_cu_seqlens, owner, x, y, cu_seqlens, row)


def forked_state(model, forks, chunk_len=0):
    """The state after each answer's prompt, but for its last token: [L, A, ...]."""
    prompts = dict(cu_seqlens=forks.prompt_cu_seqlens, chunk_len=chunk_len)
    _, state = model(forks.prompt_x, last_only=True, **prompts)
    return {key: value[:, forks.owner] for key, value in state.items()}


def score_forks(model, forks, chunk_len=0, temperature=1.0):
    """-> TokenScores [1, T] of the answers' tokens; their gradient reaches the prompts, too."""
    if forks.x.shape[1] == 0:  # every answer is empty
        nothing = torch.zeros(forks.x.shape, device=forks.x.device)
        return TokenScores(nothing, nothing, nothing.bool())
    scores, _ = model(
        forks.x,
        forked_state(model, forks, chunk_len),
        cu_seqlens=forks.cu_seqlens,
        targets=forks.y,
        temperature=temperature,
        chunk_len=chunk_len,
    )
    return scores


def reward_forks(model, forks):
    """-> the scalar head's score of each answer [A]; forks: made with whole=True."""
    state = forked_state(model, forks)
    return model(forks.x, state, cu_seqlens=forks.cu_seqlens, score=True)[0]


def score_answers(model, groups, device):
    """[(prompt_ids, [answer_ids, ...]), ...] -> a tensor of the answers' scores [K] for each."""
    scores = reward_forks(model, fork(groups, device, whole=True))
    return scores.split([len(answers) for _, answers in groups])


# ----------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, documents, cfg, run):
    """Held-out documents (ids, mask), over all processes -> {"val_loss", "val_accuracy"}.

    Nats per trained token, and the share of these tokens that are the likeliest.
    """
    sums = [torch.zeros(3, device=run.device)]  # left on the device: no batch waits for another
    for batch in chunks(documents[run.rank :: run.world], cfg.micro_bsz):
        x, y, weight, cu_seqlens = pack(batch, run.device)
        scores, _ = model(x, cu_seqlens=cu_seqlens, targets=y, chunk_len=cfg.chunk_len)
        logps, hits = (weight * scores.logps).sum(), (weight * scores.hits).sum()
        sums.append(torch.stack([logps, hits, weight.sum()]))
    logps, hits, n_targets = all_sum(*torch.stack(sums).cpu().double().sum(0))
    return {"val_loss": -logps / n_targets, "val_accuracy": hits / n_targets}
