# Chats of a small base model with seven text skills (tasks.py), about a minute. First the base:
#   python tasks.py --out=data/tasks
#   python prepare.py data/tasks_text.jsonl --out=data/tasks --tokenizer=bytes --val=0.01
#   python train_pretrain.py config/pretrain_tasks.py
# then  python train_sft.py config/sft_tiny.py    (or with --tune=lora --lr=1e-2 --lr_final=1e-3)
import tasks

data = "data/tasks_sft.jsonl"
val_data = "data/tasks_sft_val.jsonl"
init_from = "out/pretrain_tasks/rwkv-final.pth"
out_dir = "out/sft_tiny"
ctx_len = 128
micro_bsz = 64
global_bsz = 64
lr = 1e-3
lr_final = 1e-4
warmup_steps = 10
max_steps = 200  # twice as many do not help
eval_every = 0
save_every = 0
eval_fn = tasks.exact_match  # of greedy answers to 1,000 held-out tasks
