"""config.toml and the environment -> frozen settings. Read once, in the entry points.

Every key has its unit in its name or its comment in config.toml; an unknown key is refused by name.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from service.shared.messages import FindingName

ENVIRONMENT_PREFIX = "MEDPRUNER__"

# PS3.5 6.2, AE: 1 to 16 characters of the default repertoire, no backslash, no leading or trailing space
AETitle = Annotated[str, Field(max_length=16, pattern=r"^[!-\[\]-~]([ -\[\]-~]*[!-\[\]-~])?$")]

MailAddress = Annotated[str, Field(pattern=r"^[!-?A-~]+@[!-?A-~]+$")]  # no white space: it ends up in a header
HttpAddress = Annotated[str, Field(pattern=r"^https?://[^\s?#]+$")]
HeaderName = Annotated[str, Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")]  # RFC 9110 5.1


class ConfigurationError(Exception):
    """The configuration cannot be used; the message names the key and the remedy, one fault per line."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSettings(Section):
    path: Path = Path("var")
    keep_days: float = Field(default=90, ge=0)
    cache_gb: float = Field(default=2, ge=0)
    cache_hours: float = Field(default=24, gt=0)


class ScpSettings(Section):
    ae_title: AETitle = "MEDPRUNER"
    host: str = "127.0.0.1"
    port: int = Field(default=11112, ge=0, le=65535)
    tls_port: int | None = Field(default=None, ge=1, le=65535)
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    tls_minimum: Literal["1.2", "1.3"] = "1.2"
    processes: int = Field(default=4, ge=1, le=64)
    max_associate_bytes: int = Field(default=1048576, ge=4096, le=1 << 24)
    max_pdu_bytes: int = Field(default=131072, ge=4096, le=1048576)
    max_command_bytes: int = Field(default=65536, ge=512, le=1 << 20)
    max_data_set_gb: float = Field(default=4, gt=0)
    max_unassociated: int = Field(default=128, ge=1)
    max_associations: int = Field(default=64, ge=1)
    max_associations_per_address: int = Field(default=32, ge=1)
    idle_timeout_s: float = Field(default=30, gt=0)
    pdu_timeout_s: float | None = Field(default=None, gt=0)
    accept_unknown_sources: bool = False
    storage_commitment: bool = False

    @model_validator(mode="after")
    def tls_keys_fit_together(self) -> ScpSettings:
        given = (self.tls_port is not None, self.tls_certificate is not None, self.tls_key is not None)
        if any(given) != all(given):
            raise ValueError("tls_port, tls_certificate and tls_key are given together, or all left out")
        if self.tls_ca is not None and self.tls_port is None:
            raise ValueError("tls_ca has no meaning without tls_port")
        if self.tls_port == self.port:
            raise ValueError("tls_port and port must differ; port = 0 switches the plain port off")
        return self


class SourceSettings(Section):
    ae_title: AETitle
    host: str | None = None
    quiet_period_s: float | None = Field(default=None, gt=0)
    commitment_port: int | None = Field(default=None, ge=1, le=65535)
    commitment_tls: bool = False

    @model_validator(mode="after")
    def commitment_keys_fit_together(self) -> SourceSettings:
        if self.commitment_tls and self.commitment_port is None:
            raise ValueError("commitment_tls has no meaning without commitment_port")
        return self


class SpoolSettings(Section):
    path: Path | None = None
    keep_days: float = Field(default=3, ge=0)
    min_free_gb: float = Field(default=5, ge=0)


class AssemblySettings(Section):
    quiet_period_s: float = Field(default=60, gt=0)
    max_open_s: float = Field(default=5400, gt=0)
    sweep_s: float = Field(default=2, gt=0)


class DatabaseSettings(Section):
    url: SecretStr = SecretStr("")


class QueueSettings(Section):
    url: SecretStr = SecretStr("")
    name: str = "medpruner"
    hard_time_limit_s: int = Field(default=1800, ge=1)
    visibility_timeout_s: int = Field(default=2400, ge=2)
    lease_s: float = Field(default=15, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    ring_again_s: float = Field(default=10, gt=0)
    batch_studies: int = Field(default=1, ge=1, le=64)

    @model_validator(mode="after")
    def redelivery_waits_for_the_time_limit(self) -> QueueSettings:
        if self.visibility_timeout_s <= self.hard_time_limit_s:
            raise ValueError(
                "visibility_timeout_s must be above hard_time_limit_s, else Redis delivers running work again"
            )
        return self


class ModelSettings(Section):
    path: str = "demo"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    compile: bool = False
    max_new_tokens: int = Field(default=512, ge=1)
    threads: int = Field(default=0, ge=0)
    coded_findings: tuple[FindingName, ...] | None = None


class PruningMethod(StrEnum):
    GUARDED = "guarded"  # ours: slabs, body, salience and regions guard what attention would drop
    MEDPRUNER = "medpruner"  # the paper's rule, made correct
    OFF = "off"  # every input and token is kept


class PruningSettings(Section):
    method: PruningMethod = PruningMethod.GUARDED
    slice_stage: bool = True
    token_stage: bool = True
    gamma: float = Field(default=0.05, ge=0, le=2)
    tau: float = Field(default=0.9, gt=0, le=1)
    temperature: float = Field(default=2.0, gt=0)
    contextual_fraction: float = Field(default=0.05, ge=0, lt=1)
    slab_mm: float = Field(default=4.0, ge=0)
    slab_operation: Literal["mean", "mip"] = "mean"
    tile_change: float = Field(default=0.01, ge=0, le=2)
    gap_cap_mm: float = Field(default=5.0, gt=0)
    sink_ratio: float = Field(default=10.0, gt=1)
    salience_floor: float = Field(default=150.0, ge=0)
    coverage_lung: float = Field(default=1.0, ge=0, le=1)
    coverage_other: float = Field(default=0.1, ge=0, le=1)
    merge_similarity: float = Field(default=0.9, ge=-1, le=1)
    token_budget: float = Field(default=0.3, gt=0)
    dropped_slices: Literal["omit", "name", "refer"] = "omit"

    @model_validator(mode="after")
    def budget_is_a_share_or_a_number(self) -> PruningSettings:
        if self.token_budget > 1 and self.token_budget != int(self.token_budget):
            raise ValueError("token_budget is a share up to 1, or above that a whole number of tokens")
        return self


class SeriesSettings(Section):
    modality: tuple[str, ...] = ("CT", "MR")
    orientation: Literal["axial", "any"] = "axial"
    min_slices: int = Field(default=8, ge=1)
    max_slices: int = Field(default=85, ge=1)
    max_gap_mm: float = Field(default=30, gt=0)
    decode_timeout_s: float = Field(default=300, gt=0)
    decode_memory_gb: float = Field(default=8, gt=0)


class Companion(StrEnum):
    SC = "sc"  # a colour picture of every slice with what the model was shown; any viewer
    SEG = "seg"  # the same as a binary segmentation, for machines
    PM = "pm"  # the attention that each part of the slices received, as a parametric map; for research
    PDF = "pdf"  # the report with some of those pictures, for a PACS that shows nothing else
    KOS = "kos"  # a selection of the slices that the model was shown


class RouteSettings(Section):
    name: str = Field(default="default", pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    match: dict[str, str] = Field(default_factory=dict)
    prompt: str | None = None
    destinations: tuple[str, ...] | None = None
    companions: tuple[Companion, ...] = ()
    report_refusals: bool = False
    model: dict[str, Any] = Field(default_factory=dict)
    pruning: dict[str, Any] = Field(default_factory=dict)
    series: dict[str, Any] = Field(default_factory=dict)


# Defined terms of Specific Character Set (PS3.3 C.12.1.1.2) that results are written in. Without GBK, in which
# dciodvfy calls every name invalid, and ISO 2022 IR 58, which pydicom 3.0.2 writes without its escape: GB18030 instead.
UTF_8 = "ISO_IR 192"
MULTI_BYTE = frozenset({"ISO 2022 IR 87", "ISO 2022 IR 159", "ISO 2022 IR 149"})
_SINGLE_BYTE = ("6", "13", "100", "101", "109", "110", "126", "127", "138", "144", "148", "166", "203")
CODE_EXTENSIONS = MULTI_BYTE | {f"ISO 2022 IR {number}" for number in _SINGLE_BYTE}
CHARSETS = MULTI_BYTE | {UTF_8, "GB18030"} | {f"ISO_IR {number}" for number in _SINGLE_BYTE}


class SrSopClass(StrEnum):
    """Best first: the order in which `auto` offers them."""

    COMPREHENSIVE_3D = "comprehensive3d"
    COMPREHENSIVE = "comprehensive"
    ENHANCED = "enhanced"
    BASIC_TEXT = "basic_text"  # for display alone: no measurements, nothing coded


class Compression(StrEnum):
    """Lossless encodings of the colour map, smallest first; without either it goes uncompressed."""

    JPEG2000 = "jpeg2000"
    RLE = "rle"


class DestinationSettings(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    ae_title: AETitle
    host: str
    port: int = Field(ge=1, le=65535)
    calling_ae_title: AETitle | None = None
    tls: bool = False
    tls_ca: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_minimum: Literal["1.2", "1.3"] = "1.2"
    tls_verify_host: bool = True
    sr_sop_class: SrSopClass | Literal["auto"] | Annotated[tuple[SrSopClass, ...], Field(min_length=1)] = (
        SrSopClass.COMPREHENSIVE_3D
    )
    compression: tuple[Compression, ...] = tuple(Compression)
    concurrency: int = Field(default=1, ge=1, le=16)
    charset: str = UTF_8
    timeout_s: float = Field(default=30, gt=0)
    retry_delay_s: float = Field(default=30, gt=0)
    retry_max_delay_s: float = Field(default=900, gt=0)
    retry_max_attempts: int = Field(default=100, ge=1)
    storage_commitment: bool = False
    commitment_timeout_s: float = Field(default=300, gt=0)
    proof: Literal["none", "find"] = "none"

    @property
    def sr_sop_classes(self) -> tuple[SrSopClass, ...]:
        """The classes of report to offer, best first; each but the first only where those before are not taken."""
        if self.sr_sop_class == "auto":
            return tuple(SrSopClass)
        if isinstance(self.sr_sop_class, tuple):
            return tuple(dict.fromkeys(self.sr_sop_class))
        return (SrSopClass(self.sr_sop_class),)

    def kind_of_report(self, sop_class: SrSopClass) -> str:
        """Under which kind the report of this class, in this character set, is on record."""
        numbers = [term.rpartition(" ")[2] for term in self.charset.split("\\") if term]
        suffix = "-gb18030" if self.charset == "GB18030" else f"-ir{'-'.join(numbers)}"
        return f"sr-{sop_class.value}" + ("" if self.charset == UTF_8 else suffix)

    @property
    def wants_proof(self) -> bool:
        """Whether a delivery is only finished once the destination has vouched for it, or was seen to hold it."""
        return self.storage_commitment or self.proof != "none"

    @model_validator(mode="after")
    def tls_keys_fit_together(self) -> DestinationSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key are given together, or both left out")
        if not self.tls and any((self.tls_ca, self.tls_certificate)):
            raise ValueError("tls_ca, tls_certificate and tls_key have no meaning without tls = true")
        return self

    @field_validator("charset")
    @classmethod
    def charset_is_of_dicom(cls, charset: str) -> str:
        """As Specific Character Set has it; a multi-byte set alone stands behind the default repertoire."""
        if charset.lower() in ("utf-8", "utf8"):
            return UTF_8
        terms = charset.split("\\")
        unknown = [term for term in terms if term not in (CHARSETS if len(terms) == 1 else CODE_EXTENSIONS | {""})]
        if unknown or (len(terms) == 1 and not charset):
            raise ValueError(
                f"{unknown[0] if unknown else charset!r} is no such term here; utf-8, {', '.join(sorted(CHARSETS))}, "
                "or code extensions between backslashes, for instance '\\ISO 2022 IR 149' "
                "(for GBK and ISO 2022 IR 58 take GB18030)"
            )
        return f"\\{charset}" if terms[0] in MULTI_BYTE else charset


class ReportSettings(Section):
    language: Literal["en"] = "en"
    prompt: str = (
        "You are a radiology assistant. Read the slices of this examination in order and write a report "
        "with the sections Findings: and Impression:."
    )
    series_number: int = Field(default=9901, ge=1, le=2**31 - 1)
    series_description: str = Field(default="AI findings (unverified)", min_length=1, max_length=64)
    manufacturer: str = Field(default="medpruner-pacs", max_length=64)
    institution: str | None = Field(default=None, max_length=64)
    device_serial_number: str = Field(default="0", max_length=64)
    default_charset: str = "ISO_IR 100"
    timezone: str | None = None

    @field_validator("timezone")
    @classmethod
    def timezone_is_known(cls, name: str | None) -> str | None:
        try:
            _ = None if name is None else ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(f'{name!r} is no time zone of this machine; give one like "Europe/Berlin"') from error
        return name


class WebSettings(Section):
    enabled: bool = True
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=1, le=65535)
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    session_hours: float = Field(default=12, gt=0)
    session_idle_min: float = Field(default=30, gt=0)
    metrics_addresses: tuple[IPvAnyNetwork, ...] = ()
    public_url: HttpAddress | None = None
    role_mapping: dict[str, Literal["viewer", "operator", "auditor"]] = {}
    oidc_issuer: HttpAddress | None = None
    oidc_client_id: str | None = None
    oidc_client_secret_file: Path | None = None
    oidc_scope: str = "openid profile"
    oidc_user_claim: str = "preferred_username"
    oidc_role_claim: str = "roles"
    oidc_ca: Path | None = None
    proxy_user_header: HeaderName | None = None
    proxy_role_header: HeaderName | None = None
    proxy_addresses: tuple[IPvAnyNetwork, ...] = ()

    @model_validator(mode="after")
    def certificate_and_key_come_together(self) -> WebSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key are given together, or both left out")
        return self

    @model_validator(mode="after")
    def sign_in_elsewhere_is_whole(self) -> WebSettings:
        if self.oidc_issuer is not None:
            if self.oidc_client_id is None or self.public_url is None:
                raise ValueError("oidc_issuer needs oidc_client_id and public_url (where it sends people back to)")
            if not self.role_mapping:
                raise ValueError("oidc_issuer needs role_mapping, else nobody has a role")
            if not self.oidc_issuer.startswith("https://") and not _is_loopback(self.oidc_issuer):
                raise ValueError("oidc_issuer must begin with https://, unless it is on this machine")
        proxy = (self.proxy_user_header, self.proxy_role_header, self.proxy_addresses or None)
        if any(one is not None for one in proxy) and any(one is None for one in proxy):
            raise ValueError(
                "proxy_user_header, proxy_role_header and proxy_addresses are given together or not at all"
            )
        return self

    @property
    def signs_in_elsewhere(self) -> bool:
        """Whether people may come in without a local user."""
        return self.oidc_issuer is not None or self.proxy_user_header is not None


class AuditSettings(Section):
    chain_interval_s: float = Field(default=1, gt=0)
    head_interval_s: float = Field(default=3600, gt=0)
    heads_path: Path | None = None
    syslog_host: str | None = None
    syslog_port: int = Field(default=6514, ge=1, le=65535)
    syslog_ca: Path | None = None
    syslog_certificate: Path | None = None
    syslog_key: Path | None = None
    syslog_interval_s: float = Field(default=5, gt=0)
    source_id: str = Field(default="medpruner-pacs", min_length=1, max_length=64)
    enterprise_site_id: str | None = Field(default=None, max_length=64)

    @model_validator(mode="after")
    def certificate_and_key_come_together(self) -> AuditSettings:
        if (self.syslog_certificate is None) != (self.syslog_key is None):
            raise ValueError("syslog_certificate and syslog_key are given together, or both left out")
        return self


class AlertSettings(Section):
    mail_to: tuple[MailAddress, ...] = ()
    mail_from: MailAddress | None = None
    smtp_host: str | None = None
    smtp_port: int = Field(default=25, ge=1, le=65535)
    smtp_starttls: bool = False
    smtp_ca: Path | None = None
    smtp_user: str | None = None
    smtp_password_file: Path | None = None
    webhook_url: SecretStr = SecretStr("")
    webhook_token_file: Path | None = None
    interval_s: float = Field(default=60, gt=0)
    repeat_hours: float = Field(default=24, gt=0)
    stuck_min: float = Field(default=60, gt=0)
    undelivered_min: float = Field(default=60, gt=0)
    chain_lag_min: float = Field(default=10, gt=0)
    refused_per_hour: int = Field(default=20, ge=1)
    certificate_days: float = Field(default=30, ge=0)
    drift_share: float = Field(default=0.25, gt=0)
    drift_days: float = Field(default=7, gt=0)
    drift_min_analyses: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def what_belongs_together_comes_together(self) -> AlertSettings:
        if bool(self.mail_to) != (self.smtp_host is not None):
            raise ValueError("mail_to and smtp_host are given together, or both left out")
        if (self.smtp_user is None) != (self.smtp_password_file is None):
            raise ValueError("smtp_user and smtp_password_file are given together, or both left out")
        if self.smtp_user is not None and not self.smtp_starttls:
            raise ValueError("smtp_user needs smtp_starttls = true: a password never goes in the clear")
        if not re.match(r"https?://|$", self.webhook_url.get_secret_value()):
            raise ValueError("webhook_url begins with https:// or http://")
        return self


class LogSettings(Section):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["text", "json"] = "text"


class Settings(Section):
    """All of config.toml. Functions take their own section; only the wiring holds this whole."""

    data: DataSettings = DataSettings()
    scp: ScpSettings = ScpSettings()
    source: tuple[SourceSettings, ...] = ()
    spool: SpoolSettings = SpoolSettings()
    assembly: AssemblySettings = AssemblySettings()
    database: DatabaseSettings = DatabaseSettings()
    queue: QueueSettings = QueueSettings()
    model: ModelSettings = ModelSettings()
    pruning: PruningSettings = PruningSettings()
    series: SeriesSettings = SeriesSettings()
    route: tuple[RouteSettings, ...] = ()
    destination: tuple[DestinationSettings, ...] = ()
    report: ReportSettings = ReportSettings()
    web: WebSettings = WebSettings()
    audit: AuditSettings = AuditSettings()
    alerts: AlertSettings = AlertSettings()
    log: LogSettings = LogSettings()


def load(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """Read `path` (or ./config.toml where there is one), then the environment; raise ConfigurationError.

    A file that was asked for and is missing is an error; without one the embedded defaults hold.
    Environment keys look like MEDPRUNER__SCP__PORT=104; their values are read as TOML where they are TOML.
    """
    return resolve(path, environ)[0]


def resolve(path: Path | None, environ: Mapping[str, str]) -> tuple[Settings, dict[str, str]]:
    """Like load, and say for every key that was set where it was set (`scp.port` -> `environment`)."""
    content, name = _read(path)
    sources = {key: name for key, _ in _leaves(content)}
    faults: list[str] = []
    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        keys = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        if len(keys) != 2 or keys[0] in ("source", "destination", "route"):
            faults.append(f"{variable}: not of the form {ENVIRONMENT_PREFIX}SECTION__KEY (lists live in the file)")
            continue
        section = content.setdefault(keys[0], {})
        if isinstance(section, dict):  # anything else is refused below
            section[keys[1]] = _value(text)
            sources[".".join(keys)] = f"environment {variable}"
    try:
        settings = Settings.model_validate(content)
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_input=False):
            faults.append(_explain(fault, sources.get(".".join(map(str, fault["loc"][:2])), name)))
    if faults:
        raise ConfigurationError("\n".join(faults))
    faults = list(_contradictions(settings))
    if faults:
        raise ConfigurationError("\n".join(faults))
    return settings, sources


def spool_folder(settings: Settings) -> Path:
    return settings.spool.path or settings.data.path / "spool"


def heads_file(settings: Settings) -> Path:
    """Where the heads of the audit chain are exported to."""
    return settings.audit.heads_path or settings.data.path / "audit" / "heads.jsonl"


def database_url(settings: Settings) -> str:
    """The configured URL, or SQLite under [data]."""
    configured = settings.database.url.get_secret_value()
    return configured or f"sqlite:///{settings.data.path.resolve() / 'medpruner.sqlite'}"


def masked(settings: Settings) -> dict[str, Any]:
    """The resolved settings as plain values, secrets hidden: for people, the audit and `config check`."""
    return settings.model_dump(mode="json")


def leaves(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Every key as `section.key` with its value, secrets hidden."""
    return _leaves(masked(settings))


def for_route(settings: Settings, name: str) -> Settings:
    """The settings as the route called `name` overrides them; the built-in route overrides nothing."""
    route = route_called(settings, name)
    changed = settings.model_dump()
    for section in ("model", "pruning", "series"):
        changed[section] |= getattr(route, section)
    if route.prompt is not None:
        changed["report"]["prompt"] = route.prompt
    return Settings.model_validate(changed)


def routes(settings: Settings) -> tuple[RouteSettings, ...]:
    """The configured routes; without any, the built-in one that takes every study to every destination."""
    return settings.route or (RouteSettings(),)


def route_called(settings: Settings, name: str) -> RouteSettings:
    """The route of that name; KeyError when the configuration no longer has it."""
    return {route.name: route for route in routes(settings)}[name]


def route_destinations(settings: Settings, route: RouteSettings) -> tuple[DestinationSettings, ...]:
    """Where results of `route` go: the destinations it names, or all of them where it names none."""
    return tuple(
        destination
        for destination in settings.destination
        if route.destinations is None or destination.name in route.destinations
    )


def _is_loopback(address: str) -> bool:
    return urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")


def _read(path: Path | None) -> tuple[dict[str, Any], str]:
    chosen = path or Path("config.toml")
    if not chosen.exists():
        if path is not None:
            raise ConfigurationError(f"{path}: no such file; give --config an existing file or leave it out")
        return {}, "default"
    try:
        return tomllib.loads(chosen.read_text(encoding="utf-8")), str(chosen)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{chosen}: not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigurationError(f"{chosen}: cannot be read: {error.strerror}") from error


def _value(text: str) -> Any:
    """`true`, `12`, `["CT"]` and quoted strings are TOML; anything else is the string itself."""
    try:
        content = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return content["value"] if len(content) == 1 else text


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and prefix.count(".") == 0 and value:
            yield from _leaves(value, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for index, item in enumerate(value):
                yield from _leaves(item, f"{name}[{index}].")
        else:
            yield name, value


def _explain(fault: Any, name: str) -> str:
    """One pydantic error as `file: section.key: what is wrong (did you mean ...)`, without the value."""
    location = fault["loc"]
    key = ".".join(str(part) for part in location)
    if fault["type"] != "extra_forbidden":
        return f"{name}: {key}: {fault['msg']}"
    known = _known_keys(location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
    return f"{name}: unknown key {key!r}; {hint}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        for candidate in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
                break
    return list(model.model_fields)


def _contradictions(settings: Settings) -> Iterator[str]:
    """What is valid key by key and still cannot be meant."""
    for kind, items in (("route", settings.route), ("destination", settings.destination)):
        names = [item.name for item in items]
        yield from (f"[[{kind}]] name {name!r} stands twice" for name in sorted(set(names)) if names.count(name) > 1)
    known = {destination.name for destination in settings.destination}
    for route in settings.route:
        for name in route.destinations or ():
            if name not in known:
                yield f"route {route.name!r}: destination {name!r} is not defined by any [[destination]]"
        for section in ("model", "pruning", "series"):
            override = getattr(route, section)
            merged = getattr(settings, section).model_dump() | override
            try:
                type(getattr(settings, section)).model_validate(merged)
            except ValidationError as error:
                for fault in error.errors(include_url=False, include_input=False):
                    where = {**fault, "loc": (section, *fault["loc"])}
                    yield _explain(where, f"route {route.name!r}")
    if settings.assembly.max_open_s < settings.assembly.quiet_period_s:
        yield "assembly.max_open_s must not be below assembly.quiet_period_s"
