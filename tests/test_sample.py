"""The generation engine against a plain loop over the network, and the command line."""

import io
import json
import math
import signal
import subprocess
import sys
import time

import sample
from gosling import answers, batch, choice, engine, graph, terminal, weights
from gosling.config import UserError, read_flags
from gosling.tokenizer import load_tokenizer
from model import RWKV, RWKVConfig
from wkv_cuda import cpu, fused

import helpers
import numpy as np
import pytest
import torch
from helpers import ROOT


def random_model(version="x070"):
    return helpers.random_model(version, n_layer=2, n_embd=64, vocab_size=257)


@pytest.fixture(scope="module")
def model():
    return random_model()


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 3]]


def test_greedy_equals_a_plain_loop(model):
    completions = sample.generate(model, PROMPTS, max_new_tokens=12, temperature=0)
    for prompt, c in zip(PROMPTS, completions, strict=True):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
        assert c.tokens == ids[len(prompt) :] and c.finish_reason == "length"


def test_logprobs_are_what_training_computes_at_the_same_temperature(model):
    options = dict(max_new_tokens=20, temperature=0.7, top_p=0.8, top_k=50, seed=1)
    for prompt, c in zip(PROMPTS, sample.generate(model, PROMPTS, **options), strict=True):
        ids = torch.tensor([prompt + c.tokens])
        want = model.token_logprobs(ids[:, :-1], ids[:, 1:], temperature=0.7)[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(c.logprobs), want, atol=1e-5, rtol=1e-5)


def test_a_completion_depends_on_seed_prompt_and_sample_index_alone(model):
    whole = sample.generate(model, PROMPTS, n=3, max_new_tokens=10, seed=7)
    assert len(whole) == 12
    for batch_size in (1, 2, 5):
        assert [
            c.tokens
            for c in sample.generate(
                model, PROMPTS, n=3, max_new_tokens=10, seed=7, batch_size=batch_size
            )
        ] == [c.tokens for c in whole]
    fewer = sample.generate(model, PROMPTS[:2], n=2, max_new_tokens=10, seed=7)
    assert [c.tokens for c in fewer] == [whole[i].tokens for i in (0, 1, 3, 4)]
    assert [c.tokens for c in sample.generate(model, PROMPTS, n=3, max_new_tokens=10, seed=8)] != [
        c.tokens for c in whole
    ]
    assert len({tuple(c.tokens) for c in whole[:3]}) == 3


def test_sampling_follows_the_distribution():
    """Frequencies of 40,000 draws against the filtered softmax, within four standard errors."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
    u = torch.rand(40000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature, top_p, top_k in (
        (1.0, 1.0, 0),
        (0.5, 1.0, 0),
        (1.0, 0.8, 0),
        (1.0, 1.0, 2),
        (2.0, 0.9, 3),
    ):
        p = (logits[0] / temperature).softmax(-1)  # already in falling order
        before = p.cumsum(0) - p
        keep = (before < top_p) & (torch.arange(5) < (top_k or 5))
        want = (p * keep / (p * keep).sum()).double()
        options = engine.Options(temperature=temperature, top_p=top_p, top_k=top_k)
        settings, kind = choice.settings_of(options, 5, False)
        table = torch.from_numpy(settings).expand(40000, -1)
        ids, logps = choice.pick(logits.expand(40000, -1), u.float(), table, kind)
        got = ids.bincount(minlength=5).double() / 40000
        assert ((got - want).abs() <= 4 * (want * (1 - want) / 40000).sqrt() + 1e-9).all(), (
            got,
            want,
        )
        torch.testing.assert_close(
            logps, p.log()[ids]
        )  # of the distribution before top-p and top-k


def test_states_fork_and_carry_on(model):
    """One state for all prompts, a row per prompt, and whole sequences give the same tokens."""
    head = [4, 5, 6, 7]
    _, state = engine.prefill(model, [head])
    whole = sample.generate(model, [head + p for p in PROMPTS], max_new_tokens=8, seed=3)
    shared = sample.generate(model, PROMPTS, max_new_tokens=8, seed=3, state=state)
    own = {k: v.repeat(1, 4, *[1] * (v.dim() - 2)) for k, v in state.items()}
    rows = sample.generate(model, PROMPTS, max_new_tokens=8, seed=3, state=own, batch_size=2)
    assert [c.tokens for c in whole] == [c.tokens for c in shared] == [c.tokens for c in rows]


def test_long_prompts_are_read_in_pieces(model, monkeypatch):
    ids = torch.randint(0, 257, (50,)).tolist()
    prompts = [ids, ids[:3], ids[:9], ids[:20]]
    want = [model(torch.tensor([p]))[0][0, -1] for p in prompts]
    monkeypatch.setattr(engine, "PREFILL", 13)
    logits, _ = engine.prefill(model, prompts)
    torch.testing.assert_close(logits, torch.stack(want), atol=2e-5, rtol=1e-4)
    with pytest.raises(UserError, match="prompt is empty"):
        engine.prefill(model, [[1], []])


def test_stops_at_ids_and_at_texts(model):
    tokenizer = load_tokenizer("bytes")
    free = sample.generate(
        model, [[5]], max_new_tokens=30, seed=2, tokenizer=tokenizer, stop_ids=()
    )[0]
    stop_id = free.tokens[10]
    c = sample.generate(
        model, [[5]], max_new_tokens=30, seed=2, tokenizer=tokenizer, stop_ids=[stop_id]
    )[0]
    first = free.tokens.index(stop_id)
    assert (
        c.tokens == free.tokens[: first + 1]
        and c.finish_reason == "stop"
        and c.text == tokenizer.decode(c.tokens[:-1])
    )
    plain = next(i for i in range(5, 29) if all(32 < t - 1 < 127 for t in free.tokens[i : i + 2]))
    word = tokenizer.decode(free.tokens[plain : plain + 2])
    c = sample.generate(
        model, [[5]], max_new_tokens=30, seed=2, tokenizer=tokenizer, stop_ids=(), stop=[word]
    )[0]
    assert c.finish_reason == "stop" and word not in c.text and len(c.tokens) <= plain + 2
    assert tokenizer.decode(free.tokens).startswith(c.text)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_logprobs_with_refill_and_forks_are_those_of_one_run_and_of_single_tokens(version):
    model, g = random_model(version), torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 257, (k,), generator=g).tolist() for k in (1, 500, 7, 30, 2)]
    out = sample.generate(
        model,
        prompts,
        n=3,
        max_new_tokens=[5, 12, 25, 9, 3],
        temperature=0.8,
        top_p=0.9,
        seed=5,
        batch_size=4,
    )
    gaps = []
    for i, c in enumerate(out):
        prompt = prompts[i // 3]
        ids = torch.tensor([prompt + c.tokens])
        with torch.no_grad():
            whole = model.token_logprobs(ids[:, :-1], ids[:, 1:], temperature=0.8)[
                0, len(prompt) - 1 :
            ]
            state, single = None, []
            for t in range(ids.shape[1] - 1) if i % 3 == 0 else ():
                logits, state = model(ids[:, t : t + 1], state)
                single.append((logits[0, 0] / 0.8).log_softmax(-1)[ids[0, t + 1]])
        for got in (whole, torch.stack(single)[len(prompt) - 1 :] if single else whole):
            gaps.append((got - torch.tensor(c.logprobs)).abs())
    assert torch.cat(gaps).mean() < 1e-5 and torch.cat(gaps).max() < 1e-4


def test_the_number_of_slots_and_the_batch_mates_change_nothing(model):
    g = torch.Generator().manual_seed(2)
    prompts = [
        torch.randint(0, 257, (int(k),), generator=g).tolist()
        for k in torch.randint(1, 30, (50,), generator=g)
    ]
    options = dict(n=4, max_new_tokens=16, seed=11, stop_ids=range(20))
    whole = sample.generate(model, prompts, batch_size=200, **options)
    assert (
        len({len(c.tokens) for c in whole}) > 5 and len({t for c in whole for t in c.tokens}) > 100
    )
    for slots in (16, 3):
        refilled = sample.generate(model, prompts, batch_size=slots, **options)
        for a, b in zip(whole, refilled, strict=True):
            assert a.tokens == b.tokens and a.finish_reason == b.finish_reason
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    some = [40, 3, 17]  # other mates, other order: the indices say which streams
    alone = sample.generate(
        model, [prompts[i] for i in some], batch_size=3, indices=some, **options
    )
    assert [c.tokens for c in alone] == [whole[4 * i + j].tokens for i in some for j in range(4)]
    again = sample.generate(model, prompts, batch_size=16, **options)
    assert [c.logprobs for c in again] == [
        c.logprobs for c in sample.generate(model, prompts, batch_size=16, **options)
    ]


def test_refill_keeps_every_decode_full_and_reads_each_prompt_once(model, monkeypatch):
    read, decoded, real_prefill, real_decode = [], [], engine.prefill, graph.decode

    def prefill(model, prompts, state=None):
        read.extend(prompts)
        return real_prefill(model, prompts, state)

    def decode(model, step, ids, state):
        decoded.append(len(ids))
        return real_decode(model, step, ids, state)

    monkeypatch.setattr(engine, "prefill", prefill)
    monkeypatch.setattr(graph, "decode", decode)
    limits = [2, 9, 3, 8, 4, 10]
    out = sample.generate(
        model,
        [[5, 6]] + [[i, i] for i in range(5)],
        max_new_tokens=limits,
        batch_size=2,
        stop_ids=(),
    )
    assert [len(c.tokens) for c in out] == limits
    assert set(decoded) == {2}
    # The schedule by hand: a slot takes the next row as soon as its own ends; the first token
    # costs no step.
    free = [0, 0]
    for limit in limits:
        slot = free.index(min(free))
        free[slot] += limit - 1
    assert len(decoded) == max(free) < sum(max(limits[i : i + 2]) - 1 for i in (0, 2, 4))
    read.clear()
    sample.generate(model, [[1, 2, 3], [4], [1, 2, 3]], n=5, max_new_tokens=2, batch_size=16)
    assert read == [[1, 2, 3], [4]]


def exact(
    logits,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    seen=(),
    prompt=(),
    presence=0.0,
    frequency=0.0,
    decay=1.0,
    repetition=1.0,
    bias=None,
):
    """The distribution that a token is drawn from, written down anew, token by token.

    seen: what was generated so far.
    """
    z = [float(x) for x in logits]
    for t in set(seen) | set(prompt):
        z[t] = z[t] / repetition if z[t] > 0 else z[t] * repetition
    occurrence = {}
    for t in seen:  # rwkv.utils.PIPELINE.generate
        occurrence = {k: v * decay for k, v in occurrence.items()}
        occurrence[t] = occurrence.get(t, 0) + 1
    for t, times in occurrence.items():
        z[t] -= presence + times * frequency
    for t, value in (bias or {}).items():
        z[t] += value
    p = np.exp((np.array(z) - max(z)) / temperature)
    p /= p.sum()
    order, before, keep = sorted(range(len(z)), key=lambda t: -p[t]), 0.0, np.zeros(len(z))
    for rank, t in enumerate(order):
        keep[t] = before < top_p and (not top_k or rank < top_k) and p[t] >= min_p * p[order[0]]
        before += p[t]
    return p * keep / (p * keep).sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_p": 0.7},
        {"top_k": 3},
        {"min_p": 0.2},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"frequency_penalty": 2.5, "presence_penalty": 0.3, "penalty_decay": 0.3},
        {"repetition_penalty": 4.0},
        {"logit_bias": {2: 2.0, 3: -math.inf}},
        {
            "temperature": 0.8,
            "top_p": 0.9,
            "top_k": 6,
            "min_p": 0.02,
            "repetition_penalty": 1.2,
            "presence_penalty": 0.4,
        },
    ],
)
def test_chi_square_against_exact_probabilities(options):
    """A vocabulary of 8 and a network that says the same whatever it read.

    Three tokens, so that penalties act.
    """
    model = RWKV(RWKVConfig("x070", 1, 64, 8))
    with torch.no_grad():
        model.ln_out.weight.zero_()
        model.ln_out.bias.fill_(1.0)
        z = torch.tensor([2.0, 1.2, 0.4, 0.1, -0.3, -0.8, -1.0, 1.0])
        model.head.weight.copy_((z / 64)[:, None].expand(8, 64))
    out = sample.generate(
        model, [[1, 4]], n=4000, max_new_tokens=3, seed=3, batch_size=1000, **options
    )
    names = {
        "presence_penalty": "presence",
        "frequency_penalty": "frequency",
        "penalty_decay": "decay",
        "repetition_penalty": "repetition",
        "logit_bias": "bias",
    }
    want = {names.get(k, k): v for k, v in options.items()}
    expected, got = {}, {}
    for a, pa in enumerate(exact(z, prompt=(1, 4), **want)):
        for b, pb in enumerate(exact(z, prompt=(1, 4), seen=(a,), **want)):
            for c, pc in enumerate(exact(z, prompt=(1, 4), seen=(a, b), **want)):
                expected[a, b, c] = 4000 * pa * pb * pc
    for c in out:
        got[tuple(c.tokens)] = got.get(tuple(c.tokens), 0) + 1
        np.testing.assert_allclose(
            c.logprobs, (z / options.get("temperature", 1.0)).log_softmax(-1)[c.tokens], atol=1e-5
        )
    assert all(expected[t] > 0 for t in got)
    large = [t for t, e in expected.items() if e >= 5]
    rest = (
        sum(e for e in expected.values()) - sum(expected[t] for t in large),
        4000 - sum(got.get(t, 0) for t in large),
    )
    chi2 = sum((got.get(t, 0) - expected[t]) ** 2 / expected[t] for t in large)
    chi2 += (rest[1] - rest[0]) ** 2 / rest[0] if rest[0] > 5 else 0
    df = len(large) - (rest[0] <= 5)
    assert chi2 < df + 4 * math.sqrt(2 * df), (chi2, df)


def test_top_k_above_the_vocabulary_is_all_tokens(model):
    """Also with top_p, which sorts more and more of them."""
    for top_p in (1.0, 0.999):
        options = dict(max_new_tokens=20, seed=5, top_p=top_p)
        whole = sample.generate(model, PROMPTS, top_k=257, **options)
        for top_k in (258, 300, 10**6):
            more = sample.generate(model, PROMPTS, top_k=top_k, **options)
            assert [c.tokens for c in more] == [c.tokens for c in whole]


def test_extreme_settings_keep_probabilities_finite(model):
    extremes = (
        dict(temperature=engine.COLDEST),
        dict(temperature=engine.LARGEST),
        dict(presence_penalty=engine.LARGEST, temperature=engine.COLDEST),
        dict(frequency_penalty=-engine.LARGEST, repetition_penalty=engine.LARGEST),
        dict(repetition_penalty=1 / engine.LARGEST),
    )
    for options in extremes:
        for c in sample.generate(model, PROMPTS, max_new_tokens=6, seed=1, **options):
            assert np.isfinite(c.logprobs).all() and all(0 <= t <= 256 for t in c.tokens)
    only = {i: -math.inf for i in range(257) if i != 98}
    for options in (dict(temperature=0), dict(top_p=0.5), dict(top_k=3)):
        (c,) = sample.generate(model, [[5]], max_new_tokens=4, logit_bias=only, **options)
        assert c.tokens == [98] * 4 and np.isfinite(c.logprobs).all()


def test_no_prompts_at_all_are_an_empty_batch(model):
    logits, state = engine.prefill(model, [])
    assert logits.shape == (0, model.config.vocab_size) and state["wkv"].shape[1] == 0
    assert sample.generate(model, []) == sample.score_choices(model, [], []) == []


def test_empty_choices_and_answers_score_0(model):
    choices = [[[], [7], []], [[5, 6]], [[]], [[2, 3, 4]]]
    filled = [[ids for ids in of_prompt if ids] for of_prompt in choices]
    want = iter(
        value for of_prompt in sample.score_choices(model, PROMPTS, filled) for value in of_prompt
    )
    want = [[next(want) if ids else 0.0 for ids in of_prompt] for of_prompt in choices]
    assert sample.score_choices(model, PROMPTS, choices) == want
    tokens = sample.score_choices(model, PROMPTS, choices, per_token=True)
    assert [[len(ids) for ids in of_prompt] for of_prompt in tokens] == [[0, 1, 0], [2], [0], [3]]
    fused.build("cpu")  # the native code once read past the end of shorter lists
    forks = batch.fork(list(zip(PROMPTS, choices, strict=True)))
    got = forks.per_answer(batch.score_forks(model, forks).logps).tolist()
    assert got == pytest.approx([value for of_prompt in want for value in of_prompt], abs=1e-4)
    for groups in ([([0], [[]])], [([3, 4], [[], []]), ([5], [])]):
        forks = batch.fork(groups)
        scores = batch.score_forks(model, forks, 16)
        assert forks.per_answer(scores.logps).tolist() == [0.0] * len(forks.owner)
        assert scores.hits.dtype == torch.bool and scores.entropy.shape == (1, 0)
    with pytest.raises(ValueError, match="prompt is empty"):
        batch.fork([([1], [[2]]), ([], [[3]])])


def test_native_code_checks_lengths_and_types():
    fused.build("cpu")
    z, targets, m = torch.randn(4, 9), torch.zeros(4, dtype=torch.long), torch.ones(1, 1, 8)
    x = torch.randn(1, 3, 8)
    if not cpu.fits(z):
        pytest.skip("no C++ compiler")
    scores = cpu.score_rows(z, targets, 1.0)
    for wrong in (targets[:3], targets.int(), targets[:0]):
        with pytest.raises(ValueError, match="targets"):
            cpu.score_rows(z, wrong, 1.0)
    with pytest.raises(ValueError, match="dlogps is"):
        cpu.score_rows(z, targets, 1.0, scores, (torch.ones(3), None))
    assert [len(column) for column in cpu.score_rows(z[:0], targets[:0], 1.0)] == [0] * 4
    for before, weight in ((x[:, :2], m), (x, m[..., :7]), (x.double(), m)):
        with pytest.raises(ValueError, match="mix: "):
            cpu.fused("mix", 1, [x, before, None], [weight], 1)
    model = random_model()
    step, state = fused.decoder(model), model.zero_state(2)
    with pytest.raises(ValueError, match="ids are"):
        step(torch.zeros(2, dtype=torch.int32), state)
    with pytest.raises(ValueError, match="the state is not one of 2"):
        step(torch.zeros(2, dtype=torch.long), {**state, "wkv": state["wkv"][..., :3].contiguous()})
    assert step(torch.zeros(2, dtype=torch.long), state).shape == (2, 257)


def test_blanks_and_digits_are_not_counted_as_in_the_runners(model):
    """With the tokenizer known, a frequency penalty leaves "1" alone and holds back "b"."""
    tokenizer = load_tokenizer("bytes")
    one, b = tokenizer.encode("1b")
    for t, kept in ((one, True), (b, False)):
        c = sample.generate(
            model,
            [[5]],
            max_new_tokens=6,
            temperature=0,
            logit_bias={t: 50.0},
            frequency_penalty=100.0,
            tokenizer=tokenizer,
            stop_ids=(),
        )[0]
        assert (c.tokens == [t] * 6) == kept and c.tokens[0] == t


def test_a_wide_nucleus_is_the_same_as_a_sort_of_everything():
    """More than 256 tokens are kept; a row's draw does not depend on what the others need."""
    g = torch.Generator().manual_seed(0)
    p = (torch.randn(6, 3000, generator=g) * torch.tensor([0.1, 8, 0.5, 8, 1, 2])[:, None]).softmax(
        -1
    )
    for top_p, min_p in ((0.95, 0.0), (1.0, 0.001)):
        limits = [torch.full((6, 1), x) for x in (top_p, 3000.0, min_p)]
        for u in torch.rand(50, 6, generator=g):
            got = choice.draw_narrow(p, u, *limits, 256)
            for row in range(6):
                q, order = p[row].double().sort(descending=True)
                q = q * (q.cumsum(0) - q < top_p) * (q >= min_p * q[0])
                at = int((q.cumsum(0) / q.sum() <= float(u[row])).sum())
                near, one = order[max(at - 1, 0) : at + 2], slice(row, row + 1)
                assert (
                    got[row] in near
                    and got[row]
                    == choice.draw_narrow(p[one], u[one], *(x[one] for x in limits), 256)[0]
                )
    certain = torch.zeros(1, 5).index_fill(1, torch.tensor([1]), 0.7)
    assert (
        choice.draw(certain, torch.tensor([1 - 2**-24]))[0] == 1
    )  # never a token of probability 0


def forced(model, tokens, **options):
    """generate, the tokens being dictated."""
    real, left = graph.pick, list(tokens)

    def pick(logits, u, *rest):
        ids = torch.full((len(logits),), left.pop(0))
        return ids, logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]

    graph.pick = pick
    try:
        return sample.generate(
            model,
            [[5]],
            max_new_tokens=len(tokens),
            tokenizer=load_tokenizer("bytes"),
            **options,
        )[0]
    finally:
        graph.pick = real


@pytest.mark.parametrize(
    "text, stop, want, used",
    [
        ("abcdef", "cd", "ab", 4),  # over a border of two tokens
        ("ab\n\nUser: hi", ("\n\nUser:",), "ab", 9),
        ("né漢字x", "漢", "né", 6),  # its three bytes are three tokens
        ("né漢字x", "字x", "né漢", 10),
        ("aXbY", ("Y", "X"), "a", 2),
        ("abc", "zz", "abc", 3),
    ],
)
def test_stop_texts_over_token_borders(model, text, stop, want, used):
    tokenizer = load_tokenizer("bytes")
    c = forced(model, tokenizer.encode(text), stop=stop)
    assert c.text == want and c.tokens == tokenizer.encode(text)[:used] and len(c.logprobs) == used
    assert c.finish_reason == (
        "stop" if used < len(tokenizer.encode(text)) or text.endswith(tuple(stop)) else "length"
    )


def test_a_stop_id_inside_a_character_leaves_the_text_whole(model):
    ids = load_tokenizer("bytes").encode("a漢")
    c = forced(model, ids[:2] + [0], stop=())
    assert (
        c.tokens == ids[:2] + [0]
        and c.text == "a\ufffd"
        and c.finish_reason == "stop"
        and len(c.logprobs) == 3
    )


def test_final_states_are_those_of_prompt_and_completion_without_the_last_token(model):
    for prompts in (PROMPTS, [[3]]):
        limits = [7, 1, 4, 9][: len(prompts)]
        out = sample.generate(
            model, prompts, n=2, max_new_tokens=limits, seed=1, batch_size=3, return_state=True
        )
        for i, c in enumerate(out):
            _, want = model(torch.tensor([prompts[i // 2] + c.tokens[:-1]]))
            for k in want:
                torch.testing.assert_close(c.state[k], want[k], atol=2e-5, rtol=1e-4)
    whole = sample.generate(model, [[5, 6]], max_new_tokens=8, temperature=0)[0]
    half = sample.generate(model, [[5, 6]], max_new_tokens=5, temperature=0, return_state=True)[0]
    rest = sample.generate(
        model, [half.tokens[-1:]], state=half.state, max_new_tokens=3, temperature=0
    )[0]
    assert half.tokens + rest.tokens == whole.tokens and half.state["wkv"].shape[1] == 1


def test_slots_from_a_memory_budget(model, monkeypatch):
    state = sum(v.nbytes for v in model.zero_state(1).values())
    for slots in (1, 7, 40):
        need = slots * (3 * state + 24 * 257)
        assert engine.slots_for(model, need) == slots
        assert engine.slots_for(model, need - 1) == max(1, slots - 1)
    widths, real = set(), graph.decode

    def decode(model, step, ids, state):
        widths.add(len(ids))
        return real(model, step, ids, state)

    monkeypatch.setattr(graph, "decode", decode)
    memory = 7 * (3 * state + 24 * 257)
    sample.generate(model, PROMPTS, n=4, max_new_tokens=3, memory=memory, stop_ids=())
    assert widths == {7}


def test_live_weights_ddp_wrapper_dropout_and_modes():
    model = random_model()
    model.set_tune("lora", r=4, dropout=0.5)
    with torch.no_grad():
        for m in model.modules():
            if getattr(m, "lora_B", None) is not None:
                m.lora_B.normal_(std=0.3)
    model.train()
    model.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    wrapper = torch.nn.Module()
    wrapper.module = model
    out = sample.generate(wrapper, PROMPTS, max_new_tokens=8, seed=1)
    assert [m.training for m in model.modules()] == modes
    model.eval()
    assert [c.tokens for c in out] == [
        c.tokens for c in sample.generate(model, PROMPTS, max_new_tokens=8, seed=1)
    ]
    with torch.no_grad():
        model.head.weight.neg_()
    assert [c.tokens for c in out] != [
        c.tokens for c in sample.generate(model, PROMPTS, max_new_tokens=8, seed=1)
    ]


def test_callback_sees_every_token(model):
    seen = {}
    out = sample.generate(
        model,
        PROMPTS,
        n=2,
        max_new_tokens=6,
        seed=1,
        batch_size=3,
        stop_ids=range(60),
        callback=lambda i, c: seen.setdefault(i, []).append((c.tokens[-1], c.finish_reason)),
    )
    for i, c in enumerate(out):
        assert [t for t, _ in seen[i]] == c.tokens and [r for _, r in seen[i]] == [None] * (
            len(c.tokens) - 1
        ) + [c.finish_reason]


def test_scores_of_choices_are_those_of_whole_sequences(model, monkeypatch):
    choices = [[[7], [8, 9], [1, 2, 3]], [[5]], [[6, 6], [4]], [[2, 3], [2, 4], [200] * 30]]
    _, state = engine.prefill(model, [[4, 5, 6]])
    for start, width in ((None, 4096), (state, 4096), (None, 5)):
        monkeypatch.setattr(engine, "PREFILL", width)
        sums = sample.score_choices(model, PROMPTS, choices, state=start, temperature=0.7)
        tokens = sample.score_choices(
            model, PROMPTS, choices, state=start, temperature=0.7, per_token=True
        )
        for p, prompt in enumerate(PROMPTS):
            for ids, total, each in zip(choices[p], sums[p], tokens[p], strict=True):
                seq = torch.tensor([prompt + ids])
                want = model.token_logprobs(seq[:, :-1], seq[:, 1:], start, temperature=0.7)[
                    0, len(prompt) - 1 :
                ]
                np.testing.assert_allclose(each, want.detach(), atol=1e-5)
                assert abs(total - want.sum().item()) < 1e-4
    for bad, words in (
        ([[[-1]]], "1 of 1 has id -1"),
        ([[[999]]], "1 of 1 has id 999"),
        ([], "a list for each"),
    ):
        with pytest.raises(UserError, match=words):
            sample.score_choices(model, [[1]], bad)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(temperature=-1), "temperature='?-1'?: expected .* or equal to 0"),
        (dict(top_p=0), "top_p='?0'?: expected .* greater than 0"),
        (dict(top_p=1.1), "top_p='?1.1"),
        (dict(top_k=-1), "top_k='?-1"),
        (dict(min_p=2), "min_p='?2"),
        (dict(repetition_penalty=0), "repetition_penalty='?0"),
        (dict(stop="x"), "need a tokenizer"),
        (dict(stop=["a", ""], tokenizer="bytes"), "stop='' is empty"),
        (dict(stop="hello", tokenizer="integers:200"), "stop='hello' can never be generated"),
        (dict(prompts=[[1], []]), "prompt 2 of 2: the prompt is empty"),
        (dict(prompts=[[1, 257]]), "has id 257.* 0 to 256"),
        (dict(prompts=[[-1]]), "has id -1"),
        (dict(stop_ids=[300]), "stop_ids: 300 is not"),
        (dict(logit_bias={999: 1}), "logit_bias: 999"),
        (dict(max_new_tokens=0), "max_new_tokens='?0"),
        (dict(batch_size=0), "batch_size='?0"),
        (dict(seed=-1), "seed='?-1"),
        (dict(n=0), "n='?0"),
        (dict(prompts=[[1]] * 3, state=2), "state has 2 rows for 3 prompts"),
        (dict(temperature=1e-40), "temperature=1e-40: expected 0, which is greedy, or 1e-06"),
        (dict(temperature=1e39), "temperature=1e[+]39: expected 0"),
        (dict(temperature=math.nan), "temperature='?nan"),
        (dict(presence_penalty=math.inf), "presence_penalty='?inf"),
        (dict(frequency_penalty=-1e39), "frequency_penalty='?-1e[+]39"),
        (dict(repetition_penalty=1e-45), "repetition_penalty='?1e-45"),
        (dict(logit_bias={5: math.nan}), "logit_bias: nan for id 5"),
        (dict(logit_bias={5: math.inf}), "logit_bias: inf for id 5"),
        (dict(logit_bias=dict.fromkeys(range(257), -math.inf)), "every id is ruled out"),
        (dict(stop=["\ud83d"], tokenizer="bytes"), "stop='.*' can never be generated"),
        (dict(prompts=[[1]] * 3, max_new_tokens=[4, 4]), "max_new_tokens: 2 of them for 3"),
        (dict(prompts=[[1]] * 3, indices=[0]), "indices: 1 of them for 3 prompts"),
    ],
)
def test_bad_arguments_name_the_thing(model, options, words):
    options = {"prompts": [[1]], **options}
    if "tokenizer" in options:
        options["tokenizer"] = load_tokenizer(options["tokenizer"])
    if "state" in options:
        options["state"] = model.zero_state(options["state"])
    with pytest.raises(UserError, match=words):
        sample.generate(model, options.pop("prompts"), **options)


def test_answers_shown_are_those_of_generate(model, capsys):
    tokenizer = load_tokenizer("bytes")
    documents = []
    for prompt, reply in (("hi", "a"), ("User: x", "bc")):
        ids = tokenizer.encode(prompt + reply)
        documents.append((ids, [0] * len(prompt) + [1] * len(reply)))
    answers.show_answers(model.eval(), documents, tokenizer)
    lines = capsys.readouterr().out.splitlines()
    options = dict(max_new_tokens=128, temperature=0, tokenizer=tokenizer, stop="\n\nUser:")
    for i, (prompt, reply) in enumerate((("hi", "a"), ("User: x", "bc"))):
        (answer,) = sample.generate(model, [tokenizer.encode(prompt)], **options)
        assert lines[3 * i] == f"  {prompt!r}"
        assert lines[3 * i + 1].startswith(f"    model: {answer.text[:20]!r}"[:-1])
        assert lines[3 * i + 2] == f"    data:  {reply!r}"


def test_streaming_holds_back_half_a_character(capsys):
    tokenizer = load_tokenizer("bytes")
    ids, pieces = tokenizer.encode("aé漢b"), []
    for i in range(1, len(ids) + 1):
        pieces.append((0, engine.Completion(tokens=ids[:i])))
    pieces.append((0, engine.Completion(tokens=ids, text="aé漢b", finish_reason="length")))
    terminal.print_stream(iter(pieces), tokenizer)
    assert capsys.readouterr().out == "aé漢b\n"


def test_streaming_never_shows_what_becomes_a_stop_text(capsys):
    tokenizer, shown = load_tokenizer("bytes"), []
    ids = tokenizer.encode("a\n\nUs b\n\nUser:")

    def pieces():
        for i in range(1, len(ids)):
            yield 0, engine.Completion(tokens=ids[:i])
            shown.append(capsys.readouterr().out)
        yield 0, engine.Completion(tokens=ids, text="a\n\nUs b", finish_reason="stop")

    terminal.print_stream(pieces(), tokenizer, ("\n\nUser:",))
    assert (
        shown[:6] == ["a", "", "", "", "", "\n\nUs "]
        and "".join(shown) + capsys.readouterr().out == "a\n\nUs b\n"
    )


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    model.save_pretrained(out / "m.pth")
    return out / "m.pth"


def test_command_line(saved, tmp_path, monkeypatch, capsys):
    base = [
        "--model",
        str(saved),
        "--tokenizer=bytes",
        "--device=cpu",
        "--max_new_tokens=5",
        "--seed=1",
    ]

    def run(*flags):
        sample.main(read_flags(sample.Config, [*base, *flags]))
        return capsys.readouterr().out

    one = run("--prompt=def ")
    assert one.startswith("def ") and one == run("--prompt=def ")
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    both = run(f"--prompts={tmp_path / 'p.txt'}", "--n=2")
    assert both.count("--- prompt") == 4 and "prompt 2, sample 2" in both
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand you?\n\n"))
    assert run("--chat").count("Assistant:") == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "which model"),
        (["--model=nowhere.pth"], "nowhere.pth does not exist"),
        (["--model=SAVED"], "vocabulary of 257 and no config.json"),
        (["--model=SAVED", "--tokenizer=integers:500"], "502 ids.*only 257"),
        (["--model=SAVED", "--tokenizer=bytes", "--prompts=no.txt"], "no.txt cannot be read"),
        (["--model=SAVED", "--tokenizer=bytes", "--prompt=a", "--temperature=1e30"], "expected 0"),
        (["--model=SAVED", "--tokenizer=bytes", "--prompt=a", "--stop="], "stop='' is empty"),
    ],
)
def test_bad_input_is_one_line_before_any_output(flags, words, saved, capsys):
    flags = [f.replace("SAVED", str(saved)) for f in flags]
    with pytest.raises(UserError, match=words):
        sample.main(read_flags(sample.Config, [*flags, "--device=cpu"]))
    assert capsys.readouterr().out == ""


def test_batch_goes_on_where_it_was_killed(saved, tmp_path):
    rows = [{"id": i, "prompt": f"row {i}\u2028" * (i % 5), "gold": {"x": [i]}} for i in range(29)]
    rows.append({"id": 29, "prompt": [{"role": "user", "content": "hello"}]})
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )

    def start(out):
        return subprocess.Popen(
            [
                sys.executable,
                "sample.py",
                "batch",
                str(tmp_path / "in.jsonl"),
                str(out),
                "--model",
                str(saved),
                "--tokenizer=bytes",
                "--device=cpu",
                "--n=2",
                "--batch_size=3",
                "--max_new_tokens=60",
                "--seed=4",
                "--top_p=0.9",
                "--frequency_penalty=0.3",
            ],
            cwd=ROOT,
            stdout=-1,
            stderr=-1,
        )

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    done = start(whole)
    assert done.wait() == 0, done.stderr.read()
    lines = [json.loads(line) for line in whole.read_bytes().decode().split("\n")[:-1]]
    assert [{k: v for k, v in line.items() if k != "completions"} for line in lines] == rows
    assert all(
        len(line["completions"]) == 2 and set(line["completions"][0]) == {"text", "finish_reason"}
        for line in lines
    )
    run = start(killed)
    while run.poll() is None and not (killed.is_file() and killed.read_bytes().count(b"\n") >= 3):
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    part = killed.read_bytes()
    assert 3 <= part.count(b"\n") < 30
    killed.write_bytes(part + whole.read_bytes()[len(part) :][:40])  # and half a line more
    again = start(killed)
    assert again.wait() == 0 and b"of them from before" in again.stdout.read()
    assert killed.read_bytes() == whole.read_bytes()
    (tmp_path / "in.jsonl").write_text('{"prompt": "other"}\n')
    wrong = start(killed)
    assert (
        wrong.wait() == 1
        and b"is not row 1 of" in wrong.stderr.read()
        and killed.read_bytes() == whole.read_bytes()
    )


def test_no_compiler_and_no_traceback(saved):
    env = {"PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "sample.py",
            "--model",
            str(saved),
            "--tokenizer=bytes",
            "--prompt=a",
            "--device=cpu",
            "--max_new_tokens=3",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0 and done.stdout.startswith("a"), done.stderr
    done = subprocess.run(
        [sys.executable, "sample.py", "--model=no.pth"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 1 and done.stderr == "error: no.pth does not exist\n"


def test_texts_of_flags(capsys):
    """What is no UTF-8 is one line; a literal backslash and n is said, or read with --escape."""
    flags = ["--prompt=a\\nb\\\\n\\x", "--stop=\\n", "--stop=é\\t", "--system=plain"]
    cfg = sample.read_texts(read_flags(sample.Config, flags))
    assert cfg.prompt == "a\\nb\\\\n\\x" and cfg.stop == ("\\n", "é\\t")
    note = capsys.readouterr().err
    assert (
        note.startswith("--prompt, --stop: \\n is a backslash and an n") and note.count("\n") == 1
    )
    cfg = sample.read_texts(read_flags(sample.Config, [*flags, "--escape"]))
    assert cfg.prompt == "a\nb\\n\\x" and cfg.stop == ("\n", "é\t") and cfg.system == "plain"
    assert not capsys.readouterr().err
    whole = sample.read_texts(sample.Config(prompt="\udce6\udcbc\udca2"))  # of an ASCII locale
    assert whole.prompt == "漢"
    for name, value in (("prompt", "x\udcff"), ("system", "\ud83d"), ("stop", ("a", "\udcff"))):
        with pytest.raises(UserError, match=f"--{name}: .* is not UTF-8 text"):
            sample.read_texts(sample.Config(**{name: value}))


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_chat_goes_on_after_bytes_that_are_no_utf8(saved, locale):
    command = [sys.executable, "sample.py", "--model", str(saved), "--tokenizer=bytes", "--chat"]
    command += ["--device=cpu", "--max_new_tokens=3", "--seed=1"]
    env = {"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONCOERCECLOCALE": "0", **locale}
    typed = b"hello\n\xff\xfe\n" + "h\u00e9 \u6f22\n".encode() + b"\n"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, input=typed, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"Assistant:") == 2  # the first turn and the third
    assert done.stderr.count(b"error: this line: ") == 1 and b"Traceback" not in done.stderr
    done = subprocess.run([*command[:-1], b"--prompt=\xff"], cwd=ROOT, capture_output=True, env=env)
    assert done.returncode == 1 and done.stderr.startswith(b"error: --prompt: ")
    assert done.stderr.count(b"\n") == 1


def test_a_second_batch_with_other_settings_is_refused_by_name(saved, model, tmp_path):
    rows, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    helpers.write(rows, {"prompt": "1"}, {"prompt": "2"}, {"prompt": "3"})
    other = tmp_path / "other.pth"
    helpers.random_model("x070", 1, n_layer=2, n_embd=64, vocab_size=257).save_pretrained(other)
    _, state = engine.prefill(model, [[4, 5]])
    weights.write_state(state, tmp_path / "s.pth")

    def run(*flags, path=saved, tokenizer="bytes"):
        flags = (f"--model={path}", f"--tokenizer={tokenizer}", "--device=cpu", *flags)
        flags = (str(rows), str(out), "--max_new_tokens=4", "--temperature=0", *flags)
        sample.batch(read_flags(sample.BatchConfig, flags))
        return out.read_bytes()

    whole = run()
    assert run() == whole == run("--batch_size=1")
    for key, flags in (
        ("model", dict(path=other)),
        ("tokenizer", dict(tokenizer="integers:200")),
        ("state", [f"--state={tmp_path / 's.pth'}"]),
        ("temperature", ["--temperature=1.0"]),
        ("max_new_tokens", ["--max_new_tokens=5"]),
        ("stop", ["--stop=x"]),
        ("seed", ["--seed=3"]),
        ("logprobs", ["--logprobs"]),
    ):
        with pytest.raises(UserError, match=f"was made with {key}=.*, and this is {key}="):
            run(**flags) if isinstance(flags, dict) else run(*flags)
        assert out.read_bytes() == whole
    (tmp_path / "out.jsonl.json").unlink()  # as written by an earlier version
    out.write_bytes(whole[: whole.index(b"\n") + 1])
    assert run() == whole
    out.unlink()  # begun anew, with other settings
    assert run("--temperature=1.0", "--seed=1") != whole and run("--temperature=1.0", "--seed=1")


def test_half_a_character_in_any_column_is_a_line_with_its_place(saved, tmp_path):
    rows = tmp_path / "in.jsonl"
    for bad in ('{"prompt": "b", "note": "\\ud83d"}', '{"prompt": "\\ud83d"}'):
        helpers.write(rows, {"prompt": "a"}, bad)
        with pytest.raises(UserError, match="in.jsonl:2: not UTF-8 text"):
            sample.read_prompts(rows, load_tokenizer("bytes"))


def test_a_note_or_an_output_that_batch_did_not_write_is_refused(saved, tmp_path):
    rows, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    helpers.write(rows, {"prompt": "1"}, {"prompt": "2"})
    flags = [str(rows), str(out), f"--model={saved}", "--tokenizer=bytes", "--device=cpu"]
    cfg = read_flags(sample.BatchConfig, [*flags, "--max_new_tokens=2"])
    sample.batch(cfg)
    for note in ("x", [1], 5):
        (tmp_path / "out.jsonl.json").write_text(json.dumps(note))
        with pytest.raises(UserError, match="out.jsonl.json: it is .*; expected a valid dict"):
            sample.batch(cfg)
    for line in ("5", '{"a": ' * 100_000):
        out.write_text(line + "\n")
        with pytest.raises(UserError, match="out.jsonl(:1: it is 5| is not JSON Lines)"):
            sample.batch(cfg)
