"""llmsrv.text.template_probe: what chat templates take, found out by trying them."""

import dataclasses
import time
from pathlib import Path

import pytest

from llmsrv.files.gguf import open_gguf
from llmsrv.text import chat_template
from llmsrv.text.chat_template import ChatTemplate
from llmsrv.text.template_probe import TemplateFacts
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import load_tokenizer
from tests.support.gguf_writer import tiny_vocabulary
from tests.support.gguf_writer import write_gguf
from tests.support.template_shapes import SHAPES


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tiny") / "m.gguf"
    return load_tokenizer(open_gguf(write_gguf(path, tiny_vocabulary())))


@pytest.mark.parametrize("name", SHAPES)
def test_what_a_template_takes_is_found_out(tokenizer: Tokenizer, name: str) -> None:
    shape = SHAPES[name]
    found = dataclasses.asdict(ChatTemplate(shape.source, tokenizer).facts)
    defaults = dataclasses.asdict(TemplateFacts())
    assert {key: value for key, value in found.items() if value != defaults[key]} == shape.facts


def test_what_was_found_is_one_line(tokenizer: Tokenizer) -> None:
    lines = {name: ChatTemplate(SHAPES[name].source, tokenizer).facts.describe() for name in SHAPES}
    assert lines["qwen3"] == (
        "system messages anywhere; tools; several calls a message; no null content; "
        "thinking set by enable_thinking"
    )
    assert lines["gemma2"] == "no system role; user and assistant alternate; no tools"
    assert lines["nemo"] == (
        "one system message, at the beginning; user and assistant alternate; tools; "
        "several calls a message; call ids of nine letters and digits"
    )
    assert lines["granite3.3"] == "system messages anywhere; tools; no calls"
    assert lines["vision"] == "content only in parts; system messages anywhere; no tools"


@pytest.mark.parametrize("source", ["", "{{ 1 // 0 }}", "{{ raise_exception('no') }}", "{{ x.y }}"])
def test_a_template_that_shows_nothing_is_taken_as_it_is(tokenizer: Tokenizer, source: str) -> None:
    assert ChatTemplate(source, tokenizer).facts == TemplateFacts()


def test_a_template_that_takes_too_long_is_not_tried_further(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "PROBE_S", 0.02)
    loops = "{% for i in range(50000) %}" * 3 + "{% endfor %}" * 3 + "{{ tools }}"
    begin = time.thread_time()
    template = ChatTemplate(loops, tokenizer)
    assert time.thread_time() - begin < 0.5
    assert template.facts == TemplateFacts(has_tools=True) and template.is_slow


def test_trying_a_template_takes_a_few_milliseconds(tokenizer: Tokenizer) -> None:
    def cpu_seconds(template: ChatTemplate) -> float:
        begin = time.thread_time()
        template._probe()
        return time.thread_time() - begin

    for shape in SHAPES.values():
        template = ChatTemplate(shape.source, tokenizer)
        assert min(cpu_seconds(template) for _ in range(5)) < 0.02  # about 1 ms on a desktop


def test_the_golden_template_of_the_default_model_knows_no_tools(smollm2: Path) -> None:
    file = open_gguf(smollm2)
    source = file.get("tokenizer.chat_template", str)
    assert source is not None
    facts = ChatTemplate(source, load_tokenizer(file)).facts
    assert facts.has_system_role and not facts.has_tools
