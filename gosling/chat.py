"""The chat template of RWKV's World and G1 models, and what other people's messages are in it.

Blank lines end turns, so a turn holds none: each run of line ends becomes one. What a reply thinks,
the tools, the calls and their results take the forms of upstream's G1 templates:

    System: Tools:                             Assistant: <think>        User: Function output:
    [{"name":"add","parameters":{...}}]        One and one is two.       {"sum":2}
    Return only a JSON function call.          </think>
                                               ```json
                                               {"name":"add","arguments":{"a":1,"b":1}}
                                               ```
"""

import json
import re
import typing
import unicodedata

from gosling.config import UserError

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
SPEAKERS = {  # what "role" or "from" may say, in any case
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",  # the content is the call
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
MEDIA = ("images", "image", "audio", "video", "videos")
FLAGS = ("weight", "train", "training")  # of a reply: 0 or false is not trained
OWNERS = {  # keys of a message that change its meaning, and whose they are; None: nobody's
    **dict.fromkeys((*THOUGHTS, *CALLS), "assistant"),
    "tools": "system",
    **dict.fromkeys((*MEDIA, "mask", "loss", "trainable", "train_detail", "thought"), None),
}
NOTHING = (None, "", [], {}, "[]", "{}")
# How a reply of the G1 models begins; the last bracket is the model's to write.
THINK = {"on": " <think", "off": " <think>\n</think"}


class BadRow(UserError):
    """What is wrong with a row. reason: in a few words, for rows to be counted by."""

    def __init__(self, text, reason):
        super().__init__(text)
        self.reason = reason


class Turn(typing.NamedTuple):
    role: str  # system, user or assistant
    text: str  # without blank lines
    trained: bool  # of a reply: whether its flags let it be trained


def render_chat(messages, tokenizer, *, generation_prompt=False, last_reply_only=False, think=None):
    """[{"role", "content"}] -> (ids, mask), lists of one length, as RWKV's World and G1 models.

    The template: "System: ...", "User: ...", "Assistant: ..." with a blank line between, end_id
    after a last reply. mask is 1 on the assistant's words and on what ends them (the blank line
    before a next turn, or end_id), else 0; with last_reply_only it is 1 on the last reply alone.
    generation_prompt: end in "Assistant:", for the model to go on, and after it `think`: "on",
    "off" or a prefix of your own. Prompts, replies and the blank lines after replies are tokenised
    apart, so that a chat's ids stay a prefix of the longer chat's.
    """
    if not messages:
        raise UserError("a chat needs at least one message")
    if think is not None and not generation_prompt:
        raise UserError("think, how a reply begins, needs generation_prompt=True")
    turns = read_messages(messages)
    replies = [n for n, turn in enumerate(turns) if turn.role == "assistant"]
    ids, mask = [], []

    def add(new_ids, trained=False):
        ids.extend(new_ids)
        mask.extend([int(trained)] * len(new_ids))

    prompt = ""  # the turns since the last reply
    for n, turn in enumerate(turns):
        if turn.role != "assistant":
            prompt += f"{ROLES[turn.role]}: {turn.text}".rstrip() + "\n\n"
            continue
        trained = turn.trained and (n == replies[-1] or not last_reply_only)
        is_end = n == len(turns) - 1 and not generation_prompt
        add(tokenizer.encode(prompt + "Assistant:"))
        add(tokenizer.encode(" " + turn.text), trained)
        add([tokenizer.end_id] if is_end else tokenizer.encode("\n\n"), trained)
        prompt = ""
    if generation_prompt:
        add(tokenizer.encode(prompt + "Assistant:"))
        add(tokenizer.encode(THINK.get(think, think or "")))
    else:
        add(tokenizer.encode(prompt.removesuffix("\n\n")))
    return ids, mask


# ----------------------------------------------------------------------------------------------
# messages


def read_messages(messages):
    """[{"role", "content"} or {"from", "value"}] -> [Turn]; UserError names number and key."""
    turns = []
    for n, message in enumerate(messages):
        speaker = speaker_of(message)
        if not isinstance(speaker, str):
            shape = 'messages of "role" and "content", or of "from" and "value"'
            raise BadRow(f"expected {shape}; got {message!r:.60}", "no messages")
        try:
            turns.append(read_message(message, speaker))
        except BadRow as e:
            raise BadRow(f"message {n}: {e}", e.reason) from None
    return turns


def speaker_of(message):
    """What a message calls its role; None of what is no message."""
    if not isinstance(message, dict):
        return None
    return message.get("from") if message.get("role") is None else message["role"]


def role_of(message):
    """system, user, assistant or tool; None of what is none of these."""
    return SPEAKERS.get(str(speaker_of(message)).lower())


def read_message(message, speaker):
    """One message, and what it calls its role -> Turn"""
    role = role_of(message)
    if role is None:
        roles = "system, user, assistant or tool"
        raise BadRow(f"expected a role of {roles}, got {speaker!r:.60}", "an unknown role")
    check_keys(message, role, speaker)
    trained = all(message.get(key) in (None, 1) for key in FLAGS)
    content = message.get("value") if message.get("content") is None else message["content"]
    if role == "assistant":
        return Turn(role, read_reply(message, speaker, content), trained)
    text = clean(read_text(content))
    if role == "tool":
        return Turn("user", f"Function output:\n{text}", trained)
    if message.get("tools") not in NOTHING:
        text = f"{write_tools(message['tools'])}\n{text}".rstrip()
    return Turn(role, text, trained)


def check_keys(message, role, speaker):
    """BadRow for a key that means something which is not understood where it stands."""
    for key, owner in OWNERS.items():
        if message.get(key) not in NOTHING and role != owner:
            raise BadRow(f'"{key}" in a message of {speaker!r:.60} is not understood', f'"{key}"')
    for key in FLAGS:
        flag = message.get(key)
        if flag not in (None, 0, 1):
            raise BadRow(f'"{key}" is {flag!r:.60}; expected 0 or 1', f'"{key}"')
        if flag and role != "assistant":
            raise BadRow(f'"{key}" in a message of {speaker!r:.60}; only replies train', f'"{key}"')


def read_text(content):
    """Text, or OpenAI's parts [{"type": "text", "text"}] -> str"""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        other = [part.get("type") for part in content if not isinstance(part.get("text"), str)]
        if other:
            raise BadRow(f"a part of type {other[0]!r}; only text is read", "parts beside text")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRow(f"expected text as content, got {content!r:.60}", "no text")
    return content


def clean(text, is_reply=False):
    """Text as a turn holds it: \\r is a line end, a run of them is one \\n, none at either end.

    The indentation of a reply's first line stays where later lines are indented, too: it is code.
    """
    text = re.sub(r"\n{2,}", "\n", text.replace("\r", "\n").strip("\n").rstrip())
    first_line = text.split("\n")[0]
    is_indented = first_line.strip() and first_line.startswith(("  ", "\t"))
    if is_reply and is_indented and ("\n " in text or "\n\t" in text):
        return text
    return text.lstrip()


def is_blank(text):
    """Whether it shows nothing: white space, and characters of no width such as U+200B."""
    return all(c.isspace() or unicodedata.category(c) == "Cf" for c in text)


def read_reply(message, speaker, content):
    """What an assistant's message says: its thoughts, its text, its calls."""
    calls = [message[key] for key in CALLS if message.get(key) not in NOTHING]
    if speaker.lower() == "function_call":
        calls, content = [content], None
    text = read_text(content) if not calls or content is not None else ""
    thoughts = [message[key] for key in THOUGHTS if message.get(key) not in NOTHING]
    if len(calls) > 1 or len(thoughts) > 1 or (thoughts and "<think>" in text):
        raise BadRow("the same reply thinks or calls twice, under two keys", "twice the same")
    if is_blank(text) and not calls:
        raise BadRow(f"expected a reply, not an empty one; got {content!r:.60}", "an empty reply")
    parts = [f"<think>\n{read_text(thought).strip()}\n</think>" for thought in thoughts]
    parts += [] if is_blank(text) else [text]
    parts += [write_calls(call) for call in calls]
    return clean("\n".join(parts), is_reply=True)


def from_json(value, what):
    """A value that may be JSON in text -> the value"""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{what} are not JSON: {value!r:.60}", f"{what} that are not JSON") from None


def compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def write_calls(calls):
    """OpenAI's tool calls, or one {"name", "arguments"} -> a JSON block."""
    calls, written = from_json(calls, "calls"), []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f'a call without "name" and "arguments": {call!r:.60}', "calls")
        arguments = from_json(function.get("arguments", {}), "arguments")
        written.append({"name": function["name"], "arguments": arguments})
    written = written[0] if len(written) == 1 else written
    return f"```json\n{compact(written)}\n```"


def write_tools(tools):
    """OpenAI's tools, a list or its JSON; other text as it is, such as "- add(a: int, b: int)"."""
    if isinstance(tools, str) and not tools.lstrip().startswith(("[", "{")):
        text = tools.strip()
    else:
        tools = from_json(tools, "tools")
        tools = tools if isinstance(tools, list) else [tools]
        if not all(isinstance(tool, dict) for tool in tools):
            raise BadRow(f'"tools" is {tools!r:.60}; expected a list of objects', '"tools"')
        text = compact([tool.get("function", tool) for tool in tools])
    return f"Tools:\n{text}\nReturn only a JSON function call."
