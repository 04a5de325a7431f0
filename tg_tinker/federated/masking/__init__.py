"""Secure aggregation: the coordinator learns the mean of the sites' updates and no site's own.

The protocol of Bonawitz et al. 2017 (CCS, doi 10.1145/3133956.3133982) with its additions against a coordinator
that lies, on the complete graph, for 3 to about 50 sites. A round under masks is five requests::

    request        site                                        coordinator
                                                               request = round.begin()
    mask.keys      facts = site.advertise(r, k, request)       request = round.keys({site: facts})
    mask.shares    facts = site.share(r, k, request)           request by site = round.shares({site: facts})
    train          site.receive(r, k, request, base=base)  # then train
                   masked_P = site.mask(r, k, update_P)        request = round.masked({site: masked_P})
    mask.agree     facts = site.agree(r, k, request)           request = round.agreed({site: facts})
    mask.open      facts = site.open(r, k, request)            mean = round.opened({site: facts})

with ``site = MaskingSite(job, name, key, state=stored)`` once per job, ``round = MaskingRound(job, r, k, size=P,
base=base)`` once per round r and attempt k, and ``base`` the digest of the weights that the round begins with. What
`MaskingRound` gives after a step are the facts of the next request, to the sites that they name. A site that did not
answer is missing from the next call, and that is all.

Both sides raise FederationRefusedError and change nothing then. A site stores ``site.state`` durably, mode 0600,
before each reply leaves. `MaskingSetting.of` tells at once whether a job can be masked.

Byte by byte: docs/formats/masking.md. Not hidden: who took part, and the mean, of which each site knows its own part.
Not prevented: a site that sends nonsense spoils the round, and masks hide which it was.
"""

from tg_tinker.federated.masking.coordinator import MaskedMean, MaskingRound
from tg_tinker.federated.masking.ring import error_bound
from tg_tinker.federated.masking.setting import MaskingSetting
from tg_tinker.federated.masking.site import MaskingSite

ARRAY = "masked"
"""Name of the masked update among the arrays of a reply to "train"."""
KINDS = ("mask.keys", "mask.shares", "mask.agree", "mask.open")
"""Requests that `MaskingSite.answer` answers."""

__all__ = ["ARRAY", "KINDS", "MaskedMean", "MaskingRound", "MaskingSetting", "MaskingSite", "error_bound"]
