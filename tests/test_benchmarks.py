"""Every published figure says where it was measured."""

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*.json"))


def test_there_are_results():
    assert FILES, f"no figures in {RESULTS}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_environment_and_figures(path):
    data = json.loads(path.read_text())
    where = data["environment"]
    for key in ("commit", "cpu", "torch", "device"):
        assert isinstance(where[key], str) and where[key], key
    assert isinstance(where["threads"], int) and where["threads"] > 0
    assert not where["commit"].endswith("-dirty")
    assert data["results"]
    for result in data["results"]:
        assert result.pop("case")
        assert result
        for figures in result.values():
            assert 0 < figures["q1"] <= figures["median"] <= figures["q3"]
