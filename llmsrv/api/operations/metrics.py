"""GET /metrics in Prometheus' text format, under the names that vLLM's dashboards use.

The rest of the server counts in plain numbers.  Only this module knows prometheus-client; it reads
those numbers on each scrape.
"""

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client import PlatformCollector
from prometheus_client import ProcessCollector
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.core import Metric
from prometheus_client.core import SummaryMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from llmsrv import log
from llmsrv.api.operations.traffic import Traffic
from llmsrv.engine.messages import Gauges
from llmsrv.registry.counters import Counters
from llmsrv.registry.counters import Histogram
from llmsrv.registry.models import Model
from llmsrv.registry.models import Models

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ["model_name", "engine"]
CACHE_LABELS = "block_size num_gpu_blocks kv_cache_size_tokens kv_cache_max_concurrency".split()
FINISH_REASONS = ("stop", "length", "abort", "error")
# Names that newer releases of vLLM have dropped, but that many dashboards still query.
OLD_NAMES = {"inter_token_latency_seconds": "time_per_output_token_seconds"}


class Metrics:
    def __init__(self, models: Models, traffic: Traffic) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ModelsCollector(models))
        self._registry.register(_TrafficCollector(traffic, models))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _ModelsCollector(Collector):
    """Each family has samples of every model, loaded or not, labelled with its first name."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("num_requests_running", "Sequences in steps", _running)
        yield self._gauge("num_requests_waiting", "Sequences waiting", _waiting)
        yield self._gauge("kv_cache_usage_perc", "Part of the KV blocks in use", _kv_usage)
        yield self._gauge("gpu_cache_usage_perc", "The same under its old name", _kv_usage)
        yield self._waiting_by_reason()
        yield self._finished()
        yield self._cache_config()
        yield self._restarts()
        for field in dataclasses.fields(Counters):
            if "help" in field.metadata:
                yield self._counter(field.name, field.name, field.metadata["help"])
                if old_name := OLD_NAMES.get(field.name):
                    yield self._counter(field.name, old_name, "The same under its old name")

    def _gauge(self, name: str, help: str, value: Callable[[Gauges], float]) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", help, labels=LABELS)
        for model in self._models:
            family.add_metric(_labels(model), value(_gauges(model)))
        return family

    def _waiting_by_reason(self) -> Metric:
        name = "vllm:num_requests_waiting_by_reason"
        family = GaugeMetricFamily(name, "Sequences waiting", labels=[*LABELS, "reason"])
        for model in self._models:
            family.add_metric([*_labels(model), "capacity"], _gauges(model).waiting)
        return family

    def _finished(self) -> Metric:
        labels = [*LABELS, "finished_reason"]
        family = CounterMetricFamily("vllm:request_success", "Choices that ended", labels=labels)
        for model in self._models:
            for reason in FINISH_REASONS:
                family.add_metric([*_labels(model), reason], model.counters.finished[reason])
        return family

    def _cache_config(self) -> Metric:
        name, help = "vllm:cache_config_info", "The KV cache of loaded models"
        family = GaugeMetricFamily(name, help, labels=[*LABELS, *CACHE_LABELS])
        for model in self._models:
            if ready := model.engine and model.engine.ready:
                num_tokens = ready.num_blocks * ready.block_size
                concurrency = f"{num_tokens / ready.context_length:.2f}"
                values = (ready.block_size, ready.num_blocks, num_tokens, concurrency)
                family.add_metric([*_labels(model), *map(str, values)], 1)
        return family

    def _restarts(self) -> Metric:
        name = "llmsrv:engine_restarts"
        family = CounterMetricFamily(name, "Engines started again after a crash", labels=LABELS)
        for model in self._models:
            family.add_metric(_labels(model), model.num_restarts)
        return family

    def _counter(self, field: str, name: str, help: str) -> Metric:
        """The family of one field of Counters."""
        family: Metric = CounterMetricFamily(f"vllm:{name}", help, labels=LABELS)
        if isinstance(getattr(Counters(), field), Histogram):
            family = HistogramMetricFamily(f"vllm:{name}", help, labels=LABELS)
        for model in self._models:
            value = getattr(model.counters, field)
            if isinstance(family, HistogramMetricFamily):
                family.add_metric(_labels(model), *_buckets(value))
            elif isinstance(family, CounterMetricFamily):
                family.add_metric(_labels(model), value)
        return family


class _TrafficCollector(Collector):
    def __init__(self, traffic: Traffic, models: Models) -> None:
        self._traffic = traffic
        self._models = models

    def collect(self) -> Iterator[Metric]:
        traffic = self._traffic
        requests = CounterMetricFamily(
            "http_requests", "Requests answered", labels=["handler", "method", "status"]
        )
        for labels, number in traffic.requests.items():
            requests.add_metric(labels, number)
        yield requests
        durations = HistogramMetricFamily(
            "http_request_duration_seconds", "To an answer's end", labels=["handler", "method"]
        )
        for route, histogram in traffic.duration_s.items():
            durations.add_metric(route, *_buckets(histogram))
        yield durations
        name = "http_request_duration_highr_seconds"
        yield HistogramMetricFamily(name, "The same", *_buckets(traffic.all_duration_s))
        yield self._sizes("http_request_size_bytes", "Of bodies received", traffic.request_bytes)
        yield self._sizes("http_response_size_bytes", "Of bodies sent", traffic.response_bytes)
        for name, number in traffic.connections().items():
            family = GaugeMetricFamily if name == "open_connections" else CounterMetricFamily
            yield family(f"llmsrv:http_{name}", "As the HTTP server counts", number)
        yield CounterMetricFamily(
            "llmsrv:unknown_fields", "Request fields ignored", self._models.num_unknown_fields
        )
        yield CounterMetricFamily(
            "llmsrv:dropped_log_lines", "Lines of output dropped", log.num_dropped_lines()
        )

    def _sizes(self, name: str, help: str, num_bytes: dict[str, int]) -> Metric:
        family = SummaryMetricFamily(name, help, labels=["handler"])
        for route, total in num_bytes.items():
            family.add_metric([route], self._traffic.num_requests(route), total)
        return family


def _labels(model: Model) -> list[str]:
    return [model.names[0], "0"]


def _gauges(model: Model) -> Gauges:
    return model.engine.gauges if model.engine else Gauges()


def _running(gauges: Gauges) -> float:
    return gauges.running


def _waiting(gauges: Gauges) -> float:
    return gauges.waiting


def _kv_usage(gauges: Gauges) -> float:
    return gauges.used_blocks / gauges.total_blocks if gauges.total_blocks else 0.0


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """A histogram as Prometheus expects it: cumulative counts by upper bound, and the sum."""
    bounds = map(floatToGoString, [*histogram.bounds, math.inf])
    return list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.sum
