#!/usr/bin/env bash
# A persona in a file of 12.6 MB: only the state that RWKV-7 1.5B starts from is trained. One card of 16 GB; not measured yet.
#   bash runs/state_persona.sh my_chats.jsonl          {"messages": [{"role", "content"}]} lines, a few hundred do
set -euo pipefail
. "$(dirname "$0")/install.sh"
. runs/weights.sh
weights rwkv7-g1a-1.5b-20250922-ctx4096.pth
chats="${1:?a JSONL file of conversations in the tone that you want}"; shift

# its learning rate is a thousand times SFT's: a state is an input, not a weight
python train_state.py config/state_1b5.py --init_from="$MODEL" --data="$chats" --val_data= --eval_off=false "$@"
python sample.py --state=none --state=out/state_1b5/state-final.pth --prompt=$'User: Who are you?\n\nAssistant:'
