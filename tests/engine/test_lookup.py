"""Drafts by prompt lookup."""

from llmsrv.engine.lookup import Lookup


def test_lookup_drafts_what_followed_the_same_ngram() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3, 4, 5, 6])
    assert lookup.draft(4) == ([], 0)
    lookup.extend([1])
    assert lookup.draft(4) == ([], 0)
    lookup.extend([2, 3])
    assert lookup.draft(2) == ([4, 5], 3)
    assert lookup.draft(8) == ([4, 5, 6, 1, 2, 3, 4, 5], 3)
    lookup.extend([7, 1, 2, 3])
    assert lookup.draft(3) == ([7, 1, 2], 3)  # the latest occurrence counts
    assert lookup.num_tokens == 13


def test_a_longer_match_wins_over_a_later_one() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3, 4])
    assert lookup.draft(1) == ([50], 4)
    lookup.extend([9, 9, 3, 4])
    assert lookup.draft(1) == ([9], 2)


def test_the_match_length_of_periodic_text_is_limited() -> None:
    lookup = Lookup()
    lookup.extend([5] * 4)
    assert lookup.draft(3) == ([5, 5, 5], 3)
    lookup.extend([5] * 40)
    assert lookup.draft(3) == ([5, 5, 5], 8)
