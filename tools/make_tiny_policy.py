"""Makes the tiny policy of the demo from scratch: a tokenizer and a Qwen3 model of 0.6 M parameters.

    python tools/make_tiny_policy.py --out examples/tiny_policy

The policy is trained on generated arithmetic (tools/make_arithmetic_prompts.py). Half of the demonstrations
forget every carry and borrow, so that the policy, trained to convergence, uses the right and a wrong
procedure about half of the time each: the ability is latent, the errors are systematic. Half of the
demonstrations have labelled attempts before the answer, in the token form of bilateral contexts (BiccConfig's
headers), so that the policy can read a context. The correctness of the answer is independent of the attempts.
"""

import argparse
import math
import random
import sys
import time
from functools import partial
from pathlib import Path

import torch
from make_arithmetic_prompts import draw_problem
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megatron_bicc.config import BiccConfig

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_ATTEMPTS = 7
WRONG_SHARE = 0.5
"""Share of wrong answers, independent of the attempts before them"""
IGNORED = -100


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per byte, so per digit, and one per phrase of the demo."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    headers = BiccConfig()
    phrases = ["\\boxed{", headers.wrong_header, headers.right_header, headers.answer_header]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (PAD, END, USER, ASSISTANT)])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Returns a freshly initialized model; every size divides by 2, for tensor and pipeline parallel."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


class Demonstrations:
    """Draws batches of token ids with labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        headers = BiccConfig()
        self._rng = random.Random(seed)
        self._encode, self._eos, self._pad = encode, tokenizer.eos_token_id, tokenizer.pad_token_id
        self._attempt_header = {True: encode(headers.right_header), False: encode(headers.wrong_header)}
        self._answer_header = encode(headers.answer_header)

    def one(self, attempts: int) -> tuple[list[int], list[int]]:
        """Returns tokens and labels of a demonstration: prompt, labelled attempts of one class, answer.

        The attempts are learned too, which ties each header to its procedure.
        """
        problem = draw_problem(self._rng, held_out=False)
        parts = [(self._encode(f"{USER}{problem.text}{ASSISTANT}"), [])]
        if attempts:
            right = self._rng.random() < 0.5
            attempt = self._encode(problem.solution(right))
            parts += [(self._attempt_header[right], attempt)] * attempts
            parts += [(self._answer_header, [])]
        answer = self._encode(problem.solution(right=self._rng.random() >= WRONG_SHARE))
        parts += [([], [*answer, self._eos])]
        tokens = [token for given, learned in parts for token in given + learned]
        labels = [y for given, learned in parts for y in [IGNORED] * len(given) + learned]
        return tokens, labels

    def batch(self, size: int, attempts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns int64 tokens and labels [size, longest], padded on the right."""
        rows = [self.one(attempts) for _ in range(size)]
        width = max(len(tokens) for tokens, _ in rows)
        tokens = torch.tensor([t + [self._pad] * (width - len(t)) for t, _ in rows])
        labels = torch.tensor([y + [IGNORED] * (width - len(y)) for _, y in rows])
        return tokens, labels

    def step(self, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns two batches: without attempts, and with one to MAX_ATTEMPTS of them, usually few."""
        counts = range(1, MAX_ATTEMPTS + 1)
        attempts = self._rng.choices(counts, [1 / n**2 for n in counts])[0]
        return [self.batch(size // 2, 0), self.batch(size // 2, attempts)]


def make_optimizers(model: Qwen3ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices of the layers (a third of AdamW's steps) and AdamW for the rest."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in hidden}
    other = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def mean_loss(model: Qwen3ForCausalLM, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross-entropy at labelled tokens, in nats; causality hides padding on the right."""
    hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]
    learned = labels[:, 1:] != IGNORED
    return cross_entropy(model.lm_head(hidden[learned]), labels[:, 1:][learned])


def train(model: Qwen3ForCausalLM, demonstrations: Demonstrations, steps: int, size: int, lr: float) -> None:
    """Trains to convergence, with a cosine schedule after a short warm-up."""
    optimizers = make_optimizers(model, lr)
    shape = partial(_schedule, steps=steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, shape) for optimizer in optimizers]
    progress = trange(steps, desc="demonstrations", unit="step")
    for _ in progress:
        losses = [mean_loss(model, *batch) for batch in demonstrations.step(size)]
        model.zero_grad()
        (sum(losses) / len(losses)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepped in (*optimizers, *schedules):
            stepped.step()
        progress.set_postfix(alone=f"{losses[0]:.4f}", with_attempts=f"{losses[1]:.4f}")


def _schedule(step: int, steps: int, warmup: int = 40) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def main(arguments: list[str]) -> None:
    """Trains and writes the policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("examples/tiny_policy"), help="directory to write to"
    )
    parser.add_argument("--steps", type=int, default=350, help="training steps")
    parser.add_argument("--batch", type=int, default=128, help="demonstrations per step")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same policy")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train(model, Demonstrations(tokenizer, options.seed), options.steps, options.batch, options.lr)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    size = sum(p.numel() for p in model.parameters())
    print(f"{options.out}: {size:,} parameters, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
