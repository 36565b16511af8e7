import pytest

from configs.overrides import override
from configs.tiny import run
from parallel.records import difference, keys, to_dict


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("name=first", "name", "first"),
        ("seed=7", "seed", 7),
        ("train.steps=1_000", "train.steps", 1000),
        ("optim.peak_lr=1e-4", "optim.peak_lr", 1e-4),
        ("optim.clip_norm=2", "optim.clip_norm", 2.0),
        ("model.tied=false", "model.tied", False),
        ("model.qk_norm=True", "model.qk_norm", True),
        ("model.query_scale=0.5", "model.query_scale", 0.5),
        ("model.norm=layer", "model.norm", "layer"),
        ("model.rope_scaling.kind=linear", "model.rope_scaling.kind", "linear"),
        ("model.layers=global,global", "model.layers", ("global", "global")),
        ("rules.batch=data", "rules.batch", "data"),
        ("rules.batch=fsdp,data", "rules.batch", ("fsdp", "data")),
        ("rules.heads=none", "rules.heads", None),
        ("data.path=a=b,c.txt", "data.path", "a=b,c.txt"),
        ("data.path=true", "data.path", "true"),
        ("data.tokenizer=5", "data.tokenizer", "5"),
        ("train.sample_prompt=", "train.sample_prompt", ""),
        ("out=/elsewhere/runs", "out", "/elsewhere/runs"),
        ("mesh.tensor=2", "mesh.tensor", 2),
    ],
)
def test_a_setting_changes_its_key_and_no_other(setting, path, value):
    changed = override(run, [setting])
    assert list(difference(to_dict(run), to_dict(changed))) == [path]
    (now,) = [key.value for key in keys(changed) if key.path == path]
    assert now == value
    assert type(now) is type(value)


def test_values_that_depend_on_each_other_change_together():
    changed = override(run, ["model.num_heads=3", "model.num_kv_heads=3"])
    assert (changed.model.num_heads, changed.model.num_kv_heads) == (3, 3)
    with pytest.raises(ValueError, match="num_heads=3 is not a multiple of num_kv_heads=2"):
        override(run, ["model.num_heads=3"])


def test_a_union_takes_none_and_back():
    windowed = override(run, ["model.layers=window,global", "model.window=8"])
    assert windowed.model.window == 8
    assert override(windowed, ["model.layers=global", "model.window=none"]) == run


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mesh.tensr=4", "unknown key mesh.tensr (--help lists all); did you mean mesh.tensor?"),
        ("steps=4", "unknown key steps (--help lists all); did you mean train.steps?"),
        ("model.kv_heads=4", "unknown key model.kv_heads (--help lists all); did you mean model.num_kv_heads?"),
        ("qqq=4", "unknown key qqq (--help lists all)"),
        (
            "mesh=4",
            "mesh is a section, not a value; set one of mesh.pipe, mesh.data, mesh.fsdp, mesh.expert, mesh.context, "
            "mesh.tensor, mesh.auto",
        ),
        ("train.steps", "'train.steps' is not key=value; write e.g. train.steps=100"),
        ("train.steps=many", "train.steps=many must be int"),
        ("train.steps=1.5", "train.steps=1.5 must be int"),
        ("train.steps=1,2", "train.steps=1,2 must be int"),
        ("train.steps=", "train.steps= must be int"),
        ("optim.peak_lr=nan", "optim.peak_lr=nan must be number"),
        ("optim.peak_lr=inf", "optim.peak_lr=inf must be number"),
        ("model.tied=1", "model.tied=1 must be true|false"),
        ("optim.name=adam", "optim.name=adam must be adamw|adafactor|lion|muon; did you mean adamw?"),
        ("model.layers=globl", "model.layers=globl must be (global|window),…"),
        ("data.mixture=a", "data.mixture holds records; set it in a config file, not on the command line"),
    ],
)
def test_refusals_are_one_line_with_the_way_out(setting, message):
    with pytest.raises(ValueError) as error:
        override(run, [setting])
    assert str(error.value) == message


def test_a_key_set_twice_is_refused():
    with pytest.raises(ValueError, match=r"^seed is set twice; say it once$"):
        override(run, ["seed=1", "seed=2"])
