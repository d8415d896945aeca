"""How much of bodies is under way, on paths that are only numbers: little on short ones, enough on long ones."""

from quorate_protocol.pace import SHARE_BYTES_MIN, WINDOW_BYTES_MIN, Pace


class Path:
    """Carries what one stream's window lets through: at most `rate` bytes a second, the first after a round trip."""

    def __init__(self, *, rate: float, rtt_s: float) -> None:
        self.rate = rate
        self.rtt_s = rtt_s
        self.now = 100.0
        self.pace = Pace()
        self.pace.begin(self.now)

    def carry(self, round_trips: int, *, offered: float = 1e12) -> None:
        """Time passes in which the sender has `offered` bytes a second to send."""
        for _ in range(round_trips):
            self.now += self.rtt_s
            carried = min(self.pace.share_bytes, self.rate * self.rtt_s, offered * self.rtt_s)
            # The least is a little less than most.
            self.pace.acknowledged(int(carried), self.now, 0.999 * self.rtt_s)


def test_on_loopback_little_is_under_way() -> None:
    path = Path(rate=500e6, rtt_s=0.0002)
    path.carry(10_000)
    assert path.pace.window_bytes == WINDOW_BYTES_MIN


def test_a_long_path_is_filled_and_not_more_than_twice() -> None:
    path = Path(rate=100e6, rtt_s=0.1)
    path.carry(12)
    assert 0.9 * 2 * 10e6 < path.pace.window_bytes <= 2 * 10e6 + 1


def test_a_long_path_is_tried_twice_as_much_each_round_trip() -> None:
    path = Path(rate=1e9, rtt_s=0.1)
    windows = []
    for _ in range(5):
        path.carry(1)
        windows.append(path.pace.window_bytes / WINDOW_BYTES_MIN)
    assert [round(window) for window in windows] == [2, 4, 8, 16, 32]


def test_a_pause_is_not_the_path() -> None:
    path = Path(rate=100e6, rtt_s=0.1)
    path.carry(12)
    window_bytes = path.pace.window_bytes
    path.carry(8, offered=1e5)
    assert path.pace.window_bytes == window_bytes


def test_a_path_that_has_become_slow_is_noticed() -> None:
    path = Path(rate=100e6, rtt_s=0.1)
    path.carry(12)
    path.rate = 10e6
    path.carry(12)
    assert path.pace.window_bytes <= 2 * 1e6 + 1


def test_the_window_is_shared() -> None:
    pace = Pace()
    shares = []
    for _ in range(16):
        pace.begin(1.0)
        shares.append(pace.share_bytes)
    assert shares[:4] == [WINDOW_BYTES_MIN // n for n in (1, 2, 3, 4)]
    assert shares[-1] == SHARE_BYTES_MIN
    for _ in range(15):
        pace.end()
    assert pace.share_bytes == WINDOW_BYTES_MIN


def test_the_time_between_two_bodies_is_not_counted() -> None:
    path = Path(rate=100e6, rtt_s=0.1)
    path.carry(12)
    window_bytes = path.pace.window_bytes
    path.pace.end()
    path.now += 1000.0
    path.pace.begin(path.now)
    path.carry(12)
    assert abs(path.pace.window_bytes - window_bytes) < 10
