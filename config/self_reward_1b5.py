# The paper's preset (arXiv 2401.10020) on RWKV-7 1.5B: SFT on instructions and judge examples, then
# two rounds. Not measured yet. The paper's 70B model: SFT lr 5.5e-6 -> 1.1e-6, DPO 1e-6 -> 1e-7,
# beta 0.1, batch 16.
#   data/ift_eft.jsonl: conversations, and judge examples {"prompt": judge_template filled in,
#   "completion": a justification and the score}, in one file
#   torchrun --nproc_per_node=8 self_reward.py config/self_reward_1b5.py
from self_reward import self_reward, sft

# The paper's additive prompt; what it says after the answer stands before it, so that all of it is
# read once.
judge_template = """\
User: Review the user's question and the corresponding response using the additive 5-point \
scoring system described below. Points are accumulated based on the satisfaction of each \
criterion:
- Add 1 point if the response is relevant and provides some information related to the user's \
inquiry, even if it is incomplete or contains some irrelevant content.
- Add another point if the response addresses a substantial portion of the user's question, but \
does not completely resolve the query or provide a direct answer.
- Award a third point if the response answers the basic elements of the user's question in a \
useful way, regardless of whether it seems to have been written by an AI Assistant or if it has \
elements typically found in blogs or search results.
- Grant a fourth point if the response is clearly written from an AI Assistant's perspective, \
addressing the user's question directly and comprehensively, and is well-organized and helpful, \
even if there is slight room for improvement in clarity, conciseness or focus.
- Bestow a fifth point for a response that is impeccably tailored to the user's question by an AI \
Assistant, without extraneous information, reflecting expert knowledge, and demonstrating a \
high-quality, engaging, and insightful answer.
After examining the user's instruction and the response, briefly justify your total score, up to \
100 words, and conclude with the score using the format: "Score: <total points>"
User: {prompt}
<response>{response}</response>

Assistant:"""

_dpo = dict(
    beta=0.1,
    nll_coef=0.1,
    lr=1e-6,
    lr_final=1e-7,
    ctx_len=2048,
    micro_bsz=2,
    global_bsz=16,
    grad_cp=True,
    epochs=1.0,
    save_every=100,
    eval_every=0,
)

init_from = "weights/rwkv7-g1a-1.5b-20250922-ctx4096.pth"
out_dir = "out/self_reward_1b5"
prompts = "data/prompts.jsonl"  # {"prompt": messages}, of instructions that are not in the SFT data
eval_data = "data/ift_val.jsonl"
max_drop = 0.05
num_candidates = 4
temperature = 0.7
top_p = 0.9
max_completion_length = 1024
judge = "sample"
judge_samples = 3
stages = [
    sft(
        data="data/ift_eft.jsonl",
        lr=5.5e-6,
        lr_final=1.1e-6,
        ctx_len=2048,
        micro_bsz=2,
        global_bsz=16,
        grad_cp=True,
        epochs=2.0,
        save_every=100,
        eval_every=0,
    ),
    self_reward(max_prompts=3000, **_dpo),
    self_reward(first_prompt=3000, **_dpo),
]
