"""Rows of conversations and preferences: every shape, every mistake, what is cut or dropped."""

import json
import tracemalloc

import prepare
from gosling.batch import pack, pad
from gosling.chat import render_chat
from gosling.config import UserError
from gosling.data import FORMATS, Documents, read_examples, read_preferences, read_prompts
from gosling.tokenizer import load_tokenizer

import pytest
from helpers import ROOT, documents, write

BYTES = load_tokenizer("bytes")


def text_of(ids):
    """Text, with the end of a document as "<end>"."""
    return "".join("<end>" if i == 0 else BYTES.decode([i]) for i in ids)


def trained(path, **options):
    """The rows of a file as text, what is trained in brackets."""
    shown = []
    for ids, mask in read_examples(path, BYTES, 4096, **options):
        row = ""
        for i, (token, m) in enumerate(zip(ids, mask, strict=True)):
            row += "[" * (m > (mask[i - 1] if i else 0)) + text_of([token])
            row += "]" * (m > (mask[i + 1] if i + 1 < len(mask) else 0))
        shown.append(row)
    return shown


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
# other people's rows

SKY, BLUE = {"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}
ASKED = "User: Sky?\n\nAssistant:[ Blue.<end>]"
AGAIN = f"User: Sky?\n\nAssistant: Blue.\n\n{ASKED}"
CALL = {"type": "function", "function": {"name": "w", "arguments": '{"c": "Rome"}'}}
TOOL = {"type": "function", "function": {"name": "w"}}
TOOLS = 'Tools:\n[{"name":"w"}]\nReturn only a JSON function call.'


@pytest.mark.parametrize(
    "row, shown",
    [
        ({"conversations": [SKY, BLUE], "text": None, "tools": "[]", "id": 3}, ASKED),
        ({"conversation": [{**SKY, "language": "English"}, BLUE], "turn": 1}, ASKED),
        ({"messages": [{"from": "Human", "value": "Sky?"}, {"from": "GPT", "value": "Blue."}]}, 0),
        ({"messages": [{**SKY, "from": None, "value": None}, {**BLUE, "weight": None}]}, ASKED),
        ({"conversations": ["Sky?", "Blue."], "source": "x"}, ASKED),
        ({"prompt": [SKY], "completion": [BLUE]}, ASKED),
        ({"prompt": "Sky?", "completion": [BLUE]}, ASKED),
        ({"prompt": [SKY], "completion": "Blue."}, ASKED),
        ({"instruction": "Sky?", "input": "", "output": "Blue."}, ASKED),
        ({"instruction": "Sky?", "context": "", "response": "Blue.", "category": "qa"}, ASKED),
        ({"prompt": "Sky?", "response": "Blue."}, ASKED),
        ({"question": "Sky?", "answer": "Blue."}, ASKED),
        ({"query": "Sky?", "response": "Blue.", "original_question": "Sky"}, ASKED),
        ({"input": "Sky?", "output": "Blue."}, ASKED),
        ({"messages": [SKY, BLUE], "prompt": "Sky?", "prompt_id": "x", "answer": "blue"}, ASKED),
        ({"messages": [{**SKY, "content": [{"type": "text", "text": "Sky?"}]}, BLUE]}, ASKED),
        ({"messages": [SKY, {**BLUE, "weight": 1}, SKY, BLUE]}, f"{ASKED[:-6]}\n\n]{ASKED}"),
        (
            {"instruction": "Big", "input": "cat", "output": "CAT"},
            "User: Big\ncat\n\nAssistant:[ CAT<end>]",
        ),
        ({"prompt": "", "completion": "hello"}, "<end>[hello<end>]"),
        # what is not trained
        ({"messages": [SKY, {**BLUE, "weight": 0}, SKY, BLUE]}, AGAIN),
        ({"messages": [SKY, {**BLUE, "train": False}, SKY, BLUE]}, AGAIN),
        ({"prompt": [SKY, BLUE, SKY], "completion": [BLUE]}, AGAIN),
        # system prompts, wherever they stand
        ({"system": "Be.", "conversations": [SKY, BLUE]}, f"System: Be.\n\n{ASKED}"),
        (
            {"system_prompt": "Be.", "question": "Sky?", "response": "Blue."},
            f"System: Be.\n\n{ASKED}",
        ),
        (
            {"system": "Be.", "messages": [{"role": "developer", "content": "Be. Yes"}, SKY, BLUE]},
            f"System: Be. Yes\n\n{ASKED}",
        ),
        # thoughts
        (
            {"messages": [SKY, {**BLUE, "reasoning_content": "It\n\nis."}]},
            "User: Sky?\n\nAssistant:[ <think>\nIt\nis.\n</think>\nBlue.<end>]",
        ),
        (
            {"prompt": "Sky?", "response": "<think>\nIt is.\n</think>\n\nBlue."},
            "User: Sky?\n\nAssistant:[ <think>\nIt is.\n</think>\nBlue.<end>]",
        ),
        # tools
        ({"tools": [TOOL], "messages": [SKY, BLUE]}, f"System: {TOOLS}\n\n{ASKED}"),
        (
            {"tools": json.dumps([TOOL]), "system": "Be.", "prompt": "Sky?", "response": "Blue."},
            f"System: {TOOLS}\nBe.\n\n{ASKED}",
        ),
        (
            {
                "messages": [
                    SKY,
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "content": '{"t":20}', "tool_call_id": "1"},
                    BLUE,
                ]
            },
            'User: Sky?\n\nAssistant:[ ```json\n{"name":"w","arguments":{"c":"Rome"}}\n```\n\n]'
            'User: Function output:\n{"t":20}\n\nAssistant:[ Blue.<end>]',
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Sky?"},
                    {"from": "function_call", "value": '{"name": "w", "arguments": {}}'},
                    {"from": "observation", "value": "grey"},
                    {"from": "gpt", "value": "Wait.", "tool_calls": [CALL, TOOL]},
                ]
            },
            'User: Sky?\n\nAssistant:[ ```json\n{"name":"w","arguments":{}}\n```\n\n]'
            "User: Function output:\ngrey\n\nAssistant:[ Wait.\n```json\n"
            '[{"name":"w","arguments":{"c":"Rome"}},{"name":"w","arguments":{}}]\n```<end>]',
        ),
    ],
)
def test_what_is_trained_of_other_peoples_rows(row, shown, tmp_path):
    assert trained(write(tmp_path / "a.jsonl", row)) == [shown or ASKED]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"text": "x", "messages": [SKY, BLUE]}, '"text" beside messages'),
        ({"text": "Blue.", "messages": [SKY, BLUE]}, '"text" beside messages'),
        ({"instruction": "x", "output": "y", "text": "x y"}, '"text" beside instruction'),
        ({"role": "prompter", "text": "x"}, '"role" beside text'),
        ({"text": "x", "system": "Be."}, '"system" beside text'),
        ({"prompt": "a", "completion": "b", "system": "Be."}, '"system" beside prompt'),
        ({"messages": [SKY, BLUE], "weight": 0.5}, '"weight" beside messages'),
        ({"messages": [SKY, BLUE], "instruction": "Sea?"}, '"instruction" beside messages'),
        ({"messages": [SKY, BLUE], "images": ["a.png"]}, '"images" beside messages'),
        ({"instruction": "a", "output": "b", "history": [["x", "y"]]}, '"history" beside'),
        ({"text": "x", "mask": [1]}, '"mask" beside text'),
        (
            {"system": "A", "messages": [{"role": "system", "content": "B"}, BLUE]},
            "two system prompts",
        ),
        ({"system": ["A"], "messages": [SKY, BLUE]}, "expected text as a system prompt"),
        ({"messages": [SKY, {**BLUE, "weight": 0.5}]}, 'message 1: "weight" is 0.5; expected 0'),
        ({"messages": [{**SKY, "train": True}, BLUE]}, 'message 0: "train" in a message of'),
        ({"messages": [SKY, {**BLUE, "audio": {"id": 1}}]}, 'message 1: "audio" in a message'),
        ({"messages": [{**SKY, "tools": [TOOL]}, BLUE]}, 'message 0: "tools" in a message of'),
        ({"messages": [{**SKY, "content": [{"type": "image_url"}]}, BLUE]}, "'image_url'; only"),
        ({"messages": [SKY, {**BLUE, "tool_calls": "[{}]"}]}, "message 1: a call without"),
        ({"messages": [SKY, {**BLUE, "tool_calls": "{w"}]}, "message 1: calls are not JSON"),
        ({"messages": [SKY, {**BLUE, "content": 4}]}, "message 1: expected text as content, got 4"),
        ({"messages": '[{"role": "user"}]'}, 'expected "messages" to be a list'),
        ({"messages": [SKY, None]}, "expected messages of .*got None"),
        ({"prompt": "2+2=", "completion": 4}, '"completion" is 4; expected text or'),
        ({"chosen": "a", "rejected": "b"}, r"got the keys \['chosen', 'rejected'\]"),
        ({"messages": [SKY, {**BLUE, "content": "<think>a", "thinking": "b"}]}, "thinks or calls"),
    ],
)
def test_a_key_that_is_not_understood_is_named(row, words, tmp_path):
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{words}") as e:
        read_examples(write(tmp_path / "a.jsonl", CHAT, row), BYTES, 4096)
    assert "\n" not in str(e.value)


def test_line_ends_and_indentation(tmp_path):
    """CRLF is a line end; blank lines end turns, so they go; a reply's code keeps its form."""
    code = "\r\n    def a():\r\n        pass\n\n\n    def b():\n        pass\n\nDone.\n\n- x\n"
    rows = [
        {"messages": [{**SKY, "content": "a\r\n\r\nUser: b"}, {**BLUE, "content": code}]},
        {"messages": [SKY, {**BLUE, "content": "  Blue.\nAnd\tred. "}]},  # prose
        {"prompt": "a\r\n", "completion": " b\n\nc"},  # text as it is
    ]
    assert trained(write(tmp_path / "a.jsonl", *rows)) == [
        "User: a\nUser: b\n\nAssistant:[     def a():\n        pass\n    def b():\n"
        "        pass\nDone.\n- x<end>]",
        "User: Sky?\n\nAssistant:[ Blue.\nAnd\tred.<end>]",
        "a\r\n[ b\n\nc<end>]",
    ]


def test_a_chat_is_a_prefix_of_the_longer_chat():
    messages = [SKY, {**BLUE, "content": "  a:\n    b"}, {"role": "tool", "content": ""}, BLUE]
    whole, _ = render_chat(messages, BYTES)
    for n in (1, 3):
        ids, _ = render_chat(messages[:n], BYTES, generation_prompt=True)
        assert whole[: len(ids)] == ids


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"text": "a", "other": ["cut \\ud83d"]}', r"not UTF-8 .*take '\\ud83d', half of a"),
        (b'{"text": "caf\xe9"}', "not UTF-8 text .*convert the file to UTF-8"),
        (b"[1, 2]", "expected a JSON object"),
    ],
)
def test_bad_text_names_its_line_and_a_remedy_in_every_reader(line, words, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "\\ud83d\\ude00", "prompt": "a", "chosen": "b", "rejected": "c"}\n' + line
    )
    readers = (
        lambda: read_examples(path, BYTES, 99, template=lambda row, tokenizer: ([1, 2], [0, 1])),
        lambda: read_preferences(path, BYTES, 99),
        lambda: read_prompts(path, BYTES),
    )
    for read in readers[: 1 if b"a" in line[:12] else 3]:
        with pytest.raises(UserError, match=f"a.jsonl:2: .*{words}"):
            read()


def test_bad_rows_are_counted_by_reason(tmp_path, capsys):
    empty = {"messages": [SKY, {**BLUE, "content": " "}]}
    silent = {"messages": [SKY, {**BLUE, "weight": 0}]}
    path = write(tmp_path / "a.jsonl", CHAT, empty, "{", empty, CHAT, {"x": 1}, silent)
    counted = r"bad rows: 4 \(2 an empty reply, 1 not JSON, 1 of no known format\)"
    with pytest.raises(UserError, match=f"a.jsonl:2: message 1: .*; {counted}; .*--skip_bad"):
        read_examples(path, BYTES, 99)
    assert len(read_examples(path, BYTES, 99, skip_bad=True)) == 2
    said = capsys.readouterr().out
    assert "left out bad rows: 4 (2 an empty reply" in said and "a.jsonl:6" not in said
    assert all(f"a.jsonl:{line}: " in said for line in (2, 3, 4))
    assert "1 dropped with nothing to train on: " in said and "a.jsonl:7; 2 remain" in said
    pair = {"prompt": "x", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "p.jsonl", pair, {**pair, "chosen": ""}, "[]")
    assert len(read_preferences(path, BYTES, 99, skip_bad=True)) == 1
    assert len(read_prompts(path, BYTES, skip_bad=True)) == 2
    prepare.main(["pairs", str(path), "--tokenizer=bytes", "--skip_bad"])
    assert "1 pairs, 0 rows of scored answers" in capsys.readouterr().out


def test_a_template_of_the_users_that_fails_names_the_row(tmp_path):
    def template(row, tokenizer):
        return [1, 2], [0, row["m"]]

    path = write(tmp_path / "a.jsonl", {"m": True}, {"m": 1}, {"n": 1}, {"m": 0.5})
    with pytest.raises(
        UserError, match="a.jsonl:3: the template failed: KeyError: 'm' .*; bad rows: 2"
    ):
        read_examples(path, BYTES, 99, template=template)
    kept = read_examples(path, BYTES, 99, template=template, skip_bad=True)
    assert list(kept) == [([1, 2], [0, 1])] * 2


def test_documents_are_a_sequence_of_lists_at_few_bytes_a_token(tmp_path):
    """Their slices, sums and batches are those of a list, at 8 bytes a token while it is read."""
    plain, held = documents(40), Documents()
    for ids, mask in plain:
        held.add(ids, mask)
    assert held == plain and len(held) == 40 and held[-1] == plain[-1]
    assert list(held[3::7][1:]) == plain[3::7][1:] and held[5:5] == [] and not held[5:5]
    assert all(isinstance(x, list) for x in held[2])
    for layout in (pack, pad):
        ours, theirs = layout(held[:9]), layout(plain[:9])
        assert all(a is b is None or a.equal(b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(IndexError):
        held[40]
    rows = [{"text": "some words " * 90} for _ in range(300)]
    path = write(tmp_path / "a.jsonl", *rows)
    read_examples(path, BYTES, 4096)
    tracemalloc.start()
    n_tokens = sum(len(ids) for ids, _ in read_examples(path, BYTES, 4096))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_tokens > 250_000 and peak <= 8 * n_tokens, peak / n_tokens


def test_the_table_of_formats_is_what_show_prints(tmp_path, capsys):
    table = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for form in FORMATS:
        keys = ", ".join(f"`{key}`" for key in form.keys)
        others = ", ".join(f"`{key}`" for key in form.others)
        assert f"| {keys} | {others} | {form.trained} |" in table
    path = write(tmp_path / "a.jsonl", CHAT, {"question": "a", "answer": "b"}, CHAT)
    prepare.main(["show", str(path), "--tokenizer=bytes", "--n=1"])
    out = capsys.readouterr().out
    assert "2 rows of messages: trained is every reply" in out
    assert "1 rows of question and answer: trained is the answer" in out


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


ANSWERS = (" arr<end>", " hello<end>")
HI = [{"role": "user", "content": "hi"}]
YES, NO = (
    [{"role": "assistant", "content": "arr"}],
    [{"role": "assistant", "content": "hello"}],
)
PIRATE = [{"role": "system", "content": "Pirate."}]


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"chosen": HI + YES, "rejected": HI + NO}, "User: hi"),
        ({"real": HI + YES, "generated": HI + NO}, "User: hi"),
        ({"prompt": None, "chosen": HI + YES, "rejected": HI + NO}, "User: hi"),
        ({"prompt": "hi", "chosen": HI + YES, "rejected": HI + NO}, "User: hi"),
        ({"prompt": "hi", "chosen": YES, "rejected": NO}, "User: hi"),
        ({"prompt": "hi", "chosen": YES, "rejected": "hello"}, "User: hi"),
        ({"prompt": HI, "chosen": HI + YES, "rejected": NO}, "User: hi"),
        ({"conversations": HI, "chosen": YES[0], "rejected": NO[0]}, "User: hi"),
        (
            {
                "conversations": [{"from": "human", "value": "hi"}],
                "chosen": {"from": "gpt", "value": "arr"},
                "rejected": {"from": "gpt", "value": "hello"},
            },
            "User: hi",
        ),
        (
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: arr",
                "rejected": "\n\nHuman: hi\n\nAssistant: hello",
            },
            "User: hi",
        ),
        (
            {"prompt": PIRATE + HI, "chosen": YES + HI + YES, "rejected": YES + HI + NO},
            "System: Pirate.\n\nUser: hi\n\nAssistant: arr\n\nUser: hi",
        ),
        (
            {"prompt": PIRATE, "chosen": HI + YES, "rejected": HI + NO},
            "System: Pirate.\n\nUser: hi",
        ),
        (  # the answers begin with the prompt's end, without its system turn
            {"prompt": PIRATE + HI, "chosen": HI + YES, "rejected": HI + NO},
            "System: Pirate.\n\nUser: hi",
        ),
        (
            {"prompt": PIRATE + HI + YES + HI, "chosen": HI + YES, "rejected": YES + HI + NO},
            "System: Pirate.\n\nUser: hi\n\nAssistant: arr\n\nUser: hi",
        ),
        (
            {"system": "Pirate.", "chosen": HI + YES, "rejected": HI + NO},
            "System: Pirate.\n\nUser: hi",
        ),
        (
            {"system": "Pirate.", "prompt": HI, "chosen": "arr", "rejected": "hello"},
            "System: Pirate.\n\nUser: hi",
        ),
        ({"prompt": HI, "responses": [HI + YES, "hello"], "scores": [1, 0]}, "User: hi"),
    ],
)
def test_where_a_preferences_prompt_comes_from(row, prompt, tmp_path):
    (pair,) = read_preferences(write(tmp_path / "p.jsonl", row), BYTES, 999)
    assert text_of(pair.prompt) == f"{prompt}\n\nAssistant:"
    assert tuple(map(text_of, pair.answers)) == ANSWERS


def test_the_prompt_of_two_texts_is_their_common_words(tmp_path):
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    (pair,) = read_preferences(write(tmp_path / "p.jsonl", row), BYTES, 999)
    assert text_of(pair.prompt) == "The sky is"
    assert list(map(text_of, pair.answers)) == [" blue.<end>", " black.<end>"]


@pytest.mark.parametrize(
    "row, words",
    [
        (
            {"prompt": "q", "chosen": HI + YES + HI, "rejected": HI + NO + HI},
            "message is the user's",
        ),
        (
            {"prompt": "q", "chosen": HI + YES + HI + YES, "rejected": HI + NO + HI + NO},
            "differ before",
        ),
        ({"chosen": HI + YES, "rejected": PIRATE + HI + NO}, "differ before"),
        ({"prompt": HI + YES, "chosen": HI + YES, "rejected": HI + NO}, "differ before"),
        ({"chosen": YES, "rejected": NO}, '"prompt" is missing or empty'),
        ({"chosen": "blue", "rejected": "black"}, "'prompt' is missing"),
        ({"chosen": HI + YES, "rejected": HI + [{**NO[0], "content": ""}]}, "not an empty one"),
        (
            {"system": "P.", "prompt": "hi", "chosen": "a", "rejected": "b"},
            "give the prompt as mess",
        ),
        (
            {"question": "hi", "chosen": "It is a", "rejected": "It is b"},
            '"question" beside chosen',
        ),
        ({"prompt": HI, "chosen": "a", "rejected": "b", "margin": float("nan")}, "margin.*nan"),
        ({"prompt": HI, "chosen": "a", "rejected": "b", "margin": float("inf")}, "margin.*inf"),
        ({"prompt": HI, "chosen": "a", "rejected": "b", "margin": 1e300}, "margin.*1e.300"),
        ({"prompt": HI, "completion": "b", "label": True}, "'chosen' is missing"),
    ],
)
def test_preferences_that_would_teach_something_else(row, words, tmp_path):
    write(tmp_path / "p.jsonl", {"prompt": "x", "chosen": "a", "rejected": "b"}, row)
    with pytest.raises(UserError, match=f"p.jsonl:2: .*{words}"):
        read_preferences(tmp_path / "p.jsonl", BYTES, 999)


def test_pairs_shows_what_is_compared(tmp_path, capsys):
    rows = [
        {"prompt": HI, "chosen": "arr", "rejected": "hello", "margin": 0.5},
        {"prompt": HI, "responses": ["arr", "hello"], "scores": [1, 2.5]},
    ]
    prepare.main(["pairs", str(write(tmp_path / "p.jsonl", *rows)), "--tokenizer=bytes"])
    out = capsys.readouterr().out
    assert "\033[90mUser: hi\n\nAssistant:\033[0m" in out and "margin 0.5" in out
    assert "\033[32m arr<end>\033[0m" in out and "\033[31m hello<end>\033[0m" in out
    assert "2.5, 7 tokens:\033[33m hello<end>" in out


def test_columns_that_a_prompt_would_lose_are_named(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": HI, "answer": 3, "text": "x"})
    assert len(read_prompts(path, BYTES)) == 1  # columns for a reward
    for column in ({"system": "Pirate."}, {"tools": [TOOL]}):
        write(path, {"prompt": HI, **column})
        with pytest.raises(UserError, match='p.jsonl:1: "(system|tools)" beside prompt'):
            read_prompts(path, BYTES)


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"prompt": ' + "9" * 5000 + "}", "a.jsonl:1: not JSON .*4300 digits"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1' + "0" * 400 + "}",
            "a number as",
        ),
        (
            '{"prompt": "a", "responses": ["b", "c"], "scores": [1, 1' + "0" * 400 + "]}",
            "go in pairs",
        ),
        (
            json.dumps(
                {"prompt": "a", "chosen": [{"role": "x" * 5000, "content": "b"}], "rejected": "c"}
            ),
            "got 'x{59}; bad rows",
        ),
        (
            json.dumps(
                {
                    "prompt": "a",
                    "chosen": [{"role": "assistant", "tool_calls": "[" * 100_000}],
                    "rejected": "c",
                }
            ),
            "calls are not JSON",
        ),
    ],
)
def test_numbers_and_nesting_beyond_python_are_lines_with_their_place(row, words, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(
        UserError, match=f"a.jsonl:1: .*{words}" if "a.jsonl" not in words else words
    ):
        read_preferences(path, BYTES, 64)
