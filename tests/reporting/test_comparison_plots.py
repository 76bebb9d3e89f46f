"""Colours and markers of a comparison."""

from growconv.reporting.comparison import compare
from growconv.reporting.comparison_plots import group_styles


def test_every_group_has_a_colour_and_marker_of_its_own_the_same_in_every_comparison(make_run, tmp_path):
    methods = ("tiny", "exact", "functional", "gradmax", "firefly", "north", "senn", "splitting", "net2net")
    for method in (*methods, "variance_transfer", "random", "none", "my.Method", "my.Other"):
        make_run(f"runs/{method}", method=method, growth=False)
    make_run("runs/tiny_fast", growth__amount=0.5)
    styles = group_styles(compare([tmp_path / "runs"]))
    assert len(set(styles.values())) == len(styles) == 15
    few = group_styles(compare([tmp_path / "runs" / "gradmax", tmp_path / "runs" / "firefly"]))
    assert few == {label: styles[label] for label in ("gradmax", "firefly")}
