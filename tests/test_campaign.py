"""The campaigns of tests/campaign: a few tries of each, and with --full as many as in
docs/verification.md, which takes hours: `pytest tests/test_campaign.py --slow --full -s`."""

import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="their limits are Linux's"),
]


@pytest.mark.parametrize(
    "few, full",
    [
        ("fuzz.py --n=20 --show=2", "fuzz.py --n=500 --show=2"),
        ("kills.py sft grpo batch --kills=9", "kills.py --kills=300"),
        ("kills.py lora dpo --kills=6 --how=ctrlc", "kills.py --kills=100 --how=ctrlc"),
        ("kills.py state pretrain --kills=2 --how=both", "kills.py --kills=10 --how=both"),
    ],
    ids=["fuzz", "kill", "ctrlc", "both"],
)
def test_a_campaign(few, full, request):
    is_full = request.config.getoption("--full")
    script, *words = (full if is_full else few).split()
    done = subprocess.run(
        [sys.executable, f"tests/campaign/{script}", *words],
        cwd=ROOT,
        text=True,
        stdout=None if is_full else subprocess.PIPE,  # seen as it comes, with pytest's -s
        stderr=subprocess.STDOUT,
        timeout=None if is_full else 900,
    )
    assert done.returncode == 0, done.stdout and done.stdout[-4000:]
