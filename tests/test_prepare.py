"""Corpora to token files: the bytes on disk by hand, splits, memory, and every bad input."""

import gzip
import json
import lzma
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import prepare
from gosling import tokenizer
from gosling.config import UserError
from gosling.data import read_examples, read_preferences, read_prompts, read_replies
from gosling.token_files import TokenFile, TokenFileWriter
from gosling.tokenizer import load_tokenizer

import numpy as np
import pytest
import tokenizers

ROOT = Path(prepare.__file__).parent


def run(*words):
    """prepare.py in this process."""
    prepare.main([str(word) for word in words])


def cli(*words, **options):
    return subprocess.run(
        [sys.executable, str(ROOT / "prepare.py"), *map(str, words)],
        capture_output=True,
        text=True,
        **options,
    )


def by_hand(prefix):
    """A .bin/.idx pair read with struct alone -> (dtype code, [[id, ...], ...])."""
    idx, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert idx[:9] == b"MMIDIDX\0\0" and struct.unpack_from("<Q", idx, 9) == (1,)
    code, n, m = struct.unpack_from("<BQQ", idx, 17)
    assert m == n + 1
    sizes = struct.unpack_from(f"<{n}i", idx, 34)
    offsets = struct.unpack_from(f"<{n}q", idx, 34 + 4 * n)
    assert struct.unpack_from(f"<{m}q", idx, 34 + 12 * n) == tuple(range(m))
    assert len(idx) == 34 + 12 * n + 8 * m
    width, letter = {8: (2, "H"), 9: (4, "I")}[code]
    assert len(data) == width * sum(sizes)
    assert offsets == tuple(width * sum(sizes[:i]) for i in range(n))
    documents = []
    for size, offset in zip(sizes, offsets, strict=True):
        documents.append(list(struct.unpack_from(f"<{size}{letter}", data, offset)))
    return code, documents


def upstream_pair(prefix, documents, code=8, letter="H"):
    """A pair as RWKV-LM's own builder lays it out, packed here by hand."""
    n, width = len(documents), struct.calcsize(letter)
    sizes = [len(document) for document in documents]
    Path(f"{prefix}.bin").write_bytes(
        b"".join(struct.pack(f"<{len(d)}{letter}", *d) for d in documents)
    )
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<Q", 1)
        + bytes([code])
        + struct.pack("<QQ", n, n + 1)
        + struct.pack(f"<{n}i", *sizes)
        + struct.pack(f"<{n}q", *(width * sum(sizes[:i]) for i in range(n)))
        + struct.pack(f"<{n + 1}q", *range(n + 1))
    )


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def b(text):
    return [byte + 1 for byte in text.encode()]


# ---- token files


def test_writer_by_hand(tmp_path):
    with TokenFileWriter(tmp_path / "x", np.uint16) as f:
        f.add([1, 2, 65535, 0])
        f.add(np.array([7, 8, 0]))
        f.add([0])
    assert by_hand(tmp_path / "x") == (8, [[1, 2, 65535, 0], [7, 8, 0], [0]])
    with TokenFileWriter(tmp_path / "y", np.uint32) as f:
        f.add([70000, 0])
    assert by_hand(tmp_path / "y") == (9, [[70000, 0]])
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx", "y.bin", "y.idx"]


@pytest.mark.parametrize("name", ["data.v2", "data.v2.bin", "data.v2.idx"])
def test_reader_of_an_upstream_pair(tmp_path, name):
    documents = [[5, 6, 0], [65535, 0], [1, 2, 3, 4, 0]]
    upstream_pair(tmp_path / "data.v2", documents)
    data = TokenFile(tmp_path / name)
    assert (
        len(data) == 3
        and data.sizes.tolist() == [3, 2, 5]
        and data.meta == {}
        and data.tokenizer() is None
    )
    assert [data.doc(i).tolist() for i in range(3)] == documents and data.tokens.tolist() == sum(
        documents, []
    )
    assert data.doc(-1).tolist() == documents[-1] and isinstance(data.tokens, np.memmap)
    with pytest.raises(IndexError):
        data.doc(3)


@pytest.mark.parametrize(
    "code, letter", [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H"), (9, "I")]
)
def test_all_integer_dtypes(tmp_path, code, letter):
    upstream_pair(tmp_path / "x", [[100, 0], [3, 0]], code, letter)
    assert TokenFile(tmp_path / "x").doc(1).tolist() == [3, 0]


def test_check_vocab(tmp_path):
    upstream_pair(tmp_path / "x", [[5, 6, 0], [9, 300, 0], [300, 0]])
    TokenFile(tmp_path / "x").check_vocab(301)
    with pytest.raises(
        UserError, match=r"x.bin: id 300 at token 4 \(document 1\) .* vocab_size 300"
    ):
        TokenFile(tmp_path / "x").check_vocab(300)
    upstream_pair(tmp_path / "x", [[5, 0], [0], [7, 0]])
    with pytest.raises(UserError, match=r"id 7 at token 3 \(document 2\)"):
        TokenFile(tmp_path / "x").check_vocab(7)
    upstream_pair(tmp_path / "x", [[5, -6, 0]], 4, "i")
    with pytest.raises(UserError, match="id -6 at token 1"):
        TokenFile(tmp_path / "x").check_vocab(10)


def test_check_vocab_reads_no_tokens_where_it_need_not(tmp_path):
    upstream_pair(tmp_path / "x", [[5, 65535, 0]])
    data = TokenFile(tmp_path / "x")
    data.tokens = None  # any look at them raises
    data.check_vocab(65536)  # all that uint16 can hold
    with pytest.raises(AttributeError):
        data.check_vocab(65535)
    data.meta = {"vocab_size": 300}
    data.check_vocab(300)
    with pytest.raises(AttributeError):
        data.check_vocab(299)


def damage(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data) or data)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("x.idx", None, "x.idx does not exist"),
        ("x.bin", None, "x.bin does not exist"),
        ("x.idx", lambda d: b"TNTIDX\0\0" + d[8:], "x.idx does not begin with MMIDIDX"),
        ("x.idx", lambda d: b"\0" if d.clear() else b"", "does not begin"),
        ("x.idx", lambda d: d.__setitem__(9, 2), "x.idx does not begin with MMIDIDX and version 1"),
        ("x.idx", lambda d: d.__setitem__(17, 6), "code 6 is no integer type"),
        ("x.idx", lambda d: d.__setitem__(17, 7), "code 7 is no integer type"),
        ("x.idx", lambda d: d.__setitem__(17, 10), "code 10 is no integer type"),
        ("x.idx", lambda d: d[:-1], "x.idx is cut off or damaged: .* 81 bytes, expected 82"),
        ("x.idx", lambda d: d[:20], "x.idx is cut off or damaged: .*20 bytes"),
        (
            "x.idx",
            lambda d: d.__setitem__(17, 9),
            "x.bin is cut off, or not of this index: 10 bytes, expected 20",
        ),
        (
            "x.idx",
            lambda d: d.__setitem__(slice(18, 34), struct.pack("<QQ", 3, 2)),
            "3 documents, then 2",
        ),
        (
            "x.idx",
            lambda d: d.__setitem__(slice(34, 42), struct.pack("<2i", -3, 8)),
            "document 0 does not begin",
        ),
        ("x.idx", lambda d: d.__setitem__(50, 4), "document 1 does not begin where"),
        ("x.bin", lambda d: d[:-2], "x.bin is cut off, or not of this index: 8 bytes, expected 10"),
        ("x.bin", lambda d: d + b"\0\0", "12 bytes, expected 10"),
    ],
)
def test_damaged_pairs(tmp_path, file, change, message):
    upstream_pair(tmp_path / "x", [[5, 6, 0], [9, 0]])
    if change:
        damage(tmp_path / file, change)
    else:
        (tmp_path / file).unlink()
    with pytest.raises(UserError, match=message) as e:
        TokenFile(tmp_path / "x")
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_missing_prefix_and_broken_sidecar(tmp_path):
    upstream_pair(tmp_path / "x_train", [[5, 0]])
    with pytest.raises(UserError, match="x.bin does not exist"):
        TokenFile(tmp_path / "x")
    (tmp_path / "x_train.json").write_text("[")
    with pytest.raises(UserError, match="x_train.json is not JSON"):
        TokenFile(tmp_path / "x_train")


def test_interrupted_writer_leaves_nothing(tmp_path):
    upstream_pair(tmp_path / "old", [[5, 0]])
    for error in (KeyboardInterrupt, ValueError):
        for name in ("new", "old"):
            with pytest.raises(error), TokenFileWriter(tmp_path / name, np.uint16) as f:
                f.add([1, 2, 3])
                raise error
    for ids in ([70000], [-1], [1, 65536, 2]):
        bad = pytest.raises(UserError, match="outside 0..65535")
        with bad, TokenFileWriter(tmp_path / "new", np.uint16) as f:
            f.add(ids)
    assert sorted(os.listdir(tmp_path)) == ["old.bin", "old.idx"] and by_hand(tmp_path / "old") == (
        8,
        [[5, 0]],
    )


def test_failing_index_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    bad = pytest.raises(UserError, match="cannot write .*x.*No space")
    with bad, TokenFileWriter(tmp_path / "x", np.uint16) as f:
        f.add([1, 0])
        monkeypatch.setattr(np, "cumsum", full)
    assert os.listdir(tmp_path) == []


# ---- corpora


def test_jsonl(tmp_path, capsys):
    texts = [f"text {i} é👍\n\nmore" for i in range(100)]
    jsonl(tmp_path / "in.jsonl", texts)
    run(tmp_path / "in.jsonl", f"--out={tmp_path}/d/x", "--tokenizer=bytes", "--val=0.1")
    (_, train), (_, val) = by_hand(tmp_path / "d/x_train"), by_hand(tmp_path / "d/x_val")
    assert len(train) == 90 and len(val) == 10
    assert sorted(map(tuple, train + val)) == sorted(
        tuple(b(text) + [0]) for text in texts
    )  # each once, none lost
    assert train == [
        b(text) + [0] for text in texts if b(text) + [0] in train
    ]  # in the input's order
    meta = TokenFile(tmp_path / "d/x_val").meta
    raw = b"".join(bytes(i - 1 for i in document[:-1]) for document in val)
    tokens = sum(map(len, val))
    assert meta == {
        "tokenizer": "bytes",
        "tokenizer_digest": load_tokenizer("bytes").digest,
        "vocab_size": 257,
        "documents": 10,
        "tokens": tokens,
        "bytes": len(raw),
        "bytes_per_token": len(raw) / tokens,
        "longest_document": max(map(len, val)),
        "xz_bits_per_byte": pytest.approx(
            8 * len(lzma.compress(raw, preset=9)) / len(raw), abs=1e-9
        ),
    }
    assert "xz_bits_per_byte" not in TokenFile(tmp_path / "d/x_train").meta
    assert sorted(os.listdir(tmp_path / "d")) == [
        "x_train.bin",
        "x_train.idx",
        "x_train.json",
        "x_val.bin",
        "x_val.idx",
        "x_val.json",
    ]
    out = capsys.readouterr().out
    assert (
        "x_train: 90 documents" in out and "x_val: 10 documents" in out and "bytes per token" in out
    )


def test_split_is_deterministic_and_follows_the_seed(tmp_path):
    source = jsonl(tmp_path / "in.jsonl", [f"{i}" for i in range(200)])
    vals = []
    for seed in (0, 0, 1):
        run(source, f"--out={tmp_path}/x", "--tokenizer=bytes", f"--seed={seed}", "--val=0.05")
        vals.append(by_hand(tmp_path / "x_val")[1])
    assert vals[0] == vals[1] != vals[2] and all(len(val) == 10 for val in vals)
    run(
        jsonl(source, ["a", "b"]), f"--out={tmp_path}/x", "--tokenizer=bytes", "--val=0.0001"
    )  # at least one
    assert len(by_hand(tmp_path / "x_val")[1]) == len(by_hand(tmp_path / "x_train")[1]) == 1
    run(source, f"--out={tmp_path}/x", "--tokenizer=bytes", "--val=0.99")  # and not all
    assert len(by_hand(tmp_path / "x_val")[1]) == len(by_hand(tmp_path / "x_train")[1]) == 1


def test_one_document_is_cut_at_a_line(tmp_path):
    text = "".join(f"line number {i}\r\n" for i in range(100))
    (tmp_path / "in.txt").write_bytes(text.encode())
    run(tmp_path / "in.txt", f"--out={tmp_path}/x", "--tokenizer=bytes", "--val=0.1")
    (_, [head]), (_, [tail]) = by_hand(tmp_path / "x_train"), by_hand(tmp_path / "x_val")
    assert head[:-1] + tail[:-1] == b(text) and head[-1] == tail[-1] == 0
    assert bytes(i - 1 for i in tail[:6]) == b"line n" and abs(len(tail) / len(text) - 0.1) < 0.02
    (tmp_path / "in.txt").write_text(
        "1 2 3 4 5 6 7 8 9 10"
    )  # no lines: between words, no word in two
    run(tmp_path / "in.txt", f"--out={tmp_path}/x", "--tokenizer=integers:10", "--val=0.3")
    assert sum(by_hand(tmp_path / "x_train")[1] + by_hand(tmp_path / "x_val")[1], []) in [
        [*range(2, k), 0, *range(k, 12), 0] for k in (8, 9, 10)
    ]
    (tmp_path / "in.txt").write_text("0123456789")
    run(tmp_path / "in.txt", f"--out={tmp_path}/x", "--tokenizer=bytes", "--val=0.3")
    assert by_hand(tmp_path / "x_val")[1] == [b("789") + [0]]
    (tmp_path / "in.txt").write_text(
        "a title\n" + "x" * 1000
    )  # a border far from the place is none
    run(tmp_path / "in.txt", f"--out={tmp_path}/x", "--tokenizer=bytes", "--val=0.1")
    assert by_hand(tmp_path / "x_val")[1] == [b("x" * 101) + [0]]


def test_a_giant_document_is_not_validation(tmp_path):
    texts = ["x" * 10_000] + [
        f"document {i}" for i in range(20)
    ]  # half of 10 % of the text are 500 characters
    source = jsonl(tmp_path / "in.jsonl", texts)
    for seed in range(10):
        run(source, f"--out={tmp_path}/x", "--tokenizer=bytes", "--val=0.1", f"--seed={seed}")
        assert len(val := by_hand(tmp_path / "x_val")[1]) == 2 and max(map(len, val)) < 20
        assert len(by_hand(tmp_path / "x_train")[1]) == 19


def test_no_validation(tmp_path):
    (tmp_path / "in.txt").write_text("one document")
    run(tmp_path / "in.txt", f"--out={tmp_path}/x", "--tokenizer=bytes", "--val=0")
    assert (
        by_hand(tmp_path / "x_train")[1] == [b("one document") + [0]]
        and not (tmp_path / "x_val.bin").exists()
    )


def test_folder(tmp_path, capsys):
    src = tmp_path / "src"
    (src / "b" / ".git").mkdir(parents=True)
    (src / "b.txt").write_text("bee")
    (src / "a").write_bytes("\ufeffaé\r\n".encode())
    (src / "b" / "x.py").write_text("x = 1")
    (src / "b" / "more.jsonl").write_text('{"text": "j"}\n\n{"text": ""}\n')
    (src / "b" / ".git" / "config").write_text("hidden")
    (src / "empty").write_text("")
    (src / "latin").write_bytes(b"\xe9t\xe9")
    (src / "binary").write_bytes(b"\0\1\2")
    run(src, f"--out={tmp_path}/x", "--tokenizer=bytes", "--val=0")
    assert by_hand(tmp_path / "x_train")[1] == [b(t) + [0] for t in ("aé\r\n", "j", "x = 1", "bee")]
    out = capsys.readouterr().out
    assert "left out 2 empty documents" in out and "left out 2 files that are not UTF-8 text" in out


def test_integers(tmp_path):
    rows = np.random.default_rng(0).integers(0, 360, (20, 50))
    np.save(tmp_path / "two.npy", rows)
    np.save(tmp_path / "one.npy", rows[0].astype(np.uint8))
    jsonl(tmp_path / "in.jsonl", [" ".join(map(str, row)) for row in rows])
    expected = [[v + 1 for v in row] + [0] for row in rows.tolist()]
    for name in ("two.npy", "in.jsonl"):
        run(tmp_path / name, f"--out={tmp_path}/x", "--tokenizer=integers:359", "--val=0")
        assert by_hand(tmp_path / "x_train")[1] == expected
    meta = TokenFile(tmp_path / "x_train").meta
    assert (meta["tokenizer"], meta["vocab_size"]) == ("integers:359", 361)
    run(
        tmp_path / "one.npy", f"--out={tmp_path}/x", "--tokenizer=integers:359", "--val=0.2"
    )  # one document, cut
    ids = [int(v) + 1 for v in rows[0].astype(np.uint8)]
    [head], [tail] = by_hand(tmp_path / "x_train")[1], by_hand(tmp_path / "x_val")[1]
    assert head[:-1] + tail[:-1] == ids and head[-1] == tail[-1] == 0 and 7 <= len(tail[:-1]) <= 13


def test_uint32(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0, 65534], [65535, 99999]]))
    for maximum, code in ((65534, 8), (65535, 9), (99999, 9)):
        np.save(tmp_path / "a.npy", np.array([[0, 65534], [maximum, 1]]))
        run(tmp_path / "a.npy", f"--out={tmp_path}/x", f"--tokenizer=integers:{maximum}", "--val=0")
        assert by_hand(tmp_path / "x_train") == (code, [[1, 65535, 0], [maximum + 1, 2, 0]])
    data = TokenFile(tmp_path / "x_train")
    data.check_vocab(100001)
    assert data.dtype == np.uint32 and data.doc(1).tolist() == [100000, 2, 0]


def test_the_end_of_documents_can_be_named(tmp_path):
    words = tokenizers.models.WordLevel({"<pad>": 0, "a": 1, "<end>": 2, "b": 3}, "<pad>")
    theirs = tokenizers.Tokenizer(words)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    theirs.save(str(tmp_path / "t.json"))
    source = jsonl(tmp_path / "in.jsonl", ["a b", "b"])
    make = (source, f"--out={tmp_path}/x", f"--tokenizer={tmp_path}/t.json", "--val=0")
    with pytest.raises(UserError, match="no token that ends .*--end_token=TOKEN"):
        run(*make)
    run(*make, "--end_token=<end>")
    data = TokenFile(tmp_path / "x_train")
    assert data.tokens.tolist() == [1, 3, 2, 3, 2]
    assert data.tokenizer().end_id == 2 and data.meta["tokenizer_digest"] == data.tokenizer().digest


def test_bpe_learns_from_training_documents_only(tmp_path):
    source = jsonl(
        tmp_path / "in.jsonl", [f"document{i:03} " + f"word{i:03} " * 30 for i in range(40)]
    )
    run(source, f"--out={tmp_path}/d/x", "--tokenizer=bpe:600", "--val=0.1")
    assert (tmp_path / "d/x.tokenizer.json").exists()
    train, val = TokenFile(tmp_path / "d/x_train"), TokenFile(tmp_path / "d/x_val")
    t = train.tokenizer()
    texts = {json.loads(line)["text"] for line in source.open()}
    decoded = {
        split: {t.decode(data.doc(i).tolist()) for i in range(len(data))}
        for split, data in (("train", train), ("val", val))
    }
    assert (
        decoded["train"] | decoded["val"] == texts
        and not decoded["train"] & decoded["val"]
        and len(val) == 4
    )
    words = {split: [text.split()[1] for text in decoded[split]] for split in decoded}
    assert max(len(t.encode(word)) for word in words["train"]) < min(
        len(t.encode(word)) for word in words["val"]
    )
    assert (
        train.meta["tokenizer"] == "x.tokenizer.json" and train.meta["vocab_size"] == t.vocab_size
    )
    assert load_tokenizer(tmp_path / "d/x.tokenizer.json").encode("word") == t.encode("word")
    train.check_vocab(t.vocab_size)
    run(
        source, f"--out={tmp_path}/e/y", f"--tokenizer={tmp_path}/d/x.tokenizer.json", "--val=0.1"
    )  # used again
    assert (tmp_path / "e/y_train.bin").read_bytes() == (tmp_path / "d/x_train.bin").read_bytes()
    assert TokenFile(tmp_path / "e/y_train").tokenizer().text == t.text


def test_stdlib(tmp_path):
    run("stdlib", f"--out={tmp_path}/s", "--tokenizer=world")
    train, val = TokenFile(tmp_path / "s_train"), TokenFile(tmp_path / "s_val")
    assert len(train) > 300 and len(val) == round(0.01 * (len(train) + len(val)))
    assert (
        train.meta["bytes"] > 5e6
        and 2 < train.meta["bytes_per_token"] < 5
        and val.meta["xz_bits_per_byte"] < 4
    )
    assert val.sizes.max() < 0.6 * len(val.tokens)
    t = train.tokenizer()
    texts = {t.decode(d.doc(i).tolist()) for d in (train, val) for i in range(len(d))}
    assert not any("Autogenerated by Sphinx" in text[:200] for text in texts)  # pydoc_data
    assert Path(json.__file__).read_text() in texts and Path(lzma.__file__).read_text() in texts
    train.check_vocab(65536)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="reads the peak of a process from /proc"
)
def test_memory_stays_below_the_corpus(tmp_path):
    line = json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * 22}) + "\n"
    peaks = []
    for name, count in (("small", 10), ("big", 60_000)):
        (tmp_path / name).with_suffix(".jsonl").write_text(line * count)
        code = (
            f"import prepare; prepare.main(['{tmp_path}/{name}.jsonl', '--out={tmp_path}/{name}', "
            "'--tokenizer=bytes'])\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        peaks.append(
            int(done.stdout.split()[-1]) * 1024
        )  # getrusage's maximum would count the parent before exec
    size = (tmp_path / "big.jsonl").stat().st_size
    assert size > 58e6 and TokenFile(tmp_path / "big_train").meta["documents"] == 59400
    assert peaks[1] - peaks[0] < 0.5 * size, [p // 2**20 for p in peaks]


# ---- what can go wrong

BAD_LINES = [
    ("{oops", "not JSON .*property name"),
    ("[1]", "expected a JSON object"),
    ('{"text": 5}', "got {'text': 5}"),
    ('{"txt": "x"}', "txt"),
    ('{"text": null}', "got {'text': None}"),
    ('{"text": "\\ud83d"}', "surrogates not allowed"),
    ("[" * 100_000, "recursion|Expecting value"),
]


@pytest.mark.parametrize("line, message", BAD_LINES)
def test_bad_jsonl_lines(tmp_path, capsys, line, message):
    out, path = tmp_path / "new" / "x", tmp_path / "in.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + '\n{"text": "good too"}\n')
    with pytest.raises(UserError, match=f"in.jsonl:3: .*({message}).*--skip_bad") as e:
        run(path, f"--out={out}", "--tokenizer=bytes")
    assert "\n" not in str(e.value) and not out.parent.exists()
    run(path, f"--out={out}", "--tokenizer=bytes", "--val=0", "--skip_bad")
    assert (
        len(by_hand(f"{out}_train")[1]) == 2
        and "left out 1 bad JSONL lines" in capsys.readouterr().out
    )


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(
        UserError, match="in.jsonl:1: not UTF-8 text .invalid start byte.*--skip_bad"
    ):
        run(tmp_path / "in.jsonl", f"--out={tmp_path}/x", "--tokenizer=bytes")
    (tmp_path / "in.txt").write_bytes(b"ok\xe9")
    with pytest.raises(UserError, match="in.txt is not UTF-8 text .byte 2 is 0xe9"):
        run(tmp_path / "in.txt", f"--out={tmp_path}/x", "--tokenizer=bytes")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "in.txt"]


@pytest.mark.parametrize(
    "values, tokenizer, message",
    [
        (
            [[1, 2], [3, 360]],
            "integers:359",
            "a.npy, row 1: token 1, '360', is not in integers:359",
        ),
        ([1, -5, 3], "integers:359", "a.npy, row 0: token 1, '-5', is not in"),
        ([1.0, 2.0], "integers:359", "a.npy, row 0: token 0, '1.0', is not in"),
        ([[[1]]], "integers:359", r"a.npy, row 0: .*'\[1\]'"),
        ([1, 2], "world", "a.npy: integer arrays need --tokenizer=integers:MAX"),
        ([1, 2], "bpe:300", "a.npy: integer arrays need"),
        ([], "integers:3", "no documents in .*a.npy"),
    ],
)
def test_bad_arrays(tmp_path, values, tokenizer, message):
    np.save(tmp_path / "a.npy", np.array(values))
    with pytest.raises(UserError, match=message):
        run(tmp_path / "a.npy", f"--out={tmp_path}/new/x", f"--tokenizer={tokenizer}", "--val=0")
    assert files_in(tmp_path) == ["a.npy"]


def test_value_that_does_not_fit_is_found_after_many_good_ones(tmp_path):
    """The first batches are already written by then; nothing of them is left, and what was there
    before is."""
    run(
        jsonl(tmp_path / "in.jsonl", ["7 8"]),
        f"--out={tmp_path}/x",
        "--tokenizer=integers:359",
        "--val=0",
    )
    before = {path: path.read_bytes() for path in tmp_path.glob("x*")}
    jsonl(tmp_path / "in.jsonl", ["1 2 3 " * 1000] * 400 + ["4 360"])
    with pytest.raises(UserError, match="in.jsonl:401: token 1, '360'"):
        run(tmp_path / "in.jsonl", f"--out={tmp_path}/x", "--tokenizer=integers:359", "--val=0")
    assert {
        path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "in.jsonl"
    } == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["gone.txt"], "gone.txt does not exist; INPUT is"),
        ([], "no documents in no INPUT"),
        (["empty.txt"], "no documents in empty.txt; left out 1 empty documents"),
        (["folder"], "no documents in folder"),
        (["in.txt", "--tokenizer=wolrd"], "'wolrd': no such name or file; choose world"),
        (["in.txt", "--val=1"], "val=1.0: expected"),
        (["in.txt", "--val=-0.1"], "val=-0.1: expected"),
        (["in.txt", "--tokenizer=bpe:100"], "SIZE >= 257"),
        (["in.txt", "--tokenizer=bpe:"], "expected bpe:SIZE"),
        (["in.txt", "--tokenizer=integers:9"], "in.txt: .*'hello'"),
        (["text.npy", "--tokenizer=integers:9"], "text.npy cannot be read: "),
    ],
)
def test_bad_commands(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, text in (("in.txt", "hello\nworld"), ("empty.txt", ""), ("text.npy", "1 2 3")):
        (tmp_path / name).write_text(text)
    before = files_in(tmp_path)
    with pytest.raises(UserError, match=message) as e:
        run(*words, "--out=new/x")
    assert "\n" not in str(e.value) and files_in(tmp_path) == before


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("hello")

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(UserError, match="in.txt cannot be read: Permission denied"):
        run(tmp_path / "in.txt", f"--out={tmp_path}/x", "--tokenizer=bytes")


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "in.txt").write_text("hello\nworld")
    with pytest.raises(UserError, match="cannot write"):
        run(tmp_path / "in.txt", f"--out={tmp_path}/in.txt/x", "--tokenizer=bytes")
    assert os.listdir(tmp_path) == ["in.txt"]


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "in.jsonl", ["hello"] * 10)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer.VocabTokenizer, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(source, f"--out={tmp_path}/new/x", "--tokenizer=integers:3")
    assert files_in(tmp_path) == ["in.jsonl"]


def test_no_sidecar_of_an_earlier_run_beside_new_tokens(tmp_path, monkeypatch):
    """Killed after the token files have their names and before the tokenizer is written."""
    source = jsonl(tmp_path / "in.jsonl", ["hello"] * 10)
    run(source, f"--out={tmp_path}/x", "--tokenizer=bytes")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer.VocabTokenizer, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(source, f"--out={tmp_path}/x", "--tokenizer=world")
    assert files_in(tmp_path) == [
        "in.jsonl",
        "x_train.bin",
        "x_train.idx",
        "x_val.bin",
        "x_val.idx",
    ]


# ---- the command line


def test_inspect(tmp_path, capsys):
    jsonl(tmp_path / "in.jsonl", ["Hello\nthere", "B" * 500])
    run(tmp_path / "in.jsonl", f"--out={tmp_path}/x", "--tokenizer=bytes", "--val=0")
    capsys.readouterr()
    for name in ("x_train", "x_train.bin", "x_train.idx"):
        run("inspect", tmp_path / name)
        out = capsys.readouterr().out
        assert "uint16, 2 documents, 513 tokens" in out and "12 to 501, on average 256.5" in out
        assert "largest id: 117, at token 6" in out  # the 't' of 'there', 116 + 1
        assert (
            '"tokenizer": "bytes"' in out
            and '"vocab_size": 257' in out
            and f'"bytes_per_token": {511 / 513}' in out
        )
        assert r"document 0: 'Hello\nthere'" in out and f"document 1: '{'B' * 200}'\n" in out
    (tmp_path / "x_train.json").unlink()
    run("inspect", tmp_path / "x_train")
    out = capsys.readouterr().out
    assert "sidecar: none" in out and "document 0: ids [73, 102," in out
    run("inspect", tmp_path / "x_train", "--tokenizer=bytes")
    assert r"document 0: 'Hello\nthere'" in capsys.readouterr().out


def test_command_line(tmp_path):
    (tmp_path / "in.txt").write_text("hello\n" * 50)
    done = cli("in.txt", "--out", "d/x", "--tokenizer=bytes", cwd=tmp_path)
    assert done.returncode == 0 and "x_train: 1 documents" in done.stdout and done.stderr == ""
    for words in (["gone.txt", "--out=x"], ["inspect", "gone"], ["show", "gone.jsonl"]):
        done = cli(*words, cwd=tmp_path)
        assert (
            done.returncode == 1
            and done.stderr.startswith("error: ")
            and done.stderr.count("\n") == 1
        ), done.stderr
        assert "gone" in done.stderr and done.stdout == ""
    assert sorted(os.listdir(tmp_path)) == ["d", "in.txt"]


@pytest.mark.parametrize(
    "words, field",
    [([], "--skip_bad"), (["inspect"], "prefix, its .bin"), (["show"], "examples to print")],
)
def test_help(words, field):
    done = cli(*words, "--help")
    assert (
        done.returncode == 0
        and field in " ".join(done.stdout.split())
        and "python prepare.py INPUT" in done.stdout
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """a folder that the datasets library reads as it reads a name on the hub, offline"""
    pytest.importorskip("datasets", reason="pip install datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for name, rows in (
        ("texts", [{"text": f"line {i}"} for i in range(5)]),
        ("chats", [{"messages": chat}]),
        (
            "prefs",
            [
                {
                    "prompt": "hi",
                    "chosen": chat,
                    "rejected": [chat[0], {"role": "assistant", "content": "no"}],
                }
            ],
        ),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    return tmp_path


def test_hugging_face_names_go_where_a_file_goes(hub):
    tokenizer = prepare.load_tokenizer("bytes")
    prepare.main([f"hf:{hub}/texts:train", f"--out={hub}/t", "--tokenizer=bytes", "--val=0"])
    data = TokenFile(hub / "t_train")
    assert [tokenizer.decode(data.doc(i)) for i in range(len(data))] == [
        f"line {i}" for i in range(5)
    ]
    assert read_examples(f"hf:{hub}/chats:train", tokenizer, 99) == [
        prepare.render_chat(
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], tokenizer
        )
    ]
    (pair,) = read_preferences(
        f"hf:{hub}/prefs:train", tokenizer, 99
    )  # whole conversations bring their prompt along
    assert tokenizer.decode(pair.prompt) == "User: hi\n\nAssistant:"
    assert [tokenizer.decode(ids) for ids in pair.answers] == [" yes", " no"]
    with pytest.raises(UserError, match="chats:tset: .*expected hf:DATASET:SPLIT"):
        read_examples(f"hf:{hub}/chats:tset", tokenizer, 99)


def test_slices_of_a_hugging_face_split_and_parquet(hub):
    tokenizer = load_tokenizer("bytes")
    name = f"hf:{hub}/texts:train"
    assert len(read_examples(f"{name}[:3]", tokenizer, 99)) == 3
    assert len(read_examples(f"{name}[20%:60%]", tokenizer, 99)) == 2
    with pytest.raises(UserError, match="texts: expected hf:DATASET:SPLIT"):
        read_examples(f"hf:{hub}/texts", tokenizer, 99)
    import datasets

    table = datasets.load_dataset(f"{hub}/texts", split="train")
    table.to_parquet(hub / "rows.Parquet")
    assert read_examples(hub / "rows.Parquet", tokenizer, 99) == read_examples(name, tokenizer, 99)
    (hub / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="bad.parquet: (?!.*hf:DATASET)"):
        read_examples(hub / "bad.parquet", tokenizer, 99)


def test_files_of_rows_are_what_their_names_say(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files = {
        "a.jsonl": lines,
        "b.JSONL": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"),
        "c.ndjson": lines,
        "d.json": json.dumps(rows, indent=1).encode(),
        "e.json": lines,  # lines in spite of the name
        "f.JSON.GZ": gzip.compress(json.dumps(rows).encode()),
        "g.jsonl.gz": gzip.compress(lines),
    }
    (tmp_path / "folder").mkdir()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        run(tmp_path / name, f"--out={tmp_path}/x", "--tokenizer=bytes", "--val=0")
        _, documents = by_hand(tmp_path / "x_train")
        assert documents == [b(row["text"]) + [0] for row in rows], name
        examples = read_examples(tmp_path / name, load_tokenizer("bytes"), 99)
        assert [ids for ids, _ in examples] == documents
    (tmp_path / "folder" / "package.json").write_text('{"name": "x"}')  # text among others
    (tmp_path / "folder" / "rows.ndjson").write_bytes(lines)
    run(tmp_path / "folder", f"--out={tmp_path}/x", "--tokenizer=bytes", "--val=0")
    assert by_hand(tmp_path / "x_train")[1][0] == b('{"name": "x"}') + [0]
    assert len(by_hand(tmp_path / "x_train")[1]) == 4
    (tmp_path / "h.json").write_text('[{"text": "good"}, {"text": 1}]')
    with pytest.raises(UserError, match=r"h.json, row 1: got .'text': 1."):
        run(tmp_path / "h.json", f"--out={tmp_path}/x", "--tokenizer=bytes")
    (tmp_path / "i.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    with pytest.raises(UserError, match="i.jsonl.gz cannot be read"):
        read_examples(tmp_path / "i.jsonl.gz", load_tokenizer("bytes"), 99)


# ---- prompts, which are read without a command


def test_prompts_and_replies(tmp_path, capsys):
    bytes_tokenizer, path = load_tokenizer("bytes"), tmp_path / "p.jsonl"
    chat = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": "once "}, {"prompt": chat, "answer": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    once, hi = b("once "), b("User: hi\n\nAssistant:")
    expected = [(once, rows[0]), (hi, rows[1])]
    assert read_prompts(path, bytes_tokenizer, longest=len(hi), unique=True) == expected
    assert read_prompts(path, bytes_tokenizer, longest=19) == expected[:1]
    said = capsys.readouterr().out
    assert re.search("dropped 1 prompts of more than 19 tokens, .*p.jsonl:2; 1 remain", said)
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    assert len(read_prompts(path, bytes_tokenizer)) == 3
    assert read_prompts(path, bytes_tokenizer, unique=True) == expected
    said = capsys.readouterr().out
    assert re.search("dropped 1 prompts that were there before, .*p.jsonl:3; 2 remain", said)
    for row, message in (({"prompt": ""}, "missing or empty"), ({"prompt": ["hi"]}, "messages")):
        path.write_text(json.dumps(rows[0]) + "\n\n" + json.dumps(row) + "\n")
        with pytest.raises(UserError, match=f"p.jsonl:3: .*{message}"):
            read_prompts(path, bytes_tokenizer)
    path.write_text("\n")
    with pytest.raises(UserError, match="p.jsonl holds no prompts"):
        read_prompts(path, bytes_tokenizer)

    reply = {"role": "assistant", "content": "yes"}
    rows = [{"messages": [*chat, reply]}, {"prompt": "once ", "completion": "upon"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_replies(path, bytes_tokenizer) == [
        (hi, {"prompt": chat, "chosen": "yes"}),
        (once, {"prompt": "once ", "chosen": "upon"}),
    ]


def test_replies_of_every_conversation(tmp_path):
    """SPIN: the last reply that is trained is the chosen one, whatever follows it."""
    asked, reply = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    rows = [
        {"messages": [asked, reply, {"role": "user", "content": "bye"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        {"real": [asked, reply], "generated": [asked, {"role": "assistant", "content": ""}]},
        {"prompt": [asked], "completion": [reply]},
        {"instruction": "hi", "input": "", "output": "yes"},
        {"messages": [asked, reply, asked, {**reply, "weight": 0}]},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = (b("User: hi\n\nAssistant:"), {"prompt": [asked], "chosen": "yes"})
    assert read_replies(path, load_tokenizer("bytes")) == [expected] * len(rows)
    path.write_text('{"text": "hi"}\n' + json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="p.jsonl:1: expected a conversation"):
        read_replies(path, load_tokenizer("bytes"))
    assert len(read_replies(path, load_tokenizer("bytes"), skip_bad=True)) == 1


@pytest.mark.parametrize(
    "about, words",
    [
        ([1], "t.json: it is .1.; expected a valid dictionary"),
        ({"tokenizer": 5}, "t.json: tokenizer is 5; expected the name of a file"),
        ({"tokenizer": "bytes", "vocab_size": "x"}, "t.json: vocab_size is 'x'; expected a valid"),
        ({"tokenizer": "bytes", "tokens": 10**400}, "t.json: tokens is 1000.*less than 92"),
        ({"tokenizer": "none"}, "t.json names a tokenizer: tokenizer '.*none': no such name"),
    ],
)
def test_a_sidecar_of_another_kind_is_refused(about, words, tmp_path):
    with TokenFileWriter(tmp_path / "t", np.uint16) as writer:
        writer.add([1, 2, 0])
    (tmp_path / "t.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=words):
        TokenFile(tmp_path / "t").tokenizer()


def test_an_array_that_is_none_is_a_line_with_its_name(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(5))
    whole = path.read_bytes()
    for damaged in (b"", whole[:60], whole.replace(b"shape", b"sha(e"), whole.replace(b"}", b"(")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="a.npy cannot be read: "):
            run(path, f"--out={tmp_path / 'p'}", "--tokenizer=integers:9")
