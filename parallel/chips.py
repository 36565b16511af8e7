"""Accelerators as their makers state them: one cited row a chip. Knows no model, measures nothing and imports no jax.

    find("v5p").bf16_flops                    4.59e14
    find("A100").rate("fp8")                  3.12e14: no unit for fp8, so it is multiplied as bf16
    find("H101")                              ValueError: there is no chip H101; the nearest are H100-…

Rates are dense (no sparsity), bandwidths one way. Where sources differ the row says which was taken. A network of
`assumed` is what hosts with these chips usually have, not a property of the chip.
"""

import dataclasses
import difflib
import re
from typing import Literal

Topology = Literal["torus2d", "torus3d", "switch", "full", "none"]

T, G, GIB = 1e12, 1e9, 2**30

# What a matmul is done in where the chip has no unit for its number: the narrowest that holds every value of it.
WIDER = {"fp4": "fp8", "int4": "int8", "fp8": "bf16", "int8": "bf16", "tf32": "fp32", "fp16": "bf16"}
PASSES = 6  # bfloat16 products that make a float32 one on a TPU: jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator, and the network that it usually stands in."""

    name: str
    vendor: str
    bf16_flops: float  # FLOP/s of matmuls in bf16; in fp16 where there is no bf16, in fp32 where there is neither
    fp32_flops: float | None = None  # FLOP/s of matmuls in fp32; None here and below: there is no unit for it
    tf32_flops: float | None = None  # FLOP/s in fp32 of 10 bits of fraction
    int8_flops: float | None = None  # operations/s
    fp8_flops: float | None = None  # FLOP/s
    fp4_flops: float | None = None  # FLOP/s
    hbm_bytes: int  # bytes of the memory beside the chip
    hbm_bandwidth: float  # B/s
    link: str = ""  # name of the links between chips
    link_bandwidth: float = 0.0  # B/s one way, all links of a chip together
    links: int = 0  # links of a chip
    topology: Topology = "none"  # how links join chips; full: a link for every two, none: a chip is alone
    domain: int = 1  # chips that the links join at most
    chips_per_host: int = 1
    network_bandwidth: float = 0.0  # B/s one way of a chip, between domains
    devices_per_chip: int = 1  # jax devices of a chip
    price: float | None = None  # US$ a chip-hour on demand, as one public list had it; None: none was found
    kinds: tuple[str, ...] = ()  # `device_kind` of its jax devices
    aliases: tuple[str, ...] = ()  # what else it is called
    citations: str  # where the row is from

    def rate(self, number: str) -> float:
        """Operations/s of matmuls of `number`, in the next wider unit where there is none for it."""
        own = {
            "fp32": self.fp32_flops or self.bf16_flops / PASSES, "tf32": self.tf32_flops, "bf16": self.bf16_flops,
            "int8": self.int8_flops, "fp8": self.fp8_flops, "fp4": self.fp4_flops, "fp16": None, "int4": None,
        }  # fmt: skip
        if number not in own:
            raise ValueError(f"there is no rate of {number}; numbers are {', '.join(own)}")
        return own[number] or self.rate(WIDER[number])

    def bandwidth_among(self, chips: int) -> float:
        """B/s one way that a chip of a domain can send to `chips` - 1 others over its links: `full` uses a part."""
        if self.topology != "full":
            return self.link_bandwidth
        return self.link_bandwidth * min(chips - 1, self.domain - 1) / (self.domain - 1)


_DOCS = "docs.cloud.google.com/tpu/docs/"
_BOOK = "jax-ml/scaling-book tpus.md"
_JAX = "jax tpu_info.py"
_AIC = "ai-dynamo/aiconfigurator systems/"
_ML = "stas00/ml-engineering compute/accelerator, network"
_NEUSIGHT = "sitar-lab/NeuSight device_configs"
_MI200 = "anandtech.com/show/17326 (MI210)"
_BLACKWELL = "verda.com/blog/gb300-nvl72-architecture (fp32, tf32)"

# fmt: off
CHIPS = (
    Chip(name="TPU v2", vendor="Google", bf16_flops=46 * T, hbm_bytes=16 * GIB, hbm_bandwidth=716 * G, link="ICI",
         link_bandwidth=4 * 62 * G, links=4, topology="torus2d", domain=256, chips_per_host=4, devices_per_chip=2,
         network_bandwidth=6.25 * G, kinds=("TPU v2",),
         citations=f"{_JAX}; 496 Gbit/s a link: doi:10.1145/3360307; network as v3"),
    Chip(name="TPU v3", vendor="Google", bf16_flops=123 * T, hbm_bytes=32 * GIB, hbm_bandwidth=900 * G, link="ICI",
         link_bandwidth=4 * 100 * G, links=4, topology="torus2d", domain=1024, chips_per_host=4, devices_per_chip=2,
         network_bandwidth=6.25 * G, kinds=("TPU v3",),
         citations=f"{_DOCS}v3; {_BOOK} (links; 25 GB/s of network a host); {_JAX} has 140 TFLOP/s, 825 GB/s"),
    Chip(name="TPU v4", vendor="Google", bf16_flops=275 * T, int8_flops=275 * T, hbm_bytes=32 * GIB,
         hbm_bandwidth=1200 * G, link="ICI", link_bandwidth=6 * 45 * G, links=6, topology="torus3d", domain=4096,
         chips_per_host=4, network_bandwidth=6.25 * G, price=3.22, kinds=("TPU v4",),
         citations=f"{_DOCS}v4; {_BOOK} (links; 25 GB/s of network a host)"),
    Chip(name="TPU v5e", vendor="Google", bf16_flops=197 * T, int8_flops=393 * T, hbm_bytes=16 * GIB,
         hbm_bandwidth=819 * G, link="ICI", link_bandwidth=4 * 50 * G, links=4, topology="torus2d", domain=256,
         chips_per_host=8, network_bandwidth=3.125 * G, price=1.20, kinds=("TPU v5 lite", "TPU v5e"),
         aliases=("v5litepod", "v5lite"),
         citations=f"{_DOCS}v5e (400 GB/s of ICI both ways, 6.4 Tbit/s of network a pod); {_BOOK}"),
    Chip(name="TPU v5p", vendor="Google", bf16_flops=459 * T, int8_flops=918 * T, hbm_bytes=96 * GIB,
         hbm_bandwidth=2765 * G, link="ICI", link_bandwidth=6 * 100 * G, links=6, topology="torus3d", domain=6144,
         chips_per_host=4, network_bandwidth=6.25 * G, price=4.20, kinds=("TPU v5", "TPU v5p"),
         citations=f"{_DOCS}v5p (1200 GB/s of ICI both ways, largest job 16x16x24, 50 Gbit/s of network a chip); "
                   f"{_BOOK}; {_JAX} has 2460 GB/s"),
    Chip(name="TPU v6e", vendor="Google", bf16_flops=918 * T, int8_flops=1836 * T, hbm_bytes=32 * GIB,
         hbm_bandwidth=1638 * G, link="ICI", link_bandwidth=4 * 100 * G, links=4, topology="torus2d", domain=256,
         chips_per_host=8, network_bandwidth=12.5 * G, price=2.70, kinds=("TPU v6 lite", "TPU v6e"),
         aliases=("v6", "Trillium"),
         citations=f"{_DOCS}v6e (800 GB/s of ICI both ways, 25.6 Tbit/s of network a pod); {_BOOK}"),
    Chip(name="TPU v7x", vendor="Google", bf16_flops=2307 * T, fp8_flops=4614 * T, hbm_bytes=192 * GIB,
         hbm_bandwidth=7400 * G, link="ICI", link_bandwidth=6 * 100 * G, links=6, topology="torus3d", domain=9216,
         chips_per_host=4, devices_per_chip=2, network_bandwidth=12.5 * G, kinds=("TPU7x",),
         aliases=("v7", "TPU v7x (Ironwood)", "Ironwood"),
         citations=f"{_DOCS}tpu7x (100 Gbit/s of network a chip); {_JAX}; {_ML} (600 GB/s of ICI)"),

    Chip(name="P4", vendor="NVIDIA", fp32_flops=5.7 * T, bf16_flops=5.7 * T, int8_flops=22 * T, hbm_bytes=8 * GIB,
         hbm_bandwidth=192 * G, link="PCIe 3", link_bandwidth=16 * G, links=1, topology="switch", domain=8,
         chips_per_host=8, network_bandwidth=1.5625 * G, kinds=("Tesla P4",),
         citations=f"{_NEUSIGHT}; servethehome.com/nvidia-tesla-p4-tesla-p40-launched (int8); network assumed"),
    Chip(name="P100-PCIe-16GB", vendor="NVIDIA", fp32_flops=9.5 * T, bf16_flops=19 * T, hbm_bytes=16 * GIB,
         hbm_bandwidth=732 * G, link="PCIe 3", link_bandwidth=16 * G, links=1, topology="switch", domain=8,
         chips_per_host=8, network_bandwidth=1.5625 * G, kinds=("Tesla P100-PCIE-16GB",), aliases=("P100", "P100-PCIe"),
         citations=f"{_NEUSIGHT} (fp32); fp16 is twice it: 2 a lane (NVIDIA, Pascal); network assumed"),
    Chip(name="V100-PCIe-32GB", vendor="NVIDIA", fp32_flops=14 * T, bf16_flops=112 * T, hbm_bytes=32 * GIB,
         hbm_bandwidth=900 * G, link="PCIe 3", link_bandwidth=16 * G, links=1, topology="switch", domain=8,
         chips_per_host=8, network_bandwidth=1.5625 * G, kinds=("Tesla V100-PCIE-32GB",), aliases=("V100-PCIe",),
         citations=f"{_NEUSIGHT} (fp32); fp16 is eight times it: 64 + 512 a core (NVIDIA, Volta); network assumed"),
    Chip(name="V100-SXM", vendor="NVIDIA", fp32_flops=15.7 * T, bf16_flops=125 * T, hbm_bytes=32 * GIB,
         hbm_bandwidth=900 * G, link="NVLink 2", link_bandwidth=150 * G, links=6, topology="switch", domain=8,
         chips_per_host=8, network_bandwidth=6.25 * G, kinds=("Tesla V100-SXM2-32GB",),
         aliases=("V100", "V100-SXM-32GB"),
         citations=f"cli99/llm-analysis gpu_configs; {_ML}; a cube mesh, as if switched; network of DGX-1"),
    Chip(name="T4", vendor="NVIDIA", fp32_flops=8.1 * T, bf16_flops=65 * T, int8_flops=130 * T, hbm_bytes=15 * GIB,
         hbm_bandwidth=320 * G, link="PCIe 3", link_bandwidth=16 * G, links=1, topology="switch", domain=8,
         chips_per_host=8, network_bandwidth=1.5625 * G, kinds=("Tesla T4",),
         citations=f"{_NEUSIGHT} (15 GiB of 16 are free); hmc-tech.com/gpu (fp16, int8); network assumed"),
    Chip(name="A10G", vendor="NVIDIA", fp32_flops=31.2 * T, tf32_flops=35 * T, bf16_flops=70 * T, int8_flops=140 * T,
         hbm_bytes=24 * GIB, hbm_bandwidth=600 * G, link="PCIe 4", link_bandwidth=32 * G, links=1, topology="switch",
         domain=8, chips_per_host=8, network_bandwidth=1.5625 * G, kinds=("NVIDIA A10G",),
         citations="cli99/llm-analysis gpu_configs; tf32 is half of fp16; fp32 as A10; network assumed"),
    Chip(name="L4", vendor="NVIDIA", fp32_flops=30.3 * T, tf32_flops=60 * T, bf16_flops=121 * T, int8_flops=242 * T,
         fp8_flops=242 * T, hbm_bytes=24 * GIB, hbm_bandwidth=300 * G, link="PCIe 4", link_bandwidth=32 * G, links=1,
         topology="switch", domain=8, chips_per_host=8, network_bandwidth=25 * G, price=0.70, kinds=("NVIDIA L4",),
         citations=f"{_AIC}l4.yaml (its network assumed); tf32 is half of bf16; {_NEUSIGHT}"),
    Chip(name="L40S", vendor="NVIDIA", fp32_flops=91.6 * T, tf32_flops=183 * T, bf16_flops=362 * T, int8_flops=733 * T,
         fp8_flops=733 * T, hbm_bytes=46068 * 2**20, hbm_bandwidth=864 * G, link="PCIe 4", link_bandwidth=32 * G,
         links=1, topology="switch", domain=8, chips_per_host=8, network_bandwidth=25 * G, kinds=("NVIDIA L40S",),
         citations=f"{_AIC}l40s.yaml; {_ML} (fp32, tf32); network assumed, within PCIe 4"),

    Chip(name="A100-PCIe-40GB", vendor="NVIDIA", fp32_flops=19.5 * T, tf32_flops=156 * T, bf16_flops=312 * T,
         int8_flops=624 * T, hbm_bytes=40 * GIB, hbm_bandwidth=1555 * G, link="PCIe 4", link_bandwidth=32 * G, links=1,
         topology="switch", domain=8, chips_per_host=8, network_bandwidth=25 * G, kinds=("NVIDIA A100-PCIE-40GB",),
         citations=f"{_NEUSIGHT}; {_AIC}a100_pcie.yaml (its network assumed)"),
    Chip(name="A100-PCIe-80GB", vendor="NVIDIA", fp32_flops=19.5 * T, tf32_flops=156 * T, bf16_flops=312 * T,
         int8_flops=624 * T, hbm_bytes=80 * GIB, hbm_bandwidth=1935 * G, link="PCIe 4", link_bandwidth=32 * G, links=1,
         topology="switch", domain=8, chips_per_host=8, network_bandwidth=25 * G, kinds=("NVIDIA A100 80GB PCIe",),
         aliases=("A100-PCIe",), citations=f"{_NEUSIGHT}; {_AIC}a100_pcie.yaml (its network assumed)"),
    Chip(name="A100-SXM-40GB", vendor="NVIDIA", fp32_flops=19.5 * T, tf32_flops=156 * T, bf16_flops=312 * T,
         int8_flops=624 * T, hbm_bytes=40 * GIB, hbm_bandwidth=1555 * G, link="NVLink 3", link_bandwidth=300 * G,
         links=12, topology="switch", domain=8, chips_per_host=8, network_bandwidth=25 * G,
         kinds=("NVIDIA A100-SXM4-40GB",), citations=f"{_NEUSIGHT}; {_ML}"),
    Chip(name="A100-SXM-80GB", vendor="NVIDIA", fp32_flops=19.5 * T, tf32_flops=156 * T, bf16_flops=312 * T,
         int8_flops=624 * T, hbm_bytes=80 * GIB, hbm_bandwidth=2039 * G, link="NVLink 3", link_bandwidth=300 * G,
         links=12, topology="switch", domain=8, chips_per_host=8, network_bandwidth=25 * G,
         kinds=("NVIDIA A100-SXM4-80GB",), aliases=("A100", "A100-SXM"), citations=f"{_AIC}a100_sxm.yaml; {_ML}"),
    Chip(name="H100-PCIe-80GB", vendor="NVIDIA", fp32_flops=51 * T, tf32_flops=378 * T, bf16_flops=756 * T,
         int8_flops=1513 * T, fp8_flops=1513 * T, hbm_bytes=80 * GIB, hbm_bandwidth=2000 * G, link="PCIe 5",
         link_bandwidth=64 * G, links=1, topology="switch", domain=8, chips_per_host=8, network_bandwidth=50 * G,
         kinds=("NVIDIA H100 PCIe",), aliases=("H100-PCIe",),
         citations=f"{_AIC}h100_pcie.yaml (its network assumed); {_ML} (fp32, tf32)"),
    Chip(name="H100-SXM-80GB", vendor="NVIDIA", fp32_flops=67 * T, tf32_flops=494.5 * T, bf16_flops=989 * T,
         int8_flops=1979 * T, fp8_flops=1979 * T, hbm_bytes=80 * GIB, hbm_bandwidth=3350 * G, link="NVLink 4",
         link_bandwidth=450 * G, links=18, topology="switch", domain=8, chips_per_host=8, network_bandwidth=50 * G,
         price=3.29, kinds=("NVIDIA H100 80GB HBM3",), aliases=("H100", "H100-SXM"),
         citations=f"{_AIC}h100_sxm.yaml; {_ML}"),
    Chip(name="H200-SXM", vendor="NVIDIA", fp32_flops=67 * T, tf32_flops=494.5 * T, bf16_flops=989 * T,
         int8_flops=1979 * T, fp8_flops=1979 * T, hbm_bytes=141 * GIB, hbm_bandwidth=4800 * G, link="NVLink 4",
         link_bandwidth=450 * G, links=18, topology="switch", domain=8, chips_per_host=8, network_bandwidth=50 * G,
         price=3.85, kinds=("NVIDIA H200",), aliases=("H200", "H200-SXM-141GB"),
         citations=f"{_AIC}h200_sxm.yaml; {_ML}"),
    Chip(name="GH200", vendor="NVIDIA", fp32_flops=67 * T, tf32_flops=494.5 * T, bf16_flops=989 * T,
         int8_flops=1979 * T, fp8_flops=1979 * T, hbm_bytes=96 * GIB, hbm_bandwidth=4000 * G, link="NVLink 4",
         link_bandwidth=450 * G, links=18, topology="switch", domain=32, chips_per_host=1, network_bandwidth=50 * G,
         kinds=("NVIDIA GH200 480GB",), aliases=("GH200 NVL32", "GH200-96GB"),
         citations=f"H100's chip with 96 GB at 4 TB/s; domain: developer.nvidia.com/blog (GH200 NVL32); {_ML} (links)"),
    Chip(name="B200-SXM", vendor="NVIDIA", fp32_flops=75 * T, tf32_flops=1125 * T, bf16_flops=2250 * T,
         int8_flops=4500 * T, fp8_flops=4500 * T, fp4_flops=9000 * T, hbm_bytes=180 * GIB, hbm_bandwidth=7700 * G,
         link="NVLink 5", link_bandwidth=900 * G, links=18, topology="switch", domain=8, chips_per_host=8,
         network_bandwidth=50 * G, price=6.95, kinds=("NVIDIA B200",), aliases=("B200",),
         citations=f"{_AIC}b200_sxm.yaml (it has 100 GB/s of network); {_BLACKWELL}; "
                   "network of DGX B200 (8 x 400 Gbit/s): docs.nvidia.com/dgx-basepod"),
    Chip(name="B300-SXM", vendor="NVIDIA", fp32_flops=75 * T, tf32_flops=1125 * T, bf16_flops=2250 * T,
         int8_flops=153.5 * T, fp8_flops=4500 * T, fp4_flops=14000 * T, hbm_bytes=275040 * 2**20,
         hbm_bandwidth=7750 * G, link="NVLink 5", link_bandwidth=900 * G, links=18, topology="switch", domain=8,
         chips_per_host=8, network_bandwidth=100 * G, kinds=("NVIDIA B300 SXM6 AC",), aliases=("B300",),
         citations=f"{_AIC}b300_sxm.yaml; {_BLACKWELL}"),
    Chip(name="GB200", vendor="NVIDIA", fp32_flops=80 * T, tf32_flops=1250 * T, bf16_flops=2500 * T,
         int8_flops=5000 * T, fp8_flops=5000 * T, fp4_flops=10000 * T, hbm_bytes=189471 * 2**20,
         hbm_bandwidth=8000 * G, link="NVLink 5", link_bandwidth=900 * G, links=18, topology="switch", domain=72,
         chips_per_host=4, network_bandwidth=50 * G, kinds=("NVIDIA GB200",), aliases=("GB200 NVL72",),
         citations=f"{_AIC}gb200.yaml (it has 100 GB/s of network); {_ML} (tf32); {_BLACKWELL}; "
                   "network of DGX GB200 (ConnectX-7, 400 Gbit/s)"),
    Chip(name="GB300", vendor="NVIDIA", fp32_flops=80 * T, tf32_flops=1250 * T, bf16_flops=2500 * T,
         int8_flops=165 * T, fp8_flops=5000 * T, fp4_flops=15000 * T, hbm_bytes=284208 * 2**20,
         hbm_bandwidth=8000 * G, link="NVLink 5", link_bandwidth=900 * G, links=18, topology="switch", domain=72,
         chips_per_host=4, network_bandwidth=100 * G, kinds=("NVIDIA GB300",), aliases=("GB300 NVL72",),
         citations=f"{_AIC}gb300.yaml; {_BLACKWELL}"),

    Chip(name="MI100", vendor="AMD", fp32_flops=46.1 * T, bf16_flops=92.3 * T, int8_flops=184.6 * T,
         hbm_bytes=32 * GIB, hbm_bandwidth=1230 * G, link="xGMI", link_bandwidth=3 * 46 * G, links=3, topology="full",
         domain=4, chips_per_host=8, network_bandwidth=12.5 * G, kinds=("AMD Instinct MI100",),
         citations=f"{_NEUSIGHT}; {_MI200}; rocm.docs.amd.com gpu-arch/mi100 (links; fp16 is 184.6); network assumed"),
    Chip(name="MI210", vendor="AMD", fp32_flops=45.3 * T, bf16_flops=181 * T, int8_flops=181 * T, hbm_bytes=64 * GIB,
         hbm_bandwidth=1640 * G, link="xGMI", link_bandwidth=3 * 50 * G, links=3, topology="full", domain=4,
         chips_per_host=8, network_bandwidth=12.5 * G, kinds=("AMD Instinct MI210",),
         citations=f"{_NEUSIGHT}; {_MI200}; rocm.docs.amd.com gpu-arch/mi250 (links); network assumed"),
    Chip(name="MI250 (one GCD)", vendor="AMD", fp32_flops=45.3 * T, bf16_flops=181 * T, int8_flops=181 * T,
         hbm_bytes=64 * GIB, hbm_bandwidth=1640 * G, link="xGMI", link_bandwidth=7 * 50 * G, links=7, topology="full",
         domain=8, chips_per_host=8, network_bandwidth=12.5 * G, kinds=("AMD Instinct MI250",), aliases=("MI250",),
         citations=f"{_NEUSIGHT}: half of an MI250, which is two devices; {_MI200}; {_ML} (links); network assumed"),
    Chip(name="MI300X", vendor="AMD", fp32_flops=163.4 * T, tf32_flops=653.7 * T, bf16_flops=1307 * T,
         int8_flops=2610 * T, fp8_flops=2610 * T, hbm_bytes=192 * GIB, hbm_bandwidth=5300 * G, link="xGMI",
         link_bandwidth=7 * 64 * G, links=7, topology="full", domain=8, chips_per_host=8, network_bandwidth=50 * G,
         price=3.50, kinds=("AMD Instinct MI300X",), citations=f"{_ML}"),
)
# fmt: on


def find(name: str) -> Chip:
    """The chip of that name, however it is spelled; ValueError with the nearest names where there is none."""
    chip = _NAMES.get(_plain(name))
    if chip is None:
        near = difflib.get_close_matches(_plain(name), _NAMES, n=4, cutoff=0.5)
        names = ", ".join(dict.fromkeys(_NAMES[key].name for key in near or _NAMES))
        raise ValueError(f"there is no chip {name}; {'the nearest are' if near else 'known are'} {names}")
    return chip


def _plain(name: str) -> str:
    """Letters and digits alone, without the maker: "NVIDIA H100-SXM" -> "h100sxm", "TPU v5e" -> "v5e"."""
    bare = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(google|cloud|nvidia|amd|tesla|instinct|tpu)+(?=.)", "", bare)


_NAMES = {_plain(name): chip for chip in CHIPS for name in (chip.name, *chip.aliases, *chip.kinds)}
