"""Fine-tune a base model on conversations, and see what it says before and after.

Each answer of the assistant becomes one datum: the conversation up to it, rendered through the model's own chat
template, without loss, then the answer, with loss. Training is pipelined: while the service works on one step, the next
one is already on its way.
"""

import argparse
import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import tinker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from service import choose_base_model, cost_table, count, fetch_cost, reach, run_script
from tinker import types

mpl.use("agg")
import matplotlib.pyplot as plt

Conversation = list[dict[str, str]]
FORM = 'a conversation is {"messages": [{"role": …, "content": …}, …]}, with an answer of the assistant'
NUM_SHOWN = 3
ANSWER_TOKENS_MAX = 40


def packaged_conversations() -> Path:
    """The conversations that the `tinker-cookbook` package ships, found without importing the package."""
    spec = importlib.util.find_spec("tinker_cookbook")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("Install examples/requirements.txt, or give --data FILE (JSON lines with `messages`).")
    return Path(spec.submodule_search_locations[0]) / "example_data" / "conversations.jsonl"


def read_conversations(path: Path) -> list[Conversation]:
    """One conversation a line: `{"messages": [{"role": …, "content": …}, …]}`, with an answer of the assistant.

    Raises:
        SystemExit: with a message that says which line is none, or why the file cannot be read.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise SystemExit(f"--data {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SystemExit(f"--data {path} is not UTF-8 text ({error})") from error
    conversations = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                messages = json.loads(line)["messages"]
                has_answer = "assistant" in [message["role"] for message in messages if message["content"]]
            except (ValueError, TypeError, KeyError):
                has_answer = False
            if not has_answer:
                raise SystemExit(f"--data {path}, line {number}: {FORM}")
            conversations.append(messages)
    if not conversations:
        raise SystemExit(f"--data {path} holds no conversation")
    return conversations


def render_turns(tokenizer: Any, messages: Conversation) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt tokens and answer tokens of every turn of the assistant.

    A model that can think is told not to (templates without that choice ignore it): the data holds answers alone.
    """
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(
            messages[:i], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        whole = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not whole.startswith(prompt):
            raise ValueError("the chat template does not continue its own prompt; it cannot be used for training")
        answer = whole[len(prompt) :].rstrip("\n")
        yield tuple(tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer))


def make_datum(prompt: list[int], answer: list[int]) -> types.Datum:
    """Next-token prediction over prompt and answer, with loss on the answer alone."""
    tokens = prompt + answer
    weights = [0.0] * len(prompt) + [1.0] * len(answer)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights[1:]},
    )


def batches(datums: list[types.Datum], size: int, rng: random.Random) -> Iterator[list[types.Datum]]:
    """Batches without end; every pass over the datums is in another order."""
    while True:
        shuffled = rng.sample(datums, len(datums))
        yield from (shuffled[i : i + size] for i in range(0, len(shuffled), size))


def mean_loss(output: Any, batch: list[types.Datum]) -> float:
    """Negative log-probability per token that has loss, in nats."""
    pairs = [
        (float(weight), float(logprob))
        for datum, fields in zip(batch, output.loss_fn_outputs, strict=True)
        for weight, logprob in zip(datum.loss_fn_inputs["weights"].data, fields["logprobs"].data, strict=True)
    ]
    return -sum(w * logprob for w, logprob in pairs) / sum(w for w, _ in pairs)


def ask(sampler: tinker.SamplingClient, prompts: list[list[int]], tokenizer: Any) -> list[str]:
    """What the model answers, greedily; all prompts are sampled at the same time."""
    params = types.SamplingParams(max_tokens=ANSWER_TOKENS_MAX, temperature=0.0, stop=[tokenizer.eos_token_id])
    futures = [sampler.sample(types.ModelInput.from_ints(prompt), 1, params) for prompt in prompts]
    return [
        tokenizer.decode(future.result().sequences[0].tokens, skip_special_tokens=True).strip() for future in futures
    ]


def train(client: tinker.TrainingClient, data: Iterator[list[types.Datum]], args: argparse.Namespace) -> list[float]:
    """Pipelined training with a progress bar; the rate falls evenly to zero. Returns the loss of every step."""
    losses: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=args.steps)
        waiting: list[tuple[Any, Any, list[types.Datum]]] = []
        for step in range(args.steps + 1):
            if step < args.steps:  # submitted before the step ahead of it is waited for
                batch = next(data)
                adam = types.AdamParams(learning_rate=args.learning_rate * (1 - step / args.steps))
                waiting.append((client.forward_backward(batch, "cross_entropy"), client.optim_step(adam), batch))
            if step > 0:
                forward_backward, optim_step, done = waiting.pop(0)
                losses.append(mean_loss(forward_backward.result(), done))
                optim_step.result()
                progress.update(bar, advance=1, description=f"training · loss {losses[-1]:.3f}")
    return losses


def plot(losses: list[float], file: Path, title: str) -> None:
    """The loss of every step as a PNG."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, marker=".")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def parse_args() -> argparse.Namespace:
    """Options; every default works on the service's default base model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--base-url", help="address of the service (else TINKER_BASE_URL)")
    parser.add_argument("--base-model", help="base model to fine-tune (else the first that the service offers)")
    parser.add_argument("--data", type=Path, help="conversations, JSON lines (else those packaged by tinker-cookbook)")
    parser.add_argument("--steps", type=count, default=200, help="optimizer steps")
    parser.add_argument("--batch-size", type=count, default=16, help="answers in one step")
    parser.add_argument(
        "--learning-rate", type=float, default=8e-3, help="of Adam at the start; try 2e-4 on models of billions"
    )
    parser.add_argument("--rank", type=count, default=32, help="of the LoRA adapter")
    parser.add_argument("--plot", type=Path, default=Path("supervised.png"), help="where the loss plot is written")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's start and the order of the data")
    return parser.parse_args()


def main() -> None:
    """Fine-tune, save, sample, plot, and show the cost."""
    args, console = parse_args(), Console(emoji=False, highlight=False, markup=False, soft_wrap=True)
    url, rng = reach(args.base_url), random.Random(args.seed)
    conversations = read_conversations(args.data or packaged_conversations())
    with tinker.ServiceClient(base_url=url, user_metadata={"script": "supervised"}) as service:
        base_model = choose_base_model(tinker.RestClient(base_url=url), args.base_model)
        client = service.create_lora_training_client(base_model, rank=args.rank, seed=args.seed).result()
        tokenizer = client.get_tokenizer()
        turns = [turn for messages in conversations for turn in render_turns(tokenizer, messages)]
        console.print(
            f"{base_model} · {len(conversations)} conversations · {len(turns)} answers · run {client.model_id}"
        )
        shown = rng.sample(conversations, min(NUM_SHOWN, len(conversations)))
        prompts = [next(render_turns(tokenizer, messages))[0] for messages in shown]
        before = ask(client.save_weights_and_get_sampling_client().result(), prompts, tokenizer)
        losses = train(client, batches([make_datum(*turn) for turn in turns], args.batch_size, rng), args)
        state = client.save_state("supervised")
        weights = client.save_weights_for_sampler("supervised").result().path
        after = ask(service.create_sampling_client(model_path=weights).result(), prompts, tokenizer)
        console.print(f"saved {state.result().path}\n      {weights}")
        for messages, old, new in zip(shown, before, after, strict=True):
            question = next((m["content"] for m in messages if m["role"] == "user"), "(no question)")
            console.print(f"\n{question}\n  before: {old!r}\n  after:  {new!r}")
        plot(losses, args.plot, f"{base_model}, rank {args.rank}")
        console.print(f"\nloss {losses[0]:.3f} → {losses[-1]:.3f} · plot in {args.plot}")
        console.print(cost_table(fetch_cost(url, client.model_id)))


if __name__ == "__main__":
    run_script(main)
