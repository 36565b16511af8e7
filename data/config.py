"""What text a run reads and how it becomes batches: frozen records only. Imports no jax."""

import dataclasses
from typing import Literal

from parallel.records import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One text source of a mixture."""

    path: str = "stdlib"  # stdlib, a text file or folder, .jsonl, .parquet, hf:NAME, digits or speech:FOLDER
    weight: float = 1.0  # share of training rows drawn from it, relative to the other sources
    field: str = "text"  # which key or column holds the text (jsonl, parquet, hf)
    split: str = "train"  # which split (hf)

    def __post_init__(self):
        require(self, "data.mixture", "weight", low=0)
        if not self.weight:
            raise ValueError(f"data.mixture.weight=0 of {self.path} draws nothing from it; leave the source out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, tokenizer, cleaning, packing and loading."""

    path: str = "stdlib"  # stdlib (Python's), a text file or folder, .jsonl, .parquet, hf:NAME, digits, speech:FOLDER
    field: str = "text"  # which key or column holds the text (jsonl, parquet, hf)
    mixture: tuple[SourceConfig, ...] = ()  # several weighted sources instead of path
    tokenizer: str = "bpe"  # bpe (of the text), byte, char, words, a tokenizer.json, Hugging Face folder or name
    bpe_vocab: int = 4096  # tokens of a trained bpe
    valid_fraction: float = 0.05  # of documents (or of the text's end, see split) held out; 0 holds out none
    split: Literal["auto", "document", "tail"] = "auto"  # hold out documents or the text's end; auto: end if few
    dedup: Literal["none", "exact", "near"] = "exact"  # drop repeated documents; near uses MinHash
    near_threshold: float = 0.8  # Jaccard similarity from which two documents count as near-duplicates
    min_chars: int = 0  # shorter documents are dropped
    max_symbol_ratio: float = 1.0  # documents with a larger share of non-alphanumeric, non-space characters are dropped
    max_repeat_ratio: float = 1.0  # documents with a larger share of repeated lines are dropped
    packing: Literal["pack", "stream"] = "pack"  # whole documents packed into rows, or rows cut from one long stream
    prefetch: int = 4  # batches made ahead of the step; 0 makes each when it is asked for
    workers: int = 0  # loader processes; 0 loads in a thread of this one
    cache_dir: str = ""  # tokenised text is kept here; empty means the user's cache folder

    def __post_init__(self):
        if self.mixture and self.path != "stdlib":
            raise ValueError(f"data.path={self.path} and data.mixture are both set; add the path to the mixture")
        require(self, "data", "valid_fraction near_threshold max_symbol_ratio max_repeat_ratio", low=0, high=1)
        require(self, "data", "bpe_vocab", low=258)  # 256 bytes, begin and end of a text
        require(self, "data", "min_chars prefetch workers", low=0)
        if self.valid_fraction == 1:
            raise ValueError("data.valid_fraction=1 leaves nothing to train on; it must be below 1")

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The mixture, or path as its only source."""
        return self.mixture or (SourceConfig(path=self.path, field=self.field),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Parallel text for translation: where the pairs are, their tokenizers, and the lengths of a batch's rows."""

    path: str = "dates"  # dates (generated), a folder with train.SOURCE and train.TARGET, FILE,FILE, a .tsv or .jsonl
    source: str = (
        "en"  # language to translate from: a file ending in a folder, a key in a .jsonl; a .tsv's first column
    )
    target: str = "de"  # language to translate to: the same; a .tsv's second column
    tokenizer: Literal["bpe", "char", "byte"] = "bpe"  # bpe and char are made from the pairs; char is enough for dates
    bpe_vocab: int = 6000  # tokens of a trained bpe
    shared: bool = True  # one vocabulary for both languages, made from both; false: one each
    lower: bool = False  # lower-case every source and target
    buckets: tuple[int, ...] = (16, 24, 32)  # row lengths in tokens below train.seq_len, which is always the last one
    valid_pairs: int = 500  # kept for validation where the folder has no val.SOURCE (or valid., dev.)
    test_pairs: int = 0  # taken from the training text and never shown to the run
    examples: int = 20_000  # generated pairs, held-out ones among them (dates)

    def __post_init__(self):
        require(self, "data", "bpe_vocab", low=258)  # 256 bytes, begin and end of a text
        require(self, "data", "valid_pairs test_pairs", low=0)
        require(self, "data", "examples", low=1)
        if self.source == self.target:
            raise ValueError(
                f"data.source={self.source} and data.target={self.target} are the same; translate between two"
            )
        if any(edge < 2 for edge in self.buckets) or list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"data.buckets={self.buckets} must rise from 2 or more, as 16,24,32 does")


def bucket_edges(buckets: tuple[int, ...], *, seq_len: int) -> tuple[int, ...]:
    """The buckets' row lengths, seq_len last; ValueError where a bucket is longer."""
    if buckets and buckets[-1] > seq_len:
        raise ValueError(
            f"data.buckets has {buckets[-1]}, more than train.seq_len={seq_len}; leave it out, or raise train.seq_len"
        )
    return tuple(dict.fromkeys([*buckets, seq_len]))
