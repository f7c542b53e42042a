"""compose/ holds together, as far as that can be seen without a container engine."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.shared.settings import Settings, load
from service.supervisor import ROLES

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose"
OURS = ("migrate", *ROLES, "worker")


@functools.cache
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    return content


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile as (word, rest), continued lines joined, comments left out."""
    lines = [line for line in (COMPOSE / name).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def installed_by(extra: str) -> set[str]:
    """Names of all distributions that installing the project with `extra` brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"][extra]]
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        for chosen in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), chosen)
            if key in seen or not _holds(requirement, chosen=""):
                continue
            seen.add(key)
            for line in importlib.metadata.requires(requirement.name) or []:
                needed = Requirement(line)
                if _holds(needed, chosen):
                    wanted.append(Requirement(f"{needed.name}[{','.join(needed.extras)}]"))
    return {name for name, _ in seen}


def _holds(requirement: Requirement, chosen: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": chosen})


def test_compose_file_follows_the_specification() -> None:
    """The file is valid under the JSON schema of the Compose Specification."""
    schema = json.loads((ROOT / "tests" / "data" / "compose-spec.json").read_text())
    faults = [f"{'/'.join(map(str, e.path))}: {e.message}" for e in Draft7Validator(schema).iter_errors(compose())]

    assert faults == []


def test_schema_refuses_what_is_no_compose_file() -> None:
    """The schema is not one that accepts everything."""
    schema = json.loads((ROOT / "tests" / "data" / "compose-spec.json").read_text())

    assert not Draft7Validator(schema).is_valid({"services": {"a": {"imagee": "x"}}})


def test_every_role_of_the_service_has_a_container() -> None:
    """What `serve` runs as processes, compose runs as containers of the service's image."""
    for role in ROLES:
        command = services()[role]["command"]
        assert command == ["python", "-m", "service", "serve", "--role", role]
        assert services()[role]["build"]["dockerfile"] == "compose/service.Dockerfile"


def test_services_name_only_what_exists() -> None:
    """Networks, volumes, dependencies, mounted files and Dockerfiles are all there."""
    for name, service in services().items():
        assert set(service["networks"]) <= set(compose()["networks"]), name
        assert set(service.get("depends_on", ())) <= set(services()), name
        if "build" in service:
            context = (COMPOSE / service["build"]["context"]).resolve()
            assert (context / service["build"]["dockerfile"]).is_file(), name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (COMPOSE / source).is_file(), (name, source)
            elif not source.startswith("${"):
                assert source in compose()["volumes"], (name, source)


def test_our_containers_have_no_rights() -> None:
    """Read-only, no capabilities, no new privileges; every one of them."""
    for name in OURS:
        service = services()[name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert "privileged" not in service, name
        assert "user" not in service, name  # the image's user holds


def test_gpu_queue_and_database_are_out_of_reach() -> None:
    """Only the receiver and the web are published beside the test PACS; database, queue and worker have no way out."""
    published = {name for name, service in services().items() if "ports" in service}
    outside = {name for name, service in services().items() if "hospital" in service["networks"]}

    assert published == {"receive", "web", "orthanc"}
    assert outside == {"receive", "deliver", "web", "orthanc"}
    assert compose()["networks"]["inside"]["internal"] is True
    assert services()["worker"]["gpus"] == "all"
    assert services()["orthanc"]["profiles"] == ["test-pacs"]


def test_no_password_stands_in_the_file() -> None:
    """The database's password comes from the environment, and without one nothing starts."""
    required = r"\$\{POSTGRES_PASSWORD:\?[^}]+\}"
    password = services()["postgres"]["environment"]["POSTGRES_PASSWORD"]
    url = services()["deliver"]["environment"]["MEDPRUNER__DATABASE__URL"]

    assert re.fullmatch(required, password)
    assert re.fullmatch(rf"postgresql://medpruner:{required}@postgres/medpruner", url)


def test_configuration_of_the_containers_loads() -> None:
    """config.toml and the environment of compose.yaml are accepted together, and meet the test PACS."""
    settings = container_settings("deliver")
    orthanc = json.loads((COMPOSE / "orthanc.json").read_text())
    (modality,) = orthanc["DicomModalities"].values()
    (destination,) = settings.destination

    assert settings.database.url.get_secret_value().endswith("@postgres/medpruner")
    assert (modality["AET"], modality["Port"]) == (settings.scp.ae_title, settings.scp.port)
    assert modality["Host"] == "receive"
    assert (destination.ae_title, destination.port) == (orthanc["DicomAet"], orthanc["DicomPort"])
    assert destination.host in services()
    assert orthanc["DicomAet"] in {source.ae_title for source in settings.source}
    assert str(settings.data.path) in {volume.split(":")[1] for volume in services()["worker"]["volumes"]}


def test_a_worker_may_finish_what_it_reads() -> None:
    """The worker's grace period is above the time limit of a task."""
    grace = services()["worker"]["stop_grace_period"]

    assert int(grace.removesuffix("m")) * 60 > container_settings("worker").queue.hard_time_limit_s


def test_migrate_creates_the_database(tmp_path: Path) -> None:
    """The command of `migrate`, run as it stands on SQLite, leaves a database of this version."""
    command = services()["migrate"]["command"]
    config = tmp_path / "config.toml"
    config.write_text(f'[data]\npath = "{tmp_path}"\n')
    environment = {"MEDPRUNER_CONFIG": str(config), "PYTHONPATH": str(ROOT)}

    subprocess.run([sys.executable, *command[1:]], check=True, env=environment, cwd=tmp_path)
    status = [sys.executable, "-m", "service", "status", "--json"]
    result = subprocess.run(status, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    assert isinstance(json.loads(result.stdout), dict)


@pytest.mark.parametrize("name", ["service.Dockerfile", "worker.Dockerfile"])
def test_images_run_as_nobody_in_particular(name: str) -> None:
    """The last user is not root, it owns the data, and there is a health check."""
    found = instructions(name)
    users = [rest for word, rest in found if word == "USER"]

    assert users == ["10001:10001"]
    assert "HEALTHCHECK" in [word for word, _ in found]
    assert [word for word, _ in found].index("USER") > max(i for i, (word, _) in enumerate(found) if word == "RUN")


@pytest.mark.parametrize("name", ["service.Dockerfile", "worker.Dockerfile"])
def test_images_copy_what_exists(name: str) -> None:
    """Every source of COPY lies in the project."""
    for word, rest in instructions(name):
        if word == "COPY":
            *sources, _ = shlex.split(rest)
            assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize(("name", "packages"), [("service", "service migrations"), ("worker", "service workers")])
def test_images_hold_compiled_modules(name: str, packages: str) -> None:
    """Their users can write none: a process that starts again would compile them each time. pip compiles its own."""
    assert any(
        rest.endswith(f"python -m compileall -q {packages}")
        for word, rest in instructions(f"{name}.Dockerfile")
        if word == "RUN"
    )


def test_service_image_has_no_gpu_software() -> None:
    """The service's extra brings neither torch nor transformers, and its image does not hold the workers."""
    text = (COMPOSE / "service.Dockerfile").read_text()

    assert "pip install -c constraints.txt -e '.[service]'" in text
    assert not [rest for word, rest in instructions("service.Dockerfile") if word == "COPY" and "workers" in rest]
    assert {"torch", "transformers"} & installed_by("service") == set()
    assert {"pynetdicom", "highdicom"} <= installed_by("service")


def test_worker_image_speaks_no_dicom_network() -> None:
    """The worker's extra brings no pynetdicom and no highdicom, and its image of the service only the shared part."""
    copied = [rest.split()[0] for word, rest in instructions("worker.Dockerfile") if word == "COPY"]

    assert "pip install -c constraints.txt -e '.[worker]'" in (COMPOSE / "worker.Dockerfile").read_text()
    assert [source for source in copied if source.startswith("service")] == ["service/__init__.py", "service/shared"]
    assert {"pynetdicom", "highdicom"} & installed_by("worker") == set()
    assert {"torch", "transformers"} <= installed_by("worker")


def container_settings(name: str) -> Settings:
    """The settings as the container called `name` reads them, with a password."""
    environment = {
        key: re.sub(r"\$\{POSTGRES_PASSWORD:[^}]*\}", "secret", value)
        for key, value in services()[name]["environment"].items()
    }
    return load(COMPOSE / "config.toml", environment)
