"""What stands in `deploy/`, as far as a machine without Docker, Prometheus and Grafana can tell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.server.settings import declared, resolve

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text("utf-8")
SERVICE = (DEPLOY / "shoal.service").read_text("utf-8")
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/shoal.json").read_text("utf-8"))


def read(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text("utf-8"))


def is_sent(path: str) -> bool:
    """Whether .dockerignore leaves a file in the build context: of the patterns that fit, the last one counts."""
    parents = [path, *map(str, Path(path).parents)][:-1]
    sent = True
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        pattern = line.removeprefix("!")
        fits = any(fnmatch(each, pattern) or fnmatch(each, pattern.removeprefix("**/")) for each in parents)
        in_folder = pattern.startswith("**/") and any(fnmatch(Path(each).name, pattern[3:]) for each in parents)
        if line and not line.startswith("#") and (fits or in_folder):
            sent = line.startswith("!")
    return sent


def test_the_build_gets_what_the_package_is_made_of_and_no_more() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    sent = {path for path in tracked if is_sent(path)}
    rooms = {path.name for path in (ROOT / "src" / "shoal").iterdir() if path.is_symlink()}
    assert {path.partition("/")[0] for path in sent} == rooms | {
        "src", "LICENSE", "README.md", "pyproject.toml", "hatch_build.py",
    }  # fmt: skip
    assert {path for path in tracked if path.partition("/")[0] in rooms} <= sent
    assert not is_sent("model/native/libshoal-avx2.so")
    assert not is_sent("server/__pycache__/app.pyc")
    assert not is_sent(".venv/bin/python")


def test_the_image_serves_as_nobody_and_says_how_it_is() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    last = stages[-1]
    assert int(re.findall(r"^USER (\d+)$", last, re.MULTILINE)[0]) > 0
    assert "apt-get" not in last, "the compiler stays in the first stage"
    command = json.loads(re.findall(r"CMD (\[\"python\".*\])", last)[0])
    assert "/health" in command[-1]
    compile(command[-1], "healthcheck", "exec")
    variables = re.findall(r"SHOAL_(\w+?)__(\w+)=", DOCKERFILE + (DEPLOY / "compose.yaml").read_text("utf-8"))
    assert all(name.lower() in declared()[section.lower()] for section, name in variables)


def test_the_services_of_compose_fit_together() -> None:
    compose = read("compose.yaml")
    services = compose["services"]
    build = services["shoal"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == DEPLOY / "Dockerfile"
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"]
    (job,) = read("prometheus/prometheus.yml")["scrape_configs"]
    ((target,),) = [config["targets"] for config in job["static_configs"]]
    assert target.partition(":")[0] in services
    (source,) = read("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert re.fullmatch(r"http://(\w+):9090", source["url"])[1] in services
    (provider,) = read("grafana/provisioning/dashboards/shoal.yml")["providers"]
    assert any(volume.split(":")[1] == provider["options"]["path"] for volume in services["grafana"]["volumes"])
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}


def test_the_cluster_of_kubernetes_is_what_the_room_has() -> None:
    """As far as its own settings go; no Kubernetes has seen it."""
    service, api = yaml.safe_load_all((DEPLOY / "rayservice.yaml").read_text("utf-8"))
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    settings = resolve(application["args"]["settings"])
    groups = [service["spec"]["rayClusterConfig"]["headGroupSpec"]]
    groups += service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        (mount,) = container["volumeMounts"]
        assert application["args"]["secret_file"] == f"{mount['mountPath']}/secret"
        assert mount["name"] in [volume["name"] for volume in group["template"]["spec"]["volumes"]]
    assert container["ports"][0]["containerPort"] == settings.server.port
    assert api["spec"]["selector"] == group["template"]["metadata"]["labels"]
    module, _, name = application["import_path"].partition(":")
    assert f"def {name}(" in (ROOT / f"{module.removeprefix('shoal.').replace('.', '/')}.py").read_text("utf-8")
    assert [one["name"] for one in application["deployments"]] == ["engine", "ingress"]


def test_panels_have_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({str(panel["gridPos"]) for panel in panels}) == len(panels)
    assert all(panel["targets"] and panel["title"] for panel in panels)


def test_the_unit_is_one(tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("there is no systemd-analyze")
    unit = tmp_path / "shoal.service"
    unit.write_text(SERVICE.replace("/opt/shoal/bin/shoal", "/bin/true"))
    done = subprocess.run([tool, "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    if "Failed to" in done.stderr:
        pytest.skip(f"systemd-analyze does not work here: {done.stderr}")
    assert (done.returncode, done.stderr) == (0, "")
