"""Figures of a run."""

from xml.etree import ElementTree

from growconv.reporting import report


def test_figures_alone_follow_light_and_dark_pages(make_run, tmp_path):
    paths = report.write_figures(report.read_run(make_run("run")), tmp_path / "figures")
    assert "widths.svg" in [path.name for path in paths]
    for path in paths:
        assert "prefers-color-scheme:dark" in path.read_text()
        ElementTree.parse(path)
