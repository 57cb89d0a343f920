"""The decorator: it makes a Ray task survive, and keeps its signature."""

from __future__ import annotations

import functools
import inspect
import types
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, cast, overload

import msgspec
import ray

from faultguard import _codec, _packing, _ray, _session, _settings
from faultguard._attempt import TaskOptions, Work, check_arguments, run_task
from faultguard._core.names import check_worker_id
from faultguard._core.schedule import Every, check_every
from faultguard._core.stall import check_timeout
from faultguard._elsewhere import Elsewhere
from faultguard._handle import Checkpoint
from faultguard.errors import UsageError
from faultguard.policy import Backoff, Matcher, OnPoison, check_matcher, check_on_poison

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import timedelta

    from ray import ObjectRef

    from faultguard._settings import Settings

__all__ = ["RecoverableFunction", "recoverable"]

P = ParamSpec("P")
R = TypeVar("R")
EXTRA_RAY_RETRIES = 20  # ends that are not charged (drain, leaving) use up Ray's count, too
REFILLED_RAY_RETRIES = 1000  # and so do failures that are given back, or forgiven: as many as that, so that there is an end in any case
_OWN_BY_HAND = ("max_retries", "retry_exceptions")


class _RemoteLike(Protocol[P, R]):
    """What `@ray.remote` makes of a function."""

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> ObjectRef[R]:
        """Submit it."""
        ...


class _Decorator(Protocol):
    """What `recoverable` with options gives."""

    @overload
    def __call__(self, function: _RemoteLike[P, R]) -> RecoverableFunction[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R]) -> Callable[P, R]: ...


class _Header(msgspec.Struct, frozen=True):
    """What travels with a task that our `.remote()` submits: one value, for each that Ray carries costs it tens of microseconds."""

    settings: _settings.Settings
    worker_id: str | None = None
    arguments: dict[str, str] = {}
    afresh: bool = False
    moves: bool = False  # nothing says on which node it has to run
    payload: bytes | None = None  # the arguments, packed; None: Ray carries them


@overload
def recoverable(max_failures: _RemoteLike[P, R], /) -> RecoverableFunction[P, R]: ...
@overload
def recoverable(max_failures: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def recoverable(
    max_failures: int | None = None,
    *,
    worker_id: str | Callable[..., str] | None = None,
    name: str | None = None,
    state: Mapping[str, Any] | None = None,
    every: Every = "auto",
    retry_on: Matcher = Exception,
    give_up_on: Matcher = (),
    backoff: Backoff = ...,
    stall_timeout: float | timedelta | None = None,
    reset_on_progress: bool = False,
    fresh_process_on: Matcher = (),
    on_poison: OnPoison = "fail",
) -> _Decorator: ...
def recoverable(
    max_failures: Any = None,
    *,
    worker_id: str | Callable[..., str] | None = None,
    name: str | None = None,
    state: Mapping[str, Any] | None = None,
    every: Every = "auto",
    retry_on: Matcher = Exception,
    give_up_on: Matcher = (),
    backoff: Backoff = Backoff(),  # noqa: B008 - frozen
    stall_timeout: float | timedelta | None = None,
    reset_on_progress: bool = False,
    fresh_process_on: Matcher = (),
    on_poison: OnPoison = "fail",
) -> Any:
    """Make a Ray task go on from its last checkpoint after an exception or the death of its process.

    Goes above `@ray.remote`; on a plain function it gives a function, to be used directly or below `@ray.remote`.

    Args:
        max_failures: failures that a worker survives, one budget for exceptions and crashes; 0 none, -1 any number. Default: what
            `init` says, 3.
        worker_id: name of the parameter that identifies the worker, or a callable on the arguments. Default: the parameter called
            `worker_id`, else every `.remote()` is new work.
        name: of the task; default its qualified name.
        state: what `current().state` begins with.
        every: how often to write a checkpoint: "auto" (at most 1 % of the worker's time), a number of batches, or a timedelta.
        retry_on: exceptions that are retried: a type, a tuple, or a predicate `exc -> bool | timedelta` (the wait).
        give_up_on: exceptions that are not, of those.
        backoff: the waits between retries.
        stall_timeout: seconds (or a timedelta) without progress in a loop after which `StalledError` is raised in the batch, one failure;
            a thread that does not come back from it within as long, at most 30 s, loses its process. None: nothing is killed.
        reset_on_progress: a failure further on than all before it starts the count anew, so that `max_failures` limits those without
            progress. A crash is as far as what was durable.
        fresh_process_on: exceptions after which the process is not trusted, such as errors of CUDA: Ray starts a new one for the retry.
            A type, a tuple, or a predicate `exc -> bool`.
        on_poison: "fail": the budget decides, and the error names the batch. "skip": after three failures in a row at one batch (a crash
            counts if the batch was recorded just before it began, which happens after a crash) it is quarantined: passed over from
            now on, its failures given back, at most 100 batches of a worker. Needs `max_failures` of at least 3.

    Raises:
        UsageError: an option, or what is decorated, cannot work; the text says what to write.

    >>> import faultguard
    >>> @faultguard.recoverable(max_failures=1)
    ... def total(numbers):
    ...     ckpt = faultguard.current()
    ...     for number in ckpt.batches(numbers):
    ...         ckpt.state["total"] = ckpt.state.get("total", 0) + number
    ...     return ckpt.state["total"]
    >>> total(range(4))
    6
    """
    bare = max_failures is not None and not isinstance(max_failures, (int, float, str))
    if not isinstance(backoff, Backoff):
        msg = f"backoff={backoff!r} is refused; it takes faultguard.Backoff(initial=1.0, factor=5.0, maximum=300.0)"
        raise UsageError(msg)
    if worker_id is not None and not isinstance(worker_id, str) and not callable(worker_id):
        msg = f"worker_id={worker_id!r} is refused; the decorator takes the name of a parameter, or a callable on the arguments"
        raise UsageError(msg)
    if not isinstance(reset_on_progress, bool):
        msg = f"reset_on_progress={reset_on_progress!r} is refused; it takes True or False"
        raise UsageError(msg)
    failures = None if bare or max_failures is None else _settings.check_max_failures(max_failures)
    options = TaskOptions(
        name=_check_name(name) or "",  # set when the function is known
        max_failures=failures,
        worker_id=worker_id,
        state=Checkpoint.check_state(state),
        every=check_every(every),
        retry_on=check_matcher("retry_on", retry_on),
        give_up_on=check_matcher("give_up_on", give_up_on),
        backoff=backoff,
        stall_timeout_s=check_timeout("recoverable(stall_timeout=", stall_timeout),
        reset_on_progress=reset_on_progress,
        fresh_process_on=check_matcher("fresh_process_on", fresh_process_on),
        on_poison=check_on_poison("recoverable", on_poison, failures),
    )
    decorate = functools.partial(_decorate, options=options)
    return decorate(max_failures) if bare else decorate


def _decorate(target: Any, *, options: TaskOptions) -> Any:
    if _ray.is_remote_function(target):
        function, ray_options = _ray.function_and_options(target)
        _refuse_twice(function)
        _refuse_function(function)
        for name in _OWN_BY_HAND:
            if name in ray_options:
                msg = (
                    f"@ray.remote({name}={ray_options[name]!r}) under @recoverable is refused: two owners of retries break the budget. "
                    f"Remove it; max_failures of @recoverable counts exceptions and crashes alike"
                )
                raise UsageError(msg)
        return RecoverableFunction(function, _named(options, function), ray_options)
    _refuse_target(target)
    _refuse_function(target)
    return _wrap_plain(target, _named(options, target))


def _check_name(name: Any) -> str | None:
    """The option `name`: like a worker id, it becomes a folder."""
    try:
        return None if name is None else check_worker_id(name)
    except UsageError as error:
        msg = str(error).replace("worker_id", "name")
        raise UsageError(msg) from None


def _named(options: TaskOptions, function: Callable[..., Any]) -> TaskOptions:
    fields = {name: getattr(options, name) for name in TaskOptions.__slots__}
    named = TaskOptions(**{**fields, "name": options.name or function.__qualname__})
    if isinstance(named.worker_id, str) and named.worker_id not in inspect.signature(function).parameters:
        msg = f"worker_id={named.worker_id!r} is refused: {named.name}{inspect.signature(function)} has no parameter of that name"
        raise UsageError(msg)
    return named


def _refuse_twice(target: Any) -> None:
    if isinstance(target, RecoverableFunction) or hasattr(target, "__faultguard__"):
        msg = f"@recoverable on {target!r} is refused: it is recoverable already; decorate it once"
        raise UsageError(msg)


def _refuse_target(target: Any) -> None:
    """Refuse what is neither a remote nor a plain function, with the way out."""
    _refuse_twice(target)
    way_out = None
    if _ray.is_actor_class(target):
        way_out = "it is an actor class; use `with faultguard.checkpointed(worker_id)` inside its methods"
    elif isinstance(target, type):
        way_out = "it is a class; decorate a function, or use `with faultguard.checkpointed(worker_id)` inside the methods of an actor"
    elif _ray.is_options_wrapper(target):
        way_out = (
            "it is what .options() of a remote function gives, from which Ray does not give the function back; decorate the remote "
            "function and call .options() on the result"
        )
    elif isinstance(target, functools.partial):
        way_out = "it is a partial, which Ray cannot run; write a function that calls it"
    elif not isinstance(target, types.FunctionType):
        way_out = f"it is of type {type(target).__name__}; decorate a function defined with def"
    if way_out is not None:
        msg = f"@recoverable on {target!r} is refused: {way_out}"
        raise UsageError(msg)


def _refuse_function(function: Callable[..., Any]) -> None:
    name = function.__qualname__
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        msg = f"@recoverable on {name!r} is refused: Ray tasks cannot be async def; write def, and asyncio.run(...) inside"
        raise UsageError(msg)
    if inspect.isgeneratorfunction(function):
        msg = (
            f"@recoverable on {name!r} is refused: it is a generator, and a streaming generator that resumes loses items silently in Ray; "
            f"return a list, or write each batch to a file and return the paths"
        )
        raise UsageError(msg)


# --- above @ray.remote ----------------------------------------------------------------------------------------------


class RecoverableFunction(Generic[P, R]):
    """A remote function that recovers: `.remote()`, `.options()`, `.bind()` as of `@ray.remote`.

    Called directly, not through Ray, the function runs once with its state in memory: for unit tests.
    """

    def __init__(
        self,
        function: Callable[P, R],
        options: TaskOptions,
        ray_options: dict[str, Any],
        worker_id: str | None = None,
        *,
        afresh: bool = False,
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._options = options
        self._ray_options = ray_options
        self._worker_id = worker_id
        self._signature = inspect.signature(function)
        self._at_call: dict[str, Any] = {}  # what `.options()` gave to Ray
        self._afresh = afresh
        self._remotes: dict[int, Any] = {}  # exported once: shared with what `.options()` gives

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here, once, with its state in memory."""
        result: R = _call_directly(self._function, self._options, args, kwargs, worker_id=self._worker_id)
        return result

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> ObjectRef[R]:
        """Submit the task; gives what Ray's `.remote()` gives, and starts Ray where that would.

        Raises:
            UsageError: the worker id is not one, or the place of the checkpoints cannot work.
            TypeError: the arguments do not fit the signature.
        """
        settings = _session.settings_to_submit()
        bound = self._signature.bind(*args, **kwargs)  # a TypeError here, not in the task
        payload = _packing.pack(args, kwargs) if args or kwargs else b""
        header = self._header(settings, bound, payload)
        submit = self._remote(settings).remote  # first: refuses options that Ray does not know, and then nothing is submitted
        recorded = self._from_the_record(header)
        if recorded is not None:
            return cast("ObjectRef[R]", recorded[0])
        encoded = msgspec.msgpack.encode(header)
        reference: ObjectRef[R] = submit(encoded) if payload is not None else submit(encoded, *args, **kwargs)
        return reference

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """A node of a Ray DAG."""
        settings = _session.settings_to_submit()
        header = self._header(settings, self._signature.bind(*args, **kwargs), None)
        named = _session.named_run(settings)
        if named is not None and header.worker_id is not None:
            named.submits(self._options.name, header.worker_id)  # nobody sees when it is executed
        return self._remote(settings).bind(msgspec.msgpack.encode(header), *args, **kwargs)

    def _from_the_record(self, header: _Header) -> tuple[Any] | None:
        """What `.remote()` gives for a worker that was completed before this driver began, in a tuple; None: it is to be run."""
        named, worker_id = _session.named_run(header.settings), header.worker_id
        if named is None or worker_id is None:
            return None
        outcome = named.recorded(self._options.name, worker_id) if not header.afresh else None
        if outcome is not None:
            check_arguments(self._options.name, worker_id, outcome, header.arguments)
            returns = self._at_call.get("num_returns", self._ray_options.get("num_returns", 1))
            ready = _ray.ready_refs(_codec.decode(bytes(outcome.value)), returns)
            if ready is not None:
                named.gives()
                return ready
        named.submits(self._options.name, worker_id)
        return None

    def options(self, *, worker_id: str | None = None, resume: str | None = None, **ray_options: Any) -> RecoverableFunction[P, R]:
        """The same function with other options: `worker_id`, `resume`, and those of Ray.

        Args:
            worker_id: of the worker.
            resume: "never" starts the worker over, whatever other tasks have done under its id; Ray's next attempts of the task resume.
            ray_options: of Ray's tasks.

        Raises:
            UsageError: `max_retries` or `retry_exceptions` is given: the budget has one owner.
        """
        if resume not in {None, "never"}:
            raise UsageError(f".options(resume={resume!r}) is refused; it takes 'never', or nothing: a worker resumes by itself")
        for name in _OWN_BY_HAND:
            if name in ray_options:
                msg = f".options({name}=...) on a recoverable task is refused: two owners of retries break the budget; set max_failures"
                raise UsageError(msg)
        if (returns := ray_options.get("num_returns")) in {"dynamic", "streaming"}:
            msg = f".options(num_returns={returns!r}) on a recoverable task is refused: a generator that resumes loses items; return a list"
            raise UsageError(msg)
        chosen = check_worker_id(worker_id) if worker_id is not None else self._worker_id
        other = object.__new__(type(self))
        vars(other).update(vars(self), _worker_id=chosen, _at_call={**self._at_call, **ray_options})
        other._afresh = self._afresh or resume == "never"
        return other

    def _header(self, settings: Settings, bound: inspect.BoundArguments, payload: bytes | None) -> _Header:
        worker_id = self._worker_id
        if worker_id is None:
            worker_id = _worker_id(self._options, bound)
        _check_id(settings, self._options, worker_id)
        moves = _may_move({**self._ray_options, **self._at_call})
        digests = _digests(settings, bound, small=payload is not None)
        return _Header(settings, worker_id, digests, self._afresh, moves, payload)

    def _remote(self, settings: Settings) -> Any:
        failures = _failures(self._options, settings)
        if failures not in self._remotes:
            retries = _ray_retries(self._options, failures)
            entry = _entry(self._function, self._options)
            self._remotes[failures] = ray.remote(**{**self._ray_options, "max_retries": retries, "retry_exceptions": False})(entry)
        remote = self._remotes[failures]
        return remote.options(**self._at_call) if self._at_call else remote

    def __reduce__(self) -> Any:
        """Travel without what was exported to one cluster."""
        functions = (self._function, self._options, {**self._ray_options, **self._at_call}, self._worker_id)
        return functools.partial(RecoverableFunction, afresh=self._afresh), functions


def _failures(options: TaskOptions, settings: Settings) -> int:
    """How many failures a task survives, as far as the driver knows when it submits one.

    Raises:
        UsageError: too few for what else is asked for.
    """
    failures = options.max_failures if options.max_failures is not None else settings.max_failures
    check_on_poison("recoverable", options.on_poison, failures)
    return failures


def _ray_retries(options: TaskOptions, failures: int) -> int:
    """How often Ray is to start the task again. Not without end: a process that dies while Ray unpacks arguments never gets to us."""
    if failures < 0:
        return -1
    return failures + EXTRA_RAY_RETRIES + REFILLED_RAY_RETRIES * (options.reset_on_progress or options.on_poison == "skip")


def _entry(function: Callable[..., Any], options: TaskOptions) -> Callable[..., Any]:
    """What Ray runs. It travels by value, so it reaches everything through an import, and captures only what is the user's."""

    def entry(*arguments: Any, **keywords: Any) -> Any:
        from faultguard._recoverable import run_entry

        return run_entry(function, options, arguments, keywords)

    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(entry, attribute, getattr(function, attribute))
    return entry


def run_entry(function: Callable[..., Any], options: TaskOptions, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """In the worker: run a task that `RecoverableFunction.remote` submitted."""
    encoded, *rest = arguments
    header = msgspec.msgpack.decode(encoded, type=_Header)
    identity = _ray.identity()
    if header.payload is not None:
        return _Packed(function, options, header).run(identity)
    work = Work(lambda: function(*rest, **keywords), repeatable=False, arguments=header.arguments, afresh=header.afresh)
    return run_task(header.settings, identity, options, header.worker_id or identity.task_id, work)


@dataclass(frozen=True, slots=True)
class _Packed:
    """A task whose arguments can be had again: in this process, and on another node, to which it can travel."""

    function: Callable[..., Any]
    options: TaskOptions
    header: _Header

    def run(self, identity: _ray.Identity, local_retry: int = 0) -> Any:
        """Run it to its outcome."""
        worker_id = self.header.worker_id or identity.task_id
        elsewhere = None
        if self.header.moves:
            submit = functools.partial(self._submit, identity)
            begins_s = self.header.settings.heartbeat_timeout
            elsewhere = Elsewhere(f"{self.options.name}/{worker_id}", identity.node_id, submit, begins_s, waits=bool(identity.home_id))
        work = Work(self._call, repeatable=True, arguments=self.header.arguments, afresh=self.header.afresh)
        return run_task(self.header.settings, identity, self.options, worker_id, work, elsewhere=elsewhere, local_retry=local_retry)

    def _call(self) -> Any:
        args, kwargs = _packing.unpack(self.header.payload) if self.header.payload else ((), {})
        return self.function(*args, **kwargs)

    def _submit(self, identity: _ray.Identity, node_id: str, local_retry: int) -> Any:
        return _ray.run_there(run_elsewhere, node_id, _ray.needs_of_task(), self.options.name, self, identity, local_retry)


def run_elsewhere(packed: _Packed, waiting: _ray.Identity, local_retry: int) -> Any:
    """In a worker on another node: run an attempt of a task that waits for it."""
    _settings.checked_store(packed.header.settings)  # where that waits, there is one: here nobody waits for it
    here = _ray.identity()
    identity = replace(waiting, node_id=here.node_id, ray_worker=here.ray_worker, home_id=waiting.node_id)
    return packed.run(identity, local_retry)


def _may_move(ray_options: Mapping[str, Any]) -> bool:
    """Whether Ray's options leave it open on which node a task runs."""
    strategy = ray_options.get("scheduling_strategy")
    free = strategy is None or strategy in ("DEFAULT", "SPREAD")
    return free and not any(ray_options.get(name) for name in ("label_selector", "placement_group", "fallback_strategy", "_labels"))


# --- below @ray.remote, and plain -----------------------------------------------------------------------------------


def _wrap_plain(function: Callable[P, R], options: TaskOptions) -> Callable[P, R]:
    """A function that recovers when Ray runs it, and runs once, in memory, when it is called."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from faultguard._recoverable import run_plain

        return run_plain(function, options, args, kwargs)

    wrapper.__faultguard__ = True  # type: ignore[attr-defined] # so that a second decoration is noticed
    wrapper.__ray_invocation_decorator__ = functools.partial(_check_submission, function, options)  # type: ignore[attr-defined] # Ray's hook
    return wrapper


def run_plain(function: Callable[..., Any], options: TaskOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a plain decorated function: as the task that it is, or directly."""
    if _session.context() is not None or not _ray.is_ready() or _ray.is_driver():
        return _call_directly(function, options, args, kwargs)
    identity = _ray.identity()
    if identity.in_actor or identity.function_name.rpartition(".")[2] != function.__name__:
        return _call_directly(function, options, args, kwargs)
    payload = _packing.pack(args, kwargs)
    first = [(args, kwargs)]

    def call() -> Any:
        if payload is not None:
            fresh_args, fresh_kwargs = _packing.unpack(payload)
        else:
            fresh_args, fresh_kwargs = first.pop()
        return function(*fresh_args, **fresh_kwargs)

    settings = _session.current_settings()
    bound = inspect.signature(function).bind(*args, **kwargs)
    worker_id = _worker_id(options, bound)
    _check_id(settings, options, worker_id)
    work = Work(call, repeatable=payload is not None, arguments=_digests(settings, bound, small=payload is not None))
    return run_task(settings, identity, options, worker_id or identity.task_id, work)


def _call_directly(
    function: Callable[..., Any], options: TaskOptions, args: tuple[Any, ...], kwargs: dict[str, Any], *, worker_id: str | None = None
) -> Any:
    if worker_id is None:
        worker_id = _worker_id(options, inspect.signature(function).bind(*args, **kwargs))
    handle = Checkpoint.in_memory(task=options.name, worker_id=worker_id or "direct", state=options.state)
    try:
        with _session.entered(_session.TaskContext(handle)):
            value = function(*args, **kwargs)
        handle.finish()  # says here, too, that a state cannot be saved
    finally:
        handle.close()
    return value


def _check_submission(function: Callable[..., Any], options: TaskOptions, invocation: Callable[..., Any]) -> Callable[..., Any]:
    """At the first `.remote()` below `@ray.remote`: Ray must retry at least as often as the budget allows."""

    def submit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        settings = _session.current_settings()
        if settings.named:
            _submits(settings, options, inspect.signature(function).bind(*args, **kwargs))
        variables = _ray.options_at_submission(invocation)
        failures = _failures(options, settings)
        if variables is None:
            _warn_unreadable(options.name)
        else:
            retries = variables["max_retries"]
            if retries != -1 and (failures < 0 or retries < failures + 1):
                needed = "-1" if failures < 0 else f"{_ray_retries(options, failures)} (at least {failures + 1})"
                msg = (
                    f"task {options.name!r} is submitted with Ray's max_retries={retries}, too few for max_failures={failures}. Write "
                    f"@recoverable above @ray.remote, which sets it, or @ray.remote(max_retries={needed})"
                )
                raise UsageError(msg)
        return invocation(args, kwargs)

    return submit


def _submits(settings: Settings, options: TaskOptions, bound: inspect.BoundArguments) -> None:
    """Below `@ray.remote`, in a named run: the worker needs an id, and the run is not over before it has completed."""
    parameter = options.worker_id or "worker_id"
    asked = (*bound.args, *bound.kwargs.values()) if callable(parameter) else (bound.arguments.get(parameter),)
    if any(_ray.is_ref(value) for value in asked):
        return  # whose values only the task sees
    worker_id = _worker_id(options, bound)
    _check_id(settings, options, worker_id)
    named = _session.named_run(settings)
    if named is not None and worker_id is not None:
        named.submits(options.name, worker_id)


@functools.lru_cache(maxsize=1000)
def _warn_unreadable(name: str) -> None:
    import logging

    from faultguard import _events

    text = (
        f"Ray's max_retries of task {name!r} cannot be read; set it to at least max_failures + 1, or write @recoverable above @ray.remote."
    )
    _events.emit(logging.WARNING, "faultguard.retries_unknown", text, task=name)


def _check_id(settings: Settings, options: TaskOptions, worker_id: str | None) -> None:
    """In a named run work is known again by its id: without one it would begin anew with every driver."""
    if settings.named and worker_id is None:
        msg = (
            f"task {options.name!r} is refused in the named run {settings.run!r} without a worker id: a later driver could not tell which "
            f"work it is. Write .options(worker_id=...), give it a parameter worker_id, or @recoverable(worker_id=<a parameter>)"
        )
        raise UsageError(msg)


def _digests(settings: Settings, bound: inspect.BoundArguments, *, small: bool) -> dict[str, str]:
    """Of the arguments, where they are compared."""
    if not (settings.named and settings.check_args):
        return {}
    bound.apply_defaults()
    return _packing.digests(bound.arguments, small=small)


def _worker_id(options: TaskOptions, bound: inspect.BoundArguments) -> str | None:
    """The worker id that the arguments say; None where they say none."""
    chosen = options.worker_id
    bound.apply_defaults()
    if callable(chosen):
        return check_worker_id(chosen(*bound.args, **bound.kwargs))
    parameter = chosen or "worker_id"
    if chosen is None and parameter not in bound.signature.parameters:
        return None
    return check_worker_id(bound.arguments[parameter])
