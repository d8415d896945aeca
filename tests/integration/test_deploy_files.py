"""The compose stack, Prometheus' and Grafana's files: they parse, they fit together, and every metric and label that
they name is one that a coordinator at work really exports."""

import asyncio
import inspect
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from quorate_agent import Agent
from quorate_agent import commands as agent_commands
from quorate_agent.worker import Worker
from quorate_coordinator.membership import MemberState
from quorate_coordinator.rounds.instructions import RejectReason
from quorate_coordinator.service import Coordinator
from quorate_coordinator.settings import Settings, load_settings
from quorate_protocol.channel import Channel
from quorate_protocol.client import Client
from quorate_protocol.errors import Refused
from quorate_protocol.fields import RoundState, Status
from quorate_protocol.messages import CoordinationOpened, Hello, Reply, Welcome
from quorate_protocol.transport import ClientTls, connect

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
COMPOSE = DEPLOY / "compose"


def read_yaml(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


def dashboards() -> dict[str, Any]:
    return {path.name: json.loads(path.read_text("utf-8")) for path in (DEPLOY / "grafana" / "dashboards").iterdir()}


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def rules() -> list[dict[str, Any]]:
    return [rule for group in read_yaml("prometheus/quorate.rules.yml")["groups"] for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """Where a PromQL expression stands, and the expression."""
    found = {f"rule {rule.get('alert') or rule['record']}": rule["expr"] for rule in rules()}
    for name, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel.get("targets", []):
                found[f"{name}: {panel['title']} {target['refId']}"] = target["expr"]
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                found[f"{name}: ${variable['name']}"] = variable["definition"]
        for annotation in dashboard["annotations"]["list"]:
            found[f"{name}: annotation {annotation['name']}"] = annotation["expr"]
    return found


# --- metrics ---


def echo_agent() -> Agent:
    agent = Agent()

    @agent.task("echo")
    def echo(body: Any) -> Any:
        return body

    @agent.feedback("echo")
    def learn(body: Any, truth: Any) -> None:
        return None

    return agent


async def reply_to_no_round(url: str, token: str, tls: ClientTls) -> None:
    """An agent that replies to a round that there never was, and stays."""
    async with await connect(url, tls=tls) as connection:
        control = Channel(await connection.open_bi_stream())
        await control.send(Hello(id="c", token=token))
        welcome = await control.expect(Welcome)
        assert isinstance(welcome, Welcome)
        coordination = Channel(await connection.open_bi_stream())
        await coordination.send(CoordinationOpened(session=welcome.session))
        await coordination.send(Reply(round=1_000_000))
        await connection.wait_closed()


async def scrape_a_coordinator_at_work(state_dir: Path) -> str:
    """The text of /metrics after a round with two agents, its truth, a wrong token and nonsense."""
    settings = Settings(listen="127.0.0.1:0", http="127.0.0.1:0", state_dir=state_dir)
    async with Coordinator(settings) as coordinator:
        assert coordinator.http_address is not None
        url = f"quic://localhost:{coordinator.address[1]}"
        tls = ClientTls(state_dir / "ca.pem")
        token = (state_dir / "token").read_text(encoding="utf-8").strip()
        workers = [Worker(echo_agent(), url, agent_id=name, token=token, tls=tls) for name in ("a", "b")]
        running = [asyncio.create_task(worker.run()) for worker in workers]
        async with await Client.connect(url, token=token, tls=tls) as client:
            while len((await client.agents()).agents) < len(workers):
                assert not any(task.done() for task in running)
            outcome = await client.ask("echo", 1)
            assert outcome.state == "complete"
            await client.reveal(outcome.round, 1)
            with pytest.raises(Refused):
                await Client.connect(url, token="wrong", tls=tls)
            stranger = await connect(url, tls=tls)
            nonsense = await stranger.open_bi_stream()
            await nonsense.send(b"GET / HTTP/1.1\r\n\r\n")
            await stranger.wait_closed()
            async with asyncio.timeout(30), httpx.AsyncClient() as http:
                answer_out_of_turn = asyncio.create_task(reply_to_no_round(url, token, tls))
                while True:
                    page = await http.get("http://{}:{}/metrics".format(*coordinator.http_address))
                    if "quorate_stray_replies_total{" in page.text:
                        break
                answer_out_of_turn.cancel()
        for worker in workers:
            worker.request_stop("done")
        await asyncio.gather(*running)
    return page.raise_for_status().text


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, set[str]]]:
    """What a coordinator exports: sample name → label → values."""
    text = asyncio.run(scrape_a_coordinator_at_work(tmp_path_factory.mktemp("state")))
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


#: What PromQL reserves, and what Prometheus itself adds.
_FUNCTIONS = {"sum", "max", "avg", "rate", "changes", "histogram_quantile", "label_values", "by", "without"}
_ADDED = {"up": set[str]()}
_TARGET_LABELS = {"job", "instance"}

#: Labels whose values are fixed, and those values.
_VALUES: dict[tuple[str, str], set[str]] = {
    ("quorate_agents", "state"): set(get_args(MemberState)),
    ("quorate_rounds_total", "state"): set(get_args(RoundState)),
    ("quorate_replies_total", "status"): set(get_args(Status)),
    ("quorate_agent_replies_total", "status"): set(get_args(Status)),
    ("quorate_agent_reply_latency_seconds", "quantile"): {"0.5", "0.99"},
    ("quorate_calls_total", "result"): {"ok", "withdrawn", "forbidden", "internal", *get_args(RejectReason)},
    ("quorate_handshakes_total", "result"): {
        "welcome",
        "unauthenticated",
        "draining",
        "full",
        "timeout",
        "gone",
        "bad-hello",
    },
}


def uses(expression: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each metric that an expression names, with its matchers: label → value or pattern."""
    bare = re.sub(r'"[^"]*"', lambda text: '""' if "$" in text[0] else text[0], expression)
    for found in re.finditer(
        r'(?<![\w:"$.])([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(?!\w)', re.sub(r"\b(by|without) \([^)]*\)", "", bare)
    ):
        name, matchers = found[1], found[2] or ""
        if name not in _FUNCTIONS and not re.fullmatch(r"[smhd]", name):
            yield name, dict(re.findall(r'(\w+)\s*(?:=|!=|=~|!~)\s*"([^"]*)"', matchers))


def test_the_reading_of_expressions() -> None:
    expression = (
        'sum by (le) (rate(a_b{x="1", y=~"p|q"}[$__rate_interval])) / c:d{t=~"$t"} > 0.5 and label_values(e, f)'
    )
    assert list(uses(expression)) == [
        ("a_b", {"x": "1", "y": "p|q"}),
        ("c:d", {"t": ""}),
        ("and", {}),
        ("e", {}),
        ("f", {}),
    ]


@pytest.mark.parametrize("where", list(expressions()))
def test_metrics_and_labels_exist(where: str, exported: dict[str, dict[str, set[str]]]) -> None:
    expression = expressions()[where]
    recorded = {rule["record"]: {"task": set[str]()} for rule in rules() if "record" in rule}
    if variable := re.fullmatch(r"label_values\((\w+), (\w+)\)", expression):
        assert variable[2] in exported[variable[1]]
        return
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r"\b(?:by|without) \(([^)]*)\)", expression))))
    named = list(uses(expression))
    assert named
    for metric, matchers in named:
        labels = ({**exported, **recorded, **_ADDED}).get(metric)
        assert labels is not None, f"{where}: nobody exports {metric}"
        assert set(matchers) <= set(labels) | _TARGET_LABELS, f"{where}: {metric} has no such label"
        assert grouped <= set(labels) | _TARGET_LABELS, f"{where}: {metric} has no such label"
        for label, pattern in matchers.items():
            known = _VALUES.get((metric, label))
            if known is not None and pattern:
                assert set(pattern.split("|")) <= known, f"{where}: {metric} has no such {label}"


def test_the_fixed_values_are_those_that_are_exported(exported: dict[str, dict[str, set[str]]]) -> None:
    for (metric, label), values in _VALUES.items():
        assert exported[metric][label] <= values


def test_the_contract_of_metric_names(exported: dict[str, dict[str, set[str]]]) -> None:
    """What others may have built upon; a metric that is added here is a promise."""
    contract = {
        "quorate_agents": {"state"},
        "quorate_rounds_open": set(),
        "quorate_rounds_total": {"task", "state"},
        "quorate_round_duration_seconds_bucket": {"task", "le"},
        "quorate_replies_total": {"task", "status"},
        "quorate_agent_replies_total": {"agent", "status"},
        "quorate_agent_reply_latency_seconds": {"agent", "quantile"},
        "quorate_agent_weight": {"agent", "task"},
        "quorate_agent_accuracy": {"agent", "task"},
        "quorate_ensemble_accuracy": {"task"},
        "quorate_calls_total": {"call", "result"},
        "quorate_stray_replies_total": {"kind"},
        "quorate_feedback_total": {"task"},
        "quorate_connections": set(),
        "quorate_handshakes_total": {"result"},
        "quorate_udp_datagrams_total": {"direction"},
        "quorate_udp_bytes_total": {"direction"},
        "quorate_protocol_errors_total": {"code"},
        "quorate_build_info": {"version"},
        "quorate_start_time_seconds": set(),
    }
    assert {name: set(labels) for name, labels in exported.items() if name in contract} == contract


def test_every_metric_is_on_the_dashboard(exported: dict[str, dict[str, set[str]]]) -> None:
    shown = " ".join(expression for where, expression in expressions().items() if not where.startswith("rule "))
    own = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exported if name.startswith("quorate_")}
    assert {name for name in own if name not in shown} == {"quorate_build_info"}


# --- Prometheus and Grafana ---


def test_alerts_tell_a_person_what_to_do() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts) >= 10
    for rule in alerts:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]
        assert re.fullmatch(r"\d+[sm]", rule["for"])


def test_prometheus_loads_the_rules_that_are_mounted() -> None:
    config = read_yaml("prometheus/prometheus.yml")
    mounted = {
        Path(volume.split(":")[1]) for volume in read_yaml("compose/compose.yaml")["services"]["prometheus"]["volumes"]
    }
    assert {Path("/etc/prometheus") / name for name in config["rule_files"]} <= mounted
    assert Path("/etc/prometheus/prometheus.yml") in mounted


@pytest.mark.parametrize("name", list(dashboards()))
class TestDashboard:
    def test_panels(self, name: str) -> None:
        shown = [panel for panel in panels(dashboards()[name]) if panel["type"] != "row"]
        ids = [panel["id"] for panel in panels(dashboards()[name])]
        assert len(ids) == len(set(ids))
        for panel in shown:
            assert panel["description"], panel["title"]
            assert panel["targets"], panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"]

    def test_panels_do_not_overlap(self, name: str) -> None:
        taken: set[tuple[int, int]] = set()
        for panel in panels(dashboards()[name]):
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
            cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
            assert not cells & taken, panel["title"]
            taken |= cells

    def test_the_data_source_is_provisioned(self, name: str) -> None:
        (source,) = read_yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
        variables = {variable["name"]: variable for variable in dashboards()[name]["templating"]["list"]}
        assert variables["datasource"]["query"] == source["type"]
        assert variables["datasource"]["current"]["value"] == source["uid"]
        for panel in panels(dashboards()[name]):
            if panel["type"] != "row":
                assert panel["datasource"]["uid"] == "${datasource}"

    def test_it_is_where_grafana_looks(self, name: str) -> None:
        (provider,) = read_yaml("grafana/provisioning/dashboards/quorate.yaml")["providers"]
        grafana = read_yaml("compose/compose.yaml")["services"]["grafana"]
        mounts = dict(volume.split(":")[1::-1] for volume in grafana["volumes"])
        assert mounts[provider["options"]["path"]] == "../grafana/dashboards"
        home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
        assert str(home.parent) == provider["options"]["path"]
        assert home.name in dashboards()


def test_rates_are_over_two_scrapes_at_least() -> None:
    interval = read_yaml("prometheus/prometheus.yml")["global"]["scrape_interval"]
    (source,) = read_yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["jsonData"]["timeInterval"] == interval


# --- compose ---


class TestCompose:
    @pytest.fixture
    def services(self) -> dict[str, Any]:
        services: dict[str, Any] = read_yaml("compose/compose.yaml")["services"]
        return services

    @pytest.fixture
    def image(self) -> dict[str, str]:
        """The image's environment."""
        text = (COMPOSE / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
        final = text[text.rindex("\nFROM ") :]
        (line,) = re.findall(r"(?m)^ENV (.+)$", final)
        return dict(word.split("=", 1) for word in line.split())

    def agents(self, services: dict[str, Any]) -> dict[str, Any]:
        return {name: service for name, service in services.items() if "QUORATE_COORDINATOR" in str(service)}

    def test_mounted_files_are_there(self, services: dict[str, Any]) -> None:
        volumes = read_yaml("compose/compose.yaml")["volumes"]
        for name, service in services.items():
            for volume in service.get("volumes", []):
                source = volume.split(":")[0]
                assert (COMPOSE / source).exists() if source.startswith(".") else source in volumes, name

    def test_the_coordinators_environment_is_valid(self, services: dict[str, Any], image: dict[str, str]) -> None:
        environ = {**image, **services["coordinator"]["environment"]}
        assert {name for name in environ if name.startswith("QUORATE_")} >= {"QUORATE_LISTEN", "QUORATE_TLS__NAMES"}
        settings = load_settings(None, environ)
        assert settings.listen_address[0] == "0.0.0.0"  # noqa: S104  a container's ports are published one by one
        assert settings.state_dir == Path("/var/lib/quorate")
        assert "coordinator" in settings.tls.names

    def test_ports(self, services: dict[str, Any], image: dict[str, str]) -> None:
        settings = load_settings(None, image)
        assert settings.http_address is not None
        http_port = settings.http_address[1]
        targets = read_yaml("prometheus/prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
        assert targets == [f"coordinator:{http_port}"]
        assert services["coordinator"]["ports"] == [
            f"{settings.listen_address[1]}:{settings.listen_address[1]}/udp",
            f"127.0.0.1:{http_port}:{http_port}",
        ]
        dockerfile = (COMPOSE / "Dockerfile").read_text(encoding="utf-8")
        assert f"http://127.0.0.1:{http_port}/readyz" in dockerfile
        for service in self.agents(services).values():
            assert service["environment"]["QUORATE_COORDINATOR"] == f"quic://coordinator:{settings.listen_address[1]}"

    def test_agents_run_examples_that_exist(self, services: dict[str, Any]) -> None:
        agents = self.agents(services)
        assert len(agents) == 7
        for service in agents.values():
            (example,) = re.findall(r"\$\$QUORATE_EXAMPLES/(\w+\.py):agent", service["command"][-1])
            assert (REPOSITORY / "agent" / "examples" / example).is_file()

    def test_replicas_have_ids_of_their_own(self, services: dict[str, Any]) -> None:
        for service in self.agents(services).values():
            if service.get("deploy", {}).get("replicas", 1) > 1:
                assert "$$HOSTNAME" in service["command"][-1]

    def test_agents_read_the_state_and_do_not_write_it(self, services: dict[str, Any]) -> None:
        assert services["coordinator"]["volumes"] == ["state:/var/lib/quorate"]
        for service in self.agents(services).values():
            assert service["volumes"] == ["state:/var/lib/quorate:ro"]
            assert service["depends_on"]["coordinator"]["condition"] == "service_healthy"

    def test_there_is_time_to_drain(self, services: dict[str, Any]) -> None:
        assert int(services["coordinator"]["stop_grace_period"].removesuffix("s")) > Settings().sessions.drain_s + 5
        drain_timeout_s = inspect.signature(agent_commands.run).parameters["drain_timeout"].default
        for service in self.agents(services).values():
            assert int(service["stop_grace_period"].removesuffix("s")) > drain_timeout_s + 5

    def test_quorates_containers_are_confined(self, services: dict[str, Any]) -> None:
        for name in ("coordinator", *self.agents(services)):
            service = services[name]
            assert service["read_only"] is True
            assert service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]

    def test_only_the_coordinators_udp_port_is_open_to_the_network(self, services: dict[str, Any]) -> None:
        published = [port for service in services.values() for port in service.get("ports", [])]
        assert [port for port in published if not port.startswith("127.0.0.1:")] == ["4433:4433/udp"]


class TestDockerfile:
    text = (COMPOSE / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")

    def test_what_is_copied_is_there_and_not_ignored(self) -> None:
        ignored = (COMPOSE / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
        for line in re.findall(r"(?m)^COPY (?!--from)(.+)$", self.text):
            for source in line.split()[:-1]:
                assert (REPOSITORY / source).exists(), source
                assert f"!{source}" in ignored, source

    def test_the_wheels_sources_are_copied(self) -> None:
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
        for source in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
            assert f"COPY {source} {source}\n" in self.text

    def test_it_does_not_run_as_root(self) -> None:
        final = self.text[self.text.rindex("\nFROM ") :]
        assert final.index("\nUSER quorate\n") < final.index("\nCMD ")

    def test_pythons_version_is_that_of_the_constraints(self) -> None:
        (version,) = set(re.findall(r"(?m)^FROM python:(\S+)-slim-bookworm", self.text))
        assert f"Python {version} on Linux" in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
        assert f"/lib/python{version}/" in self.text

    def test_the_health_check_is_python(self) -> None:
        (command,) = re.findall(r"HEALTHCHECK .* CMD (\[.*\])", self.text)
        python, option, script = json.loads(command)
        assert (python, option) == ("python", "-c")
        compile(script, "healthcheck", "exec")
