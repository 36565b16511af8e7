import dataclasses
import json

import pytest

from configs.base import RunConfig, split_dims
from configs.overrides import override
from configs.tiny import run
from data.config import SourceConfig
from parallel.records import from_dict, to_dict


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("train.seq_len=65", "train.seq_len=65 is longer than model.max_length=64; "),
        ("train.accumulate=3", "train.batch_size=8 is not a multiple of train.accumulate=3; "),
        ("train.steps=1", "optim.warmup_steps=2 is more than train.steps=1; lower it to at most 1"),
        (
            "mesh.tensor=4",
            "model.num_heads=2 does not divide over mesh.tensor=4 (rules.act_heads): 2 is not a multiple",
        ),
        ("mesh.tensor=2 model.num_kv_heads=1", "model.num_kv_heads=1 does not divide over mesh.tensor=2"),
        ("mesh.tensor=2 model.ffn_dim=63", "model.ffn_dim=63 does not divide over mesh.tensor=2 (rules.act_ffn)"),
        ("mesh.fsdp=3", "train.batch_size / train.accumulate=8 does not divide over mesh.fsdp=3 "),
        ("mesh.data=4 train.accumulate=4", "train.batch_size / train.accumulate=2 does not divide over mesh.data=4"),
        ("mesh.fsdp=8 model.embed_dim=36", "model.embed_dim=36 does not divide over mesh.fsdp=8 (rules.embed)"),
        (
            "mesh.tensor=3 model.vocab_size=64 rules.residual_seq=none rules.act_heads=none rules.act_ffn=none",
            "model.vocab_size=64 does not",
        ),
        ("mesh.data=0", "mesh.data=0 must be at least 1"),
        ("mesh.tensor=-1", "only one mesh axis can be -1"),
        (
            "rules.seq=tensr",
            "rules.seq=tensr is no mesh axis; they are pipe, data, fsdp, expert, context, tensor; did you mean tensor?",
        ),
        ("rules.batch=data,data", "rules.batch=data,data names a mesh axis twice"),
        ("name=a/b", "name='a/b' must be one folder's name"),
        ("name=..", "name='..' must be one folder's name"),
        ("name=", "name='' must be one folder's name"),
        ("seed=-1", "seed=-1 must be between 0 and 4294967295"),
        ("seed=4294967296", "seed=4294967296 must be between 0 and 4294967295"),
        ("train.steps=0", "train.steps=0 must be at least 1"),
        ("train.eval_every=0", "train.eval_every=0 must be at least 1"),
        ("optim.peak_lr=-1", "optim.peak_lr=-1.0 must be at least 0"),
        ("optim.b2=1", "optim.b2=1.0 must be between 0 and 0.999999"),
        ("optim.decay_fraction=2", "optim.decay_fraction=2.0 must be between 0 and 1"),
        ("data.valid_fraction=1.5", "data.valid_fraction=1.5 must be between 0 and 1"),
        ("data.min_chars=-1", "data.min_chars=-1 must be at least 0"),
    ],
)
def test_impossible_values_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        override(run, settings.split())
    assert str(error.value).startswith(message)


def test_a_mesh_that_divides_is_taken():
    assert override(run, ["mesh.tensor=2", "mesh.fsdp=4"]).mesh.tensor == 2


def test_the_rest_of_the_mesh_is_checked_when_devices_are_known():
    run.check_devices(8)
    with pytest.raises(ValueError, match=r"does not divide over mesh\.data=3 \(rules"):
        run.check_devices(3)
    with pytest.raises(ValueError, match="asks for 2 devices but 3 are here"):
        override(run, ["mesh.tensor=2"]).check_devices(3)


def test_every_rule_has_dimensions_to_check():
    rules = {field.name.removeprefix("act_") for field in dataclasses.fields(run.rules)}
    assert rules == set(split_dims(run.model, run.train))


def test_a_run_survives_json():
    mixture = (SourceConfig(path="a.txt", weight=0.1), SourceConfig())
    changed = dataclasses.replace(run, data=dataclasses.replace(run.data, mixture=mixture))
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(changed)))) == changed
