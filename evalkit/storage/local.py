"""LocalStorage: the searches of the storages that live in this process, whatever they keep of the jobs."""

from __future__ import annotations

import copy
import threading
from abc import abstractmethod
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from evalkit.storage.base import SearchRecord, Storage
from evalkit.storage.naming import check_bare_url, check_search_id, search_exists, search_not_found
from evalkit.usercode import attempt

__all__ = ["LocalSearch", "LocalStorage"]


class LocalSearch(Protocol):
    """What every search in this process has."""

    @property
    def created(self) -> float:
        """Seconds since the Unix epoch."""
        ...

    @property
    def values(self) -> dict[str, Any]:
        """What ``set_value`` stored."""
        ...


SearchT = TypeVar("SearchT", bound=LocalSearch)


class LocalStorage(Storage, Generic[SearchT]):
    """Searches in a dict, under one lock. A subclass adds the jobs; it takes ``_lock`` around ``_search``.

    Attributes:
        scheme: of the URL.
    """

    durable = False
    scheme: ClassVar[str]

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._searches: dict[str, SearchT] = {}
        self._lowest_free = 0  # no decimal number below it is free as a search id

    @classmethod
    def from_url(cls, url: str) -> Self:
        check_bare_url(url, cls.scheme)
        return cls()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._searches)} searches)"

    @property
    def url(self) -> str:
        return f"{self.scheme}://"

    @abstractmethod
    def _new_search(self, search_id: str) -> SearchT:
        """A search with no jobs yet."""

    def _search(self, search_id: str) -> SearchT:
        search = self._searches.get(search_id)
        if search is None:
            raise search_not_found(search_id, self._searches, self.url)
        return search

    def create_search(self, search_id: str | None = None) -> str:
        with self._lock:
            if search_id is None:
                while str(self._lowest_free) in self._searches:
                    self._lowest_free += 1
                search_id = str(self._lowest_free)
            elif check_search_id(search_id) in self._searches:
                raise search_exists(search_id, self.url)
            self._searches[search_id] = self._new_search(search_id)
            return search_id

    def list_searches(self) -> list[str]:
        with self._lock:
            return list(self._searches)

    def load_search(self, search_id: str) -> SearchRecord:
        with self._lock:
            search = self._search(search_id)
            values = {key: _own(value) for key, value in search.values.items()}
            return SearchRecord(search_id, search.created, values)

    def delete_search(self, search_id: str) -> None:
        with self._lock:
            self._search(search_id)
            del self._searches[search_id]
            if search_id.isdecimal():
                self._lowest_free = min(self._lowest_free, int(search_id))

    def set_value(self, search_id: str, key: str, value: Any) -> None:
        value = _own(value)
        with self._lock:
            self._search(search_id).values[key] = value

    def get_value(self, search_id: str, key: str, default: Any = None) -> Any:
        with self._lock:
            values = self._search(search_id).values
            return _own(values[key]) if key in values else default


def _own(value: Any) -> Any:
    """The caller's own copy of a value, as far as it can be copied."""
    copied, error = attempt(copy.deepcopy, value)
    return copied if error is None else value  # the value itself is better than none
