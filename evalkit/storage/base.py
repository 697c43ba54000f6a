"""The contract of a storage: where the records of searches live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from evalkit.job import TERMINAL_STATES, ErrorInfo, Job, JobCause, JobState, is_failed_objective, objective_of

__all__ = ["JobRecord", "JobUpdate", "SearchRecord", "Storage", "StorageSpec"]


@dataclass(frozen=True, slots=True)
class StorageSpec:
    """What a plugin says of a storage; cheap, since nothing is imported before the storage is used.

    Attributes:
        scheme: of its URLs, such as ``redis`` in ``redis://host``. A driver after ``+`` is the storage's own business.
        target: ``"package.module:Class"``; the class is opened with ``Class.from_url(url)``.
        install: the command that installs what the target imports, as in :class:`~evalkit.backends.BackendSpec`.
        summary: one line for ``evalkit plugins``.
    """

    scheme: str
    target: str
    install: str = ""
    summary: str = ""


@dataclass(frozen=True, slots=True)
class SearchRecord:
    """A search.

    Attributes:
        id: its name, unique in the storage.
        created: seconds since the Unix epoch.
        values: what ``set_value`` stored.
    """

    id: str
    created: float
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class JobRecord:
    """A job as it is stored. What a storage hands out is the caller's own copy.

    Attributes:
        version: grows with every write of this record, from 1.
        owner: the evaluator or queue that created it.
        worker: who has claimed it, for a job drawn from a queue.
        lease_expires: seconds since the Unix epoch, for a claimed job.
        created: seconds since the Unix epoch.
    """

    id: str
    search_id: str
    args: dict[str, Any]
    state: JobState = JobState.QUEUED
    version: int = 1
    attempt: int = 0
    output: Any = None
    error: ErrorInfo | None = None
    cause: JobCause | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    owner: str | None = None
    worker: str | None = None
    lease_expires: float | None = None
    created: float = 0.0

    @property
    def number(self) -> int:
        """The number after the last dot of the id."""
        return int(self.id.rpartition(".")[2])

    @property
    def is_complete(self) -> bool:
        return self.state in TERMINAL_STATES

    @property
    def objective(self) -> Any:
        return objective_of(self.output)

    @property
    def objective_failed(self) -> bool:
        return is_failed_objective(self.objective)


@dataclass(slots=True)
class JobUpdate:
    """A write to one record. What is None stays as it is.

    Attributes:
        id: the record.
        output: written when ``state`` is terminal, None included.
        metadata: replaces what is stored.
        records: replaces what is stored.
        log: what the job printed; replaces what is stored.
        if_version: the version that the writer has read; at any other the write is refused.
    """

    id: str
    state: JobState | None = None
    output: Any = None
    error: ErrorInfo | None = None
    cause: JobCause | None = None
    metadata: Mapping[str, Any] | None = None
    records: Sequence[Mapping[str, Any]] | None = None
    attempt: int | None = None
    worker: str | None = None
    if_version: int | None = None
    log: str | None = None

    @property
    def ends(self) -> bool:
        """Whether the record is final after it."""
        return self.state in TERMINAL_STATES

    @classmethod
    def of(cls, job: Job) -> JobUpdate:
        """All of a job as it is now. The state is read first: once it is terminal, all the rest is final."""
        state = job.state
        printed = job.printed if state in TERMINAL_STATES else None
        return cls(
            job.id,
            state,
            job.output,
            job.error,
            job.cause,
            job.measured,
            job.recorded,
            job.attempt,
            log=None if printed is None else str(printed),
        )


class Storage(ABC):
    """Where the records of searches live. It knows nothing of backends and evaluators.

    What every storage guarantees, and :class:`evalkit.testing.StorageSuite` checks:

    - **Threads and processes.** Every method may be called from any thread. Two processes that open the same URL see
      one storage (``memory://`` and ``null://`` are private to the object).
    - **Atomic.** A call happens whole or not at all: one bad update in a batch, and none of the batch is written. The
      updates of a batch happen in its order, so a second one to a job sees the first.
    - **Durable.** What a call wrote is there after a ``kill -9`` of this process once the call has returned.
    - **Final.** A record in a terminal state never changes again: ``update_jobs`` raises ``FinalStateError``.
    - **Held.** A job that is put back to QUEUED, by whatever call, is held by nobody; one that ends keeps its
      ``worker``, who ran it, and has no lease.
    - **Ids.** ``"<search>.<number>"``; numbers start at 0 and grow in the order of creation; no two writers ever get
      the same.
    - **Versions.** A record's ``version`` starts at 1 and grows with every write to it.
    - **Values.** Arguments, outputs, metadata and values keep their types as far as JSON, numbers (NaN and ±inf as they
      are), tuples, bytes, numpy scalars and arrays and datetimes go; what cannot be held in this way is kept as a
      pickle that is opened only with ``allow_pickle=True``, and is handed out as an ``OpaqueValue`` without it. What
      does not pickle, whatever its methods raise, or is larger than the storage takes, leaves an ``UnstorableValue`` in
      its place; the values beside it are kept. Nothing is dropped for its type, and no value makes a call raise.
    - **Cost.** Every call costs what it touches, never what the search has grown to.
    - **Errors.** A storage that is locked, full or away raises ``StorageUnavailableError`` after a bounded wait, with
      nothing written.

    A subclass implements the abstract methods and ``from_url``, and passes the suite.
    """

    #: Whether what is written outlives this process.
    durable: bool = True

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open the storage that ``url`` names; credentials in it are never stored nor shown.

        Raises:
            StorageURLError: the URL is not one of this storage.
            StorageUnavailableError: it names a place that cannot be opened.
            StorageFormatError: what is there is not of evalkit, or is of a newer schema.
        """
        raise NotImplementedError(f"{cls.__name__} cannot be opened by URL")

    @property
    @abstractmethod
    def url(self) -> str:
        """What names it, without credentials."""

    # -- searches -------------------------------------------------------------------------------------------------

    @abstractmethod
    def create_search(self, search_id: str | None = None) -> str:
        """Create a search and return its id.

        Args:
            search_id: its name; None takes the smallest decimal number that is free (``"0"``, ``"1"``, …).

        Raises:
            SearchExistsError: there is one of that name.
        """

    @abstractmethod
    def list_searches(self) -> list[str]:
        """The ids of all searches, oldest first."""

    @abstractmethod
    def load_search(self, search_id: str) -> SearchRecord:
        """Read a search.

        Raises:
            SearchNotFoundError: there is none of that id; names a close match if there is one.
        """

    @abstractmethod
    def delete_search(self, search_id: str) -> None:
        """Delete a search with all its jobs. Raises ``SearchNotFoundError``."""

    @abstractmethod
    def set_value(self, search_id: str, key: str, value: Any) -> None:
        """Keep a value with a search, over what was there. Raises ``SearchNotFoundError``."""

    @abstractmethod
    def get_value(self, search_id: str, key: str, default: Any = None) -> Any:
        """Read a value of a search. Raises ``SearchNotFoundError``."""

    # -- jobs -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def create_jobs(
        self, search_id: str, args_list: Sequence[Mapping[str, Any]], *, owner: str | None = None
    ) -> list[str]:
        """Create QUEUED jobs in one round trip and return their ids, in order. Raises ``SearchNotFoundError``."""

    @abstractmethod
    def update_jobs(self, updates: Sequence[JobUpdate]) -> None:
        """Write a batch, whole or not at all; the jobs may be of several searches.

        Raises:
            JobNotFoundError: one of the records does not exist.
            VersionConflictError: one of the records is not at ``if_version``.
            FinalStateError: one of the records is terminal.
        """

    def end_jobs(self, jobs: Sequence[Job]) -> None:
        """Write the ends of jobs of one search, which will not change any more; raises what ``update_jobs`` raises.

        A storage that nobody else sees may keep the handles, and write when it is next read.
        """
        self.update_jobs([JobUpdate.of(job) for job in jobs])

    @abstractmethod
    def load_jobs(
        self,
        search_id: str,
        ids: Iterable[str] | None = None,
        states: Collection[JobState] | None = None,
    ) -> list[JobRecord]:
        """Read jobs, by number; of the given ids only, in the given states only.

        Raises:
            SearchNotFoundError: there is no such search.
            JobNotFoundError: one of ``ids`` does not exist.
        """

    def load_log(self, job_id: str) -> str:
        """Read what a job printed; ``""`` if it printed nothing, or this storage keeps no logs.

        Logs are large beside everything else, so they are not part of the records.

        Raises:
            JobNotFoundError: there is no such job.
        """
        return ""

    @abstractmethod
    def count_jobs(self, search_id: str) -> dict[JobState, int]:
        """How many jobs are in each state (states with none are left out). Raises ``SearchNotFoundError``."""

    @abstractmethod
    def changes(self, search_id: str, cursor: int = 0) -> tuple[list[JobRecord], int]:
        """What was written since ``cursor``, at the cost of what was written.

        Args:
            cursor: what the last call returned; 0 for the beginning.

        Returns:
            the records that were created or written since, each once and as it is now, in the order of their last
            write; and the cursor for the next call. No write is ever missed, from whatever writer.

        Raises:
            SearchNotFoundError: there is no such search.
        """

    # -- the queue that pull workers draw from --------------------------------------------------------------------

    @abstractmethod
    def claim_jobs(self, search_id: str, n: int, worker: str, lease: float) -> list[JobRecord]:
        """Take up to ``n`` QUEUED jobs, lowest number first: they become RUNNING, with ``worker`` and a lease.

        No job is ever claimed by two workers at once.

        Args:
            n: at least 1; ``ValueError`` otherwise.
            worker: who takes them.
            lease: seconds after which they may be given to another unless the lease is renewed.
        """

    @abstractmethod
    def renew_leases(self, ids: Sequence[str], worker: str, lease: float) -> list[str]:
        """Renew the leases for ``lease`` seconds from now; return the ids that ``worker`` still holds.

        A job held by nobody, by another, or ended is not renewed and not returned. The records do not change by it,
        neither in their ``version`` nor in ``changes``: with the version that its claim gave it, a worker can write
        its result and be sure that nobody else has had the job meanwhile, however often it has renewed.
        """

    @abstractmethod
    def release_expired(self, search_id: str, now: float | None = None) -> list[str]:
        """Put RUNNING jobs whose lease has run out back to QUEUED, one attempt on, held by nobody; return their ids.

        Args:
            now: seconds since the Unix epoch; None for the clock's.
        """

    def close(self) -> None:  # noqa: B027 - many a storage has nothing to let go of
        """Let go of connections and files. Using it afterwards opens them again or raises ``StorageError``."""
