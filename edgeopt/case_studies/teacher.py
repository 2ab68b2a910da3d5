"""The teacher of the translation study: a Marian network trained from nothing on sentence pairs.

It is left as Hugging Face's `save_pretrained` leaves one, so that whatever reads it knows nothing of this module.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgeopt.progress import Progress, Silent

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import MarianMTModel

PADDING, END, UNKNOWN = 0, 1, 2
#: Positions that the network has; of a longer text the rest is not read.
LONGEST = 128
#: State of a training, in the teacher's folder until all else is there.
UNFINISHED = "unfinished.pt"
Pair = tuple[list[int], list[int]]


@dataclass(frozen=True, slots=True)
class TeacherConfig:
    """Shape and training of the teacher.

    Attributes:
        tokens_per_batch: of the longer side, padding included.
        label_smoothing, dropout: as in Vaswani et al. 2017, https://arxiv.org/abs/1706.03762.
        warmup_steps: linear up to `lr`, then linearly down to nothing at the last step.
    """

    vocabulary: int = 6000
    width: int = 256
    layers: int = 3
    heads: int = 4
    feed_forward: int = 1024
    epochs: int = 15
    tokens_per_batch: int = 1600
    lr: float = 1e-3
    warmup_steps: int = 400
    dropout: float = 0.2
    label_smoothing: float = 0.1
    seed: int = 0


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) shared by both languages."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return tokenizer


def build_teacher(config: TeacherConfig, vocabulary: int) -> MarianMTModel:
    """A network with random weights; `vocabulary` is what the tokenizer really has."""
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(config.seed)
    return MarianMTModel(
        MarianConfig(
            vocab_size=vocabulary,
            d_model=config.width,
            encoder_layers=config.layers,
            decoder_layers=config.layers,
            encoder_attention_heads=config.heads,
            decoder_attention_heads=config.heads,
            encoder_ffn_dim=config.feed_forward,
            decoder_ffn_dim=config.feed_forward,
            dropout=config.dropout,
            activation_function="relu",
            scale_embedding=True,
            static_position_embeddings=True,
            max_position_embeddings=LONGEST,
            pad_token_id=PADDING,
            eos_token_id=END,
            decoder_start_token_id=PADDING,
            forced_eos_token_id=None,
        )
    )


def train_teacher(
    pairs: Sequence[tuple[str, str]], config: TeacherConfig, directory: Path, progress: Progress | None = None
) -> None:
    """Train and save; an interrupted training goes on from its last whole epoch.

    Args:
        pairs: (source, target) sentences.
        directory: gets config.json, model.safetensors, generation_config.json, tokenizer.json, tokenizer_config.json.
    """
    from transformers import PreTrainedTokenizerFast

    progress = progress or Silent()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([text for pair in pairs for text in pair], config.vocabulary)
    rows = _encoded(pairs, tokenizer)
    module = build_teacher(config, tokenizer.get_vocab_size())
    _train(module, rows, config, directory / UNFINISHED, progress)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(directory)
    module.save_pretrained(directory)
    (directory / UNFINISHED).unlink(missing_ok=True)


def _encoded(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[Pair]:
    sources = tokenizer.encode_batch([source for source, _ in pairs])
    targets = tokenizer.encode_batch([target for _, target in pairs])
    return [(_cut(one.ids), _cut(other.ids)) for one, other in zip(sources, targets, strict=True)]


def _cut(ids: list[int]) -> list[int]:
    return ids if len(ids) <= LONGEST else [*ids[: LONGEST - 1], END]


def _train(module: MarianMTModel, rows: list[Pair], config: TeacherConfig, kept: Path, progress: Progress) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    loss_of = nn.CrossEntropyLoss(ignore_index=-100, label_smoothing=config.label_smoothing)
    steps = config.epochs * len(_batches(rows, config, 0))
    epoch, step = _restore(kept, module, optimizer, config)
    while epoch < config.epochs:
        torch.manual_seed(config.seed + epoch + 1)
        module.train()
        batches = _batches(rows, config, epoch)
        for batch in progress.track(
            batches, f"Training the teacher, epoch {epoch + 1} of {config.epochs}", len(batches)
        ):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(step / config.warmup_steps, max(0.0, 1 - step / (steps + 1)))
            source = _padded([rows[index][0] for index in batch], PADDING)
            labels = _padded([rows[index][1] for index in batch], -100)
            with torch.autocast("cpu", torch.bfloat16):
                logits = module(
                    input_ids=source,
                    attention_mask=(source != PADDING).long(),
                    decoder_input_ids=_shifted(labels),
                    use_cache=False,
                ).logits
            loss = loss_of(logits.float().flatten(0, 1), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
        epoch += 1
        _keep(kept, module, optimizer, config, epoch, step)
    module.eval()


def _batches(rows: list[Pair], config: TeacherConfig, epoch: int) -> list[list[int]]:
    """Sentences of about the same length together, in an order that changes with the epoch."""
    chance = random.Random(config.seed * 1000 + epoch)
    lengths = [max(len(source), len(target)) + 3 * chance.random() for source, target in rows]
    batches = list(_filled(sorted(range(len(rows)), key=lengths.__getitem__), rows, config.tokens_per_batch))
    chance.shuffle(batches)
    return batches


def _filled(order: Sequence[int], rows: list[Pair], tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    longest = 0
    for index in order:
        length = max(len(rows[index][0]), len(rows[index][1]))
        if batch and max(longest, length) * (len(batch) + 1) > tokens:
            yield batch
            batch, longest = [], 0
        batch.append(index)
        longest = max(longest, length)
    yield batch


def _padded(rows: Sequence[list[int]], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def _shifted(labels: Tensor) -> Tensor:
    """What the decoder reads to tell `labels`: they, one later, behind the start token."""
    start = torch.full((len(labels), 1), PADDING)
    return torch.cat([start, labels[:, :-1].clamp(min=PADDING)], dim=1)


def _keep(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, config: TeacherConfig, epoch: int, step: int
) -> None:
    state = {"config": asdict(config), "epoch": epoch, "step": step}
    unfinished = path.with_suffix(".part")
    torch.save(state | {"module": module.state_dict(), "optimizer": optimizer.state_dict()}, unfinished)
    unfinished.replace(path)


def _restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, config: TeacherConfig) -> tuple[int, int]:
    """(epochs, steps) done; a training of another configuration counts for nothing."""
    if not path.exists():
        return 0, 0
    state = torch.load(path, weights_only=True)
    if state["config"] != asdict(config):
        return 0, 0
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"]), int(state["step"])
