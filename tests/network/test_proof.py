"""Whatever else reads a layer's channels is found, or the site is refused there and then, with the true reason."""

import pytest
import torch
from torch import Tensor, nn

from growconv.network.event import grow
from growconv.network.find import explain_sites, find_sites
from growconv.network.proof import Proof, copied_growth, silent_growth
from growconv.network.rehearsal import Example
from tests.network import readers, referee, zoo

X = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def reasons(model: nn.Module, example: object = X, **options: object) -> dict[str, str | None]:
    """Per layer why it cannot grow; None where it can."""
    return {row.path: row.reason for row in explain_sites(model, example, **options)}


def test_a_head_that_only_training_calls() -> None:
    model = readers.TwoHeads("training").double()
    sites = find_sites(model, X)
    assert [site.name for site in sites] == ["a -> b, aux", "b -> head"]
    assert referee.untrained(referee.check(model, X, sites), X) == []
    found = reasons(model, modes=("eval",))
    assert "aux is used by none of the examples" in str(found["a"])
    assert found["aux"] == "none of the examples calls it"
    assert found["b"] is None


@pytest.mark.parametrize("second", [(X, True), {"x": X, "more": True}])
def test_a_head_that_an_argument_asks_for(second: object) -> None:
    model = readers.TwoHeads("argument").double()
    assert "aux is used by none of the examples" in str(reasons(model)["a"])
    sites = find_sites(model, [X, second])
    assert [site.name for site in sites] == ["a -> b, aux", "b -> head"]
    referee.check(model, [X, second], sites)


@pytest.mark.parametrize(
    ("model", "reader"), [(readers.TwoHeads("method"), "aux"), (readers.Prototypes(), "prototypes")]
)
def test_a_method_beside_forward(model: nn.Module, reader: str) -> None:
    assert f"{reader} is used by none of the examples" in str(reasons(model.double())["a"])


@pytest.mark.parametrize("name", readers.RUNS)
def test_runs_do_not_disturb_each_other(name: str) -> None:
    """What a run keeps, draws, asks or writes to its input says nothing about the channels."""
    model, example = readers.RUNS[name]().double(), X.clone()
    sites = find_sites(model, example)
    assert [site.name for site in sites] == ["a -> b"]
    assert torch.equal(example, X)
    assert referee.untrained(referee.check(model, X, sites, modes=("eval",)), X) == []


@pytest.mark.parametrize("read", [readers.in_numpy, readers.ranks, readers.in_python, readers.in_script])
def test_what_torch_does_not_show_is_noticed(read: readers.Extra) -> None:
    model = readers.reading(read)().double()
    found = str(reasons(model)["a"])
    assert "something reads these channels that cannot be followed" in found or "read beside its layers" in found
    assert find_sites(model, X) == ()


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (readers.reading(readers.in_vmap), "depend on each other|broadcasting"),
        (readers.reading(readers.by_weight), "convolution is not followed"),
        (
            readers.reading(readers.in_functional_call, c=nn.Conv2d(4, 2, 1)),
            "weights of c are used outside of the layer",
        ),
        (readers.autoencoder, "e.weight and d.weight are one weight, but play different parts"),
        (readers.between(lambda _, y: y.detach()), "no gradient reaches it"),
        (readers.between(lambda _, y: torch.log(y)), "infinite or not a number"),
        (readers.hidden, "the code makes something of all channels or of their number"),
        (readers.Silent, "no gradient reaches it"),
    ],
)
def test_what_cannot_grow_says_why(build: readers.Builder, reason: str) -> None:
    model = build().double()
    first = next(iter(reasons(model).items()))
    assert first[0] in ("a", "e")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(first[1])


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_module_hides_what_it_reads() -> None:
    assert "convolution is not followed" in str(reasons(readers.scripted_head().double())["a"])


@pytest.mark.parametrize("build", [readers.twins, readers.siamese])
def test_layers_with_one_weight_grow_together(build: readers.Builder) -> None:
    model = build().double()
    (site,) = find_sites(model, X)
    assert {"c", "d"} <= set(site.producers)
    grown = referee.check(model, X, [site])
    assert grown.model.c.weight is grown.model.d.weight


def test_frozen_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1)).double()
    model[0].requires_grad_(False)
    found = reasons(model)
    assert "weight of 0 is frozen" in str(found["0"])
    assert found["2"] is None
    model[4].requires_grad_(False)
    assert "weight of 4 is frozen" in str(reasons(model)["2"])


def test_presumed_sites_are_not_run_against_other_readers() -> None:
    model = readers.reading(readers.in_numpy)().double()
    assert [site.name for site in find_sites(model, X, rehearse=False)] == ["a -> b"]


def test_a_weight_that_the_layer_remakes_is_told() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Standardised(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)).double()
    found = reasons(model)
    assert "2 makes something else of its weights" in str(found["0"])
    assert found["2"] is None


def test_one_site_that_fails_does_not_take_others_along() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (
                nn.Conv2d(3, 4, 1),
                nn.Conv2d(4, 4, 1),
                nn.Conv2d(4, 4, 1),
                nn.Conv2d(4, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(torch.relu(self.a(x)))
            strongest = torch.from_numpy(y.detach().numpy().max(1, keepdims=True))
            return self.d(torch.relu(self.c(torch.relu(y)))) + strongest

    found = reasons(Net().double())
    assert [path for path, reason in found.items() if reason is None] == ["a", "c"]
    assert "something reads" in str(found["b"])


def test_new_channels_that_change_the_output_are_noticed() -> None:
    model, example = zoo.build("residual")
    sites = find_sites(model, example)
    watched = [Example(((example,), {}), training) for training in (False, True)]
    assert Proof(model, watched, dict(enumerate(sites))).failures() == {}

    class Counting(nn.Module):  # as many channels as there are change what it gives
        def forward(self, x: Tensor) -> Tensor:
            return x * x.shape[1]

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Counting(), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1)).double()
    found = reasons(model)
    assert "change the output" in str(found["0"])
    assert found["2"] is None


def test_the_growths_that_prove_keep_the_function() -> None:
    model, example = zoo.build("channels_last")
    expected = model(example)
    stream, hidden = find_sites(model, example)
    assert stream.copied
    grow(model, stream, copied_growth(stream, 2 * stream.width))
    grow(model, hidden, silent_growth(hidden, 3), 0.0)
    assert (stream.width, hidden.width) == (12, 9)
    torch.testing.assert_close(model(example), expected, rtol=1e-10, atol=1e-10)


def test_a_mask_over_the_weights_of_a_consumer_keeps_no_site_back() -> None:
    class Masked(nn.Conv2d):
        def __init__(self, *arguments: int) -> None:
            super().__init__(*arguments)
            self.register_buffer("mask", (torch.arange(self.weight.numel()) % 5 > 0).view_as(self.weight).double())

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight * self.mask, self.bias)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Masked(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)).double()
    referee.check(model, X, find_sites(model, X))
    assert reasons(model) == {"0": None, "2": None, "4": "it is the model's output"}


def test_a_consumer_that_refuses_more_inputs_by_itself_is_told_and_not_raised() -> None:
    class Strict(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            if not x.any() or x.shape[1] == 4:
                return super().forward(x)
            raise LookupError("four channels only")

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Strict(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)).double()
    found = reasons(model)
    assert "four channels only" in str(found["0"])
    assert found["2"] is None


@pytest.mark.parametrize("dim", [0, 1])
def test_new_channels_without_weights_are_read_by_consumers_that_store_lengths(dim: int) -> None:
    """Zeros have a length, but no direction: lengths along the inputs need one for each new channel."""
    consumer = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 5, 3), dim=dim)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), consumer, nn.Conv2d(5, 2, 1)).double()
    sites = find_sites(model, X)
    assert [site.name for site in sites] == ["0 -> 2", "2 -> 3"]
    referee.check(model, X, sites)


class _Cuts(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :4]


class _Gates(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.mean(1, keepdim=True)


def test_a_dropout_with_a_forward_of_its_own_is_looked_into() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), _Cuts(0.0), nn.Conv2d(4, 5, 3), _Gates(0.0), nn.Conv2d(5, 2, 1)).double()
    assert "a literal size in the code" in str(reasons(model)["0"])
    (site,) = find_sites(model, X)
    assert (site.name, site.copied, site.closed_form) == ("2 -> 4", True, False)
    referee.check(model, X, [site])
