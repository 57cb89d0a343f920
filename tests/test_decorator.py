"""The decorator: what it refuses and how it says so, what it keeps, and how a task knows its worker. No cluster is started."""

from __future__ import annotations

import functools
import inspect
import pickle
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import cloudpickle
import msgspec
import pytest
import ray
from ray._private import auto_init_hook

import faultguard
from faultguard import _ray, _recoverable, _session
from faultguard._recoverable import RecoverableFunction
from faultguard._settings import Settings
from faultguard.errors import CheckpointNotSerializableError, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


def train(worker_id: str, shard: list[int], *, scale: int = 1) -> int:
    """Add up a shard."""
    ckpt = faultguard.current()
    for item in ckpt.batches(shard):
        ckpt.state["sum"] = ckpt.state.get("sum", 0) + item * scale
    return int(ckpt.state.get("sum", 0))


def produce(n: int) -> Iterator[int]:
    """A generator."""
    yield n


async def wait(n: int) -> int:
    """A coroutine."""
    return n


async def stream(n: int) -> AsyncIterator[int]:
    """An asynchronous generator."""
    yield n


class Service:
    """A class."""


class Callable7:
    """An object that can be called."""

    def __call__(self) -> int:
        """Seven."""
        return 7


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "generator": (
        lambda: produce,
        (
            "@recoverable on 'produce' is refused: it is a generator, and a streaming generator that resumes loses items silently in Ray; "
            "return a list, or write each batch to a file and return the paths"
        ),
    ),
    "remote generator": (lambda: ray.remote(produce), "@recoverable on 'produce' is refused: it is a generator"),
    "async def": (
        lambda: wait,
        "@recoverable on 'wait' is refused: Ray tasks cannot be async def; write def, and asyncio.run(...) inside",
    ),
    "async generator": (lambda: stream, "@recoverable on 'stream' is refused: Ray tasks cannot be async def"),
    "partial": (
        lambda: functools.partial(train, "w0"),
        "it is a partial, which Ray cannot run; write a function that calls it",
    ),
    "options wrapper": (
        lambda: ray.remote(train).options(num_cpus=2),
        (
            "it is what .options() of a remote function gives, from which Ray does not give the function back; decorate the "
            "remote function and call .options() on the result"
        ),
    ),
    "actor class": (
        lambda: ray.remote(Service),
        "it is an actor class; use `with faultguard.checkpointed(worker_id)` inside its methods",
    ),
    "class": (
        lambda: Service,
        "it is a class; decorate a function, or use `with faultguard.checkpointed(worker_id)` inside the methods of an actor",
    ),
    "object": (Callable7, "it is of type Callable7; decorate a function defined with def"),
    "builtin": (lambda: len, "it is of type builtin_function_or_method; decorate a function defined with def"),
    "static method": (lambda: staticmethod(train), "it is of type staticmethod; decorate a function defined with def"),
    "no function": (list, "it is of type list; decorate a function defined with def"),
    "twice plain": (lambda: faultguard.recoverable(train), "it is recoverable already; decorate it once"),
    "twice remote": (lambda: faultguard.recoverable(ray.remote(train)), "it is recoverable already; decorate it once"),
    "above and below": (lambda: ray.remote(faultguard.recoverable(train)), "it is recoverable already; decorate it once"),
    "max_retries": (
        lambda: ray.remote(max_retries=5)(train),
        (
            "@ray.remote(max_retries=5) under @recoverable is refused: two owners of retries break the budget. Remove it; max_failures of "
            "@recoverable counts exceptions and crashes alike"
        ),
    ),
    "retry_exceptions": (
        lambda: ray.remote(retry_exceptions=True)(train),
        "@ray.remote(retry_exceptions=True) under @recoverable is refused: two owners of retries break the budget",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "with options"])
def test_what_cannot_recover_is_refused_at_decoration(name: str, bare: bool) -> None:
    """What cannot work is refused where it is written, with the way out."""
    make, text = REFUSED[name]
    target = make()
    with pytest.raises(UsageError) as caught:
        faultguard.recoverable(target) if bare else faultguard.recoverable(max_failures=2)(target)
    assert text in str(caught.value)
    assert str(caught.value).startswith("@")


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_failures": -2}, "max_failures=-2 is refused; it takes the number of failures to survive: 0 for none, -1 for any number"),
    ({"max_failures": 2.5}, "max_failures=2.5 is refused"),
    ({"max_failures": "3"}, "max_failures='3' is refused"),
    ({"max_failures": True}, "max_failures=True is refused"),
    ({"worker_id": 7}, "worker_id=7 is refused; the decorator takes the name of a parameter, or a callable on the arguments"),
    (
        {"worker_id": "shart"},
        "worker_id='shart' is refused: train(worker_id: 'str', shard: 'list[int]', *, scale: 'int' = 1)",
    ),
    ({"name": ""}, "name '' is refused: it is empty"),
    ({"name": 7}, "name 7 is refused: it is of type 'int', not str"),
    ({"name": "a\0b"}, "name 'a\\x00b' is refused: it contains a NUL character"),
    ({"state": [1]}, "state=[1] is refused; it takes a dict, such as state={'rows': 0}"),
    ({"every": 1.5}, 'every=1.5 is refused; it takes "auto", a number of batches (int > 0), or a timedelta such as timedelta(seconds=30)'),
    ({"every": 0}, "every=0 is refused"),
    ({"every": True}, "every=True is refused"),
    ({"every": "often"}, "every='often' is refused"),
    ({"every": timedelta(0)}, "every=datetime.timedelta(0) is refused"),
    ({"retry_on": "ValueError"}, "retry_on='ValueError' is refused; it takes an exception type, a tuple of them, or a predicate"),
    ({"retry_on": KeyboardInterrupt}, "retry_on=<class 'KeyboardInterrupt'> is refused"),
    ({"give_up_on": [ValueError]}, "give_up_on=[<class 'ValueError'>] is refused"),
    ({"backoff": 1.0}, "backoff=1.0 is refused; it takes faultguard.Backoff(initial=1.0, factor=5.0, maximum=300.0)"),
    ({"stall_timeout": -1}, "recoverable(stall_timeout=-1) is refused; it takes seconds (> 0), a timedelta, or None for no limit"),
    ({"reset_on_progress": 1}, "reset_on_progress=1 is refused; it takes True or False"),
    ({"fresh_process_on": "CUDA"}, "fresh_process_on='CUDA' is refused; it takes an exception type, a tuple of them, or a predicate"),
    ({"on_poison": "drop"}, 'recoverable(on_poison=\'drop\') is refused; it takes "fail" (the budget decides) or "skip"'),
    (
        {"on_poison": "skip", "max_failures": 2},
        'recoverable(on_poison="skip") with max_failures=2 is refused: a batch is quarantined after 3',
    ),
]


@pytest.mark.parametrize(("options", "text"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
@pytest.mark.parametrize("remote", [True, False], ids=["remote", "plain"])
def test_bad_options_are_refused_at_decoration(options: dict[str, Any], text: str, remote: bool) -> None:
    """Every option is checked before anything runs, and the text names option and value."""
    with pytest.raises(UsageError) as caught:
        faultguard.recoverable(**options)(ray.remote(train) if remote else train)
    assert text in str(caught.value)


def test_a_state_that_cannot_be_saved_is_refused_at_decoration() -> None:
    """The path says what in it."""
    with pytest.raises(CheckpointNotSerializableError, match=r'state\["f"\]\[0\]'):
        faultguard.recoverable(state={"f": [print]})


def test_an_option_that_nobody_knows_is_a_type_error() -> None:
    """As of any function."""
    with pytest.raises(TypeError, match="retries"):
        faultguard.recoverable(retries=3)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_retries": 5}, ".options(max_retries=...) on a recoverable task is refused: two owners of retries break the budget"),
        ({"retry_exceptions": [OSError]}, ".options(retry_exceptions=...) on a recoverable task is refused"),
        (
            {"num_returns": "dynamic"},
            ".options(num_returns='dynamic') on a recoverable task is refused: a generator that",
        ),
        ({"num_returns": "streaming"}, ".options(num_returns='streaming') on a recoverable task is refused"),
        ({"resume": "always"}, "it takes 'never', or nothing: a worker resumes by itself"),
        ({"worker_id": ""}, "worker_id '' is refused: it is empty"),
        ({"worker_id": 7}, "worker_id 7 is refused: it is of type 'int', not str"),
        ({"worker_id": "x" * 513}, "it is 513 bytes long in UTF-8, the limit is 512"),
    ],
    ids=["max_retries", "retry_exceptions", "dynamic", "streaming", "resume", "empty id", "int id", "long id"],
)
def test_bad_options_of_a_call_are_refused(options: dict[str, Any], text: str) -> None:
    """`.options()` refuses what would break the budget, and what is no id."""
    task = faultguard.recoverable(ray.remote(train))
    with pytest.raises(UsageError) as caught:
        task.options(**options)
    assert text in str(caught.value)


# --- what is kept ---------------------------------------------------------------------------------------------------

DECORATED: dict[str, Any] = {
    "bare": faultguard.recoverable(ray.remote(train)),
    "options": faultguard.recoverable(max_failures=2)(ray.remote(num_cpus=2)(train)),
    "after options": faultguard.recoverable(ray.remote(train)).options(worker_id="w0", num_cpus=2),
    "plain": faultguard.recoverable(train),
    "plain options": faultguard.recoverable(max_failures=2)(train),
}


@pytest.mark.parametrize("name", DECORATED)
def test_name_signature_and_docstring_are_kept(name: str) -> None:
    """What help and editors show is the user's function."""
    task = DECORATED[name]
    assert (task.__name__, task.__qualname__, task.__module__, task.__doc__) == ("train", "train", __name__, "Add up a shard.")
    assert inspect.signature(task) == inspect.signature(train)
    assert task.__wrapped__ is train


@pytest.mark.parametrize("name", ["bare", "options", "after options"])
@pytest.mark.parametrize("copy", [cloudpickle, ray.cloudpickle], ids=["cloudpickle", "ray"])
def test_a_recoverable_function_pickles(name: str, copy: Any) -> None:
    """It can be passed to a task, or captured by one, with its options."""
    task = DECORATED[name]
    found = pickle.loads(copy.dumps(task))
    assert isinstance(found, RecoverableFunction)
    assert found.__reduce__()[1][1:] == task.__reduce__()[1][1:]
    assert found("w0", [1, 2, 3]) == 6


def test_a_function_of_a_notebook_pickles() -> None:
    """One that cannot be imported goes by value."""
    task: Any = faultguard.recoverable(ray.remote(lambda n: n + 1))
    assert pickle.loads(cloudpickle.dumps(task))(1) == 2


def test_options_give_another_function() -> None:
    """`.options()` changes nothing of what it is called on, and adds up."""
    task: Any = DECORATED["options"]
    first = task.options(worker_id="w0")
    second = first.options(num_gpus=1)
    options = [given.__reduce__()[1][2:] for given in (task, first, second)]
    assert options == [({"num_cpus": 2}, None), ({"num_cpus": 2}, "w0"), ({"num_cpus": 2, "num_gpus": 1}, "w0")]


# --- called directly ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECORATED)
def test_a_direct_call_runs_once_in_memory(name: str) -> None:
    """A unit test calls the function as it is: no Ray, no store, a fresh state each time."""
    task = DECORATED[name]
    assert task("w0", [1, 2, 3], scale=2) == 12
    assert task("w0", [1, 2]) == 3
    assert not ray.is_initialized()


def test_a_direct_call_is_not_retried() -> None:
    """The first exception is the caller's, as it was raised."""
    calls = []

    @faultguard.recoverable(max_failures=5)
    def fail() -> None:
        calls.append(faultguard.current())
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert len(calls) == 1
    with pytest.raises(UsageError, match="the attempt is over"):
        calls[0].advance()


def test_the_state_of_the_decorator_is_new_for_every_call() -> None:
    """What one call does to it, the next one does not see; it is a copy of what the decorator was given."""
    state: dict[str, Any] = {"rows": []}

    @faultguard.recoverable(state=state)
    def collect(n: int) -> list[int]:
        faultguard.current().state["rows"].append(n)
        return list(faultguard.current().state["rows"])

    assert (collect(1), collect(2)) == ([1], [2])
    assert state == {"rows": []}


def test_a_state_that_cannot_be_saved_fails_a_direct_call() -> None:
    """A unit test finds it, even of a task without a loop."""

    @faultguard.recoverable
    def keep() -> None:
        faultguard.current().state["f"] = print

    with pytest.raises(CheckpointNotSerializableError, match=r'state\["f"\]'):
        keep()


def test_the_handle_of_a_direct_call_knows_its_worker() -> None:
    """The id is found as in a cluster, so that `checkpointed(worker_id)` is the task's own handle there and here."""

    @faultguard.recoverable(state={"rows": 0}, name="embed")
    @ray.remote
    def index(worker_id: str) -> tuple[str, str, bool, dict[str, int]]:
        mine = faultguard.current()
        with faultguard.checkpointed(worker_id) as ckpt:
            same = ckpt is mine
            for _ in ckpt.batches(range(3)):
                ckpt.state["rows"] = ckpt.state.get("rows", 5) + 1
        return ckpt.task, ckpt.worker_id, same, ckpt.state

    assert index("w7") == ("embed", "w7", True, {"rows": 3})
    assert index.options(worker_id="other")("w7")[1:] == ("w7", False, {"rows": 8})


def test_another_worker_inside_of_a_direct_call() -> None:
    """A block with another id has a state of its own, in memory as well."""

    @faultguard.recoverable(state={"n": 1})
    def outer() -> tuple[dict[str, int], dict[str, int]]:
        with faultguard.checkpointed("inner", state={"m": 2}) as ckpt:
            assert faultguard.current() is ckpt
            assert list(faultguard.batches([1, 2])) == [1, 2]
        return faultguard.current().state, ckpt.state

    assert outer() == ({"n": 1}, {"m": 2})


def test_a_handle_belongs_to_its_thread() -> None:
    """Where no task runs there is no handle: not outside, not in another thread; the text says what to do."""
    with pytest.raises(UsageError, match=r"faultguard.current\(\) is refused: this thread runs no decorated task"):
        faultguard.current()
    with pytest.raises(UsageError, match="this thread runs no decorated task"):
        faultguard.batches([1])
    errors: list[Exception] = []

    def elsewhere() -> None:
        try:
            faultguard.current()
        except UsageError as error:
            errors.append(error)

    @faultguard.recoverable
    def task() -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    task()
    assert "in a thread of your own, pass the handle on" in str(errors[0])


def test_wrong_arguments_are_a_type_error() -> None:
    """As of any function."""
    for task in (DECORATED["plain"], DECORATED["bare"]):
        with pytest.raises(TypeError):
            task("w0")


# --- submitted ------------------------------------------------------------------------------------------------------


def header_of(encoded: bytes) -> _recoverable._Header:
    """What travels with a task."""
    return msgspec.msgpack.decode(encoded, type=_recoverable._Header)


class Submitted:
    """In the place of Ray's remote function: keeps what is submitted."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Keep it."""
        self.calls.append((*args, kwargs))

    def worker_ids(self) -> list[str | None]:
        """The ids that the tasks were given."""
        return [header_of(encoded).worker_id for encoded, *_ in self.calls]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """This process has a run."""
    settings = Settings("run", "/x", "id", "01", max_failures=4)
    for name in ("settings_to_submit", "current_settings"):
        monkeypatch.setattr(_session, name, lambda: settings)
    return settings


@pytest.fixture
def submitted(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Submitted:
    """What is submitted."""
    found = Submitted()
    monkeypatch.setattr(RecoverableFunction, "_remote", lambda self, settings: found)
    return found


def test_the_worker_is_known_by_its_parameter(submitted: Submitted) -> None:
    """The parameter `worker_id`, by position, by name and by default; `.options` is before it."""
    task: Any = DECORATED["bare"]
    task.remote("w0", [1])
    task.remote(shard=[1], worker_id="w1")
    task.options(worker_id="w2").remote("w0", [1])

    def defaulted(n: int, worker_id: str = "w3") -> None:
        """Has a default."""

    faultguard.recoverable(ray.remote(defaulted)).remote(1)
    assert submitted.worker_ids() == ["w0", "w1", "w2", "w3"]


def test_the_worker_is_known_by_another_parameter(submitted: Submitted) -> None:
    """`recoverable(worker_id="path")` names it; it is before a parameter called `worker_id`."""

    def embed(path: str, worker_id: str = "not this") -> None:
        """Has two that could be it."""

    task: Any = faultguard.recoverable(worker_id="path")(ray.remote(embed))
    task.remote("a/b")
    task.remote(path="../c")
    assert submitted.worker_ids() == ["a/b", "../c"]


def test_the_worker_is_known_by_a_callable(submitted: Submitted) -> None:
    """It gets the arguments as the function does, defaults included."""

    def embed(path: str, part: int = 7) -> None:
        """Has a default."""

    task: Any = faultguard.recoverable(worker_id=lambda path, part: f"{path}-{part}")(ray.remote(embed))
    task.remote("a")
    task.remote("a", part=8)
    assert submitted.worker_ids() == ["a-7", "a-8"]


def test_without_an_id_every_call_is_new_work(submitted: Submitted) -> None:
    """The worker is then Ray's task, which the header does not know."""
    task: Any = faultguard.recoverable(ray.remote(lambda n: n))
    task.remote(1)
    assert submitted.worker_ids() == [None]


@pytest.mark.parametrize("worker_id", [7, None, "", ["w0"]])
def test_a_bad_id_is_refused_where_it_is_submitted(worker_id: Any, submitted: Submitted) -> None:
    """Not an hour later, in the task."""
    task: Any = DECORATED["bare"]
    with pytest.raises(UsageError, match=r"worker_id .* is refused"):
        task.remote(worker_id, [1])
    with pytest.raises(UsageError, match=r"worker_id .* is refused"):
        task(worker_id, [1])
    assert submitted.calls == []


def test_wrong_arguments_are_refused_where_they_are_submitted(submitted: Submitted) -> None:
    """As Ray does."""
    with pytest.raises(TypeError, match="shard"):
        DECORATED["bare"].remote("w0")
    assert submitted.calls == []


def test_settings_travel_with_the_task(submitted: Submitted, settings: Settings) -> None:
    """The task needs no look-up to know its run."""
    DECORATED["bare"].remote("w0", [1])
    [(encoded, kwargs)] = submitted.calls
    header = header_of(encoded)
    assert header.settings == settings
    assert cloudpickle.loads(header.payload or b"") == (("w0", [1]), {})
    assert kwargs == {}


def test_references_stay_with_ray(submitted: Submitted) -> None:
    """Arguments that Ray must see are passed as they are."""
    ref: Any = ray.ObjectRef(b"\1" * 28)
    DECORATED["bare"].remote("w0", ref)
    [(encoded, worker_id, argument, _)] = submitted.calls
    assert (header_of(encoded).payload, worker_id) == (None, "w0")
    assert argument is ref


@pytest.mark.parametrize(
    ("max_failures", "max_retries"), [(None, 24), (0, 20), (2, 22), (-1, -1)], ids=["of the run", "none", "two", "unlimited"]
)
def test_ray_retries_more_often_than_the_budget(settings: Settings, max_failures: int | None, max_retries: int) -> None:
    """Ray's own count is never what ends a worker: ends that are not charged use it up, too."""
    task: Any = faultguard.recoverable(max_failures=max_failures)(ray.remote(num_cpus=2)(train))
    options = task._remote(settings)._default_options
    assert (options["max_retries"], options["retry_exceptions"], options["num_cpus"]) == (max_retries, False, 2)
    assert task._remote(settings) is task._remote(settings)


def test_ray_is_not_started_where_ray_itself_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """`.remote()` starts Ray as plain Ray does (the README's blocks rely on it), and so not with `RAY_ENABLE_AUTO_CONNECT=0`."""
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", False)
    with pytest.raises(UsageError, match=r"faultguard needs Ray here: call ray.init\(\) first"):
        DECORATED["bare"].remote("w0", [1])
    assert not ray.is_initialized()


# --- below @ray.remote ----------------------------------------------------------------------------------------------


def submission(max_retries: int) -> Callable[..., Any]:
    """What Ray's hook is given: the call that submits, with Ray's options in its closure."""

    def invocation(args: Any, kwargs: Any) -> Any:
        return "submitted", max_retries, args, kwargs

    return invocation


@pytest.mark.parametrize(("max_failures", "max_retries"), [(2, 3), (2, 50), (2, -1), (-1, -1), (0, 1)])
def test_enough_retries_of_ray_are_taken(settings: Settings, max_failures: int, max_retries: int) -> None:
    """Below @ray.remote, Ray's `max_retries` must be -1 or at least max_failures + 1."""
    task: Any = faultguard.recoverable(max_failures=max_failures)(train)
    submit = task.__ray_invocation_decorator__(submission(max_retries))
    assert submit(("w0",), {"scale": 2}) == ("submitted", max_retries, ("w0",), {"scale": 2})


@pytest.mark.parametrize(
    ("max_failures", "max_retries", "text"),
    [
        (2, 2, "task 'train' is submitted with Ray's max_retries=2, too few for max_failures=2. Write @recoverable above @ray.remote"),
        (2, 2, "or @ray.remote(max_retries=22 (at least 3))"),
        (None, 3, "too few for max_failures=4"),
        (-1, 100, "or @ray.remote(max_retries=-1)"),
    ],
)
def test_too_few_retries_of_ray_are_refused(settings: Settings, max_failures: int | None, max_retries: int, text: str) -> None:
    """Ray would give up before the budget does; the text says what to write."""
    task: Any = faultguard.recoverable(max_failures=max_failures)(train)
    with pytest.raises(UsageError) as caught:
        task.__ray_invocation_decorator__(submission(max_retries))((), {})
    assert text in str(caught.value)


def test_retries_that_cannot_be_read_are_a_warning(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """Where Ray's options cannot be seen, the user is told once, and the task runs."""
    task: Any = faultguard.recoverable(name="unreadable")(train)
    for _ in range(2):
        assert task.__ray_invocation_decorator__(print)((), {}) is None
    assert len(caplog.records) == 1
    assert "Ray's max_retries of task 'unreadable' cannot be read; set it to at least max_failures + 1" in caplog.text


def test_a_remote_function_is_known(settings: Settings) -> None:
    """Ray's hook is where Ray looks for it."""
    remote: Any = ray.remote(faultguard.recoverable(train))
    assert _ray.is_remote_function(remote)
    assert hasattr(remote._function, "__ray_invocation_decorator__")
