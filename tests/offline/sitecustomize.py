"""No network: whatever would leave this machine raises OSError instead.

Python imports a module of this name at its start wherever this folder is on PYTHONPATH, so the processes that the tests
start are cut off as well; conftest.py runs it for the tests themselves.
"""
import socket


def local(host) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    return host is None or host in ("", "localhost", "::1") or host.startswith("127.")


def blocked(function):
    def call(*arguments, **keywords):
        host = next((a for a in arguments if isinstance(a, (str, bytes)) or a is None), keywords.get("host"))
        if not local(host):
            raise OSError(f"the tests run without network, but something looks up {host!r}")
        return function(*arguments, **keywords)
    return call


def blocked_method(function):
    def call(self, *arguments):
        if self.family != socket.AF_UNIX and not local(arguments[-1][0]):  # sendto's address comes last
            raise OSError(f"the tests run without network, but something connects to {arguments[-1]}")
        return function(self, *arguments)
    return call


for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    setattr(socket, name, blocked(getattr(socket, name)))
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, blocked_method(getattr(socket.socket, name)))
