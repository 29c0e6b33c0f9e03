"""What the actor between workers and driver counts and holds. It is a plain object here."""

from __future__ import annotations

from reelmae.pipeline.runners.ray_watch import LINES, Tracker


def test_items_that_end_begin_at_one_each_time() -> None:
    tracker: Tracker[str] = Tracker()
    for item in ("a", "b", "a", "a"):
        assert tracker.begin(0, item) == 1
        tracker.report(0, "so far")


def test_begins_over_which_workers_died_add_up_until_the_item_ends() -> None:
    tracker: Tracker[str] = Tracker()
    for n in (1, 2, 3):  # the task starts over each time
        assert tracker.begin(0, "good") == 1
        tracker.report(0, "so far")
        assert tracker.begin(0, "poison") == n
    tracker.report(0, "it was rejected")
    assert tracker.begin(0, "poison") == 1


def test_workers_that_die_at_different_items_do_not_add_up() -> None:
    """As when a node is short of memory: no source is to blame."""
    tracker: Tracker[str] = Tracker()
    for item in ("a", "b", "c", "d", "e"):
        for before in "abcde"[: "abcde".index(item)]:
            tracker.begin(0, before)
            tracker.report(0, "so far")
        assert tracker.begin(0, item) == 1


def test_tasks_count_for_themselves() -> None:
    """Two parts of a plan may name the same source."""
    tracker: Tracker[str] = Tracker()
    assert [tracker.begin(0, "a"), tracker.begin(0, "a"), tracker.begin(1, "a")] == [1, 2, 1]
    tracker.end(0)
    assert [tracker.begin(0, "a"), tracker.begin(1, "a")] == [1, 2]


def test_of_a_tasks_reports_the_newest_is_taken_once() -> None:
    tracker: Tracker[str] = Tracker()
    tracker.begin(0, "a")
    tracker.report(0, "old")
    tracker.report(0, "new")
    tracker.report(1, "other")
    assert tracker.take() == ({0: "new", 1: "other"}, [])
    assert tracker.take() == ({}, [])


def test_a_report_of_a_task_that_has_ended_is_dropped() -> None:
    """Its sums are in the report of its end: both would count twice."""
    tracker: Tracker[str] = Tracker()
    tracker.begin(0, "a")
    tracker.report(0, "so far")
    tracker.end(0)
    assert tracker.take() == ({}, [])


def test_of_very_many_warnings_the_first_are_held() -> None:
    tracker: Tracker[str] = Tracker()
    for n in range(3 * LINES):
        tracker.warn(str(n))
    assert tracker.take() == ({}, [str(n) for n in range(LINES)])
    tracker.warn("again")
    assert tracker.take() == ({}, ["again"])
