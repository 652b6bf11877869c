#!/usr/bin/env bash
# From text to a model that writes it, in minutes on 2 cores, with no download of data: 1.28 bits per byte, where xz has 1.61
set -euo pipefail
. "$(dirname "$0")/install.sh"
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"  # threads that wait soon sleep: other programs do not slow this one down
rm -rf out/pretrain_tiny

# 1. real text that every machine has: the source of Python's standard library, through a BPE trained on it
python prepare.py stdlib --out=data/stdlib --tokenizer=bpe:2048 --val=0.04

# 2. a small RWKV-7
python train_pretrain.py config/pretrain_tiny.py

# 3. text from it
for prompt in 'def __init__(self, ' 'import os' 'class '; do
    echo "----------------------------------------------------------------------"
    python sample.py --model=out/pretrain_tiny/rwkv-final.pth --prompt="$prompt" --max_new_tokens=80 --temperature=0.7 --seed=1
done
echo "----------------------------------------------------------------------"
echo "the loss curve: out/pretrain_tiny/metrics.png"
