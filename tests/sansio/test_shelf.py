"""Bounded memory: the oldest fall off, by count and by bytes."""

from quorate_coordinator.rounds.shelf import Shelf


def test_the_oldest_fall_off_by_count() -> None:
    shelf: Shelf[str] = Shelf(count_max=2, bytes_max=100)
    assert shelf.put(1, "one", 10) == []
    assert shelf.put(2, "two", 10) == []
    assert shelf.put(3, "three", 10) == ["one"]
    assert (shelf.get(1), shelf.get(2), shelf.get(3)) == (None, "two", "three")
    assert (len(shelf), shelf.held_bytes) == (2, 20)


def test_the_oldest_fall_off_by_bytes_as_many_as_need_be() -> None:
    shelf: Shelf[str] = Shelf(count_max=10, bytes_max=100)
    for number in range(1, 6):
        assert shelf.put(number, f"{number}", 20) == []
    assert shelf.put(6, "6", 50) == ["1", "2", "3"]
    assert shelf.held_bytes == 90


def test_one_that_is_too_big_by_itself_falls_off_after_all_others() -> None:
    shelf: Shelf[str] = Shelf(count_max=10, bytes_max=100)
    shelf.put(1, "one", 10)
    assert shelf.put(2, "huge", 101) == ["one", "huge"]
    assert (len(shelf), shelf.held_bytes) == (0, 0)


def test_taking_makes_room() -> None:
    shelf: Shelf[str] = Shelf(count_max=2, bytes_max=100)
    shelf.put(1, "one", 60)
    assert shelf.take(1) == "one"
    assert shelf.take(1) is None
    assert shelf.put(2, "two", 60) == []
    assert shelf.held_bytes == 60
