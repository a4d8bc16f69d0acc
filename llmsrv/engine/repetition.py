"""Detects an output that repeats itself, as models do that have lost the thread.

The definition is vLLM's: the output ends with the same pattern of min_pattern_size to
max_pattern_size tokens, min_count times in a row.
"""

from llmsrv.engine.messages import RepetitionDetection


def ends_with_repetition(ids: list[int], detection: RepetitionDetection) -> bool:
    count = detection.min_count
    longest = min(detection.max_pattern_size, len(ids) // count)
    for size in range(max(1, detection.min_pattern_size), longest + 1):
        # The first comparison decides nearly always, and copies nothing.
        if ids[-1] == ids[-1 - size] and ids[-size:] == ids[-2 * size : -size]:
            if ids[-size * (count - 1) :] == ids[-size * count : -size]:
                return True
    return False
