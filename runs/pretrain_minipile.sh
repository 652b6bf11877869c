#!/usr/bin/env bash
# RWKV-7 0.1B on minipile as RWKV-LM trains it: the same data file, order of windows, schedule. One GPU or more; not measured yet.
#   GPUS=8 bash runs/pretrain_minipile.sh --micro_bsz=2          the loss is the same, the time is not
# Its published mean losses of each 20.6 M tokens: 4.876 4.029 3.802 3.663 3.579 3.511 3.462 … (+- 0.01)
set -euo pipefail
. "$(dirname "$0")/install.sh"

# RWKV-LM's own minipile.bin and .idx go to data/ as they are (its README says where they are kept): only with them is the
# order, and so the loss, upstream's. Any other text does too:
[ -f data/minipile.bin ] || {
    pip install --quiet datasets
    python prepare.py hf:JeanKaddour/minipile:train --out=data/own --tokenizer=world --val=0.001
    set -- --data=data/own_train --val_data=data/own_val --order=shuffle --max_steps=180_000 "$@"
}
torchrun --nproc_per_node="${GPUS:-1}" -- train_pretrain.py config/pretrain_0b1.py "$@"
python sample.py --model=out/pretrain_0b1/rwkv-final.pth --prompt="The "
