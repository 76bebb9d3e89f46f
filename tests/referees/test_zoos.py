"""The table of architectures measures models of torchvision and timm where these are installed."""

import sys
import types

import pytest
import torch
from torch import nn

from experiments.benchmarks import architectures, zoos


def toy(**settings):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))


@pytest.fixture
def asked(monkeypatch):
    """What stand-ins with the libraries' own signatures are asked for."""
    asked = []

    def create_model(model_name, pretrained=False, pretrained_cfg=None, **settings):
        asked.append((model_name, {"pretrained": pretrained}))
        return toy()

    def get_model(name, **config):
        asked.append((name, config))
        return toy()

    timm, timm_models = types.ModuleType("timm"), types.ModuleType("timm.models")
    timm.create_model, timm.models = create_model, timm_models
    timm_models.get_pretrained_cfg = lambda name: types.SimpleNamespace(input_size=(3, 9, 10))
    torchvision, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    torchvision.models, models.get_model = models, get_model
    for module in (timm, timm_models, torchvision, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["architectures", *arguments])
    architectures.main()


@pytest.mark.filterwarnings("ignore")
def test_a_zoo_has_a_section_of_its_own_with_its_version(asked, monkeypatch):
    written = []
    monkeypatch.setattr(architectures, "write_section", lambda *cells, **options: written.append((cells, options)))
    monkeypatch.setattr(zoos, "TIMM", ("resnet18", "dla34"))
    run(monkeypatch, "--zoo", "timm")
    (((section, title, command, columns, rows, notes), options),) = written
    assert (section, title, command) == (
        "architectures-timm",
        "Growing timm's models",
        "python -m experiments.benchmarks.architectures --zoo timm",
    )
    assert options == {"packages": ("timm",)}
    cells = dict(zip(columns, rows[0], strict=True))
    assert [row[0] for row in rows] == ["resnet18", "dla34"]
    assert (cells["convs"], cells["proved"], cells["not growable"]) == ("2", "1", "1: the model's output")
    assert notes[0].startswith("2 architectures, 4 convolutions, 2 proved growable (50.0%). ")


def test_no_weights_are_asked_for(asked):
    for build, _ in (*zoos.torchvision().values(), *zoos.timm().values()):
        build()
    assert len(asked) == len({name for name, _ in asked[: len(zoos.torchvision())]}) + len(set(zoos.TIMM))
    assert all(not value for _, settings in asked for value in settings.values())
    assert all(settings.keys() & {"weights", "pretrained"} for _, settings in asked)
    assert all("weights_backbone" in dict(asked)[name] for name in zoos.SEGMENTERS)


def test_every_model_gets_images_of_the_size_that_it_asks_for(asked):
    assert {shape for _, shape in zoos.timm().values()} == {(1, 3, 9, 10)}
    assert zoos.torchvision()["inception_v3"][1] == (1, 3, 299, 299)
    assert zoos.torchvision()["resnet18"][1] == (1, 3, 224, 224)


@pytest.mark.parametrize("zoo", zoos.ZOOS)
def test_a_zoo_that_is_missing_says_what_to_install(zoo, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == zoo] or [zoo]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=f"needs {zoo} .*pip install torch torchvision"):
        run(monkeypatch, "--zoo", zoo)


@pytest.mark.filterwarnings("ignore")
def test_timm_has_the_models_and_one_of_them_grows(monkeypatch, capsys):
    timm = pytest.importorskip(
        "timm", reason="timm needs torchvision, which does not import beside CI's build of torch"
    )
    assert set(zoos.TIMM) <= set(timm.list_models())
    monkeypatch.setattr(zoos, "TIMM", ("resnet18",))
    run(monkeypatch, "--zoo", "timm", "--print")
    assert "20 convolutions, 20 proved growable" in capsys.readouterr().out


def test_torchvision_has_the_models():
    why = "torchvision does not import beside CI's build of torch"
    library = pytest.importorskip("torchvision.models", reason=why, exc_type=ImportError)
    assert {*zoos.CLASSIFIERS, *zoos.SEGMENTERS} <= set(library.list_models())
