"""A small causal language model trained on the English captions of Multi30k.

    python benchmarks/caption_lm.py WORK_DIR [EPOCHS]

Writes WORK_DIR/{tokenizer.json,caption-lm.safetensors}; needs ../shared/data.
"""

from __future__ import annotations

import gzip
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

CAPTIONS = Path(__file__).resolve().parents[2] / "shared" / "data" / "multi30k"
VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS = 4000, 24, 256, 4, 4
PADDING, START, END = 0, 1, 2


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(batch, length, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class CaptionLM(nn.Module):
    """(N, LENGTH) token ids -> (N, LENGTH, VOCABULARY) logits of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.layers = nn.Sequential(*(DecoderLayer() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.layers(self.tokens(tokens) + self.positions)))
        return logits


def captions(part: str) -> list[str]:
    return gzip.decompress((CAPTIONS / f"{part}.en.gz").read_bytes()).decode().lower().splitlines()


def tokenizer_of(work: Path) -> Tokenizer:
    path = work / "tokenizer.json"
    if not path.exists():
        made = Tokenizer(models.BPE(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
        made.train_from_iterator(
            captions("train"), trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
        )
        made.save(str(path))
    return Tokenizer.from_file(str(path))


def token_ids(part: str, tokenizer: Tokenizer) -> torch.Tensor:
    """(captions, LENGTH + 1): start, words, end, padding."""
    rows = []
    for encoding in tokenizer.encode_batch(captions(part)):
        row = [START, *encoding.ids[: LENGTH - 1], END]
        rows.append(row + [PADDING] * (LENGTH + 1 - len(row)))
    return torch.tensor(rows)


def load(work: Path) -> CaptionLM:
    net = CaptionLM()
    net.load_state_dict(load_file(work / "caption-lm.safetensors"))
    return net.eval()


def train(work: Path, epochs: int) -> None:
    torch.manual_seed(0)
    tokens = token_ids("train", tokenizer_of(work))
    net, batch = CaptionLM(), 64
    steps = epochs * (len(tokens) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for epoch in range(epochs):
        start, order = time.monotonic(), torch.randperm(len(tokens))
        for chosen in order[: len(order) // batch * batch].view(-1, batch):
            rows = tokens[chosen]
            logits = net(rows[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=PADDING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", flush=True)
        save_file(net.state_dict(), work / "caption-lm.safetensors")


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    train(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 6)
