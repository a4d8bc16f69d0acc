"""Grammars over a vocabulary of single bytes, and in an engine with a small random model."""

import json
import threading
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from llmsrv.backend.base import Limits
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.table import Mask
from llmsrv.engine.core import EngineCore
from llmsrv.engine.grammar import Grammar
from llmsrv.engine.grammar import GrammarCompiler
from llmsrv.engine.messages import Abort
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Step
from llmsrv.engine.messages import Submit
from llmsrv.errors import ApiError
from llmsrv.model.load import load_model
from llmsrv.text.grammar import choice_source
from llmsrv.text.grammar import grammar_source
from llmsrv.text.grammar import json_schema_source
from llmsrv.text.grammar import load_ll_tokenizer
from llmsrv.text.grammar import regex_source
from tests.support.gguf_writer import write_tiny_llama

FIRST_BYTE = 3  # id of the byte 0 in the tiny vocabulary
END_ID = 2
VOCAB_SIZE = 320
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"enum": ["a", "b"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grammar")
    return write_tiny_llama(folder / "tiny.gguf", vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def compiler(model: Path) -> GrammarCompiler:
    return GrammarCompiler(lambda: load_ll_tokenizer(model, model.parent, VOCAB_SIZE), VOCAB_SIZE)


def start(compiler: GrammarCompiler, source: str) -> Grammar:
    return compiler.compile(source).result().copy()


def ids_of(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


def text_of(ids: list[int]) -> str:
    return bytes(id - FIRST_BYTE for id in ids if id >= FIRST_BYTE).decode()


def allowed(grammar: Grammar) -> set[int]:
    masks = grammar.masks()
    assert masks is not None
    return set(np.flatnonzero(np.unpackbits(masks[-1].view(np.uint8), bitorder="little")).tolist())


def follows(grammar: Grammar, text: str) -> bool:
    """Whether the grammar accepts the text, id by id, and may end after it."""
    for id in ids_of(text):
        if id not in allowed(grammar):
            return False
        if grammar.accept(id):
            return id == ids_of(text)[-1]
    return END_ID in allowed(grammar)


@pytest.mark.parametrize(
    ("source", "texts", "others"),
    [
        (
            json_schema_source(POINT),
            ['{"x": -12, "y": "b"}'],
            ['{"x":1, "y": "a"}', '{"y": "a"}', "[]"],
        ),
        (json_schema_source(POINT, r"[ \n]?"), ['{"x":1, "y": "a"}'], ['{"x":  1, "y": "a"}']),
        (json_schema_source({"type": "object"}), ["{}", '{"a": [1, {"é": 0.5}]}'], ["1", "{ }"]),
        (regex_source(r"a/b|\d{2}\n?"), ["a/b", "42", "42\n"], ["a", "4", "a\\/b"]),
        (choice_source(["yes", "yes and no", 'a "quote"\n']), ["yes", "yes and no"], ["no"]),
        (grammar_source('start: "a" [B]\nB: /b+/'), ["a", "abbb"], ["b"]),
    ],
    ids=["schema", "spaces", "object", "regex", "choice", "lark"],
)
def test_a_grammar_accepts_its_texts_and_no_others(
    compiler: GrammarCompiler, source: str, texts: list[str], others: list[str]
) -> None:
    grammar = start(compiler, source)
    for text in texts:
        assert follows(grammar.copy(), text), text
    for text in others:
        assert not follows(grammar.copy(), text), text


def test_masks_after_drafts_are_those_of_plain_decoding(compiler: GrammarCompiler) -> None:
    grammar = start(compiler, json_schema_source(POINT))
    drafts = ids_of('{"x": 1')
    masks = grammar.masks(drafts)
    assert masks is not None and masks.shape == (len(drafts) + 1, VOCAB_SIZE // 32)
    for mask, id in zip(masks, [*drafts, *ids_of("2")], strict=True):
        alone = grammar.masks()
        assert alone is not None and (alone[0] == mask).all()
        grammar.accept(id)


def test_there_are_no_masks_after_a_forbidden_draft(compiler: GrammarCompiler) -> None:
    grammar = start(compiler, json_schema_source(POINT))
    masks = grammar.masks(ids_of('{"z'))
    assert masks is not None and len(masks) == 3
    assert follows(grammar, '{"x": 0, "y": "a"}')


def test_the_last_byte_completes_the_text(compiler: GrammarCompiler) -> None:
    grammar = start(compiler, regex_source("ab"))
    assert [grammar.accept(id) for id in ids_of("ab")] == [False, True]


def test_forced_ids_have_no_alternative(compiler: GrammarCompiler) -> None:
    grammar = start(compiler, json_schema_source(POINT))
    assert text_of(grammar.forced()) == '{"x": '[: len(grammar.forced())]
    assert grammar.masks(grammar.forced()) is not None


def test_ids_without_text_are_never_allowed(compiler: GrammarCompiler) -> None:
    ids = allowed(start(compiler, regex_source("(.|\n)+")))
    assert {FIRST_BYTE + byte for byte in range(128)} <= ids
    assert not ids & {0, 1, END_ID, *range(FIRST_BYTE + 256 + 20, VOCAB_SIZE)}


@pytest.mark.parametrize(
    "lark",
    ['start: "a" | "ab" c\nc: d\nd: c "x"', 'start: /[ab]/ b\nb: "b" b'],
    ids=["dead", "endless"],
)
def test_nothing_is_allowed_if_no_end_can_be_reached(
    compiler: GrammarCompiler, lark: str
) -> None:
    grammar = start(compiler, grammar_source(lark))
    for id in ids_of("abb"):
        if grammar.masks() is None:
            return
        grammar.accept(id)
    assert grammar.masks() is None


def test_an_invalid_grammar_is_rejected(compiler: GrammarCompiler) -> None:
    with pytest.raises(ApiError, match="unknown") as refused:
        compiler.compile(grammar_source("start: nothing")).result()
    assert refused.value.status == 400


# ---- In the engine


class Engine:
    def __init__(self, model: Path, compiler: GrammarCompiler) -> None:
        program = load_model(model, lambda: None).program
        limits = Limits(64, 8, 8, 65)
        plan = ReferenceBackend().compile(program, limits, lambda: None)
        self.core = EngineCore(plan, limits, 256, VOCAB_SIZE, compile_grammar=compiler.compile)
        self.outputs: dict[tuple[int, int], list[int]] = {}
        self.reasons: dict[tuple[int, int], str] = {}
        self.failed: dict[int, int] = {}

    def submit(
        self, request: int, grammar: str, seed: int = 1, allowed: Sequence[int] = (), **fields: int
    ) -> None:
        submit = Submit(
            request=request,
            prompt_ids=[5, 6, 7],
            end_ids=[END_ID],
            sampling=Sampling(seed, allowed_ids=list(allowed)),
            grammar=grammar,
            **{"max_tokens": 60, **fields},  # type: ignore[arg-type]
        )
        self.core.submit(submit)

    def run(self) -> None:
        while self.core.has_work:
            self.take(self.core.step())

    def take(self, step: Step) -> None:
        for tokens in step.tokens:
            self.outputs.setdefault((tokens.request, tokens.choice), []).extend(tokens.ids)
        for finished in step.finished:
            self.reasons[finished.request, finished.choice] = finished.reason
        for failed in step.failed:
            self.failed[failed.request] = failed.status


@pytest.fixture
def engine(model: Path, compiler: GrammarCompiler) -> Iterator[Engine]:
    engine = Engine(model, compiler)
    yield engine
    assert not engine.core.has_work and engine.core.step().gauges.used_blocks == 0


def test_answers_follow_their_grammar_among_others_without_one(engine: Engine) -> None:
    for request in range(1, 5):
        engine.submit(request, json_schema_source(POINT) if request % 2 else "", seed=request, n=2)
    engine.run()
    assert len(engine.reasons) == 8 and not engine.failed
    for (request, choice), ids in engine.outputs.items():
        if request % 2 and engine.reasons[request, choice] == "stop":
            assert json.loads(text_of(ids)).keys() == {"x", "y"}


def test_a_seed_gives_the_same_answer_alone_and_among_others(engine: Engine) -> None:
    engine.submit(1, json_schema_source({"type": "object"}), seed=5)
    engine.run()
    for request in range(2, 6):
        source = json_schema_source({"type": "object"}) if request < 4 else ""
        engine.submit(request, source, seed=5)
    engine.run()
    assert engine.outputs[1, 0] == engine.outputs[2, 0] == engine.outputs[3, 0]


def test_a_grammar_without_an_end_finishes_with_length(engine: Engine) -> None:
    engine.submit(1, grammar_source('start: /[ab]/ b\nb: "b" b'))
    engine.run()
    assert engine.reasons == {(1, 0): "length"}


def test_a_complete_text_ends_before_min_tokens(engine: Engine) -> None:
    engine.submit(1, choice_source(["ab"]), min_tokens=20)
    engine.run()
    assert text_of(engine.outputs[1, 0]) == "ab" and engine.reasons == {(1, 0): "stop"}


@pytest.mark.parametrize(
    ("lark", "allowed", "text", "reason"),
    [
        ('start: "a" c?\nc: "cd"', "a", "a", "stop"),
        ('start: "abc"', "ab", "ab", "length"),
        ('start: "abc"', "b", "", "length"),
    ],
)
def test_a_text_ends_if_the_grammar_excludes_all_allowed_ids(
    engine: Engine, lark: str, allowed: str, text: str, reason: str
) -> None:
    engine.submit(1, grammar_source(lark), allowed=ids_of(allowed))
    engine.run()
    assert text_of(engine.outputs.get((1, 0), [])) == text
    assert engine.reasons == {(1, 0): reason} and not engine.failed


def test_a_text_that_can_only_end_ends_before_min_tokens(engine: Engine) -> None:
    ids = [*ids_of("a"), END_ID]
    engine.submit(1, grammar_source('start: "a" c?\nc: "cd"'), allowed=ids, min_tokens=20)
    engine.run()
    assert text_of(engine.outputs[1, 0]) == "a" and engine.reasons == {(1, 0): "stop"}


def test_min_tokens_require_an_allowed_id_other_than_end_ids(engine: Engine) -> None:
    submit = Submit(1, [5], 9, [END_ID], Sampling(1, allowed_ids=[END_ID]), min_tokens=2)
    engine.core.submit(submit)
    engine.run()
    assert engine.failed == {1: 400}


def test_a_grammar_that_fails_to_compile_fails_its_request_alone(engine: Engine) -> None:
    engine.submit(1, grammar_source("start: nothing"))
    engine.submit(2, choice_source(["ab"]))
    engine.run()
    assert engine.failed == {1: 400} and engine.reasons == {(2, 0): "stop"}


def test_a_grammar_that_fails_in_a_step_fails_its_request_alone(
    engine: Engine, compiler: GrammarCompiler
) -> None:
    class Failing(Grammar):
        num_tokens = 0

        def copy(self) -> Grammar:
            return self

        def masks(self, drafts: Sequence[int] = ()) -> Mask | None:
            self.num_tokens += 1
            if self.num_tokens > 4:  # in the row of the second choice, after the first one's
                raise ZeroDivisionError
            return np.full((1, VOCAB_SIZE // 32), 2**32 - 1, np.uint32)

    failing: Future[Grammar] = Future()
    failing.set_result(Failing(start(compiler, choice_source(["ab"]))._matcher, VOCAB_SIZE))
    engine.core._compile_grammar = lambda source: failing
    engine.submit(1, "fails", n=3)
    engine.submit(2, "")
    engine.run()
    assert engine.failed == {1: 500} and engine.reasons.keys() == {(2, 0)}


def test_others_continue_while_a_grammar_compiles(model: Path, compiler: GrammarCompiler) -> None:
    engine = Engine(model, compiler)
    compiled: Future[Grammar] = Future()
    engine.core._compile_grammar = lambda source: compiled
    engine.submit(1, "slow")
    engine.submit(2, "", max_tokens=5)
    while not engine.reasons:
        engine.take(engine.core.step())
    assert engine.reasons == {(2, 0): "length"}
    compiled.set_result(compiler.compile(choice_source(["ab"])).result())
    engine.run()
    assert engine.reasons[1, 0] == "stop"


def test_a_request_can_be_aborted_while_its_grammar_compiles(engine: Engine) -> None:
    engine.core._compile_grammar = lambda source: Future()
    engine.submit(1, "slow", n=2)
    engine.core.abort(Abort(1))
    engine.run()
    assert engine.reasons == {(1, 0): "abort", (1, 1): "abort"}


def test_deep_grammars_compile_without_overflowing_the_stack(compiler: GrammarCompiler) -> None:
    """Deeper than the worker's stack can hold."""
    chain = "".join(f"r{i}: r{i + 1}\n" for i in range(3000))
    compiler.compile(grammar_source(f'start: r0\n{chain}r3000: "a"')).result()
    assert threading.stack_size() == 0
