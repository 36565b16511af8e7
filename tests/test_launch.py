"""The launch files are what they say: they parse, and the run in each of them fits its devices."""

import pathlib
import re
import shlex

import pytest

from configs.commandline import resolve

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "docs" / "launch"
yaml = pytest.importorskip("yaml")


def run_of(words):
    """The run that `… train.py WORDS` asks for."""
    words = list(words)
    return resolve([str(ROOT / words[0]) if words[0].endswith(".py") else words[0], *words[1:]], ROOT)


def test_every_file_is_yaml():
    assert {path.name for path in LAUNCH.iterdir()} == {"jobset.yaml", "ray_serve.yaml", "skypilot.yaml"}
    assert all(list(yaml.safe_load_all(path.read_text())) for path in LAUNCH.iterdir())


def test_the_jobset_has_a_pod_a_host_and_a_run_that_fits():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    python, door, *words = container["command"]
    assert (python, door) == ("python", "train.py")
    run = run_of(words)
    run.check_devices(slices["replicas"] * rows * columns)
    assert run.mesh.data % slices["replicas"] == 0
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert run.out in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_skypilot_task_has_a_run_that_fits():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    chips = int(re.fullmatch(r"tpu-v6e-(\d+)", task["resources"]["accelerators"])[1])
    words = shlex.split(task["run"])
    run = run_of(words[words.index("train.py") + 1 :])
    run.check_devices(chips)
    assert run.out in task["file_mounts"]
