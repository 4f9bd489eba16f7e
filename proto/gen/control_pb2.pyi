from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RankMessage(_message.Message):
    __slots__ = ("generation", "hello", "join", "store_set", "restored", "committed", "suspect", "goodbye")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    JOIN_FIELD_NUMBER: _ClassVar[int]
    STORE_SET_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    generation: int
    hello: Hello
    join: Join
    store_set: StoreSet
    restored: Restored
    committed: Committed
    suspect: Suspect
    goodbye: Goodbye
    def __init__(self, generation: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., join: _Optional[_Union[Join, _Mapping]] = ..., store_set: _Optional[_Union[StoreSet, _Mapping]] = ..., restored: _Optional[_Union[Restored, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., suspect: _Optional[_Union[Suspect, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("rank", "incarnation", "pid", "host", "world_size", "live_step", "inexact_since")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    LIVE_STEP_FIELD_NUMBER: _ClassVar[int]
    INEXACT_SINCE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    incarnation: int
    pid: int
    host: int
    world_size: int
    live_step: int
    inexact_since: int
    def __init__(self, rank: _Optional[int] = ..., incarnation: _Optional[int] = ..., pid: _Optional[int] = ..., host: _Optional[int] = ..., world_size: _Optional[int] = ..., live_step: _Optional[int] = ..., inexact_since: _Optional[int] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("plan", "live_step", "held", "peers", "compute", "joined_ns", "until", "image_bytes", "parity", "disk", "recovery", "ready_step", "told_step", "units", "inexact_since")
    class UnitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    PLAN_FIELD_NUMBER: _ClassVar[int]
    LIVE_STEP_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    JOINED_NS_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_FIELD_NUMBER: _ClassVar[int]
    READY_STEP_FIELD_NUMBER: _ClassVar[int]
    TOLD_STEP_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    INEXACT_SINCE_FIELD_NUMBER: _ClassVar[int]
    plan: str
    live_step: int
    held: _containers.RepeatedCompositeFieldContainer[Held]
    peers: _containers.RepeatedScalarFieldContainer[int]
    compute: str
    joined_ns: int
    until: int
    image_bytes: int
    parity: _containers.RepeatedCompositeFieldContainer[HeldParity]
    disk: _containers.RepeatedScalarFieldContainer[int]
    recovery: str
    ready_step: int
    told_step: int
    units: _containers.ScalarMap[int, str]
    inexact_since: int
    def __init__(self, plan: _Optional[str] = ..., live_step: _Optional[int] = ..., held: _Optional[_Iterable[_Union[Held, _Mapping]]] = ..., peers: _Optional[_Iterable[int]] = ..., compute: _Optional[str] = ..., joined_ns: _Optional[int] = ..., until: _Optional[int] = ..., image_bytes: _Optional[int] = ..., parity: _Optional[_Iterable[_Union[HeldParity, _Mapping]]] = ..., disk: _Optional[_Iterable[int]] = ..., recovery: _Optional[str] = ..., ready_step: _Optional[int] = ..., told_step: _Optional[int] = ..., units: _Optional[_Mapping[int, str]] = ..., inexact_since: _Optional[int] = ...) -> None: ...

class HeldParity(_message.Message):
    __slots__ = ("placement", "stripe", "index", "steps")
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    STRIPE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    placement: int
    stripe: int
    index: int
    steps: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, placement: _Optional[int] = ..., stripe: _Optional[int] = ..., index: _Optional[int] = ..., steps: _Optional[_Iterable[int]] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ("rank", "steps")
    RANK_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    steps: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, rank: _Optional[int] = ..., steps: _Optional[_Iterable[int]] = ...) -> None: ...

class StoreSet(_message.Message):
    __slots__ = ("key", "value", "gather")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    GATHER_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: bytes
    gather: bool
    def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ..., gather: _Optional[bool] = ...) -> None: ...

class Restored(_message.Message):
    __slots__ = ("step", "restored_ns", "sources", "note", "inexact_since")
    STEP_FIELD_NUMBER: _ClassVar[int]
    RESTORED_NS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    INEXACT_SINCE_FIELD_NUMBER: _ClassVar[int]
    step: int
    restored_ns: int
    sources: _containers.RepeatedCompositeFieldContainer[Source]
    note: str
    inexact_since: int
    def __init__(self, step: _Optional[int] = ..., restored_ns: _Optional[int] = ..., sources: _Optional[_Iterable[_Union[Source, _Mapping]]] = ..., note: _Optional[str] = ..., inexact_since: _Optional[int] = ...) -> None: ...

class Source(_message.Message):
    __slots__ = ("rung", "bytes", "pieces")
    RUNG_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    rung: str
    bytes: int
    pieces: int
    def __init__(self, rung: _Optional[str] = ..., bytes: _Optional[int] = ..., pieces: _Optional[int] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("step", "committed_ns", "loss", "first_after_resume", "protected_placement", "protected_step", "replica_mismatch")
    STEP_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_NS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    FIRST_AFTER_RESUME_FIELD_NUMBER: _ClassVar[int]
    PROTECTED_PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    PROTECTED_STEP_FIELD_NUMBER: _ClassVar[int]
    REPLICA_MISMATCH_FIELD_NUMBER: _ClassVar[int]
    step: int
    committed_ns: int
    loss: float
    first_after_resume: bool
    protected_placement: int
    protected_step: int
    replica_mismatch: str
    def __init__(self, step: _Optional[int] = ..., committed_ns: _Optional[int] = ..., loss: _Optional[float] = ..., first_after_resume: _Optional[bool] = ..., protected_placement: _Optional[int] = ..., protected_step: _Optional[int] = ..., replica_mismatch: _Optional[str] = ...) -> None: ...

class Suspect(_message.Message):
    __slots__ = ("what",)
    WHAT_FIELD_NUMBER: _ClassVar[int]
    what: str
    def __init__(self, what: _Optional[str] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class RankOrder(_message.Message):
    __slots__ = ("generation", "welcome", "fence", "form", "store_all", "stop")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    STORE_ALL_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    generation: int
    welcome: Welcome
    fence: Fence
    form: Form
    store_all: StoreAll
    stop: Stop
    def __init__(self, generation: _Optional[int] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., fence: _Optional[_Union[Fence, _Mapping]] = ..., form: _Optional[_Union[Form, _Mapping]] = ..., store_all: _Optional[_Union[StoreAll, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Fence(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Form(_message.Message):
    __slots__ = ("members", "resume_step", "fresh", "solo", "placement", "inexact", "inexact_since")
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    RESUME_STEP_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    SOLO_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    INEXACT_FIELD_NUMBER: _ClassVar[int]
    INEXACT_SINCE_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[Member]
    resume_step: int
    fresh: bool
    solo: bool
    placement: int
    inexact: str
    inexact_since: int
    def __init__(self, members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., resume_step: _Optional[int] = ..., fresh: _Optional[bool] = ..., solo: _Optional[bool] = ..., placement: _Optional[int] = ..., inexact: _Optional[str] = ..., inexact_since: _Optional[int] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("rank", "incarnation", "host", "rung", "peer", "step")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    RUNG_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    rank: int
    incarnation: int
    host: int
    rung: str
    peer: int
    step: int
    def __init__(self, rank: _Optional[int] = ..., incarnation: _Optional[int] = ..., host: _Optional[int] = ..., rung: _Optional[str] = ..., peer: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class StoreAll(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, bytes]
    def __init__(self, values: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ("exit_code", "reason")
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    exit_code: int
    reason: str
    def __init__(self, exit_code: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class AgentMessage(_message.Message):
    __slots__ = ("hello", "started", "exited", "beat", "failed", "promised", "learnt")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    EXITED_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    PROMISED_FIELD_NUMBER: _ClassVar[int]
    LEARNT_FIELD_NUMBER: _ClassVar[int]
    hello: AgentHello
    started: RankStarted
    exited: RankExited
    beat: Beat
    failed: AgentFailed
    promised: Promised
    learnt: Learnt
    def __init__(self, hello: _Optional[_Union[AgentHello, _Mapping]] = ..., started: _Optional[_Union[RankStarted, _Mapping]] = ..., exited: _Optional[_Union[RankExited, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., failed: _Optional[_Union[AgentFailed, _Mapping]] = ..., promised: _Optional[_Union[Promised, _Mapping]] = ..., learnt: _Optional[_Union[Learnt, _Mapping]] = ...) -> None: ...

class Term(_message.Message):
    __slots__ = ("number", "leader")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LEADER_FIELD_NUMBER: _ClassVar[int]
    number: int
    leader: str
    def __init__(self, number: _Optional[int] = ..., leader: _Optional[str] = ...) -> None: ...

class Promised(_message.Message):
    __slots__ = ("term",)
    TERM_FIELD_NUMBER: _ClassVar[int]
    term: Term
    def __init__(self, term: _Optional[_Union[Term, _Mapping]] = ...) -> None: ...

class Learnt(_message.Message):
    __slots__ = ("term", "number")
    TERM_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    term: Term
    number: int
    def __init__(self, term: _Optional[_Union[Term, _Mapping]] = ..., number: _Optional[int] = ...) -> None: ...

class AgentHello(_message.Message):
    __slots__ = ("host", "ranks", "world_size", "index", "address", "door", "coordinator", "protector", "capacity", "domain", "roster", "promised")
    HOST_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DOOR_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    PROTECTOR_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    PROMISED_FIELD_NUMBER: _ClassVar[int]
    host: str
    ranks: _containers.RepeatedCompositeFieldContainer[RankStarted]
    world_size: int
    index: int
    address: str
    door: str
    coordinator: str
    protector: str
    capacity: int
    domain: str
    roster: str
    promised: Term
    def __init__(self, host: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[RankStarted, _Mapping]]] = ..., world_size: _Optional[int] = ..., index: _Optional[int] = ..., address: _Optional[str] = ..., door: _Optional[str] = ..., coordinator: _Optional[str] = ..., protector: _Optional[str] = ..., capacity: _Optional[int] = ..., domain: _Optional[str] = ..., roster: _Optional[str] = ..., promised: _Optional[_Union[Term, _Mapping]] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AgentFailed(_message.Message):
    __slots__ = ("reason", "waits")
    REASON_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    waits: bool
    def __init__(self, reason: _Optional[str] = ..., waits: _Optional[bool] = ...) -> None: ...

class RankStarted(_message.Message):
    __slots__ = ("rank", "incarnation", "pid", "source", "started_ns")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    STARTED_NS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    incarnation: int
    pid: int
    source: str
    started_ns: int
    def __init__(self, rank: _Optional[int] = ..., incarnation: _Optional[int] = ..., pid: _Optional[int] = ..., source: _Optional[str] = ..., started_ns: _Optional[int] = ...) -> None: ...

class RankExited(_message.Message):
    __slots__ = ("rank", "incarnation", "reason", "detected_ns", "last_progress_ns", "step", "finished", "phase")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETECTED_NS_FIELD_NUMBER: _ClassVar[int]
    LAST_PROGRESS_NS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    incarnation: int
    reason: str
    detected_ns: int
    last_progress_ns: int
    step: int
    finished: bool
    phase: str
    def __init__(self, rank: _Optional[int] = ..., incarnation: _Optional[int] = ..., reason: _Optional[str] = ..., detected_ns: _Optional[int] = ..., last_progress_ns: _Optional[int] = ..., step: _Optional[int] = ..., finished: _Optional[bool] = ..., phase: _Optional[str] = ...) -> None: ...

class AgentOrder(_message.Message):
    __slots__ = ("kill", "inject", "stop", "recovered", "welcome", "roster", "adopt", "beat", "done", "topology", "promise")
    KILL_FIELD_NUMBER: _ClassVar[int]
    INJECT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    RECOVERED_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    ADOPT_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    PROMISE_FIELD_NUMBER: _ClassVar[int]
    kill: KillRank
    inject: InjectOrder
    stop: StopJob
    recovered: Recovered
    welcome: AgentWelcome
    roster: Roster
    adopt: Adopt
    beat: Beat
    done: JobDone
    topology: Topology
    promise: Promise
    def __init__(self, kill: _Optional[_Union[KillRank, _Mapping]] = ..., inject: _Optional[_Union[InjectOrder, _Mapping]] = ..., stop: _Optional[_Union[StopJob, _Mapping]] = ..., recovered: _Optional[_Union[Recovered, _Mapping]] = ..., welcome: _Optional[_Union[AgentWelcome, _Mapping]] = ..., roster: _Optional[_Union[Roster, _Mapping]] = ..., adopt: _Optional[_Union[Adopt, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., done: _Optional[_Union[JobDone, _Mapping]] = ..., topology: _Optional[_Union[Topology, _Mapping]] = ..., promise: _Optional[_Union[Promise, _Mapping]] = ...) -> None: ...

class Promise(_message.Message):
    __slots__ = ("term",)
    TERM_FIELD_NUMBER: _ClassVar[int]
    term: Term
    def __init__(self, term: _Optional[_Union[Term, _Mapping]] = ...) -> None: ...

class AgentWelcome(_message.Message):
    __slots__ = ("index", "fenced", "term")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    index: int
    fenced: bool
    term: Term
    def __init__(self, index: _Optional[int] = ..., fenced: _Optional[bool] = ..., term: _Optional[_Union[Term, _Mapping]] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class Adopt(_message.Message):
    __slots__ = ("rank", "incarnation")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    rank: int
    incarnation: int
    def __init__(self, rank: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class JobDone(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Topology(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class KillRank(_message.Message):
    __slots__ = ("rank", "incarnation", "reason")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    rank: int
    incarnation: int
    reason: str
    def __init__(self, rank: _Optional[int] = ..., incarnation: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class InjectOrder(_message.Message):
    __slots__ = ("rank", "kind", "id")
    RANK_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    rank: int
    kind: str
    id: str
    def __init__(self, rank: _Optional[int] = ..., kind: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class StopJob(_message.Message):
    __slots__ = ("exit_code", "reason")
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    exit_code: int
    reason: str
    def __init__(self, exit_code: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Recovered(_message.Message):
    __slots__ = ("line",)
    LINE_FIELD_NUMBER: _ClassVar[int]
    line: str
    def __init__(self, line: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class InjectRequest(_message.Message):
    __slots__ = ("rank", "kind", "id")
    RANK_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    rank: int
    kind: str
    id: str
    def __init__(self, rank: _Optional[int] = ..., kind: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class InjectReply(_message.Message):
    __slots__ = ("accepted", "reason")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    def __init__(self, accepted: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...
