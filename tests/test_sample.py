"""The generation engine against a plain loop over the network, and the command line."""
import io
import subprocess
import sys

import pytest
import torch

import prepare
import sample
from common import UserError
from conftest import ROOT
from model import RWKV, RWKVConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    m = RWKV(RWKVConfig("x070", 2, 64, 257))
    with torch.no_grad():
        for p in m.parameters():
            p += 0.1 * torch.randn_like(p)
    return m


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 3]]


def test_greedy_equals_a_plain_loop(model):
    for prompt, c in zip(PROMPTS, sample.generate(model, PROMPTS, max_new_tokens=12, temperature=0)):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
        assert c.tokens == ids[len(prompt):] and c.finish_reason == "length"


def test_logprobs_are_what_training_computes_at_the_same_temperature(model):
    for c, prompt in zip(sample.generate(model, PROMPTS, max_new_tokens=20, temperature=0.7, top_p=0.8, top_k=50, seed=1), PROMPTS):
        ids = torch.tensor([prompt + c.tokens])
        want = model.token_logprobs(ids[:, :-1], ids[:, 1:], temperature=0.7)[0, len(prompt) - 1:]
        torch.testing.assert_close(torch.tensor(c.logprobs), want, atol=1e-5, rtol=1e-5)


def test_a_completion_depends_on_seed_prompt_and_sample_index_alone(model):
    whole = sample.generate(model, PROMPTS, n=3, max_new_tokens=10, seed=7)
    assert len(whole) == 12
    for batch_size in (1, 2, 5):
        assert [c.tokens for c in sample.generate(model, PROMPTS, n=3, max_new_tokens=10, seed=7, batch_size=batch_size)] == \
            [c.tokens for c in whole]
    fewer = sample.generate(model, PROMPTS[:2], n=2, max_new_tokens=10, seed=7)
    assert [c.tokens for c in fewer] == [whole[i].tokens for i in (0, 1, 3, 4)]
    assert [c.tokens for c in sample.generate(model, PROMPTS, n=3, max_new_tokens=10, seed=8)] != [c.tokens for c in whole]
    assert len({tuple(c.tokens) for c in whole[:3]}) == 3


def test_sampling_follows_the_distribution():
    """Frequencies of 40,000 draws against the filtered softmax, within four standard errors."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
    u = torch.rand(40000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature, top_p, top_k in ((1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.8, 0), (1.0, 1.0, 2), (2.0, 0.9, 3)):
        p = (logits[0] / temperature).softmax(-1)  # already in falling order
        before = p.cumsum(0) - p
        keep = (before < top_p) & (torch.arange(5) < (top_k or 5))
        want = (p * keep / (p * keep).sum()).double()
        ids, logps = sample.pick(logits.expand(40000, -1), u.float(), temperature, top_p, top_k)
        got = ids.bincount(minlength=5).double() / 40000
        assert ((got - want).abs() <= 4 * (want * (1 - want) / 40000).sqrt() + 1e-9).all(), (got, want)
        torch.testing.assert_close(logps, p.log()[ids])  # of the distribution before top-p and top-k


def test_states_fork_and_carry_on(model):
    """One state for all prompts, a row per prompt, and the sequence read whole, give the same tokens."""
    head = [4, 5, 6, 7]
    _, state = sample.prefill(model, [head])
    whole = sample.generate(model, [head + p for p in PROMPTS], max_new_tokens=8, seed=3)
    shared = sample.generate(model, PROMPTS, max_new_tokens=8, seed=3, state=state)
    own = {k: v.repeat(1, 4, *[1] * (v.dim() - 2)) for k, v in state.items()}
    rows = sample.generate(model, PROMPTS, max_new_tokens=8, seed=3, state=own, batch_size=2)
    assert [c.tokens for c in whole] == [c.tokens for c in shared] == [c.tokens for c in rows]


def test_long_prompts_are_read_in_pieces(model, monkeypatch):
    ids = torch.randint(0, 257, (50,)).tolist()
    prompts = [ids, ids[:3], ids[:9], ids[:20]]
    want = [model(torch.tensor([p]))[0][0, -1] for p in prompts]
    monkeypatch.setattr(sample, "PREFILL", 13)
    logits, _ = sample.prefill(model, prompts)
    torch.testing.assert_close(logits, torch.stack(want), atol=2e-5, rtol=1e-4)
    with pytest.raises(UserError, match="prompt is empty"):
        sample.prefill(model, [[1], []])


def test_stops_at_ids_and_at_texts(model):
    tokenizer = prepare.load_tokenizer("bytes")
    free = sample.generate(model, [[5]], max_new_tokens=30, seed=2, tokenizer=tokenizer, stop_ids=())[0]
    stop_id = free.tokens[10]
    c = sample.generate(model, [[5]], max_new_tokens=30, seed=2, tokenizer=tokenizer, stop_ids=[stop_id])[0]
    first = free.tokens.index(stop_id)
    assert c.tokens == free.tokens[:first + 1] and c.finish_reason == "stop" and c.text == tokenizer.decode(c.tokens[:-1])
    plain = next(i for i in range(5, 29) if all(32 < t - 1 < 127 for t in free.tokens[i:i + 2]))
    word = tokenizer.decode(free.tokens[plain:plain + 2])
    c = sample.generate(model, [[5]], max_new_tokens=30, seed=2, tokenizer=tokenizer, stop_ids=(), stop=[word])[0]
    assert c.finish_reason == "stop" and word not in c.text and len(c.tokens) <= plain + 2
    assert tokenizer.decode(free.tokens).startswith(c.text)


def test_streaming_holds_back_half_a_character(capsys):
    tokenizer = prepare.load_tokenizer("bytes")
    ids, pieces = tokenizer.encode("aé漢b"), []
    for i in range(1, len(ids) + 1):
        pieces.append((0, sample.Completion(tokens=ids[:i])))
    sample.print_stream(iter(pieces), tokenizer)
    assert capsys.readouterr().out == "aé漢b\n"


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    model.save_pretrained(out / "m.pth")
    return out / "m.pth"


def test_command_line(saved, tmp_path, monkeypatch, capsys):
    base = ["--model", str(saved), "--tokenizer=bytes", "--device=cpu", "--max_new_tokens=5", "--seed=1"]

    def run(*flags):
        sample.main(sample.common.read_flags(sample.Config, [*base, *flags]))
        return capsys.readouterr().out
    one = run("--prompt=def ")
    assert one.startswith("def ") and one == run("--prompt=def ")
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    both = run(f"--prompts={tmp_path / 'p.txt'}", "--n=2")
    assert both.count("--- prompt") == 4 and "prompt 2, sample 2" in both
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand you?\n\n"))
    assert run("--chat").count("Assistant:") == 2


def test_chat_reads_each_turn_once_and_equals_the_whole_rendering(model, monkeypatch):
    """The state kept between turns is the state of the conversation rendered as a whole."""
    tokenizer, seen = prepare.load_tokenizer("bytes"), []
    real = sample.stream

    def spy(m, prompts, **options):
        seen.append((prompts[0], options["state"]))
        return real(m, prompts, **options)
    monkeypatch.setattr(sample, "stream", spy)
    lines = iter(["hello", "and you?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    messages = []
    real_render = prepare.render_chat
    monkeypatch.setattr(prepare, "render_chat", lambda m, *a, **k: (messages.append([dict(x) for x in m]), real_render(m, *a, **k))[1])
    sample.chat(model, tokenizer, sample.Config(), dict(max_new_tokens=6, seed=0, tokenizer=tokenizer))
    ids, _ = real_render(messages[-1], tokenizer, generation_prompt=True)
    _, state = model(torch.tensor([ids[:-1]]))
    assert seen[-1][0] == ids[-1:]
    for k in state:
        torch.testing.assert_close(seen[-1][1][k], state[k], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("flags, words", [
    ([], "which model"),
    (["--model=nowhere.pth"], "nowhere.pth does not exist"),
    (["--model=SAVED"], "vocabulary of 257 and no config.json"),
    (["--model=SAVED", "--tokenizer=integers:500"], "502 ids.*only 257"),
    (["--model=SAVED", "--tokenizer=bytes", "--prompts=no.txt"], "no.txt does not exist"),
])
def test_bad_input_is_one_line(flags, words, saved):
    flags = [f.replace("SAVED", str(saved)) for f in flags]
    with pytest.raises(UserError, match=words):
        sample.main(sample.common.read_flags(sample.Config, [*flags, "--device=cpu"]))


def test_no_compiler_and_no_traceback(saved):
    env = {"PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "sample.py", "--model", str(saved), "--tokenizer=bytes", "--prompt=a", "--device=cpu",
                           "--max_new_tokens=3"], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.startswith("a"), done.stderr
    done = subprocess.run([sys.executable, "sample.py", "--model=no.pth"], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stderr == "error: no.pth does not exist\n"
