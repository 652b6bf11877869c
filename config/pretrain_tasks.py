# The small base model that every tiny post-training config starts from: RWKV-7 on the text skills
# of tasks.py.
#   python tasks.py --out=data/tasks
#   python prepare.py data/tasks_text.jsonl --out=data/tasks --tokenizer=bytes --val=0.01
#   python train_pretrain.py config/pretrain_tasks.py
# A minute and a half on one CPU thread. Trained no longer on purpose: the later stages need
# something to mend.
data = "data/tasks_train"
val_data = "data/tasks_val"
out_dir = "out/pretrain_tasks"
n_layer = 5
n_embd = 64
ctx_len = 64
micro_bsz = 32
global_bsz = 32
lr = 3e-3
lr_final = 3e-4
warmup_steps = 20
weight_decay = 0.0
max_steps = 700
eval_every = 350
save_every = 0
