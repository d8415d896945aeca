"""Path MTU discovery (RFC 8899): what is tried, what is believed, and what ends it."""

import pytest

from quorate_protocol.limits import UDP_PAYLOAD_BYTES_MAX, UDP_PAYLOAD_BYTES_MIN
from quorate_protocol.transport.engine.mtu import PathMtu

CEILING = UDP_PAYLOAD_BYTES_MAX
BASE = UDP_PAYLOAD_BYTES_MIN


def search(mtu: PathMtu, path_bytes: int, now: float = 0.0, refuses: bool = False) -> list[int]:
    """Probes until nothing is left to try, over a path that carries packets of so many bytes; the sizes tried."""
    tried = []
    mtu.want()
    while (size := mtu.next_probe_bytes(now)) is not None:
        tried.append(size)
        probe = mtu.probe_sent(size, now)
        assert mtu.next_probe_bytes(now) is None, "one probe at a time"
        if size <= path_bytes:
            mtu.probe_acknowledged(size, probe, now)
        elif refuses:
            mtu.refused(size, now)
        else:
            mtu.probe_lost(probe, now)
        assert len(tried) < 60, "the search does not end"
    return tried


def test_nothing_is_tried_before_somebody_wants_more() -> None:
    mtu = PathMtu(CEILING)
    assert mtu.next_probe_bytes(0.0) is None
    assert mtu.size_bytes == BASE
    mtu.want()
    assert mtu.next_probe_bytes(0.0) == CEILING


def test_one_probe_finds_what_loopback_carries() -> None:
    mtu = PathMtu(CEILING)
    assert search(mtu, 65_507) == [CEILING]
    assert mtu.size_bytes == CEILING


@pytest.mark.parametrize("refuses", [True, False], ids=["refused at once", "lost"])
@pytest.mark.parametrize("path_bytes", [1472, 1452, 8972, 8952, 1400, 2000, 5000, 12_000, BASE])
def test_the_search_ends_close_below_what_the_path_carries(path_bytes: int, refuses: bool) -> None:
    mtu = PathMtu(CEILING)
    tried = search(mtu, path_bytes, refuses=refuses)
    assert 0.93 * path_bytes <= mtu.size_bytes <= path_bytes
    assert len(tried) <= 12 * (1 if refuses else 3)
    if path_bytes in (1472, 1452, 8972, 8952):
        assert mtu.size_bytes == path_bytes, "sizes of common links are tried as they are"


def test_a_size_has_three_tries() -> None:
    mtu = PathMtu(CEILING)
    mtu.want()
    for _ in range(2):
        assert mtu.next_probe_bytes(0.0) == CEILING
        mtu.probe_lost(mtu.probe_sent(CEILING, 0.0), 0.0)
    assert mtu.next_probe_bytes(0.0) == CEILING
    mtu.probe_acknowledged(CEILING, mtu.probe_sent(CEILING, 0.0), 0.0)
    assert mtu.size_bytes == CEILING


def test_a_probe_that_nobody_answers_is_lost_after_a_second() -> None:
    mtu = PathMtu(CEILING)
    mtu.want()
    mtu.probe_sent(CEILING, 5.0)
    assert mtu.timer() == 6.0
    mtu.expire(5.9)
    assert mtu.timer() == 6.0
    mtu.expire(6.0)
    assert mtu.timer() is None
    assert mtu.next_probe_bytes(6.0) == CEILING


def test_the_peers_ceiling_holds() -> None:
    mtu = PathMtu(CEILING)
    mtu.limit(1452)
    assert search(mtu, 65_507) == [1452]
    assert mtu.size_bytes == 1452
    least = PathMtu(CEILING)
    least.limit(1000)
    assert search(least, 65_507) == []
    assert least.size_bytes == BASE


def test_a_ceiling_of_the_least_size_means_no_discovery() -> None:
    assert search(PathMtu(BASE), 65_507) == []


def test_after_ten_minutes_the_path_may_have_become_better() -> None:
    mtu = PathMtu(CEILING)
    search(mtu, 1452)
    assert mtu.next_probe_bytes(599.0) is None
    assert search(mtu, 9000, now=600.0)
    assert mtu.size_bytes == 8972


def test_a_path_that_begins_to_swallow_large_packets_is_noticed_and_searched_below() -> None:
    mtu = PathMtu(CEILING)
    search(mtu, 8972)
    for number in range(6):
        assert mtu.size_bytes == 8972
        mtu.packet_lost(8972, number)
    assert mtu.size_bytes == BASE
    assert max(search(mtu, 1452)) < 8972
    assert mtu.size_bytes == 1452


def test_congestion_is_not_taken_for_a_path_that_swallows_packets() -> None:
    """Large packets were lost, but one that was sent after them came through."""
    mtu = PathMtu(CEILING)
    search(mtu, 8972)
    mtu.packet_acknowledged(8972, 1000)
    for number in range(1000):
        mtu.packet_lost(8972, number)
    assert mtu.size_bytes == 8972


def test_small_packets_that_come_through_say_nothing_about_large_ones() -> None:
    mtu = PathMtu(CEILING)
    search(mtu, 8972)
    for number in range(6):
        mtu.packet_lost(8972, 2 * number)
        mtu.packet_acknowledged(BASE, 2 * number + 1)
    assert mtu.size_bytes == BASE


def test_a_packet_that_the_network_refuses_leads_below_its_size() -> None:
    mtu = PathMtu(CEILING)
    search(mtu, 8972)
    mtu.refused(8972, 0.0)
    assert mtu.size_bytes == BASE
    search(mtu, 1472, refuses=True)
    assert mtu.size_bytes == 1472


def test_another_path_is_searched_anew() -> None:
    mtu = PathMtu(CEILING)
    search(mtu, 1452)
    mtu.begin_path()
    assert mtu.size_bytes == BASE
    assert search(mtu, 65_507) == [CEILING]


def test_a_late_answer_from_an_old_path_says_nothing_about_the_new_one() -> None:
    mtu = PathMtu(CEILING)
    mtu.want()
    probe = mtu.probe_sent(CEILING, 0.0)
    mtu.begin_path()
    mtu.probe_acknowledged(CEILING, probe, 0.1)
    assert mtu.size_bytes == BASE


def test_the_loss_of_a_try_that_was_given_up_is_not_that_of_the_next() -> None:
    mtu = PathMtu(CEILING)
    mtu.want()
    first = mtu.probe_sent(CEILING, 0.0)
    mtu.expire(1.0)
    second = mtu.probe_sent(CEILING, 1.0)
    mtu.probe_lost(first, 1.1)
    assert mtu.timer() == 2.0, "the second is under way"
    mtu.probe_acknowledged(CEILING, second, 1.2)
    assert mtu.size_bytes == CEILING
