"""The same federation on Flower's own processes, over loopback: `make test-deployment` (minutes).

Every process that a test starts is in a group of its own, which is killed at the test's end, whatever happened.
"""

import contextlib
import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

flwr = pytest.importorskip("flwr", reason="needs: pip install -e '.[flower-simulation]'")

from cryptography import x509  # noqa: E402  (Flower's own dependency)
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402

from experiments import flower as app  # noqa: E402
from medsec.backdoor import gan  # noqa: E402
from medsec.core import paths  # noqa: E402
from medsec.core.errors import InputError  # noqa: E402

pytestmark = pytest.mark.deployment

BIN = Path(sys.executable).parent
PATIENCE = 300  # seconds, on a busy machine
CLIENTS = 3
SETTINGS = {"clients": "3", "rule": '"feddetect_hardened"', "rounds": "4"}  # as in TOML


def until(what, met, patience=PATIENCE):
    end = time.monotonic() + patience
    while not (found := met()):
        assert time.monotonic() < end, f"waited {patience} s for {what}"
        time.sleep(0.5)
    return found


class Hosts:
    """A server and its nodes as processes of this machine, each with a home of its own."""

    def __init__(self, folder):
        self.folder, self.processes, self.options = folder, {}, {"server": [], "node": []}
        self.port = free_port()
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("MEDSEC_", "FLWR_"))}
        self.environment |= {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(paths.ROOT),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.app = shutil.copytree(paths.ROOT / "flower_app", folder / "flower_app")

    def environment_of(self, name):
        home = self.folder / name
        home.mkdir(exist_ok=True)
        return self.environment | {"FLWR_HOME": str(home), "MEDSEC_FEDERATION": str(home / "federation")}

    def start(self, name, *command):
        log = (self.folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            command, env=self.environment_of(name), stdout=log, stderr=log, start_new_session=True, cwd=self.folder
        )

    def server(self, *more):
        # With its state in a file: nodes that a restarted server does not know any more would end.
        options = [*(self.options["server"] or ["--insecure"]), "--database", str(self.folder / "state.db")]
        self.start("server", "flower-superlink", *options, "--host", "127.0.0.1", "--port", str(self.port), *more)
        until("the server", self.listens)

    def listens(self):
        assert self.processes["server"].poll() is None, self.log("server")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def node(self, client, images, name=None, key=None):
        options = self.options["node"] or ["--insecure"]
        if self.options["node"]:
            options = [*options, "--auth-supernode-private-key", str(key or self.folder / f"key-{client}")]
        config = f'client={client} images="{images}"'
        address = ["--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1", "--port", str(free_port())]
        self.start(name or f"node-{client}", "flower-supernode", *options, *address, "--node-config", config)

    def kill(self, name):
        """As a power cut: SIGKILL, to the process and all that it started."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):  # of a group that has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)

    def flwr(self, *command):
        """What Flower's command line prints, as JSON."""
        home = self.folder / "cli"
        home.mkdir(exist_ok=True)
        secure = f'root-certificates = "{self.folder / "ca.pem"}"\n' if self.options["node"] else "insecure = true\n"
        text = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n{secure}'
        (home / "config.toml").write_text(text)
        done = subprocess.run(
            ["flwr", *command, "--format", "json"],
            env=self.environment_of("cli"),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def run(self, options=(), **changes):
        """Submit a run; its number."""
        text = " ".join(written({"timeout": "45.0", "wait": "120.0"} | changes))
        found = self.flwr("run", str(self.app), "here", *options, "--run-config", text)
        assert found["success"], found
        return found["run-id"]

    def status(self, run):
        (found,) = [each for each in self.flwr("list", "here")["runs"] if str(each["run-id"]) == str(run)]
        return found["status"]

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def checkpoint(self, name="first"):
        file = self.folder / "server" / "federation" / name / "server.pt"
        return torch.load(file, weights_only=True) if file.exists() else {"round": 0, "history": []}

    def finished(self, run, rounds, name="first"):
        """Wait for the end of a run: its last state and history."""
        until("the last round", lambda: self.checkpoint(name)["round"] >= rounds)
        until("the end of the run", lambda: self.status(run) == "finished:completed", 60)
        at = self.checkpoint(name)
        return at["state"], [json.loads(line) for line in at["history"]]

    def end(self):
        for name in list(self.processes):
            self.kill(name)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def hosts(tmp_path):
    """Nothing that was started is left running, not even what a killed process left behind."""
    found = Hosts(tmp_path)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whoever ends the tests ends what they started
    try:
        yield found
    finally:
        found.end()
        signal.signal(signal.SIGTERM, before)
    until("the last processes", lambda: not started_below(tmp_path), 30)  # Flower's helpers look after their parent


def started_below(folder):
    """Processes of Flower with a home in this folder."""
    homes = [(p.pid, (p.info["environ"] or {}).get("FLWR_HOME", "")) for p in psutil.process_iter(["environ"])]
    return [pid for pid, home in homes if home.startswith(str(folder))]


def written(changes):
    return [f"{key}={value}" for key, value in {**SETTINGS, **changes}.items()]


def federation(**changes):
    return app.federation(app.run_config(written(changes)), "quick")


@pytest.fixture
def it():
    return federation()


@pytest.fixture
def hospitals(it, tmp_path):
    app.deal(it, tmp_path / "hospitals")
    return [tmp_path / "hospitals" / f"client-{i}.npz" for i in range(CLIENTS)]


def reference(it, history):
    """The loop on the same participants."""
    away = {(int(client), line["round"] - 1) for line in history for client in line["absent"]}

    def train(client, state, federation, round):
        if (client.index, round) in away:
            raise InputError("away")
        return gan.train_client(client, state, federation, round)

    return gan.run(app.whole(it), train=train, aggregate=app.server_side(it)[1]).state


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------------ same bits


def test_the_simulation_gives_the_bits_of_the_loop(hosts):
    pytest.importorskip("ray")
    hosts.server("--simulation")
    changes = {"rounds": "3", "attack": "true"}
    run = hosts.run(["--federation-config", f"num-supernodes={CLIENTS}"], **changes)
    state, history = hosts.finished(run, 3)
    assert same(state, app.loop(federation(**changes)))
    assert [line["absent"] for line in history] == [{}] * 3


def test_a_server_that_is_killed_goes_on_with_the_bits_of_an_undisturbed_run(hosts, hospitals, it):
    hosts.server()
    for client, images in enumerate(hospitals):
        hosts.node(client, images)
    hosts.run()
    until("the first round", lambda: hosts.checkpoint()["round"] >= 1)
    hosts.kill("server")
    assert 1 <= hosts.checkpoint()["round"] < 4
    hosts.server()
    state, history = hosts.finished(hosts.run(), 4)
    assert len(history) == 4
    assert same(state, reference(it, history))
    assert not any(line["absent"] for line in history)


# ------------------------------------------------------------------------------------------------- TLS, keys, and a kill


def private_key(file):
    """An elliptic-curve key as Flower's nodes use it, and its public half beside it."""
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    file.write_bytes(key.private_bytes(*form))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    file.with_suffix(".pub").write_bytes(public)
    return file


def certificates(folder):
    """A certificate authority of this test, and the server's certificate, signed by it."""
    now, made = datetime.datetime.now(datetime.UTC), {}

    def certificate(name, issuer, signing, public, extension):
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        builder = x509.CertificateBuilder(issuer or subject, subject, public, x509.random_serial_number())
        day = datetime.timedelta(days=1)
        builder = builder.not_valid_before(now - day).not_valid_after(now + day)
        return builder.add_extension(*extension).sign(signing, hashes.SHA256())

    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    authority = x509.BasicConstraints(ca=True, path_length=None), True
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
    made["ca.pem"] = certificate("medsec test", None, keys[0], keys[0].public_key(), authority)
    made["server.pem"] = certificate("server", made["ca.pem"].subject, keys[0], keys[1].public_key(), address)
    for name, each in made.items():
        (folder / name).write_bytes(each.public_bytes(serialization.Encoding.PEM))
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "server.key").write_bytes(keys[1].private_bytes(*form))


def test_over_tls_a_stranger_is_refused_and_a_killed_hospital_comes_back(hosts, hospitals, tmp_path):
    certificates(tmp_path)
    ca = str(tmp_path / "ca.pem")
    own = ["--ssl-certfile", str(tmp_path / "server.pem"), "--ssl-keyfile", str(tmp_path / "server.key")]
    hosts.options |= {
        "server": [*own, "--ssl-ca-certfile", ca, "--enable-supernode-auth"],
        "node": ["--root-certificates", ca],
    }
    hosts.server()
    for client, images in enumerate(hospitals):
        hosts.flwr("supernode", "register", str(private_key(tmp_path / f"key-{client}").with_suffix(".pub")), "here")
        hosts.node(client, images)
    hosts.node(0, hospitals[0], name="stranger", key=private_key(tmp_path / "unknown"))
    until("the refusal", lambda: hosts.processes["stranger"].poll() is not None)
    assert "Failed to" in hosts.log("stranger")
    run = hosts.run(rounds="8")
    until("the first round", lambda: hosts.checkpoint()["round"] >= 1)
    hosts.kill("node-2")
    until("the round without it", lambda: hosts.checkpoint()["round"] >= 2)

    def back():
        """Flower takes the same key again after a minute; until then whatever keeps the service running tries."""
        if "node-2" not in hosts.processes or hosts.processes["node-2"].poll() is not None:
            hosts.processes.pop("node-2", None)
            hosts.node(2, hospitals[2])
            time.sleep(5)
        return hosts.checkpoint()["round"] == 8

    until("the last round", back)
    state, history = hosts.finished(run, 8)
    assert history[1]["absent"].keys() == {"2"}
    assert history[0]["absent"] == history[-1]["absent"] == {}
    assert same(state, reference(federation(rounds="8"), history))
    assert len(hosts.checkpoint()["seats"]) == CLIENTS
