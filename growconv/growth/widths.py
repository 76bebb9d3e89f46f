"""A fresh model at any widths, such as those found by a search."""

from collections.abc import Iterable, Mapping

from torch import nn

from growconv.errors import SiteError
from growconv.network.event import grow, shrink
from growconv.network.site import GrowthSite
from growconv.solvers.base import solve


def set_widths(model: nn.Module, sites: Iterable[GrowthSite], widths: Mapping[str, int]) -> None:
    """Give an untrained model other widths, and draw its weights anew for them.

    Every module with a `reset_parameters` is initialised by it, as torch's own layers are when they are made; a model's
    own initialisation is to be repeated afterwards.

    Args:
        model: the raw model, before its optimizer is made.
        sites: of the model.
        widths: channels by the name of the site; sites that are not named keep theirs.

    Raises:
        SiteError: a name that no site has.
        SurgeryError: a width that a site cannot have.
    """
    known = {site.name: site for site in sites}
    for name, width in widths.items():
        if name not in known:
            raise SiteError("there is no such site", where=name, expected=", ".join(known))
        site = known[name]
        if width > site.width:
            grow(model, site, solve(site, "random", channels=width - site.width))
        elif width < site.width:
            shrink(model, site, range(width, site.width))
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
