#!/usr/bin/env bash
# SFT of RWKV-7 1.5B on 200,000 conversations, one 80 GB card; not measured yet. 24 GB: --tune=lora --lr=2e-4 --lr_final=2e-5
set -euo pipefail
. "$(dirname "$0")/install.sh"
. runs/weights.sh
pip install --quiet datasets
weights rwkv7-g1a-1.5b-20250922-ctx4096.pth

# what is trained is the assistant's words and what ends them; look before you train: green is trained, grey only read
python prepare.py show hf:HuggingFaceH4/ultrachat_200k:test_sft --n=2
python train_sft.py config/sft_1b5.py --init_from="$MODEL" --data=hf:HuggingFaceH4/ultrachat_200k:train_sft \
    --val_data=hf:HuggingFaceH4/ultrachat_200k:test_sft --epochs=1 "$@"
python sample.py --model=out/sft_1b5/rwkv-final.pth --chat
