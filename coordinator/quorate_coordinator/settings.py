"""The coordinator's settings: a TOML file, `QUORATE_*` variables over it, defaults under it.

A variable names a setting by its path in the file, upper case, sections joined by two underscores:
`QUORATE_ROUNDS__DEADLINE_S=3` is `deadline_s = 3` under `[rounds]`. `QUORATE_LOG_LEVEL` and
`QUORATE_LOG_FORMAT`, which agents read too, stand for those of `[log]`. Nothing is read from the
process behind `load_settings`' back: the environment is an argument.

Every setting's description here is also its comment in `deploy/systemd/coordinator.toml`.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from quorate_protocol.errors import ConfigurationError
from quorate_protocol.fields import Name
from quorate_protocol.limits import SECONDS_MAX
from quorate_protocol.state_dir import default_state_dir, expand_home
from quorate_protocol.transport.address import MEMORY_PREFIX, parse_listen_address, parse_memory_name

#: What `load_settings` read, highest first: pydantic-settings asks the class for its sources, not the call.
_LAYERS: ContextVar[tuple[dict[str, Any], ...]] = ContextVar("settings_layers", default=())

_PREFIX: Final = "QUORATE_"


def _none_if_empty(value: object) -> object:
    # A variable cannot undo what the file says by being absent, but it can be empty.
    return None if value == "" else value


def _split(value: object) -> object:
    # A variable holds a list as `a, b, c`.
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _wrong(key: str, problem: str) -> NoReturn:
    """A problem that shows only when several settings of a section are seen together; `key` is the one to blame."""
    raise PydanticCustomError("across", "{problem}", {"key": key, "problem": problem})


Seconds = Annotated[float, Field(ge=0, le=SECONDS_MAX, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, le=SECONDS_MAX, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
OptionalPath = Annotated[Path | None, BeforeValidator(_none_if_empty)]


def _split_map(value: object) -> object:
    # A variable holds a map as `a=x, b=y`.
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise PydanticCustomError(
            "map", "must be NAME=VALUE, NAME=VALUE: {wrong} has no =", {"wrong": wrong[0].strip()}
        )
    return {key.strip(): text.strip() for key, _, text in pairs}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool(cls, value: object) -> object:
        # TOML's `true` would pass for the number 1.
        if isinstance(value, bool):
            raise PydanticCustomError("no_bool", "must not be true or false")
        return value


class TlsSettings(_Section):
    """`[tls]`: what the coordinator shows to those who connect."""

    certificate_file: OptionalPath = Field(
        None,
        description="PEM file with the certificate, then its chain. Unset: a development one, made on first use.",
    )
    key_file: OptionalPath = Field(None, description="PEM file with the private key of certificate_file.")
    names: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_split)] = Field(
        (),
        description="Host names and addresses for the development certificate, beside localhost and this host's name.",
    )

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if self.certificate_file and not self.key_file:
            _wrong("key_file", "must be set, because tls.certificate_file is")
        if self.key_file and not self.certificate_file:
            _wrong("certificate_file", "must be set, because tls.key_file is")
        if self.certificate_file and self.names:
            _wrong("names", "is only for the development certificate, but tls.certificate_file is set")
        return self


class AuthSettings(_Section):
    """`[auth]`: who may connect."""

    token_file: OptionalPath = Field(
        None, description="File with the bearer token. Unset: the file `token` in state_dir, made on first use."
    )


class RoundsSettings(_Section):
    """`[rounds]`: what a round is when its operator does not say, and how many there may be."""

    quorum: int | float = Field(
        0.5, description="Replies needed: a count (1, 2, ...), or a share of the selected agents (over 0, up to 1.0)."
    )
    grace_s: Seconds = Field(0.25, description="Seconds left to stragglers once quorum is met.")
    deadline_s: PositiveSeconds = Field(10.0, description="Seconds after which a round closes, whoever is missing.")
    in_flight_max: Count = Field(1024, description="Rounds that may be open at once; one more is refused as busy.")
    in_flight_per_agent_max: Count = Field(
        64, description="Assignments that one agent may owe at once; with that many it is not selected."
    )
    in_flight_per_operator_max: Count = Field(
        512,
        description="Rounds that one operator may have open at once, by the name that it says; one more is refused as "
        "busy. It is against mistakes: whoever has the token may say any name.",
    )
    attempts: Annotated[int, Field(ge=1, le=100)] = Field(
        1, description="How often one agent may be given a question: again when it failed, or was lost and came back."
    )
    remembered_max: Count = Field(
        10_000, description="Closed rounds that are remembered until their truth is told; the oldest go first."
    )

    @field_validator("quorum", mode="before")
    @classmethod
    def _count_or_share(cls, value: object) -> object:
        if isinstance(value, str):  # from a variable, read as TOML would: "1" is a count, "1.0" a share
            value = _number(value)
        if (isinstance(value, int) and value >= 1) or (isinstance(value, float) and 0 < value <= 1):
            return value
        raise PydanticCustomError("quorum", "must be a count of at least 1, or a share over 0 and up to 1.0")

    @model_validator(mode="after")
    def _grace_within_deadline(self) -> Self:
        # The default grace is no mistake under a shorter deadline: the deadline ends it.
        if "grace_s" in self.model_fields_set and self.grace_s > self.deadline_s:
            _wrong("grace_s", f"must not exceed rounds.deadline_s ({self.deadline_s:g}), got {self.grace_s:g}")
        return self


class SessionsSettings(_Section):
    """`[sessions]`: how long silence and goodbyes may last."""

    pulse_s: PositiveSeconds = Field(2.0, description="Seconds between the heartbeats that agents are told to send.")
    lease_s: PositiveSeconds = Field(
        10.0, description="Seconds of silence, or without a link, after which an agent counts as lost."
    )
    drain_s: Seconds = Field(10.0, description="Seconds that open rounds may take to finish after SIGTERM.")
    hello_timeout_s: PositiveSeconds = Field(5.0, description="Seconds that a new connection has to say who it is.")

    @model_validator(mode="after")
    def _lease_over_pulse(self) -> Self:
        if self.lease_s <= self.pulse_s:
            _wrong("lease_s", f"must be greater than sessions.pulse_s ({self.pulse_s:g}), got {self.lease_s:g}")
        return self


class LearnerSettings(_Section):
    """`[learner]`: how the agents' answers are weighed."""

    kind: Literal["vote"] = Field("vote", description="The learner. `vote` is a weighted vote with fixed share.")
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="How hard a wrong answer costs weight. Unset: the learner's own."
    )
    share: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = Field(
        None, description="Part of all weight that is dealt out anew after each truth. Unset: the learner's own."
    )


class JournalSettings(_Section):
    """`[journal]`: how lasting the record of all rounds is, and how much of it is kept."""

    sync: Literal["full", "normal", "off"] = Field(
        "full",
        description="What an outcome outlives once it is announced: `full`, a power cut; `normal`, the end of the "
        "process; `off`, nothing: there is no journal.",
    )
    keep_days: Annotated[float, Field(gt=0, le=36_500, allow_inf_nan=False)] = Field(
        30.0, description="Days after which a closed round is taken out of the journal."
    )
    keep_bytes: Annotated[int, Field(ge=1 << 20)] = Field(
        4 << 30, description="Bytes that the journal may have; over it the oldest rounds are taken out earlier."
    )
    checkpoint_rounds: Count = Field(
        1000,
        description="Rounds after which the learner's state is recorded, so that a restart replays no more of them. "
        "Ten experiences count as one, and 16 MiB of records as all of them.",
    )


class BodiesSettings(_Section):
    """`[bodies]`: how large questions, answers and truths may be that are no part of their messages."""

    bytes_max: Count = Field(4 << 30, description="Bytes of the largest body that is taken.")
    spool_bytes_max: Count = Field(
        16 << 30, description="Bytes of bodies over 8 MiB that may be held together, as files in state_dir/spool."
    )
    memory_bytes_max: Count = Field(
        256 << 20, description="Bytes of smaller ones that may be held together, in memory."
    )

    @model_validator(mode="after")
    def _one_fits(self) -> Self:
        if self.bytes_max > self.spool_bytes_max and "bytes_max" in self.model_fields_set:
            _wrong(
                "bytes_max", f"must not exceed bodies.spool_bytes_max ({self.spool_bytes_max}), got {self.bytes_max}"
            )
        return self


class LogSettings(_Section):
    """`[log]`: what is logged, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least level that is logged.")
    format: Literal["auto", "json", "console"] = Field(
        "auto", description="`json`, `console` (for people), or `auto`: console on a terminal, json elsewhere."
    )


class Settings(BaseSettings):
    """All settings. `Settings()` has the defaults alone; `load_settings` reads the file and the environment."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    listen: str = Field(
        "127.0.0.1:4433",
        description="UDP address for agents and operators. 0.0.0.0:4433 is every interface; memory:NAME this process "
        "alone.",
    )
    http: str = Field(
        "127.0.0.1:9433", description="TCP address of /metrics, /healthz and /readyz. Empty: there are none."
    )
    state_dir: Path = Field(
        default_factory=lambda: default_state_dir(os.environ),
        description="Directory of what must last: development certificates, token. "
        "Unset: systemd's, else ~/.local/share/quorate.",
    )
    consumers: Annotated[dict[Name, str], BeforeValidator(_split_map)] = Field(
        default_factory=dict,
        description="Who takes the streams that agents open of their own: topic to MODULE:FUNCTION or "
        "FILE.py:FUNCTION.",
    )
    tls: TlsSettings = TlsSettings()
    auth: AuthSettings = AuthSettings()
    rounds: RoundsSettings = RoundsSettings()
    sessions: SessionsSettings = SessionsSettings()
    learner: LearnerSettings = LearnerSettings()
    journal: JournalSettings = JournalSettings()
    bodies: BodiesSettings = BodiesSettings()
    log: LogSettings = LogSettings()

    @field_validator("listen", "http", mode="before")
    @classmethod
    def _address(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str) and (value or info.field_name == "listen"):
            try:
                if info.field_name == "listen" and value.startswith(MEMORY_PREFIX):
                    parse_memory_name(value, "listen")
                else:
                    parse_listen_address(value)
            except ConfigurationError as error:
                raise PydanticCustomError("address", "{problem}", {"problem": error.problem}) from error
        return value

    @property
    def listen_address(self) -> tuple[str, int]:
        """Host and UDP port to serve agents and operators on.

        Raises:
            ConfigurationError: it is an address in memory.
        """
        return parse_listen_address(self.listen)

    @property
    def http_address(self) -> tuple[str, int] | None:
        """Host and TCP port of the HTTP endpoints; None when they are turned off."""
        return parse_listen_address(self.http) if self.http else None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then what `load_settings` read. Never the process's own environment."""
        return init_settings, *(InitSettingsSource(settings_cls, layer) for layer in _LAYERS.get())


_SECTIONS: Final[dict[str, type[_Section]]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, _Section)
}
#: Variables that all of Quorate's programs read, as names without the prefix. Those of the setting go before them.
_SHARED: Final = {"log_level": ("log", "level"), "log_format": ("log", "format")}

_PATHS: Final = ("state_dir", "tls.certificate_file", "tls.key_file", "auth.token_file")


def load_settings(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """Reads the settings: environment over file over defaults.

    Relative paths in the file are meant from the file's directory; in the environment, from the
    working directory.

    Raises:
        ConfigurationError: the file cannot be read, or a setting is unknown or wrong. Its `path` is the
            setting's in the file, or the file; when several are wrong the others are told after the first.
    """
    from_file = {} if path is None else _read_file(path)
    from_environment = _read_environment(environ)
    _anchor_paths(from_file, Path.cwd() if path is None else path.absolute().parent, environ)
    _anchor_paths(from_environment, Path.cwd(), environ)
    token = _LAYERS.set((from_environment, from_file, {"state_dir": default_state_dir(environ)}))
    try:
        return Settings()
    except ValidationError as error:
        problems = [_explain(details, from_environment) for details in error.errors(include_url=False)]
        (first_path, first), *more = problems
        raise ConfigurationError(first_path, "; ".join([first, *(f"{p}: {problem}" for p, problem in more)])) from None
    finally:
        _LAYERS.reset(token)


def setting_paths() -> list[str]:
    """The path of every setting, such as `listen` and `rounds.deadline_s`, in the order of the file."""
    flat = [name for name in Settings.model_fields if name not in _SECTIONS]
    return flat + [f"{name}.{key}" for name, section in _SECTIONS.items() for key in section.model_fields]


def _read_file(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        return tomllib.loads(data.decode())
    except OSError as error:
        raise ConfigurationError(str(path), f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(str(path), f"is not UTF-8 text (at line {line})") from None
    except tomllib.TOMLDecodeError as error:  # its text ends with the line and the column
        raise ConfigurationError(str(path), f"is not TOML: {error}") from None


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    by_single_underscore = {path.replace(".", "_"): path for path in setting_paths() if "." in path}
    for name, (section, key) in _SHARED.items():
        if text := environ.get(_PREFIX + name.upper()):
            layer.setdefault(section, {})[key] = text
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX):
            continue
        name = variable.removeprefix(_PREFIX).lower()
        section, underscores, key = name.partition("__")
        if underscores:
            if section not in _SECTIONS:
                raise ConfigurationError(section, f"unknown section{_suggest(section, _SECTIONS)} (from {variable})")
            layer.setdefault(section, {})[key] = text
        elif name in _SECTIONS:
            raise ConfigurationError(name, f"is a section; its settings are {variable}__... (from {variable})")
        elif name in Settings.model_fields:
            layer[name] = text
        elif name in by_single_underscore and name not in _SHARED:
            meant = _variable(by_single_underscore[name])
            raise ConfigurationError(by_single_underscore[name], f"is set by {meant}, not by {variable}")
        # Any other name is not the coordinator's: agents and operators have variables of their own.
    return layer


def _anchor_paths(layer: dict[str, Any], base: Path, environ: Mapping[str, str]) -> None:
    if layer.get("state_dir") == "":  # as good as unset
        del layer["state_dir"]
    for path in _PATHS:
        section, _, key = path.rpartition(".")
        table = layer.get(section) if section else layer
        if isinstance(table, dict) and isinstance(table.get(key), str) and table[key]:
            table[key] = base / expand_home(table[key], environ)


def _explain(details: ErrorDetails, from_environment: dict[str, Any]) -> tuple[str, str]:
    """The path and the problem of one pydantic error, in the words of the file."""
    kind, context = details["type"], details.get("ctx", {})
    # Beyond the section and the key come an index into a list, or pydantic's own names for parts of a union.
    location = [str(part) for part in details["loc"][:2]]
    if kind == "across":
        return ".".join([*location, context["key"]]), context["problem"]
    path = ".".join(location)
    section = location[0]
    given: Any = from_environment
    for part in location:
        given = given.get(part) if isinstance(given, dict) else None
    source = f" (from {_variable(path)})" if given is not None else ""
    if kind == "extra_forbidden":
        known = _SECTIONS[section].model_fields if len(location) == 2 else Settings.model_fields
        what = "section" if isinstance(details["input"], dict) else "setting"
        return path, f"unknown {what}{_suggest(location[-1], known)}{source}"
    if kind == "model_type" or (len(location) == 1 and section in _SECTIONS):
        return path, f"must be a section, [{section}]"
    if kind == "address":  # shows the value by itself
        return path, f"{context['problem']}{source}"
    problem = _problem(kind, context, details["msg"])
    return path, f"{problem}, got {_shown(details['input'])}{source}"


def _problem(kind: str, context: Mapping[str, Any], message: str) -> str:
    match kind:
        case "greater_than":
            return f"must be greater than {context['gt']:.9g}"
        case "greater_than_equal":
            return f"must be at least {context['ge']:.9g}"
        case "less_than":
            return f"must be less than {context['lt']:.9g}"
        case "less_than_equal":
            return f"must be at most {context['le']:.9g}"
        case "float_type" | "float_parsing":
            return "must be a number"
        case "finite_number":
            return "must be a finite number"
        case "int_type" | "int_parsing" | "int_from_float" | "int_parsing_size":
            return "must be a whole number"
        case "string_type" | "string_too_short":
            return "must be text that is not empty"
        case "path_type":
            return "must be the path of a file"
        case "tuple_type":
            return "must be a list"
        case "literal_error":
            return f"must be {context['expected']}"
        case _:
            return message


def _suggest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"


def _variable(path: str) -> str:
    return _PREFIX + path.replace(".", "__").upper()


def _number(text: str) -> int | float | None:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return None


def _shown(value: object) -> str:
    """A value as TOML would write it, and never a long one."""
    text = repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
