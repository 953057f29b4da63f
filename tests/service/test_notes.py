from __future__ import annotations

import pytest

from service.notes import identify, notes_of

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


def _scope(**headers: str) -> dict[str, object]:
    return {
        "type": "http",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }


def test_a_harmless_request_id_is_kept() -> None:
    assert identify(_scope(x_request_id="abc-1.2_3")).request_id == "abc-1.2_3"


@pytest.mark.parametrize("given", ["", "a b", 'x"y', "a" * 129, "a\nb", "é"])
def test_another_is_replaced(given: str) -> None:
    made = identify(_scope(x_request_id=given)).request_id
    assert made != given
    assert len(made) == 32


def test_a_valid_trace_is_taken_over() -> None:
    identity = identify(_scope(traceparent=f"00-{TRACE}-{PARENT}-01"))
    assert identity.trace_id == TRACE
    assert identity.urn == f"urn:twogate:trace:{TRACE}"


@pytest.mark.parametrize(
    "given",
    [
        "nonsense",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
    ],
)
def test_an_invalid_trace_is_not(given: str) -> None:
    assert identify(_scope(traceparent=given)).trace_id is None


def test_later_versions_of_traceparent_may_have_more_fields() -> None:
    assert identify(_scope(traceparent=f"01-{TRACE}-{PARENT}-01-more")).trace_id == TRACE


def test_the_notes_stay_the_same() -> None:
    scope = _scope()
    assert notes_of(scope) is notes_of(scope)
