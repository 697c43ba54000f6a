"""Discovery: from the name of a backend or storage to its class, with broken plugins kept apart."""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pluggy

from evalkit import builtin, hookspecs
from evalkit.backends.base import Backend, BackendSpec
from evalkit.errors import BrokenPluginError, PluginNotInstalledError, StorageURLError, UnknownPluginError
from evalkit.storage.base import Storage, StorageSpec
from evalkit.version import __version__

if TYPE_CHECKING:
    from evalkit.evaluator import Evaluator

__all__ = ["BrokenPlugin", "Origin", "Plugins", "close_match", "plugins"]

_log = logging.getLogger("evalkit")

Spec = TypeVar("Spec", BackendSpec, StorageSpec)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a plugin comes from.

    Attributes:
        name: of its entry point; ``evalkit`` for the built-ins.
        distribution: that ships it.
        version: of the distribution.
    """

    name: str
    distribution: str
    version: str


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """A plugin that is installed and does not load.

    Attributes:
        origin: which one.
        reason: the exception, in one line.
        traceback: all of it.
    """

    origin: Origin
    reason: str
    traceback: str


@dataclass(slots=True)
class _Table(Generic[Spec]):
    """The specs of one kind: name -> (spec, origin)."""

    kind: str
    unknown: str  # what is said of a name that is not there
    known: Mapping[str, str] = field(default_factory=dict)
    specs: dict[str, tuple[Spec, Origin]] = field(default_factory=dict)


class Plugins:
    """The plugins that are installed, loaded once.

    Attributes:
        broken: the plugins that do not load; they give no names, and harm nobody.
        hook: calls the hooks of all others.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self.hook = self._manager.hook
        self.broken: list[BrokenPlugin] = []
        self._backends: _Table[BackendSpec] = _Table("backend", "no backend is called {!r}", builtin.KNOWN_BACKENDS)
        self._storages: _Table[StorageSpec] = _Table("storage", "no storage for {}:// is installed")
        import importlib.metadata  # slow, and needed here only

        self._add(Origin("evalkit", "evalkit-core", __version__), builtin)
        for entry_point in importlib.metadata.entry_points(group=hookspecs.PROJECT):
            dist = entry_point.dist
            origin = Origin(entry_point.name, dist.name if dist else "?", dist.version if dist else "?")
            try:
                self._add(origin, entry_point.load())
            except (Exception, SystemExit) as exc:  # noqa: BLE001 - a stranger's module may do anything
                self._set_aside(origin, exc)

    def _add(self, origin: Origin, plugin: Any) -> None:
        """Register a plugin, whole or not at all."""
        name = f"{origin.distribution}:{origin.name}"
        self._manager.register(plugin, name=name)
        try:
            # A misspelt hook is an error of this plugin, not a silence.
            self._manager.check_pending()
            own = self._manager.subset_hook_caller
            others = [other for other in self._manager.get_plugins() if other is not plugin]
            backends = _flatten(own("evalkit_backends", others)(), BackendSpec)
            storages = _flatten(own("evalkit_storages", others)(), StorageSpec)
            self._check_free(self._backends, [spec.name for spec in backends])
            self._check_free(self._storages, [spec.scheme for spec in storages])
        except BaseException:
            self._manager.unregister(plugin)
            raise
        self._backends.specs |= {spec.name: (spec, origin) for spec in backends}
        self._storages.specs |= {spec.scheme: (spec, origin) for spec in storages}

    def _check_free(self, table: _Table[Any], names: Iterable[str]) -> None:
        for name in names:
            if name in table.specs:
                owner = table.specs[name][1]
                raise ValueError(
                    f"the {table.kind} {name!r} is already provided by {owner.distribution} {owner.version}"
                )

    def _set_aside(self, origin: Origin, exc: BaseException) -> None:
        reason = f"{type(exc).__name__}: {exc}"
        self.broken.append(BrokenPlugin(origin, reason, "".join(traceback.format_exception(exc))))

    def announce(self, evaluator: Evaluator) -> None:
        """Call ``evalkit_evaluator_created`` of every plugin; one that raises is logged, and the others are called."""
        for plugin in self._manager.get_plugins():
            others = [other for other in self._manager.get_plugins() if other is not plugin]
            try:
                self._manager.subset_hook_caller("evalkit_evaluator_created", others)(evaluator=evaluator)
            except Exception:  # noqa: BLE001 - a stranger's hook may do anything
                _log.exception("plugin %s failed in evalkit_evaluator_created", self._manager.get_name(plugin))

    # -- looking up -----------------------------------------------------------------------------------------------

    @property
    def backends(self) -> Mapping[str, tuple[BackendSpec, Origin]]:
        """Name -> spec and origin."""
        return self._backends.specs

    @property
    def storages(self) -> Mapping[str, tuple[StorageSpec, Origin]]:
        """Scheme -> spec and origin."""
        return self._storages.specs

    def backend_class(self, name: str) -> type[Backend]:
        """The class of a backend, imported now.

        Raises:
            UnknownPluginError: no such name; names the close match.
            PluginNotInstalledError: a known plugin is missing; names the line that installs it.
            BrokenPluginError: it is there and does not load.
        """
        spec = self._find(self._backends, name)
        return _load(spec.target, spec.name, spec.install, "backend", Backend)  # type: ignore[type-abstract]

    def open_storage(self, url: str) -> Storage:
        """Open the storage that a URL names.

        Raises:
            StorageURLError: it is not a URL, or no storage has its scheme.
            PluginNotInstalledError, BrokenPluginError: as :meth:`backend_class`.
            StorageError: the storage cannot be opened.
        """
        scheme, separator, _ = url.partition("://")
        if not separator or not scheme:
            raise StorageURLError(
                f"{url!r} is not the URL of a storage: it has no '://'; a file is written sqlite:///{url or 'study.db'}"
            )
        base = scheme.partition("+")[0].lower()
        try:
            spec = self._find(self._storages, base)
        except UnknownPluginError as exc:
            raise StorageURLError(str(exc)) from None
        return _load(spec.target, base, spec.install, "storage", Storage).from_url(url)  # type: ignore[type-abstract]

    def _find(self, table: _Table[Spec], name: str) -> Spec:
        if name in table.specs:
            return table.specs[name][0]
        for broken in self.broken:
            known = table.known.get(name, "")
            if broken.origin.name == name or known.endswith(f"/{broken.origin.distribution}"):
                raise BrokenPluginError(
                    f"the {table.kind} {name!r} comes from the plugin {broken.origin.name} "
                    f"({broken.origin.distribution} {broken.origin.version}), which does not load: {broken.reason}",
                    name,
                )
        if name in table.known:
            raise PluginNotInstalledError(f"the {table.kind} {name!r} is not installed; {table.known[name]}", name)
        candidates = sorted({*table.specs, *table.known})
        hint = "".join(f"; the plugin {broken.origin.name} does not load ({broken.reason})" for broken in self.broken)
        raise UnknownPluginError(
            f"{table.unknown.format(name)}{close_match(name, candidates)}; "
            f"there are: {', '.join(candidates)}; a plugin may bring others{hint}",
            name,
        )


def close_match(name: str, candidates: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` if one of the candidates is close, else nothing."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f", did you mean {matches[0]!r}?" if matches else ""


@functools.cache
def plugins() -> Plugins:
    """The plugins that are installed; found at the first call."""
    return Plugins()


def _flatten(results: Iterable[Any], kind: type[Spec]) -> list[Spec]:
    specs = []
    for result in results:
        for spec in result:
            if not isinstance(spec, kind):
                raise TypeError(f"expected a {kind.__name__}, got {spec!r}")
            specs.append(spec)
    return specs


_Class = TypeVar("_Class")


def _load(target: str, name: str, install: str, kind: str, base: type[_Class]) -> type[_Class]:
    module_name, _, attribute = target.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), attribute)
    except Exception as exc:
        remedy = f"; to install what it needs: {install}" if install else ""
        raise BrokenPluginError(
            f"the {kind} {name!r} cannot be loaded from {target}: {type(exc).__name__}: {exc}{remedy}", name
        ) from exc
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise BrokenPluginError(f"the {kind} {name!r} at {target} is {cls!r}, not a subclass of {base.__name__}", name)
    return cls
