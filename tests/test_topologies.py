"""Every run compiles for the TPU slices that it names, and fits: the compiler's word, at low effort.

The two smallest are in the default run; `uv run --group tpu pytest -m slow tests/test_topologies.py` does all. What was
compiled is remembered by its program (in the user's cache folder), so that only what changed is compiled again.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import pathlib

import pytest

from configs.base import RunConfig, decoder_of
from configs.commandline import load
from model.config import ModelConfig
from parallel.compilation import TPU_OPTIONS, default_folder
from parallel.topology import find
from perf import aot
from perf.aot import LOW, Work
from tests.tpu import needs_libtpu

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FILES = [path for path in sorted(CONFIGS.glob("*.py")) if "\nrun = " in path.read_text()]
RUNS = [path for path in FILES if isinstance(load(path).model, ModelConfig)]  # the compiler's door knows decoders
QUICK = {("tiny", "v5e:1x1"), ("shakespeare", "v5e:1x1")}


CASES = [
    pytest.param(path, name, marks=() if (path.stem, name) in QUICK else pytest.mark.slow, id=f"{path.stem} on {name}")
    for path in RUNS
    for name in load(path).topologies
]


def work_of(run: RunConfig) -> Work:
    model = aot.with_assumed_vocabulary(*decoder_of(run))
    return Work(model=model, mesh=run.mesh, rules=run.rules, execution=run.execution, optim=run.optim, train=run.train)


def remembered(step: aot.Lowered, name: str) -> pathlib.Path:
    """Where what the compiler said of this very program is kept."""
    versions = [importlib.metadata.version(package) for package in ("jax", "libtpu")]
    said = json.dumps([step.program.as_text(), name, LOW, TPU_OPTIONS, *versions], sort_keys=True)
    return default_folder().parent / "topologies" / f"{hashlib.sha256(said.encode()).hexdigest()}.json"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_names_a_topology(path):
    assert load(path).topologies, f"{path.name} does not say which TPU slices it is meant for"


@needs_libtpu
@pytest.mark.parametrize(("path", "name"), CASES)
def test_a_run_compiles_and_fits_where_it_says(path, name):
    run, topology = load(path), find(name)
    run.check_devices(topology.num_devices)
    work = work_of(run)
    step = aot.lowered(work, topology)
    file = remembered(step, name)
    if not file.exists():
        report = aot.compile_lowered(work, topology, step, effort=LOW)
        found = {"peak_bytes": report.peak_bytes, "fits": report.fits, "breakdown": report.breakdown}
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{path.stem}.partial")
        part.write_text(json.dumps(found))
        part.replace(file)
    found = json.loads(file.read_text())
    assert found["fits"], f"{found['peak_bytes'] / 2**30:.2f} GiB of {topology.hbm_bytes / 2**30:.2f}: {found}"
