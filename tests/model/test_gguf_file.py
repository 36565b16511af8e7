"""The GGUF container: every quantisation type, metadata of every kind, and files that end too early."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from model import gguf_file


def write(path, tensors=(), values=(), align=32):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(align)
    for key, value in values:
        writer.add_key_value(key, *value)
    for name, raw, kind in tensors:
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("F32", 0),
        ("F16", 2e-3),
        ("BF16", 2e-2),
        ("Q8_0", 0.02),
        ("Q5_1", 0.15),
        ("Q5_0", 0.2),
        ("Q4_1", 0.3),
        ("Q4_0", 0.4),
    ],
)
@pytest.mark.parametrize("shape", [(3, 64), (7, 5, 32), (96, 576)])
def test_types_that_the_package_quantises(kind, error, shape, tmp_path):
    """What is read is what the package makes of the blocks, row by row, and near what was stored."""
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    raw = gguf.quantize(values, Kind[kind])
    file = gguf_file.open_file(write(tmp_path / "m.gguf", [("w", raw, Kind[kind])]))
    found = file.read("w")
    assert (found.shape, found.dtype) == (shape, np.float32)
    assert np.array_equal(found, gguf.dequantize(raw, Kind[kind]).reshape(shape))
    assert np.abs(found - values).max() <= error


class Bytes(np.ndarray):
    """Bytes whose single items are Python's whole numbers, so that shifts don't wrap; slices stay bytes."""

    def __getitem__(self, key):
        item = super().__getitem__(key)
        return int(item) if isinstance(key, int) else item


def half(raw):
    return float(np.asarray(raw).view(np.float16)[0])


def scale_min(q, j):
    """ggml-quants.c, get_scale_min_k4: the j-th of eight 6-bit scales and minima."""
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | ((q[j - 4] >> 6) << 4), (q[j + 4] >> 4) | ((q[j] >> 6) << 4)


def q2_k(b):
    scales, qs, d, low = b[:16], b[16:80], half(b[80:82]), half(b[82:84])
    out = []
    for i in range(256):
        scale = scales[i // 16]
        bits = qs[32 * (i // 128) + i % 32] >> (2 * (i // 32 % 4))
        out.append(d * (scale & 15) * (bits & 3) - low * (scale >> 4))
    return out


def q3_k(b):
    high, qs, packed, d = b[:32], b[32:96], b[96:108], half(b[108:110])
    out = []
    for i in range(256):
        j = i // 16
        scale = (packed[j] & 15 if j < 8 else packed[j - 8] >> 4) | ((packed[8 + j % 4] >> (2 * (j // 4)) & 3) << 4)
        bits = qs[32 * (i // 128) + i % 32] >> (2 * (i // 32 % 4)) & 3
        out.append(d * (scale - 32) * (bits - (0 if high[i % 32] >> (i // 32) & 1 else 4)))
    return out


def q4_k(b):
    d, low, qs = half(b[:2]), half(b[2:4]), b[16:]
    out = []
    for i in range(256):
        scale, least = scale_min(b[4:16], i // 32)
        bits = qs[32 * (i // 64) + i % 32] >> (4 * (i // 32 % 2)) & 15
        out.append(d * scale * bits - low * least)
    return out


def q5_k(b):
    d, low, high, qs = half(b[:2]), half(b[2:4]), b[16:48], b[48:]
    out = []
    for i in range(256):
        scale, least = scale_min(b[4:16], i // 32)
        bits = qs[32 * (i // 64) + i % 32] >> (4 * (i // 32 % 2)) & 15
        out.append(d * scale * (bits + 16 * (high[i % 32] >> (i // 32) & 1)) - low * least)
    return out


def q6_k(b):
    qs, high, scales, d = b[:128], b[128:192], b[192:208].view(np.int8), half(b[208:210])
    out = []
    for i in range(256):
        half_block, quarter, l = i // 128, i // 32 % 4, i % 32
        bits = qs[64 * half_block + 32 * (quarter % 2) + l] >> (4 * (quarter // 2)) & 15
        bits |= (high[32 * half_block + l] >> (2 * quarter) & 3) << 4
        out.append(d * int(scales[i // 16]) * (bits - 32))
    return out


@pytest.mark.parametrize(
    ("slow", "size", "halves"),
    [(q2_k, 84, (80, 82)), (q3_k, 110, (108,)), (q4_k, 144, (0, 2)), (q5_k, 176, (0, 2)), (q6_k, 210, (208,))],
)
def test_k_types_from_blocks_made_by_hand(slow, size, halves, tmp_path):
    """Random bits, with scales that are finite, against the formula of ggml-quants.c one number at a time."""
    random = np.random.default_rng(1)
    blocks = random.integers(0, 256, (6, size)).astype(np.uint8)
    for at in halves:
        blocks[:, at : at + 2] = random.uniform(0.1, 1, (6, 1)).astype(np.float16).view(np.uint8)
    kind = Kind[slow.__name__.upper()]
    file = gguf_file.open_file(write(tmp_path / "m.gguf", [("w", blocks.reshape(3, -1), kind)]))
    expected = [slow(block.view(Bytes)) for block in blocks]
    np.testing.assert_allclose(file.read("w"), np.reshape(expected, (3, 512)), rtol=1e-5, atol=1e-4)


def test_metadata_of_every_kind(tmp_path):
    V = gguf.GGUFValueType
    values = [
        ("a.text", ("naïve ▁ 🙂", V.STRING)),
        ("a.whole", (7, V.UINT32)),
        ("a.below", (-7, V.INT64)),
        ("a.real", (0.5, V.FLOAT32)),
        ("a.wide", (0.1, V.FLOAT64)),
        ("a.yes", (True, V.BOOL)),
        ("a.reals", ([0.5, 1.5], V.ARRAY, V.FLOAT32)),
        ("a.words", (["", "▁a", "<0x0A>"], V.ARRAY, V.STRING)),
    ]
    found = gguf_file.open_file(write(tmp_path / "m.gguf", values=values)).metadata
    assert {key: found[key] for key, _ in values} == {key: value[0] for key, value in values}
    assert found["general.architecture"] == "llama"


def test_the_package_reads_the_same(tmp_path):
    """Our header parser against the package's slow one."""
    tensors = [(f"t{i}", np.full((i + 1, 32), i, np.float32), None) for i in range(4)]
    path = write(tmp_path / "m.gguf", tensors, align=64)
    ours, theirs = gguf_file.open_file(path), gguf.GGUFReader(path)
    for tensor in theirs.tensors:
        block = ours.blocks[tensor.name]
        assert (block.start, block.size, block.shape) == (tensor.data_offset, tensor.n_bytes, tensor.data.shape)
        assert np.array_equal(ours.read(tensor.name), tensor.data)


def test_files_that_end_too_early_are_named(tmp_path):
    words = (["word"] * 50, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)
    path = write(tmp_path / "m.gguf", [("w", np.ones((8, 32), np.float32), None)], [("a.words", words)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=rf"has {len(whole) - 1} bytes but its tensors end at byte {len(whole)}; it is"
    ):
        gguf_file.open_file(path)
    for kept in (8, 20, 100, 300):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=rf"ends inside its header at {kept} bytes; it is truncated"):
            gguf_file.open_file(path)
    for text in (b"", b"PK\x03\x04 no model"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"is no GGUF file: it starts with"):
            gguf_file.open_file(path)
    with pytest.raises(FileNotFoundError):
        gguf_file.open_file(tmp_path / "nowhere.gguf")


def test_a_damaged_alignment_is_named(tmp_path):
    path = write(tmp_path / "m.gguf", [("w", np.ones((8, 32), np.float32), None)])
    whole = bytearray(path.read_bytes())
    at = whole.index(b"general.alignment") + len(b"general.alignment") + 4
    whole[at : at + 4] = bytes(4)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"general.alignment=0 must be at least 1"):
        gguf_file.open_file(path)


def test_versions_and_types_of_the_future_are_named(tmp_path):
    path = write(tmp_path / "m.gguf", [("w", np.ones((8, 32), np.float32), None)])
    whole = bytearray(path.read_bytes())
    whole[4] = 9
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"GGUF version 9 is not supported; versions 2 and 3 are"):
        gguf_file.open_file(path)
    whole[4] = 3
    at = whole.index(b"w" + (2).to_bytes(4, "little")) + 1 + 4 + 16
    whole[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"tensor w has quantisation type 99, which gguf [\d.]+ does not know"):
        gguf_file.open_file(path)
