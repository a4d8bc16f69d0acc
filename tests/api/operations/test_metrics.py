"""/metrics: exact counts for requests with known tokens."""

import urllib.request

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmsrv.engine.messages import Gauges
from llmsrv.engine.messages import Step
from llmsrv.registry.counters import Counters
from llmsrv.registry.counters import Histogram
from llmsrv.registry.counters import TOKEN_S
from tests.support.sdk import openai_client
from tests.support.server import RunningServer
from tests.support.server import eventually

# The families that dashboards, autoscalers and inference gateways query.
MODEL_FAMILIES = """
    num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc
    gpu_cache_usage_perc prefix_cache_queries prefix_cache_hits num_preemptions prompt_tokens
    generation_tokens request_success cache_config_info time_to_first_token_seconds
    inter_token_latency_seconds time_per_output_token_seconds e2e_request_latency_seconds
    request_queue_time_seconds request_inference_time_seconds request_prefill_time_seconds
    request_decode_time_seconds request_prompt_tokens request_generation_tokens request_params_n
    request_params_max_tokens request_max_num_generation_tokens
    request_time_per_output_token_seconds iteration_tokens_total request_num_preemptions
    spec_decode_num_drafts spec_decode_num_draft_tokens spec_decode_num_accepted_tokens
    admission_rejections
""".split()
PROMPT = [5, 6, 7]


def samples(server: RunningServer) -> dict[str, float]:
    """The samples by name and, if they have further labels, by those too."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        text = response.read().decode()
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            further = {"finished_reason", "handler", "method", "status"} & sample.labels.keys()
            labels = [sample.labels[name] for name in sorted(further)]
            values[" ".join([sample.name.removeprefix("vllm:"), *labels])] = sample.value
    return values


def grown(server: RunningServer, before: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0) for name, value in samples(server).items()}


def complete(server: RunningServer, **fields: object) -> openai.types.Completion:
    client = openai_client(server.url)
    extra = {"prompt": PROMPT, "max_tokens": 10, "ignore_eos": True} | fields
    answer = client.completions.create(model="tiny", prompt="", extra_body=extra)
    assert isinstance(answer, openai.types.Completion)
    return answer


def test_ten_requests_of_ten_tokens_are_counted_to_the_token(open_server: RunningServer) -> None:
    before = samples(open_server)
    for _ in range(10):
        complete(open_server)
    growth = grown(open_server, before)
    wanted = {
        "prompt_tokens_total": 30,
        "generation_tokens_total": 100,
        "request_success_total length": 10,
        "request_success_total abort": 0,
        "time_to_first_token_seconds_count": 10,
        "inter_token_latency_seconds_count": 90,
        "e2e_request_latency_seconds_count": 10,
        "request_queue_time_seconds_count": 10,
        "request_inference_time_seconds_count": 10,
        "request_prefill_time_seconds_count": 10,
        "request_decode_time_seconds_count": 10,
        "request_prompt_tokens_sum": 30,
        "request_generation_tokens_sum": 100,
        "request_params_n_sum": 10,
        "request_num_preemptions_count": 10,
        "request_num_preemptions_sum": 0,
        "request_params_max_tokens_sum": 100,
        "iteration_tokens_total_sum": 130,
        "iteration_tokens_total_count": 100,
        "http_requests_total /v1/completions POST 2xx": 10,
    }
    assert {name: growth[name] for name in wanted} == wanted
    parts = [f"request_{part}_time_seconds_sum" for part in ("queue", "inference")]
    assert 0 < sum(growth[part] for part in parts) < growth["e2e_request_latency_seconds_sum"]


def test_tokens_are_counted_while_a_request_runs(open_server: RunningServer) -> None:
    before = samples(open_server)
    client = openai_client(open_server.url)
    stream = client.completions.create(
        model="tiny",
        prompt="",
        stream=True,
        extra_body={"prompt": PROMPT, "max_tokens": 16000, "ignore_eos": True},
    )
    with stream:
        for _ in range(50):
            next(iter(stream))
        growth = grown(open_server, before)
        assert growth["prompt_tokens_total"] == 3
        assert growth["generation_tokens_total"] >= 50
        assert growth["request_success_total abort"] == 0
    eventually(lambda: grown(open_server, before)["request_success_total abort"] == 1)
    growth = grown(open_server, before)
    assert growth["prompt_tokens_total"] == growth["request_prompt_tokens_sum"] == 3
    assert growth["generation_tokens_total"] == growth["request_generation_tokens_sum"]


def test_steps_count_each_token_once_with_drafts_and_cached_prefixes(
    open_server: RunningServer,
) -> None:
    before = samples(open_server)
    for num_tokens in (10, 40):  # the second prompt is cached, and begins as the first answer did
        complete(open_server, prompt=[5, 6, 7] * 20, max_tokens=num_tokens, n=2, temperature=0)
    growth = grown(open_server, before)
    assert growth["prefix_cache_hits_total"] > 0
    assert growth["spec_decode_num_draft_tokens_total"] > 0
    assert growth["iteration_tokens_total_sum"] == 2 * 60 + 2 * 10 + 2 * 40


def test_each_choice_counts_as_a_request(open_server: RunningServer) -> None:
    before = samples(open_server)
    complete(open_server, n=3)
    growth = grown(open_server, before)
    assert growth["time_to_first_token_seconds_count"] == 3
    assert growth["request_success_total length"] == 3
    assert growth["request_params_n_sum"] == growth["prompt_tokens_total"] == 3
    assert growth["request_max_num_generation_tokens_sum"] == 10


def test_every_family_is_present_with_the_labels_that_dashboards_filter_on(
    open_server: RunningServer,
) -> None:
    complete(open_server)
    with urllib.request.urlopen(f"{open_server.url}/metrics", timeout=10) as response:
        text = response.read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name in MODEL_FAMILIES:
        labels = families[f"vllm:{name}"].samples[0].labels
        assert (labels["model_name"], labels["engine"]) == ("tiny", "0")
    cache = families["vllm:cache_config_info"].samples[0].labels
    assert (cache["block_size"], cache["num_gpu_blocks"]) == ("16", "16384")
    assert families["vllm:kv_cache_usage_perc"].samples[0].value == 0
    assert {"http_requests", "process_cpu_seconds", "python_info"} <= families.keys()
    assert families["llmsrv:http_open_connections"].samples[0].value >= 1
    assert families["llmsrv:http_client_stalled"].samples[0].value == 0


def test_aborted_and_invalid_requests_are_counted_as_such(
    open_server: RunningServer,
) -> None:
    before = samples(open_server)
    client = openai_client(open_server.url)
    stream = client.completions.create(
        model="tiny", prompt="a", max_tokens=16000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="none", prompt="a")
    eventually(lambda: grown(open_server, before)["request_success_total abort"] == 1)
    growth = grown(open_server, before)
    assert growth["http_requests_total /v1/completions POST 4xx"] == 1
    assert growth["http_requests_total /v1/completions POST 2xx"] == 1
    eventually(lambda: samples(open_server)["kv_cache_usage_perc"] == 0)


def test_a_histogram_counts_each_value_up_to_its_bound() -> None:
    histogram = Histogram((1, 2, 5))
    for value in (0.5, 1, 1.5, 5, 6):
        histogram.observe(value)
    histogram.observe(2, times=2)
    assert (histogram.counts, histogram.sum) == ([2, 3, 1, 1], 18)
    assert list(TOKEN_S) == sorted(TOKEN_S)


def test_counters_survive_a_restart_of_the_engine() -> None:
    counters = Counters()
    for num_preemptions in (0, 3, 5, 1, 1, 2):  # a new engine starts at 0 again
        gauges = Gauges(num_preemptions=num_preemptions, num_prefix_hits=10 * num_preemptions)
        counters.note_step(Step([], [], [], [], gauges), 0)
    assert (counters.num_preemptions, counters.prefix_cache_hits) == (7, 70)
    assert sum(counters.iteration_tokens_total.counts) == 0
