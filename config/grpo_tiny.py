# GRPO on the small model's own answers, the checker as the reward, a quarter of an hour. First:
# config/sft_tiny.py.
import tasks

data = "data/tasks_prompts.jsonl"
init_from = "out/sft_tiny/rwkv-final.pth"
out_dir = "out/grpo_tiny"
num_generations = 8
temperature = 1.5  # at 1 six groups of ten have no spread: the model is too sure
max_completion_length = 20
ctx_len = 128
micro_bsz = 64
global_bsz = 64
lr = 5e-4
lr_final = 2e-5
warmup_steps = 10
max_steps = 700
eval_every = 0
save_every = 0
eval_fn = tasks.exact_match  # of greedy answers to 1,000 held-out tasks
rollouts_every = 100
log_every = 10


def reward(prompts, completions, **columns):
    """1 for the right answer, else 0."""
    return [
        float(tasks.check(prompt[-1]["content"], text))
        for prompt, text in zip(prompts, completions, strict=True)
    ]
