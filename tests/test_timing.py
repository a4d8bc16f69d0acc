"""Deadlines that share one timer of the event loop."""

import asyncio

import pytest

from llmsrv.timing import Deadline
from llmsrv.timing import Timer


def fired(*settings: float | None, wait_s: float = 0.05) -> list[int]:
    """The deadlines that fire in wait_s, by number and in order, if each is set once; None: and
    cleared."""

    async def main() -> list[int]:
        timer, numbers = Timer(), list[int]()

        def note(number: int) -> None:
            numbers.append(number)

        for number, delay_s in enumerate(settings):
            deadline = Deadline(timer, lambda number=number: note(number))  # type: ignore[misc]
            deadline.set(0.005 if delay_s is None else delay_s)
            if delay_s is None:
                deadline.clear()
        await asyncio.sleep(wait_s)
        return numbers

    return asyncio.run(main())


def test_deadlines_fire_in_order_however_they_were_set() -> None:
    assert fired(0.03, 0.01, 9.0, 0.02, None) == [1, 3, 0]


@pytest.mark.parametrize("first_s, then_s", [(9.0, 0.01), (0.005, 0.02)], ids=["sooner", "later"])
def test_a_deadline_that_is_moved_fires_once_at_its_new_time(first_s: float, then_s: float) -> None:
    async def main() -> None:
        loop, fired_s = asyncio.get_running_loop(), list[float]()
        deadline = Deadline(Timer(), lambda: fired_s.append(loop.time()))
        begun_s = loop.time()
        deadline.set(first_s)
        deadline.set(then_s)
        await asyncio.sleep(0.05)
        (at_s,) = fired_s
        assert at_s - begun_s >= then_s - 0.002 and not deadline.is_set

    asyncio.run(main())


def test_a_closed_deadline_never_fires_and_one_that_fails_does_not_stop_the_others() -> None:
    async def main() -> None:
        timer, calls, errors = Timer(), list[str](), list[object]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        deadlines = {
            name: Deadline(timer, lambda name=name: calls.append(name))  # type: ignore[misc]
            for name in ("closed", "second")
        }
        failing = Deadline(timer, lambda: 1 / 0)
        for deadline in (failing, *deadlines.values()):
            deadline.set(0.01)
        deadlines["closed"].close()
        await asyncio.sleep(0.05)
        assert calls == ["second"] and len(errors) == 1

    asyncio.run(main())
