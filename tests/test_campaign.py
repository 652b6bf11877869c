"""The campaigns of tests/campaign, a few tries of each; docs/verification.md has whole ones."""

import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="their limits are Linux's"),
]


@pytest.mark.parametrize(
    "words",
    [
        ["fuzz.py", "--n=20", "--show=2"],
        ["kills.py", "sft", "grpo", "batch", "--kills=9"],
        ["kills.py", "lora", "dpo", "--kills=6", "--how=ctrlc"],
        ["kills.py", "state", "pretrain", "--kills=2", "--how=both"],
    ],
)
def test_a_few_tries_of_a_campaign(words):
    command = [sys.executable, f"tests/campaign/{words[0]}", *words[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
