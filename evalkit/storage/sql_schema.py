"""The tables of a SQL storage and the statements on them, written once in SQLAlchemy Core for every dialect.

A job's primary key holds its search and its number (``search key * 2^36 + number``), and so does its change number: the
table itself is then ordered by search and number, a write touches no index that it need not, and a range of keys is a
search. The row of a search holds its counters (next number, last change, jobs by state). Every write to a search locks
that row first, so numbers and changes are given in the order of the commits, and a reader that has seen a change has
seen all before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Dialect
from sqlalchemy.schema import CreateIndex, CreateTable

from evalkit.job import JobState

__all__ = [
    "MAX_PER_SEARCH",
    "SCHEMA_VERSION",
    "STATE_PARAMETERS",
    "Statements",
    "first_key",
    "statements_for",
]

#: Grows with every change of the tables that an older evalkit would misread.
SCHEMA_VERSION = 2

_SHIFT = 36
#: How many jobs a search can have, and how many writes.
MAX_PER_SEARCH = 1 << _SHIFT

_metadata = sa.MetaData()
_BigKey = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite: an INTEGER PRIMARY KEY is the row's own place

schema = sa.Table("evalkit_schema", _metadata, sa.Column("version", sa.Integer, nullable=False))

searches = sa.Table(
    "evalkit_searches",
    _metadata,
    sa.Column("key", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("decimal", sa.BigInteger, unique=True),  # the id as a number, if it is one: to find the smallest free
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("next_number", sa.BigInteger, nullable=False),
    sa.Column("last_change", sa.BigInteger, nullable=False),
    *(sa.Column(f"n_{state.value.lower()}", sa.BigInteger, nullable=False) for state in JobState),
    sqlite_autoincrement=True,  # a key is never given twice, so a key that is remembered never means another search
)

values = sa.Table(
    "evalkit_values",
    _metadata,
    sa.Column("search", sa.ForeignKey(searches.c.key, ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

jobs = sa.Table(
    "evalkit_jobs",
    _metadata,
    sa.Column("key", _BigKey, primary_key=True, autoincrement=False),
    sa.Column("change", sa.BigInteger, nullable=False),
    sa.Column("search", sa.ForeignKey(searches.c.key, ondelete="CASCADE"), nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("lease", sa.Double),
    sa.Column("owner", sa.Text),
    sa.Column("worker", sa.Text),
    sa.Column("cause", sa.Text),
    sa.Column("args", sa.Text, nullable=False),
    sa.Column("output", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("metadata", sa.Text),
    sa.Column("records", sa.Text),
)
logs = sa.Table(
    "evalkit_logs",
    _metadata,
    sa.Column("job", sa.ForeignKey(jobs.c.key, ondelete="CASCADE"), primary_key=True, autoincrement=False),
    sa.Column("text", sa.Text, nullable=False),
)
_by_change = sa.Index("evalkit_jobs_change", jobs.c.change)
_by_state = sa.Index("evalkit_jobs_state", jobs.c.search, jobs.c.state, jobs.c.key)
_held = jobs.c.lease.is_not(None)
_by_lease = sa.Index("evalkit_jobs_lease", jobs.c.search, jobs.c.lease, sqlite_where=_held, postgresql_where=_held)

#: The parameters of ``select_by_states``: as many as there are states; those too many repeat one.
STATE_PARAMETERS = tuple(f"state_{i}" for i in range(len(JobState)))


def first_key(search_key: int) -> int:
    """The key of job 0 of a search, which is also its change number 0."""
    return search_key << _SHIFT


@dataclass(frozen=True)
class Statements:
    """SQL text in one dialect; the parameters of each are named as in its definition in :func:`statements_for`."""

    create_schema: tuple[str, ...]
    #: version -> what makes the tables of that version those of the next
    upgrade_schema: dict[int, tuple[str, ...]]
    set_schema: str
    insert_schema: str
    select_schema: str

    free_decimal: str
    insert_search: str
    select_search: str
    lock_search: str
    list_searches: str
    delete_search: str
    count: str
    advance: str

    select_values: str
    select_value: str
    delete_value: str
    insert_value: str

    insert_job: str
    select_head: str
    select_heads: str
    update_job: str
    end_job: str
    requeue_job: str
    claim_job: str
    release_job: str
    lease_job: str
    delete_log: str
    insert_log: str
    select_log: str

    select_job: str
    select_jobs: str
    select_all: str
    select_by_states: str
    select_changes: str
    select_queued: str
    select_expired: str


_compiled: dict[str, Statements] = {}


def statements_for(dialect: Dialect) -> Statements:
    """Compile all statements, once a dialect: at run time only the driver is at work."""
    if dialect.name not in _compiled:
        _compiled[dialect.name] = _compile(dialect)
    return _compiled[dialect.name]


def _compile(dialect: Dialect) -> Statements:

    def sql(statement: Any) -> str:
        return str(statement.compile(dialect=dialect))

    p = sa.bindparam
    # Constants are written out: a bound one would be another parameter to hand over at every execution.
    zero, one = sa.literal_column("0", sa.Integer), sa.literal_column("1", sa.Integer)
    queued: Any = sa.literal_column(f"'{JobState.QUEUED.value}'")
    running: Any = sa.literal_column(f"'{JobState.RUNNING.value}'")
    mine = jobs.c.key == p("job_key")
    # select_jobs takes many keys in one round trip where the dialect has arrays; the other one executes select_job.
    many = (
        jobs.c.key == sa.any_(p("keys", type_=postgresql.ARRAY(sa.BigInteger)))
        if dialect.name == "postgresql"
        else mine
    )
    of_search = jobs.c.search == p("search_key")
    head = sa.select(jobs.c.key, jobs.c.state, jobs.c.version, jobs.c.worker)
    whole = sa.select(jobs)

    def keep(name: str) -> Any:
        """Write the parameter, or leave what is there if it is NULL."""
        return sa.func.coalesce(p(f"new_{name}", type_=jobs.c[name].type), jobs.c[name])

    written: dict[str, Any] = {
        "state": p("new_state"),
        "version": jobs.c.version + one,
        "change": p("new_change"),
    }
    content = {name: keep(name) for name in ("attempt", "output", "error", "cause", "records", "metadata")}

    def update(**columns: Any) -> str:
        return sql(sa.update(jobs).where(mine).values(columns))

    smaller, next_one = searches.alias("smaller"), searches.alias("next_one")
    free = (
        sa.select(smaller.c.decimal + one)
        .where(smaller.c.decimal.is_not(None))
        .where(~sa.exists().where(next_one.c.decimal == smaller.c.decimal + one))
        .order_by(smaller.c.decimal)
        .limit(one)
        .offset(zero)
    )
    counters = {column.name: column + p(f"add_{column.name}") for column in searches.c if column.name.startswith("n_")}
    return Statements(
        create_schema=tuple(
            sql(ddl)
            for ddl in (
                *(CreateTable(table) for table in (schema, searches, values, jobs, logs)),
                *(CreateIndex(index) for index in (_by_change, _by_state, _by_lease)),
            )
        ),
        upgrade_schema={1: (sql(CreateTable(logs)),)},
        set_schema=sql(sa.update(schema).values(version=p("new_version"))),
        insert_schema=sql(sa.insert(schema)),
        select_schema=sql(sa.select(schema.c.version)),
        free_decimal=sql(free),
        insert_search=sql(
            sa.insert(searches).values({c.name: p(c.name) for c in searches.c if c.name != "key"}).inline()
        ),
        select_search=sql(sa.select(searches.c.key, searches.c.created).where(searches.c.id == p("search_id"))),
        lock_search=sql(
            sa.select(searches.c.key, searches.c.next_number, searches.c.last_change)
            .where(searches.c.id == p("search_id"))
            .with_for_update()
        ),
        list_searches=sql(sa.select(searches.c.id).order_by(searches.c.key)),
        delete_search=sql(sa.delete(searches).where(searches.c.key == p("search_key"))),
        count=sql(sa.select(*(searches.c[name] for name in counters)).where(searches.c.id == p("search_id"))),
        advance=sql(
            sa.update(searches)
            .where(searches.c.key == p("search_key"))
            .values(
                next_number=searches.c.next_number + p("add_number"),
                last_change=searches.c.last_change + p("add_change"),
                **counters,
            )
        ),
        select_values=sql(sa.select(values.c.name, values.c.value).where(values.c.search == p("search_key"))),
        select_value=sql(
            sa.select(values.c.value).where(values.c.search == p("search_key"), values.c.name == p("value_name"))
        ),
        delete_value=sql(sa.delete(values).where(values.c.search == p("search_key"), values.c.name == p("value_name"))),
        insert_value=sql(
            sa.insert(values).values(search=p("search_key"), name=p("value_name"), value=p("new_value")).inline()
        ),
        insert_job=sql(
            sa.insert(jobs)
            .values(
                key=p("job_key"),
                change=p("new_change"),
                search=p("search_key"),
                state=queued,
                version=one,
                attempt=zero,
                created=p("created"),
                owner=p("owner"),
                args=p("args"),
            )
            .inline()
        ),
        select_head=sql(head.where(mine)),
        select_heads=sql(head.where(many)),
        update_job=update(**written, **content, worker=keep("worker")),
        end_job=update(**written, **content, worker=keep("worker"), lease=sa.null()),
        requeue_job=update(**written, **content, worker=sa.null(), lease=sa.null()),
        claim_job=update(**written, worker=p("new_worker"), lease=p("new_lease")),
        release_job=update(
            state=queued,
            version=jobs.c.version + one,
            change=p("new_change"),
            attempt=jobs.c.attempt + one,
            worker=sa.null(),
            lease=sa.null(),
        ),
        lease_job=update(lease=p("new_lease")),
        delete_log=sql(sa.delete(logs).where(logs.c.job == p("job_key"))),
        insert_log=sql(sa.insert(logs).values(job=p("job_key"), text=p("new_text")).inline()),
        select_log=sql(
            sa.select(jobs.c.key, logs.c.text)
            .select_from(jobs.outerjoin(logs, logs.c.job == jobs.c.key))
            .where(jobs.c.key == p("job_key"))
        ),
        select_job=sql(whole.where(mine)),
        select_jobs=sql(whole.where(many).order_by(jobs.c.key)),
        select_all=sql(whole.where(jobs.c.key >= p("first"), jobs.c.key < p("end")).order_by(jobs.c.key)),
        select_by_states=sql(
            whole.where(of_search, jobs.c.state.in_([p(name) for name in STATE_PARAMETERS])).order_by(jobs.c.key)
        ),
        select_changes=sql(whole.where(jobs.c.change > p("first"), jobs.c.change < p("end")).order_by(jobs.c.change)),
        select_queued=sql(
            whole.where(of_search, jobs.c.state == queued).order_by(jobs.c.key).limit(p("n")).offset(zero)
        ),
        select_expired=sql(
            head.where(
                of_search,
                _held,
                jobs.c.lease <= p("now"),
                jobs.c.state == running,
            ).order_by(jobs.c.key)
        ),
    )
