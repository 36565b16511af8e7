"""The constants of a machine are kept, make a chip, and say more seconds for more work."""

import dataclasses

import pytest

from inference.config import EngineConfig
from inference.room import TILE
from model import families
from perf import this_machine
from perf.replica import Part, Step
from perf.this_machine import PROBE, Machine, Shape, Table

TABLE = Table((1, 16, 256), (10_000, 1_000_000), ((1e-6, 4e-6, 4e-5), (1e-4, 2e-4, 2e-3)))
MACHINE = Machine(
    name="pretended", cores=2, memory=2**34, flops=2e11, bandwidth=3e10, served=TABLE, trained=TABLE, gather=2e-10,
    gather_start=5e-5, tile_score=5e-9, tile_key=1e-9, write=5e-7, train_score=1e-8, logit=1e-9, logit_start=1e-4,
    loss_logit=2e-9, update=4e-9, served_rest=((1, 1e-4), (256, 2e-3)),
    trained_rest=((10_000, 4e-8), (1_000_000, 6e-8)),
)  # fmt: skip


def test_a_table_is_exact_at_its_points_and_between_them_in_between():
    assert TABLE.at(16, 1_000_000) == pytest.approx(2e-4)
    assert TABLE.at(16, 100_000) == pytest.approx((4e-6 * 2e-4) ** 0.5)
    assert TABLE.at(512, 1_000_000) == pytest.approx(4e-3)
    assert TABLE.at(256, 2_000_000) == pytest.approx(4e-3)
    assert 1e-4 < TABLE.at(4, 1_000_000) < 2e-4


def test_constants_are_kept_to_the_last_bit(tmp_path):
    path = tmp_path / "some" / "machine.json"
    this_machine.save(MACHINE, path)
    assert this_machine.load(path) == MACHINE


@pytest.mark.parametrize(
    ("text", "why"), [(None, "run python -m perf calibrate"), ("{}", "no constants"), ("x", "no constants")]
)
def test_what_is_not_measured_is_said(tmp_path, text, why):
    path = tmp_path / "machine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=why):
        this_machine.load(path)


def test_it_is_a_chip():
    chip = this_machine.chip(MACHINE)
    assert (chip.name, chip.rate("fp32"), chip.hbm_bandwidth) == ("this", 2e11, 3e10)


def test_more_work_takes_longer():
    train = [this_machine.train_seconds(MACHINE, PROBE, batch, 256) for batch in (1, 2, 8)]
    assert train == sorted(train)
    assert this_machine.train_seconds(MACHINE, PROBE, 1, 512) > train[0]
    decode = [this_machine.decode_seconds(MACHINE, PROBE, batch, 64) for batch in (1, 4, 16)]
    assert decode == sorted(decode)
    assert this_machine.decode_seconds(MACHINE, PROBE, 4, 500) > decode[1]
    prefill = [this_machine.prefill_seconds(MACHINE, PROBE, 1, length) for length in (32, 128, 256, 512)]
    assert prefill == sorted(prefill)
    deep = dataclasses.replace(PROBE, num_layers=8)
    head = this_machine.decode_seconds(MACHINE, dataclasses.replace(PROBE, num_layers=1), 1, 64)
    assert this_machine.decode_seconds(MACHINE, deep, 1, 64) > 4 * head / 2


def test_shapes_are_those_of_the_engine():
    from inference.engine import Engine
    from inference.room import limits_of

    options = EngineConfig(max_rows=12, cache_tokens=1024, chunk=256)
    engine = object.__new__(Engine)  # its shapes need no device
    engine.options = options
    engine.scheduler = type("Scheduler", (), {"limits": limits_of(PROBE, options)})()  # type: ignore[assignment]
    counts = this_machine.tile_counts(256)
    assert list(counts) == engine._tile_counts
    alone = this_machine.shape_of(Step((100, 130, 40), ()), max_rows=12, tile_counts=counts)
    assert alone == Shape(4, 0, (256,), ())
    beside = this_machine.shape_of(Step((100,), (Part(0, TILE + 1),)), max_rows=12, tile_counts=counts)
    assert (beside.rows, beside.tiles) == (16, next(count for count in counts if count >= 2))
    assert beside.tile_keys == (128,) * -(-beside.tiles // 8)


def test_experts_are_refused():
    with pytest.raises(ValueError, match="dense layers"):
        this_machine.train_seconds(MACHINE, families.mixtral_8x7b(), 1, 64)
