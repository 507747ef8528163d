"""A real S3 server for tests: the RADOS gateway on a one-node Ceph cluster whose disk is memory.

It checks signatures, splits multipart puts and lists in pages as the big ones do.
"""

import base64
import secrets
import struct
import uuid
from pathlib import Path

from minio import Minio

from tests.servers.process import ServerDirectory, ServerMissingError, answers, find_program, free_port, run

_MEMORY_BYTES = 4 << 30
_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}/0]
mon initial members = a
public network = 127.0.0.0/8
mon data = {directory}/mon
osd data = {directory}/osd
rgw data = {directory}/rgw
run dir = {directory}
admin socket =
keyring = {directory}/keyring
log to stderr = true
err to stderr = true
log file =
# one copy on one disk is all there is
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail crit = 1
osd objectstore = memstore
memstore device bytes = {memory_bytes}
osd memory target = 939524096
# without these two starting takes ten times as long
paxos propose interval = 0.05
paxos min wait = 0.01
ms tcp nodelay = true
rgw frontends = beast endpoint=127.0.0.1:{s3_port} tcp_nodelay=1
rgw enable apis = s3, admin
rgw dynamic resharding = false
rgw run sync thread = false
rgw enable usage log = false
rgw thread pool size = 64
# deleted objects give their memory back soon
rgw gc max objs = 4
rgw gc obj min wait = 1
rgw gc processor period = 2
rgw lc max objs = 4
"""


class CephServer:
    """A running S3 server with one account.

    Attributes:
        gateway: the process that speaks S3; what it has stored lies behind it, and outlives its death.
    """

    def __init__(self) -> None:
        """Start it; about 3 s."""
        for program in ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph"):
            _find(program)
        self._port = free_port()
        self._directory = ServerDirectory("ceph")
        self._configuration = self._directory.path / "ceph.conf"
        self.access_key = f"test-{secrets.token_hex(4)}"
        self.secret_key = f"{secrets.token_hex(12)}/+"
        self.endpoint = f"127.0.0.1:{self._port}"
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """URL of the server without a bucket: `s3://ACCESS:SECRET@host:port`."""
        return f"s3://{self.access_key}:{self.secret_key.replace('/', '%2F').replace('+', '%2B')}@{self.endpoint}"

    def create_bucket(self) -> str:
        """Make an empty bucket.

        Returns:
            its object store URL.
        """
        name = f"test-{secrets.token_hex(8)}"
        self._client().make_bucket(name)
        return f"{self.url}/{name}?secure=false"

    def delete_bucket(self, url: str) -> None:
        """Delete a bucket and what lies in it."""
        client, name = self._client(), url.partition("?")[0].rpartition("/")[2]
        for found in client.list_objects(name, recursive=True):
            client.remove_object(name, found.object_name)
        client.remove_bucket(name)

    def restart_gateway(self) -> None:
        """Start the gateway again after it was killed."""
        self.gateway.start_again()
        self._wait()

    def close(self) -> None:
        """Stop it and delete its files."""
        self._directory.close()

    def _start(self) -> None:
        directory, fsid, mon_port = self._directory.path, str(uuid.uuid4()), free_port()
        values = {"fsid": fsid, "mon_port": mon_port, "s3_port": self._port, "directory": directory}
        self._configuration.write_text(_CONFIGURATION.format(**values, memory_bytes=_MEMORY_BYTES))
        for name in ("mon", "osd", "rgw"):
            (directory / name).mkdir()
        (directory / "keyring").write_text(
            "".join(_keyring_entry(entity) for entity in ("mon.", "client.admin", "osd.0"))
        )
        self._start_monitor(directory, fsid, mon_port)
        self._start_storage()
        self.gateway = self._daemon("radosgw", "-n", "client.admin")
        self._tool("radosgw-admin", *self._account())
        self._wait()

    def _wait(self) -> None:
        self.gateway.wait_until(lambda: answers(self._port, b"GET / HTTP/1.0\r\n\r\n", b"HTTP/1."))

    def _start_monitor(self, directory: Path, fsid: str, port: int) -> None:
        address = f"[v2:127.0.0.1:{port}]"
        self._tool("monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, directory / "monmap")
        self._tool(
            "ceph-mon", "--mkfs", "-i", "a", "--monmap", directory / "monmap", "--keyring", directory / "keyring"
        )
        monitor = self._daemon("ceph-mon", "-i", "a", "--public-addrv", address)
        monitor.wait_until(lambda: answers(port))

    def _start_storage(self) -> None:
        osd_id = str(uuid.uuid4())
        self._tool("ceph", "--connect-timeout", "30", "osd", "new", osd_id, "0")
        self._tool("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id, "--no-mon-config")
        self._daemon("ceph-osd", "-i", "0")

    def _account(self) -> list[str]:
        keys = [f"--access-key={self.access_key}", f"--secret-key={self.secret_key}"]
        return ["user", "create", "--uid=test", "--display-name=test", "--max-buckets=0", *keys]

    def _daemon(self, program: str, *arguments: str | Path):
        return self._directory.start(program, [_find(program), "-f", "-c", self._configuration, *arguments])

    def _tool(self, program: str, *arguments: str | Path) -> str:
        return run([_find(program), "-c", self._configuration, *arguments])

    def _client(self) -> Minio:
        return Minio(self.endpoint, self.access_key, self.secret_key, secure=False, region="us-east-1")


def _keyring_entry(entity: str) -> str:
    """One member of the cluster, allowed everything; a key is its type, creation time and length before 16 bytes."""
    key = base64.b64encode(struct.pack("<HIIH", 1, 0, 0, 16) + secrets.token_bytes(16)).decode()
    allowed = "".join(f'\tcaps {service} = "allow *"\n' for service in ("mon", "osd", "mgr"))
    return f"[{entity}]\n\tkey = {key}\n{allowed}"


def _find(program: str) -> Path:
    try:
        return find_program(program)
    except ServerMissingError:
        raise ServerMissingError(f"Ceph ({program})") from None
