"""BackendSuite: the tests that every backend is held to."""

from __future__ import annotations

import pytest

# Before they are imported, so that a failure shows the values in its assertion.
pytest.register_assert_rewrite(
    "evalkit.testing.backend_arrays",
    "evalkit.testing.backend_control",
    "evalkit.testing.backend_events",
    "evalkit.testing.backend_failures",
    "evalkit.testing.backend_gather",
    "evalkit.testing.backend_outputs",
    "evalkit.testing.backend_programs",
    "evalkit.testing.backend_resources",
    "evalkit.testing.backend_values",
)

from evalkit.testing.backend_arrays import BackendArrays  # noqa: E402
from evalkit.testing.backend_control import BackendCancel, BackendEnd, BackendReports  # noqa: E402
from evalkit.testing.backend_events import BackendEvents  # noqa: E402
from evalkit.testing.backend_failures import (  # noqa: E402
    BackendCrashes,
    BackendExceptions,
    BackendRetries,
    BackendTimeouts,
)
from evalkit.testing.backend_gather import BackendCallbacks, BackendGather, BackendSurroundings  # noqa: E402
from evalkit.testing.backend_outputs import BackendOutputs  # noqa: E402
from evalkit.testing.backend_programs import BackendPrograms  # noqa: E402
from evalkit.testing.backend_resources import BackendResources  # noqa: E402
from evalkit.testing.backend_values import BackendFunctions, BackendValues  # noqa: E402

__all__ = ["BackendSuite"]


class BackendSuite(
    BackendGather,
    BackendCallbacks,
    BackendSurroundings,
    BackendExceptions,
    BackendCrashes,
    BackendRetries,
    BackendTimeouts,
    BackendReports,
    BackendCancel,
    BackendEnd,
    BackendValues,
    BackendFunctions,
    BackendArrays,
    BackendOutputs,
    BackendEvents,
    BackendPrograms,
    BackendResources,
):
    """The conformance suite of :class:`evalkit.backends.Backend`.

    A backend's test file subclasses it::

        class TestMyBackend(BackendSuite):
            method = "mine"
            options = {"partition": "debug"}

    A backend that no plugin names overrides ``create`` instead::

        class TestMyBackend(BackendSuite):
            def create(self, run_function, **kwargs):
                backend = MyBackend(kwargs.pop("num_workers", 1))
                return Evaluator(self.prepare(run_function), backend, **kwargs)

    What a backend is held to follows from the :class:`evalkit.backends.Capabilities` that it states: what it lacks is
    skipped, or tested for what is documented of its lack, such as that a job past its time is abandoned where none can
    be killed. Tests and jobs wait for one another through files in ``tmp_path``, which the workers have to see. The run
    functions are in :mod:`evalkit.testing.functions`, which the workers have to be able to import.

    Attributes:
        method: what ``Evaluator.create`` is called with.
        options: further keyword arguments for every evaluator of the suite.
        coroutines: whether the run functions are to be coroutine functions.
        says_how_workers_die: whether the error of a crashed job has the exit code or the signal of its worker; engines
            that do not tell set it to False.
        takes_back: whether a job that was dispatched and has not started can still be kept from running; engines that
            hold tasks ahead and do not give them back set it to False.
        exits_at_once: whether a program that ends without ``close`` ends although a job of it runs on; engines that
            wait for it then, as the executors of the standard library do, set it to False.
        kills_children: whether what a job has started ends with it when it is killed, for a backend whose jobs have
            processes of their own; engines that only know their own workers set it to False.
        tiny_jobs: how many jobs there are in the test of ten thousand tiny ones; fewer where each is a process.
        grace: seconds that a job that is asked to stop has, in tests where it does not listen.
    """
