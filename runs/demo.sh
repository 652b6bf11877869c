#!/usr/bin/env bash
# From a fresh machine through every method: pretraining, SFT, state tuning, reward model, DPO, GRPO, self-rewarding.
#   bash runs/demo.sh                      2 cores, no GPU, no download of data, 9 minutes
#   bash runs/demo.sh quick                the same stages in fewer steps, 3 minutes
#   bash runs/demo.sh --version=x060       pretraining, SFT and state tuning of an RWKV-6
set -euo pipefail
. "$(dirname "$0")/install.sh"
python runs/demo.py "$@"
