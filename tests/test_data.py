"""Rows of conversations and preferences: every shape, every mistake, what is cut or dropped."""

import pytest
from helpers import write

import prepare
from gosling.config import UserError
from gosling.data import read_examples, read_preferences
from gosling.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")

# ----------------------------------------------------------------------------------------------
# conversations

CHAT = {
    "messages": [
        {"role": "user", "content": "a\n\nUser: b"},
        {"role": "assistant", "content": "cd"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f"},
    ]
}


def test_every_shape_of_data(tmp_path):
    e = BYTES.encode
    head, middle = e("User: a\nUser: b\n\nAssistant:"), e("User: e\n\nAssistant:")
    want = (
        head + e(" cd\n\n") + middle + e(" f") + [0],
        [0] * len(head) + [1] * 5 + [0] * len(middle) + [1] * 3,
    )
    sharegpt = {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
            for m in CHAT["messages"]
        ]
    }
    path = write(
        tmp_path / "a.jsonl",
        CHAT,
        sharegpt,
        {"prompt": "ab", "completion": "cd"},
        {"text": "xy"},
        {"text": [5, 6, 7], "mask": [0, 0, 1]},
    )
    rows = read_examples(path, BYTES, 4096)
    assert rows[0] == rows[1] == want
    assert rows[2] == (e("abcd") + [0], [0, 0, 1, 1, 1]) and rows[3] == (e("xy") + [0], [1, 1, 1])
    assert rows[4] == ([5, 6, 7], [0, 0, 1])
    last = read_examples(write(tmp_path / "b.jsonl", CHAT), BYTES, 4096, last_reply_only=True)[0]
    assert last == (want[0], [0] * (len(want[0]) - 3) + [1] * 3)
    own = read_examples(path, BYTES, 4096, template=lambda row, tokenizer: ([1, 2], [0, 1]))
    assert own == [([1, 2], [0, 1])] * 5


@pytest.mark.parametrize(
    "row, words",
    [
        ("{", r"a.jsonl:2: not JSON"),
        ("[1]", r"a.jsonl:2: expected a JSON object"),
        ({"x": 1}, r"a.jsonl:2: expected .*keys \['x'\]"),
        (
            {"messages": [{"role": "bot", "content": "x"}, {"role": "assistant", "content": "y"}]},
            r"a.jsonl:2: message 0.*'bot'",
        ),
        ({"messages": [{"role": "user", "content": "x"}]}, r"a.jsonl:2: no assistant turn"),
        (
            {"messages": [{"role": "assistant", "content": " "}]},
            r"a.jsonl:2: message 0.*not an empty one",
        ),
        ({"messages": ["a"]}, r"a.jsonl:2: expected"),
        ({"conversations": ["a"]}, r"a.jsonl:2: expected"),
        ({"messages": [{"role": ["a"], "content": "x"}]}, r"a.jsonl:2: expected"),
        ({"text": "\ud800 x"}, r"a.jsonl:2: not UTF-8"),
        ({"text": [1, 2], "mask": [1]}, r'a.jsonl:2: "text" has 2 ids, "mask" 1'),
        ({"text": [1, -2], "mask": [1, 1]}, r"a.jsonl:2: .*ids >= 0"),
        ({"prompt": "x", "completion": ""}, r"a.jsonl:2: .*empty"),
        ({"text": [1, 400], "mask": [1, 1]}, r"a.jsonl:2: id 400 does not fit"),
    ],
)
def test_bad_rows_name_file_and_line(row, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read_examples(write(tmp_path / "a.jsonl", CHAT, row), BYTES, 4096)


def test_what_is_cut_or_dropped_is_counted(tmp_path, capsys):
    path = write(
        tmp_path / "a.jsonl",
        CHAT,
        {"prompt": "a" * 50, "completion": "b"},
        {"prompt": "a" * 10, "completion": "b" * 50},
    )
    assert len(read_examples(path, BYTES, 32)) == 2
    assert "3 documents cut to ctx_len=32 tokens, 1 dropped" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds nothing to train on"):
        read_examples(path, BYTES, 4)


def test_show_colours_what_is_trained(tmp_path, capsys):
    prepare.main(["show", str(write(tmp_path / "a.jsonl", CHAT)), "--tokenizer=bytes"])
    out = capsys.readouterr().out
    assert (
        "\033[32m cd\n\n\033[0m" in out
        and "\033[32m f<end>\033[0m" in out
        and "\033[90mUser: a\nUser: b" in out
    )


# ----------------------------------------------------------------------------------------------
# preferences


def test_preferences_in_every_shape(tmp_path, capsys):
    chat = [{"role": "user", "content": "hi"}]
    write(
        tmp_path / "p.jsonl",
        {"prompt": chat, "chosen": "yes", "rejected": "no", "margin": 0.5},
        {
            "prompt": chat,
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        },
        {"prompt": "once ", "chosen": "upon", "rejected": "more"},
        {"prompt": chat, "responses": ["a", "b", "c"], "scores": [1, 2.5, 0]},
        {"prompt": "x", "chosen": "same", "rejected": "same"},
        {"prompt": chat, "chosen": "a ", "rejected": " a"},
        {"prompt": "long" * 30, "chosen": "a", "rejected": "b"},
        {"prompt": "x", "responses": ["a", "b"], "scores": [1, 1]},
    )
    got = read_preferences(tmp_path / "p.jsonl", BYTES, 100)
    prompt = BYTES.encode("User: hi\n\nAssistant:")
    assert (
        got[0]
        == got[1]._replace(margin=0.5)
        == (prompt, [BYTES.encode(" yes") + [0], BYTES.encode(" no") + [0]], None, 0.5)
    )
    assert got[2] == (
        BYTES.encode("once "),
        [BYTES.encode("upon") + [0], BYTES.encode("more") + [0]],
        None,
        0.0,
    )
    assert got[3].scores == [1, 2.5, 0] and len(got) == 4
    said = capsys.readouterr().out
    assert (
        "1 rows of the same text" in said
        and "1 rows of the same ids" in said
        and "1 rows of more than ctx_len=100" in said
    )
    assert "1 rows of scores that are all equal" in said and "4 remain" in said
    prepare.main(["pairs", str(tmp_path / "p.jsonl"), "--tokenizer=bytes", "--ctx_len=100"])
    said = capsys.readouterr().out
    assert "3 pairs, 1 rows of scored answers" in said and "in 66.7%, equally long 33.3%" in said


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "x", "chosen": "", "rejected": "b"}, "an answer is empty"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "is missing or empty"),
        ({"prompt": "x", "chosen": "a"}, "'rejected' is missing"),
        ({"prompt": "x", "responses": ["a"], "scores": [1]}, "at least two"),
        ({"prompt": "x", "responses": ["a", "b"], "scores": [1, "2"]}, "go in pairs"),
        ({"prompt": "x", "chosen": "a\ud800", "rejected": "b"}, "not UTF-8"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "text or a list"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "margin": "wide"}, "expected"),
        ([1], "expected a JSON object"),
    ],
)
def test_bad_preferences_name_file_and_line(row, words, tmp_path):
    write(tmp_path / "p.jsonl", {"prompt": "x", "chosen": "a", "rejected": "b"}, row)
    with pytest.raises(UserError, match=f"p.jsonl:2: .*{words}"):
        read_preferences(tmp_path / "p.jsonl", BYTES, 100)
