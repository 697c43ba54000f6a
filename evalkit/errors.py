"""Every error that evalkit raises on purpose.

::

    EvalkitError
    ├── EvaluatorClosedError          (RuntimeError)  used after close()
    ├── GatherInCallbackError         (RuntimeError)  a callback waits for itself
    ├── SearchStoppedError                            submit after a stop or the end of the time budget
    │   └── MaximumJobsSpawnReached                   submit would pass the maximum number of jobs
    ├── ParametersError               (ValueError)    parameters that are not mappings, or a bad file of them
    ├── TargetError                   (ValueError)    a "file.py:function" that does not lead to a callable
    ├── IllegalTransitionError        (RuntimeError)  a job state that cannot follow another
    ├── JobResultError                                the result of a job was asked for, and there is none
    │   ├── JobNotCompleteError       (RuntimeError)
    │   ├── JobFailedError            (RuntimeError)
    │   └── JobCancelledError         (RuntimeError)
    ├── SerializationError            (TypeError)     an object that does not pickle, with the path to the culprit
    ├── PluginError
    │   ├── UnknownPluginError        (ValueError)    no backend or storage of that name
    │   ├── PluginNotInstalledError   (ValueError)    a known name whose distribution is missing
    │   └── BrokenPluginError         (ValueError)    it is installed and does not load
    ├── BackendError                  (RuntimeError)  an engine that cannot start or is broken for good
    └── StorageError
        ├── StorageURLError           (ValueError)    a URL that no storage understands
        ├── StorageUnavailableError   (OSError)       locked, full, away, unwritable
        ├── StorageFormatError        (ValueError)    not a database, or one of a newer schema
        ├── SearchNotFoundError       (LookupError)
        ├── SearchExistsError         (ValueError)
        ├── JobNotFoundError          (LookupError)
        ├── VersionConflictError                      compare-and-swap lost against another writer
        ├── FinalStateError           (ValueError)    a write to a record that is terminal
        └── UntrustedPickleError      (ValueError)    a pickle that was not allowed to be opened
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evalkit.job import Job

__all__ = [
    "BackendError",
    "BrokenPluginError",
    "EvalkitError",
    "EvaluatorClosedError",
    "FinalStateError",
    "GatherInCallbackError",
    "IllegalTransitionError",
    "JobCancelledError",
    "JobFailedError",
    "JobNotCompleteError",
    "JobNotFoundError",
    "JobResultError",
    "MaximumJobsSpawnReached",
    "ParametersError",
    "PluginError",
    "PluginNotInstalledError",
    "SearchExistsError",
    "SearchNotFoundError",
    "SearchStoppedError",
    "SerializationError",
    "StorageError",
    "StorageFormatError",
    "StorageURLError",
    "StorageUnavailableError",
    "TargetError",
    "UnknownPluginError",
    "UntrustedPickleError",
    "VersionConflictError",
]


class EvalkitError(Exception):
    """The base of every error that evalkit raises on purpose."""


class EvaluatorClosedError(EvalkitError, RuntimeError):
    """The evaluator was used after ``close()``."""


class GatherInCallbackError(EvalkitError, RuntimeError):
    """A callback called ``gather`` or ``close``: it would wait for itself."""


class SearchStoppedError(EvalkitError):
    """Nothing more can be submitted to this evaluator.

    Attributes:
        reason: why the search stopped, in words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class MaximumJobsSpawnReached(SearchStoppedError):  # noqa: N818 - the name search loops know
    """A submit would pass the maximum; none of its jobs was submitted.

    Attributes:
        maximum: the limit that was set.
        submitted: how many jobs were submitted before.
    """

    def __init__(self, maximum: int, submitted: int) -> None:
        super().__init__(
            f"the maximum of {maximum} jobs would be passed: {submitted} were submitted before; "
            "submit fewer, or raise it with set_maximum_num_jobs_submitted()"
        )
        self.maximum = maximum
        self.submitted = submitted


class ParametersError(EvalkitError, ValueError):
    """Parameters that no job can be made of.

    Attributes:
        file: the file they came from, if any.
        line: the line in it, counted from 1, if known.
    """

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None) -> None:
        where = "" if file is None else f"{file}: " if line is None else f"{file}, line {line}: "
        super().__init__(where + message)
        self.file = file
        self.line = line


class TargetError(EvalkitError, ValueError):
    """A target that does not lead to a callable."""


class IllegalTransitionError(EvalkitError, RuntimeError):
    """A job state that cannot follow the present one."""


class JobResultError(EvalkitError):
    """The result of a job was asked for, and there is none.

    Attributes:
        job: the job that was asked.
    """

    def __init__(self, message: str, job: Job) -> None:
        super().__init__(message)
        self.job = job


class JobNotCompleteError(JobResultError, RuntimeError):
    """The job has not ended yet."""


class JobFailedError(JobResultError, RuntimeError):
    """The job failed; ``job.error`` and ``job.cause`` say how."""


class JobCancelledError(JobResultError, RuntimeError):
    """The job was cancelled or pruned before it had a result."""


class SerializationError(EvalkitError, TypeError):
    """An object cannot travel to another process.

    Attributes:
        path: where in the object the culprit sits, such as ``args['model'].lock``.
    """

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.path)


class PluginError(EvalkitError):
    """Something is wrong with a plugin.

    Attributes:
        plugin: its name.
    """

    def __init__(self, message: str, plugin: str) -> None:
        super().__init__(message)
        self.plugin = plugin


class UnknownPluginError(PluginError, ValueError):
    """No backend or storage has that name."""


class PluginNotInstalledError(PluginError, ValueError):
    """The name is known, and the distribution that provides it is not installed."""


class BrokenPluginError(PluginError, ValueError):
    """The plugin is installed and does not load."""


class BackendError(EvalkitError, RuntimeError):
    """An engine cannot start, or is broken for good."""


class StorageError(EvalkitError):
    """Something is wrong with a storage."""


class StorageURLError(StorageError, ValueError):
    """A URL that no storage understands."""


class StorageUnavailableError(StorageError, OSError):
    """The storage is locked, full, away or not writable; trying again later may work."""


class StorageFormatError(StorageError, ValueError):
    """The file is not a database of evalkit, or its schema is newer than this evalkit."""


class SearchNotFoundError(StorageError, LookupError):
    """No search has that id in this storage.

    Attributes:
        search_id: the id that was asked for.
    """

    def __init__(self, message: str, search_id: str) -> None:
        super().__init__(message)
        self.search_id = search_id


class SearchExistsError(StorageError, ValueError):
    """A search of that id exists already."""


class JobNotFoundError(StorageError, LookupError):
    """No job has that id in this storage."""


class VersionConflictError(StorageError):
    """A record is at another version than the one the writer had read.

    Attributes:
        job_id: the record.
        expected: the version that the writer had read.
        found: the version in the storage.
    """

    def __init__(self, job_id: str, expected: int, found: int) -> None:
        super().__init__(
            f"job {job_id} is at version {found}, not {expected}: another writer came first; "
            "load it again and decide anew"
        )
        self.job_id = job_id
        self.expected = expected
        self.found = found


class FinalStateError(StorageError, ValueError):
    """A record in a terminal state cannot change."""


class UntrustedPickleError(StorageError, ValueError):
    """A stored value is a pickle; opening one runs code, so it needs ``allow_pickle=True``."""
