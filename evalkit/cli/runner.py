"""What ``evalkit run`` does once its options are read: open or resume a search, drive an evaluator, come to an end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from evalkit.backends.base import Backend
from evalkit.callbacks import Callback
from evalkit.cli.console import FAILED, RESUME, USAGE, err, fail, unread_is_fine, warn
from evalkit.cli.deadline import Deadline
from evalkit.cli.display import display_for
from evalkit.cli.feed import Feed
from evalkit.cli.interrupts import Interrupts
from evalkit.cli.logs import LogStream
from evalkit.cli.output import OutputCallback, stored_ids, writer_for
from evalkit.cli.records import is_settled, iterate, job_of, superseded
from evalkit.cli.rescue import rescue, resume_line
from evalkit.cli.session import Backlog, RunInfo, check_seed, find_search, hint_at
from evalkit.cli.source import Source, new_seed
from evalkit.cli.summary import print_summary
from evalkit.cli.watch import Watch
from evalkit.engine.clock import Clock
from evalkit.errors import EvalkitError, ParametersError, SearchExistsError, StorageError, StorageUnavailableError
from evalkit.evaluator import Evaluator
from evalkit.storage.base import SearchRecord, Storage

__all__ = ["RunOptions", "Runner"]

_STOP_PATIENCE = 10.0  # seconds in which a signal is noted, and the evaluator asked to stop
_PATIENCE = 120.0  # seconds for which a storage that is away is waited for


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of ``evalkit run``, as they were given.

    Attributes:
        settings: of the evaluator: the job timeout, the retries, the grace.
        timeout: of the whole run, in seconds.
        deadline: at which the process may be killed.
    """

    target: str
    backend: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    search: str | None = None
    resume: bool = False
    retry_failed: bool = False
    seed: int | None = None
    output: str | None = None
    timeout: float | None = None
    deadline: Deadline | None = None
    minimize: bool = False
    verbose: bool = False
    quiet: bool = False


class Runner:
    """One run.

    Args:
        function: the run function.
        source: of configurations; None to run what the search has left over.
        storage: open.
        backend: not started; it drives.
    """

    def __init__(
        self,
        options: RunOptions,
        function: Callable[..., Any],
        source: Source | None,
        storage: Storage,
        backend: Backend,
    ) -> None:
        self._options = options
        self._function = function
        self._storage = storage
        self._backend = backend
        self._source = source
        self._backlog: Backlog | None = None
        self._watch = Watch(minimize=options.minimize)
        self._created = False
        self._take_all = False

    def run(self, interrupts: Interrupts) -> int:
        """Do it, and return the exit code.

        Raises:
            EvalkitError, ValueError, TypeError: before anything runs: the options do not fit together.
        """
        interrupts.note()
        search_id, info = self._open_search()
        try:
            writer = Callback() if self._options.output is None else writer_for(self._options.output)
            output = OutputCallback(writer)
            self._complete_output(search_id, writer)
            logs = [LogStream(err().print)] if self._options.verbose else []
            evaluator = self._create(search_id, [self._watch, output, *logs])
        except BaseException:
            if self._created:
                self._storage.delete_search(search_id)
            raise
        return self._drive(evaluator, info, output, interrupts)

    # -- before -----------------------------------------------------------------------------------------------------

    def _open_search(self) -> tuple[str, RunInfo]:
        options, storage = self._options, self._storage
        identity = {} if self._source is None else self._source.identity
        if options.resume and not storage.durable:
            raise ParametersError(f"--resume needs a storage that keeps results, and {storage.url} does not")
        search = find_search(storage, options.search, options.target, identity) if options.resume else None
        if search is not None:
            return search.id, self._resume(search)
        if self._source is None:
            raise ParametersError(self._nothing_to_run())
        try:
            search_id = storage.create_search(options.search)
        except SearchExistsError:
            raise SearchExistsError(
                f"there is a search {options.search!r} in {storage.url} already: continue it with --resume, or choose "
                "another name with --search"
            ) from None
        self._created = True
        if options.resume:
            close = "" if options.search is None else hint_at(storage, options.search, search_id)
            self._say(f"there is nothing to resume{close or ':'} starting search {search_id!r}")
        return search_id, self._save_info(search_id, self._source, options.seed, None)

    def _nothing_to_run(self) -> str:
        options = self._options
        if not options.resume:
            return "say what to run with: --params FILE, --grid NAME=V1,V2 or --random N --space NAME=LOW:HIGH"
        if options.search is None:
            return f"{self._storage.url} has no search of {options.target} to resume; evalkit ls lists what there is"
        hint = hint_at(self._storage, options.search)
        return f"there is no search {options.search!r} in {self._storage.url} to resume{hint}"

    def _resume(self, search: SearchRecord) -> RunInfo:
        options = self._options
        before = RunInfo.of(search)
        backlog = Backlog(self._storage, search, retry_failed=options.retry_failed, see=self._watch.add_before)
        seed = options.seed
        if self._source is not None and self._source.is_random:
            seed = check_seed(options.seed, before, search.id)
        failed = f", {backlog.failed:,} of them failed (--retry-failed runs them again)" if backlog.failed else ""
        again = f"; {backlog.left:,} that were not done run again" if backlog.left else ""
        self._say(f"resuming search {search.id!r}: {backlog.done:,} configurations are done{failed}{again}")
        if before is not None and before.target != options.target:
            warn(f"search {search.id!r} was run with {before.target} before")
        if self._source is None:
            # What is stored is all there is to run; what is done is not among it.
            self._source = Source("what was left", lambda _: backlog.configurations(), backlog.left)
            if before is not None and not before.exhausted and before.source:
                warn(
                    "the run that is resumed had not come to the end of its configurations: to run the rest too, give "
                    "the same --params, --grid or --random again"
                )
            self._take_all = True
        self._backlog = backlog
        return self._save_info(search.id, self._source, seed, before)

    def _save_info(self, search_id: str, source: Source, seed: int | None, before: RunInfo | None) -> RunInfo:
        if source.is_random and seed is None:
            seed = new_seed()
        identity = source.identity or (before.source if before is not None else {})
        if before is not None and not source.is_random:
            seed = before.seed
        info = RunInfo(self._options.target, identity, seed, self._options.minimize)
        if before is not None and not source.identity:
            info.exhausted = before.exhausted
        info.save(self._storage, search_id)
        return info

    def _complete_output(self, search_id: str, writer: Callback) -> None:
        """Write the rows that a kill kept from being written, of jobs that the storage knows to be done."""
        if self._backlog is None or self._options.output is None:
            return
        there = stored_ids(self._options.output)
        gone = superseded(self._storage, self._storage.load_search(search_id))
        for record in iterate(self._storage, search_id):
            if is_settled(record) and record.id not in there and record.id not in gone:
                writer.on_done(job_of(record))

    def _create(self, search_id: str, callbacks: Sequence[Callback]) -> Evaluator:
        options = self._options
        evaluator = Evaluator(
            self._function,
            self._backend,
            storage=self._storage,
            search_id=search_id,
            callbacks=callbacks,
            **options.settings,
        )
        try:
            evaluator.timeout = options.timeout
        except BaseException:
            evaluator.close()
            raise
        return evaluator

    # -- while ------------------------------------------------------------------------------------------------------

    def _drive(self, evaluator: Evaluator, info: RunInfo, output: OutputCallback, interrupts: Interrupts) -> int:
        source, backlog = self._source, self._backlog
        if source is None:
            raise AssertionError("a run without configurations was refused before")
        feed = Feed(
            evaluator,
            source.configurations(info.seed or 0),
            take=(lambda _: True) if backlog is None or self._take_all else (lambda args: not backlog.is_done(args)),
            announce=(lambda _: None) if backlog is None else backlog.note_submit,
            patience=_PATIENCE,
        )
        expected = 0 if backlog is None or self._take_all else backlog.done

        def total() -> int | None:
            if feed.exhausted or source.total is None:
                return feed.taken if feed.exhausted else None
            return max(source.total - max(expected, feed.skipped), feed.taken)

        seed = f" (seed {info.seed})" if source.is_random else ""
        self._say(
            f"search {evaluator.search_id!r} in {self._storage.url}: {source.label}{seed}, on {self._options.backend} "
            f"with {evaluator.num_workers} worker{'s' if evaluator.num_workers > 1 else ''}"
        )
        if self._options.deadline is not None:
            self._say(f"deadline {self._options.deadline} ({self._options.deadline.why})")
        started = time.monotonic()
        trouble: BaseException | None = None

        def stop() -> None:
            self._say(f"{interrupts.name}: what runs gets its grace; once more ends it at once")
            feed.stop()
            evaluator.stop(interrupts.name)

        interrupts.call(stop)
        with closing(Clock("evalkit-deadline")) as clock:
            try:
                with display_for(
                    self._watch, total, lambda: self._time_left(evaluator), err(), quiet=self._options.quiet
                ):
                    self._keep_deadline(evaluator, feed, clock)
                    feed.start()
                    self._gather(evaluator, feed, interrupts)
                    trouble = feed.error
            except StorageError as exc:
                trouble = exc
            reason = evaluator.stop_reason
            trouble = self._close(evaluator, feed, trouble)
            if isinstance(trouble, StorageError):
                fail(str(trouble))
                rescue(evaluator.search_id, output.waiting)
            info.exhausted = info.exhausted or feed.exhausted
            try:
                info.end(self._storage, evaluator.search_id)
            except StorageError as exc:
                trouble = trouble or exc
            return self._conclude(evaluator.search_id, feed, trouble, reason, time.monotonic() - started, interrupts)

    def _time_left(self, evaluator: Evaluator) -> float:
        deadline = self._options.deadline
        return evaluator.time_left if deadline is None else min(evaluator.time_left, deadline.until_stop)

    def _keep_deadline(self, evaluator: Evaluator, feed: Feed, clock: Clock) -> None:
        deadline = self._options.deadline
        if deadline is None:
            return
        reason = f"the deadline {deadline}"

        def start_nothing() -> None:
            feed.stop()
            evaluator.stop(f"{reason} was near", running=False)
            self._say(f"{reason} is near: nothing more is started, and what runs has {deadline.until_stop:.0f} s left")

        clock.call_later(deadline.until_last_start, start_nothing)
        clock.call_later(deadline.until_stop, evaluator.stop, f"{reason} has come")

    def _gather(self, evaluator: Evaluator, feed: Feed, interrupts: Interrupts) -> None:
        """Gather until nothing is out and nothing comes any more."""
        away_since: float | None = None
        while feed.wait_for_work():
            try:
                jobs = evaluator.gather("BATCH", 1)
            except KeyboardInterrupt:
                # It has ended the job that ran in this thread. Nothing starts after it.
                if not interrupts.stopped.wait(_STOP_PATIENCE):
                    raise
                continue
            except StorageUnavailableError:
                now = time.monotonic()
                away_since = away_since or now
                if now - away_since > _PATIENCE or evaluator.stop_reason is not None:
                    raise
                warn("the storage is not available: results are kept in memory, and written when it is back")
                continue
            if away_since is not None:
                away_since = None
                self._say("the storage is back, and has what was kept")
            feed.gathered(len(jobs))

    def _close(self, evaluator: Evaluator, feed: Feed, trouble: BaseException | None) -> BaseException | None:
        """Release everything, in bounded time, whatever has happened; return the trouble, if there is any."""
        try:
            feed.stop()
            if trouble is not None:
                evaluator.stop("the run cannot go on")
            feed.join(5.0)
            evaluator.close()
        except StorageError as exc:
            return exc
        return trouble

    # -- after ------------------------------------------------------------------------------------------------------

    def _conclude(
        self,
        search_id: str,
        feed: Feed,
        trouble: BaseException | None,
        reason: str | None,
        seconds: float,
        interrupts: Interrupts,
    ) -> int:
        if self._created and feed.taken == 0 and isinstance(trouble, ParametersError):
            self._storage.delete_search(search_id)  # nothing is in it, and nothing will be
            raise trouble
        tally = self._watch.tally
        if not self._options.quiet:
            with unread_is_fine():
                print_summary(self._watch, search_id, self._storage, feed.skipped, seconds)
        unfinished = trouble is not None or reason is not None or tally.cancelled > 0 or not feed.exhausted
        if reason is not None and trouble is None:
            warn(f"not every configuration was run: {reason}")
        code = FAILED if tally.failures or unfinished else 0
        if unfinished and trouble is None:
            if interrupts.number is not None:
                code = interrupts.exit_code
            elif self._options.deadline is not None and self._options.deadline.until_last_start <= 0:
                code = RESUME
        if isinstance(trouble, ParametersError):
            fail(f"{trouble}; the {feed.taken + feed.skipped:,} configurations before it were run")
            code = USAGE
        elif isinstance(trouble, Exception) and not isinstance(trouble, EvalkitError):
            raise trouble
        if unfinished and self._storage.durable:
            options = self._options
            named, resumed = options.search is not None, options.resume
            err().print(f"to resume: {resume_line(search_id, self._storage.url, named=named, resumed=resumed)}")
        return code

    def _say(self, message: str) -> None:
        if not self._options.quiet:
            err().print(message)
