"""Models of other libraries by name, from the command line, and weights from a file."""

import builtins
import os
import sys
import types

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import growconv
from growconv.cli import main
from growconv.errors import CheckpointError, ConfigError
from growconv.training import libraries

QUICK = ["trainer.epochs=1", "growth.samples=32", "growth.batch_size=16", "growth.times=1", "report=false"]
QUICK += ["trainer.progress=lines", "trainer.batch_size=16"]
TINY = {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8}


@pytest.fixture
def images(tmp_path):
    """Ten classes of random colour pictures."""
    torch.manual_seed(0)
    for split, count in (("train", 20), ("test", 10)):
        for number in range(count):
            folder = tmp_path / "images" / split / f"class{number % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return ["data=images", f"data.root={tmp_path / 'images'}", "data.validation=0.25"]


def test_a_library_built_for_another_torch_is_refused(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(libraries, "import_module", broken)
    with pytest.raises(ConfigError, match="this needs torchvision") as found:
        libraries.torchvision("resnet18", 3, 10, {})
    assert "nms does not exist" in str(found.value)


def test_a_model_of_pytorchcv(images, tmp_path, capsys):
    pytest.importorskip("pytorchcv")
    run = tmp_path / "run"
    command = ["model=pytorchcv", "model.name=resnet20_cifar10", "growth=none", *images, *QUICK]
    assert main([*command, f"hydra.run.dir={run}"]) == 0, capsys.readouterr().err
    model = growconv.load_run(run)
    assert type(model).__module__.startswith("pytorchcv.")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_model_of_transformers_grows(tmp_path, capsys):
    pytest.importorskip("transformers")
    run = tmp_path / "run"
    options = [f"+model.options.{key}={value}".replace(" ", "") for key, value in TINY.items()]
    command = ["model=transformers", "model.name=resnet", *options, "data.limit=64", "growth=random", *QUICK]
    assert main([*command, f"hydra.run.dir={run}"]) == 0, capsys.readouterr().err
    grown = growconv.load_run(run)
    begun = libraries.transformers("resnet", 1, 10, 8, TINY)
    assert grown(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert sum(each.numel() for each in grown.parameters()) > sum(each.numel() for each in begun.parameters())


@pytest.mark.parametrize(
    ("library", "name", "words"),
    [
        ("transformers", "resnt", "did you mean resnet?"),
        ("pytorchcv", "resnet20_cifa10", "did you mean resnet20_cifar10?"),
        ("transformers", "resnet", "cannot build"),
        ("timm", "resnet18", "pip install timm"),
        ("torchvision", "resnet18", "pip install 'growconv[vision]'"),
    ],
)
def test_what_is_not_there_is_one_message(library, name, words, tmp_path, monkeypatch, capsys):
    if library in ("timm", "torchvision"):
        found = builtins.__import__

        def missing(module, *arguments, **options):
            if module.partition(".")[0] == library:
                raise ImportError(f"No module named {library!r}")
            return found(module, *arguments, **options)

        monkeypatch.setattr(libraries, "import_module", missing)
    else:
        pytest.importorskip(library)
    wrong = ["+model.options.layer_type=odd"] if name == "resnet" else []
    monkeypatch.chdir(tmp_path)
    assert main([f"model={library}", f"model.name={name}", *wrong, "data.limit=64", *QUICK]) == 1
    assert words in capsys.readouterr().err
    assert not os.listdir(tmp_path)


class Net(nn.Module):
    """A convolution and a classifier."""

    def __init__(self, classes=10, width=4):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x):
        return self.classifier(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_from_a_file(suffix, tmp_path):
    """All of them where the classes are the same; else all but the classifier, which is named."""
    file, source = tmp_path / f"weights{suffix}", Net()
    save_file(source.state_dict(), file) if suffix == ".safetensors" else torch.save(
        {"state_dict": source.state_dict()}, file
    )
    same, other = Net(), Net(classes=3)
    drawn = other.classifier.weight.detach().clone()
    assert libraries.load_weights(same, file, 10) == []
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), source.parameters(), strict=True))
    assert libraries.load_weights(other, file, 3) == ["classifier.weight", "classifier.bias"]
    assert torch.equal(other.conv.weight, source.conv.weight)
    assert torch.equal(other.classifier.weight, drawn)


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    save_file(Net(width=6).state_dict(), tmp_path / "wide.safetensors")
    torch.save(Net(), tmp_path / "whole.pt")
    (tmp_path / "text.pt").write_text("no weights")
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, words in (
        ("wide.safetensors", r"conv\.weight is \(6, 1, 3, 3\) in the file"),
        ("whole.pt", "holds more than weights"),
        ("text.pt", r"text\.pt"),
        ("nowhere.pt", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=words):
            libraries.load_weights(model, tmp_path / name, 10)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_run_begins_with_the_weights_of_another(tmp_path, capsys):
    """Not trained at all, it would give the other run's outputs: a learning rate of nearly zero stands for that."""
    common = ["model=small_cnn", "growth=none", "data.limit=64", "model.norm=none", *QUICK]
    assert main([*common, f"hydra.run.dir={tmp_path / 'first'}"]) == 0
    first = growconv.load_run(tmp_path / "first")
    save_file(first.state_dict(), tmp_path / "weights.safetensors")
    still = ["optimizer.lr=1e-12", "optimizer.weight_decay=0", f"model.weights={tmp_path / 'weights.safetensors'}"]
    assert main([*common, *still, "seed=5", f"hydra.run.dir={tmp_path / 'second'}"]) == 0
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(growconv.load_run(tmp_path / "second")(x), first(x), rtol=1e-4, atol=1e-5)
    assert main([*common, "model.weights=/nowhere.pt", f"hydra.run.dir={tmp_path / 'third'}"]) == 1
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_timm_and_torchvision_are_asked_for_an_undrawn_model_of_these_channels_and_classes(monkeypatch):
    """Stand-ins with the libraries' own signatures: neither installs beside the CPU build of torch that CI has."""
    asked = []

    def create_model(model_name, pretrained=False, pretrained_cfg=None, checkpoint_path=None, **kwargs):
        asked.append((model_name, pretrained, kwargs))
        return Net()

    def get_model(name, **config):
        asked.append((name, config.pop("weights"), config))
        return Net()

    timm = types.ModuleType("timm")
    timm.create_model, timm.list_models = create_model, lambda: ["resnet18"]
    torchvision, zoo = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    zoo.get_model, zoo.list_models = get_model, lambda module: ["resnet18"]
    torchvision.models = zoo
    for name, module in {"timm": timm, "torchvision": torchvision, "torchvision.models": zoo}.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert isinstance(libraries.timm("resnet18", 1, 10, {"drop_rate": 0.1}), Net)
    assert isinstance(libraries.torchvision("resnet18", 3, 10, {}), Net)
    assert asked == [
        ("resnet18", False, {"in_chans": 1, "num_classes": 10, "drop_rate": 0.1}),
        ("resnet18", None, {"num_classes": 10}),
    ]
    with pytest.raises(ConfigError, match="did you mean resnet18"):
        libraries.timm("resnt18", 1, 10, {})
    with pytest.raises(ConfigError, match="colour"):
        libraries.torchvision("resnet18", 1, 10, {})
