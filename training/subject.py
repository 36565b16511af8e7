"""What a run learns from: text, or pairs of texts; each knows its vocabulary, its batches and its files.

The loop asks either of them the same questions and never which one it is.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from data import pair_batches, pipeline
from data.config import DataConfig, PairsConfig
from data.packing import Batch
from data.pair_batches import PairBatch, PairCorpus, PairLoader
from model import cost, seq2seq_cost
from model.config import ModelConfig
from model.parameters import Shape
from model.seq2seq_config import Seq2SeqConfig
from training.config import TrainConfig

Part = Callable[[int], Sequence[int]]  # which of a batch's rows this process reads


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents, packed into rows of one length."""

    corpus: pipeline.Corpus

    def resolved(self, model: Shape) -> ModelConfig:
        """The model with a vocabulary that holds the tokenizer's."""
        assert isinstance(model, ModelConfig)
        return with_vocabulary(model, self.corpus.tokenizer.vocab_size)

    def train_flops(self, model: Shape, schedule: TrainConfig) -> float:
        """A token."""
        assert isinstance(model, ModelConfig)
        return cost.train_flops(model, schedule.seq_len)

    def shapes(self, schedule: TrainConfig) -> tuple[tuple[int, int], ...]:
        """B, T of every kind of batch."""
        return ((schedule.batch_size, schedule.seq_len),)

    def loader(self, schedule: TrainConfig, part: Part) -> pipeline.TrainLoader:
        """Batches without end."""
        B, T = schedule.batch_size, schedule.seq_len
        return pipeline.TrainLoader(self.corpus, batch_size=B, seq_len=T, part=part(B))

    def valid(self, schedule: TrainConfig, part: Part) -> list[Batch]:
        """Held-out batches."""
        B, T = schedule.batch_size, schedule.seq_len
        return pipeline.valid_batches(self.corpus, B, T, schedule.eval_batches, part(B))

    def describe(self, schedule: TrainConfig) -> list[str]:
        """Lines that tell of it."""
        return self.corpus.describe()

    def save(self, folder: pathlib.Path) -> None:
        """Write what the model's tokens mean."""
        self.corpus.tokenizer.save(folder / "tokenizer")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Sources and targets, in batches of several lengths."""

    corpus: PairCorpus

    def resolved(self, model: Shape) -> Seq2SeqConfig:
        """The model with vocabularies that hold both tokenizers'."""
        assert isinstance(model, Seq2SeqConfig)
        V = vocabulary(model, "vocab_size", self.corpus.tokenizer.vocab_size)
        S = V if model.shared else vocabulary(model, "source_vocab_size", self.corpus.source_tokenizer.vocab_size)
        return dataclasses.replace(model, vocab_size=V, source_vocab_size=S)

    def train_flops(self, model: Shape, schedule: TrainConfig) -> float:
        """A target token, the sources' share included."""
        assert isinstance(model, Seq2SeqConfig)
        train = self.corpus.train
        source, target = (len(side.tokens) / len(train) for side in (train.sources, train.targets))
        return seq2seq_cost.train_flops(model, source, target - 1)

    def shapes(self, schedule: TrainConfig) -> tuple[tuple[int, int], ...]:
        """Rows and length of every bucket that a pair is in."""
        return pair_batches.batch_shapes(self.corpus, schedule.batch_size, schedule.seq_len)

    def loader(self, schedule: TrainConfig, part: Part) -> PairLoader:
        """Batches without end."""
        return PairLoader(self.corpus, batch_size=schedule.batch_size, seq_len=schedule.seq_len, part=part)

    def valid(self, schedule: TrainConfig, part: Part) -> list[PairBatch]:
        """Held-out batches."""
        B, T = schedule.batch_size, schedule.seq_len
        return pair_batches.valid_batches(self.corpus, B, T, schedule.eval_batches, part)

    def describe(self, schedule: TrainConfig) -> list[str]:
        """Lines that tell of them."""
        loader = PairLoader(self.corpus, batch_size=schedule.batch_size, seq_len=schedule.seq_len)
        return [*self.corpus.describe(), *loader.describe()]

    def save(self, folder: pathlib.Path) -> None:
        """Write what the model's tokens mean, and the pairs that were kept apart."""
        self.corpus.tokenizer.save(folder / "tokenizer")
        if self.corpus.source_tokenizer is not self.corpus.tokenizer:
            self.corpus.source_tokenizer.save(folder / "source_tokenizer")
        for side, name in enumerate(("test.source", "test.target")):
            if self.corpus.test_texts:
                lines = "".join(f"{pair[side]}\n" for pair in self.corpus.test_texts)
                (folder / name).write_text(lines, encoding="utf-8")


Subject = Text | Pairs


def prepare(data: DataConfig | PairsConfig, *, seed: int) -> Subject:
    """Read what a run learns from."""
    if isinstance(data, PairsConfig):
        return Pairs(pair_batches.prepare_pairs(data, seed=seed))
    return Text(pipeline.prepare(data, seed=seed))


def with_vocabulary(model: ModelConfig, num_tokens: int) -> ModelConfig:
    """The model with a vocabulary of at least so many tokens."""
    return dataclasses.replace(model, vocab_size=vocabulary(model, "vocab_size", num_tokens))


def vocabulary(model: Any, name: Literal["vocab_size", "source_vocab_size"], num_tokens: int) -> int:
    """The tokenizer's size, rounded up, where the model has none; ValueError where the model's is too small."""
    size = getattr(model, name)
    if size == 0:
        return num_tokens + -num_tokens % 64
    if size < num_tokens:
        raise ValueError(
            f"model.{name}={size} is smaller than the tokenizer's {num_tokens} tokens; "
            f"raise it to at least {num_tokens}, or give 0 to take the tokenizer's"
        )
    return size
