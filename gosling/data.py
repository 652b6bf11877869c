"""Rows of JSONL files, or of Hugging Face data sets, to ids: conversations, preferences, prompts.

What is wrong with a row is a UserError that names its file and line.
"""

import collections
import json
import math
import re
import typing
from pathlib import Path

from gosling.config import UserError, print0

# ----------------------------------------------------------------------------------------------
# the chat template

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
# How a reply of the G1 models begins; the last bracket is the model's to write.
THINK = {"on": " <think", "off": " <think>\n</think"}


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
    replies = [n for n, message in enumerate(messages) if message.get("role") == "assistant"]
    ids, mask = [], []

    def add(new_ids, trained=False):
        ids.extend(new_ids)
        mask.extend([int(trained)] * len(new_ids))

    prompt = ""  # the turns since the last reply
    for n, message in enumerate(messages):
        role, content = read_message(message, n)
        if role != "assistant":
            prompt += f"{ROLES[role]}: {content}".rstrip() + "\n\n"
            continue
        trained = n == replies[-1] or not last_reply_only
        is_end = n == len(messages) - 1 and not generation_prompt
        add(tokenizer.encode(prompt + "Assistant:"))
        add(tokenizer.encode(" " + content), trained)
        add([tokenizer.end_id] if is_end else tokenizer.encode("\n\n"), trained)
        prompt = ""
    if generation_prompt:
        add(tokenizer.encode(prompt + "Assistant:"))
        add(tokenizer.encode(THINK.get(think, think or "")))
    else:
        add(tokenizer.encode(prompt.removesuffix("\n\n")))
    return ids, mask


def read_message(message, n):
    """Message number n -> (role, content without blank lines); UserError if it is none."""
    role, content = message.get("role"), message.get("content")
    is_text = isinstance(content, str)
    if role not in ROLES or not is_text or (role == "assistant" and not content.strip()):
        raise UserError(
            f"message {n}: expected a role of system, user or assistant and a string as content, "
            f"in a reply not an empty one; got role {role!r} and content {content!r:.60}"
        )
    # A blank line ends a turn, so content holds none: "User: " on a line of its own is just text.
    return role, re.sub(r"\n{2,}", "\n", content.strip())


# ----------------------------------------------------------------------------------------------
# rows


def read_hub(name):
    """hf:DATASET:SPLIT or hf:DATASET:SUBSET:SPLIT -> ("name, row i", row) of each row.

    DATASET: a name on the Hugging Face hub, or a folder that is laid out like one.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: Hugging Face data needs `pip install datasets`") from None
    dataset, *subset, split = name.removeprefix("hf:").split(":")
    try:
        rows = datasets.load_dataset(dataset or split, *subset, split=split)
    except Exception as e:  # of many kinds: network, names, files
        raise UserError(
            f"{name}: {type(e).__name__}: {str(e)[:200]}; expected hf:DATASET:SPLIT or "
            "hf:DATASET:SUBSET:SPLIT, such as hf:openai/gsm8k:main:train"
        ) from None
    for i, row in enumerate(rows):
        yield f"{name}, row {i}", row


def read_lines(path, shapes):
    """("file:line", bytes) of each line that is not empty; of a hub's data set its rows, dicts."""
    if str(path).startswith("hf:"):
        yield from read_hub(str(path))
        return
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; expected JSONL of {shapes}, or hf:DATASET:SPLIT")
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield f"{path}:{number}", line


def read_jsonl(path, shapes, pick=None, skipped=None):
    """("file:line", pick(row)) of each row of a JSONL file of objects, or of a hub's data set.

    shapes: what rows look like, for errors. pick: a function of a row whose UserError says what is
    wrong with it; None for the row as it is. What is wrong is an error with its place, or counted
    where `skipped` is a Counter.
    """
    for where, line in read_lines(path, shapes):
        try:
            picked = pick_row(line, shapes, pick)
        except UserError as e:
            if skipped is None:
                raise UserError(f"{where}: {e}") from None
            skipped["bad JSONL lines"] += 1
        else:
            yield where, picked


def pick_row(line, shapes, pick):
    """One line (bytes), or a hub's row (a dict) -> pick(row)."""
    try:
        row = json.loads(line.decode("utf-8-sig")) if isinstance(line, bytes) else line
        if isinstance(row, dict):
            return pick(row) if pick else row
    except (json.JSONDecodeError, RecursionError) as e:
        raise UserError(f"not JSON ({e}); expected {shapes}") from None
    except UnicodeError as e:  # also of half a surrogate pair, which pick cannot encode
        raise UserError(f"not UTF-8 text ({e.reason}); expected {shapes}") from None
    raise UserError(f"expected a JSON object: {shapes}")


# ----------------------------------------------------------------------------------------------
# fine-tuning data: conversations -> (ids, mask)

SHAREGPT = {"system": "system", "human": "user", "gpt": "assistant"}
SHAPES = (
    '{"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]}, '
    '{"prompt", "completion"}, {"text": "..."}, or {"text": [ids], "mask": [0 and 1]}'
)


def render_row(row, tokenizer, last_reply_only=False):
    """One row of fine-tuning data in any of SHAPES -> (ids, mask). UserError: what is wrong."""
    text, prompt, completion = row.get("text"), row.get("prompt"), row.get("completion")
    if isinstance(text, list):
        return render_ids(text, row.get("mask"))
    if isinstance(text, str):
        ids = [*tokenizer.encode(text), tokenizer.end_id]
        return ids, [1] * len(ids)
    if isinstance(prompt, str) and isinstance(completion, str):
        return render_completion(prompt, completion, tokenizer)
    messages = messages_of(row)
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("no assistant turn, so there is nothing to train on")
    return render_chat(messages, tokenizer, last_reply_only=last_reply_only)


def render_ids(ids, mask):
    """{"text": [ids], "mask": [0 and 1]}, tokenised elsewhere -> (ids, mask)"""
    n_mask = len(mask) if isinstance(mask, list) else "none"
    are_ids = all(isinstance(i, int) and i >= 0 for i in ids)
    if n_mask != len(ids) or not are_ids or not all(m in (0, 1) for m in mask):
        raise UserError(
            f'"text" has {len(ids)} ids, "mask" {n_mask}; they go in pairs, ids >= 0 with 0 or 1'
        )
    return ids, [int(m) for m in mask]


def render_completion(prompt, completion, tokenizer):
    """{"prompt", "completion"}, both text -> (ids, mask)"""
    prompt_ids, answer_ids = tokenizer.encode(prompt), tokenizer.encode(completion)
    if not answer_ids:
        raise UserError('"completion" is empty')
    mask = [0] * len(prompt_ids) + [1] * (len(answer_ids) + 1)
    return [*prompt_ids, *answer_ids, tokenizer.end_id], mask


def messages_of(row):
    """{"messages"}, or ShareGPT's {"conversations"} -> [{"role", "content"}]"""
    messages = row.get("messages")
    if isinstance(row.get("conversations"), list):
        messages = [from_sharegpt(message) for message in row["conversations"]]
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise UserError(f"expected {SHAPES}; got the keys {sorted(row)}")
    return messages


def from_sharegpt(message):
    """{"from", "value"} -> {"role", "content"}; what is no object stays, to be refused."""
    if not isinstance(message, dict):
        return message
    speaker = message.get("from")
    return {"role": SHAREGPT.get(str(speaker), speaker), "content": message.get("value")}


def read_examples(path, tokenizer, ctx_len, template=None, last_reply_only=False):
    """Fine-tuning data -> [(ids, mask), ...], each at most ctx_len long and with a trained target.

    template: a function (row, tokenizer) -> (ids, mask) in place of render_row. What is cut to
    ctx_len, and what is dropped because nothing trained is left, is counted and printed.
    """

    def render(row):
        if template is None:
            ids, mask = render_row(row, tokenizer, last_reply_only)
        else:
            ids, mask = template(row, tokenizer)
        if len(ids) != len(mask):
            raise UserError(f"the template gave {len(ids)} ids and a mask of {len(mask)}")
        check_ids(ids, tokenizer)
        return ids, mask

    rows = [row for _, row in read_jsonl(path, SHAPES, render)]
    # The first token has nothing before it to be predicted from.
    examples = [(ids[:ctx_len], mask[:ctx_len]) for ids, mask in rows if any(mask[1:ctx_len])]
    n_cut, n_dropped = sum(len(ids) > ctx_len for ids, _ in rows), len(rows) - len(examples)
    if n_cut or n_dropped:
        print0(
            f"{path}: {n_cut} documents cut to ctx_len={ctx_len} tokens, {n_dropped} dropped with "
            f"nothing to train on; {len(examples)} remain"
        )
    if not examples:
        raise UserError(f"{path} holds nothing to train on")
    return examples


def check_ids(ids, tokenizer):
    """UserError for an id that the tokenizer does not have."""
    if ids and max(ids) >= tokenizer.vocab_size:
        raise UserError(f"id {max(ids)} does not fit the tokenizer's {tokenizer.vocab_size} ids")


# ----------------------------------------------------------------------------------------------
# prompts and preferences

PROMPTS = '{"prompt": text or messages, columns ...}'
PAIRS = (
    '{"prompt", "chosen", "rejected"} (and "margin"), or {"prompt", "responses": [...], '
    '"scores": [...]}; a prompt is text or messages'
)


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
        raise UserError(
            f'"prompt" is missing or empty; expected text or a list of messages, got {prompt!r:.60}'
        )
    return render_chat(prompt, tokenizer, generation_prompt=True)[0]


def read_prompts(path, tokenizer, longest=None, unique=False):
    """Rows of PROMPTS -> [(prompt_ids, row), ...]

    UserError for a prompt of more than `longest` ids, and with unique=True for one that is there
    twice.
    """

    def render(row):
        prompt_ids = render_prompt(row.get("prompt"), tokenizer)
        if longest is not None and len(prompt_ids) > longest:
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens; ctx_len - max_completion_length leaves "
                f"{longest}"
            )
        return prompt_ids, row

    prompts = [prompt for _, prompt in read_jsonl(path, PROMPTS, render)]
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    numbers = {}
    for number, (prompt_ids, _) in enumerate(prompts, 1):
        first = numbers.setdefault(tuple(prompt_ids), number)
        if unique and first != number:
            raise UserError(f"{path}: prompts {first} and {number} are the same; drop one")
    return prompts


def read_replies(path, tokenizer):
    """Conversations -> [(prompt_ids, {"prompt", "chosen"}), ...]: the last reply is the chosen one.

    For SPIN, whose rejected answer is the model's own.
    """

    def render(row):
        if isinstance(row.get("completion"), str):
            prompt, chosen = row.get("prompt"), row["completion"]
        else:
            *prompt, reply = messages_of(row) or [{}]
            chosen = reply.get("content")
        prompt_ids, _ = render_answer(prompt, chosen, tokenizer)
        return prompt_ids, {"prompt": prompt, "chosen": chosen}

    return [rendered for _, rendered in read_jsonl(path, SHAPES, render)]


def render_answer(prompt, answer, tokenizer):
    """A prompt and one answer -> (prompt_ids, answer_ids)

    prompt: text or messages. answer: text, or messages that end in the assistant's; a whole
    conversation, as in UltraFeedback, brings its prompt along. Prompt and answer are tokenised
    apart, as they are when the answer is sampled; end_id belongs to the answer.
    """
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
        prompt, answer = answer[:-1] or prompt, answer[-1].get("content")
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"an answer is empty or no text: {answer!r:.60}")
    prompt_ids = render_prompt(prompt, tokenizer)
    if isinstance(prompt, str):
        return prompt_ids, [*tokenizer.encode(answer), tokenizer.end_id]
    ids, _ = render_chat([*prompt, {"role": "assistant", "content": answer}], tokenizer)
    return prompt_ids, ids[len(prompt_ids) :]


def render_preference(row, tokenizer):
    """A row of PAIRS -> Preference. UserError says what is wrong with it."""
    if "responses" in row:
        answers, scores, keys = row["responses"], row.get("scores"), ("prompt",)
        are_lists = isinstance(answers, list) and isinstance(scores, list)
        if not are_lists or not len(answers) == len(scores) >= 2 or not all_finite(scores):
            raise UserError(
                '"responses" and "scores" go in pairs, at least two; '
                f"got {answers!r:.60} and {scores!r:.60}"
            )
    else:
        answers, scores = [row.get("chosen"), row.get("rejected")], None
        keys = ("prompt", "chosen", "rejected")
    for key in keys:
        if key not in row:
            raise UserError(f"{key!r} is missing; expected {PAIRS}")
    margin = row.get("margin") or 0.0
    if not isinstance(margin, (int, float)):
        raise UserError(f'expected a number as "margin", got {margin!r:.60}')
    rendered = [render_answer(row["prompt"], answer, tokenizer) for answer in answers]
    prompt_ids, answer_ids = rendered[0][0], [ids for _, ids in rendered]
    for ids in (prompt_ids, *answer_ids):
        check_ids(ids, tokenizer)
    return Preference(prompt_ids, answer_ids, scores, float(margin))


def all_finite(values):
    return all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)


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


def read_preferences(path, tokenizer, ctx_len):
    """Rows of PAIRS -> [Preference, ...]

    What cannot teach is left out, counted and printed: answers that are the same, and rows longer
    than ctx_len.
    """

    def render(row):
        preference = render_preference(row, tokenizer)
        return preference, teaches_nothing(row, preference, ctx_len)

    preferences, dropped = [], collections.Counter()
    for _, (preference, why) in read_jsonl(path, PAIRS, render):
        if why:
            dropped[why] += 1
        else:
            preferences.append(preference)
    if dropped:
        reasons = ", ".join(f"{n} rows of {why}" for why, n in dropped.items())
        print0(f"{path}: dropped {reasons}; {len(preferences)} remain")
    if not preferences:
        raise UserError(f"{path} holds nothing to train on; expected rows of {PAIRS}")
    return preferences
