"""The path of each statistic, and images of several sizes."""

import torch.nn.functional as F

from growconv.statistics import StatisticsCollector
from tests.statistics.test_collector import X, Y, assert_same, network, site_of


def test_the_forced_path_and_its_reason_can_be_seen():
    model = network()
    for path in ("dense", "unfold", "offset"):
        collector = StatisticsCollector(model, site_of(model), path=path)
        assert "no batch" in collector.explain()
        with collector:
            F.cross_entropy(model(X), Y).backward()
        assert f"by {path} (as asked)" in collector.explain()
    collector = StatisticsCollector(model, site_of(model))
    with collector:
        F.cross_entropy(model(X), Y).backward()
    assert "multiply-adds" in collector.explain()


def test_images_of_several_sizes():
    model = network().double()
    site = site_of(model)
    images = [X.double(), X.double()[..., :6, :], X.double()]
    results = {}
    for path in ("dense", "auto", "unfold"):
        with StatisticsCollector(model, site, path=path, full=True) as collector:
            for image in images:
                F.cross_entropy(model(image), Y).backward()
        results[path] = collector.statistics[site.name]
    for path in ("auto", "unfold"):
        assert_same(results[path], results["dense"], 1e-12)
