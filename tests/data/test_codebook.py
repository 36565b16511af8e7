import numpy as np
import pytest

from data import codebook

DRAW = np.random.default_rng(1)
CORNERS = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
CLOUDS = np.concatenate([corner + DRAW.normal(0, 0.5, (50, 2)) for corner in CORNERS])


def spread(vectors, centres) -> float:
    """Squared distance to the nearest centre, summed."""
    return float(np.square(vectors - centres[codebook.nearest(vectors, centres)]).sum())


def test_clouds_are_found():
    centres = codebook.fit(CLOUDS, size=4)
    codes = codebook.nearest(CLOUDS, centres).reshape(4, 50)
    assert (codes == codes[:, :1]).all()
    assert sorted(codes[:, 0]) == [0, 1, 2, 3]
    np.testing.assert_allclose(centres[codes[:, 0]], CLOUDS.reshape(4, 50, 2).mean(axis=1))


def test_the_same_vectors_give_the_same_codebook():
    assert (codebook.fit(CLOUDS, size=7) == codebook.fit(CLOUDS.copy(), size=7)).all()


def test_nearest_is_nearest(monkeypatch):
    monkeypatch.setattr(codebook, "AT_ONCE", 7)
    vectors, centres = DRAW.normal(size=(30, 3)), DRAW.normal(size=(5, 3))
    slow = [int(np.square(vector - centres).sum(axis=1).argmin()) for vector in vectors]
    assert codebook.nearest(vectors, centres).tolist() == slow
    assert codebook.nearest(vectors[:0], centres).tolist() == []


def test_vectors_may_be_alike():
    centres = codebook.fit(np.ones((5, 2)), size=3)
    assert (centres == 1).all()


def test_too_few_vectors_are_refused():
    with pytest.raises(ValueError, match="a codebook of 4 codes needs as many vectors, not 3; give more data"):
        codebook.fit(CLOUDS[:3], size=4)


def test_it_is_as_good_as_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    vectors = DRAW.normal(size=(600, 4))
    theirs = cluster.KMeans(16, random_state=0, n_init=1).fit(vectors).inertia_
    assert spread(vectors, codebook.fit(vectors, size=16)) < 1.05 * theirs
