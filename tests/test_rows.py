"""Rows and files as other people write them: each is trained as it says, or named in a line."""

import itertools
import json

import prepare
from gosling.config import UserError
from gosling.data import read_examples, read_preferences, render_row
from gosling.tokenizer import load_tokenizer

import pytest
import tokenizers
from helpers import write

BYTES = load_tokenizer("bytes")
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ASKED = "User: q\n\nAssistant:[ a<end>]"
GOES_ON = "User: q\n\nAssistant:[ a\n\n]"
CALL = {"function": {"name": "w", "arguments": "{}"}}
CALLED = 'User: q\n\nAssistant:[ ```json\n{"name":"w","arguments":{}}\n```<end>]'
TOOLS = 'System: Tools:\n[{"name":"w"}]\nReturn only a JSON function call.'


def case(name, *values):
    return pytest.param(*values, id=name)


def said(speaker, value):
    """A message as ShareGPT has it."""
    return {"from": speaker, "value": value}


def reply(**keys):
    """A chat whose reply has these keys."""
    return {"messages": [Q, {"role": "assistant", **keys}]}


def shown(row):
    """A row as text, what is trained in brackets."""
    text = ""
    for trained, group in itertools.groupby(
        zip(*render_row(row, BYTES), strict=True), lambda pair: pair[1]
    ):
        ids = [i for i, _ in group]
        words = BYTES.decode(ids) + "<end>" * ids.count(0)
        text += f"[{words}]" if trained else words
    return text


@pytest.mark.parametrize(
    "row, text",
    [
        case(
            "a reply before the first question",
            {"conversations": [said("gpt", "hi"), said("human", "q"), said("gpt", "a")]},
            f"Assistant:[ hi\n\n]{ASKED}",
        ),
        case(
            "weights as fractions and a column that repeats the system prompt",
            {
                "system_prompt": "S",
                "conversations": [
                    said("system", "S"),
                    {**said("human", "q"), "weight": 0.0},
                    {**said("gpt", "a"), "weight": 1.0},
                ],
            },
            f"System: S\n\n{ASKED}",
        ),
        case("the user speaks last", {"messages": [Q, A, Q]}, f"{GOES_ON}User: q"),
        case(
            "two turns of one role",
            {"messages": [Q, Q, A, A]},
            f"User: q\n\n{GOES_ON}Assistant:[ a<end>]",
        ),
        case(
            "a system prompt in the middle",
            {"messages": [Q, A, {"role": "system", "content": "S"}, Q, A]},
            f"{GOES_ON}System: S\n\n{ASKED}",
        ),
        case(
            "a system column beside user and assistant",
            {"system": "S", "conversations": [said("user", "q"), said("assistant", "<|b|>a")]},
            "System: S\n\nUser: q\n\nAssistant:[ <|b|>a<end>]",
        ),
        case(
            "calls as text and results of a tool",
            {"conversations": [said("human", "q"), said("gpt", "<call>"), said("tool", '{"t":2}')]},
            'User: q\n\nAssistant:[ <call>\n\n]User: Function output:\n{"t":2}',
        ),
        case("a function call", reply(content=None, function_call=CALL["function"]), CALLED),
        case("a call beside an empty text", reply(content="", tool_calls=[CALL]), CALLED),
        case(
            "tools in the system message",
            {"messages": [{"role": "system", "content": "S", "tools": '[{"name": "w"}]'}, Q, A]},
            f"{TOOLS}\nS\n\n{ASKED}",
        ),
        case(
            "tools beside a prompt of messages",
            {"prompt": [Q], "completion": [A], "tools": [{"name": "w"}]},
            f"{TOOLS}\n\n{ASKED}",
        ),
        case("a blank system column", {"messages": [Q, A], "system": " \n"}, ASKED),
        case("roles in capitals", {"conversations": [said("USER", "q"), said("Gpt", "a")]}, ASKED),
        case("text with a label", {"text": "a film", "label": 0}, "[a film<end>]"),
        case("a label of true", {"prompt": "q", "completion": "a", "label": True}, "q[a<end>]"),
        case("a score of NaN", {"messages": [Q, A], "score": float("nan")}, ASKED),
        case(
            "options that the question has",
            {"question": "q", "answer": "a", "options": ["q", "a"]},
            ASKED,
        ),
        case(
            "NUL, line separators and emoji",
            {"messages": [{**Q, "content": "a\0b"}, {**A, "content": "c\u2028\x85👨‍👩‍👧\u2029d"}]},
            "User: a\0b\n\nAssistant:[ c\u2028\x85👨‍👩‍👧\u2029d<end>]",
        ),
        case(
            "carriage returns of every kind",
            {"messages": [{**Q, "content": "a\rb\r\r\nc"}, {**A, "content": "d\r\n\re\n\r\nf\r"}]},
            "User: a\nb\nc\n\nAssistant:[ d\ne\nf<end>]",
        ),
        case("a mask of true and false", {"text": [66, 67], "mask": [True, False]}, "[A]B"),
    ],
)
def test_it_is_trained_as_it_says(row, text):
    assert shown(row) == text


NO_FORM = "expected .*; docs/data.md has them all; got the keys "


@pytest.mark.parametrize(
    "row, words",
    [
        case("a chat in one text", {"system": "S", "chat": "USER: q"}, NO_FORM + r"\['chat', 'sys"),
        case("turns without a name", {"id": "0", "data": ["q", "a"]}, NO_FORM + r"\['data', 'id'"),
        case("ids and labels", {"input_ids": [5], "labels": [5]}, NO_FORM + r"\['input_ids'"),
        case("a message a row", {"text": "q", "from": "human"}, '"from" beside text: a message'),
        case(
            "an answer that is not wanted",
            {"prompt": "q", "completion": "a", "label": False},
            '"label" is false',
        ),
        case(
            "options that the question has not",
            {"question": "q", "answer": "a", "choices": ["a", "b"]},
            '"choices" beside question and answer',
        ),
        case("a system message column", {"messages": [Q, A], "system_message": "S"}, "system_mess"),
        case(
            "a thinking column", {"question": "q", "answer": "a", "thinking": "t"}, '"thinking" b'
        ),
        case(
            "two lists of tools",
            {
                "messages": [{"role": "system", "content": "S", "tools": [{"name": "v"}]}, Q, A],
                "tools": [{"name": "w"}],
            },
            "two lists of tools that differ",
        ),
        case("a thought beside a reply", reply(content="a", thought="t"), '1: "thought" in a mess'),
        case("a weight in words", reply(content="a", weight="0"), "1: \"weight\" is '0'; expected"),
        case("spans that train", reply(content="a", train_detail=[{}]), '"train_detail" in a mess'),
        case(
            "a reply of no width", reply(content="\u200b\ufeff "), "1: expected a reply, not an em"
        ),
        case("a reply of a hard space", reply(content="\xa0"), "1: expected a reply, not an empty"),
        case("no messages", {"messages": []}, "no assistant turn"),
        case("a system prompt alone", {"messages": [{**Q, "role": "system"}]}, "no assistant turn"),
        case(
            "speakers and texts", {"messages": [{"speaker": "u", "text": "q"}]}, "expected messag"
        ),
        case(
            "text as a list", {"text": ["a", "b"]}, "number 0 of \"text\" is 'a'; expected text, or"
        ),
        case(
            "ids with a fraction", {"text": [5, 6.0], "mask": [1, 1]}, r'1 of "text" is 6\.0; exp'
        ),
        case("ids of true", {"text": [True, 6], "mask": [1, 1]}, '0 of "text" is True; expected'),
        case("a mask with a half", {"text": [5, 6], "mask": [0, 0.5]}, r'1 of "mask" is 0\.5; exp'),
        case(
            "a mask of words", {"text": [5, 6], "mask": ["1", "1"]}, "0 of \"mask\" is '1'; expec"
        ),
        case("ids without a mask", {"text": [5, 6, 7]}, '"text" has 3 ids, "mask" none'),
        case(
            "a comma behind a row", '{"text": "a"},', "not JSON .*an object a line, or in a .json"
        ),
        case("quotes of Python", "{'text': 'a'}", "not JSON .*an object a line, or in a .json"),
        case("a row over several lines", '{\n "text":\n "a"\n}', "not JSON .*an object a line"),
        case("an array in a line", '[{"text": "a"}]', r"got \[\{'text': 'a'\}\]; .*\.json file"),
        case("text alone", '"a"', "expected a JSON object, got 'a'"),
    ],
)
def test_it_is_named_in_a_line(row, words, tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, row)
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{words}.*bad rows: .*--skip_bad") as e:
        read_examples(path, BYTES, 99)
    assert "\n" not in str(e.value)
    assert len(read_examples(path, BYTES, 99, skip_bad=True)) == 1


@pytest.mark.parametrize(
    "data",
    [
        case("an empty file", b""),
        case("blank lines", b"\n \r\n\n"),
        case("an empty text", b'{"text": ""}'),
        case("no ids", b'{"text": [], "mask": []}'),
        case("one id, which nothing predicts", b'{"text": [5], "mask": [1]}'),
        case("a mask of zeros", b'{"text": [5, 6], "mask": [0, 0]}'),
        case("an empty array", b"[]"),
    ],
)
def test_nothing_to_train_on_is_an_error(data, tmp_path):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match="a.json holds nothing to train on"):
        read_examples(tmp_path / "a.json", BYTES, 99)


@pytest.mark.parametrize("codec", ["utf-16", "latin-1", "gbk"])
def test_a_file_in_another_encoding_is_named(codec, tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "café 你" }'.encode(codec, "ignore"))
    with pytest.raises(UserError, match="a.jsonl:1: not UTF-8 .*convert the file to UTF-8"):
        read_examples(tmp_path / "a.jsonl", BYTES, 99)


def test_a_folder_in_place_of_a_file_is_called_one(tmp_path):
    for read in (read_examples, read_preferences):
        with pytest.raises(UserError, match=f"{tmp_path.name} is a folder; give a file of it"):
            read(tmp_path, BYTES, 99)


def test_why_a_pair_was_chosen_is_no_part_of_it(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "reasoning": "because"}
    assert len(read_preferences(write(tmp_path / "p.jsonl", row), BYTES, 99)) == 1


def test_what_a_tokenizer_does_not_hold_is_named_with_its_line(tmp_path):
    hub = tokenizers.Tokenizer(tokenizers.models.BPE({"</s>": 0, "a": 1, " ": 2}, []))
    hub.save(str(tmp_path / "t.json"))
    write(tmp_path / "a.jsonl", {"text": "a a"}, {"text": "a b"})
    words = r"a.jsonl:2: \S+t.json has no token for 'b'"
    with pytest.raises(UserError, match=words):
        prepare.main(
            [f"{tmp_path}/a.jsonl", f"--out={tmp_path}/x", f"--tokenizer={tmp_path}/t.json"]
        )
    with pytest.raises(UserError, match=words):
        read_examples(tmp_path / "a.jsonl", load_tokenizer(tmp_path / "t.json"), 99)
    assert not list(tmp_path.glob("x_*"))


def test_half_a_character_is_named_with_its_line_by_any_tokenizer(tmp_path):
    """Of a trained tokenizer too, in a chat as in a text."""
    write(tmp_path / "a.jsonl", {"text": "some words"}, {"text": "and more"})
    prepare.main([f"{tmp_path}/a.jsonl", f"--out={tmp_path}/x", "--tokenizer=bpe:257"])
    bpe = load_tokenizer(tmp_path / "x.tokenizer.json")
    for row in (reply(content="a\ud83d"), {"text": "\ud83d a"}):
        path = write(tmp_path / "b.jsonl", {"text": "a"}, json.dumps(row))
        with pytest.raises(UserError, match=r"b.jsonl:2: not UTF-8 .*'\\ud83d', half of a char"):
            read_examples(path, bpe, 99)
