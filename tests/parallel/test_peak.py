import types

import jax
import pytest
from jax._src.pallas.mosaic import tpu_info

from parallel.chips import CHIPS, find
from parallel.peak import FP8, PEAK_FLOPS, measured_flops, peak_flops

TPUS = [kind for chip in CHIPS if chip.vendor == "Google" for kind in chip.kinds]


@pytest.mark.parametrize("kind", TPUS)
def test_a_row_is_what_jax_itself_knows_of_the_chip(kind):
    """jax prints v3 with 140 TFLOP/s, Google with 123; both round the others within two in a hundred."""
    version = tpu_info.chip_version_from_device_kind(kind)
    assert version is not None
    cores = version.num_physical_tensor_cores_per_chip
    core = tpu_info.get_tpu_info_for_chip(version, 1).bf16_ops_per_second
    devices = 1 if cores == 1 or version.supports_megacore else cores
    tolerance = 0.15 if kind == "TPU v3" else 0.02
    assert PEAK_FLOPS[kind] == pytest.approx(core * cores / devices, rel=tolerance)
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == PEAK_FLOPS[kind]
    assert find(kind).devices_per_chip == devices
    info = tpu_info.get_tpu_info_for_chip(version, 1)
    assert find(kind).hbm_bytes == pytest.approx(info.hbm_capacity_bytes * cores, rel=0.08)
    assert find(kind).hbm_bandwidth == pytest.approx(info.mem_bw_bytes_per_second * cores, rel=0.13)


def test_fp8_has_a_unit_on_one_kind():
    """docs/design/quantized_training.md: the others multiply it as bfloat16."""
    assert FP8 == ("TPU7x",)


def test_the_devices_of_a_cpu_share_what_is_measured():
    device = jax.devices()[0]
    assert peak_flops(device) * 8 == measured_flops(device)
    assert 1e9 < measured_flops(device) < 1e14
