"""A site that takes every request and says nothing holds up the others for a bounded time."""

from __future__ import annotations

import pytest

from tests.tg_tinker.federated.coordinating import coordinator, fake_sites
from tests.tg_tinker.federated.memory_link import MemoryLink
from tg_tinker.federated.closing import LONGEST_FINISH_S
from tg_tinker.federated.job_run import LEAST_JOIN_S, MOST_INVITATIONS
from tg_tinker.federated.link import Outcome


class Mute(MemoryLink):
    """One site answers no request of a kind: an exchange with it lasts to its deadline."""

    def __init__(self, sites, kind):
        super().__init__({site.name: site.handle for site in sites})
        self.kind, self.now, self.waits = kind, 0.0, []

    def exchange(self, requests, *, timeout_s):
        mute = [r.site for r in requests if r.kind == self.kind and r.site == "site-2"]
        if mute:
            self.waits.append(timeout_s)
            self.now += timeout_s
        return [
            Outcome(site=r.site, reply=None, failure="mute") if r.site in mute else self._one(r) for r in requests
        ]


def run(folder, service, link, **settings):
    job = {"rounds": 5, "round_timeout_s": 36_000.0}
    return coordinator(folder, service, job=job, clock=lambda: link.now, **settings).run(link)


@pytest.mark.parametrize("join_s", [0.0, 60.0])
def test_a_site_that_says_nothing_to_an_invitation(tmp_path, coordinator_service, join_s):
    link, asked = Mute(fake_sites(), "join"), []

    def progress(event):
        if event.what == "asked":
            asked.append(link.now)

    result = run(tmp_path, coordinator_service, link, join_timeout_s=join_s, progress=progress)
    assert (result.status, result.unheard) == ("finished", ("site-2",))
    assert [r.updates for r in result.rounds] == [2] * 5
    patience = max(join_s, LEAST_JOIN_S)
    assert asked[0] <= 2 * patience
    assert link.waits == [patience] * (1 + MOST_INVITATIONS)


def test_a_site_that_says_nothing_at_the_end(tmp_path, coordinator_service):
    link = Mute(fake_sites(), "finish")
    result = run(tmp_path, coordinator_service, link)
    assert (result.status, set(result.statements), result.unstated) == (
        "finished",
        {"site-0", "site-1"},
        {"site-2": "mute"},
    )
    assert link.waits == [LONGEST_FINISH_S]


def test_no_patience_is_longer_than_that_of_a_round(tmp_path, coordinator_service):
    for kind in ("join", "finish"):
        link = Mute(fake_sites(), kind)
        job = {"rounds": 1, "round_timeout_s": 2.5}
        settings = {"clock": lambda link=link: link.now, "join_timeout_s": 1.0}
        result = coordinator(tmp_path / kind, coordinator_service, job=job, **settings).run(link)
        assert result.status == "finished"
        assert set(link.waits) == {2.5}
