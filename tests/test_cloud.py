import numpy as np
import pytest

from reid3d.cloud import PointCloud


def arrays(n=4):
    return {"xyz": np.zeros((n, 3), np.float32), "rgb": np.zeros((n, 3), np.uint8), "vertex": np.full(n, -1, np.int32)}


def test_length_is_the_number_of_points():
    assert len(PointCloud(**arrays(4))) == 4
    assert len(PointCloud(**arrays(0))) == 0


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("xyz", [[0.0, 0.0, 0.0]] * 4, TypeError, "xyz must be a NumPy array, got list"),
        ("xyz", np.zeros((4, 3)), TypeError, "xyz must be float32, got float64"),
        ("xyz", np.zeros((4, 2), np.float32), ValueError, r"xyz must have shape \(4, 3\), got \(4, 2\)"),
        ("xyz", np.float32(0), TypeError, "xyz must be a NumPy array"),
        ("rgb", np.zeros((4, 3), np.float32), TypeError, "rgb must be uint8, got float32"),
        ("rgb", np.zeros((3, 3), np.uint8), ValueError, r"rgb must have shape \(4, 3\), got \(3, 3\)"),
        ("vertex", np.zeros(4, np.int64), TypeError, "vertex must be int32, got int64"),
        ("vertex", np.zeros((4, 1), np.int32), ValueError, r"vertex must have shape \(4,\), got \(4, 1\)"),
        ("vertex", np.array([0, -1, -2, 5], np.int32), ValueError, r"vertex must be .* or -1 .*, got -2"),
    ],
)
def test_wrong_kinds_and_shapes_are_refused(name, value, error, words):
    with pytest.raises(error, match=words):
        PointCloud(**{**arrays(), name: value})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_coordinates_must_be_finite(bad):
    values = arrays()
    values["xyz"][2, 1] = bad
    with pytest.raises(ValueError, match=f"xyz must be finite, got {bad}"):
        PointCloud(**values)
