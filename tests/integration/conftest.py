"""Decode steps of fixed shapes, watched while they are served."""

import pytest

from kvpolicy.integrations.transformers.decode_graph.session import StaticSession


@pytest.fixture
def steps(monkeypatch):
    """The sessions by which decode steps were served, one entry a step."""
    served, run = [], StaticSession.run

    def recorded(session, tokens, places):
        logits = run(session, tokens, places)
        served.append(session)
        return logits

    monkeypatch.setattr(StaticSession, "run", recorded)
    return served
