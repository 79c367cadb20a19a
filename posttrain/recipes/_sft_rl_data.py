"""Data of `sft_rl`: nanochat's mixture for SFT and its problems for RL, or the small sets of the debug recipe."""

from posttrain.recipe.types import Dataset, WorldSource
from posttrain.recipes._hub import dataset, hub, take

ARC, GSM8K, SMOLTALK = "allenai/ai2_arc", "openai/gsm8k", "HuggingFaceTB/smol-smoltalk"


def sft_rl_data(quick_test: bool, max_tokens: int, shuffle_seed: int) -> tuple[Dataset, ...]:
    """`mixture`, about 23 thousand conversations, and `problems`, GSM8K's training set as tasks."""
    gsm8k_train = 8000
    if quick_test:
        return (
            dataset("mixture", "conversations", (hub(SMOLTALK, "smoltalk", take(1000, None)),), max_tokens),
            dataset("problems", "tasks", (hub(GSM8K, "gsm8k", take(500, None), subset="main"),), max_tokens),
        )
    mixture = (
        hub(ARC, "arc", take(2300, shuffle_seed), subset="ARC-Easy"),
        hub(ARC, "arc", take(1100, shuffle_seed), subset="ARC-Challenge"),
        hub(GSM8K, "gsm8k", take(gsm8k_train, shuffle_seed), subset="main"),
        hub(SMOLTALK, "smoltalk", take(10_000, shuffle_seed)),
        WorldSource(kind="world", world="identity", split="train", count=1000, seed=shuffle_seed),
        WorldSource(kind="world", world="spelling", split="train", count=600, seed=shuffle_seed),
    )
    problems = (hub(GSM8K, "gsm8k", take(gsm8k_train, shuffle_seed), subset="main"),)
    return (
        dataset("mixture", "conversations", mixture, max_tokens),
        dataset("problems", "tasks", problems, max_tokens),
    )
