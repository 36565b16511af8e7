"""Rows of chips: spelled as people do, cited, and of one piece with what jax and each other say."""

import subprocess
import sys

import pytest

from parallel.chips import CHIPS, GIB, find


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("v5e", "TPU v5e"),
        ("TPU v5 lite", "TPU v5e"),
        ("V5LitePod", "TPU v5e"),
        ("v5p", "TPU v5p"),
        ("TPU v5", "TPU v5p"),
        ("tpu7x", "TPU v7x"),
        ("v7x", "TPU v7x"),
        ("TPU v7x (Ironwood)", "TPU v7x"),
        ("trillium", "TPU v6e"),
        ("h100", "H100-SXM-80GB"),
        ("A100-SXM", "A100-SXM-80GB"),
        ("nvidia a100-sxm4-40gb", "A100-SXM-40GB"),
        ("A100-PCIe-40GB", "A100-PCIe-40GB"),
        ("H200", "H200-SXM"),
        ("B300", "B300-SXM"),
        ("GB200 NVL72", "GB200"),
        ("P100-PCIe-16GB", "P100-PCIe-16GB"),
        ("V100-PCIe-32GB", "V100-PCIe-32GB"),
        ("MI250 (one GCD)", "MI250 (one GCD)"),
    ],
)
def test_a_chip_is_found_however_it_is_spelled(name, chip):
    assert find(name).name == chip


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("H101", "the nearest are H100-SXM-80GB"),
        ("tpu v8", "the nearest are TPU v"),
        ("A100-SXM-50GB", "A100-SXM-40GB"),
        ("a laptop", "known are TPU v2, TPU v3"),
        ("", "known are TPU v2"),
    ],
)
def test_an_unknown_chip_is_answered_with_the_nearest(name, near):
    with pytest.raises(ValueError) as error:
        find(name)
    assert f"there is no chip {name}; " in str(error.value)
    assert near in str(error.value)


def test_no_name_means_two_chips():
    names = [name for chip in CHIPS for name in (chip.name, *chip.kinds, *chip.aliases)]
    assert {name: find(name) for name in names} == {
        name: chip for chip in CHIPS for name in (chip.name, *chip.kinds, *chip.aliases)
    }


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_a_row_is_of_one_piece(chip):
    """Orders of magnitude, and what holds of every accelerator that is sold: narrower numbers are not slower."""
    assert chip.citations
    assert 1e12 < chip.rate("fp32") <= chip.bf16_flops < 1e16
    assert chip.rate("fp32") <= chip.rate("tf32") <= chip.bf16_flops <= chip.rate("fp8") <= chip.rate("fp4")
    assert 8 * GIB <= chip.hbm_bytes <= 300 * GIB
    assert 1e11 < chip.hbm_bandwidth < 1e13
    assert chip.network_bandwidth <= chip.link_bandwidth < chip.hbm_bandwidth
    assert chip.domain % chip.chips_per_host == 0 or chip.topology == "full"
    assert chip.links in {"torus2d": (4,), "torus3d": (6,), "switch": (1, 6, 12, 18), "full": (3, 7)}[chip.topology]
    assert 20 < chip.bf16_flops / chip.hbm_bandwidth < 600  # FLOPs a byte


def test_a_number_without_a_unit_is_multiplied_in_a_wider_one():
    assert find("A100").rate("fp8") == find("A100").rate("fp16") == 312e12
    assert find("A100").rate("int4") == 624e12
    assert find("H100").rate("fp4") == 1979e12
    assert find("T4").rate("tf32") == 8.1e12
    assert find("v5p").rate("fp32") == 459e12 / 6
    with pytest.raises(ValueError, match="no rate of bf61; numbers are fp32, tf32, bf16"):
        find("v5p").rate("bf61")


def test_two_chips_of_a_full_mesh_use_one_link():
    assert find("MI300X").bandwidth_among(8) == 7 * 64e9
    assert find("MI300X").bandwidth_among(2) == 64e9
    assert find("H100").bandwidth_among(2) == 450e9


def test_rows_load_without_jax():
    code = "import sys, parallel.chips; assert not {'jax', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
