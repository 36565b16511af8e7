"""Real steps of tiny models, compiled for TPU slices: memory, what moves, what does not fit and what would help."""

import dataclasses
import json
import re

import jax
import pytest
from jax.sharding import PartitionSpec as P

from configs.base import RunConfig
from configs.commandline import resolve
from data.config import DataConfig
from inference.steps import Shape
from model.config import ModelConfig
from model.cost import num_parameters
from parallel.compilation import TPU_OPTIONS
from parallel.config import AxisRules, MeshConfig
from parallel.mesh import make_mesh, mesh_sizes
from parallel.topology import find, topology_devices
from perf import __main__ as door
from perf import advice, aot, hlo, memory, shardings
from perf.aot import LOW, Report, Work
from tests.tpu import needs_libtpu
from training.config import OptimConfig, TrainConfig

MODEL = ModelConfig(
    vocab_size=512, embed_dim=256, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=128, ffn_dim=512,
    max_length=256, rope_theta=1e4, norm_eps=1e-6, compute_dtype="bfloat16", remat="full", kernels="plain",
)  # fmt: skip
WORK = Work(
    model=MODEL,
    mesh=MeshConfig(data=1, fsdp=4),
    rules=AxisRules(),
    optim=OptimConfig(),
    train=TrainConfig(steps=10, batch_size=8, seq_len=128, loss_chunk=64),
)
SERVED = dataclasses.replace(WORK, model=dataclasses.replace(MODEL, kernels="auto"))  # as runs are


@pytest.fixture(scope="module")
def trained():
    return aot.compiled(WORK, find("v5e:2x2"), effort=LOW)


@needs_libtpu
def test_a_train_step_is_compiled_for_a_slice(trained):
    assert trained.fits
    assert 0 < trained.argument_bytes < trained.peak_bytes < trained.topology.hbm_bytes
    assert trained.alias_bytes > 0.9 * trained.output_bytes, "the state is donated"
    assert 0 < trained.lower_cpu_seconds < trained.compile_cpu_seconds
    assert trained.mesh["fsdp"] == 4
    files = trained.text.partition("FunctionNames")[0]
    assert '"model/decoder.py"' in files
    assert f'"{hlo.ROOT}' not in files, "they are named from the project's root, wherever it lies"


@needs_libtpu
def test_the_breakdown_makes_up_the_peak_and_matches_the_arguments(trained):
    kinds = trained.breakdown
    assert sum(kinds.values()) == trained.peak_bytes
    weights = 4 * num_parameters(MODEL)
    assert weights / 4 <= kinds["weights"] < weights / 4 * 1.05, "norms are on every device"
    assert kinds["moments"] == pytest.approx(2 * kinds["weights"], rel=0.01)
    batch = 5 * 4 * 8 * 128 / 4
    assert trained.argument_bytes == pytest.approx(kinds["weights"] + kinds["moments"] + batch, rel=0.05), "tiles"


@needs_libtpu
def test_what_moves_is_said_by_axis_and_line(trained):
    assert trained.collectives
    assert {row.axis for row in trained.collectives} == {"fsdp"}
    assert all(row.source for row in trained.collectives)
    assert any(row.source.startswith("model/") for row in trained.collectives)
    gathered = sum(row.result_bytes for row in trained.collectives if row.kind == "all-gather")
    matrices = 2 * (num_parameters(MODEL) - MODEL.vocab_size * MODEL.embed_dim)
    assert gathered >= 2 * matrices, "every layer's weights are gathered forward and backward"
    assert trained.wire_bytes == round(sum(row.wire_bytes for row in trained.collectives))


@needs_libtpu
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_serving_steps_are_compiled_too(step):
    mesh = MeshConfig(data=1, tensor=2, fsdp=2)
    work = dataclasses.replace(SERVED, step=step, mesh=mesh, batch=2, length=200)
    report = aot.compiled(work, find("v5e:2x2"), effort=LOW)
    assert report.fits
    blocks, size, width = 1 + 2 * 7, 32, 2  # 200 tokens are 7 blocks, and one is nobody's
    cache = 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim * blocks * size * width
    assert report.breakdown["cache"] == cache // 2, "heads are split"
    assert report.breakdown["weights"] == pytest.approx(2 * num_parameters(MODEL) / 4, rel=0.02)
    assert report.breakdown["moments"] == report.breakdown["gradients"] == 0
    assert report.argument_bytes > report.breakdown["cache"] + report.breakdown["weights"]
    assert report.alias_bytes > report.breakdown["cache"], "pools and slots are donated"
    assert report.kernels == {"paged_attention": MODEL.num_layers}
    assert not re.search(rf"= bf16\[{blocks},\S* copy\(", report.text), "pools are written where they stand"


@needs_libtpu
def test_heads_that_the_mesh_does_not_divide_are_on_every_device():
    shape = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 64, "layers": ("window", "global"), "window": 64}
    model = dataclasses.replace(SERVED.model, **shape)
    rules, mesh = AxisRules(heads=None), MeshConfig(data=1, tensor=4)
    work = dataclasses.replace(SERVED, step="decode", model=model, mesh=mesh, rules=rules, length=64)
    report = aot.compiled(work, find("v5e:2x2"), effort=LOW)
    assert report.kernels == {"paged_attention": model.num_layers}
    blocks, lanes = 3, 128
    assert report.breakdown["cache"] == 2 * model.num_layers * blocks * 32 * lanes * 2
    assert not re.search(rf"= bf16\[{blocks},\S* copy\(", report.text), "rows are whole lanes, whatever H is"


def test_kernels_that_the_devices_do_not_run_are_refused():
    work = dataclasses.replace(SERVED, step="decode", model=dataclasses.replace(MODEL, kernels="pallas"))
    with pytest.raises(ValueError, match="kernels=pallas are for TPUs, but the devices here are cpus"):
        aot.served_arrays(work, make_mesh(MeshConfig(data=1), jax.devices()[:1]), Shape(rows=1, width=1, tiles=0))


@needs_libtpu
def test_two_slices_talk_over_their_network():
    work = dataclasses.replace(WORK, mesh=MeshConfig(data=2, fsdp=4))
    report = aot.compiled(work, find("v5e:2x2", slices=2), effort=LOW)
    assert {row.axis for row in report.collectives if row.network == "dcn"} == {"data"}
    assert {row.axis for row in report.collectives if row.network == "ici"} == {"fsdp"}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v6e:2x4", "v5p:2x2x2", "tpu7x:2x2x1"])
def test_every_generation_says_what_it_moves(name):
    report = aot.compiled(dataclasses.replace(WORK, mesh=MeshConfig(data=1, fsdp=8)), find(name), effort=LOW)
    assert report.fits
    assert {row.axis for row in report.collectives} == {"fsdp"}
    assert "all-gather" in {row.kind for row in report.collectives}


@needs_libtpu
def test_what_does_not_fit_is_a_report_with_ways_out():
    model = dataclasses.replace(MODEL, embed_dim=2048, ffn_dim=2**17)  # 29 GB with moments, repeated on every device
    report = aot.compiled(dataclasses.replace(WORK, mesh=MeshConfig(), model=model), find("v5e:2x2"), effort=LOW)
    assert not report.fits
    assert report.peak_bytes > report.topology.hbm_bytes
    assert sum(report.breakdown.values()) == report.peak_bytes
    assert [kind for kind, _ in advice.blame(report)][:2] == ["moments", "weights"]
    (change,) = advice.changes(report)
    assert change.fits
    assert change.settings == "mesh.data=1 mesh.fsdp=4", "no batch is small enough"


@needs_libtpu
def test_each_kind_of_change_is_proposed_at_its_mildest():
    sizes = {"weights": 1, "moments": 2, "gradients": 1, "activations": 96 * 2**30, "logits": 0, "cache": 0}
    mesh = make_mesh(dataclasses.replace(WORK.mesh, fsdp=8))
    work = dataclasses.replace(
        WORK,
        mesh=MeshConfig(data=1, fsdp=8),
        model=dataclasses.replace(MODEL, remat="dots"),
        train=dataclasses.replace(WORK.train, batch_size=2**17),
    )
    report = Report(
        work=work, topology=find("v5e:2x4"), mesh=mesh_sizes(mesh), fits=False, peak_bytes=98 * 2**30,
        argument_bytes=0, output_bytes=0, alias_bytes=0, temp_bytes=0, breakdown=memory.breakdown(98 * 2**30, sizes),
        collectives=[], kernels={}, lower_cpu_seconds=0.0, compile_cpu_seconds=0.0, text="",
    )  # fmt: skip
    changes = advice.changes(report)
    assert len(changes) > 1
    for change in changes:
        settings = {"train.batch_size": str(2**17), **dict(word.split("=") for word in change.settings.split())}
        run = resolve(["configs/tiny.py", *map("=".join, settings.items())], door.DEFAULT)
        assert run.train.accumulate > 1 or run.train.batch_size < 2**17 or run.model.remat == "full"


def test_another_error_of_the_compiler_is_no_lack_of_memory():
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.33G) exceeds"
    )
    assert aot.needed_bytes(said, room=0) == round(16.33 * 2**30)
    assert aot.needed_bytes(said, room=2**40) == 2**40 + 1, "more than there is, however it was rounded"
    assert aot.needed_bytes("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", room=0) is None
    assert aot.needed_bytes("INVALID_ARGUMENT: no such option", room=0) is None


@pytest.mark.parametrize(
    ("fixed", "each", "room", "fitting"), [(10, 7, 100, 12), (0, 1, 5, 5), (90, 20, 100, 0), (0, 3, 100, 33)]
)
@pytest.mark.parametrize("begin", [1, 4, 64])
def test_the_largest_batch_is_found_in_few_steps(fixed, each, room, fitting, begin):
    tried = []

    def peak(batch: int) -> int:
        tried.append(batch)
        return fixed + each * batch

    assert aot.largest(peak, room, begin=begin) == fitting
    assert len(tried) == len(set(tried)) <= 7


@pytest.mark.parametrize(
    ("data", "size"),
    [(DataConfig(tokenizer="byte"), 320), (DataConfig(bpe_vocab=1000), 1024), (DataConfig(tokenizer="char"), 128)],
)
def test_a_vocabulary_is_assumed_where_the_tokenizer_decides(data, size):
    assert aot.with_assumed_vocabulary(dataclasses.replace(MODEL, vocab_size=0), data).vocab_size == size
    assert aot.with_assumed_vocabulary(MODEL, data) is MODEL


def test_a_tokenizer_that_only_its_file_knows_is_asked_for():
    with pytest.raises(ValueError, match=r"give model\.vocab_size=NUMBER"):
        aot.with_assumed_vocabulary(dataclasses.replace(MODEL, vocab_size=0), DataConfig(tokenizer="some/name"))


@needs_libtpu
def test_the_compiler_takes_the_options_that_we_give_it():
    device = topology_devices("v5e:1x1")[0]
    where = jax.sharding.SingleDeviceSharding(device)
    shape = jax.ShapeDtypeStruct((8, 128), "float32", sharding=where)
    jax.jit(lambda x: x + x).lower(shape).compile(compiler_options=dict(TPU_OPTIONS) or None)


def test_activations_are_cut_as_the_rules_say():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert [memory.parts(name, mesh, AxisRules()) for name in ("batch", "act_ffn", "act_embed")] == [4, 2, 1]
    assert memory.share(("batch", None, "act_ffn"), (8, 3, 16), mesh, AxisRules()) == 2 * 3 * 8


def test_a_breakdown_is_never_more_than_the_peak():
    sizes = dict.fromkeys(memory.KINDS, 10)
    assert sum(memory.breakdown(75, sizes).values()) == 75
    assert memory.breakdown(75, sizes)["other"] == 15
    short = memory.breakdown(35, sizes)
    assert (sum(short.values()), short["weights"], short["moments"], short["logits"], short["other"]) == (
        35,
        10,
        10,
        0,
        0,
    )


@pytest.mark.parametrize(
    ("mesh", "rules", "flags"),
    [
        (MeshConfig(data=4, fsdp=2), AxisRules(), {}),
        (MeshConfig(data=2, fsdp=2, tensor=2), AxisRules(), {}),
        (MeshConfig(data=4, fsdp=2), AxisRules(embed=None), {"fsdp=2, which splits no tensor"}),
        (MeshConfig(data=2, fsdp=2, tensor=2), AxisRules(vocab=None), {"tensor=2, which splits other tensors"}),
    ],
)
def test_what_is_whole_by_accident_is_flagged(mesh, rules, flags):
    work = dataclasses.replace(WORK, mesh=mesh, rules=rules)
    rows = shardings.report(work, make_mesh(mesh), large=2**14)
    found = {row.flag for row in rows if row.flag}
    assert len(found) == len(flags)
    assert all(any(flag in words for words in found) for flag in flags)


def test_a_tensor_is_listed_with_its_names_and_part():
    work = dataclasses.replace(WORK, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    rows = {row.path: row for row in shardings.report(work, make_mesh(work.mesh))}
    up = rows["parameters.layers.ffn.up"]
    assert (up.names, up.shape, up.spec) == (("layers", "embed", "ffn"), (3, 256, 512), ("", "fsdp", "tensor"))
    assert up.bytes == 4 * 3 * 256 * 512 // 4
    moments = [row for path, row in rows.items() if path.endswith("mu.layers.ffn.up")]
    assert [row.spec for row in moments] == [up.spec]
    assert shardings.total(list(rows.values())) == sum(row.bytes for row in rows.values())


def test_moments_that_do_not_follow_their_parameter_are_flagged():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    split = shardings.Row("parameters.w", ("embed", "ffn"), (512, 512), "float32", ("fsdp", ""), 2**19, "")
    whole = split._replace(path="mu.w", spec=("", ""), bytes=2**20)
    flags = [row.flag for row in shardings.flagged([split, whole], mesh, AxisRules(), large=2**14)]
    assert flags[0] == ""
    assert "whole over fsdp=2, although rules.embed splits it" in flags[1]
    assert shardings._spec(P(("data", "fsdp")), 2) == ("data,fsdp", "")


@pytest.mark.parametrize(
    ("change", "mesh", "expected"),
    [
        ({"loss": "tokens", "loss_chunk": 4}, MeshConfig(), 2 * 4 * 512),
        ({"loss": "tokens", "loss_chunk": 4}, MeshConfig(data=1, tensor=8), 16 * 4 * 64),
        ({"loss": "vocabulary", "loss_chunk": 200}, MeshConfig(), 2 * 8 * 128),
        ({"loss": "vocabulary", "loss_chunk": 200}, MeshConfig(data=2, context=2, tensor=2), 8 * 4 * 128),
    ],
)
def test_logits_at_once_are_those_of_a_part(change, mesh, expected):
    """Of [16, 8, 512]: 4 of a row's tokens, or 128 entries, the most up to 200 that divide V as a multiple of 128."""
    model = dataclasses.replace(MODEL, vocab_size=512)
    train = dataclasses.replace(WORK.train, batch_size=16, seq_len=8, **change)
    assert memory.logits_at_once(model, train, 16, make_mesh(mesh), AxisRules()) == expected


# The command line -----------------------------------------------------------------------------------------------------

TINY = ["configs/tiny.py", "model.embed_dim=64", "model.kernels=plain", "--effort", "-1.0"]


@pytest.fixture(autouse=True)
def keep_settings():
    before = {name: jax.config.values[name] for name in ("jax_enable_compilation_cache", "jax_num_cpu_devices")}
    yield
    for name, value in before.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)


@needs_libtpu
def test_compile_prints_one_json_object_last(capsys, tmp_path):
    words = [*TINY, "--topology", "v5e:2x2", "mesh.fsdp=2", "--json", "--hlo", str(tmp_path / "step.hlo")]
    assert door.main(["compile", *words]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    asked = "peak_bytes argument_bytes temp_bytes breakdown collectives wire_bytes compile_cpu_seconds fits"
    assert set(asked.split()) <= found.keys()
    for row in found["collectives"]:
        assert {"kind", "axis", "count", "operand_bytes", "result_bytes"} <= row.keys()
    assert found["mesh"]["fsdp"] == found["mesh"]["data"] == 2, "settings stand between options, too"
    assert found["topology"] == "v5e:2x2"
    assert "is_scheduled=true" in (tmp_path / "step.hlo").read_text()


@needs_libtpu
def test_compile_takes_the_first_topology_of_the_config(capsys):
    assert door.main(["compile", *TINY]) == 0
    out = capsys.readouterr().out
    assert out.startswith("train step on v5e:1x1: 1 device")
    assert "fits in 15.75 GiB" in out


@needs_libtpu
def test_shardings_lists_tensors_and_collectives(capsys):
    assert door.main(["shardings", *TINY, "mesh.tensor=2", "--topology", "v5e:2x2"]) == 0
    out = capsys.readouterr().out
    assert "parameters.layers.ffn.up" in out
    assert "0 tensors are whole by accident" in out
    assert "model/attention.py:" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compile", *TINY, "--topology", "v5e:3x3"], "the nearest are v5e:2x4"),
        (["compile", *TINY, "topologies="], "give --topology T"),
        (["compile", *TINY, "mesh.tensor=3"], "is not a multiple of 3"),
        (["compile", *TINY, "--batch", "2"], "a run has train.batch_size"),
        (["compile", *TINY, "--step", "decode", "--largest-batch"], "--largest-batch is of the train step"),
        (["compile", "configs/tinny.py"], "did you mean configs/tiny.py?"),
        (["compile", *TINY, "mesh.tensr=2"], "did you mean mesh.tensor"),
        (["shardings", *TINY, "--devices", "2", "--topology", "v5e:2x2"], "give one of them"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, said, capsys):
    assert door.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("words", [["compile", "--effort", "2"], ["compile", "--slices", "0"], ["compile", "--what"]])
def test_an_unknown_option_ends_with_status_2(words):
    with pytest.raises(SystemExit) as end:
        door.main(words)
    assert end.value.code == 2


def test_a_run_names_topologies_that_exist():
    run = resolve(["configs/tiny.py", "topologies=v5e:1x1,v5p:2x2x1"], door.DEFAULT)
    assert run.topologies == ("v5e:1x1", "v5p:2x2x1")
    with pytest.raises(ValueError, match=r"the nearest are v5e:2x4"):
        RunConfig(name="x", model=MODEL, train=WORK.train, topologies=("v5e:3x3",))
