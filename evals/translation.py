"""How good translations are: BLEU and chrF by sacreBLEU on plain text, also by the source's length. Knows no model."""

from collections.abc import Sequence
from typing import NamedTuple

from sacrebleu.metrics import BLEU, CHRF  # pyright: ignore[reportPrivateImportUsage]

BUCKETS = ((1, 10), (11, 15), (16, 20), (21, 0))  # words of a source; 0 is any number


class Judgement(NamedTuple):
    """What sacreBLEU says of translations beside their references."""

    bleu: float  # 0 to 100 (arXiv:1804.08771)
    chrf: float  # 0 to 100
    brevity: float  # BLEU's factor for what is too short; 1 is none
    length_ratio: float  # words, over those of the references
    bleu_signature: str  # how it was measured
    chrf_signature: str


class Bucket(NamedTuple):
    """Translations of sources of like length."""

    name: str  # words of a source
    low: int  # the least of them
    high: int  # and the most
    lines: int
    bleu: float | None  # None where there is no line


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU of translations, 0 to 100."""
    return judged(hypotheses, references).bleu


def judged(hypotheses: Sequence[str], references: Sequence[str], *, lower: bool = False) -> Judgement:
    """Translations beside one reference each; `lower` takes no notice of capitals."""
    if len(hypotheses) != len(references):
        raise ValueError(
            f"there are {len(hypotheses)} translations and {len(references)} references; each needs its own"
        )
    if not references:
        raise ValueError("there are 0 translations to judge; give at least 1")
    by_words, by_letters = BLEU(lowercase=lower), CHRF(lowercase=lower)
    score = by_words.corpus_score(hypotheses, [references])
    letters = by_letters.corpus_score(hypotheses, [references])
    return Judgement(
        bleu=float(score.score),
        chrf=float(letters.score),
        brevity=float(score.bp),
        length_ratio=score.sys_len / max(score.ref_len, 1),
        bleu_signature=str(by_words.get_signature()),
        chrf_signature=str(by_letters.get_signature()),
    )


def by_length(
    sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], *, lower: bool = False
) -> list[Bucket]:
    """BLEU of short sources apart from that of long ones. What has no word is in no bucket."""
    lengths = [len(source.split()) for source in sources]
    found = []
    for low, high in BUCKETS:
        inside = [place for place, length in enumerate(lengths) if low <= length and (not high or length <= high)]
        some = [[texts[place] for place in inside] for texts in (hypotheses, references)]
        name = f"{low}–{high or ''}"
        most = high or max(lengths, default=0)
        found.append(Bucket(name, low, most, len(inside), judged(*some, lower=lower).bleu if inside else None))
    return found


def report(judgement: Judgement, buckets: Sequence[Bucket] = ()) -> list[str]:
    """Lines for a terminal."""
    lines = [
        f"BLEU     {judgement.bleu:5.1f}   {judgement.bleu_signature}",
        f"chrF     {judgement.chrf:5.1f}   {judgement.chrf_signature}",
        f"brevity  {judgement.brevity:5.3f}   {judgement.length_ratio:.3f} of the references' words",
    ]
    if buckets:
        lines += ["", "source words  lines   BLEU"]
        values = ("    –" if one.bleu is None else f"{one.bleu:5.1f}" for one in buckets)
        lines += [f"{one.name:<12}  {one.lines:5}  {value}" for one, value in zip(buckets, values, strict=True)]
    return lines
