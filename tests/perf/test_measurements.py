"""Rows become jobs, metrics seconds and back; what cannot be says why, what is broken says where."""

import pytest

from perf.measurements import COLUMNS, read, reported
from perf.work import Layout

ROW = {
    "id": "1", "kind": "train", "source": "NVIDIA/Megatron-LM", "chip": "H100-SXM-80GB", "num_chips": "64",
    "model": "Llama", "layers": "32", "d_model": "4096", "n_heads": "32", "n_kv_heads": "8", "d_ff": "14336",
    "vocab": "128256", "seq_len": "4096", "global_batch": "128", "microbatch": "1", "dtype_weights": "bf16",
    "dtype_act": "fp8", "parallelism": "dp=2;fsdp=1;tp=4;pp=8;cp=1;ep=1;vpp=5", "metric": "tokens_per_s_per_chip",
    "value": "1000", "arch": "swiglu gqa",
}  # fmt: skip


def rows(tmp_path, *changes, without=()):
    columns = [name for name in COLUMNS if name not in without]
    lines = [",".join(columns)]
    lines += [",".join((ROW | change).get(name, "") for name in columns) for change in changes]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read(path)


def test_a_row_is_a_job(tmp_path):
    (row,) = rows(tmp_path, {})
    assert row.job is not None
    assert row.job.layout == Layout(data=2, tensor=4, pipe=8, virtual=5)
    assert (row.job.stack, row.job.compute, row.job.model.gated) == ("megatron", "fp8", True)
    assert row.seconds(1000.0) == pytest.approx(128 * 4096 / (1000 * 64))


@pytest.mark.parametrize("metric", [
    "tokens_per_s_per_chip", "tflops_per_chip", "step_time_s", "latency_ms_total", "latency_ms_per_token",
])  # fmt: skip
def test_metrics_are_seconds_and_back(tmp_path, metric):
    (row,) = rows(tmp_path, {"metric": metric})
    assert reported(row, row.seconds(123.0)) == pytest.approx(123.0)


def test_experts_and_latents_are_read(tmp_path):
    arch = {"arch": "mla moe256top8 moe_ff2048 shared1 dense3", "d_model": "7168", "n_heads": "128", "layers": "61"}
    (row,) = rows(tmp_path, arch | {"n_kv_heads": "128", "parallelism": "dp=8;pp=8;ep=8"})
    assert row.job is not None
    model = row.job.model
    found = (model.num_experts, model.experts_per_token, model.expert_ffn_dim, model.shared_ffn_dim)
    assert found == (256, 8, 2048, 2048)
    assert (model.num_dense_layers, model.kv_rank, model.q_rank) == (3, 512, 1536)


@pytest.mark.parametrize(("change", "reason"), [
    ({"layers": ""}, "layers is not given"),
    ({"global_batch": ""}, "global_batch is not given"),
    ({"parallelism": "tp=7"}, "do not divide 64"),
    ({"dtype_act": "posit8"}, "posit8 is not known"),
    ({"metric": "joules"}, "joules says no time"),
    ({"chip": "H101"}, "there is no chip H101"),
    ({"n_heads": ""}, "n_heads is not given"),
    ({"n_kv_heads": "3"}, "num_kv_heads=3"),
    ({"parallelism": "tp=0"}, "tp=0"),
    ({"seq_len": "0"}, "seq_len=0"),
    ({"output_len": "0", "value": "0"}, "value=0"),
])  # fmt: skip
def test_what_is_no_job_says_why(tmp_path, change, reason):
    (row,) = rows(tmp_path, change)
    assert row.job is None
    assert reason in row.reason


@pytest.mark.parametrize(("change", "message"), [
    ({"value": "fast"}, "line 2: column value is 'fast'"),
    ({"chip": ""}, "line 2: column chip is empty"),
    ({"value": "-1"}, "line 2: column value is -1"),
    ({"num_chips": "nan"}, "column num_chips is nan"),
    ({"seq_len": "long"}, "column seq_len is 'long'"),
])  # fmt: skip
def test_what_is_broken_says_where(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        rows(tmp_path, change)


def test_a_missing_column_and_an_empty_file_are_said(tmp_path):
    with pytest.raises(ValueError, match="no column metric"):
        rows(tmp_path, {}, without=("metric",))
    with pytest.raises(ValueError, match="has no rows"):
        rows(tmp_path)


def test_where_no_batch_is_said_the_memory_says_it(tmp_path):
    change = {"kind": "generate", "global_batch": "", "output_len": "100", "parallelism": "tp=1", "num_chips": "1"}
    small, large = rows(
        tmp_path, change | {"chip": "H100-SXM-80GB", "seq_len": "8192"}, change | {"chip": "H200", "seq_len": "8192"}
    )
    assert small.job is not None
    assert large.job is not None
    assert 1 < small.job.batch < large.job.batch
