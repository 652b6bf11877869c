"""The chat of the command line: what its state holds, what may be typed, what a terminal sees."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import sample
from gosling import engine, terminal
from gosling.config import UserError, read_flags
from gosling.data import render_chat
from gosling.tokenizer import load_tokenizer
from model import RWKV, RWKVConfig

import helpers
import pytest
import torch
from helpers import ROOT

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def model():
    """Its greedy answers depend on what was said two turns before."""
    return helpers.random_model("x070", 1, 0.6, n_layer=2, n_embd=64, vocab_size=257)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.pth"
    model.save_pretrained(path)
    return path


# ----------------------------------------------------------------------------------------------
# what the state holds


def scripted(monkeypatch, text, tokenizer=BYTES, end="", seen=None):
    """The engine generates this text, then the end id, or the user's Ctrl-C comes.

    seen: a list that gets the ids which each answer began with.
    """

    def stream(model, prompts, state, **options):
        if seen is not None:
            seen.append(prompts[0])
        request = engine.Request(model, prompts, engine.Options(**options))
        slot = engine.Slot(request, 0, prompts[0], request.options.max_new_tokens[0], None)
        for token in tokenizer.encode(text):
            engine.grow(slot, token, 0.0)
            yield 0, slot.completion
            if slot.completion.finish_reason:
                return
        if end == "Ctrl-C":
            raise KeyboardInterrupt
        engine.grow(slot, tokenizer.end_id, 0.0)
        yield 0, slot.completion

    monkeypatch.setattr(terminal, "stream", stream)


def say(model, talk, text, think="", tokenizer=BYTES, **options):
    options = {"max_new_tokens": 100, "stop": engine.TURNS, "tokenizer": tokenizer, **options}
    terminal.answer(model, tokenizer, talk, text, options, think)


def logits_after(model, talk, text):
    return engine.prefill(model, [BYTES.encode(text)], terminal.catch_up(model, talk, []))[0][0]


CASES = {  # what is generated, how it ends -> the reply in the template
    "its end": (" One.\n\n\nTwo \n", "", {}, "One.\nTwo"),
    "another turn": (" One\n\nUser: more, and more", "", {}, "One"),
    "a stop text": (" One STOP it", "", {"stop": ("STOP",)}, "One"),
    "half a stop text": (" One\n\nUs", "Ctrl-C", {}, "One"),
    "half a character": (" One\u6f22 two", "", {"max_new_tokens": 5}, "One\ufffd"),
    "Ctrl-C": ("One", "Ctrl-C", {}, "One"),
    "the most tokens": (" One two three", "", {"max_new_tokens": 8}, "One two"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_state_is_that_of_the_rendered_conversation(name, model, monkeypatch, capsys):
    """Logits behind each turn, against the whole text as it is written here, read in one piece."""
    generated, end, options, reply = CASES[name]
    scripted(monkeypatch, generated, end=end)
    talk = terminal.Talk([{"role": "system", "content": "Be kind."}])
    whole = "System: Be kind.\n\n"
    for turn, shown in (("hello", "hello"), (" and\n\n\nyou? ", "and\nyou?")):
        say(model, talk, turn, **options)
        assert reply.partition("\n")[0] in capsys.readouterr().out
        whole += f"User: {shown}\n\nAssistant: {reply}\n\n"
        want = model(torch.tensor([BYTES.encode(whole + "User: x")]))[0][0, -1]
        torch.testing.assert_close(logits_after(model, talk, "User: x"), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("generated, end", [("", ""), (" \n\u200b", ""), ("", "Ctrl-C")])
def test_a_turn_without_an_answer_is_taken_back(generated, end, model, monkeypatch, capsys):
    talk = terminal.Talk([{"role": "system", "content": "Be kind."}])
    scripted(monkeypatch, " One")
    say(model, talk, "hello")
    state, ids, n_read = talk.state, list(talk.ids), talk.n_read
    scripted(monkeypatch, generated, end=end)
    say(model, talk, "and you?", think="on")
    assert talk.state is state and talk.ids == ids and talk.n_read == n_read
    assert "as it was before this turn" in capsys.readouterr().out


def test_an_answer_of_the_model_itself_is_read_as_rendered(model, capsys):
    """Two turns of the real engine: what was shown, rendered by hand, is what the state holds."""
    talk, whole = terminal.Talk([]), ""
    for turn in ("hello", "and you?"):
        say(model, talk, turn, max_new_tokens=7, seed=3, temperature=0.7)
        shown = capsys.readouterr().out.split("Assistant:")[1].rpartition("\n(cut off")[0]
        reply = re.sub("\n+", "\n", shown.replace("\r", "\n").strip())
        whole += f"User: {turn}\n\nAssistant: {reply}\n\n"
    assert talk.ids == BYTES.encode(whole)
    want = model(torch.tensor([BYTES.encode(whole + "!")]))[0][0, -1]
    torch.testing.assert_close(logits_after(model, talk, "!"), want, atol=1e-5, rtol=0)


def test_think_forms_are_those_of_training(monkeypatch, capsys):
    """Token for token what a row of training data with these thoughts becomes, in World's tokens.

    The thoughts of earlier turns stay, as they do there.
    """
    world = load_tokenizer("world")
    model = RWKV(RWKVConfig("x070", n_layer=1, n_embd=64, vocab_size=65536))
    user = {"role": "user", "content": "Hi"}
    for think, generated, reply in (
        ("on", ">\nHm.\n</think>\nYes.", {"reasoning_content": "Hm.", "content": "Yes."}),
        ("off", ">\nYes.", {"content": "<think>\n</think>\nYes."}),
        ("", " Yes.", {"content": "Yes."}),
    ):
        talk, seen = terminal.Talk([]), []
        scripted(monkeypatch, generated, world, seen=seen)
        messages = []
        for _ in range(2):
            messages.append(user)
            prompt, _ = render_chat(messages, world, generation_prompt=True, think=think)
            say(model, talk, "Hi", think, world)
            messages.append({"role": "assistant", **reply})
            trained, _ = render_chat(messages, world)
            assert talk.ids == trained[:-1] + [261]  # a blank line, where training ends in 0
            began = {"on": " <think", "off": " <think>\n</think", "": ""}[think]
            assert prompt[-len(seen[-1]) :] == seen[-1]
            assert world.decode(seen[-1]).endswith(f"\n\nAssistant:{began}")


# ----------------------------------------------------------------------------------------------
# what is typed


@pytest.mark.parametrize(
    "lines, want",
    [
        (["hello"], ("hello", False)),
        (["/save a b.pth "], ("/save a b.pth", True)),
        (["one\\", "two\\", "/three"], ("one\ntwo\n/three", False)),
        (["one\\", None], ("one", False)),
        (['"""/usr', "", '  two"""'], ("/usr\n\n  two", False)),
        (['"""', "one", '""" '], ("\none\n", False)),
        (['"""one"""'], ("one", False)),
        (['"""one', None], ("one", False)),
        (["/usr\nwas pasted"], ("/usr\nwas pasted", False)),
        ([None], None),
    ],
)
def test_lines_become_turns(lines, want):
    waiting = iter(lines)
    got = terminal.read_turn(lambda _: next(waiting), lambda: False)
    assert (
        got is None
        if want is None
        else (got.text.rstrip("\n"), got[1])
        == (
            want[0].rstrip("\n"),
            want[1],
        )
    )
    assert next(waiting, "all read") == "all read"


def test_lines_that_come_at_once_are_one_turn():
    """As they are; a backslash goes on only behind the last of them."""
    lines = [["one\\", "", "/two\\"], ["three"]]

    def read(_):
        if not lines[0]:
            lines.pop(0)
        return lines[0].pop(0)

    typed = terminal.read_turn(read, lambda: bool(lines[0]))
    assert typed == ("one\\\n\n/two\nthree", False)


def test_colours_are_for_terminals():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert terminal.styles_for(Terminal(), {})["name"] == "\033[1m"
    assert terminal.styles_for(Terminal(), {"NO_COLOR": ""})["name"] == "\033[1m"
    for stream, environment in (
        (io.StringIO(), {}),
        (Terminal(), {"NO_COLOR": "1"}),
        (Terminal(), {"TERM": "dumb"}),
    ):
        assert set(terminal.styles_for(stream, environment).values()) == {""}


# ----------------------------------------------------------------------------------------------
# commands


def flags(saved, *more):
    return [f"--model={saved}", "--tokenizer=bytes", "--device=cpu", "--chat", *more]


@pytest.fixture
def run(saved, monkeypatch, capsys):
    """Type lines into a chat in this process -> (answers, all of stdout, lines of stderr)"""

    def run(*lines, more=("--temperature=0", "--max_new_tokens=12"), model=saved):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        sample.main(read_flags(sample.Config, flags(model, *more)))
        out, err = capsys.readouterr()
        return answers(out), out, err.splitlines()

    return run


def answers(out):
    return re.findall(r"Assistant:(.*?)\n\(cut off", out, re.S)


def test_a_saved_chat_goes_on_as_if_it_had_not_ended(run, saved, tmp_path):
    """In this process and in another, with /load and with --state."""
    file = tmp_path / "talk.pth"
    whole, _, _ = run("hello", "and you?", "why?")
    first, out, err = run("hello", "and you?", f"/save {file}", "why?")
    assert first == whole and len(whole) == 3 and not err and f"{file}: the state of" in out
    note = json.loads(file.with_suffix(".json").read_text())
    assert note["prompt"].startswith("User: hello\n\nAssistant:") and note["tokenizer"] == "bytes"
    assert run(f"/load {file}", "why?")[0] == whole[2:]
    assert run("something else", "/reset", "hello")[0][1:] == whole[:1]
    assert run("why?")[0] != whole[2:]  # that answer depends on what was said before
    command = [sys.executable, "sample.py", f"--state={file}", "--chat", "--device=cpu"]
    command += ["--temperature=0", "--max_new_tokens=12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, input="why?\n", text=True)
    assert answers(done.stdout) == whole[2:], done.stderr


def test_what_is_loaded_is_what_was_saved_bit_for_bit(model, saved, tmp_path):
    file, talk = tmp_path / "talk.pth", terminal.Talk([])
    say(model, talk, "hello", max_new_tokens=7, temperature=0)
    cfg = read_flags(sample.Config, flags(saved))
    terminal.save_talk(model, BYTES, talk, str(file), str(saved), cfg)
    loaded = terminal.load_talk(model, BYTES, str(file), str(saved), cfg)
    _, whole = engine.prefill(model, [talk.ids])
    for key, value in talk.state.items():
        assert value.any() and loaded.state[key].equal(value)
        torch.testing.assert_close(value, whole[key], atol=2e-5, rtol=1e-4)
    assert talk.n_read == len(talk.ids) and not loaded.ids


def test_mistakes_are_lines_and_the_chat_goes_on(run, saved, tmp_path):
    other, small = tmp_path / "other.pth", tmp_path / "small.pth"
    sizes = {"n_layer": 2, "n_embd": 64, "vocab_size": 257}
    helpers.random_model("x070", 2, **sizes).save_pretrained(other)
    helpers.random_model("x070", **{**sizes, "n_layer": 1}).save_pretrained(small)
    for path in (other, small):
        run("hello", f"/save {path.with_name('of_' + path.name)}", model=path)
    run("hello", f"/save {tmp_path / 'words.pth'}")
    note = tmp_path / "words.json"
    words = json.loads(note.read_text())
    note.write_text(json.dumps({**words, "tokenizer": "integers:200"}))
    (tmp_path / "config.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    whole, _, _ = run("hello", "why?")
    mistakes = {
        "/reset it": "/reset takes nothing behind it",
        "/load": "/load takes a file behind it",
        "/usr/bin": '/usr/bin: no such command, /help lists them; .* between """',
        "/load nowhere.pth": "nowhere.pth does not exist",
        f"/load {saved}": "is not a tuned state",
        f"/load {tmp_path / 'of_other.pth'}": "other.pth, and .* has other weights",
        f"/load {tmp_path / 'of_small.pth'}": "a state of another model: 1 layers",
        f"/load {tmp_path / 'words.pth'}": "words.pth has the tokenizer integers:200, this chat",
        f"/load {tmp_path}": "",
        f"/save {other}": "is not a tuned state",
        f"/save {tmp_path / 'x.json'}": "whose name ends in .pth",
        f"/save {tmp_path / 'config.pth'}": "config.json is there",
        f"/save {tmp_path / 'config.json' / 'x.pth'}": "cannot write .*config.json/x.json: ",
    }
    got, _, errors = run("hello", *mistakes, "why?")
    assert len(errors) == len(mistakes)
    for (line, expected), error in zip(mistakes.items(), errors, strict=True):
        assert re.match(f"error: .*{expected}", error), (line, error)
    assert got == whole
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    _, out, errors = run("/save x.pth", "/help", more=["--system=Be kind."])
    assert errors == ["error: nothing was said yet"] and "/reset " in out


@pytest.mark.parametrize(
    "more, words",
    [
        (["--chat=false", "--think=on"], "--think is for --chat"),
        (["--chat=false", "--system=x"], "--system is for --chat"),
        (["--save_state=x.pth"], "/save FILE"),
        (["--prompt=x"], "--chat goes without --prompt"),
        (["--n=2"], "--chat goes without"),
        (["--chat=false", "--save_state=x.json"], "x.json: .* ends in .pth"),
    ],
)
def test_flags_that_do_not_go_together(more, words, saved):
    """batch does without a chat's, too."""
    with pytest.raises(UserError, match=words):
        sample.main(read_flags(sample.Config, flags(saved, *more)))
    if "for --chat" in words:
        with pytest.raises(UserError, match=words):
            sample.batch(read_flags(sample.BatchConfig, ["in.jsonl", "out.jsonl", *more]))


# ----------------------------------------------------------------------------------------------
# a terminal


def take_terminal():
    """In the new process: Ctrl-C is for it, also where these tests are a job that ignores it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """The chat in a process of its own behind a terminal."""

    def __init__(self, *command, **environment):
        self.hand, end = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "sample.py", *command],
            cwd=ROOT,
            env=env,
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(end)
        self.text = ""

    def type(self, text):
        os.write(self.hand, text.encode())

    def until(self, pattern):
        """What is shown up to a pattern; what comes after it is the next call's."""
        give_up = time.monotonic() + 60
        while not (found := re.search(pattern, self.text)):
            ready, _, _ = select.select([self.hand], [], [], 1)
            assert time.monotonic() < give_up, (pattern, self.text[-2000:])
            if ready:
                self.text += os.read(self.hand, 65536).decode(errors="replace")
        shown, self.text = self.text[: found.end()], self.text[found.end() :]
        return shown


def test_a_terminal(saved, tmp_path):
    """Two pastes, as marked ones and as lines at once; colours; Ctrl-C as it answers; Ctrl-D."""
    file = tmp_path / "t.pth"
    chat = Terminal(*flags(saved, "--temperature=0", "--max_new_tokens=100000000"))
    began = chat.until("User: ")
    assert "/help" in began and began.endswith("\033[36mUser: ")
    for paste in ("\033[200~one\ntwo\033[201~\r", "three\n\nfour\r"):
        chat.type(paste)
        assert "\033[1mAssistant:" in chat.until(r"Assistant:[\s\S]{200}")
        chat.type("\x03")
        assert "Traceback" not in chat.until(r"\(stopped\)[\s\S]*?User: ")
    chat.type(f"/save {file}\r")
    chat.until("the state of this chat[\\s\\S]*User: ")
    chat.type("\x04")
    assert chat.process.wait(60) == 0
    prompt = json.loads(file.with_suffix(".json").read_text())["prompt"]
    turns = [turn.partition(": ")[2] for turn in prompt.split("\n\n")]
    assert (turns[0], turns[2], len(turns)) == ("one\ntwo", "three\nfour", 5)


def test_ctrl_c_at_the_prompt_ends(run, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run()
