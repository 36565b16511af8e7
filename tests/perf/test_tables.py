"""Reports as text: columns line up, alike collectives stand in one line, the most first."""

import dataclasses

from perf import tables
from perf.hlo import Collective

GATHER = Collective(
    kind="all-gather", axis="fsdp", count=32, operand_bytes=2**20, result_bytes=2**24, group=16, is_overlapped=True,
    network="ici", shape="bf16[1,4096,1024]", source="model/decoder.py:139", operation="jit(f)/while/body/all_gather",
)  # fmt: skip
REDUCE = Collective(
    kind="all-reduce", axis="data", count=1, operand_bytes=2**26, result_bytes=2**26, group=2, is_overlapped=False,
    network="dcn", shape="f32[64,8]", source="training/step.py:129", operation="jit(step)/psum",
)  # fmt: skip


ALIKE = """\
  kind        axis        times  MiB sent  operand MiB  result MiB              result             source                from
  all-reduce  data (dcn)      1     64.00        64.00       64.00              f32[64,8]          training/step.py:129  psum
  all-gather  fsdp           64     30.00         2.00       32.00  overlapped  bf16[1,4096,1024]  model/decoder.py:139  all_gather
"""  # noqa: E501


def test_alike_collectives_are_one_line_the_most_first():
    assert list(tables.collective_lines([GATHER, REDUCE, GATHER])) == ALIKE.splitlines()


def test_another_line_of_source_is_another_line():
    other = dataclasses.replace(GATHER, source="model/layers.py:1")
    assert len(list(tables.collective_lines([GATHER, other]))) == 3


def test_bytes_are_written_in_the_unit_that_shows_them():
    assert tables.gib(2**20) == "1.00 MiB"
    assert tables.gib(3 * 2**30) == "3.00 GiB"
    assert tables.short("jit(f)/while/body/ffn/dot", 60) == "ffn/dot"
    assert tables.short("0123456789", 4) == "…789"
