"""Bias, masks and penalties, alone and after draft tokens."""

import numpy as np

from llmsrv.backend.sampling.reference_sampler import candidates
from llmsrv.backend.sampling.reference_sampler import sample
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.sampling.table import mask_of
from tests.support.sampling import kept
from tests.support.sampling import random_logits
from tests.support.sampling import sample_one
from tests.support.sampling import table_of


def test_greedy_takes_the_lowest_id_of_a_tie():
    assert sample_one([1, 4, 4, 2], temperature=0).ids.tolist() == [1]


def test_bias_is_added_before_everything():
    assert sample_one([1, 4, 3.5], temperature=0, logit_bias={2: 1, 0: 2}).ids.tolist() == [2]
    assert sample_one([1, 4], temperature=0, logit_bias={1: -100}).ids.tolist() == [0]


def test_masks_hide_ids_and_the_grammar_narrows_them_further():
    size = 70
    logits = np.arange(size)[None].astype(np.float32)
    allowed = SamplingParameters(temperature=0, allowed=mask_of([3, 33, 65], size))
    banned = SamplingParameters(temperature=0, allowed=~mask_of([69, 68], size))
    table = table_of([allowed, banned, SamplingParameters(temperature=0)], size)
    slots, positions = np.arange(3, dtype=np.int32), np.zeros(3, np.int64)
    rows = np.repeat(logits, 3, axis=0)
    assert sample(rows, table, slots, positions).ids.tolist() == [65, 67, 69]
    for slot in range(3):
        table.set_grammar(slot, mask_of([33, 31, 68], size))
    assert sample(rows, table, slots, positions).ids.tolist() == [33, 33, 68]


def test_mask_words_are_32_ids_each_lowest_bit_first():
    assert mask_of([0, 31, 32], 33).tolist() == [0x80000001, 1]
    assert mask_of([0, 31, 32], 33).dtype == np.uint32


def penalized(logits, prompt_ids, output_ids, repetition, presence, frequency):
    """Step 2 of the contract, for each id separately, in float32."""
    out = []
    for id, value in enumerate(np.float32(logits)):
        count = np.float32(output_ids.count(id))
        if id in prompt_ids or count:
            value = value / repetition if value > 0 else value * repetition
        if count:
            value = value - presence
            value = value - frequency * count
        out.append(value)
    return out


def test_penalties_equal_those_computed_for_each_id_separately():
    logits = random_logits(6, size=40)
    prompt_ids, output_ids = [1, 2, 3, 3, 7], [3, 5, 5, 5, 39]
    penalties = [np.float32(each) for each in (1.3, 0.4, 0.15)]
    extras = {
        "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.15, "seed": 9
    }
    table = table_of([SamplingParameters(**extras)], 40, prompt_ids, output_ids)
    ids, weights = candidates(logits, table.parameters[0], table.extras[0])
    expected = penalized(logits, prompt_ids, output_ids, *penalties)
    assert dict(zip(ids.tolist(), weights.tolist())) == kept(expected)


def test_a_drawn_id_counts_towards_the_next_penalty():
    logits = np.array([[2.0, 1.5, 1.2]], np.float32)
    table = table_of([SamplingParameters(temperature=0, frequency_penalty=0.5)], 3)
    slot = np.zeros(1, np.int32)
    drawn = [int(sample(logits, table, slot, np.array([i])).ids[0]) for i in range(6)]
    assert drawn == [0, 0, 1, 2, 0, 1]


def test_a_slot_forgets_its_sequence_when_it_is_set_again():
    table = table_of([SamplingParameters(temperature=0, logit_bias={0: 100})], 2)
    table.set(0, SamplingParameters(temperature=0))
    rows = np.array([[1.0, 2.0]], np.float32)
    assert sample(rows, table, np.zeros(1, np.int32), np.zeros(1, np.int64)).ids.tolist() == [1]
    assert not table.parameters["has_extras"].any()


def test_rows_after_a_draft_are_penalized_as_if_it_were_output():
    rows = np.array([[2.0, 1.8, 1.5]] * 4, np.float32)
    table = table_of([SamplingParameters(temperature=0, presence_penalty=0.4)] * 2, 3)
    slots, positions = np.array([0, 0, 0, 1], np.int32), np.array([0, 1, 2, 0])
    drafts = np.array([-1, 0, 1, -1], np.int32)
    assert sample(rows, table, slots, positions, drafts=drafts).ids.tolist() == [0, 1, 0, 0]
    assert table.extras[0].counts.tolist() == [2, 1, 0]
    assert table.extras[1].counts.tolist() == [1, 0, 0]


def test_nothing_after_a_rejected_draft_is_counted():
    rows = np.array([[2.0, 1.0, 1.0]] * 3, np.float32)
    table = table_of([SamplingParameters(temperature=0, presence_penalty=0.1)], 3)
    drafts = np.array([-1, 2, 0], np.int32)
    sample(rows, table, np.zeros(3, np.int32), np.arange(3), drafts=drafts)
    assert table.extras[0].counts.tolist() == [1, 0, 0]


def test_each_draft_row_has_its_own_grammar_mask():
    rows = np.array([[3.0, 2.0, 1.0]] * 3, np.float32)
    table = table_of([SamplingParameters(temperature=0)], 3)
    table.set_grammar(0, np.stack([mask_of([2], 3), mask_of([1, 2], 3)]))
    drafts = np.array([-1, 2, 1], np.int32)
    samples = sample(rows, table, np.zeros(3, np.int32), np.arange(3), drafts=drafts)
    assert samples.ids.tolist() == [2, 1, 1]


def test_end_ids_are_banned_before_min_tokens_only():
    rows = np.array([[3.0, 2.0, 1.0]] * 2, np.float32)
    table = table_of([SamplingParameters(temperature=0, min_tokens=5, end_ids=[0])], 3)
    drafts = np.array([-1, 1], np.int32)
    samples = sample(rows, table, np.zeros(2, np.int32), np.array([4, 5]), drafts=drafts)
    assert samples.ids.tolist() == [1, 0]
