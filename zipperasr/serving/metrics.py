"""What Prometheus is told."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SEGMENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LANGUAGES = (1, 2, 3, 4, 6, 8, 13)


class Metrics:
    """The counters of one service."""

    def __init__(self) -> None:
        to = {"registry": CollectorRegistry(), "namespace": "zipperasr"}
        self._registry = to["registry"]
        self.requests = Counter("requests", "Transcription requests that are over", ["status", "format"], **to)
        self.rejected = Counter("rejected", "Requests told to come again later (429)", **to)
        self.request_seconds = Histogram("request_seconds", "From headers to the last byte", buckets=SECONDS, **to)
        self.uploads = Gauge("uploads", "Requests whose body is being read", **to)
        self.in_flight = Gauge("in_flight", "Requests being uploaded, waiting or being transcribed", **to)
        self.waiting = Gauge("waiting_segments", "Segments that are read and not decoded yet", **to)
        self.audio_seconds = Counter("audio_seconds", "Audio of all transcripts", **to)
        self.batch_segments = Histogram("batch_segments", "Segments of a batch", buckets=SEGMENTS, **to)
        self.batch_languages = Histogram("batch_languages", "Languages of a batch", buckets=LANGUAGES, **to)
        self.decoded_audio_seconds = Counter("decoded_audio_seconds", "Audio of all batches", **to)
        self.decode_seconds = Counter("decode_seconds", "Time that batches took", **to)

    def watch(self, *, in_flight: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Have these called when somebody asks."""
        self.in_flight.set_function(in_flight)
        self.waiting.set_function(waiting)

    def on_batch(self, num_segments: int, num_languages: int, audio_s: float, wall_s: float) -> None:
        """Count a decoded batch; may be called from any thread."""
        self.batch_segments.observe(num_segments)
        self.batch_languages.observe(num_languages)
        self.decoded_audio_seconds.inc(audio_s)
        self.decode_seconds.inc(wall_s)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
