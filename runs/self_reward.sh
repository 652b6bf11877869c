#!/usr/bin/env bash
# Self-rewarding as in its paper (arXiv 2401.10020): SFT on seed chats, then two rounds in which the model answers, judges its
# own answers by the paper's rubric, and learns from the pairs by DPO. RWKV-7 1.5B, eight 80 GB cards; not measured yet.
set -euo pipefail
. "$(dirname "$0")/install.sh"
. runs/weights.sh
pip install --quiet datasets
weights rwkv7-g1a-1.5b-20250922-ctx4096.pth

# the seed: chats written by people; prompts alone for the rounds to start from; and answers that others have scored, from
# which the model learns to judge in the rubric's words
python - <<'PY'
import json, os
import datasets
os.makedirs("data", exist_ok=True)
def write(name, rows):
    with open(f"data/{name}.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
people = datasets.load_dataset("HuggingFaceH4/no_robots")
write("ift", ({"messages": row["messages"]} for row in people["train"].select(range(3200))))
write("ift_prompts", ({"prompt": row["messages"][:-1]} for row in people["train"].select(range(3200))))
write("ift_val", ({"messages": row["messages"]} for row in people["test"]))
scored = datasets.load_dataset("HuggingFaceH4/ultrafeedback_binarized", split="train_prefs[:2000]")
write("scored", ({"prompt": row["prompt"], "completions": [row[k][-1]["content"] for k in ("chosen", "rejected")],
                  "scores": [round(row[f"score_{k}"] / 2) for k in ("chosen", "rejected")]} for row in scored))
PY
python self_reward.py make-eft config/self_reward_1b5.py --samples=data/scored.jsonl --out=data/eft
cat data/ift.jsonl data/eft.jsonl > data/ift_eft.jsonl
# report.md tells after each round: judge agreement, length of answers (it grows with the score), distance to the start
torchrun --nproc_per_node="${GPUS:-8}" -- self_reward.py config/self_reward_1b5.py --init_from="$MODEL" "$@"
