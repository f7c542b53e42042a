"""config.toml and the environment: what is refused, in which words, and what overrides what."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy.engine import make_url

from service.shared import settings as settings_module
from service.shared.settings import (
    ConfigurationError,
    DatabaseSettings,
    DataSettings,
    DestinationSettings,
    PruningMethod,
    Settings,
    database_url,
    for_route,
    leaves,
    load,
    masked,
    resolve,
    route_called,
    route_destinations,
    routes,
    spool_folder,
)

DESTINATION = '[[destination]]\nname = "pacs"\nae_title = "PACS"\nhost = "pacs.example"\nport = 104\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def fault_of(config: Path, content: str, environ: dict[str, str] | None = None) -> str:
    """What `load` says about this content."""
    config.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        load(config, environ or {})
    return str(caught.value)


# --- the file -------------------------------------------------------------------------------------------------------


def test_without_a_file_the_embedded_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No --config and no ./config.toml is no error."""
    monkeypatch.chdir(tmp_path)

    assert load(None, {}) == Settings()


def test_config_toml_of_the_folder_is_read_without_being_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --config, ./config.toml counts."""
    monkeypatch.chdir(tmp_path)
    Path("config.toml").write_text("[scp]\nport = 104\n", encoding="utf-8")

    assert load(None, {}).scp.port == 104


def test_file_that_was_asked_for_and_is_missing_is_an_error(tmp_path: Path) -> None:
    """A mistyped --config must not start a receiver on defaults."""
    with pytest.raises(ConfigurationError, match=r"absent\.toml: no such file"):
        load(tmp_path / "absent.toml", {})


def test_folder_instead_of_a_file_is_an_error_in_words(tmp_path: Path) -> None:
    """The operating system's reason is given, with the path."""
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        load(tmp_path, {})


def test_broken_toml_is_named_with_its_place(config: Path) -> None:
    """The message has the file and the line."""
    fault = fault_of(config, "[scp]\nport = \n")

    assert str(config) in fault
    assert "line 2" in fault


def test_bytes_that_are_no_text_are_refused(config: Path) -> None:
    """A file in another encoding is an error, not a traceback."""
    config.write_bytes(b'[scp]\nae_title = "\xff"\n')

    with pytest.raises(ConfigurationError, match="not valid TOML"):
        load(config, {})


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[scp]\nprot = 104\n", "unknown key 'scp.prot'; did you mean 'port'?"),
        ("[spc]\nport = 104\n", "unknown key 'spc'; did you mean 'scp'?"),
        (
            '[[source]]\nae_title = "CT1"\nqiet_period_s = 5\n',
            "'source.0.qiet_period_s'; did you mean 'quiet_period_s'?",
        ),
        ("[[route]]\nmatches = {}\n", "unknown key 'route.0.matches'; did you mean 'match'?"),
        (f"{DESTINATION}retries = 5\n", "unknown key 'destination.0.retries'; did you mean 'retry_"),
        ("[data]\nzzz = 1\n", "unknown key 'data.zzz'; known here: cache_gb, cache_hours, keep_days, path"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_known_one(config: Path, content: str, said: str) -> None:
    """A key that is not understood is never ignored; the message says what was probably meant."""
    assert said in fault_of(config, content)


def test_every_fault_is_said_at_once(config: Path) -> None:
    """One line for each, so that nobody has to start the service three times."""
    fault = fault_of(config, "[scp]\nprot = 1\nport = -1\n[queue]\nlease_s = 0\n")

    assert len(fault.splitlines()) == 3


def test_wrong_value_is_named_by_its_key(config: Path) -> None:
    """The key and the rule that it breaks, with the file."""
    fault = fault_of(config, "[scp]\nport = 70000\n")

    assert fault.startswith(f"{config}: scp.port: ")
    assert "65535" in fault


@pytest.mark.parametrize("title", ["", "SEVENTEEN-LETTERS", " LEADING", "TRAILING ", "BACK\\SLASH", "TÜBINGEN", "A\nB"])
def test_ae_title_must_be_one(title: str) -> None:
    """1 to 16 characters of the default repertoire without a backslash (PS3.5 6.2)."""
    with pytest.raises(ValidationError):
        Settings.model_validate({"scp": {"ae_title": title}})


@pytest.mark.parametrize("title", ["A", "CT 1", "SIXTEEN_LETTERS!", "a~[]"])
def test_valid_ae_titles_are_taken(title: str) -> None:
    """Inner spaces and every other printable character are allowed."""
    assert Settings.model_validate({"scp": {"ae_title": title}}).scp.ae_title == title


@pytest.mark.parametrize("number", ["inf", "nan", "-inf"])
@pytest.mark.parametrize("key", ["assembly.quiet_period_s", "spool.min_free_gb", "spool.keep_days", "pruning.tau"])
def test_numbers_must_be_finite(config: Path, key: str, number: str) -> None:
    """A quiet period that never ends, or a floor that no disk reaches, cannot be meant."""
    section, name = key.split(".")

    assert f"{key}: " in fault_of(config, f"[{section}]\n{name} = {number}\n")


def test_visibility_timeout_must_be_above_the_time_limit(config: Path) -> None:
    """Redis would hand running work to a second worker."""
    fault = fault_of(config, "[queue]\nhard_time_limit_s = 100\nvisibility_timeout_s = 100\n")

    assert "visibility_timeout_s must be above hard_time_limit_s" in fault


def test_study_must_be_allowed_to_be_open_for_its_quiet_period(config: Path) -> None:
    """max_open_s below quiet_period_s would make every study complete too early."""
    assert "max_open_s" in fault_of(config, "[assembly]\nquiet_period_s = 60\nmax_open_s = 30\n")


@pytest.mark.parametrize("kind", ["route", "destination"])
def test_a_name_stands_once(config: Path, kind: str) -> None:
    """Rows name routes and destinations; two of one name could not be told apart."""
    one = '[[route]]\nname = "pacs"\n' if kind == "route" else DESTINATION

    assert f"[[{kind}]] name 'pacs' stands twice" in fault_of(config, one + one)


def test_route_to_an_undefined_destination_is_refused(config: Path) -> None:
    """The route and the missing name are in the message."""
    fault = fault_of(config, '[[route]]\nname = "chest"\ndestinations = ["pasc"]\n' + DESTINATION)

    assert "route 'chest': destination 'pasc' is not defined" in fault


def test_unknown_key_in_a_route_override_is_refused(config: Path) -> None:
    """Overrides are checked as strictly as the section they override, with the route's name."""
    fault = fault_of(config, '[[route]]\nname = "chest"\npruning = { gama = 0.1 }\n')

    assert "route 'chest': unknown key 'pruning.gama'; did you mean 'gamma'?" in fault


def test_wrong_value_in_a_route_override_is_refused(config: Path) -> None:
    """At the start, not when the first study is dispatched."""
    assert "route 'chest': pruning.tau" in fault_of(config, '[[route]]\nname = "chest"\npruning = { tau = 2 }\n')


def test_section_that_is_a_plain_value_is_refused(config: Path) -> None:
    """`scp = 3` is an error in words, also when the environment sets a key of that section."""
    assert "scp" in fault_of(config, "scp = 3\n", {"MEDPRUNER__SCP__PORT": "104"})


def test_secret_never_stands_in_a_fault(config: Path) -> None:
    """What is wrong beside a password is said without the password."""
    fault = fault_of(config, '[database]\nurl = ["postgresql://medpruner:hunter2@db/x"]\n')

    assert "database.url" in fault
    assert "hunter2" not in fault


def test_settings_are_frozen() -> None:
    """Nothing changes them after they were read."""
    with pytest.raises(ValidationError):
        Settings().scp.port = 1


# --- the environment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "text", "section", "key", "value"),
    [
        ("MEDPRUNER__SCP__PORT", "104", "scp", "port", 104),
        ("MEDPRUNER__SCP__ACCEPT_UNKNOWN_SOURCES", "true", "scp", "accept_unknown_sources", True),
        ("MEDPRUNER__SCP__AE_TITLE", "READER", "scp", "ae_title", "READER"),
        ("MEDPRUNER__SCP__HOST", "0.0.0.0", "scp", "host", "0.0.0.0"),
        ("MEDPRUNER__SERIES__MODALITY", '["MR"]', "series", "modality", ("MR",)),
        ("MEDPRUNER__PRUNING__METHOD", "off", "pruning", "method", PruningMethod.OFF),
        ("MEDPRUNER__REPORT__INSTITUTION", "", "report", "institution", ""),
        ("MEDPRUNER__REPORT__PROMPT", "one\nscp = 1", "report", "prompt", "one\nscp = 1"),
        ("MEDPRUNER__REPORT__PROMPT", "1\nscp = 1", "report", "prompt", "1\nscp = 1"),
        ("MEDPRUNER__MODEL__PATH", "/models/1", "model", "path", "/models/1"),
    ],
)
def test_environment_overrides_the_file(
    config: Path, variable: str, text: str, section: str, key: str, value: object
) -> None:
    """Values are TOML where they are one TOML value, and the text itself where they are not."""
    config.write_text('[scp]\nport = 11112\nae_title = "OTHER"\n', encoding="utf-8")

    assert getattr(getattr(load(config, {variable: text}), section), key) == value


def test_fault_in_the_environment_names_the_variable(config: Path) -> None:
    """Nobody should search the file for it."""
    fault = fault_of(config, "[scp]\nport = 104\n", {"MEDPRUNER__SCP__PORT": "many"})

    assert "MEDPRUNER__SCP__PORT" in fault
    assert str(config) not in fault


def test_unknown_variable_is_refused_like_an_unknown_key(config: Path) -> None:
    """A mistyped override must not be passed over."""
    fault = fault_of(config, "", {"MEDPRUNER__SCP__PROT": "104"})

    assert "MEDPRUNER__SCP__PROT" in fault
    assert "did you mean 'port'" in fault


@pytest.mark.parametrize("variable", ["MEDPRUNER__SCP", "MEDPRUNER__SOURCE__AE_TITLE", "MEDPRUNER__A__B__C"])
def test_variable_of_another_form_is_refused(config: Path, variable: str) -> None:
    """Lists of tables live in the file; the message says the form."""
    assert f"{variable}: not of the form MEDPRUNER__SECTION__KEY" in fault_of(config, "", {variable: "1"})


def test_other_variables_are_none_of_our_business() -> None:
    """Also MEDPRUNER_CONFIG, which names the file."""
    load(None, {"PATH": "/bin", "MEDPRUNER_CONFIG": "x", "MEDPRUNERX__SCP__PORT": "1"})


def test_every_set_key_has_its_source(config: Path) -> None:
    """`config check` can say for each value where it comes from."""
    config.write_text(f"[scp]\nport = 104\nhost = '::'\n{DESTINATION}", encoding="utf-8")

    _, sources = resolve(config, {"MEDPRUNER__SCP__PORT": "105"})

    assert sources == {
        "scp.port": "environment MEDPRUNER__SCP__PORT",
        "scp.host": str(config),
        **{f"destination[0].{key}": str(config) for key in ("name", "ae_title", "host", "port")},
    }
    assert sources.keys() <= {key for key, _ in leaves(load(config, {}))}


# --- what is derived ------------------------------------------------------------------------------------------------


def test_secrets_are_masked() -> None:
    """Neither the printed configuration nor the representation shows a URL with a password in it."""
    settings = Settings.model_validate(
        {"database": {"url": "postgresql://u:hunter2@db/x"}, "queue": {"url": "redis://:hunter2@queue/0"}}
    )

    for shown in (str(masked(settings)), str(list(leaves(settings))), repr(settings), str(settings)):
        assert "hunter2" not in shown


def test_configured_database_is_used_as_it_is() -> None:
    """The masked value is for people only."""
    url = "postgresql://u:hunter2@db/x"

    assert database_url(Settings(database=DatabaseSettings(url=SecretStr(url)))) == url


@pytest.mark.parametrize("folder", ["plain", "with space", "100%", "a#b", "a@b:c"])
def test_default_database_lies_under_data(tmp_path: Path, folder: str) -> None:
    """Whatever the folder is called: the URL names that file and no other."""
    url = make_url(database_url(Settings(data=DataSettings(path=tmp_path / folder))))

    assert url.drivername == "sqlite"
    assert url.database == str(tmp_path / folder / "medpruner.sqlite")
    assert not url.query


def test_spool_lies_under_data_unless_it_is_placed_elsewhere(tmp_path: Path) -> None:
    """[spool] path wins."""
    assert spool_folder(Settings(data=DataSettings(path=tmp_path))) == tmp_path / "spool"
    assert spool_folder(Settings.model_validate({"spool": {"path": tmp_path / "elsewhere"}})) == tmp_path / "elsewhere"


def test_without_a_route_every_study_goes_to_every_destination(config: Path) -> None:
    """The built-in route is called default and overrides nothing."""
    config.write_text(DESTINATION, encoding="utf-8")
    settings = load(config, {})

    (route,) = routes(settings)

    assert (route.name, dict(route.match)) == ("default", {})
    assert [one.name for one in route_destinations(settings, route)] == ["pacs"]
    assert for_route(settings, "default") == settings


def test_route_overrides_its_sections_and_its_prompt(config: Path) -> None:
    """What it does not name stays as configured, secrets included."""
    config.write_text(
        '[database]\nurl = "postgresql://u:hunter2@db/x"\n[pruning]\ntau = 0.5\n'
        '[[route]]\nname = "chest"\nprompt = "Look at the lungs."\n'
        'pruning = { gamma = 0.2, method = "off" }\nseries = { modality = ["MR"] }\nmodel = { max_new_tokens = 9 }\n',
        encoding="utf-8",
    )

    applied = for_route(load(config, {}), "chest")

    assert (applied.pruning.gamma, applied.pruning.method, applied.pruning.tau) == (0.2, PruningMethod.OFF, 0.5)
    assert applied.series.modality == ("MR",)
    assert applied.model.max_new_tokens == 9
    assert applied.report.prompt == "Look at the lungs."
    assert applied.database.url.get_secret_value() == "postgresql://u:hunter2@db/x"


@pytest.mark.parametrize(
    ("named", "expected"), [("", ["a", "b"]), ("destinations = []", []), ('destinations = ["b"]', ["b"])]
)
def test_route_sends_to_the_destinations_it_names(config: Path, named: str, expected: list[str]) -> None:
    """None named: all of them. An empty list: results are kept and sent nowhere."""
    config.write_text(
        f'[[route]]\nname = "chest"\n{named}\n'
        + DESTINATION.replace('"pacs"', '"a"')
        + DESTINATION.replace('"pacs"', '"b"'),
        encoding="utf-8",
    )
    settings = load(config, {})

    assert [one.name for one in route_destinations(settings, route_called(settings, "chest"))] == expected


def test_route_that_is_gone_is_a_key_error() -> None:
    """Whoever asks decides what a route that left the configuration means."""
    with pytest.raises(KeyError):
        route_called(Settings(), "chest")


def test_every_section_is_as_strict_as_the_others() -> None:
    """A new section that forgets to be frozen or to refuse unknown keys is found here."""
    sections = [
        value
        for value in vars(settings_module).values()
        if isinstance(value, type) and issubclass(value, settings_module.Section)
    ]

    assert len(sections) > 10
    assert all(one.model_config.get("frozen") and one.model_config.get("extra") == "forbid" for one in sections)


@pytest.mark.parametrize(
    ("configured", "classes"),
    [
        ('"enhanced"', ["enhanced"]),
        ('["comprehensive", "basic_text"]', ["comprehensive", "basic_text"]),
        ('"auto"', ["comprehensive3d", "comprehensive", "enhanced", "basic_text"]),
    ],
)
def test_classes_of_report_are_offered_in_the_configured_order(
    config: Path, configured: str, classes: list[str]
) -> None:
    """One, a list, or all of them, best first."""
    config.write_text(f"{DESTINATION}sr_sop_class = {configured}\n", encoding="utf-8")

    (destination,) = load(config, {}).destination
    assert [one.value for one in destination.sr_sop_classes] == classes


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('tls = true\ntls_key = "us.key"\n', "tls_certificate and tls_key are given together"),
        ('tls_ca = "ca.pem"\n', "have no meaning without tls = true"),
        ("sr_sop_class = []\n", "sr_sop_class"),
    ],
)
def test_destination_keys_that_cannot_be_meant_are_refused(config: Path, content: str, said: str) -> None:
    """A certificate without its key, TLS files without TLS, no class of report at all."""
    assert said in fault_of(config, DESTINATION + content)


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ("utf-8", "ISO_IR 192"),
        ("GB18030", "GB18030"),
        ("ISO 2022 IR 87", "\\ISO 2022 IR 87"),  # never the first value (PS3.3 C.12.1.1.2)
        ("ISO 2022 IR 13\\ISO 2022 IR 87", "ISO 2022 IR 13\\ISO 2022 IR 87"),
    ],
)
def test_character_set_of_a_destination_is_held_as_dicom_writes_it(given: str, held: str) -> None:
    """utf-8 by its everyday name, a multi-byte set behind the default repertoire."""
    assert DestinationSettings(name="a", ae_title="A", host="h", port=104, charset=given).charset == held


@pytest.mark.parametrize("given", ["latin1", "GBK", "ISO 2022 IR 58", "", "ISO_IR 100\\ISO 2022 IR 87"])
def test_character_set_that_results_cannot_be_written_in_is_refused(given: str) -> None:
    """With the ones that can."""
    with pytest.raises(ValidationError, match="take GB18030"):
        DestinationSettings(name="a", ae_title="A", host="h", port=104, charset=given)


@pytest.mark.parametrize("name", ["Europe/Atlantis", "", "../etc/passwd"])
def test_a_time_zone_that_is_none_is_refused_by_name(name: str) -> None:
    """Before any report is written in it."""
    with pytest.raises(ValidationError, match="no time zone of this machine"):
        settings_module.ReportSettings.model_validate({"timezone": name})

    assert settings_module.ReportSettings.model_validate({"timezone": "Europe/Berlin"}).timezone == "Europe/Berlin"
