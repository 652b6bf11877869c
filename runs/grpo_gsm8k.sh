#!/usr/bin/env bash
# GRPO on GSM8K's 7,473 problems: the reward is the right number, and a little for the form. Eight GPUs; not measured yet.
#   GPUS=1 bash runs/grpo_gsm8k.sh --tune=lora --lr=1e-5
set -euo pipefail
. "$(dirname "$0")/install.sh"
. runs/weights.sh
pip install --quiet datasets
weights rwkv7-g1a-1.5b-20250922-ctx4096.pth

# a row is {"prompt", columns for the reward}; GSM8K's answers end in "#### 42"
mkdir -p data
python - <<'PY'
import json
import datasets
for split in ("train", "test"):
    with open(f"data/gsm8k_{split}.jsonl", "w") as f:
        for row in datasets.load_dataset("openai/gsm8k", "main", split=split):
            f.write(json.dumps({"prompt": [{"role": "user", "content": row["question"]}],
                                "answer": row["answer"].split("####")[1].strip()}) + "\n")
PY
torchrun --nproc_per_node="${GPUS:-8}" -- train_grpo.py config/grpo_1b5.py --init_from="$MODEL" "$@"
