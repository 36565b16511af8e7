"""nanoGPT's CPU recipe in plain PyTorch, eager: the peer of `configs/shakespeare.py`. Prints losses and wall time.

python docs/benchmarks/peers/nanogpt_cpu.py input.txt
"""

import argparse
import math
import pathlib
import time

START = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy, gelu, layer_norm, scaled_dot_product_attention  # noqa: E402

B, T, L, D, N, STEPS, WARMUP, PEAK, LAST = 12, 64, 4, 128, 4, 2000, 100, 1e-3, 1e-4


class Norm(nn.Module):
    """LayerNorm without bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return layer_norm(x, (D,), self.weight, None, 1e-5)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self):
        super().__init__()
        self.attention_norm, self.ffn_norm = Norm(), Norm()
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, N, D // N)).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.out(y)
        return x + self.down(gelu(self.up(self.ffn_norm(x))))


class Decoder(nn.Module):
    """GPT-2's shape with tied embeddings."""

    def __init__(self, vocab_size):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, D), nn.Embedding(T, D)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(L)), Norm()
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                depth = (2 * L) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * depth)

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return cross_entropy((self.norm(x) @ self.tokens.weight.T).flatten(0, 1), targets.flatten())


def batch(data):
    """B random windows and their next characters."""
    starts = torch.randint(len(data) - T, (B,)).tolist()
    return torch.stack([data[s : s + T] for s in starts]), torch.stack([data[s + 1 : s + 1 + T] for s in starts])


def rate(step):
    """Warm-up, then cosine."""
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    return LAST + 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) * (PEAK - LAST)


@torch.no_grad()
def estimate(model, data):
    """Loss of 20 random batches."""
    return float(np.mean([model(*batch(data)).item() for _ in range(20)]))


@torch.no_grad()
def whole(model, data):
    """Loss of all consecutive windows."""
    rows = (len(data) - 1) // T
    x, y = data[: rows * T].view(rows, T), data[1 : rows * T + 1].view(rows, T)
    return float(np.average([model(x[i : i + 64], y[i : i + 64]).item() for i in range(0, rows, 64)],
                            weights=[len(x[i : i + 64]) for i in range(0, rows, 64)]))  # fmt: skip


def main():
    """Train, evaluating every 250 steps as nanoGPT does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=STEPS, help="stop earlier (the schedule stays)")
    parser.add_argument("--seed", type=int, default=1337)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    text = asked.text.read_text()
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([ids[c] for c in text])
    train, valid = data[: int(0.9 * len(data))], data[int(0.9 * len(data)) :]
    model = Decoder(len(ids))
    groups = [{"params": [p for p in model.parameters() if (p.ndim < 2) == flat], "weight_decay": 0.1 * (not flat)}
              for flat in (False, True)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99))
    seconds = []
    for step in range(asked.steps + 1):
        if step % 250 == 0:
            print(f"step {step} train {estimate(model, train):.4f} valid {estimate(model, valid):.4f} "
                  f"at {time.perf_counter() - START:.1f} s", flush=True)  # fmt: skip
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = model(*batch(train))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            loss.item()
        seconds.append(time.perf_counter() - began)
    print(f"step time: median {1e3 * np.median(seconds):.1f} ms, best tenth {1e3 * np.quantile(seconds, 0.1):.1f} ms")
    print(f"valid, whole tail: {whole(model, valid):.4f} at {time.perf_counter() - START:.1f} s")


if __name__ == "__main__":
    main()
