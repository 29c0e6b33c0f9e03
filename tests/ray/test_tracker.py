"""What the actor between workers and driver counts and holds. It is a plain object here."""

from __future__ import annotations

from reelmae.pipeline.runners.ray_watch import LINES, Tracker


def test_items_that_end_begin_at_one_each_time() -> None:
    tracker: Tracker[str] = Tracker()
    assert tracker.start(0) == 0
    for item in ("a", "b", "a", "a"):
        assert tracker.begin(0, item) == 1
        tracker.report(0, "so far")


def test_begins_over_which_workers_died_add_up() -> None:
    tracker: Tracker[str] = Tracker()
    for n in (1, 2, 3):  # the task starts over each time
        assert tracker.start(0) == 0
        assert tracker.begin(0, "good") == 1
        tracker.report(0, "so far")
        assert tracker.begin(0, "poison") == n


def test_what_was_condemned_stays_so_when_workers_die_over_another_item() -> None:
    """Else two such items in one task would let it begin again for ever."""
    tracker: Tracker[str] = Tracker()
    for _ in range(5):
        tracker.start(0)
        tracker.begin(0, "poison")
    for n in (1, 2, 3):
        tracker.start(0)
        assert tracker.begin(0, "poison") == 6
        tracker.report(0, "it was rejected")
        assert tracker.begin(0, "another") == n


def test_workers_that_die_between_items_count_for_the_task() -> None:
    tracker: Tracker[str] = Tracker()
    for n in range(3):
        assert tracker.start(0) == n
        tracker.begin(0, "a")
        tracker.report(0, "so far")
    tracker.end(0)
    assert tracker.start(0) == 0


def test_workers_that_die_at_different_items_do_not_add_up() -> None:
    """As when a node is short of memory: no source is to blame."""
    tracker: Tracker[str] = Tracker()
    for item in ("a", "b", "c", "d", "e"):
        tracker.start(0)
        for before in "abcde"[: "abcde".index(item)]:
            tracker.begin(0, before)
            tracker.report(0, "so far")
        assert tracker.begin(0, item) == 1


def test_tasks_count_for_themselves() -> None:
    """Two parts of a plan may name the same source."""
    tracker: Tracker[str] = Tracker()
    for task, begins in ((0, 1), (0, 2), (1, 1)):
        tracker.start(task)
        assert tracker.begin(task, "a") == begins
    tracker.end(0)
    for task, begins in ((0, 1), (1, 2)):
        tracker.start(task)
        assert tracker.begin(task, "a") == begins


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
