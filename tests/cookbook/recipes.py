"""The two recipes of the cookbook, how each is called, and what must have come out of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

MODEL_NAME = "Qwen/Qwen3-0.6B"
RENDERER = "qwen3_instruct"  # no think block: so the starter model learned to answer additions
LORA_RANK = 32

SL_EPOCHS = 4
SL_BATCH_SIZE = 16  # of the 128 conversations: 8 steps an epoch
SL_LEARNING_RATE = 2e-3
SL_FALL_MIN = 0.5  # nats per token, mean of the first quarter of the steps to that of the last

RL_STEPS = 40
RL_GROUPS = 16
RL_GROUP_SIZE = 8
RL_LEARNING_RATE = 2e-3
RL_TOKENS_MAX = 8
RL_FIRST, RL_LAST = 3, 5  # steps averaged at the start and at the end
RL_RISE_MIN = 0.2  # share of correct answers
RL_KL_MAX = 1e-6  # mean of half the squared difference of sampler's and trainer's log-probabilities

Row = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was seen."""

    claim: str
    seen: str
    holds: bool


def common(url: str, log_path: Path) -> dict[str, Any]:
    """Arguments that both recipes take."""
    return {
        "model_name": MODEL_NAME,
        "renderer_name": RENDERER,
        "lora_rank": LORA_RANK,
        "base_url": url,
        "log_path": log_path,
        "eval_every": 0,
        "behavior_if_log_dir_exists": "raise",
    }


def supervised(url: str, log_path: Path, conversations: Path) -> tuple[str, dict[str, Any]]:
    """Module and arguments of the chat recipe on the packaged conversations."""
    return "tinker_cookbook.recipes.chat_sl.train", common(url, log_path) | {
        "dataset": conversations,
        "num_epochs": SL_EPOCHS,
        "batch_size": SL_BATCH_SIZE,
        "learning_rate": SL_LEARNING_RATE,
        "max_length": 512,
        "train_on_what": "last_assistant_message",
        "save_every": 16,
    }


def reinforcement(url: str, log_path: Path) -> tuple[str, dict[str, Any]]:
    """Module and arguments of the arithmetic recipe."""
    return "tinker_cookbook.recipes.math_rl.train", common(url, log_path) | {
        "env": "arithmetic",
        "groups_per_batch": RL_GROUPS,
        "group_size": RL_GROUP_SIZE,
        "learning_rate": RL_LEARNING_RATE,
        "max_tokens": RL_TOKENS_MAX,
        "max_steps": RL_STEPS,
        "loss_fn": "importance_sampling",
        "save_every": 20,
    }


def read_rows(file: Path) -> list[Row]:
    """The rows of a JSON-lines file; none if it is missing."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def series(rows: list[Row], key: str) -> list[float]:
    """A metric of every step that has it."""
    return [float(row[key]) for row in rows if key in row]


def check_saved(log_path: Path) -> Check:
    """The recipe's last checkpoint names trained weights and sampler weights."""
    last = (read_rows(log_path / "checkpoints.jsonl") or [{}])[-1]
    paths = [str(last.get(key, "")) for key in ("state_path", "sampler_path")]
    holds = all(path.startswith("tinker://") for path in paths) and last["name"] == "final"
    return Check("the final checkpoint is saved for training and for sampling", " ".join(paths), holds)


def check_supervised(log_path: Path) -> list[Check]:
    """The loss falls over the run."""
    losses = series(read_rows(log_path / "metrics.jsonl"), "train_mean_nll")
    steps = SL_EPOCHS * 128 // SL_BATCH_SIZE
    quarter = max(1, len(losses) // 4)
    first, last = (fmean(part or [0.0]) for part in (losses[:quarter], losses[-quarter:]))
    return [
        Check(f"{steps} steps are logged", str(len(losses)), len(losses) == steps),
        Check(f"the loss falls by {SL_FALL_MIN}", f"{first:.3f} to {last:.3f}", first - last >= SL_FALL_MIN),
        check_saved(log_path),
    ]


def check_reinforcement(log_path: Path) -> list[Check]:
    """The share of correct answers rises, and trainer and sampler agree."""
    rows = read_rows(log_path / "metrics.jsonl")
    shares, forms = series(rows, "env/all/correct"), series(rows, "env/all/format")
    kl = series(rows, "optim/kl_sample_train_v2")
    first, last = (fmean(part or [0.0]) for part in (shares[:RL_FIRST], shares[-RL_LAST:]))
    form = f"{fmean(forms[:RL_FIRST] or [0.0]):.2f} to {fmean(forms[-RL_LAST:] or [0.0]):.2f}"
    seen = f"{first:.2f} to {last:.2f} (well-formed {form})"
    return [
        Check(f"{RL_STEPS} steps are logged", str(len(shares)), len(shares) == RL_STEPS),
        Check(f"the share of correct answers rises by {RL_RISE_MIN}", seen, last - first >= RL_RISE_MIN),
        Check(
            "the sampler's log-probabilities are the trainer's",
            f"at most {max(kl, default=float('nan')):.1e}",
            len(kl) == RL_STEPS and max(kl) <= RL_KL_MAX,
        ),
        check_saved(log_path),
    ]
