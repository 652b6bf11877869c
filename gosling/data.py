"""Rows to ids: conversations, preferences, prompts.

What is wrong with a row is a UserError that names its file and line. docs/data.md has the formats.
"""

import array
import collections
import copy
import itertools
import os
import re
import typing

from gosling.chat import (
    FLAGS,
    MEDIA,
    NOTHING,
    THOUGHTS,
    BadRow,
    read_messages,
    render_chat,
    role_of,
)
from gosling.config import UserError, print0
from gosling.rows import count, read_rows
from gosling.rows import read_jsonl as read_jsonl  # importable from here
from gosling.user_code import call

# ----------------------------------------------------------------------------------------------
# fine-tuning data: conversations -> (ids, mask)


class Format(typing.NamedTuple):
    """A form of a row. keys: those that it must have; the first form that fits is the row's."""

    keys: tuple
    others: tuple  # keys that are also read
    trained: str  # what is trained


REPLIES = "every reply and what ends it, unless its weight or train is 0"
SYSTEM = ("system", "system_prompt")
AROUND = (*SYSTEM, "tools")
ONE_REPLY = (*AROUND, "reasoning_content")
FORMATS = (
    Format(("messages",), AROUND, REPLIES),
    Format(("conversations",), AROUND, REPLIES),
    Format(("conversation",), AROUND, REPLIES),
    Format(("prompt", "completion"), AROUND, "the completion and its end; a prompt's replies not"),
    Format(("instruction", "output"), ("input", *ONE_REPLY), "the output, as a chat's reply"),
    Format(("instruction", "response"), ("context", *ONE_REPLY), "the response, as a reply"),
    Format(("prompt", "response"), ONE_REPLY, "the response, as a chat's reply"),
    Format(("question", "answer"), ONE_REPLY, "the answer, as a chat's reply"),
    Format(("question", "response"), ONE_REPLY, "the response, as a chat's reply"),
    Format(("query", "response"), ONE_REPLY, "the response, as a chat's reply"),
    Format(("input", "output"), ONE_REPLY, "the output, as a chat's reply"),
    Format(("text",), ("mask",), "every token and the end; with a mask, where it is 1"),
)
SHAPES = (
    '{"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]}, '
    '{"prompt", "completion"}, {"instruction", "input", "output"}, {"text": "..."}, or '
    '{"text": [ids], "mask": [0 and 1]}; docs/data.md has them all'
)
# Keys that change what is trained, or say it again: beside a form that does not read them an error.
MEANING = {key for form in FORMATS for key in (*form.keys, *form.others)} - {"answer"}
MEANING |= {"functions", "history", "role", "input_ids", "choices", "options", "system_message"}
MEANING |= {*THOUGHTS, *MEDIA, *FLAGS}


def format_of(row):
    """A row -> its Format. BadRow if it has none."""
    for form in FORMATS:
        if all(row.get(key) is not None for key in form.keys):
            return form
    raise BadRow(f"expected {SHAPES}; got the keys {sorted(row)}", "of no known format")


def check_keys(row, read, texts):
    """BadRow for a key that changes the meaning and is not read; what `texts` hold is no loss."""
    for key in sorted(MEANING.intersection(row).difference(read)):
        value = row[key]
        parts = value if isinstance(value, list) else [value]
        is_there = all(isinstance(part, str) and part.strip() in texts for part in parts)
        is_there = is_there and key != "text"
        if value not in (*NOTHING, 1) and not is_there:
            beside = " and ".join([name for name in read if name in row][:2])
            raise BadRow(
                f'"{key}" beside {beside} is not understood, and the row would mean something else '
                "without it; take one of them out",
                f'"{key}" beside {beside}',
            )


def render_row(row, tokenizer, last_reply_only=False):
    """One row of fine-tuning data in any of FORMATS -> (ids, mask). UserError: what is wrong."""
    form = format_of(row)
    if form.keys == ("text",):
        return render_text(row, tokenizer)
    if form.keys == ("prompt", "completion"):
        prompt, completion = row["prompt"], row["completion"]
        if row.get("label") is False:
            raise BadRow('"label" is false: an answer that is not wanted', '"label" of false')
        if isinstance(prompt, str) and isinstance(completion, str):
            check_keys(row, form.keys, prompt + completion)
            return render_completion(prompt, completion, tokenizer)
    messages = conversation(row, form)
    if not any(role_of(message) == "assistant" for message in messages):
        read_messages(messages)  # what is wrong with them comes first
        raise BadRow("no assistant turn, so there is nothing to train on", "no assistant turn")
    return render_chat(messages, tokenizer, last_reply_only=last_reply_only)


def render_text(row, tokenizer):
    """{"text": "..."}, or {"text": [ids], "mask": [0 and 1]} -> (ids, mask)"""
    text = row["text"]
    if isinstance(text, list):
        check_keys(row, ("text", "mask"), "")
        return render_ids(text, row.get("mask"))
    if not isinstance(text, str):
        raise BadRow(f'"text" is {text!r:.60}; expected text, or ids', "no text")
    check_keys(row, ("text",), text)
    if role_of(row):
        raise BadRow(
            '"from" beside text: a message, and no document; make rows of whole conversations',
            "messages in place of conversations",
        )
    ids = [*tokenizer.encode(text), tokenizer.end_id]
    return ids, [1] * len(ids)


def render_ids(ids, mask):
    """{"text": [ids], "mask": [0 and 1]}, tokenised elsewhere -> (ids, mask)"""
    for n, i in enumerate(ids):
        if type(i) is not int or i < 0:
            raise BadRow(f'number {n} of "text" is {i!r:.60}; expected text, or ids >= 0', "no ids")
    n_mask = len(mask) if isinstance(mask, list) else "none"
    if n_mask != len(ids):
        raise BadRow(
            f'"text" has {len(ids)} ids, "mask" {n_mask}; they go in pairs, ids >= 0 with 0 or 1',
            "ids and a mask that do not go in pairs",
        )
    for n, m in enumerate(mask):
        if m not in (0, 1):
            raise BadRow(f'number {n} of "mask" is {m!r:.60}; expected 0 or 1', "no mask")
    return ids, [int(m) for m in mask]


def render_completion(prompt, completion, tokenizer):
    """{"prompt", "completion"}, both text -> (ids, mask)"""
    # As when sampling, an empty prompt is the end of a document: what comes first is trained, too.
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.end_id]
    answer_ids = tokenizer.encode(completion)
    if not answer_ids:
        raise BadRow('"completion" is empty', "an empty completion")
    mask = [0] * len(prompt_ids) + [1] * (len(answer_ids) + 1)
    return [*prompt_ids, *answer_ids, tokenizer.end_id], mask


def conversation(row, form):
    """A row of messages, or of what is asked and answered -> messages, for render_chat"""
    if len(form.keys) == 1:
        messages = alternating(row[form.keys[0]], form.keys[0])
    else:
        prompt, reply = (
            as_messages(row[key], role, key)
            for key, role in zip(form.keys, ("user", "assistant"), strict=True)
        )
        for key in {"input", "context"}.intersection(form.others).intersection(row):
            if not all(isinstance(value, str) for value in (row[key], row[form.keys[0]])):
                raise BadRow(
                    f'"{key}" is {row[key]!r:.60}; expected text', f'"{key}" of other kinds'
                )
            prompt = as_messages(f"{row[form.keys[0]]}\n{row[key]}".strip(), "user", key)
        if row.get("reasoning_content") and isinstance(reply[-1], dict):
            reply[-1] = {**reply[-1], "reasoning_content": row["reasoning_content"]}
        messages = [{**m, "weight": 0} if isinstance(m, dict) else m for m in prompt] + reply
    check_keys(row, form.keys + form.others, all_text(messages))
    return add_columns(row, messages)


def as_messages(value, role, key):
    """Text, a message or messages -> messages"""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list) and value:
        return list(value)
    raise BadRow(
        f'"{key}" is {value!r:.60}; expected text or a list of messages', f'"{key}" of other kinds'
    )


def alternating(value, key):
    """A list of messages as it is; LIMA's texts, of user and assistant in turn -> messages"""
    if not isinstance(value, list) or (value and len(value) < 2 and isinstance(value[0], str)):
        raise BadRow(f'expected "{key}" to be a list of messages, got {value!r:.60}', "no messages")
    if value and all(isinstance(text, str) for text in value):
        speakers = itertools.cycle(("user", "assistant"))
        return [{"role": next(speakers), "content": text} for text in value]
    return value


def all_text(value):
    """What text, a message or a list of them says, for a look whether a column says it again."""
    if isinstance(value, dict):
        value = [value.get(key) for key in ("content", "value", "text")]
    return "\n".join(map(all_text, value)) if isinstance(value, list) else str(value)


def add_columns(row, messages):
    """Messages, with a row's columns of a system prompt and of tools in a first system message."""
    system = [row[key] for key in SYSTEM if str(row.get(key) or "").strip() not in NOTHING]
    if not all(isinstance(text, str) for text in system):
        raise BadRow(f"expected text as a system prompt, got {system[0]!r:.60}", "no text")
    system, tools = set(system), row.get("tools")
    head = messages[:1] if messages and role_of(messages[0]) == "system" else []
    if head and system and all(text.strip() in all_text(head) for text in system):
        system = set()  # it is there
    if len(system) > 1 or (head and system):
        raise BadRow("two system prompts that differ; take one of them out", "two system prompts")
    if not system and tools in NOTHING:
        return messages
    first = head[0] if head else {"role": "system", "content": "".join(system)}
    if tools not in NOTHING:
        if first.get("tools") not in (*NOTHING, tools):
            raise BadRow("two lists of tools that differ; take one of them out", "two tool lists")
        first = {**first, "tools": tools}
    return [first, *messages[len(head) :]]


class Documents(collections.abc.Sequence):
    """(ids, mask) pairs; each becomes two lists when it is asked for.

    They lie end to end in arrays, at 5 bytes a token. A slice shares them. formats: how many rows
    of each Format there were.
    """

    def __init__(self):
        self.ids, self.mask = array.array("I"), bytearray()
        self.ends, self.numbers = array.array("Q", [0]), range(0)
        self.formats = collections.Counter()

    def add(self, ids, mask):
        self.ids.extend(ids)
        self.mask.extend(mask)
        self.ends.append(len(self.ids))
        self.numbers = range(len(self.ends) - 1)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        if isinstance(i, slice):
            part = copy.copy(self)
            part.numbers = self.numbers[i]
            return part
        start, end = self.ends[self.numbers[i]], self.ends[self.numbers[i] + 1]
        return self.ids[start:end].tolist(), list(self.mask[start:end])

    def __eq__(self, other):
        return list(self) == list(other)


def read_examples(path, tokenizer, ctx_len, template=None, last_reply_only=False, skip_bad=False):
    """Fine-tuning data -> Documents, (ids, mask) pairs, each at most ctx_len long.

    template: a function (row, tokenizer) -> (ids, mask) in place of render_row. What is cut to
    ctx_len, and what is dropped because no trained target is left, is counted and printed;
    skip_bad: see read_rows.
    """

    def render(row):
        form = None
        if template is None:
            row = {key: value for key, value in row.items() if value is not None}
            ids, mask = render_row(row, tokenizer, last_reply_only)
            form = format_of(row)
        else:
            ids, mask = run_template(template, row, tokenizer)
        check_ids(ids, tokenizer)
        return ids, mask, form

    documents, n_cut, dropped = Documents(), 0, []
    for where, (ids, mask, form) in read_rows(path, SHAPES, render, skip_bad):
        n_cut += len(ids) > ctx_len
        if any(mask[1:ctx_len]):  # the first token has nothing before it to be predicted from
            documents.add(ids[:ctx_len], mask[:ctx_len])
            documents.formats[form] += 1
        else:
            dropped.append(where)
    if n_cut or dropped:
        names = f": {', '.join(dropped[:3])}" if dropped else ""
        print0(
            f"{path}: {n_cut} documents cut to ctx_len={ctx_len} tokens, {len(dropped)} dropped "
            f"with nothing to train on{names}; {len(documents)} remain"
        )
    if not documents:
        raise UserError(f"{path} holds nothing to train on")
    return documents


def run_template(template, row, tokenizer):
    """What the user's template makes of a row, checked -> (ids, mask)"""

    def run():
        ids, mask = template(row, tokenizer)
        return [int(i) for i in ids], [int(m) if m in (0, 1) else -1 for m in mask]

    try:
        ids, mask = call("the template", run)
    except UserError as e:
        if e.__cause__ is None:  # its own words
            raise
        raise BadRow(str(e), f"{type(e.__cause__).__name__} in the template") from e
    if len(ids) != len(mask) or -1 in mask:
        raise BadRow(
            f"the template gave {len(ids)} ids and a mask of {len(mask)}; a mask is 0 or 1 for "
            "each id",
            "a template's ids and mask that do not fit",
        )
    return ids, mask


def check_ids(ids, tokenizer):
    """UserError for an id that the tokenizer does not have."""
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        wrong = max(ids) if min(ids) >= 0 else min(ids)
        raise BadRow(
            f"id {wrong} does not fit the tokenizer's {tokenizer.vocab_size} ids",
            "ids that the tokenizer does not have",
        )


# ----------------------------------------------------------------------------------------------
# prompts and preferences

PROMPTS = '{"prompt": text or messages, columns ...}'
PAIRS = (
    '{"prompt", "chosen", "rejected"} (and "margin"), or {"prompt", "responses": [...], '
    '"scores": [...]}; a prompt is text or messages'
)
PREFERENCE_KEYS = ("prompt", "chosen", "rejected", "messages", "conversations", "text", *AROUND)
PREFERENCE_KEYS += ("reasoning", "thinking")  # why the one was chosen
HH = re.compile(r"\n\n(Human|Assistant):")  # how hh-rlhf writes turns


class Preference(typing.NamedTuple):
    """Answers to one prompt. Of a pair the first was chosen."""

    prompt: list  # ids
    answers: list  # K lists of ids, each with what ends it
    scores: list | None  # K numbers of a K-wise row; None of a pair
    margin: float = 0.0  # by how much a pair's chosen answer should win


def render_prompt(prompt, tokenizer):
    """Text, or messages up to where a reply begins -> ids"""
    if isinstance(prompt, str) and prompt:
        return tokenizer.encode(prompt)
    is_messages = isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt)
    if not prompt or not is_messages:
        raise BadRow(
            f'"prompt" is missing or empty; expected text or a list of messages, got '
            f"{prompt!r:.60}",
            "no prompt",
        )
    return render_chat(prompt, tokenizer, generation_prompt=True)[0]


def read_prompts(path, tokenizer, longest=None, unique=False, skip_bad=False):
    """Rows of PROMPTS -> [(prompt_ids, row), ...]

    Dropped, counted and printed: prompts of more than `longest` ids, and with unique=True those
    that were there before. skip_bad: see read_rows.
    """

    def render(row):
        prompt = row.get("prompt")
        columns = {key: row[key] for key in ("prompt", *AROUND) if key in row}
        check_keys(columns, ("prompt",), all_text(prompt))  # all other columns are for rewards
        return render_prompt(prompt, tokenizer), row

    prompts, seen, dropped, first = [], set(), collections.Counter(), []
    for where, (prompt_ids, row) in read_rows(path, PROMPTS, render, skip_bad):
        key = tuple(prompt_ids)
        if longest is not None and len(prompt_ids) > longest:
            dropped[f"of more than {longest} tokens, which the answers' length leaves"] += 1
        elif unique and key in seen:
            dropped["that were there before"] += 1
        else:
            seen.add(key)
            prompts.append((prompt_ids, row))
            continue
        first.append(where)
    if dropped:
        names = ", ".join(first[:3])
        print0(
            f"{path}: dropped {count(dropped, 'prompts ')}, first {names}; {len(prompts)} remain"
        )
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


def plain(messages):
    """Messages -> [{"role", "content"}] as they are rendered"""
    return [{"role": turn.role, "content": turn.text} for turn in read_messages(messages)]


def read_replies(path, tokenizer, skip_bad=False):
    """Conversations -> [(prompt_ids, {"prompt", "chosen"}), ...]: the last reply is the chosen one.

    For SPIN, whose rejected answer is the model's own. What follows the last reply is left out.
    """

    def render(row):
        row = {key: value for key, value in row.items() if value is not None}
        if "real" in row:
            row = {"messages": row["real"]}
        form = format_of(row)
        prompt, chosen = row.get("prompt"), row.get("completion")
        if form.keys == ("text",):
            raise BadRow(f"expected a conversation; got the keys {sorted(row)}", "no conversation")
        is_plain = isinstance(prompt, str) and isinstance(chosen, str)
        if is_plain and form.keys == ("prompt", "completion"):
            check_keys(row, form.keys, prompt + chosen)
        else:
            prompt, chosen = split_last_reply(conversation(row, form))
        prompt_ids, _ = render_answer(prompt, chosen, tokenizer)
        return prompt_ids, {"prompt": prompt, "chosen": chosen}

    return [rendered for _, rendered in read_rows(path, SHAPES, render, skip_bad)]


def split_last_reply(messages):
    """Messages -> (those before the last reply that is trained, its text)"""
    turns = read_messages(messages)
    replies = [n for n, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
    if not replies:
        raise BadRow("no assistant turn, so there is nothing to train on", "no assistant turn")
    return plain(messages)[: replies[-1]], turns[replies[-1]].text


def render_answer(prompt, answer, tokenizer):
    """A prompt and one answer -> (prompt_ids, answer_ids); see render_answers."""
    prompt_ids, (answer_ids,) = render_answers(prompt, [answer], tokenizer)
    return prompt_ids, answer_ids


def render_answers(prompt, answers, tokenizer):
    """A prompt and its answers -> (prompt_ids, [answer_ids, ...])

    prompt: text or messages. An answer: text, or messages that end in the assistant's; what they
    have before it follows the prompt, unless it is the prompt again, as in UltraFeedback, and is
    the same in all answers. Prompt and answer are tokenised apart, as they are when the answer is
    sampled; end_id belongs to the answer.
    """
    for answer in answers:
        if not isinstance(answer, (str, list, dict)) or not str(answer or "").strip():
            raise BadRow(f"an answer is empty or no text: {answer!r:.60}", "an empty answer")
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        prompt_ids = render_prompt(prompt, tokenizer)
        return prompt_ids, [[*tokenizer.encode(answer), tokenizer.end_id] for answer in answers]
    before = plain(as_messages(prompt, "user", "prompt")) if prompt else []
    chats = [join(before, answer) for answer in answers]
    if any(chat[:-1] != chats[0][:-1] for chat in chats):
        raise BadRow(
            "the answers differ before their last reply, so no prompt is common to them",
            "answers to different prompts",
        )
    prompt_ids = render_prompt(chats[0][:-1], tokenizer)
    return prompt_ids, [render_chat(chat, tokenizer)[0][len(prompt_ids) :] for chat in chats]


def join(before, answer):
    """A prompt's messages, plain, and an answer -> the whole chat, plain"""
    turns = plain(as_messages(answer, "assistant", "an answer"))
    if turns[-1]["role"] != "assistant":
        raise BadRow(
            f"an answer's last message is the {turns[-1]['role']}'s; expected the assistant's",
            "no answer at the end",
        )
    if turns[: len(before)] == before or (len(before) == 1 and before[0] in turns):
        return turns
    for n in range(min(len(before), len(turns) - 1), 0, -1):
        if turns[:n] == before[-n:]:  # it begins with the prompt's end, without its system turn
            return before + turns[n:]
    return before + turns


def implicit_prompt(chosen, rejected):
    """Two texts -> (prompt, chosen, rejected): the prompt is what they have in common."""
    if HH.match(chosen) and HH.match(rejected):
        halves = []
        for text in (chosen, rejected):
            pieces = HH.split(text)[1:]  # who, what, who, what ...
            pairs = zip(pieces[::2], pieces[1::2], strict=True)
            halves.append([{"role": who, "content": words.strip()} for who, words in pairs])
        return None, *halves
    common = re.match(r".*\S(?=\s)", os.path.commonprefix([chosen, rejected]), re.DOTALL)
    if not common:
        raise BadRow(
            f"'prompt' is missing, and the answers have no beginning in common; expected {PAIRS}",
            "no prompt",
        )
    prompt = common[0]
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def render_preference(row, tokenizer):
    """A row of PAIRS -> Preference. UserError says what is wrong with it."""
    answers, scores = [row.get("chosen"), row.get("rejected")], None
    prompt = row.get("prompt", row.get("conversations", row.get("messages")))
    if "responses" in row:
        answers, scores = row["responses"], row.get("scores")
        are_lists = isinstance(answers, list) and isinstance(scores, list)
        if not are_lists or not len(answers) == len(scores) >= 2 or not all_finite(scores):
            raise BadRow(
                '"responses" and "scores" go in pairs, at least two; '
                f"got {answers!r:.60} and {scores!r:.60}",
                "responses and scores that do not go in pairs",
            )
        scores = [float(score) for score in scores]
    else:
        for key in ("chosen", "rejected"):
            if key not in row:
                raise BadRow(f"{key!r} is missing; expected {PAIRS}", f"no {key!r}")
    check_keys(row, PREFERENCE_KEYS, all_text([prompt, answers]))
    margin = row.get("margin") or 0.0
    if not all_finite([margin]):
        raise BadRow(f'expected a number as "margin", got {margin!r:.60}', "no number as margin")
    are_texts = all(isinstance(answer, str) for answer in answers)
    if prompt is None and are_texts and not scores:
        prompt, *answers = implicit_prompt(*answers)
    elif any(row.get(key) not in NOTHING for key in AROUND):
        if isinstance(prompt, str) and are_texts:
            raise BadRow(
                '"system" or "tools" beside text; give the prompt as messages', "columns of a chat"
            )
        prompt = add_columns(row, as_messages(prompt, "user", "prompt") if prompt else [])
    prompt_ids, answer_ids = render_answers(prompt, answers, tokenizer)
    for ids in (prompt_ids, *answer_ids):
        check_ids(ids, tokenizer)
    return Preference(prompt_ids, answer_ids, scores, float(margin))


def all_finite(values):
    """Whether they are numbers, finite and such that a float32 tensor holds them."""
    return all(isinstance(x, (int, float)) and abs(x) < 3e38 for x in values)


def teaches_nothing(row, preference, ctx_len):
    """Why a preference is left out, or None. An answer is never cut."""
    prompt_ids, answers, scores, _ = preference
    if not scores and answers[0] == answers[1]:
        return "the same text" if row["chosen"] == row["rejected"] else "the same ids"
    if scores and len(set(scores)) == 1:
        return "scores that are all equal"
    if len(prompt_ids) + max(map(len, answers)) > ctx_len:
        return f"more than ctx_len={ctx_len} tokens"
    return None


def read_preferences(path, tokenizer, ctx_len, skip_bad=False):
    """Rows of PAIRS -> [Preference, ...]

    What cannot teach is left out, counted and printed: answers that are the same, and rows longer
    than ctx_len. skip_bad: see read_rows.
    """

    def render(row):
        row = {key: value for key, value in row.items() if value is not None}
        if "real" in row and "generated" in row:  # SPIN's names
            row |= {"chosen": row["real"], "rejected": row["generated"]}
        preference = render_preference(row, tokenizer)
        return preference, teaches_nothing(row, preference, ctx_len)

    preferences, dropped = [], collections.Counter()
    for _, (preference, why) in read_rows(path, PAIRS, render, skip_bad):
        if why:
            dropped[why] += 1
        else:
            preferences.append(preference)
    if dropped:
        print0(f"{path}: dropped {count(dropped, 'rows of ')}; {len(preferences)} remain")
    if not preferences:
        raise UserError(f"{path} holds nothing to train on; expected rows of {PAIRS}")
    return preferences
