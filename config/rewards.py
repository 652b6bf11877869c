"""Rewards and parts of rewards: plain functions.

A config imports them:

    from config.rewards import exact, numeric, has_format, overlong_penalty

    def overlong(prompts, completions, completion_ids, **columns):
        return overlong_penalty(map(len, completion_ids), max_completion_length, 128)

    reward = [numeric, has_format(r"<think>.*</think>.+"), overlong]
"""

import json
import re
import subprocess
import sys

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")
SECONDS = 20.0  # for a batch's answers together


def exact(prompts, completions, answer, **columns):
    """1 for the text of the column `answer`, blanks around it aside; None for a row without one."""
    return [
        None if a is None else float(text.strip() == str(a).strip())
        for text, a in zip(completions, answer, strict=True)
    ]


def numeric(prompts, completions, answer, **columns):
    """1 for an answer that equals the column `answer`: as math-verify sees it if that is installed,
    else the text's last number. None for a row without one, and for what math-verify had no time
    for."""
    asked = [i for i, a in enumerate(answer) if a is not None]
    verdicts = verified([(str(answer[i]), completions[i]) for i in asked])
    rewards = dict(zip(asked, verdicts, strict=True))
    return [rewards.get(i) for i in range(len(completions))]


def has_format(pattern):
    """-> a reward: 1 if the whole text matches the regular expression, whose dot also matches line
    ends."""
    whole = re.compile(pattern, re.S)

    def has_format(prompts, completions, **columns):
        return [float(bool(whole.fullmatch(text.strip()))) for text in completions]

    return has_format


def overlong_penalty(lengths, longest, buffer):
    """DAPO's: 0 up to longest - buffer tokens, from there down to -1 at longest."""
    return [-min(max((n - (longest - buffer)) / buffer, 0.0), 1.0) for n in lengths]


def last_number(text):
    """The last number in a text, or None. Thousands may have commas: 1,000.5"""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def equal_numbers(answer, text):
    """1.0 if the last numbers of both are the same, else 0.0."""
    expected, found = last_number(answer), last_number(text)
    if expected is None or found is None:
        return 0.0
    return float(abs(expected - found) <= 1e-9 * max(abs(expected), abs(found)))


def verified(pairs, command=(sys.executable, __file__), seconds=None):
    """[(answer, text), ...] -> [1.0, 0.0 or None]

    In a process of its own, which can be stopped: some expressions take sympy for ever. It writes a
    line for each pair, so that what was done by then counts.
    """
    try:
        child = subprocess.run(
            command,
            input=json.dumps(pairs),
            capture_output=True,
            text=True,
            timeout=seconds or SECONDS,
        )
        if child.returncode:
            raise RuntimeError(f"the checking process ended with {child.stderr.strip()[-300:]}")
        printed = child.stdout
    except subprocess.TimeoutExpired as e:
        printed = (e.stdout or b"").decode()
    verdicts = [json.loads(line) for line in printed.splitlines() if line in ("1.0", "0.0")]
    return verdicts + [None] * (len(pairs) - len(verdicts))


def main():
    pairs = json.load(sys.stdin)
    try:
        from math_verify import parse, verify
    except ImportError:

        def check(answer, text):
            return equal_numbers(answer, text)
    else:

        def check(answer, text):
            return float(verify(parse(answer), parse(text)))

    for answer, text in pairs:
        print(check(answer, text), flush=True)


if __name__ == "__main__":
    main()
