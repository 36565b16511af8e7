import sys

import numpy as np
import pytest

from data import images, sources
from data.config import DataConfig, SourceConfig
from data.quality import Repeats
from data.survey import Fate, survey

DIGITS = SourceConfig(path="digits")
RAMP = np.arange(64, dtype=np.float64).reshape(1, 8, 8)


def test_patches_are_squares_row_by_row():
    cut = images.patches(RAMP)
    assert cut.shape == (1, 16, 4)
    assert cut[0, 0].tolist() == [0, 1, 8, 9]
    assert cut[0, 1].tolist() == [2, 3, 10, 11]
    assert cut[0, 4].tolist() == [16, 17, 24, 25]


def test_a_variant_is_near_its_picture(monkeypatch):
    spot = np.zeros((50, 8, 8))
    spot[:, 2:6, 2:6] = 16.0
    varied = images.varied(spot, np.random.default_rng(0))
    assert varied.shape == spot.shape
    assert (varied.min(), varied.max()) == (0, 16)
    assert 0 < np.square(varied - spot).mean() < np.square(spot).mean() / 2
    for still in ("TURN", "SHIFT", "NOISE"):
        monkeypatch.setattr(images, still, 0.0)
    np.testing.assert_allclose(images.varied(spot, np.random.default_rng(0)), spot)


def test_pictures_are_kept_apart():
    pytest.importorskip("sklearn")
    train, apart = images.load()
    assert (len(train.pixels), len(apart.pixels)) == (1198, 599)
    assert set(train.labels.tolist()) == set(apart.labels.tolist()) == set(range(10))
    assert not {row.tobytes() for row in train.pixels} & {row.tobytes() for row in apart.pixels}


def test_codes_stand_for_the_picture():
    pytest.importorskip("sklearn")
    _, apart = images.load()
    codes = images.codes(apart.pixels)
    assert codes.shape == (599, 16)
    again = np.stack([images.picture(row.tolist()) for row in codes])
    assert np.sqrt(np.square(again - apart.pixels).mean()) < 2  # of 16 levels
    assert (images.codes(again) == codes).all()


@pytest.mark.parametrize(
    ("codes", "message"),
    [([0] * 15, "15 codes are no picture: it has 4 x 4 = 16"), ([0] * 15 + [999], "codes 0 to 999 are not all in the")],
)
def test_what_is_no_picture_is_refused(codes, message):
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=message):
        images.picture(codes)


def test_documents_are_both_ways_round():
    pytest.importorskip("sklearn")
    documents = list(sources.read_documents(DIGITS))
    assert len(documents) == 1198 * (1 + images.VARIANTS) * 2
    first, second = documents[0].text.split(), documents[1].text.split()
    assert (first[0], first[17], len(first)) == ("image", "class", 19)
    assert second == ["class", first[18], *first[:17]]
    assert documents[0].origin == documents[1].origin == "digits:0"
    assert sources.total_bytes(DIGITS) is None
    assert sources.stat_fingerprint(DIGITS) != sources.stat_fingerprint(SourceConfig(path="speech:vowels"))


def test_no_picture_both_trains_and_is_held_out():
    pytest.importorskip("sklearn")
    config = DataConfig(path="digits", tokenizer="words")
    found = survey(DIGITS, config, Repeats(config.dedup, threshold=config.near_threshold))
    origins = {fate: set() for fate in Fate}
    for fate, document in zip(found.fates, sources.read_documents(DIGITS), strict=True):
        origins[Fate(fate)].add(document.origin)
    assert not origins[Fate.TRAIN] & origins[Fate.VALID]
    assert 30 < len(origins[Fate.VALID]) < 90


def test_a_missing_library_is_named_with_its_group(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    images.load.cache_clear()
    with pytest.raises(
        ValueError, match=r"needs scikit-learn, which is not installed; .* `uv sync --group modalities`"
    ):
        next(sources.read_documents(DIGITS))
