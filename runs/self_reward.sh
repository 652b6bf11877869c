#!/usr/bin/env bash
# Self-rewarding as in its paper (arXiv 2401.10020): SFT on seed chats, then two rounds in which the model answers, judges its
# own answers by the paper's rubric, and learns from the pairs by DPO. RWKV-7 1.5B, eight 80 GB cards; not measured yet.
set -euo pipefail
. "$(dirname "$0")/install.sh"
. runs/weights.sh
pip install --quiet datasets
weights rwkv7-g1a-1.5b-20250922-ctx4096.pth

# what the model starts from: chats written by people, and answers that others have scored, from which it learns to judge in
# the rubric's words; and what the rounds ask: prompts of other chats
python - <<'PY'
import datasets
from gosling.config import load_config
from gosling.files import write_jsonl
from gosling.judge import make_eft
from self_reward import Config

people = datasets.load_dataset("HuggingFaceH4/no_robots")
chats = [row["messages"] for row in people["train"]]
scored = datasets.load_dataset("HuggingFaceH4/ultrafeedback_binarized", split="train_prefs[:2000]")
rows, texts, labels = [], [], []
for row in scored:
    rows.append({"prompt": row["prompt"]})
    texts.append([row[side][-1]["content"] for side in ("chosen", "rejected")])
    labels.append([round(row[f"score_{side}"] / 2) for side in ("chosen", "rejected")])
judge_rows = make_eft(rows, texts, labels, load_config(Config, ["config/self_reward_1b5.py"]))
asked = {str(messages[:-1]) for messages in chats[:3200]}
prompts = {str(messages[:-1]): {"prompt": messages[:-1]} for messages in chats[3200:]}  # none twice

write_jsonl("data/ift_eft.jsonl", [{"messages": messages} for messages in chats[:3200]] + judge_rows)
write_jsonl("data/ift_val.jsonl", [{"messages": row["messages"]} for row in people["test"]])
write_jsonl("data/prompts.jsonl", [row for text, row in prompts.items() if text not in asked])
PY
# report.md tells after each round: judge agreement, length of answers (it grows with the score), distance to the start
torchrun --nproc_per_node="${GPUS:-8}" -- self_reward.py config/self_reward_1b5.py --init_from="$MODEL" "$@"
