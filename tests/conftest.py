"""The whole suite runs without network: a socket to anything but this machine raises."""
import socket
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise OSError(f"the tests run without network, but something connects to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
