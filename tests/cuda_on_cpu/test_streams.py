"""Streams, events and graphs: in lazy mode, a missing wait shows; a graph keeps its arguments."""

import functools
import gc

import numpy as np
import pytest

from tests.support.cuda import mode
from tests.support.cuda import needs_emulation

pytestmark = needs_emulation

CODE = """
extern "C" __global__ void add(float *x, float value)
{
    x[threadIdx.x] += value;
}

extern "C" __global__ void add_from(float *x, const float *y)
{
    x[threadIdx.x] += y[threadIdx.x];
}
"""


@pytest.fixture
def lazy():
    with mode(is_lazy=True):
        yield


@pytest.fixture
def add(cupy):
    kernel = cupy.RawModule(code=CODE).get_function("add")
    return lambda x, value: kernel((1,), (4,), (x, np.float32(value)))


def zeros(cupy):
    x = cupy.zeros(4, np.float32)
    cupy.cuda.Stream.null.synchronize()
    return x


def pinned(cupy):
    return np.frombuffer(cupy.cuda.alloc_pinned_memory(16), np.float32, 4)


def test_host_sees_results_after_it_waits_for_the_stream(cupy, lazy, add):
    x, stream, out = zeros(cupy), cupy.cuda.Stream(non_blocking=True), pinned(cupy)
    out[:] = 7
    with stream:
        add(x, 1)
        x.get(out=out, blocking=False)
    assert (out == 7).all()
    stream.synchronize()
    assert (out == 1).all()


def test_pinned_memory_is_read_when_the_copy_runs(cupy, lazy):
    x, stream, host = zeros(cupy), cupy.cuda.Stream(non_blocking=True), pinned(cupy)
    host[:] = 1
    x.set(host, stream)
    host[:] = 2  # an error of the caller, which a device may or may not show
    assert (x.get(stream) == 2).all()


def test_pageable_memory_is_read_at_once(cupy, lazy):
    x, stream, host = zeros(cupy), cupy.cuda.Stream(non_blocking=True), np.ones(4, np.float32)
    x.set(host, stream)
    host[:] = 2
    assert (x.get(stream) == 1).all()


def test_streams_are_not_ordered_without_an_event(cupy, lazy, add):
    x = zeros(cupy)
    first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with first:
        add(x, 1)
    assert (x.get(second) == 0).all()
    second.wait_event(first.record())
    assert (x.get(second) == 1).all()


def test_event_waits_for_what_was_enqueued_before_it(cupy, lazy, add):
    x, stream, other = zeros(cupy), *(cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with stream:
        add(x, 1)
        event = stream.record()
        add(x, 1)
    assert not event.done
    event.synchronize()
    assert event.done
    assert (x.get(other) == 1).all()


def test_polling_a_stream_makes_progress(cupy, lazy, add):
    x, stream = zeros(cupy), cupy.cuda.Stream(non_blocking=True)
    with stream:
        add(x, 1)
        add(x, 1)
    polls = 0
    while not stream.done:
        polls += 1
    assert polls == 1
    assert (x.get(cupy.cuda.Stream(non_blocking=True)) == 2).all()


def test_null_stream_and_blocking_streams_wait_for_each_other(cupy, lazy, add):
    x, blocking = zeros(cupy), cupy.cuda.Stream()
    add(x, 1)
    assert (x.get(blocking) == 1).all()
    with blocking:
        add(x, 1)
    assert (x.get(cupy.cuda.Stream.null) == 2).all()


def test_device_synchronize_waits_for_all_streams(cupy, lazy, add):
    x = zeros(cupy)
    with cupy.cuda.Stream(non_blocking=True):
        add(x, 1)
        cupy.cuda.Device().synchronize()
    assert (x.get() == 1).all()


def test_current_stream_is_that_of_the_innermost_with(cupy):
    outer, inner = cupy.cuda.Stream(), cupy.cuda.Stream()
    assert cupy.cuda.get_current_stream() is cupy.cuda.Stream.null
    with outer:
        with inner:
            assert cupy.cuda.get_current_stream() is inner
        assert cupy.cuda.get_current_stream() is outer
    assert cupy.cuda.get_current_stream() is cupy.cuda.Stream.null


def capture(cupy, *operations):
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        for operation in operations:
            operation()
        return stream, stream.end_capture()


@pytest.mark.parametrize("is_lazy", [False, True])
def test_capture_records_and_launch_runs(cupy, add, is_lazy):
    with mode(is_lazy=is_lazy):
        x, value = zeros(cupy), [1.0]
        stream, graph = capture(cupy, lambda: add(x, value[0]), lambda: add(x, 10))
        assert (x.get(stream) == 0).all()
        value[0] = 5.0  # arguments are taken by value, when they are captured
        for _ in range(3):
            graph.launch(stream)
        assert (x.get(stream) == 33).all()


def test_graph_reads_device_memory_when_it_is_launched(cupy):
    x, y = zeros(cupy), zeros(cupy)
    kernel = cupy.RawModule(code=CODE).get_function("add_from")
    stream, graph = capture(cupy, lambda: kernel((1,), (4,), (x, y)))
    y.set(np.full(4, 3, np.float32), stream)
    graph.launch(stream)
    assert (x.get(stream) == 3).all()


def test_graph_does_not_keep_its_arrays_alive(cupy, add):
    x = zeros(cupy)
    stream, graph = capture(cupy, functools.partial(add, x, 1))
    graph.launch(stream)
    del x
    gc.collect()
    with pytest.raises(Exception, match="add in a graph uses memory that has been freed"):
        graph.launch(stream)


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x, stream: x.get(),
        lambda x, stream: x.set(np.zeros(4, np.float32)),
        lambda x, stream: stream.synchronize(),
        lambda x, stream: x.copy(),
    ],
    ids=["get", "set", "synchronize", "allocation"],
)
def test_what_a_graph_cannot_hold_breaks_a_capture(cupy, forbidden):
    x, stream = zeros(cupy), cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="Unsupported"):
            forbidden(x, stream)
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="Invalidated"):
            stream.end_capture()


def test_null_stream_cannot_be_captured(cupy):
    with pytest.raises(RuntimeError, match="legacy"):
        cupy.cuda.Stream.null.begin_capture()


def test_elapsed_time_is_in_milliseconds(cupy, add):
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    add(zeros(cupy), 1)
    end.record()
    end.synchronize()
    assert 0 < cupy.cuda.get_elapsed_time(start, end) < 60_000
