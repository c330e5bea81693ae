"""The colors of figures with another eye and in print, and the size of a figure."""

import itertools
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from prefopt.reporting.figures import draw
from prefopt.reporting.style import COLORS, METHODS, method_color, method_marker
from prefopt.tracking.archive import read_records
from prefopt.utils.files import ROOT

# Machado, Oliveira and Fernandes (2009), deuteranomaly of severity 1, on linear RGB.
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(color: str, seen_by: np.ndarray) -> np.ndarray:
    """CIELAB of a color (white is D65) as an eye sees it."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = TO_XYZ @ np.clip(seen_by @ linear, 0, 1) / np.array([0.9505, 1.0, 1.089])
    fx, fy, fz = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize(
    ("eye", "parts", "least"),
    [(np.eye(3), slice(3), 30), (DEUTERANOPIA, slice(3), 20), (np.eye(3), slice(1), 7)],
    ids=["normal", "deuteranopia", "gray"],
)
def test_colors_are_told_apart(eye, parts, least):
    """Distances in CIELAB, of which about 2.3 are just noticed; in gray, of the lightness L alone. White is paper."""
    seen = {color: lab(color, eye)[parts] for color in (*COLORS, "#FFFFFF")}
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) >= least, (a, b)


def test_methods_are_told_apart_without_color_too():
    assert len({method_marker(method) for method in METHODS[: len(COLORS)]}) == len(COLORS)
    assert method_marker("mappo_dpo", 1) != method_marker("dpo", 0) == method_marker("online-dpo β=0.1", 0)


def test_a_method_looks_the_same_in_every_figure():
    """Whatever else is drawn: the color, and the marker of a method's first line, follow from its name alone."""
    shipped = {file.stem for file in (ROOT / "conf" / "objective").glob("*.yaml")} - {"mappo"}
    assert shipped == set(METHODS)
    looks = {(method_color(method), method_marker(method)) for method in shipped}
    assert len(looks) == len(shipped)
    assert {method_color(method) for method in METHODS[: len(COLORS)]} == set(COLORS)
    for other in ("dpo optimizer.lr=1e-05", "mappo_dpo", "online-dpo", "online-mappo_dpo β=2"):
        assert method_color(other) == method_color("dpo") != method_color("mmpo")
    assert (method_color("mine β=0.1"), method_marker("mine")) == ("#F5C440", "v")  # of a digest of its name


@pytest.mark.parametrize("folder", ["mini/mmpo", "mini/mappo", "lab/objectives", "lab/madpo/methods"])
def test_a_figure_is_as_wide_as_a_column_or_a_page_and_its_text_is_seven_points(folder, tmp_path):
    found = read_records(ROOT / "results" / folder / "records.jsonl")
    svg = next(file for file in draw(found, tmp_path) if file.suffix == ".svg").read_text()
    width = float(re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)[1]) / 72
    assert width == pytest.approx(3.3) or width == pytest.approx(6.8)
    # Texts are outlines, drawn at 100 units an em or with a scale: their size over 100.
    sizes = [100 * float(scale) for scale in re.findall(r"scale\(([\d.]+) -", svg)]
    assert sizes
    assert min(sizes) >= 7
    for name in {record["objective"] for record in found}:
        assert f"<!-- {name}" in svg
    assert f"standard error over {'64 held-out prompts' if folder.startswith('mini') else 'training seeds'}" in svg
