"""The tokenizer.json that a hub folder has beside a vocab file: the same ids and texts, read by the
tokenizers library alone, and by transformers where it is installed."""

import random

import export
import prepare
from gosling.hub_folder import VOCAB_OF_ENGINES, vocab_text
from gosling.tokenizer import VocabTokenizer
from gosling.vocab_json import LONGEST, longest_of, tokenizer_json

import pytest
from helpers import PAGES, ROOT, random_model
from tokenizers import Tokenizer

TEXTS = [
    "今天是美好的一天。日本語の文章。",
    "🎉🏳️‍🌈👩‍👩‍👧 and 🤦🏽‍♂️",
    "fn f(x) {\r\n\t\ty = x;\n\n\n    }" + "-" * 500 + " " * 300,
    "naïve café e\u0301 ½ € \x00\x7f\x85\u2028 ไทย ಕನ್ನಡ עברית",
    *(page.read_text(encoding="utf-8") for page in PAGES),
    (ROOT / "export.py").read_text(encoding="utf-8"),
]


def by_the_library(tokenizer):
    """The file, read as transformers reads it; "<|endoftext|>" in a text stays text."""
    text, why_none = tokenizer_json(tokenizer)
    assert not why_none
    hub = Tokenizer.from_str(text)
    hub.encode_special_tokens = True
    return hub


def ids_of(hub, text):
    return hub.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["world", "bytes"])
def test_ids_and_texts_are_those_of_the_vocab_file(name):
    tokenizer = prepare.load_tokenizer(name)
    hub, rng = by_the_library(tokenizer), random.Random(1)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids_of(hub, text) == ids
        assert hub.decode(ids, skip_special_tokens=False) == text
    characters = [chr(c) for c in range(1, 0x1FBFF) if not 0xD800 <= c < 0xE000]
    every_id, tokens = list(tokenizer.tokens), list(tokenizer.tokens.values())
    for _ in range(3000):
        parts = rng.choices(characters, k=3)
        parts += [token.decode(errors="ignore") for token in rng.choices(tokens, k=6)]
        rng.shuffle(parts)
        text = "".join(parts)
        assert ids_of(hub, text) == tokenizer.encode(text), repr(text)
        ids = [rng.choice(every_id) for _ in range(6)]  # broken UTF-8, for the most
        assert hub.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids), ids
    assert Tokenizer.from_str(hub.to_str()).token_to_id("<|endoftext|>") == 0


def test_a_vocab_files_longest_match():
    """By another way of matching: every string of these letters, against a table of prefixes."""
    words = ["a", "ab", "abca", "b", "bc", "c", "cab", "d", "é", "éa", "今今"]
    halves = [b"\xe4\xbb", b"\x8a", b"\xe4"]  # of 今, which is no token alone
    tokens = {i + 1: w for i, w in enumerate([w.encode() for w in words] + halves)}
    hub = by_the_library(VocabTokenizer(tokens, "x"))
    of = {token: i for i, token in tokens.items()}
    rng = random.Random(2)
    for _ in range(2000):
        text = "".join(rng.choices("aabbccdé今", k=rng.randint(1, 9)))
        data, want = text.encode(), []
        while data:
            token = max((t for t in of if data.startswith(t)), key=len)
            want.append(of[token])
            data = data[len(token) :]
        assert ids_of(hub, text) == want, text


def test_words_are_cut_where_python_cuts_them():
    tokenizer = prepare.load_tokenizer("integers:30")
    hub = by_the_library(tokenizer)
    text = " 3\t30\x1c0\x85 7\u3000\n12\u2028 1 "
    assert ids_of(hub, text) == tokenizer.encode(text) == [4, 31, 1, 8, 13, 2]
    assert hub.decode([4, 31, 1]) == tokenizer.decode([4, 31, 1]) == "3 30 0"


def test_text_without_a_token_raises():
    """It must not become id 0, the end of a document."""
    for tokens, text in (({1: b"a"}, "ab"), ({1: b"a", 2: b"\xc3"}, "aé")):
        hub = by_the_library(VocabTokenizer(tokens, "x"))
        with pytest.raises(Exception, match="Missing"):
            ids_of(hub, text)
    with pytest.raises(Exception, match="Missing"):
        ids_of(by_the_library(prepare.load_tokenizer("integers:3")), "1 4")


@pytest.mark.parametrize(
    "token, words",
    [
        (b"a\xe4\xbb", "begins or ends inside a character"),
        (b"\x8aa", "begins or ends inside a character"),
        (b"<|endoftext|>", "is a token of its own"),
        (b"a" * (LONGEST + 1), f"more than {LONGEST} bytes"),
    ],
)
def test_what_has_no_such_form(token, words):
    text, why_none = tokenizer_json(VocabTokenizer({1: b"a", 2: token}, "x"))
    assert text == "" and words in why_none


def test_the_longest_token_can_be_read():
    tokens = {i: b"a" * i for i in range(1, LONGEST + 1)}
    hub = by_the_library(VocabTokenizer(tokens, "x"))
    assert ids_of(hub, "a" * (2 * LONGEST + 7)) == [LONGEST, LONGEST, 7]
    assert longest_of([]) == ""


def hub_folder(tmp_path, tokenizer, **sizes):
    random_model("x070", n_layer=1, n_embd=64, **sizes).save_pretrained(tmp_path / "a.pth")
    argv = [f"--model={tmp_path}/a.pth", f"--out={tmp_path}/hub", f"--tokenizer={tokenizer}"]
    export.main(["hub", *argv])
    return tmp_path / "hub"


def test_the_name_that_engines_read_is_worlds_format_with_every_id(tmp_path):
    """A list of tokens, a line with a comment: written as `id literal bytelength` from 1 on."""
    vocab = tmp_path / "v.txt"
    vocab.write_text("# of letters\na \nb\n'\n\"\n今\n", encoding="utf-8")
    folder = hub_folder(tmp_path, vocab)
    lines = (folder / VOCAB_OF_ENGINES).read_text(encoding="utf-8").splitlines()
    literals = [f"{token.encode()!r}" for token in ("a ", "b", "'", '"', "今")]
    lengths = (2, 1, 1, 1, 3)
    assert lines == [f"{n} {t} {k}" for n, t, k in zip(range(1, 6), literals, lengths, strict=True)]
    world = prepare.load_tokenizer("world")
    assert vocab_text(world).count("\n") == 65529


def test_ids_with_a_gap_are_not_written_where_lines_are_counted(tmp_path, capsys):
    vocab = tmp_path / "v.txt"
    vocab.write_text("1 'a' 1\n3 'b' 1\n4 b'a\\xe4' 2\n")
    folder = hub_folder(tmp_path, vocab)
    assert sorted(p.name for p in folder.iterdir() if "oken" in p.name or "vocab" in p.name) == [
        "tokenizer_config.json",
        "vocab.txt",
    ]
    warning = capsys.readouterr().err
    assert "AutoTokenizer will not read" in warning and "inside a character" in warning
    assert prepare.load_tokenizer(folder).encode("ab") == [1, 3]


def test_another_folders_own_tokenizer_json_comes_before_a_vocab_txt(tmp_path):
    folder = hub_folder(tmp_path, "bytes")
    assert prepare.load_tokenizer(folder).digest == prepare.load_tokenizer("bytes").digest
    (folder / "tokenizer_config.json").write_text("{}")
    assert prepare.load_tokenizer(folder).name.endswith("tokenizer.json")


@pytest.mark.parametrize("name", ["bytes", "world"])
def test_transformers_reads_the_folder(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = prepare.load_tokenizer(name)
    folder = hub_folder(tmp_path, name, vocab_size=65536 if name == "world" else 257)
    # True or False: without, transformers asks in the terminal
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for text in TEXTS:
        text = text.replace("<|endoftext|>", "")
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    batch = theirs(["User: hi", "hi"], padding=True)
    hi = ours.encode("hi")
    assert batch["input_ids"][1][-len(hi) :] == hi and batch["attention_mask"][1][0] == 0
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]
    for messages, prompt in ((chat, False), (chat[:1], True)):
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert ids == prepare.render_chat(messages, ours, generation_prompt=prompt)[0]
