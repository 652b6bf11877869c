#!/usr/bin/env bash
# A reward model and DPO on UltraFeedback's 61,000 pairs, after runs/sft_chat.sh. One 80 GB card; not measured yet.
set -euo pipefail
. "$(dirname "$0")/install.sh"
pip install --quiet datasets
pairs=hf:HuggingFaceH4/ultrafeedback_binarized

python prepare.py pairs "$pairs:test_prefs"            # how long, and how often the longer one is the chosen one
# the reward model tells on held-out pairs what the pairs can teach (.5 is chance)
python train_reward.py config/reward_1b5.py --data="$pairs:train_prefs" --val_data="$pairs:test_prefs"
# watch logps/chosen: if it falls with logps/rejected, DPO unlearns both; nll_coef holds it
python train_dpo.py config/dpo_1b5.py --data="$pairs:train_prefs" --val_data="$pairs:test_prefs" "$@"
