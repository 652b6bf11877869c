# GRPO on RWKV-7 G1 1.5B with math problems, eight cards:
#   torchrun --nproc_per_node=8 train_grpo.py config/grpo_1b5.py
# Not measured yet. --tune=lora --lr=1e-5, or --tune=state --lr=1e-3, need far less memory.
# data: JSONL of {"prompt": [{"role": "user", "content": "…"}], "answer": "42"}, as GSM8K
from config.rewards import has_format, numeric

data = "data/gsm8k_train.jsonl"
val_data = "data/gsm8k_test.jsonl"
init_from = "weights/rwkv7-g1a-1.5b-20250922-ctx4096.pth"
out_dir = "out/grpo_1b5"
reward = [numeric, has_format(r"<think>.*</think>.+")]
reward_weights = (1.0, 0.1)
num_generations = 8
max_completion_length = 1024
ctx_len = 2048
micro_bsz = 1
global_bsz = 64
chunk_len = 2048
epsilon_high = 0.28
lr = 1e-6
lr_final = 1e-7
warmup_steps = 10
max_steps = 500
grad_cp = True
eval_every = 50
save_every = 50
