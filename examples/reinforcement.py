"""Teach a base model to add, by reinforcement learning alone (GRPO).

Every step asks a few additions, samples a group of answers to each from the newest weights, rewards an answer that is
exactly right with 1 and any other with 0, and reinforces what did better than its own group. Nothing tells the model
the right answer; with `--learning-rate 0` the share of right answers stays where it is.
"""

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import matplotlib as mpl
import tinker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from service import choose_base_model, cost_table, count, fetch_cost, reach, run_script
from tinker import types

mpl.use("agg")
import matplotlib.pyplot as plt

OPERAND_MAX = 100
ANSWER_TOKENS_MAX = 8
SPREAD_MIN = 1e-6
SHARE_STEPS = 5  # steps averaged at both ends for the closing line


@dataclass(frozen=True)
class Problem:
    """One addition."""

    x: int
    y: int

    def messages(self) -> list[dict[str, str]]:
        """The question, after one example that shows the form of an answer."""
        return [
            {"role": "user", "content": "What is 4 + 5?"},
            {"role": "assistant", "content": "9"},
            {"role": "user", "content": f"What is {self.x} + {self.y}?"},
        ]

    def prompt(self, tokenizer: Any, *, thinking: bool) -> list[int]:
        """The tokens to answer, through the model's chat template."""
        choice = {} if thinking else {"enable_thinking": False}
        text = tokenizer.apply_chat_template(self.messages(), tokenize=False, add_generation_prompt=True, **choice)
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def reward(self, answer: str) -> float:
        """1 for the sum and nothing else, 0 for everything else."""
        return float(answer.strip() == str(self.x + self.y))


def advantages(rewards: list[float]) -> list[float]:
    """How much better than its group each answer did, in standard deviations; zeros if all did the same.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2.
    """
    mean, spread = fmean(rewards), pstdev(rewards)
    return [(reward - mean) / spread if spread > SPREAD_MIN else 0.0 for reward in rewards]


def make_datum(prompt: list[int], answer: list[int], logprobs: list[float], advantage: float) -> types.Datum:
    """Prompt and sampled answer for `importance_sampling`; the prompt has advantage 0, so no loss."""
    tokens, blank = prompt + answer, [0.0] * (len(prompt) - 1)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": blank + logprobs,
            "advantages": blank + [advantage] * len(answer),
        },
    )


def roll_out(
    sampler: tinker.SamplingClient, problems: list[Problem], tokenizer: Any, args: argparse.Namespace
) -> tuple[list[types.Datum], float]:
    """Sample a group of answers to every problem, all at the same time, and reward them.

    Returns:
        The datums of all groups whose answers differ in reward, and the share of right answers.
    """
    params = types.SamplingParams(max_tokens=ANSWER_TOKENS_MAX, temperature=1.0, stop=[tokenizer.eos_token_id])
    prompts = [problem.prompt(tokenizer, thinking=not args.no_thinking) for problem in problems]
    futures = [sampler.sample(types.ModelInput.from_ints(prompt), args.group_size, params) for prompt in prompts]
    datums, all_rewards = [], []
    for problem, prompt, future in zip(problems, prompts, futures, strict=True):
        answers = future.result().sequences
        rewards = [problem.reward(tokenizer.decode(a.tokens, skip_special_tokens=True)) for a in answers]
        all_rewards += rewards
        datums += [
            make_datum(prompt, list(answer.tokens), list(answer.logprobs), advantage)
            for answer, advantage in zip(answers, advantages(rewards), strict=True)
            if advantage != 0.0
        ]
    return datums, fmean(all_rewards)


def train(client: tinker.TrainingClient, tokenizer: Any, args: argparse.Namespace) -> list[float]:
    """Sample, reward, reinforce; returns the share of right answers of every step."""
    rng, shares = random.Random(args.seed), []
    adam = types.AdamParams(learning_rate=args.learning_rate)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("reinforcing", total=args.steps)
        sampler = client.save_weights_and_get_sampling_client()
        for _ in range(args.steps):
            problems = [Problem(rng.randint(0, OPERAND_MAX), rng.randint(0, OPERAND_MAX)) for _ in range(args.groups)]
            datums, share = roll_out(sampler.result(), problems, tokenizer, args)
            shares.append(share)
            if datums:  # all three are submitted before any of them is waited for
                forward_backward = client.forward_backward(datums, "importance_sampling")
                optim_step = client.optim_step(adam)
                sampler = client.save_weights_and_get_sampling_client()
                forward_backward.result()
                optim_step.result()
            progress.update(bar, advance=1, description=f"reinforcing · {share:4.0%} right")
    return shares


def plot(shares: list[float], file: Path, title: str) -> None:
    """The share of right answers of every step, and its moving average, as a PNG."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = range(1, len(shares) + 1)
    smooth = [fmean(shares[max(0, i - SHARE_STEPS) : i]) for i in steps]
    axes.plot(steps, shares, ".", alpha=0.5, label="step")
    axes.plot(steps, smooth, label=f"mean of the last {SHARE_STEPS}")
    axes.set(title=title, xlabel="step", ylabel="share of right answers", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def parse_args() -> argparse.Namespace:
    """Options; every default works on the service's default base model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--base-url", help="address of the service (else TINKER_BASE_URL)")
    parser.add_argument("--base-model", help="base model to train (else the first that the service offers)")
    parser.add_argument("--steps", type=count, default=40, help="optimizer steps")
    parser.add_argument("--groups", type=count, default=16, help="additions in one step")
    parser.add_argument("--group-size", type=count, default=8, help="answers sampled to each addition")
    parser.add_argument(
        "--learning-rate", type=float, default=2e-3, help="of Adam; 0 changes nothing, try 4e-5 on models of billions"
    )
    parser.add_argument("--no-thinking", action="store_true", help="tell a model that thinks to answer at once")
    parser.add_argument("--rank", type=count, default=32, help="of the LoRA adapter")
    parser.add_argument("--plot", type=Path, default=Path("reinforcement.png"), help="where the plot is written")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's start and the additions asked")
    return parser.parse_args()


def main() -> None:
    """Reinforce, plot, and show the cost."""
    args, console = parse_args(), Console(emoji=False, highlight=False, markup=False, soft_wrap=True)
    url = reach(args.base_url)
    with tinker.ServiceClient(base_url=url, user_metadata={"script": "reinforcement"}) as service:
        base_model = choose_base_model(tinker.RestClient(base_url=url), args.base_model)
        client = service.create_lora_training_client(base_model, rank=args.rank, seed=args.seed).result()
        console.print(f"{base_model} · run {client.model_id}")
        shares = train(client, client.get_tokenizer(), args)
        plot(shares, args.plot, f"{base_model}, learning rate {args.learning_rate}")
        ends = math.ceil(min(SHARE_STEPS, len(shares) / 2))
        first, last = fmean(shares[:ends]), fmean(shares[-ends:])
        console.print(f"share of right answers {first:.0%} → {last:.0%} · plot in {args.plot}")
        console.print(cost_table(fetch_cost(url, client.model_id)))


if __name__ == "__main__":
    run_script(main)
