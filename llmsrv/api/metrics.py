"""GET /metrics in Prometheus' text format, under the names that vLLM's dashboards know.

The rest of the server counts in plain integers; this module alone knows prometheus-client, and
reads them when it is scraped.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client import PlatformCollector
from prometheus_client import ProcessCollector
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from llmsrv.api.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "abort")


@dataclass
class Counters:
    """What the API has done since it started; choices are counted when they end."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)  # by finish reason


class Metrics:
    def __init__(self, service: "Service") -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ServiceCollector(service))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _ServiceCollector(Collector):
    def __init__(self, service: "Service") -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        gauges = self._service.engine.gauges
        counters = self._service.counters
        usage = gauges.used_blocks / gauges.total_blocks if gauges.total_blocks else 0.0
        yield self._gauge("vllm:num_requests_running", "Sequences in steps", gauges.running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences waiting", gauges.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Part of the KV blocks in use", usage)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens", counters.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Output tokens", counters.generation_tokens)
        queries, hits = gauges.num_prefix_queries, gauges.num_prefix_hits
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up", queries)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found", hits)
        yield self._counter("vllm:num_preemptions", "Preemptions", gauges.num_preemptions)
        yield self._finished(counters)

    def _labels(self) -> list[str]:
        return [self._service.names[0], "0"]

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help, labels=["model_name", "engine"])
        family.add_metric(self._labels(), value)
        return family

    def _counter(self, name: str, help: str, value: int) -> Metric:
        family = CounterMetricFamily(name, help, labels=["model_name", "engine"])
        family.add_metric(self._labels(), value)
        return family

    def _finished(self, counters: Counters) -> Metric:
        labels = ["model_name", "engine", "finished_reason"]
        family = CounterMetricFamily("vllm:request_success", "Choices that ended", labels=labels)
        for reason in FINISH_REASONS:
            family.add_metric([*self._labels(), reason], counters.finished[reason])
        return family
