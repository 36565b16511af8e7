"""What the constants leave over, learned from measurements like the job: a Gaussian process over its settings.

The rest is log(measured / predicted). Two jobs share it by as much as they are alike: the same software, chip and
model, close in size, length, batch and release (Rasmussen and Williams 2006, equations 2.23 to 2.26). Far from all
measurements it is nothing, and the constants stand alone. Knows settings and numbers, no time.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from model import cost
from perf.constants import CLASSES, family
from perf.work import Job

# Standard deviations of what jobs have in common: of their software alone, with their chip too, with their model too.
SOFTWARE, CHIP, MODEL = 0.06, 0.10, 0.16
NOISE = 0.035  # of one measurement, its own
# By what factor a setting changes before jobs are strangers; years, of releases.
REACH = {
    "parameters": 6.0, "length": 4.0, "output": 6.0, "sequences": 6.0, "devices": 10.0, "tensor": 3.0, "pipe": 3.0,
    "microbatch": 4.0, "bits": 1.6, "years": 1.5,
}  # fmt: skip
LABELS = ("stack", "chip", "die", "kind", "model")


class Settings(NamedTuple):
    """What jobs are compared by."""

    labels: np.ndarray  # [jobs, LABELS]
    sizes: np.ndarray  # [jobs, REACH], in units of the reach


def settings(jobs: Sequence[Job], chips: Sequence[str], years: Sequence[float]) -> Settings:
    """Of jobs on chips; `years` is when their software was released, 0 where that is not known."""
    labels = [(job.stack, chip, family(chip), job.kind, _model(job)) for job, chip in zip(jobs, chips, strict=True)]
    sizes = [_sizes(job, year) for job, year in zip(jobs, years, strict=True)]
    return Settings(np.array(labels), np.array(sizes))


def _model(job: Job) -> str:
    model = job.model
    return f"{model.num_layers} {model.embed_dim} {model.ffn_dim} {model.num_experts}"


def _sizes(job: Job, year: float) -> list[float]:
    layout = job.layout
    bits = {"fp32": 32, "16": 16, "8": 8, "4": 4}[CLASSES[job.compute]]
    sizes = {
        "parameters": cost.num_parameters(job.model), "length": job.length, "output": job.output + 1,
        "sequences": job.sequences, "devices": layout.num_devices, "tensor": layout.tensor, "pipe": layout.pipe,
        "microbatch": job.at_once * job.length if job.kind == "train" else 1, "bits": bits,
    }  # fmt: skip
    return [*(math.log(size) / math.log(REACH[name]) for name, size in sizes.items()), year / REACH["years"]]


def released(source: str) -> float:
    """Year of a source's software where its name says it: `26.06 NeMo Container` -> 2026.5."""
    found = re.search(r"\b(\d\d)\.(\d\d)(?:\.\d+)? NeMo", source)
    if found:
        return 2000 + int(found[1]) + int(found[2]) / 12 + (0.05 if re.search(r"\d\d\.\d\d\.\d", source) else 0)
    return 0.0


def covariance(a: Settings, b: Settings) -> np.ndarray:
    """[jobs of a, jobs of b]"""
    same = a.labels[:, None, :] == b.labels[None, :, :]
    stack, chip, die, kind, model = np.moveaxis(same, 2, 0)
    apart = a.sizes[:, None, :] - b.sizes[None, :, :]
    apart[..., -1] = np.where((a.sizes[:, None, -1] == 0) | (b.sizes[None, :, -1] == 0), 0.0, apart[..., -1])
    near = np.exp(-0.5 * np.sum(apart**2, axis=2))
    shared = SOFTWARE**2 * np.exp(-0.5 * np.sum((apart / 2) ** 2, axis=2))
    return (
        stack
        * kind
        * (shared + CHIP**2 * die * (0.5 + 0.5 * chip) * near + MODEL**2 * model * (0.3 + 0.7 * die) * near)
    )


def inverse(K: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Of measured jobs' covariance with their noise. A row that nothing like it explains has more noise of its own.

    The noise is a Student's, found by reweighting, so that one odd measurement does not bend what is around it.
    """
    noise = np.full(len(rest), NOISE**2)
    for _ in range(3):
        off = rest - K @ np.linalg.solve(K + np.diag(noise), rest)
        noise = NOISE**2 * (1 + (off / (2 * NOISE)) ** 2)
    return np.linalg.inv(K + np.diag(noise))


def weights(inverted: np.ndarray, rest: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """What each measured job adds to others, by its covariance with them; 0 for those left out.

    The inverse without some rows comes from the inverse with them: P_OO - P_OB (P_BB)^-1 P_BO.
    """
    found = np.zeros(len(rest))
    kept = ~left_out
    found[kept] = inverted[np.ix_(kept, kept)] @ rest[kept]
    if left_out.any():
        across = inverted[np.ix_(left_out, kept)]
        found[kept] -= across.T @ np.linalg.solve(inverted[np.ix_(left_out, left_out)], across @ rest[kept])
    return found
