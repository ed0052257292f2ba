"""Many responses, sampled in parallel; each record is yielded as soon as it is complete, so that a kill loses
none.

Images are opened, corrupted and cut into tiles in threads, ahead of the sampler.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

from stic_min import InputError, cost, loader, lora, sampler
from stic_min.formats.adapters import read_adapter
from stic_min.fused import fuse
from stic_min.runtime import console, flags
from stic_min.runtime.files import brief
from stic_min.runtime.work import prefetch


@dataclass(frozen=True)
class Sampling:
    """The sampling flags (runtime/flags.py)."""

    max_new_tokens: int
    temperature: float
    top_p: float | None
    seed: int
    batch_size: int = 1  # responses sampled in parallel
    top_k: int | None = None

    @classmethod
    def from_args(cls, args):
        batch_size = getattr(args, "batch_size", 1)
        return cls(args.max_new_tokens, args.temperature, args.top_p, args.seed, batch_size, args.top_k)

    def options(self):
        return {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}


@dataclass
class Query:
    """One response to sample, as text and images."""

    prompt: str  # user text, without <image>
    images: list[Image.Image] | None  # None once they have been cut into tiles
    seed: int | None  # None: greedy, whatever the temperature


@dataclass
class Job:
    """One record to write: a pair has two queries, a description or an answer has one."""

    key: str
    queries: list[Query]
    fields: dict | None = None  # what the record says besides its responses


@dataclass
class Response:
    text: str
    finish: str  # stop or length


def open_model(args, ranks):
    """The model that the flags name, with its adapter; for --check without weights. Sets --batch-size where
    it is not given."""
    options = flags.model_options(args, ranks)
    if getattr(args, "check", False):
        llava, _ = loader.open_llava(args.model, **options)
        if args.adapter:
            lora.attach(llava, read_adapter(args.adapter, llava))
    else:
        console.report_loading(args, ranks)
        llava = loader.load_llava(args.model, adapter=args.adapter, device=ranks.device, **options)
        if ranks.device.type == "cuda":
            fuse(llava)
        console.report_loaded(llava, ranks)
    if "batch_size" in args:  # not in `ask`
        cost.fit_generation(args, llava, ranks)
    return llava


def sampler_requests(llava, jobs: list[Job]) -> list[sampler.Request]:
    """One request per query, keyed (job key, index of the query). Equal images share their tiles, so that the
    sampler computes them once. Raises InputError if a prompt is longer than the model's limit."""
    tiles = {id(image): llava.tiles(image) for job in jobs for query in job.queries for image in query.images}
    requests = []
    for job in jobs:
        for i, query in enumerate(job.queries):
            ids = llava.tokenizer.encode_prompt(llava.chat_prompt(query.prompt, len(query.images)))
            query_tiles = [tiles[id(image)] for image in query.images]
            request = sampler.Request((job.key, i), ids, query_tiles, query.seed)
            length = prompt_length(llava, request)
            limit = llava.config.max_length
            if length > limit:
                message = f"the prompt has {length} tokens, but the model's limit is {limit}"
                raise InputError(f"{brief(job.key)}: {message}")
            requests.append(request)
    return requests


def prompt_length(llava, request: sampler.Request) -> int:
    """Tokens of a prompt, those of its images included."""
    image_tokens = sum(llava.config.image_tokens(tiles.size) for tiles in request.tiles)
    return len(request.ids) - len(request.tiles) + image_tokens


def prepare_ahead(llava, groups: Iterable, prepare: Callable) -> Iterator:
    """Runs prepare(group) -> jobs, and then `sampler_requests`, in threads, ahead of the consumer.

    Yields (group, jobs, requests, None) in order, or (group, [], [], error) where that raised InputError.
    """

    def attempt(group):
        try:
            jobs = prepare(group)
            requests = sampler_requests(llava, jobs)
            for query in (query for job in jobs for query in job.queries):
                query.images = None  # not kept until the job is complete: 12 megapixels take 36 MB
            return group, jobs, requests, None
        except InputError as error:
            return group, [], [], error

    return prefetch(attempt, groups)


def generate(
    llava, groups: list, prepare: Callable, sampling: Sampling, ranks, what: str, queries_per_job: int = 1
) -> Iterator:
    """Samples this rank's share of all queries. Yields (job, [Response, ...]) as each job completes.

    A group is a list of keys about one image. prepare(group) opens it and returns the group's jobs; if it
    raises InputError, that is printed as a warning and the group is skipped. `what` is for the progress line.
    """
    groups = groups[ranks.rank :: ranks.world]
    count = sum(map(len, groups))
    progress = console.Progress(what, count, ranks)
    started = {}  # {key: (job, its samples so far)}

    def requests():
        for group, jobs, group_requests, error in prepare_ahead(llava, groups, prepare):
            if error:
                console.warn(f"skipped: {error}")
            progress.add(len(group) - len(jobs))  # keys without a job
            started.update({job.key: (job, [None] * len(job.queries)) for job in jobs})
            yield from group_requests

    slots = min(sampling.batch_size, count * queries_per_job)
    for (key, i), sample in sampler.stream(llava, requests(), slots=slots, **sampling.options()):
        job, samples = started[key]
        samples[i] = sample
        if None not in samples:
            del started[key]
            yield job, [Response(llava.tokenizer.decode(sample.ids), sample.finish) for sample in samples]
            progress.add()
